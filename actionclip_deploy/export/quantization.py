"""Rewriting the graph of a ViT into int8 or fp8: which products, in which form, block by block.

Written here and not with `onnxruntime.quantization`, which was tried on ONNX Runtime 1.32: for
the dynamic recipe it gives the same session and the same numbers, in five times the time and with
files of its own beside the graph; its static recipe leaves a bias either where the CPU computes
the product in fp32 again, or as int32, which TensorRT refuses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.rounding import Numbers, numbers_of, quantize_weight, round_scales
from actionclip_deploy.runtimes import onnx_graphs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from actionclip_deploy.manifest import Int8Recipe, QuantizedPrecision, WeightRange

# Scales in fp16, and fp8 at all, came into QuantizeLinear and DequantizeLinear here; IR version 9.
_TYPED_OPSET = 19

# Products of a block, named after the weights of `VitTower`. The patch embedding and the last
# projection are in no block, and products of two activations have no weight.
_BLOCK = re.compile(r"^tower\.(?:(blocks\.\d+)|(last_block))\.")


@dataclass(frozen=True)
class Product:
    """A product of rows with a weight, in a block of the tower.

    Attributes:
        node: Its place among the nodes of the graph.
        block: Name of the block: `blocks.0` and so on, and `last_block`.
        input: The rows, a value of the graph.
        weight: The initializer, shape (inputs, outputs).
        bias: The initializer, shape (outputs,), or None.
        output: The result, a value of the graph.
    """

    node: int
    block: str
    input: str
    weight: str
    bias: str | None
    output: str


def find_products(model: Any) -> tuple[Product, ...]:
    """Products of a graph that can be computed in int8 or fp8, in their order.

    Args:
        model: An `onnx.ModelProto`; its weights need not be loaded.

    Raises:
        ExportError: If there are none, as in CLIP's ResNets.
    """
    products = []
    for place, node in enumerate(model.graph.node):
        found = _BLOCK.match(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if found:
            bias = node.input[2] if len(node.input) > 2 else None
            names = (node.input[0], node.input[1], bias, node.output[0])
            products.append(Product(place, found[1] or found[2], *names))
    if not products:
        raise ExportError(
            "The visual tower has no transformer blocks, and int8 and fp8 are for their products "
            "alone; export this checkpoint with --precision fp32 or fp16."
        )
    return tuple(products)


def input_types(model: Any) -> dict[str, int]:
    """The values that products take as rows, each with its type as `onnx.TensorProto` numbers it.

    Raises:
        ExportError: If there are no products.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {product.input: types[product.weight] for product in find_products(model)}


def block_names(products: Collection[Product]) -> tuple[str, ...]:
    """The blocks that products are of, in their order."""
    return tuple(dict.fromkeys(product.block for product in products))


def quantize(
    model: Any,
    *,
    blocks: Collection[str],
    recipe: Int8Recipe,
    weight_range: WeightRange | None = None,
    thresholds: Mapping[str, float] | None = None,
    precision: QuantizedPrecision = "int8",
) -> Any:
    """Compute the products of some blocks in int8 or fp8.

    Weights are symmetric, with a scale for each output. `dynamic` scales the rows of a call by
    their smallest and largest value, as uint8. `static` has one scale for each product, around
    zero, as pairs of QuantizeLinear and DequantizeLinear, which TensorRT takes. These dequantise
    to the type that the graph computes the products in, which therefore stays the type of all else.

    Args:
        model: The fp32 or, for `static`, fp16 graph, an `onnx.ModelProto` with its weights; it is
            left as it is.
        blocks: Names of blocks; the others stay as they are.
        recipe: How activations are scaled; fp8 is always static.
        weight_range: How large a weight may become in int8.
        thresholds: For `static`: the largest magnitude that the input of each product keeps.
        precision: What the products are computed in.

    Returns:
        A new `onnx.ModelProto`. Its opset is 19 where fp8 or scales in fp16 need it.
    """
    chosen = {p.node: p for p in find_products(model) if p.block in blocks}
    weights = {i.name: i for i in model.graph.initializer}
    numbers = numbers_of(precision, weight_range)
    writer = _Writer(numbers, recipe, thresholds or {})
    for place, node in enumerate(model.graph.node):
        if place in chosen:
            writer.add_product(chosen[place], numpy_helper.to_array(weights[chosen[place].weight]))
        else:
            writer.nodes.append(node)
    used = {name for node in writer.nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    graph = helper.make_graph(
        writer.nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [*kept, *writer.initializers.values()],
    )
    opsets = [helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    for opset in opsets:
        if not opset.domain and writer.needs_typed_opset:
            opset.version = max(opset.version, _TYPED_OPSET)
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=model.ir_version, producer_name=model.producer_name
    )


def opset_of(path: Path) -> int:
    """ONNX's operator set that a graph is written in."""
    return onnx_graphs.opset_of(onnx.load(str(path), load_external_data=False))


class _Writer:
    """Collects the nodes and weights of the new graph."""

    def __init__(
        self, numbers: Numbers, recipe: Int8Recipe, thresholds: Mapping[str, float]
    ) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.needs_typed_opset = numbers.name == "fp8"
        self._numbers = numbers
        self._recipe = recipe
        self._thresholds = thresholds
        self._quantized: set[str] = set()

    def add_product(self, product: Product, weight: NDArray[np.floating[Any]]) -> None:
        """Add the quantised form of a product, and its bias as it was."""
        values, scale = quantize_weight(weight, self._numbers)
        name, kind = product.weight, self._numbers.name
        self._constant(f"{name}.{kind}", values)
        self._constant(f"{name}.scale", scale)
        self._constant(f"{name}.zero", np.zeros(scale.shape, self._numbers.dtype))
        self.needs_typed_opset |= scale.dtype != np.float32
        if self._recipe == "dynamic":
            self._add_dynamic(product)
        else:
            self._add_static(product, scale)

    def _add_dynamic(self, product: Product) -> None:
        rows, weight, output = product.input, product.weight, product.output
        if rows not in self._quantized:  # once, whatever the number of products that take it
            self._quantized.add(rows)
            names = [f"{rows}.int8", f"{rows}.scale", f"{rows}.zero"]
            self._node("DynamicQuantizeLinear", [rows], names)
        # In this form ONNX Runtime fuses all of it, with the bias, into DynamicQuantizeMatMul.
        operands = [f"{rows}.int8", f"{weight}.int8", f"{rows}.zero", f"{weight}.zero"]
        self._node("MatMulInteger", operands, [f"{output}.sums"])
        self._node("Cast", [f"{output}.sums"], [f"{output}.cast"], to=onnx.TensorProto.FLOAT)
        self._node("Mul", [f"{rows}.scale", f"{weight}.scale"], [f"{output}.scale"])
        result = output if product.bias is None else f"{output}.product"
        self._node("Mul", [f"{output}.cast", f"{output}.scale"], [result])
        if product.bias is not None:
            self._node("Add", [result, product.bias], [output])

    def _add_static(self, product: Product, weight_scale: NDArray[np.floating[Any]]) -> None:
        rows, weight, output = product.input, product.weight, product.output
        kind, dtype = self._numbers.name, weight_scale.dtype
        if rows not in self._quantized:
            self._quantized.add(rows)
            scale = np.asarray(self._thresholds[rows] / self._numbers.activation_limit)
            self._constant(f"{rows}.scale", round_scales(scale, dtype))
            self._constant(f"{rows}.zero", np.zeros((), self._numbers.dtype))
            parameters = [f"{rows}.scale", f"{rows}.zero"]
            self._node("QuantizeLinear", [rows, *parameters], [f"{rows}.{kind}"])
            self._node("DequantizeLinear", [f"{rows}.{kind}", *parameters], [f"{rows}.rounded"])
        parts = [f"{weight}.{kind}", f"{weight}.scale", f"{weight}.zero"]
        self._node("DequantizeLinear", parts, [f"{weight}.rounded"], axis=1)
        result = output if product.bias is None else f"{output}.product"
        self._node("MatMul", [f"{rows}.rounded", f"{weight}.rounded"], [result])
        if product.bias is None:
            return
        if kind == "int8" and dtype == np.float32:
            # ONNX Runtime makes a Gemm of MatMul and Add before it looks for int8, and has no
            # int8 Gemm with an fp32 bias. A reshape to the same shape, which costs nothing, keeps
            # the two apart. It has no CPU kernels at all for fp8, or for int8 between fp16.
            num_outputs = len(weight_scale)
            shape = f"int8.rows_of_{num_outputs}"
            self._constant(shape, np.array([-1, num_outputs], np.int64))
            self._node("Reshape", [result, shape], [f"{output}.rows"])
            result = f"{output}.rows"
        self._node("Add", [result, product.bias], [output])

    def _constant(self, name: str, values: NDArray[Any]) -> None:
        self.initializers[name] = numpy_helper.from_array(values, name)

    def _node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        node = helper.make_node(op, inputs, outputs, name=f"{op}:{outputs[0]}", **attributes)
        self.nodes.append(node)
