"""Training: configuration, loss, optimiser, the loop and its checkpoints.

Import what you need from the modules; this one imports nothing, so that reading a configuration
or an annotation file does not load torch.
"""
