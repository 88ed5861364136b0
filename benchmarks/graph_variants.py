"""The visual graph with one rewrite undone, or one more tried, for bench_graphs.py to measure.

Each variant computes what the bundle's visual graph computes. `ours` is that graph; the others
differ from it in the one thing that their name says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.export import layers
from actionclip_deploy.export import layers as visual_towers
from actionclip_deploy.export.graphs import VisualGraph
from actionclip_deploy.export.layers import PixelStatistics, VitTower
from actionclip_deploy.model import ActionClipNetwork

Build = Callable[[ActionClipNetwork, PixelStatistics], nn.Module]


def _ours(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    return VisualGraph(model, pixels, torch.float32)


def _tower(graph: nn.Module) -> VitTower:
    return cast(VitTower, graph.tower)


class _Normalised(nn.Module):
    """Normalises pixels in the graph and takes weights that were not folded."""

    def __init__(self, folded: visual_towers.PatchEmbedding, pixels: PixelStatistics) -> None:
        super().__init__()
        mean, std = (value.view(3) for value in pixels.tensors())
        side = folded.patch * folded.patch
        scale = (255.0 * std).repeat(side)[:, None]
        self.weight = layers.constant(folded.weight.double() * scale)
        self.mean, self.std = layers.constant(mean), layers.constant(std)
        self.patch, self.grid, self.width = folded.patch, folded.grid, folded.width

    def forward(self, frames: Tensor) -> Tensor:
        """As `PatchEmbedding`, without a bias left over."""
        levels = (frames.float() / 255.0 - self.mean) / self.std
        side = self.patch * 3
        strips = levels.view(-1, self.grid, self.patch, self.grid, side)
        patches = strips.permute(0, 1, 3, 2, 4).contiguous().view(-1, self.patch * side)
        return patches @ self.weight


def _normalised_in_the_graph(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _ours(model, pixels)
    tower = _tower(graph)
    table = tower.table.detach().double()
    table[1:] -= tower.embedding.bias
    tower.table = layers.constant(table)
    tower.embedding = cast(Any, _Normalised(tower.embedding, pixels))
    return graph


class _WholeBlock(nn.Module):
    """The last block for all tokens, of which the class token is taken afterwards."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.block = layers.Block(source, torch.float32)

    def forward(self, rows: Tensor, length: int, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """As `PooledBlock`."""
        return pick(self.block(rows, length))


def _whole_last_block(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _ours(model, pixels)
    visual: Any = model.towers.visual
    _tower(graph).last_block = cast(Any, _WholeBlock(visual.transformer.resblocks[-1]))
    return graph


class _Separate(nn.Module):
    """Three products in the place of one."""

    def __init__(self, packed: layers.Affine) -> None:
        super().__init__()
        weights = packed.weight.chunk(3, dim=1)
        biases = packed.bias.chunk(3) if hasattr(packed, "bias") else (None, None, None)
        self.weights = nn.ParameterList(layers.constant(weight) for weight in weights)
        self.biases = [None if bias is None else layers.constant(bias) for bias in biases]

    def forward(self, rows: Tensor) -> _Parts:
        """Queries, keys and values, as `split` would give them."""
        return _Parts(
            [
                rows @ weight if bias is None else torch.addmm(bias, rows, weight)
                for weight, bias in zip(self.weights, self.biases, strict=True)
            ]
        )


class _Parts:
    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts

    def split(self, *_: Any, **__: Any) -> list[Tensor]:
        return self._parts


def _separate_products(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _ours(model, pixels)
    for block in _blocks(graph):
        block.attention.in_projection = _Separate(block.attention.in_projection)
    return graph


class _Unscaled(nn.Module):
    """Queries that are scaled after their product."""

    def __init__(self, packed: layers.Affine, heads: int) -> None:
        super().__init__()
        self.width = packed.weight.shape[0]
        self.scale = 1.0 / math.sqrt(self.width // heads)
        factors = torch.ones(3 * self.width)
        factors[: self.width] /= self.scale
        self.affine = layers.Affine(
            (packed.weight * factors).t(), packed.bias * factors, torch.float32
        )

    def forward(self, rows: Tensor) -> _Parts:
        """Queries, keys and values."""
        query, key, value = self.affine(rows).split(self.width, dim=-1)
        return _Parts([query * self.scale, key, value])


def _scaled_in_the_graph(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _ours(model, pixels)
    for block in _blocks(graph):
        attention = block.attention
        attention.in_projection = _Unscaled(attention.in_projection, attention.num_heads)
    return graph


def _folded_norms(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    """Scale and shift of each LayerNorm moved into the product that follows."""
    graph = _ours(model, pixels)
    tower = _tower(graph)
    for block in (*_blocks(graph), tower.last_block):
        last = block is tower.last_block
        projections = (
            [block.attention.query, block.attention.key_and_value]
            if last
            else [block.attention.in_projection]
        )
        _fold(block.norm_1, projections)
        _fold(block.norm_2, [block.mlp.up])
    return graph


def _fold(norm: layers.Norm, products: list[Any]) -> None:
    scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
    for product in products:
        weight = product.weight.detach().double()
        product.bias = layers.constant(product.bias.double() + shift @ weight)
        product.weight = layers.constant(weight * scale[:, None])
    norm.weight = layers.constant(torch.ones_like(scale))
    norm.bias = layers.constant(torch.zeros_like(shift))


class _Product(nn.Module):
    """Rows times a matrix that holds the bias as well, for rows that sum to their length."""

    def __init__(self, norm: layers.Norm, affine: layers.Affine) -> None:
        super().__init__()
        scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
        weight = affine.weight.detach().double()
        bias = affine.bias.detach().double() + shift @ weight
        weight = weight * scale[:, None]
        self.weight = layers.constant(weight + (bias - weight.sum(0)) / len(weight))

    def forward(self, rows: Tensor) -> Tensor:
        """As `Affine`."""
        return rows @ self.weight


def _biases_in_the_weights(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    """Products without a bias: normalised rows have mean 0, and the LayerNorm adds 1 to them."""
    graph = _ours(model, pixels)
    tower = _tower(graph)
    for block in _blocks(graph):
        for norm, owner, name in (
            (block.norm_1, block.attention, "in_projection"),
            (block.norm_2, block.mlp, "up"),
        ):
            setattr(owner, name, _Product(norm, getattr(owner, name)))
    last: Any = tower.last_block
    last.attention.key_and_value = _Product(last.norm_1, last.attention.key_and_value)
    last.attention.query = _Product(last.norm_1, last.attention.query)
    last.mlp.up = _Product(last.norm_2, last.mlp.up)
    for block in (*_blocks(graph), last):
        for norm in (block.norm_1, block.norm_2):
            norm.weight = layers.constant(torch.ones_like(norm.weight))
            norm.bias = layers.constant(torch.ones_like(norm.bias))
    return graph


def _apart_without_biases(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _biases_in_the_weights(model, pixels)
    for block in _blocks(graph):
        block.attention.in_projection = _Separate(block.attention.in_projection)
    return graph


class _AddingBlock(nn.Module):
    """A block of which the residual is the matrix that a product adds to."""

    def __init__(self, block: layers.Block) -> None:
        super().__init__()
        self.block = block
        self.out, self.down = block.attention.out_projection, block.mlp.down
        block.attention.out_projection = cast(Any, nn.Identity())
        block.mlp.down = cast(Any, nn.Identity())

    def forward(self, rows: Tensor, length: int) -> Tensor:
        """As `Block`."""
        block = self.block
        mixed = block.attention(block.norm_1(rows), length)
        rows = torch.addmm(rows, mixed, self.out.weight) + self.out.bias
        hidden = block.mlp(block.norm_2(rows))
        return torch.addmm(rows, hidden, self.down.weight) + self.down.bias


def _residual_in_the_product(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
    graph = _ours(model, pixels)
    tower = _tower(graph)
    tower.blocks = nn.ModuleList(_AddingBlock(cast(layers.Block, b)) for b in tower.blocks)
    return graph


class _FusedAttention(nn.Module):
    """Attention as one operator: ONNX's own (opset 23), or ONNX Runtime's."""

    def __init__(self, source: layers.Attention, *, contributed: bool) -> None:
        super().__init__()
        self.source = source
        self.contributed = contributed

    def forward(self, rows: Tensor, length: int, _: None = None) -> Tensor:
        """As `Attention`."""
        heads, width = self.source.num_heads, self.source.width
        parts = self.source.in_projection(rows).split(width, dim=-1)
        if self.contributed:
            query, key, value = (part.view(-1, length, width) for part in parts)
            mixed = torch.onnx.ops.symbolic(
                "com.microsoft::MultiHeadAttention",
                (query, key, value),
                {"num_heads": heads, "scale": 1.0},
                dtype=torch.float32,
                shape=query.shape,
                version=1,
            ).view(-1, width)
        else:
            shape = (-1, length, heads, width // heads)
            query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
            mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
            mixed = mixed.transpose(1, 2).contiguous().view(-1, width)
        output: Tensor = self.source.out_projection(mixed)
        return output


def _one_operator(*, contributed: bool) -> Build:
    def build(model: ActionClipNetwork, pixels: PixelStatistics) -> nn.Module:
        graph = _ours(model, pixels)
        for block in _blocks(graph):
            block.attention = _FusedAttention(block.attention, contributed=contributed)
        return graph

    return build


def _blocks(graph: nn.Module) -> Iterator[Any]:
    return iter(_tower(graph).blocks)


VARIANTS: dict[str, Build] = {
    "ours": _ours,
    "normalisation not folded": _normalised_in_the_graph,
    "whole last block": _whole_last_block,
    "query, key and value apart": _separate_products,
    "query scaled in the graph": _scaled_in_the_graph,
    "LayerNorm folded": _folded_norms,
    "biases in the weights": _biases_in_the_weights,
    "biases in the weights, query, key and value apart": _apart_without_biases,
    "residual added by the product": _residual_in_the_product,
    "Attention of opset 23": _one_operator(contributed=False),
    "MultiHeadAttention of ONNX Runtime": _one_operator(contributed=True),
}
OPSETS = {"Attention of opset 23": 23}


@contextmanager
def opset_of(variant: str) -> Iterator[None]:
    """Export with the opset that a variant needs."""
    from actionclip_deploy.export import onnx_files

    before = onnx_files.OPSET
    onnx_files.OPSET = OPSETS.get(variant, before)
    try:
        yield
    finally:
        onnx_files.OPSET = before
