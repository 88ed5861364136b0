"""A graph of a bundle in Triton's Python backend: what Triton runs, not what this package imports.

It lies as `1/model.py` beside `model.onnx` in a repository for `--runtime python`. As
`backends/onnxruntime/model.py` it stands in for Triton's ONNX Runtime backend where that is not
there: a config with `backend: "onnxruntime"` loads unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class GraphModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph."""
        config = json.loads(args["model_config"])
        self._batches = config["max_batch_size"] > 0
        # Of the Python backend Triton makes it model.py, which is this file.
        given = config.get("default_model_filename", "")
        name = given if given.endswith(".onnx") else "model.onnx"
        # For a Python-based backend this is a folder of the backend, so both are looked at.
        folders = [Path(args["model_repository"]), Path(__file__).parent]
        paths = [
            path
            for folder in folders
            for path in (folder / args["model_version"] / name, folder / name)
        ]
        path = next(each for each in paths if each.is_file())
        on_gpu = args["model_instance_kind"] == "GPU"
        providers: list[Any] = ["CPUExecutionProvider"]
        if on_gpu:
            providers = [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]})]
        self._session = ort.InferenceSession(str(path), providers=providers)
        # Without this a GPU that fails is replaced by the CPU, and nobody is told.
        self._session.disable_fallback()
        (self._input,) = [each["name"] for each in config["input"]]
        (self._output,) = [each["name"] for each in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, those whose rows fit together in one call of the runtime."""
        arrays = [
            pb_utils.get_input_tensor_by_name(each, self._input).as_numpy() for each in requests
        ]
        groups: dict[Any, list[int]] = {}
        for number, array in enumerate(arrays):
            # Without batching a request has a call for itself: its rows depend on each other.
            key = array.shape[1:] if self._batches else number
            groups.setdefault(key, []).append(number)
        responses: list[Any] = [None] * len(requests)
        for numbers in groups.values():
            rows = np.concatenate([arrays[number] for number in numbers])
            try:
                (output,) = self._session.run([self._output], {self._input: rows})
            except Exception as exc:  # noqa: BLE001  # Triton gives it to whoever asked
                error = pb_utils.TritonError(str(exc))
                for number in numbers:
                    responses[number] = pb_utils.InferenceResponse([], error)
                continue
            start = 0
            for number in numbers:
                part = output[start : start + len(arrays[number])]
                start += len(part)
                tensor = pb_utils.Tensor(self._output, np.ascontiguousarray(part))
                responses[number] = pb_utils.InferenceResponse([tensor])
        return responses


TritonPythonModel = GraphModel  # the name that Triton looks for
