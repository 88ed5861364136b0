"""Where a graph of a bundle can be cut in two: behind its embedding and behind each block.

The parts are known by the names of the weights that they multiply with, and the cuts from the
structure: a value through which all goes that the part gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.onnx_graphs import FP32, GraphEditor, cast_node, declare, rebuild

# Blocks of a ViT, of a text encoder and of `transf`; layers of `transf_cls`; stages of a ResNet.
_BLOCK = re.compile(r"(?:^|\.)((?:blocks|layers|body)\.\d+|last_block|last_layer)\.")

# Operators that multiply with a weight, and which of their inputs it is.
_WEIGHT_SLOTS = {
    "MatMul": 1,
    "Gemm": 1,
    "Conv": 1,
    "MatMulInteger": 1,
    "LSTM": 1,
    "Gather": 0,  # rows of a table
}


@dataclass(frozen=True)
class Boundary:
    """The end of one part of a graph.

    Attributes:
        part: Its name: `patch_embedding` or `token_embedding`, each block as its weights have it
            (`blocks.0`, `last_block`), and `projection`, or `head` in a temporal graph, for what
            comes behind the last block.
        value: What the part gives, a value of the graph.
    """

    part: str
    value: str


@dataclass(frozen=True, eq=False)
class _Product:
    place: int
    node: Any
    block: str | None


def find_boundaries(model: Any) -> tuple[Boundary, ...]:
    """Cut a graph into its parts.

    Args:
        model: A graph of a bundle or a rewrite of it, an `onnx.ModelProto`.

    Returns:
        The end of each part, in the order in which they are computed; the last is the end of the
        graph. A graph without blocks is one part.

    Raises:
        EngineError: If a block gives more than one value, as none of our exporter does.
    """
    graph = GraphEditor(model)
    parts = _parts(graph)
    temporal = model.graph.input[0].name == "frame_features"
    boundaries = []
    for place, products in enumerate(parts[:-1]):
        value = _end_of(graph, products, parts[place + 1])
        boundaries.append(Boundary(_name_of(products), value))
    last = "head" if temporal else "projection"
    return (*boundaries, Boundary(last, model.graph.output[0].name))


def head_until(model: Any, boundary: Boundary) -> Any:
    """The graph up to the end of a part.

    Args:
        model: The graph, an `onnx.ModelProto` with its weights.
        boundary: One of `find_boundaries`.

    Returns:
        A new one with the inputs of the graph; its output is the value, in fp32.
    """
    return _cut(model, None, boundary)


def part_between(model: Any, before: Boundary | None, after: Boundary) -> Any:
    """The parts between two boundaries by themselves.

    Args:
        model: The graph, an `onnx.ModelProto` with its weights.
        before: Where they begin, one of `find_boundaries`; None for the beginning of the graph.
        after: Where they end, a later one.

    Returns:
        A new one. Its first input is the value at `before` in fp32, named `input_name(before)`;
        further ones are the inputs of the graph, of those that the parts look at: the text's
        tokens for its length, its mask and its end, clips for T. Its output is the value at
        `after`, in fp32.
    """
    return _cut(model, before, after)


def input_name(before: Boundary) -> str:
    """Name of the input of `part_between` for the value at a boundary."""
    return f"{before.value}.in"


def _parts(graph: GraphEditor) -> list[list[_Product]]:
    """Products with weights in groups: what is before the blocks, each block, the rest.

    The rest may hold no product, and without blocks it is all there is.
    """
    products = [
        _Product(place, node, block)
        for place, node in enumerate(graph.nodes)
        for weight in (_weight_of(graph, node),)
        if weight is not None
        for block in (_block_of(weight),)
    ]
    names = list(dict.fromkeys(p.block for p in products if p.block is not None))
    if not names:
        return [products]
    blocks = [[p for p in products if p.block == name] for name in names]
    first, last = blocks[0][0].place, blocks[-1][-1].place
    others = [p for p in products if p.block is None]
    embedding = [p for p in others if p.place < first]
    rest = [p for p in others if p.place > last]
    return [*([embedding] if embedding else []), *blocks, rest]


def _weight_of(graph: GraphEditor, node: Any) -> str | None:
    """Name of the weight that a node multiplies with; None where there is none."""
    slot = _WEIGHT_SLOTS.get(node.op_type)
    if slot is None:
        return None
    name = str(node.input[slot])
    source = graph.producer(name)
    while source is not None and source.op_type in ("Cast", "DequantizeLinear"):
        name = str(source.input[0])
        source = graph.producer(name)
    tensor = graph.weights.get(name)
    return name if tensor is not None and len(tensor.dims) > 1 else None


def _block_of(name: str) -> str | None:
    found = _BLOCK.search(name)
    return found[1] if found else None


def _name_of(products: Sequence[_Product]) -> str:
    if products[0].block is not None:
        return products[0].block
    return "token_embedding" if products[0].node.op_type == "Gather" else "patch_embedding"


def _end_of(graph: GraphEditor, part: Sequence[_Product], following: Sequence[_Product]) -> str:
    """The value behind the last product of a part through which all goes that it gives."""
    last = part[-1]
    end = following[0].place if following else len(graph.nodes)
    narrow = _narrow_values(graph, last.place, end)
    if not narrow:
        raise EngineError(
            f"{_name_of(part)} of this graph gives more than one value, so the graph cannot be cut "
            "behind it; export the bundle again with this version."
        )
    own = [node.op_type in ("Add", "Relu") or _is_norm_of(node, last.block) for node in narrow]
    if last.block is None:
        # Positions are added to an embedding, which a norm may follow.
        place = max((place for place, mine in enumerate(own) if mine), default=len(narrow) - 1)
        return str(narrow[place].output[0])
    sums = (place for place, node in enumerate(narrow) if _is_residual_sum(graph, node))
    place = next(sums, own.index(True) if True in own else 0)
    # A ReLU or the norm of a post-norm layer follows at once.
    while place + 1 < len(narrow) and narrow[place + 1].op_type != "Add" and own[place + 1]:
        place += 1
    return str(narrow[place].output[0])


def _narrow_values(graph: GraphEditor, start: int, end: int) -> list[Any]:
    """Nodes from `start` to before `end` whose result is all that is left of the first one's.

    Going through the nodes in their order, such a result is the only one that is still to be used.
    """
    still_used: dict[str, int] = {}
    narrow = []
    for place in range(start, end):
        node = graph.nodes[place]
        taken = [value for value in dict.fromkeys(node.input) if value in still_used]
        if not taken and place != start:
            continue  # has nothing of the first node in it
        for value in taken:
            still_used[value] -= 1
            if not still_used[value]:
                del still_used[value]
        for value in node.output:
            uses = len(graph.consumers(value)) + graph.is_output(value)
            if uses:
                still_used[value] = uses
        if list(still_used) == [node.output[0]]:
            narrow.append(node)
    return narrow


def _is_residual_sum(graph: GraphEditor, node: Any) -> bool:
    """Whether a node adds two values, of which neither is a weight such as a bias."""
    return node.op_type == "Add" and not any(value in graph.weights for value in node.input)


def _is_norm_of(node: Any, block: str | None) -> bool:
    """Whether a node is a LayerNorm that belongs to a block, or to none."""
    if node.op_type != "LayerNormalization":
        return False
    # Weights that are equal, as the ones of a new model, have the name of the first of them.
    blocks = {_block_of(name) for name in node.input[1:]}
    return block in blocks if block is not None else blocks == {None}


def _cut(model: Any, before: Boundary | None, after: Boundary) -> Any:
    graph = GraphEditor(model)
    nodes, inputs = list(graph.nodes), list(model.graph.input)
    if before is not None:
        name, value = input_name(before), before.value
        element_type = graph.element_type(value) or FP32
        inputs.insert(0, declare(name, FP32, graph.shape(value)))
        nodes = [node for node in nodes if value not in node.output]
        nodes.insert(0, cast_node(name, value, element_type))
    outputs = list(model.graph.output)
    if after.value not in {output.name for output in outputs}:
        name = f"{after.value}.out"
        nodes.append(cast_node(after.value, name, FP32))
        outputs = [declare(name, FP32, graph.shape(after.value))]
    part = rebuild(model, nodes, graph.weights, inputs, outputs)
    used = {value for node in part.graph.node for value in node.input}
    kept = [value for value in part.graph.input if value.name in used]
    del part.graph.input[:]
    part.graph.input.extend(kept)
    return part
