"""TensorRT and TensorRT for RTX: engines that are built, audited, verified and run.

No engine serves before it has agreed with PyTorch on the card that it runs on.
"""
