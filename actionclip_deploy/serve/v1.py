"""What the service gives -> the JSON of /v1's answers (schemas.py)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from actionclip_deploy import __version__
from actionclip_deploy.labels import LabelBankDiff
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
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.arrays import read_float_array
from actionclip_deploy.serve.banks import BankVersion, OldVersion
from actionclip_deploy.serve.service import (
    Budget,
    Classified,
    ClassifiedVideo,
    ClassifyOptions,
    EmbeddedVideo,
    EmbeddingInput,
    Input,
    RefusedVideo,
    Service,
    VideoInput,
    check_embeddings,
)
from actionclip_deploy.serve.uploads import Form, FormFile, RequestFiles, Spool, read_form
from actionclip_deploy.views import ViewFrames


def classify_answer(
    service: Service,
    request_id: str,
    given: Classified,
    options: ClassifyOptions,
    budget: Budget,
) -> dict[str, Any]:
    """The answer of /v1/classify."""
    results = [
        _refused(video) if isinstance(video, RefusedVideo) else _classified_video(video, options)
        for video in given.videos
    ]
    active = given.bank
    return {
        "request_id": request_id,
        "results": results,
        "bank": {
            "name": None if given.is_adhoc else active.name,
            "version": None if given.is_adhoc else active.version,
            "sha256": active.sha256,
            "num_labels": len(active.bank.labels),
            "num_templates": len(active.bank.templates),
        },
        "method": given.method,
        "runtime": asdict(service.runtime.describe()),
        "timings_ms": _total(budget),
    }


def embedded_videos(
    service: Service,
    request_id: str,
    videos: Sequence[EmbeddedVideo | RefusedVideo],
    budget: Budget,
) -> dict[str, Any]:
    """The answer of /v1/embed for videos."""
    results = [
        _refused(video)
        if isinstance(video, RefusedVideo)
        else {
            "name": video.name,
            "embeddings": video.embeddings.tolist(),
            "frames": _frames(video),
            "warnings": list(video.warnings),
            "timings_ms": _in_ms(video.stages),
        }
        for video in videos
    ]
    return {**_embed_answer(service, request_id, budget), "results": results}


def embedded_texts(
    service: Service, request_id: str, embeddings: Float32Array, budget: Budget
) -> dict[str, Any]:
    """The answer of /v1/embed for texts."""
    return {
        **_embed_answer(service, request_id, budget),
        "embeddings": embeddings.tolist(),
    }


def bank_answer(service: Service, name: str, *, with_labels: bool = True) -> dict[str, Any]:
    """A label bank and its build.

    Raises:
        RequestRefusedError: If there is neither.
    """
    banks = service.banks
    build = banks.build_of(name)
    is_active = name in banks.names()
    if not is_active and build is None:
        raise refusals.unknown_bank(name, banks.names())
    active = banks.get(name) if is_active else None
    shown = active.bank if active is not None and with_labels else None
    return {
        "name": name,
        "active": None if active is None else _version(active),
        "labels": None if shown is None else list(shown.labels),
        "templates": None if shown is None else list(shown.templates),
        "calibration": None
        if active is None or active.bank.calibration is None
        else asdict(active.bank.calibration),
        "versions": [_old_version(each) for each in banks.history(name)] if is_active else [],
        "build": None
        if build is None
        else {
            "state": build.state,
            "done": build.done,
            "total": build.total,
            "error": build.error,
            "version": build.version,
        },
    }


def diff_answer(name: str, old: int, new: int, found: LabelBankDiff) -> dict[str, Any]:
    """What changed from one version of a label bank to another."""
    return {"name": name, "old": old, "new": new, **asdict(found)}


def info_answer(service: Service) -> dict[str, Any]:
    """What runs."""
    manifest, verification = service.manifest, service.verification
    settings, facts = service.settings, service.batch_facts
    manifest_bytes = (service.bundle.path / "manifest.json").read_bytes()
    return {
        "version": __version__,
        "state": service.state,
        "bundle": {
            "name": service.bundle.path.name,
            "sha256": hashlib.sha256(manifest_bytes).hexdigest(),
            "graphs": {
                name: {
                    "precision": graph.precision,
                    "sha256": manifest.files[graph.file].sha256,
                }
                for name, graph in manifest.graphs.items()
            },
        },
        "model": manifest.model.model_dump(mode="json"),
        "scores": manifest.scores.model_dump(mode="json"),
        "templates": list(manifest.templates),
        "runtime": asdict(service.runtime.describe()),
        "verification": None
        if verification is None
        else {
            "passed": verification.passed,
            "num_comparisons": len(verification.comparisons),
            "golden_origin": verification.origin,
        },
        "batching": {
            "max_batch": settings.max_batch,
            "max_delay_ms": settings.max_delay_ms,
            "queue": settings.queue,
            "best_batch": service.batcher.best_batch,
            "ms_per_clip": {} if facts is None else facts.ms_per_clip,
        },
        "workers": settings.workers,
        "banks": [
            {"name": name, **_version(service.banks.get(name))} for name in service.banks.names()
        ],
        "limits": asdict(service.limits),
    }


def _classified_video(video: ClassifiedVideo, options: ClassifyOptions) -> dict[str, Any]:
    embedded, ranking = video.embedded, video.ranking
    votes, answer = ranking.votes, ranking.answer
    result: dict[str, Any] = {
        "name": embedded.name,
        "predictions": [asdict(each) for each in ranking.predictions],
        "answer": None if answer is None else {**asdict(answer), "is_unknown": answer.is_unknown},
        "frames": _frames(embedded),
        "warnings": list(embedded.warnings),
        "batch_size": embedded.batch_size,
        "timings_ms": _in_ms(embedded.stages),
    }
    if votes is not None:
        result["templates"] = [asdict(vote) for vote in votes]
        result["template_agreement"] = sum(vote.agrees for vote in votes) / len(votes)
    if options.return_frames and embedded.work is not None:
        result["pixels"] = _pixels(embedded.work)
    return result


def _refused(video: RefusedVideo) -> dict[str, Any]:
    error = {"status": video.error.status, "code": video.error.code, "message": str(video.error)}
    return {"name": video.name, "error": error}


def _frames(video: EmbeddedVideo) -> dict[str, Any] | None:
    if video.indices is None:
        return None
    return {
        "num_clips": len(video.indices),
        "indices": video.indices.tolist(),
        "pts_seconds": None
        if video.pts_seconds is None
        else np.round(video.pts_seconds, 6).tolist(),
    }


def _pixels(work: ViewFrames) -> dict[str, Any]:
    return {
        "shape": work.pixels.shape,
        "data": base64.b64encode(work.pixels.tobytes()).decode(),
        "views": work.views.tolist(),
    }


def _embed_answer(service: Service, request_id: str, budget: Budget) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "embedding_dim": service.manifest.model.embedding_dim,
        "runtime": asdict(service.runtime.describe()),
        "timings_ms": _total(budget),
    }


def _version(active: BankVersion) -> dict[str, Any]:
    return {
        "version": active.version,
        "sha256": active.sha256,
        "num_labels": len(active.bank.labels),
        "num_templates": len(active.bank.templates),
        "activated_seconds": round(active.activated_seconds, 3),
    }


def _old_version(old: OldVersion) -> dict[str, Any]:
    return {
        "version": old.version,
        "sha256": old.sha256,
        "num_labels": len(old.labels),
        "num_templates": len(old.templates),
        "activated_seconds": round(old.activated_seconds, 3),
    }


def _in_ms(stages: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1000, 3) for name, seconds in stages.items()}


def _total(budget: Budget) -> dict[str, float]:
    return _in_ms({"read": budget.read_seconds, "total": budget.total_seconds})


# Bodies of /v1 -> what the service takes: multipart with videos, or JSON.


Model = TypeVar("Model", bound=BaseModel)

# What is larger is parsed beside the event loop.
_SMALL_JSON_BYTES = 64 * 1024
# Few at a time: what JSON becomes takes up to thirty times its bytes while it is checked.
_PARSERS = ThreadPoolExecutor(2, thread_name_prefix="actionclip-json")

FILE_FIELDS = frozenset({"video", "frames", "embeddings"})
# Fields that are lists: several of the same name, or one that is a JSON list.
_LIST_FIELDS = frozenset({"labels", "templates"})


def is_multipart(request: Request) -> bool:
    """Whether the body is a form; JSON is the other thing that it may be.

    Raises:
        RequestRefusedError: If it is neither (415).
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == "multipart/form-data":
        return True
    if given == "application/json":
        return False
    raise refusals.unsupported_type(
        f"The body is of type {given or 'none'!r}; send a video as multipart/form-data in the "
        "part `video`, or application/json."
    )


async def read_json(request: Request, model: type[Model], service: Service) -> Model:
    """Read a JSON body.

    Raises:
        RequestRefusedError: If it is no JSON (400), too large (413), or not as the model (422).
    """
    limit = service.limits.field_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusals.too_many("bytes of JSON", len(body), limit)
    if len(body) <= _SMALL_JSON_BYTES:
        return _parse(model, body)
    return await asyncio.get_running_loop().run_in_executor(_PARSERS, _parse, model, body)


def _parse(model: type[Model], body: bytearray) -> Model:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise refusals.bad_request(f"The body is not JSON ({exc}); send a JSON object.") from exc
    return validated(model, data)


def validated(model: type[Model], data: Any) -> Model:
    """Check data against a model.

    Raises:
        RequestRefusedError: If it does not fit (422); names the first place.
    """
    if isinstance(data, dict):
        # The model would describe each of a million unknown fields; one is enough.
        unknown = next((name for name in data if name not in model.model_fields), None)
        kept = {*model.model_fields, unknown}
        data = {name: value for name, value in data.items() if name in kept}
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3]) or "the body"
        raise refusals.bad_value(f"{where}: {first['msg']}; see /openapi.json.") from exc


async def read_videos(
    request: Request, service: Service, files: RequestFiles
) -> tuple[list[Input], dict[str, Any]]:
    """Read a form with videos: gives them and the other fields, lists where they are lists.

    Raises:
        RequestRefusedError: If it is no such form, or more than allowed.
    """
    form = await read_form(
        request.stream(),
        request.headers["content-type"],
        files,
        file_fields=FILE_FIELDS,
        field_bytes=service.limits.field_bytes,
        max_files=service.limits.videos,
    )
    return [_input(service, each) for each in form.files], _fields(form)


def classify_options(fields: ClassifyFields) -> ClassifyOptions:
    """The options of a request that was checked."""
    return ClassifyOptions(
        labels=fields.labels,
        top_k=fields.top_k,
        views=parse_views(fields.views),
        templates=fields.templates,
        multi_label=fields.multi_label,
        per_template=fields.per_template,
        return_frames=fields.return_frames,
    )


def parse_views(text: str) -> Views:
    """Read `10x3`.

    Raises:
        RequestRefusedError: If it is not allowed (422).
    """
    try:
        return Views.parse(text)
    except ValueError as exc:
        raise refusals.bad_value(str(exc)) from exc


def embedding_inputs(service: Service, given: Sequence[Sequence[Sequence[float]]]) -> list[Input]:
    """Embeddings that came as JSON.

    Raises:
        RequestRefusedError: If they are none of this model.
    """
    inputs: list[Input] = []
    for index, views in enumerate(given):
        name = f"embeddings[{index}]"
        if len({len(view) for view in views}) != 1:
            raise refusals.bad_tensor(f"{name} has views of several widths, or none.")
        with np.errstate(over="ignore"):
            array = np.array(views, np.float64).astype(np.float32)
        check_embeddings(service.manifest, array, name)
        inputs.append(EmbeddingInput(array, name))
    return inputs


def _input(service: Service, given: FormFile) -> Input:
    if given.field == "video":
        return VideoInput(given.file.path, given.name)
    if given.field == "frames":
        return VideoInput(given.file.path, given.name, "frames")
    with given.file.path.open("rb") as file:
        array = read_float_array(file, given.file.size_bytes, given.name)
    check_embeddings(service.manifest, array, given.name)
    return EmbeddingInput(array, given.name)


def _fields(form: Form) -> dict[str, Any]:
    fields: Mapping[str, list[str]] = form.fields
    return {name: _value(name, values) for name, values in fields.items()}


def _value(name: str, values: list[str]) -> Any:
    if name not in _LIST_FIELDS:
        if len(values) > 1:
            raise refusals.bad_request(f"The field {name!r} is there twice; send it once.")
        return values[0]
    if len(values) > 1:
        return values
    if not values[0].lstrip().startswith("["):
        # One name is that of a bank; one template is a list of one.
        return values[0] if name == "labels" else values
    try:
        return json.loads(values[0])
    except (ValueError, RecursionError) as exc:
        raise refusals.bad_request(
            f"The field {name!r} begins as a JSON list and is none ({exc}); send a JSON list, or "
            "the field several times."
        ) from exc


# Routes of /v1: classify, embed, labels, info.


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
        return info_answer(service)

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
            classify_answer(service, request.state.request_id, classified, options, budget)
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
                embedded_texts(service, request.state.request_id, embeddings, budget)
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
        return JSONResponse(embedded_videos(service, request.state.request_id, videos, budget))


def _add_labels(router: APIRouter, service: Service) -> None:
    banks = service.banks

    @router.get("/labels", responses={200: {"model": BankListAnswer}, **error_answers()})
    async def list_banks() -> Response:
        """All label banks, without their labels."""
        names = sorted({*banks.names(), *banks.building_names()})
        return JSONResponse(
            {"banks": [bank_answer(service, name, with_labels=False) for name in names]}
        )

    @router.get(
        "/labels/{name}", responses={200: {"model": LabelsAnswer}, **error_answers(404, 422)}
    )
    async def get_bank(name: str) -> Response:
        """A label bank: its active version, its last versions, and its build."""
        return JSONResponse(bank_answer(service, name))

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
        return JSONResponse(diff_answer(name, old, newer, found))

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
            bank_answer(service, name, with_labels=False),
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
