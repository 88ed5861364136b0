"""Running an ONNX file that belongs to no bundle yet, with any of its inner values as output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime as ort
from numpy.typing import NDArray

from actionclip_deploy.runtimes.machine import num_available_cores

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ERROR = 3  # log severity


class GraphSession:
    """A graph of one input in ONNX Runtime, on the CPU.

    Args:
        path: The ONNX file.
        outputs: Values to give; none for the graph's own output.
    """

    def __init__(self, path: Path, outputs: Sequence[str] = ()) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_available_cores()
        options.log_severity_level = _ERROR
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(str(path), options, providers=providers)
        self._input = self._session.get_inputs()[0].name
        self._outputs = list(outputs) or [self._session.get_outputs()[0].name]

    def run(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Give the outputs for an input."""
        arrays: list[NDArray[Any]] = self._session.run(self._outputs, {self._input: array})
        return arrays
