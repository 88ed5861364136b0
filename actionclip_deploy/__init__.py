"""From a fine-tuned ActionCLIP checkpoint to a verified ONNX bundle that scores videos."""

__version__ = "0.1.0"
