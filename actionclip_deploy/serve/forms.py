"""Bodies of /v1 -> what the service takes: multipart with videos, or JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError

from actionclip_deploy.records import ClassifyFields
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.arrays import read_float_array
from actionclip_deploy.serve.checks import check_embeddings
from actionclip_deploy.serve.requests import ClassifyOptions, EmbeddingInput, Input, VideoInput
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.spool import RequestFiles
from actionclip_deploy.serve.uploads import Form, FormFile, read_form

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
