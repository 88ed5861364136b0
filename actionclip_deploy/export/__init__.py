"""From a checkpoint to a bundle: deployable graphs, ONNX files, golden data and the parity gate."""

from __future__ import annotations

from actionclip_deploy.export.int8 import Quantization
from actionclip_deploy.export.int8_options import Int8Options
from actionclip_deploy.export.pipeline import ExportResult, export_checkpoint

__all__ = ["ExportResult", "Int8Options", "Quantization", "export_checkpoint"]
