"""Whether an engine computes in the precision that its graph asks for.

A build that succeeds says nothing about that: a version that ignores a flag gives an fp32 engine
and no error, and a quantised product may fall back to a wider type. So each product of the graph
is looked for among the layers of the engine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.base import (
    Audit,
    AuditedProduct,
    GraphProduct,
    ProductPrecision,
)
from actionclip_deploy.runtimes.onnx_graphs import attributes_of, numpy_dtype, tensor_types

# By the dtype of the operands.
_PRECISIONS: dict[str, ProductPrecision] = {
    **{"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"},
    **{"float8_e4m3fn": "fp8", "float8_e5m2": "fp8"},
}
# These only lay the numbers of an operand out anew.
_LAYOUT = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
_INTEGER = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})


def find_products(model: Any, input_shape: Sequence[int]) -> tuple[GraphProduct, ...]:
    """Find the products of a graph, in their order.

    Args:
        model: An `onnx.ModelProto` of one input; its weights need not be loaded.
        input_shape: Sizes for all of the input's dimensions; a batch of 1 counts one row.

    Raises:
        EngineError: If the input has another number of dimensions, or shapes stay unknown.
    """
    types = tensor_types(model, input_shape)
    producers = {output: node for node in model.graph.node for output in node.output}

    def shape_of(name: str) -> tuple[int, ...]:
        shape = tuple(d.dim_value for d in types[name].shape.dim) if name in types else ()
        if not shape or not all(shape):
            raise EngineError(
                f"The shape of {name} cannot be derived from the graph, so an engine of it cannot "
                "be audited; export the bundle again."
            )
        return shape

    def dtype_of(name: str) -> str:
        return str(numpy_dtype(types[name].elem_type))

    def quantised_type(name: str) -> ProductPrecision | None:
        node = producers.get(name)
        while node is not None and node.op_type in _LAYOUT:
            node = producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return _PRECISIONS.get(dtype_of(node.input[0]))

    def precision_of(node: Any) -> ProductPrecision:
        if node.op_type in _INTEGER:
            return "int8"
        first, second = (quantised_type(name) for name in node.input[:2])
        # With quantised weights alone the product is computed in the type of the other operand.
        if first is not None and second is not None:
            return first
        dtype = dtype_of(node.input[0])
        if dtype not in _PRECISIONS:
            raise EngineError(
                f"The product {node.name} is of {dtype}, which no engine computes in; export the "
                "bundle again."
            )
        return _PRECISIONS[dtype]

    return tuple(
        GraphProduct(node.name or node.output[0], node.op_type, macs, precision_of(node))
        for node in model.graph.node
        if (macs := _num_macs(node, shape_of))
    )


def _num_macs(node: Any, shape_of: Callable[[str], tuple[int, ...]]) -> int:
    operation = node.op_type
    if operation in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return math.prod(shape_of(node.output[0])) * shape_of(node.input[0])[-1]
    if operation == "Gemm":
        inner = shape_of(node.input[0])[0 if attributes_of(node).get("transA") else 1]
        return math.prod(shape_of(node.output[0])) * inner
    if operation in ("Conv", "ConvInteger", "QLinearConv"):
        weight = node.input[3 if operation == "QLinearConv" else 1]
        return math.prod(shape_of(node.output[0])) * math.prod(shape_of(weight)[1:])
    if operation == "LSTM":
        steps, rows, _ = shape_of(node.input[0])
        # W is (directions, 4 x hidden, inputs), R is (directions, 4 x hidden, hidden).
        return steps * rows * sum(math.prod(shape_of(name)) for name in node.input[1:3])
    return 0


# The layers of an engine, in both forms that TensorRT's inspector has. Up to version 10 a tensor
# has one field for format and type ("Half", or in words as "Row major linear FP16 format"); since
# version 11 there are `Format` and `DataType` apart.

# The separators between entries are control characters that need no telling apart.
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")

# In the words of both forms; what is an index or a condition says nothing about a product.
_TYPES: tuple[tuple[str, ProductPrecision], ...] = (
    (r"bf16|bfloat16", "bf16"),
    (r"fp8|e4m3|e5m2|float8", "fp8"),
    (r"(?<!u)int8", "int8"),
    (r"fp16|half|float16", "fp16"),
    (r"fp32|float", "fp32"),
)

# Of kernels by NVIDIA's matrix generator: types of the operands, type that is multiplied in and
# type that is summed up in, type of the result; as in `f16f16_f16f32_f16`.
_TYPE = r"(?:bf16|tf32|f16|f32|i8|u8|i32|e4m3|e5m2)"
_XMMA = re.compile(rf"_{_TYPE}{_TYPE}_({_TYPE}){_TYPE}_{_TYPE}(?:_|$)")
_XMMA_PRECISIONS: dict[str, ProductPrecision] = {
    **{"f32": "fp32", "tf32": "tf32", "f16": "fp16", "bf16": "bf16"},
    **{"i8": "int8", "u8": "int8", "e4m3": "fp8", "e5m2": "fp8"},
}
# Of other libraries, the first that fits: in `ampere_fp16_s1688gemm_fp16` the `s` is the type of
# the sum, and without a type beside it the tensor cores round fp32 to TF32.
_KERNELS: tuple[tuple[str, ProductPrecision], ...] = (
    (r"fp8|e4m3|e5m2|qgmma", "fp8"),
    (r"int8|imma|i8816|i16832", "int8"),
    (r"bf16", "bf16"),
    (r"fp16|(?<!t)f16|hgemm|hcudnn|h884|h1688|h16816|hmma", "fp16"),
    (r"tf32|s1688", "tf32"),
    (r"sgemm|scudnn|ffma|simt_s|f32f32", "fp32"),
)
# A hash in a name may spell a type by chance: bf16 is a hexadecimal number.
_HASH = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine."""

    name: str  # nodes of the graph that are joined by `+`, or a made-up name
    kind: str = ""  # TensorRT's type of layer; empty where only the name is given
    tactic: str = ""  # name of the kernel; empty where it is not given
    # Nodes of the graph that it was made of, where it lists them.
    nodes: frozenset[str] = frozenset()
    # Of those inputs that have a type that is computed in.
    input_types: tuple[ProductPrecision, ...] = ()
    output_types: tuple[ProductPrecision, ...] = ()  # likewise of its outputs


def read_layers(inspector_json: str) -> tuple[Layer, ...]:
    """Read the layers of an engine.

    Args:
        inspector_json: What `EngineInspector.get_engine_information` gives as JSON.

    Raises:
        EngineError: If it holds no list of layers.
    """
    try:
        return tuple(
            # Without detailed profiling verbosity, layers are names.
            Layer(layer, nodes=frozenset(_ONNX_NODE.findall(layer)))
            if isinstance(layer, str)
            else Layer(
                name=layer["Name"],
                kind=layer.get("LayerType", ""),
                tactic=layer.get("TacticName", ""),
                nodes=frozenset(_ONNX_NODE.findall(layer.get("Metadata", ""))),
                input_types=_types(layer.get("Inputs", [])),
                output_types=_types(layer.get("Outputs", [])),
            )
            for layer in json.loads(inspector_json)["Layers"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(
            f"TensorRT's engine inspector gave no list of layers ({type(exc).__name__}: {exc}), so "
            "the engine cannot be audited; use another version of TensorRT."
        ) from exc


def kernel_precision(tactic: str) -> ProductPrecision | None:
    """The type that a kernel multiplies in, from its name; None where the name does not say."""
    name = _HASH.sub("", tactic.lower())
    if found := _XMMA.search(name):
        return _XMMA_PRECISIONS.get(found[1])
    return next((kind for pattern, kind in _KERNELS if re.search(pattern, name)), None)


def _types(tensors: list[dict[str, Any]]) -> tuple[ProductPrecision, ...]:
    found = []
    for tensor in tensors:
        fields = {key.lower(): str(value).lower() for key, value in tensor.items()}
        words = fields.get("datatype") or fields.get("format/datatype", "")
        kind = next((kind for pattern, kind in _TYPES if re.search(pattern, words)), None)
        found += [] if kind is None else [kind]
    return tuple(found)


# Kinds of layers that only move numbers, though they name the nodes whose numbers those are.
_MOVING = frozenset(
    ("reformat", "constant", "noop", "no op", "signal", "wait", "shuffle", "shapehosttodevice")
)
# Myelin, the compiler within TensorRT, numbers the layers that it names after nodes.
_MYELIN_NUMBER = re.compile(r"(?:_mye\d+)?_myl\d+_\d+$")
# torch's exporter names a Cast so.
_CASTING = re.compile(r"cast|to_copy")
_MULTIPLYING = re.compile(r"gemm|gemv|conv|matrix|matmul|mha|fmha|xmma|cutlass|cudnn|attention")


def audit(inspector_json: str, products: Sequence[GraphProduct]) -> Audit:
    """Find each product of a graph in an engine.

    A product belongs to the layers that name its node, and of those to the ones that multiply.
    They compute it in the type that the name of their kernel tells, or else in the type of their
    inputs; a layer of which neither is clear leaves it unknown.

    Args:
        inspector_json: What TensorRT's engine inspector gives as JSON.
        products: Of the graph that it was built from.

    Raises:
        EngineError: If the inspector gives no layers.
    """
    layers = read_layers(inspector_json)
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = _MYELIN_NUMBER.sub("", layer.name).split("+")
        for node in layer.nodes or {_plain(part.strip()) for part in parts}:
            by_node.setdefault(node, []).append(layer)
    audited = []
    for product in products:
        named = by_node.get(product.node) or by_node.get(_plain(product.node), [])
        working = [layer for layer in named if layer.kind.lower() not in _MOVING]
        computing = [layer for layer in working if _multiplies(layer)] or working
        found = {_layer_precision(layer, product.precision) for layer in computing}
        precision = found.pop() if len(found) == 1 else None
        names = tuple(layer.name for layer in computing)
        audited.append(AuditedProduct(product, names, precision))
    return Audit(tuple(audited), len(layers))


def _plain(name: str) -> str:
    """A name as one of the compilers writes it, which keeps letters, digits and slashes."""
    return re.sub(r"[^0-9A-Za-z/]", "_", name)


def _multiplies(layer: Layer) -> bool:
    kernel = f"{layer.kind} {layer.tactic}".lower()
    return bool(_MULTIPLYING.search(kernel)) or kernel_precision(layer.tactic) is not None


def _layer_precision(layer: Layer, asked: ProductPrecision) -> ProductPrecision | None:
    if (kernel := kernel_precision(layer.tactic)) is not None:
        return kernel
    types = set(layer.input_types)
    if len(types) == 1:
        only = types.pop()
        # Wide inputs may be rounded inside of a layer that casts, and then nothing is known; but
        # not for a product of which the graph rounds no operand.
        names = (layer.name, layer.tactic, *layer.nodes)
        casts = asked != "fp32" and any(_CASTING.search(name.lower()) for name in names)
        narrows = only == "fp32" and (casts or set(layer.output_types) not in (set(), {"fp32"}))
        return None if narrows else only
    narrow = types & {"int8", "fp8"}
    if len(narrow) == 1 and layer.input_types[0] in narrow:
        # The others are a bias or a residual.
        return narrow.pop()
    return None
