"""Tensors of the Open Inference Protocol: a request's body -> an array, an output -> an answer.

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
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import from_json

from actionclip_deploy.errors import InferenceError, RequestRefusedError, ShapeError
from actionclip_deploy.manifest import GraphOrClip, TensorSpec
from actionclip_deploy.records import Record
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.service import Service

Parsed = TypeVar("Parsed", bound=BaseModel)

# A bundle does not change while it is served, so each model has one version.
VERSION = "1"

HEADER = "inference-header-content-length"
_DIGITS = 12  # of a number in a header; more than any body has
# Of the largest size; as many as this may be in memory at a time, or more that are smaller.
_LARGEST_BODIES = 8
# Values of JSON that are turned into numbers at once; between two such steps other threads run.
_STEP = 1 << 15
_MAX_QUOTED = 60  # characters of what a stranger sent, in a sentence
_DATATYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}


@dataclass(frozen=True)
class Model:
    """One graph, or `clip`."""

    name: GraphOrClip
    input: TensorSpec
    output: TensorSpec


def models_of(service: Service) -> dict[str, Model]:
    """All models, by name."""
    return {name: _model(service, name) for name in service.graph_names}


def _model(service: Service, name: GraphOrClip) -> Model:
    manifest = service.manifest
    return Model(name, manifest.input_spec(name), manifest.output_spec(name))


def datatype(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's type."""
    return _DATATYPES[spec.dtype]


def sizes(spec: TensorSpec) -> tuple[int, ...]:
    """The shape, in which -1 is any number above 0; the first size is that of the batch."""
    return tuple(size if isinstance(size, int) else -1 for size in spec.shape)


# Bodies in memory: each bounded, and all of them together.


class BodyMemory:
    """Counts the bytes of all bodies that are in memory.

    Args:
        service: Has the limits, and knows when some memory will be free.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.limit_bytes = _LARGEST_BODIES * service.limits.body_bytes
        self.num_bytes = 0

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        """Count bytes that are there until the end of the context.

        Raises:
            RequestRefusedError: If there are too many together (429).
        """
        self.take(num_bytes)
        try:
            yield
        finally:
            self.num_bytes -= num_bytes

    @contextmanager
    def body(self) -> Iterator[Body]:
        """A body whose bytes count until the end of the context."""
        body = Body(self)
        try:
            yield body
        finally:
            self.num_bytes -= len(body.data)

    def take(self, num_bytes: int) -> None:
        """Count bytes that have come.

        Raises:
            RequestRefusedError: If there are too many together (429).
        """
        if self.num_bytes + num_bytes > self.limit_bytes:
            seconds = max(1.0, self._service.batcher.retry_after_seconds)
            raise refusals.memory_full(self.limit_bytes, seconds)
        self.num_bytes += num_bytes


class Body:
    """One body: JSON, and binary tensors after it.

    Attributes:
        data: All of it.
        json_bytes: How much of it is JSON; None before it is read.
    """

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.data = bytearray()
        self.json_bytes = 0

    async def read(self, request: Request, max_json_bytes: int) -> None:
        """Read the body of a request, whose length Guards have limited.

        Raises:
            RequestRefusedError: If its headers do not fit, or it is too large.
        """
        _check_encoding(request)
        json_bytes = _json_bytes(request)
        if json_bytes is not None and json_bytes > max_json_bytes:
            raise refusals.too_many_bytes_of_json(max_json_bytes)
        async for chunk in request.stream():
            self._memory.take(len(chunk))
            self.data += chunk
            if json_bytes is None and len(self.data) > max_json_bytes:
                raise refusals.too_many_bytes_of_json(max_json_bytes)
        if json_bytes is not None and json_bytes > len(self.data):
            raise refusals.bad_request(
                f"Inference-Header-Content-Length is {json_bytes} and the body has "
                f"{len(self.data)} bytes; give the length of its JSON."
            )
        self.json_bytes = len(self.data) if json_bytes is None else json_bytes


def _json_bytes(request: Request) -> int | None:
    """How much of the body is JSON by its header; None where there is no such header."""
    given = request.headers.get(HEADER)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= _DIGITS and int(given) > 0):
        raise refusals.bad_request(
            f"Inference-Header-Content-Length is {given[:40]!r}; give the length of the JSON that "
            "the body begins with, in bytes."
        )
    return int(given)


def _check_encoding(request: Request) -> None:
    given = request.headers.get("content-encoding", "identity").strip().lower()
    if given != "identity":
        raise refusals.unsupported_type(
            f"The body is compressed ({given[:40]!r}), which this server does not read; send it as "
            "it is."
        )


# What a body says. Binary tensors follow the JSON.


Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Given(BaseModel):
    # What the protocol lets extensions add is let through and has no effect, unless it is named.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TensorParameters(_Given):
    """Parameters of an input, or of an output that is asked for."""

    binary_data_size: Count | None = Field(
        default=None, description="Bytes of the input among the binary data."
    )
    binary_data: bool | None = Field(
        default=None, description="Whether the output is to come as binary data."
    )
    # Another answer than these ask for would be wrong, so they are refused.
    classification: SkipJsonSchema[Any] = None
    shared_memory_region: SkipJsonSchema[Any] = None


class InputTensor(_Given):
    """An input: its values, or how many bytes it has among the binary data."""

    name: str
    shape: list[Size] = Field(max_length=8)
    datatype: str = Field(description="UINT8, INT32 or FP32, as the model's metadata say.")
    parameters: TensorParameters = Field(default_factory=TensorParameters)
    data: list[Any] | None = Field(
        default=None, description="All values in row-major order, flat or nested as the shape."
    )


class OutputTensor(_Given):
    """An output that is asked for."""

    name: str
    parameters: TensorParameters = Field(default_factory=TensorParameters)


class RequestParameters(_Given):
    """Parameters of a request; others have no effect."""

    binary_data_output: bool = Field(
        default=False, description="Whether outputs come as binary data."
    )
    timeout: Count | None = Field(
        default=None, description="Time until the answer in microseconds; 0 leaves it out."
    )
    sequence_id: SkipJsonSchema[Any] = None


class InferJson(_Given):
    """A request for inference."""

    id: str = Field(default="", max_length=1000, description="Comes back in the answer.")
    inputs: list[InputTensor] = Field(min_length=1, max_length=16)
    outputs: list[OutputTensor] = Field(
        default_factory=list, max_length=16, description="By default, all of the model's."
    )
    parameters: RequestParameters = Field(default_factory=RequestParameters)


class IndexJson(_Given):
    """A request for the list of models."""

    ready: bool = Field(default=False, description="Whether only those that are ready are listed.")


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema in one piece, as a part of the OpenAPI document has to be."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def in_one_piece(node: Any) -> Any:
        if isinstance(node, list):
            return [in_one_piece(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return in_one_piece(parts[node["$ref"].removeprefix("#/$defs/")])
        return {key: in_one_piece(value) for key, value in node.items()}

    inlined: dict[str, Any] = in_one_piece(schema)
    return inlined


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
        RequestRefusedError: If it is not one, or not for this model (400).
    """
    given = parse_json(InferJson, body, json_bytes)
    return read_request(model, given, memoryview(body)[json_bytes:])


def read_request(model: Model, given: InferJson, binary: memoryview) -> InferRequest:
    """Read a request whose form is right, however it came.

    Args:
        model: The model that is to run.
        given: What it says.
        binary: Binary tensors; the array may lie in it.

    Raises:
        RequestRefusedError: If it is not one for this model (400).
    """
    _check_extensions(given)
    tensor = _only_input(model, given)
    _check_input(model, tensor)
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
        RequestRefusedError: If it is not JSON, or not as the model has it (400).
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
    return validated(model, data, described_in="/openapi.json")


def validated(model: type[Parsed], data: Any, *, described_in: str) -> Parsed:
    """Data as a model has them.

    Raises:
        RequestRefusedError: If they are not (400).
    """
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:5]) or "the body"
        raise refusals.bad_request(f"{where}: {first['msg']}; see {described_in}.") from exc


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
    if given.datatype != datatype(expected):
        raise refusals.bad_tensor(
            f"The input {given.name} is of type {_quoted(given.datatype)}; {model.name} takes "
            f"{datatype(expected)}."
        )
    try:
        expected.check_layout(expected.dtype, given.shape)
    except ShapeError as exc:
        raise refusals.bad_tensor(str(exc)) from exc


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


def _from_binary(expected: TensorSpec, given: InputTensor, binary: memoryview) -> Array:
    if given.data is not None:
        raise refusals.bad_tensor(
            f"The input {given.name} has both `data` and `binary_data_size`; send one of them."
        )
    dtype = np.dtype(expected.dtype)
    size = math.prod(given.shape) * dtype.itemsize
    stated = given.parameters.binary_data_size
    if not size == stated == len(binary):
        raise refusals.bad_tensor(
            f"The input {given.name} of shape {given.shape} and type {given.datatype} takes "
            f"{size:,} bytes; `binary_data_size` is {stated:,} and {len(binary):,} bytes follow "
            "the JSON, whose length is given in Inference-Header-Content-Length."
        )
    array = np.frombuffer(binary, dtype.newbyteorder("<")).reshape(given.shape)
    # After JSON of any length, numbers of four bytes may begin where runtimes do not read them.
    return np.require(array, dtype, ["ALIGNED"])


def _from_json(expected: TensorSpec, given: InputTensor, binary: memoryview) -> Array:
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


def _numbers(expected: TensorSpec, values: list[Any]) -> Array:
    types = set(map(type, values))
    if expected.dtype == "float32":
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


def _no_numbers(expected: TensorSpec, types: set[type]) -> RequestRefusedError:
    names = {int: "integers", float: "numbers with a point", bool: "true or false"}
    names |= {str: "strings", list: "lists", dict: "objects", type(None): "null"}
    given = ", ".join(sorted(names[each] for each in types))
    wanted = "numbers" if expected.dtype == "float32" else "integers"
    return refusals.bad_tensor(
        f"`data` of the input {expected.name} holds {given}; {datatype(expected)} takes {wanted} "
        "alone."
    )


def _beyond(expected: TensorSpec) -> RequestRefusedError:
    limits = np.finfo(expected.dtype) if expected.dtype == "float32" else np.iinfo(expected.dtype)
    return refusals.bad_tensor(
        f"`data` of the input {expected.name} holds a value that {datatype(expected)} does not; "
        f"send values from {limits.min} to {limits.max}."
    )


def _quoted(value: str | list[str]) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


# What is answered.


Flat = Annotated[
    NDArray[np.float32],
    PlainValidator(lambda output: output),  # `check_output` has looked at it
    PlainSerializer(lambda output: output.ravel().tolist(), return_type=list[float]),
    WithJsonSchema({"type": "array", "items": {"type": "number"}}),
]


class OutputAnswer(Record):
    """An output: its values, or how many bytes it has among the binary data."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: Flat | None = None


class InferAnswer(Record):
    """The answer to a request for inference; `id` is there where the request had one."""

    id: str | None = None
    model_name: str
    model_version: str
    outputs: tuple[OutputAnswer, ...]


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
    sent: dict[str, Any] = {"data": output}
    if request.is_binary:
        sent = {"parameters": {"binary_data_size": output.nbytes}}
    answer = InferAnswer(
        **({"id": request.request_id} if request.request_id else {}),
        model_name=model.name,
        model_version=VERSION,
        outputs=(
            OutputAnswer(
                name=model.output.name, datatype=datatype(model.output), shape=output.shape, **sent
            ),
        ),
    )
    head = answer.to_json()
    if not request.is_binary:
        return Response(head, media_type="application/json")
    data = np.ascontiguousarray(output, np.dtype(model.output.dtype).newbyteorder("<")).data
    return Response(
        b"".join((head, data)),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )
