"""The Open Inference Protocol, version 2, and its routes over HTTP.

Its models are the bundle's graphs, and `clip` for whole clips. Tensors come and go as JSON or as
binary data after the JSON, as Triton's extension has it; requests share calls of the runtime.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from actionclip_deploy import __version__
from actionclip_deploy.manifest import TensorSpec
from actionclip_deploy.records import ErrorAnswerV2, Record
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.oip.oip_tensors import (
    VERSION,
    BodyMemory,
    IndexJson,
    InferAnswer,
    InferJson,
    InferRequest,
    Model,
    check_output,
    datatype,
    infer_answer,
    models_of,
    parse_json,
    parse_request,
    request_schema,
    sizes,
)
from actionclip_deploy.serve.service import Budget, Service

_EXTENSIONS = ("binary_tensor_data", "model_configuration")
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


class ServerAnswer(Record):
    """What the server is."""

    name: str
    version: str
    extensions: tuple[str, ...]


class LiveAnswer(Record):
    """Whether the server answers."""

    live: Literal[True]


class ReadyAnswer(Record):
    """Whether the server takes requests."""

    ready: bool


class ModelReadyAnswer(Record):
    """Whether a model takes requests."""

    name: str
    ready: Literal[True]


class TensorAnswer(Record):
    """An input or output of a model; -1 stands for any positive number."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelAnswer(Record):
    """What a model takes and gives."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorAnswer, ...]
    outputs: tuple[TensorAnswer, ...]


class ConfigTensorAnswer(Record):
    """An input or output without the size of the batch."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class ConfigAnswer(Record):
    """How a model is run, in Triton's words, as far as they have a meaning here."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: int
    input: tuple[ConfigTensorAnswer, ...]
    output: tuple[ConfigTensorAnswer, ...]
    dynamic_batching: dict[str, int]


class IndexEntry(Record):
    """One model in the list."""

    name: str
    version: str
    state: str
    reason: str


class Inference:
    """What the protocol has, whatever it is spoken over: HTTP and gRPC call these functions.

    Args:
        service: What does the work.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.models = models_of(service)
        self.memory = BodyMemory(service)
        # One thread, so that one request's values at a time are in memory as Python has them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="json")

    def find(self, name: str, version: str = VERSION) -> Model:
        """The model of a name and version.

        Raises:
            RequestRefusedError: If there is none (404).
        """
        if name not in self.models:
            raise refusals.unknown_model(name, list(self.models))
        if version != VERSION:
            raise refusals.unknown_version(name, version, VERSION)
        return self.models[name]

    def server(self) -> ServerAnswer:
        """What the server is, and the extensions of the protocol that it has."""
        return ServerAnswer(name="actionclip-deploy", version=__version__, extensions=_EXTENSIONS)

    def metadata(self, model: Model) -> ModelAnswer:
        """What a model takes and gives."""
        return ModelAnswer(
            name=model.name,
            versions=(VERSION,),
            platform=_platform(self.service),
            inputs=(_metadata(model.input),),
            outputs=(_metadata(model.output),),
        )

    def config(self, model: Model) -> ConfigAnswer:
        """How a model is run, in Triton's words."""
        delay = round(self.service.settings.max_delay_ms * 1000)
        return ConfigAnswer(
            name=model.name,
            platform=_platform(self.service),
            backend=self.service.runtime.describe().name,
            version_policy={"latest": {"num_versions": 1}},
            max_batch_size=int(self.service.limits.rows),
            input=(_config(model.input),),
            output=(_config(model.output),),
            dynamic_batching={"max_queue_delay_microseconds": delay},
        )

    def index(self) -> list[IndexEntry]:
        """All models, with their states."""
        return [
            IndexEntry(name=name, version=VERSION, state="READY", reason="") for name in self.models
        ]

    async def infer(
        self, model: Model, parse: Callable[[], InferRequest], *, num_bytes: int, budget: Budget
    ) -> tuple[InferRequest, Float32Array]:
        """Run a model on rows that share calls with those of other requests.

        Args:
            model: What to run.
            parse: Reads the request.
            num_bytes: What there is to be parsed, beyond binary tensors.
            budget: The request's time.

        Returns:
            The request, and its output.

        Raises:
            RequestRefusedError: If the request cannot be done.
            ShapeError: If the input is not one of the model.
            InferenceError: If the runtime fails.
        """
        if num_bytes <= _SMALL_JSON_BYTES:
            given = parse()
        else:
            given = await asyncio.get_running_loop().run_in_executor(self._thread, parse)
        budget = _with_timeout(budget, given.timeout_seconds)
        output = await self.service.run_graph(model.name, given.array, budget)
        check_output(model, output)
        return given, output


def make_router(inference: Inference) -> APIRouter:
    """The routes, bound to a service."""
    router = APIRouter(prefix="/v2")
    _add_server(router, inference)
    _add_models(router, inference)
    _add_inference(router, inference)
    _add_index(router, inference)
    return router


def _add_server(router: APIRouter, inference: Inference) -> None:
    service = inference.service

    @router.get("", responses={200: {"model": ServerAnswer}})
    async def server() -> Response:
        """What the server is, and the extensions of the protocol that it has."""
        return _answer(inference.server())

    @router.get("/health/live", responses={200: {"model": LiveAnswer}})
    async def live() -> Response:
        """Whether the server answers."""
        return _answer(LiveAnswer(live=True))

    @router.get(
        "/health/ready", responses={200: {"model": ReadyAnswer}, 400: {"model": ReadyAnswer}}
    )
    async def ready() -> Response:
        """Whether it is verified, warm, and takes requests; 400 if not, as Triton has it."""
        return _answer(ReadyAnswer(ready=service.is_ready), 200 if service.is_ready else 400)


def _add_models(router: APIRouter, inference: Inference) -> None:
    async def metadata(_: Request, model: Model) -> Response:
        """What a model takes and gives."""
        return _answer(inference.metadata(model))

    async def ready(_: Request, model: Model) -> Response:
        """Whether a model takes requests; all of them do once the server is ready."""
        return _answer(ModelReadyAnswer(name=model.name, ready=True))

    async def config(_: Request, model: Model) -> Response:
        """How a model is run, in Triton's words."""
        return _answer(inference.config(model))

    for tail, route, answer in (
        ("", metadata, ModelAnswer),
        ("/ready", ready, ModelReadyAnswer),
        ("/config", config, ConfigAnswer),
    ):
        responses = _responses(answer, 404)
        _add(router, inference, tail, route, methods=["GET"], responses=responses)


def _metadata(tensor: TensorSpec) -> TensorAnswer:
    return TensorAnswer(name=tensor.name, datatype=datatype(tensor), shape=sizes(tensor))


def _config(tensor: TensorSpec) -> ConfigTensorAnswer:
    # Triton leaves out the size of the batch.
    return ConfigTensorAnswer(
        name=tensor.name, data_type=f"TYPE_{datatype(tensor)}", dims=sizes(tensor)[1:]
    )


def _platform(service: Service) -> str:
    """`onnxruntime_onnx` is a name of Triton's; it has none for PyTorch as it runs here."""
    names = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
    name = service.runtime.describe().name
    return names.get(name, name)


def _add_inference(router: APIRouter, inference: Inference) -> None:
    service = inference.service

    async def infer(request: Request, model: Model) -> Response:
        """Run a model on rows that share calls with those of other requests."""
        with inference.memory.body() as body:
            await body.read(request, service.limits.field_bytes)
            given, output = await inference.infer(
                model,
                partial(parse_request, model, body.data, body.json_bytes),
                num_bytes=body.json_bytes,
                budget=service.budget(read_seconds=request.state.body.read_seconds),
            )
        if given.is_binary or output.size <= _SMALL_OUTPUT:
            return infer_answer(model, output, given)
        return await asyncio.to_thread(infer_answer, model, output, given)

    responses = _responses(InferAnswer, 400, 404, 408, 413, 415, 504)
    responses[200]["content"] = {"application/octet-stream": _BINARY}
    body = _json_body(InferJson)
    body["content"]["application/octet-stream"] = _BINARY
    _add(
        router,
        inference,
        "/infer",
        infer,
        methods=["POST"],
        responses=responses,
        openapi_extra={"requestBody": body},
    )


def _add_index(router: APIRouter, inference: Inference) -> None:
    @router.post(
        "/repository/index",
        responses=_responses(list[IndexEntry], 400, 408, 413, 415),
        openapi_extra={"requestBody": _json_body(IndexJson, required=False)},
    )
    async def index(request: Request) -> Response:
        """All models, with their states."""
        with inference.memory.body() as body:
            await body.read(request, _INDEX_BYTES)
            if body.data:
                parse_json(IndexJson, body.data, body.json_bytes)
        return JSONResponse([entry.to_dict() for entry in inference.index()])


def _add(router: APIRouter, inference: Inference, tail: str, route: _Route, **options: Any) -> None:
    """Add a route of a model twice: with the version in its path, and without."""
    # In the OpenAPI document alone; what else is asked for is refused with our sentence.
    a_model = Path(json_schema_extra={"enum": list(inference.models)})
    a_version = Path(json_schema_extra={"enum": [VERSION]})

    async def latest(request: Request, name: str = a_model) -> Response:
        return await route(request, inference.find(name))

    async def versioned(
        request: Request, name: str = a_model, version: str = a_version
    ) -> Response:
        return await route(request, inference.find(name, version))

    options = {"name": route.__name__, "description": route.__doc__, **options}
    router.add_api_route(f"/models/{{name}}{tail}", latest, **options)
    router.add_api_route(f"/models/{{name}}/versions/{{version}}{tail}", versioned, **options)


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


def _responses(answer: Any, *statuses: int) -> dict[Any, Any]:
    """For the OpenAPI document: an answer, and the statuses that a route may refuse with."""
    refused = sorted({*statuses, 401, 429, 500, 503})
    return {200: {"model": answer}, **{status: {"model": ErrorAnswerV2} for status in refused}}


def _answer(record: Record, status: int = 200) -> Response:
    return Response(record.to_json(), status, media_type="application/json")
