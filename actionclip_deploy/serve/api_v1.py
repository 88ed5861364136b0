"""Routes of /v1: classify, embed, labels, info."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from actionclip_deploy.records import (
    BankJson,
    BankListAnswer,
    ClassifyAnswer,
    ClassifyFields,
    ClassifyJson,
    DiffAnswer,
    EmbedAnswer,
    EmbedFields,
    EmbedJson,
    ErrorAnswer,
    LabelsAnswer,
)
from actionclip_deploy.serve import refusals, v1
from actionclip_deploy.serve.forms import (
    classify_options,
    embedding_inputs,
    is_multipart,
    parse_views,
    read_json,
    read_videos,
    validated,
)
from actionclip_deploy.serve.requests import Budget, Input, VideoInput
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.spool import Spool

_VIDEO = {"type": "string", "format": "binary", "description": "A video file."}
_FRAMES = {
    "type": "string",
    "format": "binary",
    "description": "A .npy file of frames, RGB, uint8, shape (N, H, W, 3).",
}
_EMBEDDINGS = {
    "type": "string",
    "format": "binary",
    "description": "A .npy file of embeddings of one video's views, norm 1, shape (V, D).",
}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the statuses that a route may refuse with."""
    every = (401, 429, 500, 503)
    return {status: {"model": ErrorAnswer} for status in sorted({*statuses, *every})}


def make_router(service: Service, spool: Spool) -> APIRouter:
    """The routes, bound to a service.

    Args:
        service: Does the work.
        spool: Where uploads lie meanwhile.
    """
    router = APIRouter(prefix="/v1")
    _add_videos(router, service, spool)
    _add_labels(router, service)

    @router.get("/info", responses=error_answers())
    async def info() -> dict[str, Any]:
        """What runs: runtime, provider, precision, engine, banks, limits."""
        return v1.info(service)

    return router


def _add_videos(router: APIRouter, service: Service, spool: Spool) -> None:
    @router.post(
        "/classify",
        responses={
            200: {"model": ClassifyAnswer},
            **error_answers(400, 404, 408, 413, 415, 422, 504),
        },
        openapi_extra=_body(ClassifyFields, ClassifyJson, frames=_FRAMES, embeddings=_EMBEDDINGS),
    )
    async def classify(request: Request) -> Response:
        """Rank labels for videos, frames or embeddings."""
        with spool.files() as files:
            inputs: list[Input]
            if is_multipart(request):
                inputs, given = await read_videos(request, service, files)
                fields = validated(ClassifyFields, given)
            else:
                body = await read_json(request, ClassifyJson, service)
                inputs, fields = embedding_inputs(service, body.embeddings), body
            budget = _budget(service, request, fields.timeout_ms)
            options = classify_options(fields)
            classified = await service.classify(inputs, options, budget)
        return JSONResponse(
            v1.classified(service, request.state.request_id, classified, options, budget)
        )

    @router.post(
        "/embed",
        responses={
            200: {"model": EmbedAnswer},
            **error_answers(400, 408, 413, 415, 422, 504),
        },
        openapi_extra=_body(EmbedFields, EmbedJson, frames=_FRAMES),
    )
    async def embed(request: Request) -> Response:
        """Embed videos, frames or texts."""
        if not is_multipart(request):
            body = await read_json(request, EmbedJson, service)
            budget = _budget(service, request, body.timeout_ms)
            embeddings = await service.embed_texts(body.texts, budget)
            return JSONResponse(
                v1.embedded_texts(service, request.state.request_id, embeddings, budget)
            )
        with spool.files() as files:
            inputs, given = await read_videos(request, service, files)
            fields = validated(EmbedFields, given)
            budget = _budget(service, request, fields.timeout_ms)
            if not all(isinstance(each, VideoInput) for each in inputs):
                raise refusals.bad_request("Embeddings are embedded already; send videos or texts.")
            videos = await service.embed_videos(
                cast(list[VideoInput], inputs), parse_views(fields.views), budget
            )
        return JSONResponse(v1.embedded_videos(service, request.state.request_id, videos, budget))


def _add_labels(router: APIRouter, service: Service) -> None:
    banks = service.banks

    @router.get("/labels", responses={200: {"model": BankListAnswer}, **error_answers()})
    async def list_banks() -> Response:
        """All label banks, without their labels."""
        names = sorted({*banks.names(), *banks.building_names()})
        return JSONResponse(
            {"banks": [v1.bank(service, name, with_labels=False) for name in names]}
        )

    @router.get(
        "/labels/{name}", responses={200: {"model": LabelsAnswer}, **error_answers(404, 422)}
    )
    async def get_bank(name: str) -> Response:
        """A label bank: its active version, its last versions, and its build."""
        return JSONResponse(v1.bank(service, name))

    @router.get(
        "/labels/{name}/diff", responses={200: {"model": DiffAnswer}, **error_answers(404, 422)}
    )
    async def diff(
        name: str,
        old: Annotated[int, Query(ge=1, description="A version.")],
        new: Annotated[int | None, Query(ge=1, description="By default, the active one.")] = None,
    ) -> Response:
        """What changed from one version to another."""
        newer = banks.get(name).version if new is None else new
        found = banks.diff(name, old, newer)
        return JSONResponse(v1.diff(name, old, newer, found))

    @router.put(
        "/labels/{name}",
        status_code=202,
        responses={
            202: {"model": LabelsAnswer},
            **error_answers(400, 408, 409, 413, 415, 422),
        },
        openapi_extra={"requestBody": _json_body(BankJson)},
    )
    async def put_bank(name: str, request: Request) -> Response:
        """Build a label bank in the background; it becomes active once it is done."""
        if is_multipart(request):
            raise refusals.unsupported_type("A label bank is put as application/json.")
        body = await read_json(request, BankJson, service)
        num_bytes = service.check_bank(name, body.labels, body.templates)
        banks.start_build(name, body.labels, body.templates, num_bytes=num_bytes)
        return JSONResponse(
            v1.bank(service, name, with_labels=False),
            status_code=202,
            headers={"location": f"/v1/labels/{name}"},
        )

    @router.delete("/labels/{name}", status_code=204, responses=error_answers(404, 422))
    async def delete_bank(name: str) -> Response:
        """Remove a label bank, or end its build; requests that have begun finish with it."""
        await banks.remove(name)
        return Response(status_code=204)


def _budget(service: Service, request: Request, timeout_ms: float | None) -> Budget:
    seconds = None if timeout_ms is None else timeout_ms / 1000
    return service.budget(seconds, read_seconds=request.state.body.read_seconds)


def _body(form: Any, json_model: Any, **files: dict[str, str]) -> dict[str, Any]:
    """For the OpenAPI document: a form with files, or JSON."""
    schema = form.model_json_schema()
    schema["properties"] = {
        "video": {"type": "array", "items": _VIDEO},
        **{name: {"type": "array", "items": file} for name, file in files.items()},
        **schema["properties"],
    }
    content = {"multipart/form-data": {"schema": schema}, **_json_body(json_model)["content"]}
    return {"requestBody": {"required": True, "content": content}}


def _json_body(model: Any) -> dict[str, Any]:
    return {
        "required": True,
        "content": {"application/json": {"schema": model.model_json_schema()}},
    }
