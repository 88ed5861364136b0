"""Writing a large ONNX file without holding it in memory.

protobuf serialises a message as a whole: a graph of 1.2 GB took 3.6 GB on top of its weights. Here
the weights go to the file one at a time, in the same format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

if TYPE_CHECKING:
    from pathlib import Path

    from torch.onnx import ONNXProgram

_WITH_LENGTH = 2  # protobuf's wire type of messages, strings and bytes


def write_embedded(program: ONNXProgram, path: Path) -> None:
    """Write a program as one ONNX file with its weights inside.

    Args:
        program: What torch exported; its weights are taken from it.
        path: The file.
    """
    weights = take_weights(program)
    heads = [_tensor_head(name, tensor) for name, tensor in weights.items()]
    model = program.model_proto
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    size = len(graph) + sum(map(len, heads)) + sum(t.nbytes for t in weights.values())
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.write(_field(onnx.ModelProto.GRAPH_FIELD_NUMBER, size))
        file.write(graph)
        for head, tensor in zip(heads, weights.values(), strict=True):
            file.write(head)
            file.write(tensor.tobytes())


def take_weights(program: ONNXProgram) -> dict[str, Any]:
    """Remove the weights from a program and give them back by name.

    Also where they are not wanted any more: onnxscript 0.7 holds the last graph that it rewrote
    until it gets the next.
    """
    initializers = program.model.graph.initializers
    weights = {name: value.const_value for name, value in initializers.items()}
    for value in initializers.values():
        value.const_value = None
    initializers.clear()
    return weights


def _tensor_head(name: str, tensor: Any) -> bytes:
    """All of an initializer in a graph that comes before its values."""
    proto = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value)
    head: bytes = proto.SerializeToString(deterministic=True)
    head += _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
    return _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + tensor.nbytes) + head


def _field(number: int, length: int) -> bytes:
    """What begins a field of a message: its number, its type, and its length in bytes."""
    return _varint(number << 3 | _WITH_LENGTH) + _varint(length)


def _varint(value: int) -> bytes:
    """A number in groups of 7 bits, lowest first; the high bit says that more follow."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
