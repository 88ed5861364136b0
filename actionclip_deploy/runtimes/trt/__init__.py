"""TensorRT and TensorRT for RTX: engines that are built, verified, audited and run."""
