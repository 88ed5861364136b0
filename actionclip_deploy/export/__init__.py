"""From a checkpoint to a bundle: deployable graphs, ONNX files, golden data and the parity gate."""

from __future__ import annotations

from actionclip_deploy.export.pipeline import ExportResult, export_checkpoint
from actionclip_deploy.export.quantization import Fp8Options, Int8Options
from actionclip_deploy.export.quantized_bundle import Quantization

__all__ = ["ExportResult", "Fp8Options", "Int8Options", "Quantization", "export_checkpoint"]
