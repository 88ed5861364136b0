"""/v1: classify and embed videos, look after label banks, search the archive, say what runs.

Bodies are read into what the service takes, and answers are records of what it gives.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from actionclip_deploy import __version__
from actionclip_deploy.command_records import ArchiveAnswer, FoundMoment, SearchAnswer
from actionclip_deploy.events import utc_text
from actionclip_deploy.files import sha256_of
from actionclip_deploy.known_words import say_unknown_words
from actionclip_deploy.records import (
    BankBuild,
    BankJson,
    BankListAnswer,
    BankState,
    BatchingRecord,
    ClassifyAnswer,
    ClassifyFields,
    ClassifyJson,
    Decision,
    DiffAnswer,
    EmbedAnswer,
    EmbeddedRecord,
    EmbedFields,
    EmbedJson,
    ErrorAnswer,
    ErrorRecord,
    EventRecord,
    FramesRecord,
    HistoryAnswer,
    HistoryPoint,
    InfoAnswer,
    NamedVersion,
    PixelsRecord,
    Record,
    RefusedVideo,
    SearchJson,
    ServedBundle,
    ServedGraph,
    StreamListAnswer,
    StreamRecord,
    VerificationRecord,
    VersionRecord,
    VideoRecord,
    VocabularyRecord,
)
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.archives import FILE_HEADERS, Found, ServedArchive, VideoFile
from actionclip_deploy.serve.banks import BankVersion, Build
from actionclip_deploy.serve.service import (
    Budget,
    Classified,
    ClassifiedVideo,
    ClassifyOptions,
    EmbeddedVideo,
    EmbeddingInput,
    Input,
    Service,
    VideoInput,
    check_embeddings,
)
from actionclip_deploy.serve.streams import EventStream
from actionclip_deploy.serve.uploads import (
    FormFile,
    RequestFiles,
    Spool,
    read_float_array,
    read_form,
)
from actionclip_deploy.views import ViewFrames
from actionclip_deploy.watch import HISTORY_SECONDS

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
_FILE_FIELDS = frozenset({"video", "frames", "embeddings"})
# Fields that are lists: several of the same name, or one that is a JSON list.
_LIST_FIELDS = frozenset({"labels", "templates"})

# What is larger is parsed outside the event loop.
_SMALL_JSON_BYTES = 64 * 1024
# Few at a time: what JSON becomes takes up to thirty times its bytes while it is checked.
_PARSERS = ThreadPoolExecutor(2, thread_name_prefix="actionclip-json")

LastEventId = Annotated[
    str | None,
    Header(description="Of the last message that was got: what came since is told first."),
]

ArchiveNumber = Annotated[int, Path(ge=0, le=2**53)]
Ticket = Annotated[
    str | None,
    Query(description="In the addresses of an answer of /v1/search: opens the file without a key."),
]

Model = TypeVar("Model", bound=BaseModel)


def make_router(service: Service, spool: Spool) -> APIRouter:
    """The routes, bound to a service.

    Args:
        service: Does the work.
        spool: Where uploads lie meanwhile.
    """
    router = APIRouter(prefix="/v1")
    _add_videos(router, service, spool)
    _add_labels(router, service)
    _add_streams(router, service)
    _add_archive(router, service)

    @router.get("/info", responses=_responses(InfoAnswer))
    async def info() -> Response:
        """What runs: runtime, provider, precision, engine, banks, limits."""
        # All of it: parts of the manifest are set by default, and are told all the same.
        return Response(_info(service).model_dump_json(), media_type="application/json")

    return router


def _add_videos(router: APIRouter, service: Service, spool: Spool) -> None:
    @router.post(
        "/classify",
        responses=_responses(ClassifyAnswer, 400, 404, 408, 413, 415, 422, 504),
        openapi_extra=_body(ClassifyFields, ClassifyJson, frames=_FRAMES, embeddings=_EMBEDDINGS),
    )
    async def classify(request: Request) -> Response:
        """Rank labels for videos, frames or embeddings."""
        with spool.files() as files:
            inputs: list[Input]
            if _is_multipart(request):
                inputs, given = await _read_videos(request, service, files)
                fields = _validated(ClassifyFields, given)
            else:
                body = await _read_json(request, ClassifyJson, service)
                inputs, fields = _embedding_inputs(service, body.embeddings), body
            budget = _budget(service, request, fields.timeout_ms)
            options = ClassifyOptions(
                labels=fields.labels,
                top_k=fields.top_k,
                views=_views(fields.views),
                templates=fields.templates,
                multi_label=fields.multi_label,
                per_template=fields.per_template,
                return_frames=fields.return_frames,
                allow_unknown_words=fields.allow_unknown_words,
            )
            classified = await service.classify(inputs, options, budget)
        return _answer(_classified(service, request.state.request_id, classified, options, budget))

    @router.post(
        "/embed",
        responses=_responses(EmbedAnswer, 400, 408, 413, 415, 422, 504),
        openapi_extra=_body(EmbedFields, EmbedJson, frames=_FRAMES),
    )
    async def embed(request: Request) -> Response:
        """Embed videos, frames or texts."""
        if not _is_multipart(request):
            body = await _read_json(request, EmbedJson, service)
            budget = _budget(service, request, body.timeout_ms)
            embeddings = await service.embed_texts(body.texts, budget)
            words = await asyncio.to_thread(service.texts.unknown_words, body.texts)
            said = say_unknown_words(words)
            return _answer(_embedded(service, request, budget, embeddings=embeddings, **said))
        with spool.files() as files:
            inputs, given = await _read_videos(request, service, files)
            fields = _validated(EmbedFields, given)
            budget = _budget(service, request, fields.timeout_ms)
            if not all(isinstance(each, VideoInput) for each in inputs):
                raise refusals.bad_request("Embeddings are embedded already; send videos or texts.")
            videos = await service.embed_videos(
                cast(list[VideoInput], inputs), _views(fields.views), budget
            )
        results = tuple(map(_embedded_video, videos))
        return _answer(_embedded(service, request, budget, results=results))


def _add_labels(router: APIRouter, service: Service) -> None:
    banks = service.banks

    @router.get("/labels", responses=_responses(BankListAnswer))
    async def list_banks() -> Response:
        """All label banks, without their labels."""
        names = sorted({*banks.names(), *banks.building_names()})
        return _answer(
            BankListAnswer(banks=tuple(_bank(service, name, with_labels=False) for name in names))
        )

    @router.get("/labels/{name}", responses=_responses(BankState, 404, 422))
    async def get_bank(name: str) -> Response:
        """A label bank: its active version, its last versions, and its build."""
        return _answer(_bank(service, name))

    @router.get("/labels/{name}/diff", responses=_responses(DiffAnswer, 404, 422))
    async def diff(
        name: str,
        old: Annotated[int, Query(ge=1, description="A version.")],
        new: Annotated[int | None, Query(ge=1, description="By default, the active one.")] = None,
    ) -> Response:
        """What changed from one version to another."""
        newer = banks.get(name).version if new is None else new
        found = banks.diff(name, old, newer)
        return _answer(DiffAnswer(name=name, old=old, new=newer, **found.to_dict()))

    @router.put(
        "/labels/{name}",
        status_code=202,
        responses=_responses(BankState, 400, 408, 409, 413, 415, 422, success=202),
        openapi_extra={"requestBody": _json_body(BankJson)},
    )
    async def put_bank(name: str, request: Request) -> Response:
        """Build a label bank in the background; it becomes active once it is done."""
        if _is_multipart(request):
            raise refusals.unsupported_type("A label bank is put as application/json.")
        body = await _read_json(request, BankJson, service)
        # Of ten thousand labels, looking at each takes half a second.
        num_bytes = await asyncio.to_thread(
            service.check_bank,
            name,
            body.labels,
            body.templates,
            allow_unknown_words=body.allow_unknown_words,
        )
        words = await asyncio.to_thread(service.texts.unknown_words, body.labels)
        banks.start_build(
            name, body.labels, body.templates, num_bytes=num_bytes, unknown_words=words
        )
        answer = _answer(_bank(service, name, with_labels=False), 202)
        answer.headers["location"] = f"/v1/labels/{name}"
        return answer

    @router.delete("/labels/{name}", status_code=204, responses=_refusals(404, 409, 422))
    async def delete_bank(name: str) -> Response:
        """Remove a label bank, or end its build; requests that have begun finish with it."""
        await service.remove_bank(name)
        return Response(status_code=204)


def _add_streams(router: APIRouter, service: Service) -> None:
    streams = service.streams

    @router.get("/streams", responses=_responses(StreamListAnswer))
    async def list_streams() -> Response:
        """How all streams are that the server watches."""
        return _answer(StreamListAnswer(streams=tuple(streams.states())))

    @router.get("/streams/{name}", responses=_responses(StreamRecord, 404, 422))
    async def get_stream(name: str) -> Response:
        """How a stream is: its state, its counts, its newest label."""
        return _answer(streams.state(name))

    @router.get(
        "/streams/{name}/snapshot",
        response_class=_Jpeg,
        responses={200: _BYTES_OF_JPEG, **_refusals_of_others(404, 422)},
    )
    async def snapshot(
        name: str,
        width: Annotated[
            int | None, Query(ge=16, le=8192, description="Wider frames are shrunk to it.")
        ] = None,
    ) -> Response:
        """The newest frame of a stream."""
        return _Jpeg(await asyncio.to_thread(streams.snapshot, name, width))

    @router.get("/streams/{name}/history", responses=_responses(HistoryAnswer, 404, 422))
    async def history(
        name: str,
        seconds: Annotated[
            float, Query(gt=0, le=HISTORY_SECONDS, description="How far it goes back.")
        ] = HISTORY_SECONDS,
    ) -> Response:
        """The best label of each window of the last minutes."""
        points = tuple(
            HistoryPoint(time=utc_text(time), label=label, score=score)
            for time, label, score in streams.history(name, seconds)
        )
        return _answer(HistoryAnswer(name=name, points=points))

    @router.get(
        "/streams/{name}/events",
        response_class=EventStream,
        status_code=200,
        responses={200: _events_content(), **_refusals_of_others(404, 422)},
    )
    async def stream_events(
        name: str, request: Request, last_event_id: LastEventId = None
    ) -> Response:
        """Events of a stream as they come, as server-sent events whose data is a record."""
        return _events(request, name, last_event_id)

    @router.get(
        "/events",
        response_class=EventStream,
        status_code=200,
        responses={200: _events_content(), **_refusals_of_others(404, 422)},
    )
    async def events(request: Request, last_event_id: LastEventId = None) -> Response:
        """Events of all streams as they come, as server-sent events whose data is a record."""
        return _events(request, None, last_event_id)

    def _events(request: Request, name: str | None, last_id: str | None) -> Response:
        listener = streams.listen(name, last_id=last_id)
        if request.state.is_head:
            listener.close()
            return Response(media_type=EventStream.media_type)
        return EventStream(listener)


def _add_archive(router: APIRouter, service: Service) -> None:
    @router.get("/archive", responses=_responses(ArchiveAnswer, 404))
    async def describe_archive() -> Response:
        """What there is to be searched: cameras, videos, windows, times."""
        return _answer(await asyncio.to_thread(service.archive.describe))

    @router.post(
        "/search",
        responses=_responses(SearchAnswer, 400, 404, 408, 413, 415, 422, 504),
        openapi_extra={"requestBody": _json_body(SearchJson)},
    )
    async def search(request: Request) -> Response:
        """Find the moments of the archive that show what a text says, or that are like another."""
        archive = service.archive
        if _is_multipart(request):
            raise refusals.unsupported_type("A search is sent as application/json.")
        asked = await _read_json(request, SearchJson, service)
        budget = _budget(service, request, asked.timeout_ms)
        with service.tracer.span("search", top=asked.top):
            found = await archive.search(asked, deadline=budget.deadline)
        return _answer(_searched(archive, request.state.request_id, found, budget))

    @router.get(
        "/archive/videos/{video_id}",
        response_class=VideoFile,
        status_code=200,
        responses={
            200: _BYTES_OF_VIDEO,
            206: {"description": "The part that `Range` asks for.", **_BYTES_OF_VIDEO},
            **_refusals_of_others(404, 410, 416, 422),
        },
    )
    async def archived_video(video_id: ArchiveNumber, ticket: Ticket = None) -> Response:  # noqa: ARG001
        """The file of a video of the archive, or the bytes of it that `Range` asks for."""
        archive = service.archive
        return VideoFile(archive, await asyncio.to_thread(archive.open_video, video_id))

    @router.get(
        "/archive/thumbnails/{video_id}/{window}",
        response_class=_Jpeg,
        responses={200: _BYTES_OF_JPEG, **_refusals_of_others(404, 422)},
    )
    async def thumbnail(
        video_id: ArchiveNumber,
        window: ArchiveNumber,
        ticket: Ticket = None,  # noqa: ARG001
    ) -> Response:
        """The picture of a window of a video, or of the nearest before it."""
        picture = await asyncio.to_thread(service.archive.thumbnail, video_id, window)
        return _Jpeg(picture, headers=FILE_HEADERS)


class _Jpeg(Response):
    media_type = "image/jpeg"


_BYTES_OF_JPEG = {"content": {_Jpeg.media_type: {"schema": {"type": "string", "format": "binary"}}}}


_BYTES_OF_VIDEO = {"content": {"video/*": {"schema": {"type": "string", "format": "binary"}}}}


def _events_content() -> dict[str, Any]:
    """For the OpenAPI document: messages whose data is a record, as FastAPI describes its own."""
    record = EventRecord.model_json_schema(ref_template="#/components/schemas/{model}")
    record.pop("$defs")  # are there for other routes
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": record}
    message = {
        "type": "object",
        "required": ["data"],
        "properties": {"id": {"type": "string"}, "data": data, "retry": {"type": "integer"}},
    }
    return {"content": {EventStream.media_type: {"itemSchema": message}}}


def _refusals_of_others(*statuses: int) -> dict[Any, Any]:
    """As `_refusals`, of a route whose own answer is no JSON."""
    schema = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {status: {"content": content} for status in _refusals(*statuses)}


def _responses(answer: type[BaseModel], *statuses: int, success: int = 200) -> dict[Any, Any]:
    """For the OpenAPI document: an answer, and the statuses that a route may refuse with."""
    return {success: {"model": answer}, **_refusals(*statuses)}


def _refusals(*statuses: int) -> dict[Any, Any]:
    every = (401, 429, 500, 503)
    return {status: {"model": ErrorAnswer} for status in sorted({*statuses, *every})}


def _body(
    form: type[BaseModel], json_model: type[BaseModel], **files: dict[str, str]
) -> dict[str, Any]:
    """For the OpenAPI document: a form with files, or JSON."""
    schema = form.model_json_schema()
    schema["properties"] = {
        "video": {"type": "array", "items": _VIDEO},
        **{name: {"type": "array", "items": file} for name, file in files.items()},
        **schema["properties"],
    }
    content = {"multipart/form-data": {"schema": schema}, **_json_body(json_model)["content"]}
    return {"requestBody": {"required": True, "content": content}}


def _json_body(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})  # which a document would look for at its own top
    for name, part in schema.get("properties", {}).items():
        schema["properties"][name] = _with_parts(part, parts)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _with_parts(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema with what it refers to in the place of the references."""
    if isinstance(schema, list):
        return [_with_parts(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return parts[schema["$ref"].rpartition("/")[2]]
    return {name: _with_parts(each, parts) for name, each in schema.items()}


# Requests.


def _is_multipart(request: Request) -> bool:
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


async def _read_json(request: Request, model: type[Model], service: Service) -> Model:
    """Read a JSON body.

    Raises:
        RequestRefusedError: If it is not JSON (400), too large (413), or not as the model (422).
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
    return _validated(model, data)


def _validated(model: type[Model], data: Any) -> Model:
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
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3]) or "the body"
        raise refusals.bad_value(f"{where}{_what_is_wrong(first, model)}.") from exc


_KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}


def _what_is_wrong(error: Any, model: type[BaseModel]) -> str:
    """What is wrong with a field, in our words where pydantic's are those of Python."""
    given = error["input"]
    kind = "null" if given is None else _KINDS.get(type(given), "a number")
    match error["type"]:
        case "extra_forbidden" if len(error["loc"]) == 1:
            return f" is no field of this request; its fields are {', '.join(model.model_fields)}"
        case "tuple_type":
            return f" is {kind}; give a list"
        case "greater_than_equal" if isinstance(given, int | float | str):
            return f" is {str(given)[:60]}; give {error['ctx']['ge']:g} or more"
    return f": {error['msg']}; see /openapi.json"


async def _read_videos(
    request: Request, service: Service, files: RequestFiles
) -> tuple[list[Input], dict[str, Any]]:
    """Read a form with videos: gives them and the other fields, lists where they are lists.

    Raises:
        RequestRefusedError: If it is not such a form, or more than allowed.
    """
    form = await read_form(
        request.stream(),
        request.headers["content-type"],
        files,
        file_fields=_FILE_FIELDS,
        field_bytes=service.limits.field_bytes,
        max_files=service.limits.videos,
    )
    fields = {name: _field(name, values) for name, values in form.fields.items()}
    return [_input(service, each) for each in form.files], fields


def _input(service: Service, given: FormFile) -> Input:
    if given.field == "video":
        return VideoInput(given.file.path, given.name)
    if given.field == "frames":
        return VideoInput(given.file.path, given.name, "frames")
    with given.file.path.open("rb") as file:
        array = read_float_array(file, given.file.size_bytes, given.name)
    check_embeddings(service.manifest, array, given.name)
    return EmbeddingInput(array, given.name)


def _field(name: str, values: list[str]) -> Any:
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
            f"The field {name!r} begins like a JSON list but is not one ({exc}); send a JSON list, "
            "or the field several times."
        ) from exc


def _embedding_inputs(service: Service, given: Sequence[Sequence[Sequence[float]]]) -> list[Input]:
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


def _views(text: str) -> Views:
    try:
        return Views.parse(text)
    except ValueError as exc:
        raise refusals.bad_value(str(exc)) from exc


def _budget(service: Service, request: Request, timeout_ms: float | None) -> Budget:
    seconds = None if timeout_ms is None else timeout_ms / 1000
    return service.budget(seconds, read_seconds=request.state.body.read_seconds)


# Answers.


def _answer(record: Record, status: int = 200) -> Response:
    return Response(record.to_json(), status, media_type="application/json")


def _classified(
    service: Service,
    request_id: str,
    given: Classified,
    options: ClassifyOptions,
    budget: Budget,
) -> ClassifyAnswer:
    active = given.bank
    name, version = (None, None) if given.is_adhoc else (active.name, active.version)
    bank = active.bank.used(name, version, active.sha256)
    shared: dict[str, Any] = {
        "method": given.method,
        "bank": bank,
        "runtime": service.runtime.describe(),
        "request_id": request_id,
    }
    results = [
        VideoRecord(video=video.name, name=video.name, error=_error(video), request_id=request_id)
        if isinstance(video, RefusedVideo)
        else VideoRecord(**_ranked(video, options), **shared)
        for video in given.videos
    ]
    return ClassifyAnswer(results=tuple(results), timings_ms=_total(budget), **shared)


def _ranked(video: ClassifiedVideo, options: ClassifyOptions) -> dict[str, Any]:
    """The fields of a record that are about this video alone."""
    embedded, ranking = video.embedded, video.ranking
    votes, answer = ranking.votes, ranking.answer
    fields: dict[str, Any] = {
        "video": embedded.name,
        "name": embedded.name,
        "predictions": ranking.predictions,
        "answer": None if answer is None else Decision.model_validate(answer),
        "frames": _frames(embedded),
        "num_frames_encoded": embedded.num_frames_encoded,
        "num_frames_reused": embedded.num_frames_reused,
        "warnings": embedded.warnings,
        "batch_size": embedded.batch_size,
        "timings_ms": _in_ms(embedded.stages),
    }
    if votes is not None:
        fields["templates"] = votes
        fields["template_agreement"] = sum(vote.agrees for vote in votes) / len(votes)
    if options.return_frames and embedded.work is not None:
        fields["pixels"] = _pixels(embedded.work)
    return fields


def _embedded(service: Service, request: Request, budget: Budget, **given: Any) -> EmbedAnswer:
    """The answer of /v1/embed with its `results` or `embeddings`."""
    return EmbedAnswer(
        request_id=request.state.request_id,
        embedding_dim=service.manifest.model.embedding_dim,
        runtime=service.runtime.describe(),
        timings_ms=_total(budget),
        **given,
    )


def _embedded_video(video: EmbeddedVideo | RefusedVideo) -> EmbeddedRecord:
    if isinstance(video, RefusedVideo):
        return EmbeddedRecord(name=video.name, error=_error(video))
    return EmbeddedRecord(
        name=video.name,
        embeddings=video.embeddings,
        frames=_frames(video),
        warnings=video.warnings,
        timings_ms=_in_ms(video.stages),
    )


def _searched(
    archive: ServedArchive, request_id: str, found: Found, budget: Budget
) -> SearchAnswer:
    record = found.moments.record()
    moments = tuple(
        FoundMoment(
            **moment.model_dump(exclude_unset=True),
            video_url=archive.url(f"videos/{moment.video_id}"),
            thumbnail_url=archive.url(f"thumbnails/{moment.video_id}/{moment.window}")
            if has_picture
            else None,
        )
        for moment, has_picture in zip(record.moments, found.has_picture, strict=True)
    )
    return SearchAnswer(
        **{**dict(record), "moments": moments},
        **say_unknown_words(found.unknown_words),
        request_id=request_id,
        timings_ms={**_in_ms(found.seconds), **_total(budget)},
    )


def _error(video: RefusedVideo) -> ErrorRecord:
    return ErrorRecord(status=video.error.status, code=video.error.code, message=str(video.error))


def _frames(video: EmbeddedVideo) -> FramesRecord | None:
    return None if video.indices is None else FramesRecord.of(video.indices, video.pts_seconds)


def _pixels(work: ViewFrames) -> PixelsRecord:
    pixels: Any = work.pixels
    data = base64.b64encode(pixels.tobytes()).decode()
    return PixelsRecord(shape=pixels.shape, data=data, views=work.views.tolist())


def _bank(service: Service, name: str, *, with_labels: bool = True) -> BankState:
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
    calibration = None if active is None else active.bank.calibration
    history = banks.history(name) if is_active else []
    return BankState(
        name=name,
        active=None if active is None else VersionRecord(**_version(active)),
        labels=None if shown is None else shown.labels,
        templates=None if shown is None else shown.templates,
        calibration=None if calibration is None else asdict(calibration),
        **say_unknown_words(None if active is None else active.bank.unknown_words),
        versions=tuple(
            VersionRecord(
                version=old.version,
                sha256=old.sha256,
                num_labels=len(old.labels),
                num_templates=len(old.templates),
                activated_seconds=round(old.activated_seconds, 3),
            )
            for old in history
        ),
        build=None if build is None else _build(build),
    )


def _build(build: Build) -> BankBuild:
    return BankBuild(
        state=build.state,
        done=build.done,
        total=build.total,
        error=build.error,
        version=build.version,
        **say_unknown_words(build.unknown_words),
    )


def _version(active: BankVersion) -> dict[str, Any]:
    return {
        "version": active.version,
        "sha256": active.sha256,
        "num_labels": len(active.bank.labels),
        "num_templates": len(active.bank.templates),
        "activated_seconds": round(active.activated_seconds, 3),
    }


def _info(service: Service) -> InfoAnswer:
    manifest, verification = service.manifest, service.verification
    settings, facts, vocabulary = service.settings, service.batch_facts, service.texts.vocabulary
    manifest_bytes = (service.bundle.path / "manifest.json").read_bytes()
    graphs: dict[str, ServedGraph] = {
        name: ServedGraph(precision=graph.precision, sha256=manifest.files[graph.file].sha256)
        for name, graph in manifest.graphs.items()
    }
    return InfoAnswer(
        version=__version__,
        state=service.state,
        bundle=ServedBundle(
            name=service.bundle.path.name,
            sha256=sha256_of(manifest_bytes),
            graphs=graphs,
        ),
        model=manifest.model,
        scores=manifest.scores,
        templates=manifest.templates,
        runtime=service.runtime.describe(),
        verification=None
        if verification is None
        else VerificationRecord(
            passed=verification.passed,
            num_comparisons=len(verification.comparisons),
            golden_origin=verification.origin,
            verified_seconds=service.verified_seconds,
        ),
        vocabulary=None
        if vocabulary is None
        else VocabularyRecord(
            num_known_tokens=vocabulary.num_known, num_tokens=len(vocabulary.is_known)
        ),
        batching=BatchingRecord(
            max_batch=settings.max_batch,
            max_delay_ms=settings.max_delay_ms,
            queue=settings.queue,
            best_batch=service.batcher.best_batch,
            ms_per_clip={} if facts is None else facts.ms_per_clip,
        ),
        workers=settings.workers,
        banks=tuple(
            NamedVersion(name=name, **_version(service.banks.get(name)))
            for name in service.banks.names()
        ),
        num_streams=len(service.streams.names),
        archive=service.archive.name if service.has_archive else None,
        limits=asdict(service.limits),
    )


def _in_ms(stages: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1000, 3) for name, seconds in stages.items()}


def _total(budget: Budget) -> dict[str, float]:
    return _in_ms({"read": budget.read_seconds, "total": budget.total_seconds})
