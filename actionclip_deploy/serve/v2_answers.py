"""The output of a graph -> the answer to a request for inference."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi.responses import Response
from pydantic_core import to_json

from actionclip_deploy.errors import InferenceError
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.oip_tensors import InferRequest
from actionclip_deploy.serve.v2_bodies import HEADER
from actionclip_deploy.serve.v2_models import VERSION, Model


def check_output(model: Model, output: Float32Array) -> None:
    """Do nothing if an output consists of numbers.

    Raises:
        RequestRefusedError: If it does not, because the input made the arithmetic overflow (400).
        InferenceError: If it does not, for whatever input.
    """
    if np.isfinite(output).all():
        return
    if model.input.dtype.kind == "f":
        raise refusals.bad_tensor(
            f"The input {model.input.name} is so large that {model.name} gives no numbers for it; "
            "send frame features as the visual graph gives them."
        )
    raise InferenceError(
        f"The {model.name} graph gave values that are not finite; run `actionclip verify`."
    )


def infer_answer(model: Model, output: Float32Array, request: InferRequest) -> Response:
    """Answer with an output.

    Args:
        model: What ran.
        output: float32, finite, of the shape that the model gives.
        request: Says how. Binary data is little-endian; in JSON the output is a flat list whose
            numbers give exactly the same float32.
    """
    tensor: dict[str, Any] = {
        "name": model.output.name,
        "datatype": model.output.datatype,
        "shape": output.shape,
    }
    answer: dict[str, Any] = {
        "model_name": model.name,
        "model_version": VERSION,
        "outputs": [tensor],
    }
    if request.request_id:
        answer["id"] = request.request_id
    if not request.is_binary:
        tensor["data"] = output.ravel().tolist()
        return Response(to_json(answer), media_type="application/json")
    tensor["parameters"] = {"binary_data_size": output.nbytes}
    head = to_json(answer)
    data = np.ascontiguousarray(output, model.output.dtype.newbyteorder("<")).data
    return Response(
        b"".join((head, data)),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )
