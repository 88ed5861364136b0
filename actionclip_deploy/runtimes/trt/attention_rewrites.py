"""Rewrites that give attention another form, with the same numbers to rounding.

What TensorRT for RTX 1.7.1 makes of them was read from its list of layers, for fp16 and the
targets SM86 and SM120. As exported, an attention is one kernel `_gemm_mha_v2`, and the one product
of query, key and value is cut into three and fused to one again. `fold_heads` and `scale_scores`
give other kernels of that name, `break_fusion` two products and a softmax, and `split_packed`
three products. The attention of the class token alone, which in a ViT-B/32 a subtraction leaves as
one kernel `_gemv_mha_v1`, needs its query twice for that. Other versions may do otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actionclip_deploy.runtimes.onnx_graphs import GraphEditor, attributes_of, numpy_dtype
from actionclip_deploy.runtimes.trt.attentions import (
    Attention,
    Projection,
    find_attentions,
    find_packed,
    find_query,
)

# What `scale_scores` takes out of the query's weights: the scale of a head width of 64, and, being
# a power of two, nothing that costs a digit anywhere.
_SCALE = 0.125

# What the rows of query, key and value are multiplied by, and their weights divided by, in
# `split_packed`: powers of two for the same reason, and small ones, so that no row overflows.
_ROW_FACTORS = (1.0, 0.5, 0.25)

_Dimension = int | tuple[str, int]  # a size, or the value and the axis that has it


def fold_heads(model: Any) -> Any:
    """Compute attention with sequences and heads in one dimension, in products of 3 dimensions.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where there is no attention.
    """
    editor = GraphEditor(model)
    for attention in find_attentions(editor):
        _fold_heads(editor, attention)
    return editor.finish()


def scale_scores(model: Any) -> Any:
    """Scale the scores behind the product of query and key, and not the query's weights.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where there is no attention whose query comes from a product.
    """
    editor = GraphEditor(model)
    for attention in find_attentions(editor):
        found = find_query(editor, attention)
        if found is None:
            continue
        projection, columns = found
        _multiply_outputs(editor, projection, columns, 1 / _SCALE)
        taker = attention.masked or attention.softmax
        scores = taker.input[0]
        scale = editor.add_constant(f"{scores}.scale", _scalar(editor, scores, _SCALE))
        editor.set_input(taker, 0, editor.add_before(taker, "Mul", [scores, scale], f"{scores}.x"))
    return editor.finish()


def break_fusion(model: Any) -> Any:
    """Keep the products and the softmax of an attention apart; no result of it changes.

    The largest score of a query is subtracted before the softmax, and a query that is the only one
    of its sequence comes twice, of which the first result is used.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where there is no attention.

    Source:
        tier4/autoware-ml#95: TensorRT makes no single kernel of an attention with a subtraction.
        NVIDIA/TensorRT#4837: separate kernels are right where the single one is wrong.
    """
    editor = GraphEditor(model)
    for attention in find_attentions(editor):
        softmax = attention.softmax
        scores = softmax.input[0]
        axis = editor.add_constant(f"{scores}.axis", np.array([-1], np.int64))
        largest = editor.add_before(softmax, "ReduceMax", [scores, axis], f"{scores}.largest")
        shifted = editor.add_before(softmax, "Sub", [scores, largest], f"{scores}.shifted")
        editor.set_input(softmax, 0, shifted)
        if editor.size(attention.query, 2) == 1:
            _double_query(editor, attention)
    return editor.finish()


def split_packed(model: Any) -> Any:
    """Compute query, key and value by a product each, of rows that no two of them share.

    Compilers make one product of several that have the same rows. Here the rows are multiplied by
    1, 1/2 and 1/4 and the weights by 1, 2 and 4.

    Args:
        model: An `onnx.ModelProto` with its weights; it is left as it is.

    Returns:
        A new one; None where there is no attention with a product for several operands.

    Source:
        NVIDIA/TensorRT-Edge-LLM#151: TensorRT 10.13.3 fuses them, and wrongly at a batch of 1.
    """
    editor = GraphEditor(model)
    for attention in find_attentions(editor):
        found = find_packed(editor, attention)
        if found is not None:
            _split(editor, *found)
    return editor.finish()


def _fold_heads(editor: GraphEditor, attention: Attention) -> None:
    scores, mix, masked = attention.scores, attention.mix, attention.masked
    query, value = attention.query, attention.value
    heads, head_width = editor.size(value, 1), editor.size(value, 3)
    if heads is None or head_width is None:
        return
    queries, length = (query, 2), (value, 2)

    def reshape(node: Any, slot: int, *sizes: _Dimension) -> None:
        shape = _shape(editor, node, sizes)
        given = node.input[slot]
        editor.set_input(node, slot, editor.add_before(node, "Reshape", [given, shape], "folded"))

    def reshape_output(node: Any, *sizes: _Dimension) -> None:
        shape = _shape(editor, node, sizes)
        old, new = editor.rename_output(node, f"{node.output[0]}.folded")
        editor.add_after(node, "Reshape", [new, shape], old)

    if masked is not None and editor.rank(masked.input[1]) > 2:
        # A mask for each sequence does not go with sequences and heads in one dimension.
        reshape_output(scores, -1, heads, queries, length)
        reshape(mix, 0, -1, queries, length)
    reshape(scores, 0, -1, queries, head_width)
    reshape(scores, 1, -1, head_width, length)
    reshape(mix, 1, -1, length, head_width)
    reshape_output(mix, -1, heads, queries, head_width)


def _double_query(editor: GraphEditor, attention: Attention) -> None:
    """Let the only query of each sequence come twice, and use the first result.

    Products with one row become kernels of their own kind, which take a subtraction in.
    """
    scores, mix, query = attention.scores, attention.mix, attention.query
    twice = editor.add_before(scores, "Concat", [query, query], f"{query}.twice", axis=2)
    editor.set_input(scores, 0, twice)
    start, end, axis = (editor.add_constant("first", np.array([n], np.int64)) for n in (0, 1, 2))
    old, new = editor.rename_output(mix, f"{mix.output[0]}.twice")
    editor.add_after(mix, "Slice", [new, start, end, axis], old)


def _shape(editor: GraphEditor, node: Any, sizes: Sequence[_Dimension]) -> str:
    """A shape for a reshape before or behind a node; the graph computes what is not known."""
    known = [editor.size(*size) if isinstance(size, tuple) else size for size in sizes]
    if None not in known:
        return editor.add_constant("folded.shape", np.array(known, np.int64))
    parts = [
        _size_of(editor, node, size)
        if isinstance(size, tuple)
        else editor.add_constant("folded.size", np.array([size], np.int64))
        for size in sizes
    ]
    return editor.add_before(node, "Concat", parts, "folded.shape", axis=0)


def _size_of(editor: GraphEditor, node: Any, size: tuple[str, int]) -> str:
    value, axis = size
    return editor.add_before(node, "Shape", [value], "folded.size", start=axis, end=axis + 1)


def _scalar(editor: GraphEditor, value: str, number: float) -> Any:
    """A number in the element type of a value."""
    return np.asarray(number, numpy_dtype(editor.element_type(value) or 1))


def _scaled(values: Any, factor: float) -> Any:
    """Floats times a power of two, in their own type."""
    return (values.astype(np.float32) * np.float32(factor)).astype(values.dtype)


def _multiply_outputs(
    editor: GraphEditor, projection: Projection, columns: slice, factor: float
) -> None:
    """Multiply some outputs of a product; weights that other products share keep their values."""
    product = projection.product
    holders = [product if projection.scale is None else editor.producer(product.input[1])]
    slots = [1]
    if projection.bias is not None:
        holders.append(product if len(product.input) > 2 else projection.last)
        slots.append(list(holders[-1].input).index(projection.bias))
    for node, slot in zip(holders, slots, strict=True):
        values = editor.array(node.input[slot])
        assert values is not None  # `Projection` holds names of weights
        values = values.copy()
        values[..., columns] = _scaled(values[..., columns], factor)
        editor.set_input(node, slot, editor.add_constant(f"{node.input[slot]}.scaled", values))


def _split(editor: GraphEditor, projection: Projection, cut: Any) -> None:
    """Make a product for each output of a node that cuts a packed product."""
    end = 0
    for output, factor in zip(cut.output, _ROW_FACTORS, strict=False):
        width = editor.size(output, -1)
        assert width is not None  # a part of a weight
        begin, end = end, end + width
        part = _part(editor, cut, projection, slice(begin, end), factor)
        for consumer in editor.consumers(output):
            for slot, value in enumerate(consumer.input):
                if value == output:
                    editor.set_input(consumer, slot, part)


def _part(
    editor: GraphEditor, place: Any, projection: Projection, columns: slice, factor: float
) -> str:
    """Some columns of a product with its bias, of rows times a factor; before a node."""
    product, moved = projection.product, projection.moved
    rows = _times(editor, place, product.input[0], factor)
    if projection.scale is None:
        weight = _columns(editor, projection.weight, columns, 1 / factor)
    else:
        operands = [_columns(editor, projection.weight, columns)]
        operands.append(_columns(editor, projection.scale, columns, 1 / factor))
        if projection.zero is not None:
            operands.append(_columns(editor, projection.zero, columns))
        source = editor.producer(product.input[1])
        hint = f"{projection.weight}.rounded"
        weight = editor.add_before(place, source.op_type, operands, hint, **attributes_of(source))
    bias = [] if projection.bias is None else [_columns(editor, projection.bias, columns)]
    inputs = [rows, weight, *(bias if len(product.input) > 2 else [])]
    options = attributes_of(product)
    result = editor.add_before(
        place, product.op_type, inputs, f"{product.output[0]}.part", **options
    )
    if len(inputs) == 3 or not bias:
        return result
    if moved is not None:
        shape = editor.add_constant("rows.shape", np.array([-1, columns.stop - columns.start]))
        result = editor.add_before(place, "Reshape", [result, shape], f"{moved.output[0]}.part")
    return editor.add_before(place, "Add", [result, *bias], f"{projection.last.output[0]}.part")


def _times(editor: GraphEditor, place: Any, value: str, factor: float) -> str:
    """Rows times a power of two, made as the rows are, so that the two have no node in common."""
    if factor == 1:
        return value
    source, hint = editor.producer(value), f"{value}.times"
    match None if source is None else source.op_type:
        case "Cast":
            inputs = [_times(editor, place, source.input[0], factor)]
        case "QuantizeLinear" | "DequantizeLinear":
            scale = _columns(editor, source.input[1], slice(None), factor)
            inputs = [_times(editor, place, source.input[0], factor), scale, *source.input[2:]]
        case "LayerNormalization":
            scaled = [_columns(editor, name, slice(None), factor) for name in source.input[1:]]
            inputs = [source.input[0], *scaled]
        case _:
            number = editor.add_constant("rows.factor", _scalar(editor, value, factor))
            return editor.add_before(place, "Mul", [value, number], hint)
    return editor.add_before(place, source.op_type, inputs, hint, **attributes_of(source))


def _columns(editor: GraphEditor, name: str, columns: slice, factor: float = 1.0) -> str:
    """A new weight: some of the last dimension of another, times a power of two."""
    values = editor.array(name)
    assert values is not None  # `Projection` holds names of weights
    part = values[..., columns] if values.ndim else values
    return editor.add_constant(f"{name}.part", part if factor == 1 else _scaled(part, factor))
