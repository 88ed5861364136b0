"""ONNX graphs as rewrites and bisection take them: read, looked up by value, changed, written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

# A protobuf file ends at 2 GiB; the graph itself needs a few of these bytes.
MAX_EMBEDDED_BYTES = 2**31 - 2**26

# Element types as a graph numbers them.
FP32 = int(onnx.TensorProto.FLOAT)
FP16 = int(onnx.TensorProto.FLOAT16)
BF16 = int(onnx.TensorProto.BFLOAT16)
HALF_TYPES = frozenset({FP16, BF16})

# Shapes and indices are this small; shape inference needs their values, and no others.
_MAX_SHAPE_VALUES = 64


def read_model(path: Path) -> Any:
    """Read a graph with its weights, also those beside it; an `onnx.ModelProto`."""
    return onnx.load(str(path))


def write_model(model: Any, path: Path, *, max_embedded_bytes: int = MAX_EMBEDDED_BYTES) -> None:
    """Write a graph; weights that one file cannot hold lie beside it, in `NAME.onnx.data`.

    Args:
        model: An `onnx.ModelProto`; above `max_embedded_bytes` its weights leave it.
        path: The file.
        max_embedded_bytes: Largest total of the weights that the file itself may hold, in bytes.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= max_embedded_bytes:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    beside = f"{path.name}.data"
    path.with_name(beside).unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=beside,
    )


def numpy_dtype(element_type: int) -> np.dtype[Any]:
    """The dtype of arrays of an element type; bf16 has one of the package ml_dtypes."""
    return helper.tensor_dtype_to_np_dtype(element_type)


def takes_bf16(op_type: str, opset: int) -> bool:
    """Whether the operands of an operator of ONNX may be bf16 in an opset, where they are fp16."""
    schema = onnx.defs.get_schema(op_type, opset)
    allowed = [set(constraint.allowed_type_strs) for constraint in schema.type_constraints]
    return all("tensor(bfloat16)" in types for types in allowed if "tensor(float16)" in types)


def attributes_of(node: Any) -> dict[str, Any]:
    """The attributes of a node, as `helper.make_node` takes them."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def opset_of(model: Any) -> int:
    """Version of ONNX's own operators in a graph."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def tensor_types(model: Any) -> dict[str, Any]:
    """Element type and shape of every value of a graph, by its name.

    Weights are declared and not copied, so that graphs above 2 GB can be inferred as well.

    Args:
        model: An `onnx.ModelProto`.

    Returns:
        `onnx.TypeProto.Tensor` by name; dimensions that are free have no value.
    """
    graph = model.graph
    small = [t for t in graph.initializer if np.prod(t.dims, dtype=int) <= _MAX_SHAPE_VALUES]
    known = {tensor.name for tensor in small}
    declared = [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in known
    ]
    inputs = [*graph.input, *declared]
    light = helper.make_graph(graph.node, graph.name, inputs, graph.output, small)
    bare = helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inputs, *graph.output)}
    for tensor in small:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        types[tensor.name] = info.type.tensor_type
    return types


class GraphEditor:
    """Changes a copy of a graph; the graph itself stays as it is.

    Nodes and weights that nothing uses any more are left out when it is finished.

    Args:
        model: An `onnx.ModelProto` with its weights.

    Attributes:
        nodes: The nodes of the graph, copies; `set_input` changes what they take.
        weights: The weights by name.
        changed: Whether anything has been changed.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._types = tensor_types(model)
        self.nodes: list[Any] = []
        for node in model.graph.node:
            self.nodes.append(type(node)())
            self.nodes[-1].CopyFrom(node)
        self._producers = {value: node for node in self.nodes for value in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.input):
                self._consumers.setdefault(value, []).append(node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._before: dict[str, list[Any]] = {}
        self._after: dict[str, list[Any]] = {}
        self._names = set(self._types)
        self.changed = False

    def producer(self, value: str) -> Any:
        """The node of the graph that computes a value; None for inputs and weights."""
        return self._producers.get(value)

    def consumers(self, value: str) -> list[Any]:
        """The nodes of the graph that took a value before any change."""
        return self._consumers.get(value, [])

    def is_output(self, value: str) -> bool:
        """Whether the graph gives a value."""
        return value in self._outputs

    def array(self, name: str) -> NDArray[Any] | None:
        """The values of a weight; None where a name is no weight."""
        tensor = self.weights.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def element_type(self, value: str) -> int | None:
        """Element type of a value before any change; None where it is not known."""
        return int(self._types[value].elem_type) if value in self._types else None

    def is_half(self, value: str) -> bool:
        """Whether a value was fp16 or bf16 before any change."""
        return self.element_type(value) in HALF_TYPES

    def shape(self, value: str) -> list[int | None]:
        """Shape of a value; None for each dimension that is free."""
        dimensions = self._types[value].shape.dim
        return [int(d.dim_value) if d.HasField("dim_value") else None for d in dimensions]

    def size(self, value: str, axis: int) -> int | None:
        """Size of a dimension of a value; None where it is free."""
        return self.shape(value)[axis]

    def rank(self, value: str) -> int:
        """Number of dimensions of a value."""
        return len(self._types[value].shape.dim)

    def fresh(self, hint: str) -> str:
        """A name that nothing in the graph has."""
        name, count = hint, 1
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, hint: str, values: NDArray[Any]) -> str:
        """Add a weight; gives its name."""
        name = self.fresh(hint)
        self.set_weight(name, values)
        return name

    def set_weight(self, name: str, values: NDArray[Any]) -> None:
        """Give a weight other values."""
        self.weights[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        self.changed = True

    def set_input(self, node: Any, slot: int, value: str) -> None:
        """Let a node take another value."""
        node.input[slot] = value
        self.changed = True

    def add_before(
        self, place: Any, op: str, inputs: Sequence[str], hint: str, **attributes: Any
    ) -> str:
        """Add a node of one output in front of another; gives the name of its output."""
        output = self.fresh(hint)
        self._before.setdefault(place.output[0], []).append(
            helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes)
        )
        self.changed = True
        return output

    def rename_output(self, node: Any, hint: str) -> tuple[str, str]:
        """Give the first output of a node another name; gives the old one and the new one.

        What took the old one still does: it has to be computed again, with `add_after`.
        """
        old = node.output[0]
        new = self.fresh(hint)
        self._before[new] = self._before.pop(old, [])
        self._after[new] = self._after.pop(old, [])
        node.output[0] = new
        self.changed = True
        return old, new

    def add_after(
        self, place: Any, op: str, inputs: Sequence[str], output: str, **attributes: Any
    ) -> None:
        """Add a node behind another, with the name of its output."""
        self._after.setdefault(place.output[0], []).append(
            helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes)
        )
        self.changed = True

    def finish(self) -> Any:
        """The new graph, an `onnx.ModelProto`; None where nothing was changed."""
        if not self.changed:
            return None
        ordered = [
            part
            for node in self.nodes
            for key in (node.output[0],)
            for part in (*self._before.get(key, ()), node, *self._after.get(key, ()))
        ]
        return rebuild(self._model, ordered, self.weights, self._model.graph.input)


def declare(name: str, element_type: int, shape: Sequence[int | str | None]) -> Any:
    """An input or output of a graph; a letter is a free dimension, None one without a name."""
    return helper.make_tensor_value_info(name, element_type, shape)


def cast_node(value: str, result: str, element_type: int) -> Any:
    """A node that gives a value in another element type."""
    return helper.make_node("Cast", [value], [result], name=f"Cast:{result}", to=element_type)


def rebuild(
    model: Any,
    nodes: Sequence[Any],
    initializers: dict[str, Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any] | None = None,
) -> Any:
    """Make a model of nodes, with what of them and of the weights leads to its outputs.

    Args:
        model: Where opset, versions and, without `outputs`, the outputs are from.
        nodes: In an order in which they can be computed.
        initializers: Weights by name.
        inputs: `onnx.ValueInfoProto` of each input.
        outputs: Likewise.

    Returns:
        A new `onnx.ModelProto`.
    """
    outputs = model.graph.output if outputs is None else outputs
    needed = {value.name for value in outputs}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    graph = helper.make_graph(
        kept[::-1],
        model.graph.name,
        inputs,
        outputs,
        [tensor for name, tensor in initializers.items() if name in needed],
    )
    return helper.make_model(
        graph,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
