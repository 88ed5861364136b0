"""Where attention is in a graph of ours, and the products that make its query, key and value.

Found from what the nodes do with each other, not from their names: a softmax between two products
of two activations each, and the product with a weight from which each operand comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actionclip_deploy.runtimes.onnx_graphs import GraphEditor

_PRODUCTS = ("MatMul", "Gemm")
_MOVES = ("Reshape", "Transpose")
_CASTS = ("Cast",)


@dataclass(frozen=True, eq=False)
class Attention:
    """The middle of one attention: scores, softmax, and the mix of the values.

    Attributes:
        scores: The product of query and key.
        softmax: The node of the softmax.
        mix: The product of the softmax with the value.
        masked: The node that adds a mask to the scores; None where there is no mask.
    """

    scores: Any
    softmax: Any
    mix: Any
    masked: Any

    @property
    def query(self) -> str:
        """Shape (sequences, heads, queries, head width)."""
        return str(self.scores.input[0])

    @property
    def key(self) -> str:
        """Shape (sequences, heads, head width, length)."""
        return str(self.scores.input[1])

    @property
    def value(self) -> str:
        """Shape (sequences, heads, length, head width)."""
        return str(self.mix.input[1])


@dataclass(frozen=True, eq=False)
class Projection:
    """A product of rows with a weight, and the sum with its bias.

    Attributes:
        product: The node of the product.
        weight: Name of the weight, shape (inputs, outputs); integers where it is quantised.
        scale: Name of its scale, shape (outputs,); None where it is not quantised.
        zero: Name of its zero point; None where it is not quantised.
        bias: Name of the bias, shape (outputs,), or None.
        moved: A node between the product and the sum that moves no value, or None.
        last: The node that gives the result.
    """

    product: Any
    weight: str
    scale: str | None
    zero: str | None
    bias: str | None
    moved: Any
    last: Any


def find_attentions(editor: GraphEditor) -> tuple[Attention, ...]:
    """All attentions of a graph, in their order."""
    found = []
    for node in editor.nodes:
        attention = _attention_around(editor, node) if node.op_type == "Softmax" else None
        if attention is not None:
            found.append(attention)
    return tuple(found)


def is_product_of_activations(editor: GraphEditor, node: Any) -> bool:
    """Whether a node multiplies two matrices of which neither is a weight."""
    return node.op_type == "MatMul" and all(not _is_weight(editor, value) for value in node.input)


def find_packed(editor: GraphEditor, attention: Attention) -> tuple[Projection, Any] | None:
    """The product that makes several operands of an attention at once, and the node that cuts it.

    Returns:
        None where the value of the attention has a product to itself.
    """
    cut = _producer_behind(editor, attention.value, _MOVES)
    if cut is None or cut.op_type != "Split":
        return None
    projection = projection_of(editor, editor.producer(cut.input[0]))
    return None if projection is None else (projection, cut)


def find_query(editor: GraphEditor, attention: Attention) -> tuple[Projection, slice] | None:
    """The product that makes the query of an attention, and the query's part of its outputs."""
    query = _behind(editor, attention.query, _MOVES)
    node, columns = editor.producer(query), slice(None)
    if node is not None and node.op_type == "Split":
        # Query, key and value lie beside each other in the last dimension, in this order.
        width = editor.size(query, -1)
        if width is None or query != node.output[0]:
            return None
        columns = slice(0, width)
        node = editor.producer(node.input[0])
    projection = projection_of(editor, node)
    return None if projection is None else (projection, columns)


def projection_of(editor: GraphEditor, node: Any) -> Projection | None:
    """A product with a weight from the node that gives its result; None where it is none."""
    moved, bias, product = None, None, node
    if node is not None and node.op_type == "Add":
        bias = next((value for value in node.input if editor.array(value) is not None), None)
        product = editor.producer(next(value for value in node.input if value != bias))
        if product is not None and product.op_type == "Reshape":
            moved, product = product, editor.producer(product.input[0])
    if product is None or product.op_type not in _PRODUCTS:
        return None
    if len(product.input) > 2:
        bias = product.input[2]
    weight, scale, zero = str(product.input[1]), None, None
    source = editor.producer(weight)
    if source is not None and source.op_type == "DequantizeLinear":
        weight, scale, zero = (*source.input, None)[:3]
    if editor.array(weight) is None:
        return None
    return Projection(product, weight, scale, zero, bias, moved, node)


def _attention_around(editor: GraphEditor, softmax: Any) -> Attention | None:
    scores, masked = _producer_behind(editor, softmax.input[0], _CASTS), None
    if scores is not None and scores.op_type == "Add":
        masked = scores
        scores = _producer_behind(editor, masked.input[0], _CASTS)
    mix = _only_consumer(editor, softmax.output[0])
    if any(p is None or not is_product_of_activations(editor, p) for p in (scores, mix)):
        return None
    return Attention(scores, softmax, mix, masked)


def _only_consumer(editor: GraphEditor, value: str) -> Any:
    """The one node that takes a value, cast or not; None where there are several."""
    nodes = editor.consumers(value)
    while len(nodes) == 1 and nodes[0].op_type in _CASTS:
        nodes = editor.consumers(nodes[0].output[0])
    return nodes[0] if len(nodes) == 1 else None


def _behind(editor: GraphEditor, value: str, ops: tuple[str, ...]) -> str:
    """The value from which nodes of the given kinds, one after the other, make a value."""
    node = editor.producer(value)
    while node is not None and node.op_type in ops:
        value = node.input[0]
        node = editor.producer(value)
    return value


def _producer_behind(editor: GraphEditor, value: str, ops: tuple[str, ...]) -> Any:
    return editor.producer(_behind(editor, value, ops))


def _is_weight(editor: GraphEditor, value: str) -> bool:
    source = _behind(editor, value, (*_CASTS, *_MOVES, "DequantizeLinear"))
    return editor.array(source) is not None
