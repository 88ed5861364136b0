"""The body of a request for inference -> an array for a graph, and how to answer.

Nothing is allocated by what a request says about itself: a shape is compared with the model's and
with what was sent before an array is made. Binary tensors are not copied.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.runtimes.base import Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.v2_models import Model, Tensor
from actionclip_deploy.serve.v2_schemas import InferJson, InputTensor

Parsed = TypeVar("Parsed", bound=BaseModel)

# Values of JSON that are turned into numbers at once; between two such steps other threads run.
_STEP = 1 << 15
_MAX_QUOTED = 60  # characters of what a stranger sent, in a sentence


@dataclass(frozen=True, eq=False)
class InferRequest:
    """What is to be computed.

    Attributes:
        array: The input; its type and shape are the model's.
        request_id: Comes back in the answer; may be empty.
        is_binary: Whether the output is to come as binary data.
        timeout_seconds: The request's time; None for the server's.
    """

    array: Array
    request_id: str
    is_binary: bool
    timeout_seconds: float | None


def parse_request(model: Model, body: bytearray, json_bytes: int) -> InferRequest:
    """Read a request for inference.

    Args:
        model: The model that is to run.
        body: JSON, and binary tensors after it; the array may lie in it.
        json_bytes: How much of it is JSON.

    Raises:
        RequestRefusedError: If it is none, or none for this model (400).
    """
    given = parse_json(InferJson, body, json_bytes)
    _check_extensions(given)
    tensor = _only_input(model, given)
    _check_input(model, tensor)
    binary = memoryview(body)[json_bytes:]
    if tensor.parameters.binary_data_size is not None:
        array = _from_binary(model.input, tensor, binary)
    else:
        array = _from_json(model.input, tensor, binary)
    timeout = given.parameters.timeout
    return InferRequest(
        array, given.id, _wants_binary(model, given), timeout / 1e6 if timeout else None
    )


def parse_json(model: type[Parsed], body: bytearray, json_bytes: int) -> Parsed:
    """Read the JSON that a body begins with.

    Raises:
        RequestRefusedError: If it is no JSON, or not as the model has it (400).
    """
    text = body if json_bytes == len(body) else bytes(memoryview(body)[:json_bytes])
    try:
        with _no_garbage_collection():
            data = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as exc:
        raise refusals.bad_request(
            f"The body does not begin with JSON ({exc}); send a JSON object, and give its length "
            "in Inference-Header-Content-Length where binary data follows."
        ) from exc
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:5]) or "the body"
        raise refusals.bad_request(f"{where}: {first['msg']}; see /openapi.json.") from exc


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Until Python 3.12, a million small lists are searched for garbage again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_extensions(given: InferJson) -> None:
    """Refuse what would be answered with something else than it asks for."""
    parameters = [each.parameters for each in given.inputs]
    parameters += [each.parameters for each in given.outputs]
    asked = {
        "shared memory": any(each.shared_memory_region is not None for each in parameters),
        "classification": any(each.parameters.classification for each in given.outputs),
        "sequences": bool(given.parameters.sequence_id),
    }
    for extension, is_asked in asked.items():
        if is_asked:
            raise refusals.bad_request(
                f"The request uses the extension for {extension}, which this server does not have; "
                "GET /v2 lists those that it has."
            )


def _only_input(model: Model, given: InferJson) -> InputTensor:
    names = [each.name for each in given.inputs]
    if names != [model.input.name]:
        raise refusals.bad_tensor(
            f"The request has the inputs {_quoted(names)}; {model.name} takes one, "
            f"{model.input.name!r}."
        )
    return given.inputs[0]


def _check_input(model: Model, given: InputTensor) -> None:
    expected = model.input
    if given.datatype != expected.datatype:
        raise refusals.bad_tensor(
            f"The input {given.name} is of type {_quoted(given.datatype)}; {model.name} takes "
            f"{expected.datatype}."
        )
    fits = len(given.shape) == len(expected.shape) and all(
        wanted in (-1, size) for size, wanted in zip(given.shape, expected.shape, strict=True)
    )
    if not fits:
        raise refusals.bad_tensor(
            f"The input {given.name} has shape {given.shape}; {model.name} takes "
            f"{list(expected.shape)}, where -1 is any number above 0."
        )


def _wants_binary(model: Model, given: InferJson) -> bool:
    """Whether the output is asked for as binary data; all models have one output."""
    names = Counter(each.name for each in given.outputs)
    if names and names != {model.output.name: 1}:
        asked = [each.name for each in given.outputs]
        raise refusals.bad_tensor(
            f"The request asks for the outputs {_quoted(asked)}; {model.name} gives one, "
            f"{model.output.name!r}."
        )
    chosen = given.outputs[0].parameters.binary_data if given.outputs else None
    return given.parameters.binary_data_output if chosen is None else chosen


def _from_binary(expected: Tensor, given: InputTensor, binary: memoryview) -> Array:
    if given.data is not None:
        raise refusals.bad_tensor(
            f"The input {given.name} has both `data` and `binary_data_size`; send one of them."
        )
    size = math.prod(given.shape) * expected.dtype.itemsize
    stated = given.parameters.binary_data_size
    if not size == stated == len(binary):
        raise refusals.bad_tensor(
            f"The input {given.name} of shape {given.shape} and type {given.datatype} takes "
            f"{size:,} bytes; `binary_data_size` is {stated:,} and {len(binary):,} bytes follow "
            "the JSON, whose length is given in Inference-Header-Content-Length."
        )
    array = np.frombuffer(binary, expected.dtype.newbyteorder("<")).reshape(given.shape)
    # After JSON of any length, numbers of four bytes may begin where runtimes do not read them.
    return np.require(array, expected.dtype, ["ALIGNED"])


def _from_json(expected: Tensor, given: InputTensor, binary: memoryview) -> Array:
    if given.data is None or len(binary):
        raise refusals.bad_tensor(
            f"The input {given.name} has {'no' if given.data is None else 'its'} `data` and "
            f"{len(binary):,} bytes follow the JSON; send `data`, or `binary_data_size` among its "
            "parameters and the bytes."
        )
    num_values = math.prod(given.shape)
    flat = _flattened(given.data, given.shape)
    if flat is None or len(flat) != num_values:
        raise refusals.bad_tensor(
            f"`data` of the input {given.name} is not of shape {given.shape}; send its "
            f"{num_values:,} values in row-major order, flat or nested as the shape."
        )
    array = np.empty(num_values, expected.dtype)
    for start in range(0, num_values, _STEP):
        values = flat[start : start + _STEP]
        array[start : start + len(values)] = _numbers(expected, values)
    return array.reshape(given.shape)


def _flattened(data: list[Any], shape: Sequence[int]) -> list[Any] | None:
    """Values of a list that is flat or nested as a shape; None if it is neither."""
    if not data or not isinstance(data[0], list):
        return data
    if len(data) != shape[0]:
        return None
    level = data
    for size in shape[1:]:
        if not all(isinstance(each, list) and len(each) == size for each in level):
            return None
        level = list(chain.from_iterable(level))
    return level


def _numbers(expected: Tensor, values: list[Any]) -> Array:
    types = set(map(type, values))
    if expected.dtype.kind == "f":
        if not types <= {int, float}:
            raise _no_numbers(expected, types)
        try:
            with np.errstate(over="ignore"):
                floats = np.array(values, np.float64).astype(expected.dtype)
        except OverflowError:
            raise _beyond(expected) from None
        if not np.isfinite(floats).all():
            raise _beyond(expected)
        return floats
    if types != {int}:
        raise _no_numbers(expected, types)
    limits = np.iinfo(expected.dtype)
    try:
        integers = np.array(values, np.int64)
    except OverflowError:
        raise _beyond(expected) from None
    if integers.min() < limits.min or integers.max() > limits.max:
        raise _beyond(expected)
    return integers


def _no_numbers(expected: Tensor, types: set[type]) -> RequestRefusedError:
    names = {int: "integers", float: "numbers with a point", bool: "true or false"}
    names |= {str: "strings", list: "lists", dict: "objects", type(None): "null"}
    given = ", ".join(sorted(names[each] for each in types))
    wanted = "numbers" if expected.dtype.kind == "f" else "integers"
    return refusals.bad_tensor(
        f"`data` of the input {expected.name} holds {given}; {expected.datatype} takes {wanted} "
        "alone."
    )


def _beyond(expected: Tensor) -> RequestRefusedError:
    limits = np.finfo(expected.dtype) if expected.dtype.kind == "f" else np.iinfo(expected.dtype)
    return refusals.bad_tensor(
        f"`data` of the input {expected.name} holds a value that {expected.datatype} does not; "
        f"send values from {limits.min} to {limits.max}."
    )


def _quoted(value: str | list[str]) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
