"""Rewrites that compute parts of a graph in another precision."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from actionclip_deploy.runtimes.onnx_graphs import (
    BF16,
    FP16,
    FP32,
    GraphEditor,
    numpy_dtype,
    opset_of,
    takes_bf16,
)
from actionclip_deploy.runtimes.trt.attentions import is_product_of_activations

# Sums over many values, which overflow fp16 or lose digits in it, and what scales by them.
_NORMALISERS = frozenset({"LayerNormalization", "Softmax"})
_BEHIND_REDUCTION = frozenset({"Clip", "Max", "Sqrt", "Div"})

# QuickGELU is x sigmoid(1.702 x), GELU x (1 + erf(x / sqrt(2))) / 2.
_CURVES = frozenset({"Sigmoid", "Erf", "Tanh", "Gelu"})
_ELEMENTWISE = _CURVES | {"Mul", "Add", "Sub", "Div"}


def fp32_islands(model: Any) -> Any:
    """Compute LayerNorm, softmax and other sums over many values in fp32.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where they are in fp32 already, as the exporter of this version has them.
    """
    editor = GraphEditor(model)
    _compute_in_fp32(editor, _sums(editor))
    return editor.finish()


def fp32_attention(model: Any) -> Any:
    """As `fp32_islands`, and products of two activations and activation functions as well.

    The products with weights, which are nearly all of the arithmetic, keep their precision.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where none of these is fp16 or bf16.
    """
    editor = GraphEditor(model)
    products = [node for node in editor.nodes if is_product_of_activations(editor, node)]
    _compute_in_fp32(editor, [*_sums(editor), *products, *_activation_functions(editor)])
    return editor.finish()


def to_bf16(model: Any) -> Any:
    """Make bf16 of all that is fp16: the range of fp32, and 8 binary digits in place of 11.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where nothing is fp16, or where an operator that takes fp16 takes no bf16
        in the graph's opset, as the convolutions of a ResNet before opset 22.
    """
    editor, opset = GraphEditor(model), opset_of(model)
    halves = [n for n in editor.nodes if any(editor.is_half(v) for v in (*n.input, *n.output))]
    if not all(takes_bf16(node.op_type, opset) for node in halves):
        return None
    for name in list(editor.weights):
        values = editor.array(name)
        if values is not None and values.dtype == np.float16:
            editor.set_weight(name, values.astype(np.float32).astype(numpy_dtype(BF16)))
    for node in editor.nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FP16:
                attribute.i = BF16
                editor.changed = True
    return editor.finish()


def _sums(editor: GraphEditor) -> list[Any]:
    """Normalisers and reductions, and what clamps and divides by the latter."""
    sums = [node for node in editor.nodes if node.op_type in _NORMALISERS]
    left = [node for node in editor.nodes if node.op_type.startswith("Reduce")]
    while left:
        node = left.pop()
        sums.append(node)
        left += [n for n in editor.consumers(node.output[0]) if n.op_type in _BEHIND_REDUCTION]
    return sums


def _activation_functions(editor: GraphEditor) -> list[Any]:
    """The nodes of activation functions: each curve, and what is elementwise around it."""
    found: dict[str, Any] = {}
    left = [node for node in editor.nodes if node.op_type in _CURVES]
    while left:
        node = left.pop()
        if node.output[0] in found or node.op_type not in _ELEMENTWISE:
            continue
        found[node.output[0]] = node
        if editor.is_half(node.output[0]):
            before = (editor.producer(value) for value in node.input)
            left += [*editor.consumers(node.output[0]), *(n for n in before if n is not None)]
    return list(found.values())


def _compute_in_fp32(editor: GraphEditor, nodes: Collection[Any]) -> None:
    """Let nodes that take fp16 or bf16 take and give fp32, with casts around them.

    Between two of them, and where a cast to or from fp32 is beside them, there is none.
    """
    island = {node.output[0]: node for node in nodes}
    given: dict[str, str] = {}  # names in fp32 of what the island computes
    for node in editor.nodes:
        if node.output[0] not in island:
            continue
        for slot, value in enumerate(node.input):
            if editor.is_half(value):
                editor.set_input(node, slot, given.get(value) or _as_fp32(editor, node, value))
        if editor.is_half(node.output[0]):
            old, new = editor.rename_output(node, f"{node.output[0]}.fp32")
            given[old] = new
            editor.add_after(node, "Cast", [new], old, to=editor.element_type(old))
            _skip_casts(editor, old, new)


def _as_fp32(editor: GraphEditor, node: Any, value: str) -> str:
    """A value or weight of the graph in fp32, for a node."""
    weight, source = editor.array(value), editor.producer(value)
    if weight is not None:
        return editor.add_constant(f"{value}.fp32", weight.astype(np.float32))
    if source is not None and source.op_type == "Cast":
        before = str(source.input[0])
        if editor.element_type(before) == FP32:
            return before
    return editor.add_before(node, "Cast", [value], f"{value}.fp32", to=FP32)


def _skip_casts(editor: GraphEditor, old: str, new: str) -> None:
    """Let what takes a value cast to fp32 take it as it is in fp32."""
    for cast in editor.consumers(old):
        result = cast.output[0]
        if cast.op_type != "Cast" or editor.element_type(result) != FP32:
            continue
        if editor.is_output(result):
            editor.set_input(cast, 0, new)
        for consumer in editor.consumers(result):
            for slot, value in enumerate(consumer.input):
                if value == result:
                    editor.set_input(consumer, slot, new)
