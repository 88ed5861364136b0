"""Whether an engine computes in the precision that its graph asks for.

A build that succeeds says nothing about that: a version that ignores a flag gives an fp32 engine
and no error, and a quantised product may fall back to a wider type. So the arithmetic of the graph
is looked for among the layers of the engine, product by product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from google.protobuf.message import DecodeError  # comes with onnx
from onnx import TensorProto, shape_inference

from actionclip_deploy.errors import EngineError

# The arithmetic of a graph: its products and convolutions, and the precision of each.
#
# What an engine is audited against. Weights are not looked at, and not kept.


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
            precision = _products_precision(node, types, producers)
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


def _products_precision(
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


# What TensorRT's engine inspector tells about the layers of an engine, in both of its forms.
#
# Up to version 10 a tensor has one field for format and type ("Half", or in words as "Row major
# linear FP16 format") and the engine a list `Bindings`; since version 11 there are `Format` and
# `DataType` apart, and `I/O Tensors`. Layers are objects only in an engine that was built with
# detailed profiling verbosity; they are names otherwise.


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
    """One layer of an engine.

    Attributes:
        name: Its name: nodes of the graph that are joined by `+`, or one made up.
        kind: TensorRT's type of layer; empty where only the name is told.
        tactic: Name of the kernel; empty where it is not told.
        nodes: Nodes of the graph that it was made of, where it tells them.
        input_types: Of those inputs that have a type that is computed in.
        output_types: Likewise of its outputs.
    """

    name: str
    kind: str
    tactic: str
    nodes: frozenset[str]
    input_types: tuple[ProductPrecision, ...]
    output_types: tuple[ProductPrecision, ...]

    @property
    def kernel_precision(self) -> ProductPrecision | None:
        """What the kernel computes in, from its name; None where that does not say."""
        return kernel_precision(self.tactic)


def read_layers(inspector_json: str) -> tuple[Layer, ...]:
    """Read the layers of an engine.

    Args:
        inspector_json: What `EngineInspector.get_engine_information` gives as JSON.

    Raises:
        EngineError: If it is no such thing.
    """
    try:
        layers = json.loads(inspector_json)["Layers"]
        return tuple(_layer(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(
            f"TensorRT's engine inspector gave no list of layers ({type(exc).__name__}: {exc}), so "
            "the engine cannot be audited; use another version of TensorRT."
        ) from exc


def kernel_precision(tactic: str) -> ProductPrecision | None:
    """The type that a kernel multiplies in, from its name; None where the name does not tell."""
    name = _HASH.sub("", tactic.lower())
    if found := _XMMA.search(name):
        return _XMMA_PRECISIONS.get(found[1])
    return next((kind for pattern, kind in _KERNELS if re.search(pattern, name)), None)


def _layer(layer: Any) -> Layer:
    if isinstance(layer, str):
        return Layer(layer, "", "", frozenset(_ONNX_NODE.findall(layer)), (), ())
    return Layer(
        name=layer["Name"],
        kind=layer.get("LayerType", ""),
        tactic=layer.get("TacticName", ""),
        nodes=frozenset(_ONNX_NODE.findall(layer.get("Metadata", ""))),
        input_types=_types(layer.get("Inputs", [])),
        output_types=_types(layer.get("Outputs", [])),
    )


def _types(tensors: list[dict[str, Any]]) -> tuple[ProductPrecision, ...]:
    found = []
    for tensor in tensors:
        fields = {key.lower(): str(value).lower() for key, value in tensor.items()}
        words = fields.get("datatype") or fields.get("format/datatype", "")
        kind = next((kind for pattern, kind in _TYPES if re.search(pattern, words)), None)
        found += [] if kind is None else [kind]
    return tuple(found)


# Of all arithmetic. TensorRT may fold or move a small product, such as one with a constant.
MAX_OTHER_SHARE = 0.05
MAX_UNKNOWN_SHARE = 0.2

# Kinds of layers that only move numbers, though they name the nodes whose numbers those are.
_MOVING = frozenset(
    ("reformat", "constant", "noop", "no op", "signal", "wait", "shuffle", "shapehosttodevice")
)
# Myelin, the compiler within TensorRT, numbers the layers that it names after nodes.
_MYELIN_NUMBER = re.compile(r"(?:_mye\d+)?_myl\d+_\d+$")
# torch's exporter names a Cast so.
_CASTING = re.compile(r"cast|to_copy")
_MULTIPLYING = re.compile(r"gemm|gemv|conv|matrix|matmul|mha|fmha|xmma|cutlass|cudnn|attention")


@dataclass(frozen=True)
class AuditedProduct:
    """A product of the graph, and what the engine made of it.

    Attributes:
        product: What the graph asks for.
        layers: Names of the layers that compute it.
        precision: What they compute it in; None where that cannot be told.
    """

    product: Product
    layers: tuple[str, ...]
    precision: ProductPrecision | None


@dataclass(frozen=True)
class Audit:
    """The arithmetic of a graph and of an engine side by side.

    Attributes:
        products: All products of the graph, in its order.
        num_layers: Layers of the engine.
    """

    products: tuple[AuditedProduct, ...]
    num_layers: int

    def asked(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that the graph asks for, 0 to 1."""
        return self._shares(lambda audited: audited.product.precision)

    def computed(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that the engine computes in, 0 to 1."""
        return self._shares(lambda audited: audited.precision)

    def unknown_share(self) -> float:
        """Share of the arithmetic of which the precision cannot be told, 0 to 1."""
        return self._share(audited for audited in self.products if audited.precision is None)

    def check(self) -> None:
        """Do nothing where the engine computes what was asked for.

        Raises:
            EngineError: If it computes a share in another precision, or if that cannot be told of
                too large a share.
        """
        unknown = [audited for audited in self.products if audited.precision is None]
        others = [
            audited
            for audited in self.products
            if audited.precision not in (None, audited.product.precision)
        ]
        if self._share(others) > MAX_OTHER_SHARE:
            raise EngineError(
                f"The engine computes {self._share(others):.0%} of its arithmetic in another "
                f"precision than its graph asks for: {_largest(others)}; build it with another "
                "version of TensorRT, or export a bundle of a precision that this GPU has."
            )
        if self._share(unknown) > MAX_UNKNOWN_SHARE:
            raise EngineError(
                f"The precision of {self._share(unknown):.0%} of the engine's arithmetic cannot be "
                f"told from its {self.num_layers} layers, {MAX_UNKNOWN_SHARE:.0%} at most is "
                f"taken: {_largest(unknown)}; build it with another version of TensorRT."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is kept beside an engine."""
        return {
            "num_macs": sum(audited.product.num_macs for audited in self.products),
            "num_layers": self.num_layers,
            "asked": self.asked(),
            "computed": self.computed(),
            "unknown": self.unknown_share(),
            "other_than_asked": [
                {
                    "node": audited.product.node,
                    "asked": audited.product.precision,
                    "computed": audited.precision,
                    "layers": list(audited.layers),
                }
                for audited in self.products
                if audited.precision != audited.product.precision
            ],
        }

    def _shares(
        self, precision_of: Callable[[AuditedProduct], ProductPrecision | None]
    ) -> dict[ProductPrecision, float]:
        shares = {
            precision: self._share(a for a in self.products if precision_of(a) == precision)
            for precision in PRECISIONS
        }
        return {precision: share for precision, share in shares.items() if share}

    def _share(self, some: Iterable[AuditedProduct]) -> float:
        total = sum(audited.product.num_macs for audited in self.products)
        return sum(audited.product.num_macs for audited in some) / total if total else 0.0


def audit(inspector_json: str, products: Sequence[Product]) -> Audit:
    """Find each product of a graph in an engine.

    A product belongs to the layers that name its node, and of those to the ones that multiply.
    They compute it in the type that the name of their kernel tells, or else in the type of their
    inputs; a layer of which neither is clear leaves it unknown.

    Args:
        inspector_json: What TensorRT's engine inspector tells of the engine, as JSON.
        products: Of the graph that it was built from.

    Raises:
        EngineError: If the inspector tells no layers.
    """
    layers = read_layers(inspector_json)
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in _nodes(layer):
            by_node.setdefault(node, []).append(layer)
    audited = []
    for product in products:
        named = by_node.get(product.node) or by_node.get(_plain(product.node), [])
        computing = _computing(named)
        names = tuple(layer.name for layer in computing)
        precision = _precision(computing, product.precision)
        audited.append(AuditedProduct(product, names, precision))
    return Audit(tuple(audited), len(layers))


def _nodes(layer: Layer) -> set[str]:
    """Nodes that a layer names: those of its metadata, or else the parts of its own name."""
    if layer.nodes:
        return set(layer.nodes)
    parts = _MYELIN_NUMBER.sub("", layer.name).split("+")
    return {_plain(part.strip()) for part in parts}


def _plain(name: str) -> str:
    """A name as one of the compilers writes it, which keeps letters, digits and slashes."""
    return re.sub(r"[^0-9A-Za-z/]", "_", name)


def _computing(layers: Sequence[Layer]) -> list[Layer]:
    """Those of the layers of one node that do its arithmetic."""
    working = [layer for layer in layers if layer.kind.lower() not in _MOVING]
    multiplying = [
        layer
        for layer in working
        if _MULTIPLYING.search(f"{layer.kind} {layer.tactic}".lower()) or layer.kernel_precision
    ]
    return multiplying or working


def _precision(layers: Sequence[Layer], asked: ProductPrecision) -> ProductPrecision | None:
    """What layers compute in together; None where one is not clear, or they differ."""
    found = {_layer_precision(layer, asked) for layer in layers}
    return found.pop() if len(found) == 1 else None


def _layer_precision(layer: Layer, asked: ProductPrecision) -> ProductPrecision | None:
    if layer.kernel_precision is not None:
        return layer.kernel_precision
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


def _largest(some: Sequence[AuditedProduct]) -> str:
    """The largest of some products with what is known of it, and how many others there are."""
    first = max(some, key=lambda audited: audited.product.num_macs)
    layers = f"the layer {first.layers[0]}" if first.layers else "no layer that names it"
    computed = f" in {first.precision}" if first.precision else ""
    others = f", and {len(some) - 1} more" if len(some) > 1 else ""
    return f"{first.product.node} ({first.product.precision}) by {layers}{computed}{others}"
