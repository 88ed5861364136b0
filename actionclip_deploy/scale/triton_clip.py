"""Whole clips in Triton's Python backend, by the models `visual` and `temporal` beside it.

For plans of TensorRT, which exist of the two graphs and not of both together. Triton refuses an
ensemble of them: its batch of frames is no batch of clips.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class ClipModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which models it asks."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._visual = parameters["visual_model"]["string_value"]
        self._temporal = parameters["temporal_model"]["string_value"]
        self._rows = int(parameters["visual_rows"]["string_value"])

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, each by itself; the models that it asks share their calls."""
        responses = []
        for request in requests:
            clips = pb_utils.get_input_tensor_by_name(request, "frames").as_numpy()
            try:
                embeddings = await self._embed(clips)
                tensor = pb_utils.Tensor("video_embedding", embeddings)
                responses.append(pb_utils.InferenceResponse([tensor]))
            except RuntimeError as exc:
                responses.append(pb_utils.InferenceResponse([], pb_utils.TritonError(str(exc))))
        return responses

    async def _embed(self, clips: Any) -> Any:
        frames = clips.reshape(-1, *clips.shape[2:])
        features = [
            await self._ask(
                self._visual, "frames", "frame_features", frames[start : start + self._rows]
            )
            for start in range(0, len(frames), self._rows)
        ]
        joined = np.concatenate(features).reshape(*clips.shape[:2], -1)
        return await self._ask(self._temporal, "frame_features", "video_embedding", joined)

    async def _ask(self, model: str, given: str, wanted: str, array: Any) -> Any:
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[wanted],
            inputs=[pb_utils.Tensor(given, np.ascontiguousarray(array))],
        )
        response = await request.async_exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, wanted).as_numpy()


TritonPythonModel = ClipModel  # the name that Triton looks for
