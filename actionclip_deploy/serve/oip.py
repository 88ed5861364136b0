"""Routes of the Open Inference Protocol, version 2, over HTTP.

Its models are the bundle's graphs, and `clip` for whole clips. Tensors come and go as JSON or as
binary data after the JSON, as Triton's extension has it; requests share calls of the runtime.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import to_json

from actionclip_deploy import __version__
from actionclip_deploy.errors import InferenceError
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.serve import oip_tensors, refusals
from actionclip_deploy.serve.oip_tensors import (
    HEADER,
    VERSION,
    Body,
    BodyMemory,
    ConfigAnswer,
    ErrorAnswerV2,
    IndexEntry,
    IndexJson,
    InferAnswer,
    InferJson,
    InferRequest,
    LiveAnswer,
    Model,
    ModelAnswer,
    ModelReadyAnswer,
    ReadyAnswer,
    ServerAnswer,
    parse_json,
    parse_request,
    request_schema,
)
from actionclip_deploy.serve.service import Budget, Service

# The output of a graph -> the answer to a request for inference.


def check_output(model: Model, output: Float32Array) -> None:
    """Do nothing if an output consists of numbers.

    Raises:
        RequestRefusedError: If it does not, because the input made the arithmetic overflow (400).
        InferenceError: If it does not, for whatever input.
    """
    if np.isfinite(output).all():
        return
    if model.input.dtype == "float32":
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
        "datatype": oip_tensors.datatype(model.output),
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
    data = np.ascontiguousarray(output, np.dtype(model.output.dtype).newbyteorder("<")).data
    return Response(
        b"".join((head, data)),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )


_EXTENSIONS = ["binary_tensor_data", "model_configuration"]
# Beyond this, JSON is read and written while the server does something else.
_SMALL_JSON_BYTES = 64 * 1024
_SMALL_OUTPUT = 8 * 1024  # numbers
_INDEX_BYTES = 64 * 1024

_BINARY = {
    "schema": {
        "type": "string",
        "format": "binary",
        "description": "JSON of the length in Inference-Header-Content-Length, then tensors.",
    }
}

_Route = Callable[[Request, Model], Awaitable[Response]]


def make_router(service: Service) -> APIRouter:
    """The routes, bound to a service."""
    router = APIRouter(prefix="/v2")
    _add_server(router, service)
    models, memory = oip_tensors.models_of(service), BodyMemory(service)
    _add_models(router, service, models)
    _add_inference(router, service, models, memory)
    _add_index(router, models, memory)
    return router


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the statuses that a route may refuse with."""
    every = (401, 429, 500, 503)
    return {status: {"model": ErrorAnswerV2} for status in sorted({*statuses, *every})}


def _add_server(router: APIRouter, service: Service) -> None:
    @router.get("", responses={200: {"model": ServerAnswer}})
    async def server() -> Response:
        """What the server is, and the extensions of the protocol that it has."""
        return JSONResponse(
            {"name": "actionclip-deploy", "version": __version__, "extensions": _EXTENSIONS}
        )

    @router.get("/health/live", responses={200: {"model": LiveAnswer}})
    async def live() -> Response:
        """Whether the server answers."""
        return JSONResponse({"live": True})

    @router.get(
        "/health/ready", responses={200: {"model": ReadyAnswer}, 400: {"model": ReadyAnswer}}
    )
    async def ready() -> Response:
        """Whether it is verified, warm, and takes requests; 400 if not, as Triton has it."""
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 400)


def _add_models(router: APIRouter, service: Service, models: dict[str, Model]) -> None:
    async def metadata(_: Request, model: Model) -> Response:
        """What a model takes and gives."""
        return JSONResponse(oip_tensors.metadata(service, model))

    async def ready(_: Request, model: Model) -> Response:
        """Whether a model takes requests; all of them do once the server is ready."""
        return JSONResponse({"name": model.name, "ready": True})

    async def config(_: Request, model: Model) -> Response:
        """How a model is run, in Triton's words."""
        return JSONResponse(oip_tensors.config(service, model))

    for tail, route, answer in (
        ("", metadata, ModelAnswer),
        ("/ready", ready, ModelReadyAnswer),
        ("/config", config, ConfigAnswer),
    ):
        responses = {200: {"model": answer}, **error_answers(404)}
        _add(router, models, tail, route, methods=["GET"], responses=responses)


def _add_inference(
    router: APIRouter, service: Service, models: dict[str, Model], memory: BodyMemory
) -> None:
    # One thread, so that one request's JSON at a time is in memory as Python has it.
    thread = ThreadPoolExecutor(1, thread_name_prefix="json")

    async def infer(request: Request, model: Model) -> Response:
        """Run a model on rows that share calls with those of other requests."""
        with memory.body() as body:
            await body.read(request, service.limits.field_bytes)
            budget = service.budget(read_seconds=request.state.body.read_seconds)
            given = await _parse(model, body, thread)
            budget = _with_timeout(budget, given.timeout_seconds)
            output = await service.run_graph(model.name, given.array, budget)
        check_output(model, output)
        if given.is_binary or output.size <= _SMALL_OUTPUT:
            return infer_answer(model, output, given)
        return await asyncio.to_thread(infer_answer, model, output, given)

    answers = {"model": InferAnswer, "content": {"application/octet-stream": _BINARY}}
    responses = {200: answers, **error_answers(400, 404, 408, 413, 415, 504)}
    body = _json_body(InferJson)
    body["content"]["application/octet-stream"] = _BINARY
    _add(
        router,
        models,
        "/infer",
        infer,
        methods=["POST"],
        responses=responses,
        openapi_extra={"requestBody": body},
    )


def _add_index(router: APIRouter, models: dict[str, Model], memory: BodyMemory) -> None:
    @router.post(
        "/repository/index",
        responses={200: {"model": list[IndexEntry]}, **error_answers(400, 408, 413, 415)},
        openapi_extra={"requestBody": _json_body(IndexJson, required=False)},
    )
    async def index(request: Request) -> Response:
        """All models, with their states."""
        with memory.body() as body:
            await body.read(request, _INDEX_BYTES)
            if body.data:
                parse_json(IndexJson, body.data, body.json_bytes)
        entry = {"version": oip_tensors.VERSION, "state": "READY", "reason": ""}
        return JSONResponse([{"name": name, **entry} for name in models])


def _add(
    router: APIRouter, models: dict[str, Model], tail: str, route: _Route, **options: Any
) -> None:
    """Add a route of a model twice: with the version in its path, and without."""
    # In the OpenAPI document alone; what else is asked for is refused with our sentence.
    a_model = Path(json_schema_extra={"enum": list(models)})
    a_version = Path(json_schema_extra={"enum": [oip_tensors.VERSION]})

    async def latest(request: Request, name: str = a_model) -> Response:
        return await route(request, oip_tensors.find_model(models, name, oip_tensors.VERSION))

    async def versioned(
        request: Request, name: str = a_model, version: str = a_version
    ) -> Response:
        return await route(request, oip_tensors.find_model(models, name, version))

    options = {"name": route.__name__, "description": route.__doc__, **options}
    router.add_api_route(f"/models/{{name}}{tail}", latest, **options)
    router.add_api_route(f"/models/{{name}}/versions/{{version}}{tail}", versioned, **options)


async def _parse(model: Model, body: Body, thread: ThreadPoolExecutor) -> InferRequest:
    arguments = (model, body.data, body.json_bytes)
    if body.json_bytes <= _SMALL_JSON_BYTES:
        return parse_request(*arguments)
    return await asyncio.get_running_loop().run_in_executor(thread, parse_request, *arguments)


def _with_timeout(budget: Budget, seconds: float | None) -> Budget:
    """The time that a request asks for; it has begun when its body was there."""
    if seconds is None:
        return budget
    if seconds > budget.seconds:
        raise refusals.bad_request(
            f"The timeout is {seconds * 1e6:.0f} microseconds and may be {budget.seconds * 1e6:.0f}"
            "; ask for less, or for none."
        )
    return replace(budget, seconds=seconds, deadline=budget.deadline - budget.seconds + seconds)


def _json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """For the OpenAPI document."""
    content = {"application/json": {"schema": request_schema(model)}}
    return {"required": required, "content": content}
