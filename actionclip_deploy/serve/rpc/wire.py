"""Messages of the Open Inference Protocol over gRPC: bytes -> a request, an output -> bytes.

The descriptors come from open_inference.proto and live in a pool of their own: in protobuf's common
pool they would clash with those of tritonclient or KServe in a program that has both.

A message is looked through before protobuf reads it, because an empty part takes two bytes on the
wire and a hundred in memory: the number of parts, and the bytes of what is no raw tensor, are
bounded first. Raw tensors are not copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message

from actionclip_deploy.records import Record
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.oip.oip_tensors import (
    VERSION,
    InferJson,
    InferRequest,
    InputTensor,
    Model,
    datatype,
    read_request,
    validated,
)

SERVICE = "inference.GRPCInferenceService"
_PROTO = "open_inference.proto"
_MAX_PARTS = 256  # of a request: inputs, outputs, parameters and raw tensors together
_RAW = 7  # the number of raw_input_contents
# The fields of `contents` that hold a type's values.
_CONTENTS = {"UINT8": "uint_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
_SIZES = {"UINT8": 1, "INT32": 4, "FP32": 4}  # of a value, in bytes
# Parameters that say how bytes lie in a body of HTTP.
_OF_HTTP = frozenset({"binary_data", "binary_data_size", "binary_data_output"})


def _load() -> dict[str, type[Message]]:
    data = resources.files(__package__).joinpath("open_inference.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    described = pool.FindFileByName(_PROTO)
    return {
        name: message_factory.GetMessageClass(message)
        for name, message in described.message_types_by_name.items()
    }


_CLASSES = _load()
_DESCRIBED = _CLASSES["ModelInferRequest"].DESCRIPTOR.file
METHODS: Mapping[str, Any] = _DESCRIBED.services_by_name["GRPCInferenceService"].methods_by_name


def read_message(method: str, data: bytes) -> Any:
    """The request of a method, other than for inference.

    Raises:
        RequestRefusedError: If it is not one (400).
    """
    try:
        return _CLASSES[METHODS[method].input_type.name].FromString(data)
    except DecodeError as exc:
        raise _no_message() from exc


def write_message(method: str, answer: Record | Mapping[str, Any]) -> bytes:
    """The answer of a method, from a record with fields of the same names."""
    values = answer.to_dict() if isinstance(answer, Record) else answer
    message = _CLASSES[METHODS[method].output_type.name]()
    data: bytes = ParseDict(values, message).SerializeToString()
    return data


@dataclass(frozen=True, eq=False)
class InferMessage:
    """A request for inference that was looked through, and not read yet.

    Attributes:
        model_name: Of the model that is to run.
        model_version: As it was asked for; may be empty.
        request_id: Comes back in the answer, and in an error of a stream; may be empty.
        num_bytes: All but the raw tensors.
    """

    model_name: str
    model_version: str
    request_id: str
    num_bytes: int
    _message: Any
    _raw: tuple[memoryview, ...]

    def read(self, model: Model) -> InferRequest:
        """Read the request.

        Raises:
            RequestRefusedError: If it is not one for this model (400).
        """
        message, raw = self._message, self._raw
        if raw and len(raw) != len(message.inputs):
            raise refusals.bad_tensor(
                f"The request has {len(message.inputs)} inputs and {len(raw)} raw_input_contents; "
                "send one for each input, or values in `contents`."
            )
        given = {
            "id": message.id,
            "inputs": [
                _input(each, raw[number] if raw else None)
                for number, each in enumerate(message.inputs)
            ],
            "outputs": [
                {"name": each.name, "parameters": _parameters(each.parameters)}
                for each in message.outputs
            ],
            "parameters": {**_parameters(message.parameters), "binary_data_output": bool(raw)},
        }
        checked = validated(InferJson, given, described_in=f"{_PROTO} and the model's metadata")
        if raw:
            _check_size(checked.inputs[0], raw[0])
        return read_request(model, checked, raw[0] if raw else memoryview(b""))


def look_through(data: bytes, *, max_bytes: int) -> InferMessage:
    """A request for inference, whose tensors are still as they came.

    Args:
        data: The message.
        max_bytes: How long it may be, but for raw tensors.

    Raises:
        RequestRefusedError: If it is not a message (400), or too much (413).
    """
    view, kept, raw, start = memoryview(data), bytearray(), [], 0
    for number, (field, content, end) in enumerate(_parts(view)):
        if number >= _MAX_PARTS:
            raise refusals.too_many("parts", number + 1, _MAX_PARTS)
        if field == _RAW and content is not None:
            raw.append(content)
        elif len(kept) + end - start > max_bytes:
            raise refusals.too_many_values(max_bytes)
        else:
            kept += view[start:end]
        start = end
    try:
        message: Any = _CLASSES["ModelInferRequest"].FromString(bytes(kept))
    except DecodeError as exc:
        raise _no_message() from exc
    return InferMessage(
        message.model_name, message.model_version, message.id, len(kept), message, tuple(raw)
    )


def answer_message(model: Model, output: Float32Array, request: InferRequest) -> Any:
    """The answer with an output, raw where the request's input was.

    Args:
        model: What ran.
        output: float32, finite, of the shape that the model gives.
        request: Says how.
    """
    answer: Any = _CLASSES["ModelInferResponse"](
        model_name=model.name, model_version=VERSION, id=request.request_id
    )
    tensor = answer.outputs.add(
        name=model.output.name, datatype=datatype(model.output), shape=output.shape
    )
    if request.is_binary:
        answer.raw_output_contents.append(output.astype("<f4", copy=False).tobytes())
    else:
        tensor.contents.fp32_contents.extend(output.ravel().tolist())
    return answer


def stream_message(answer: Any) -> bytes:
    """An answer as one of a stream; there is exactly one for each request, which is said."""
    answer.parameters["triton_final_response"].bool_param = True
    message: Any = _CLASSES["ModelStreamInferResponse"](infer_response=answer)
    data: bytes = message.SerializeToString()
    return data


def stream_error(sentence: str, request_id: str) -> bytes:
    """What is answered in a stream to a request that is refused; others go on."""
    answer = {"error_message": sentence, "infer_response": {"id": request_id}}
    return write_message("ModelStreamInfer", answer)


def _input(tensor: Any, raw: memoryview | None) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "parameters": _parameters(tensor.parameters),
    }
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    if raw is None:
        wanted = _CONTENTS.get(tensor.datatype)
        if len(filled) != 1 or wanted not in (None, *filled):
            raise refusals.bad_tensor(
                f"The input {tensor.name[:60]!r} has {', '.join(filled) or 'no values'}; send "
                f"{wanted or 'the contents of its type'}, or raw_input_contents."
            )
        given["data"] = list(getattr(tensor.contents, filled[0]))
        return given
    if filled:
        raise refusals.bad_tensor(
            f"The input {tensor.name[:60]!r} has both `contents` and raw_input_contents; send one "
            "of them."
        )
    given["parameters"]["binary_data_size"] = len(raw)
    return given


def _check_size(tensor: InputTensor, raw: memoryview) -> None:
    size = _SIZES.get(tensor.datatype, 0) * math.prod(tensor.shape)
    if size not in (0, len(raw)):
        raise refusals.bad_tensor(
            f"The input {tensor.name[:60]!r} of shape {tensor.shape} and type {tensor.datatype} "
            f"takes {size:,} bytes, and its raw_input_contents has {len(raw):,}."
        )


def _parameters(given: Any) -> dict[str, Any]:
    """Parameters as JSON would have them."""
    found = {}
    for name in list(given):
        choice = given[name].WhichOneof("parameter_choice")
        if choice is not None and name not in _OF_HTTP:
            found[name] = getattr(given[name], choice)
    return found


def _parts(view: memoryview) -> Iterator[tuple[int, memoryview | None, int]]:
    """The fields of a message: number, content where it has a length, and where it ends."""
    position = 0
    while position < len(view):
        key, position = _varint(view, position)
        kind, content = key & 7, None
        if kind == 2:
            length, position = _varint(view, position)
            content = view[position : position + length]
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 0:
            _, position = _varint(view, position)
        else:  # groups, which proto3 does not have
            raise _no_message()
        if position > len(view):
            raise _no_message()
        yield key >> 3, content, position


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise _no_message()
        byte = view[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _no_message()


def _no_message() -> Exception:
    return refusals.bad_request(
        f"The message is not one of {_PROTO}; make it with a client of that protocol."
    )
