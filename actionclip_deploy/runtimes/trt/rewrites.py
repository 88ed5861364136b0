"""Other forms of a graph, to build from where an engine of the graph itself is wrong.

Each gives the same numbers to the rounding of its precision and asks the compiler for something
else. An engine of any of them is verified like every other, since what a version fuses is not
known beforehand.

What TensorRT for RTX 1.7.1 makes of them was read from its list of layers, for fp16 and the targets
SM86 and SM120. As exported, an attention is one kernel `_gemm_mha_v2`, and the one product of
query, key and value is cut into three and fused to one again. `fold_heads` and `scale_scores` give
other kernels of that name, `break_fusion` two products and a softmax, and `split_packed` three
products. The attention of the class token alone, which in a ViT-B/32 a subtraction leaves as one
kernel `_gemv_mha_v1`, needs its query twice for that. Other versions may do otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.onnx_graphs import (
    BF16,
    FP16,
    FP32,
    GraphEditor,
    array_of,
    attributes_of,
    numpy_dtype,
    read_model,
    takes_bf16,
    write_model,
)


@dataclass(frozen=True)
class Rewrite:
    """One other form of a graph."""

    name: str  # as reports and the records of engines have it
    edit: Callable[[GraphEditor], None]  # changes a graph; its docstring says how

    def apply(self, model: Any) -> Any:
        """Rewrite a graph.

        Args:
            model: An `onnx.ModelProto` with its weights; it is left as it is.

        Returns:
            A new one; None where there is nothing to rewrite.
        """
        editor = GraphEditor(model)
        self.edit(editor)
        return editor.finish()


def rewritten_model(bundle: Bundle, graph: GraphName, rewrite: str | None) -> Any:
    """The graph that an engine is built from, an `onnx.ModelProto`.

    Args:
        bundle: The bundle.
        graph: One of its graphs.
        rewrite: A name of `REWRITES`; None for the graph itself.

    Returns:
        None where the rewrite changes nothing.

    Raises:
        EngineError: If there is no such rewrite.
    """
    if rewrite not in (None, *REWRITES):
        raise EngineError(
            f"{rewrite!r} is not a rewrite of a graph; it must be one of {', '.join(REWRITES)}."
        )
    model = read_model(bundle.graph_path(graph))
    return model if rewrite is None else REWRITES[rewrite].apply(model)


@contextmanager
def graph_file(bundle: Bundle, graph: GraphName, rewrite: str | None) -> Iterator[Path]:
    """Path of the ONNX file to build from; a rewritten one is there for the block only.

    Raises:
        EngineError: If the rewrite does not change the graph.
    """
    if rewrite is None:
        yield bundle.graph_path(graph)
        return
    model = rewritten_model(bundle, graph, rewrite)
    if model is None:
        raise EngineError(f"The rewrite {rewrite} changes nothing in the {graph} graph.")
    with TemporaryDirectory(prefix="actionclip-") as folder:
        path = Path(folder) / bundle.manifest.graphs[graph].file
        write_model(model, path)
        yield path


# Attentions of a graph, found from what the nodes do with each other, not from their names: a
# softmax between two products of two activations each, and the product with a weight from which
# each operand comes.

_MOVES = ("Reshape", "Transpose")


@dataclass(frozen=True, eq=False)
class Attention:
    """The middle of one attention: scores, softmax, and the mix of the values."""

    scores: Any  # the product of query and key
    softmax: Any
    mix: Any  # the product of the softmax with the value
    masked: Any  # the node that adds a mask to the scores; None where there is no mask

    @property
    def query(self) -> str:
        """Shape (sequences, heads, queries, head width)."""
        return str(self.scores.input[0])

    @property
    def value(self) -> str:
        """Shape (sequences, heads, length, head width)."""
        return str(self.mix.input[1])


@dataclass(frozen=True, eq=False)
class Projection:
    """A product of rows with a weight, and the sum with its bias."""

    product: Any
    weight: str  # name of the weight, shape (inputs, outputs); integers where it is quantised
    scale: str | None  # name of its scale, shape (outputs,); None where it is not quantised
    zero: str | None  # name of its zero point; None where it is not quantised
    bias: str | None  # name of the bias, shape (outputs,), or None
    moved: Any  # a node between the product and the sum that moves no value, or None
    last: Any  # the node that gives the result


def _find_attentions(editor: GraphEditor) -> list[Attention]:
    """All attentions of a graph, in their order."""
    found = []
    for softmax in editor.nodes:
        if softmax.op_type != "Softmax":
            continue
        scores, masked = editor.producer(_behind(editor, softmax.input[0], ("Cast",))), None
        if scores is not None and scores.op_type == "Add":
            masked = scores
            scores = editor.producer(_behind(editor, masked.input[0], ("Cast",)))
        takers = editor.consumers(softmax.output[0])
        while len(takers) == 1 and takers[0].op_type == "Cast":
            takers = editor.consumers(takers[0].output[0])
        mix = takers[0] if len(takers) == 1 else None
        if _multiplies_activations(editor, scores) and _multiplies_activations(editor, mix):
            found.append(Attention(scores, softmax, mix, masked))
    return found


def _multiplies_activations(editor: GraphEditor, node: Any) -> bool:
    """Whether a node multiplies two matrices of which neither is a weight."""
    if node is None or node.op_type != "MatMul":
        return False
    ops = ("Cast", *_MOVES, "DequantizeLinear")
    return all(_behind(editor, value, ops) not in editor.weights for value in node.input)


def _projection_of(editor: GraphEditor, node: Any) -> Projection | None:
    """A product with a weight from the node that gives its result; None where it is none."""
    moved, bias, product = None, None, node
    if node is not None and node.op_type == "Add":
        bias = next((value for value in node.input if value in editor.weights), None)
        product = editor.producer(next(value for value in node.input if value != bias))
        if product is not None and product.op_type == "Reshape":
            moved, product = product, editor.producer(product.input[0])
    if product is None or product.op_type not in ("MatMul", "Gemm"):
        return None
    if len(product.input) > 2:
        bias = product.input[2]
    weight, scale, zero = str(product.input[1]), None, None
    source = editor.producer(weight)
    if source is not None and source.op_type == "DequantizeLinear":
        weight, scale, zero = (*source.input, None)[:3]
    if weight not in editor.weights:
        return None
    return Projection(product, weight, scale, zero, bias, moved, node)


def _behind(editor: GraphEditor, value: str, ops: tuple[str, ...]) -> str:
    """The value from which nodes of the given kinds, one after the other, make a value."""
    node = editor.producer(value)
    while node is not None and node.op_type in ops:
        value = node.input[0]
        node = editor.producer(value)
    return value


# What `scale_scores` takes out of the query's weights: the scale of a head width of 64, and, being
# a power of two, nothing that costs a digit anywhere.
_SCALE = 0.125

# What the rows of query, key and value are multiplied by, and their weights divided by, in
# `split_packed`: powers of two for the same reason, and small ones, so that no row overflows.
_ROW_FACTORS = (1.0, 0.5, 0.25)


def fold_heads(editor: GraphEditor) -> None:
    """Compute attention with sequences and heads in one dimension, in products of 3 dimensions."""
    for attention in _find_attentions(editor):
        scores, mix, masked = attention.scores, attention.mix, attention.masked
        query, value = attention.query, attention.value
        _, heads, _, head_width = editor.shape(value)
        if heads is None or head_width is None:
            continue
        queries, length = (query, 2), (value, 2)
        if masked is not None and len(editor.shape(masked.input[1])) > 2:
            # A mask for each sequence does not go with sequences and heads in one dimension.
            _reshape_output(editor, scores, -1, heads, queries, length)
            _reshape_input(editor, mix, 0, -1, queries, length)
        _reshape_input(editor, scores, 0, -1, queries, head_width)
        _reshape_input(editor, scores, 1, -1, head_width, length)
        _reshape_input(editor, mix, 1, -1, length, head_width)
        _reshape_output(editor, mix, -1, heads, queries, head_width)


_Size = int | tuple[str, int]  # a size, or the value and the axis that has it


def _reshape_input(editor: GraphEditor, node: Any, slot: int, *sizes: _Size) -> None:
    shape = _shape(editor, node, sizes)
    reshaped = editor.add_before(node, "Reshape", [node.input[slot], shape], "folded")
    editor.set_input(node, slot, reshaped)


def _reshape_output(editor: GraphEditor, node: Any, *sizes: _Size) -> None:
    shape = _shape(editor, node, sizes)
    editor.add_after(node, "Reshape", shape, hint=f"{node.output[0]}.folded")


def _shape(editor: GraphEditor, node: Any, sizes: Sequence[_Size]) -> str:
    """A shape for a reshape next to a node; the graph computes what is not known."""
    known = [editor.shape(s[0])[s[1]] if isinstance(s, tuple) else s for s in sizes]
    if None not in known:
        return editor.add_constant("folded.shape", np.array(known, np.int64))
    parts = []
    for size in sizes:
        if isinstance(size, tuple):
            value, axis = size
            span = {"start": axis, "end": axis + 1}
            parts.append(editor.add_before(node, "Shape", [value], "folded.size", **span))
        else:
            parts.append(editor.add_constant("folded.size", np.array([size], np.int64)))
    return editor.add_before(node, "Concat", parts, "folded.shape", axis=0)


def scale_scores(editor: GraphEditor) -> None:
    """Scale the scores after the product of query and key, and not the query's weights."""
    for attention in _find_attentions(editor):
        query = _behind(editor, attention.query, _MOVES)
        node, columns = editor.producer(query), slice(None)
        if node is not None and node.op_type == "Split":
            # Query, key and value lie beside each other in the last dimension, in this order.
            width = editor.shape(query)[-1]
            if width is None or query != node.output[0]:
                continue
            columns = slice(0, width)
            node = editor.producer(node.input[0])
        projection = _projection_of(editor, node)
        if projection is None:
            continue
        _multiply_outputs(editor, projection, columns, 1 / _SCALE)
        taker = attention.masked or attention.softmax
        scores = taker.input[0]
        scale = editor.add_constant(f"{scores}.scale", _scalar(editor, scores, _SCALE))
        editor.set_input(taker, 0, editor.add_before(taker, "Mul", [scores, scale], f"{scores}.x"))


def break_fusion(editor: GraphEditor) -> None:
    """Keep the products and the softmax of an attention apart; no result of it changes.

    The largest score of a query is subtracted before the softmax, and a query that is the only one
    of its sequence comes twice, of which the first result is used.

    Source:
        tier4/autoware-ml#95: TensorRT makes no single kernel of an attention with a subtraction.
        NVIDIA/TensorRT#4837: separate kernels are right where the single one is wrong.
    """
    for attention in _find_attentions(editor):
        softmax = attention.softmax
        scores = softmax.input[0]
        axis = editor.add_constant(f"{scores}.axis", np.array([-1], np.int64))
        largest = editor.add_before(softmax, "ReduceMax", [scores, axis], f"{scores}.largest")
        shifted = editor.add_before(softmax, "Sub", [scores, largest], f"{scores}.shifted")
        editor.set_input(softmax, 0, shifted)
        if editor.shape(attention.query)[2] == 1:
            _double_query(editor, attention)


def _double_query(editor: GraphEditor, attention: Attention) -> None:
    """Let the only query of each sequence come twice, and use the first result.

    Products with one row become kernels of their own kind, which take a subtraction in.
    """
    scores, mix, query = attention.scores, attention.mix, attention.query
    twice = editor.add_before(scores, "Concat", [query, query], f"{query}.twice", axis=2)
    editor.set_input(scores, 0, twice)
    start, end, axis = (editor.add_constant("first", np.array([n], np.int64)) for n in (0, 1, 2))
    editor.add_after(mix, "Slice", start, end, axis, hint=f"{mix.output[0]}.twice")


def split_packed(editor: GraphEditor) -> None:
    """Compute query, key and value by a product each, of rows that no two of them share.

    Compilers make one product of several that have the same rows. Here the rows are multiplied by
    1, 1/2 and 1/4 and the weights by 1, 2 and 4.

    Source:
        NVIDIA/TensorRT-Edge-LLM#151: TensorRT 10.13.3 fuses them, and wrongly at a batch of 1.
    """
    for attention in _find_attentions(editor):
        cut = editor.producer(_behind(editor, attention.value, _MOVES))
        if cut is None or cut.op_type != "Split":
            continue
        projection = _projection_of(editor, editor.producer(cut.input[0]))
        if projection is None:
            continue
        end = 0
        for output, factor in zip(cut.output, _ROW_FACTORS, strict=False):
            width = editor.shape(output)[-1]
            assert width is not None  # a part of a weight
            begin, end = end, end + width
            part = _part(editor, cut, projection, slice(begin, end), factor)
            editor.replace_uses(output, part)


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
        values = array_of(editor.weights[node.input[slot]]).copy()
        values[..., columns] = _scaled(values[..., columns], factor)
        editor.set_input(node, slot, editor.add_constant(f"{node.input[slot]}.scaled", values))


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
    values = array_of(editor.weights[name])
    part = values[..., columns] if values.ndim else values
    return editor.add_constant(f"{name}.part", part if factor == 1 else _scaled(part, factor))


# Rewrites that compute parts of a graph in another precision.

# Sums over many values, which overflow fp16 or lose digits in it, and what scales by them.
_NORMALISERS = frozenset({"LayerNormalization", "Softmax"})
_BEHIND_REDUCTION = frozenset({"Clip", "Max", "Sqrt", "Div"})

# QuickGELU is x sigmoid(1.702 x), GELU x (1 + erf(x / sqrt(2))) / 2.
_CURVES = frozenset({"Sigmoid", "Erf", "Tanh", "Gelu"})
_ELEMENTWISE = _CURVES | {"Mul", "Add", "Sub", "Div"}


def fp32_islands(editor: GraphEditor) -> None:
    """Compute LayerNorm, softmax and other sums over many values in fp32.

    The exporter of this version has them in fp32 already.
    """
    _compute_in_fp32(editor, _sums(editor))


def fp32_attention(editor: GraphEditor) -> None:
    """Compute products of two activations and activation functions in fp32 as well.

    The products with weights, which are nearly all of the arithmetic, keep their precision.
    """
    products = [node for node in editor.nodes if _multiplies_activations(editor, node)]
    _compute_in_fp32(editor, [*_sums(editor), *products, *_activation_functions(editor)])


def to_bf16(editor: GraphEditor) -> None:
    """Compute all that is fp16 in bf16: the range of fp32, and 8 binary digits in place of 11.

    Nothing is changed where an operator that takes fp16 does not take bf16 in the graph's opset, as
    the convolutions of a ResNet before opset 22.
    """
    halves = [n for n in editor.nodes if any(editor.is_half(v) for v in (*n.input, *n.output))]
    if not all(takes_bf16(node.op_type, editor.opset) for node in halves):
        return
    for name, tensor in list(editor.weights.items()):
        if tensor.data_type == FP16:
            values = array_of(tensor).astype(np.float32)
            editor.set_weight(name, values.astype(numpy_dtype(BF16)))
    for node in editor.nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FP16:
                attribute.i = BF16
                editor.changed = True


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


def _compute_in_fp32(editor: GraphEditor, nodes: Iterable[Any]) -> None:
    """Let nodes that take fp16 or bf16 take and give fp32, with casts around them.

    There is none between two of them, nor next to a cast to or from fp32.
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
            old = node.output[0]
            half = editor.element_type(old)
            given[old] = editor.add_after(node, "Cast", hint=f"{old}.fp32", to=half)
            _skip_casts(editor, old, given[old])


def _as_fp32(editor: GraphEditor, node: Any, value: str) -> str:
    """A value or weight of the graph in fp32, for a node."""
    source = editor.producer(value)
    if value in editor.weights:
        values = array_of(editor.weights[value]).astype(np.float32)
        return editor.add_constant(f"{value}.fp32", values)
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
        editor.replace_uses(result, new)


# In the order in which a repair tries them.
REWRITES: dict[str, Rewrite] = {
    name: Rewrite(name, edit)
    for name, edit in (
        ("fp32-islands", fp32_islands),
        ("fp32-attention", fp32_attention),
        ("attention-form", fold_heads),
        ("attention-scaled", scale_scores),
        ("broken-fusion", break_fusion),
        ("split-qkv", split_packed),
        ("bf16", to_bf16),
    )
}
