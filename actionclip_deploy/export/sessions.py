"""Running an ONNX file that belongs to no bundle yet, with any of its inner values as output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from actionclip_deploy.runtimes.machine import num_available_cores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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


def write_with_outputs(path: Path, target: Path, values: Mapping[str, int]) -> None:
    """Write a graph once more, with inner values as further outputs.

    Args:
        path: The graph.
        target: The new file, in the same folder: weights beside the graph are not copied.
        values: Names of values, and the type of each as `onnx.TensorProto` numbers it.
    """
    model = onnx.load(str(path), load_external_data=False)
    for value, data_type in values.items():
        model.graph.output.append(helper.make_tensor_value_info(value, data_type, None))
    target.write_bytes(model.SerializeToString(deterministic=True))
