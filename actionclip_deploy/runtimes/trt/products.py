"""The arithmetic of a graph: its products and convolutions, and the precision of each.

What an engine is audited against. Weights are not looked at, and not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from google.protobuf.message import DecodeError  # comes with onnx
from onnx import TensorProto, shape_inference

from actionclip_deploy.errors import EngineError

ProductPrecision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8"]
PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)

_PRECISIONS: dict[int, ProductPrecision] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
}
# These only lay the numbers of an operand out anew.
_LAYOUT = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
_INTEGER = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
# Shapes are in small tensors; no weight is needed to find out a shape.
_LARGEST_SHAPE_TENSOR = 1024


@dataclass(frozen=True)
class Product:
    """One node of a graph that multiplies and adds.

    Attributes:
        node: Its name.
        op_type: `MatMul`, `Gemm`, `Conv` or `LSTM`, and those on integers.
        num_macs: Multiply-accumulates at the given shape of the input.
        precision: What the graph asks for: the type of its operands; where both are dequantised,
            the type that they were quantised to.
    """

    node: str
    op_type: str
    num_macs: int
    precision: ProductPrecision


def read_products(path: Path, input_shape: Sequence[int]) -> tuple[Product, ...]:
    """Find the products of a graph in a file; see `find_products`.

    Raises:
        EngineError: If it cannot be read, or shapes of it stay unknown.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise EngineError(f"{path} cannot be read ({exc}); export the bundle again.") from exc
    return find_products(model, input_shape)


def find_products(model: onnx.ModelProto, input_shape: Sequence[int]) -> tuple[Product, ...]:
    """Find the products of a graph, in their order.

    Args:
        model: The graph, of one input; left as it is.
        input_shape: Sizes for all of the input's dimensions; a batch of 1 counts one row.

    Raises:
        EngineError: If the input has another number of dimensions, or shapes stay unknown.
    """
    inferred = _with_shapes(model, input_shape)
    graph = inferred.graph
    types = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        types[value.name] = (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim))
    producers = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        macs = _num_macs(node, types)
        if macs:
            precision = _precision(node, types, producers)
            found.append(Product(node.name or node.output[0], node.op_type, macs, precision))
    return tuple(found)


def _with_shapes(model: onnx.ModelProto, input_shape: Sequence[int]) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    # Values of other sizes than these are known of the graph with free dimensions.
    for output in model.graph.output:
        bare.graph.output.add(
            name=output.name
        ).type.tensor_type.elem_type = output.type.tensor_type.elem_type
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE_TENSOR:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.initializer.add(
                name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
            )
    dims = bare.graph.input[0].type.tensor_type.shape.dim
    if len(bare.graph.input) != 1 or len(dims) != len(input_shape):
        raise EngineError(
            f"The graph has {len(bare.graph.input)} inputs, the first of {len(dims)} dimensions, "
            f"and the shape {tuple(input_shape)} was given for one; export the bundle again."
        )
    for dim, size in zip(dims, input_shape, strict=True):
        dim.dim_value = size
    return shape_inference.infer_shapes(bare, data_prop=True)


_Types = Mapping[str, tuple[int, tuple[int, ...]]]


def _num_macs(node: onnx.NodeProto, types: _Types) -> int:
    operation = node.op_type
    if operation in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return math.prod(_shape(node.output[0], types)) * _shape(node.input[0], types)[-1]
    if operation == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        inner = _shape(node.input[0], types)[0 if transposed else 1]
        return math.prod(_shape(node.output[0], types)) * inner
    if operation in ("Conv", "ConvInteger", "QLinearConv"):
        weight = node.input[3 if operation == "QLinearConv" else 1]
        return math.prod(_shape(node.output[0], types)) * math.prod(_shape(weight, types)[1:])
    if operation == "LSTM":
        steps, rows, _ = _shape(node.input[0], types)
        # W is (directions, 4 x hidden, inputs), R is (directions, 4 x hidden, hidden).
        weights = sum(math.prod(_shape(name, types)) for name in node.input[1:3])
        return steps * rows * weights
    return 0


def _shape(name: str, types: _Types) -> tuple[int, ...]:
    shape = types.get(name, (0, (0,)))[1]
    if not shape or not all(shape):
        raise EngineError(
            f"The shape of {name} cannot be found out from the graph, so an engine of it cannot "
            "be audited; export the bundle again."
        )
    return shape


def _precision(
    node: onnx.NodeProto, types: _Types, producers: Mapping[str, onnx.NodeProto]
) -> ProductPrecision:
    if node.op_type in _INTEGER:
        return "int8"
    quantised = [_quantised_type(name, types, producers) for name in node.input[:2]]
    # With quantised weights alone the product is computed in the type of the other operand.
    if quantised[0] is not None and quantised[1] is not None:
        return quantised[0]
    precision = _PRECISIONS.get(types[node.input[0]][0])
    if precision is None:
        kind = TensorProto.DataType.Name(types[node.input[0]][0])
        raise EngineError(
            f"The product {node.name} is of {kind}, which no engine computes in; export the "
            "bundle again."
        )
    return precision


def _quantised_type(
    name: str, types: _Types, producers: Mapping[str, Any]
) -> ProductPrecision | None:
    node = producers.get(name)
    while node is not None and node.op_type in _LAYOUT:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return _PRECISIONS.get(types[node.input[0]][0])
