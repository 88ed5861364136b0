"""Layers of the deployable graphs: the model's own weights, laid out for a runtime.

Tokens travel as rows, shape (sequences * length, width): a product with a weight is then one
`Gemm` with its bias, and every reshape has a constant shape wherever the length is constant. The
residual stream, LayerNorm and softmax are fp32 in every precision; only the products and what
lies between two of them are not. `dtype` is always what the products are computed in.

The towers take raw uint8 frames and give features. The heads, one for each visual prompt, map
features (B, T, D), fp32, to features (B, D), fp32, neither normalised; T may be free except for
`transf_cls`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.model.network import SHIFT_FOLDS

if TYPE_CHECKING:
    from collections.abc import Callable


# Added to the scores of tokens that may not be seen. Its exponential is zero in every precision,
# and unlike -inf it is a number of fp16 and gives no NaN in a row that is masked throughout.
MASKED = -1e4
_MAX_LEVEL = 255.0  # of a pixel


def constant(values: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Make weights of a graph from values, contiguous and without gradient."""
    return nn.Parameter(values.detach().to(dtype).contiguous(), requires_grad=False)


def normalise(vectors: Tensor) -> Tensor:
    """Scale vectors, shape (rows, D), to unit norm; zeros stay zeros."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.clamp_min(1e-12)


def as_convolution(weight: Tensor) -> Tensor:
    """A matrix (outputs, inputs) as the kernel of a convolution over a single pixel."""
    return weight[:, :, None, None]


def convolve_rows(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows (rows, inputs) with a kernel of `as_convolution`, in fp32.

    For the products that stay fp32 in an fp16 graph: TensorRT for RTX 1.7 has no fp32 matrix
    products for GPUs of compute capability 7.5, and refuses a graph for a single one, but it has
    fp32 convolutions.
    """
    return F.conv2d(rows[:, :, None, None], kernel, bias).view(-1, kernel.shape[0])


class Norm(nn.Module):
    """A LayerNorm in fp32, whatever it is given."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = constant(source.weight)
        self.bias = constant(source.bias)
        self.eps = source.eps

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows, shape (rows, width); fp32."""
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


class Affine(nn.Module):
    """Rows times a matrix plus a bias, in the precision of its weights.

    The matrix is stored as (inputs, outputs): as (outputs, inputs) the graph would hold a
    transpose, which each session computes again when it loads.

    Args:
        weight: Shape (outputs, inputs), as torch stores it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = constant(weight.t(), dtype)
        self.bias = constant(bias, dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs) to (rows, outputs)."""
        return torch.addmm(self.bias, rows.to(self.weight.dtype), self.weight)


def _affine(source: nn.Linear, dtype: torch.dtype) -> Affine:
    return Affine(source.weight, source.bias, dtype)


class ConvolvedAffine(nn.Module):
    """As `Affine` in fp32, for an fp16 graph; see `convolve_rows`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = constant(as_convolution(weight))
        self.bias = constant(bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs) to (rows, outputs)."""
        return convolve_rows(rows.float(), self.weight, self.bias)


class LastProjection(nn.Module):
    """The last product of a tower, without bias and always in fp32.

    Args:
        matrix: Shape (inputs, outputs), as CLIP stores it.
        dtype: What the tower's other products are computed in; in an fp16 graph this one becomes
            a convolution, see `convolve_rows`.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolved = dtype != torch.float32
        self.weight = constant(as_convolution(matrix.t()) if self.convolved else matrix)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs), fp32, to (rows, outputs)."""
        if self.convolved:
            return convolve_rows(rows, self.weight)
        output: Tensor = rows @ self.weight
        return output


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as plain products, which every exporter and runtime computes alike.

    Args:
        query: Scaled already, shape (sequences, heads, queries, head width).
        key: Shape (sequences, heads, head width, length).
        value: Shape (sequences, heads, length, head width).
        mask: Added to the scores, broadcastable to (sequences, heads, queries, length).

    Returns:
        Rows, shape (sequences * queries, width).
    """
    scores = (query @ key).float()
    if mask is not None:
        scores = scores + mask
    mixed = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    heads, head_width = value.shape[1], value.shape[3]
    return mixed.transpose(1, 2).contiguous().view(-1, heads * head_width)


def _scaled_in_projection(source: Any) -> tuple[Tensor, Tensor]:
    """Weight (3 * width, width) and bias of an attention, the query's part scaled."""
    weight, bias = source.in_proj_weight.detach().clone(), source.in_proj_bias.detach().clone()
    width = weight.shape[1]
    scale = (width // source.num_heads) ** -0.5
    weight[:width] *= scale
    bias[:width] *= scale
    return weight, bias


class Attention(nn.Module):
    """Self-attention with one product for query, key and value; the scale is in its weights.

    Args:
        source: Has `in_proj_weight`, `in_proj_bias`, `out_proj` and `num_heads`.
    """

    def __init__(self, source: nn.MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.width = source.embed_dim
        weight, bias = _scaled_in_projection(source)
        self.in_projection = Affine(weight, bias, dtype)
        self.out_projection = _affine(source.out_proj, dtype)

    def forward(self, rows: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
        """Mix rows (sequences * length, width) within each sequence; the same shape."""
        head_width = self.width // self.num_heads
        shape = (-1, length, self.num_heads, head_width)
        query, key, value = self.in_projection(rows).split(self.width, dim=-1)
        mixed = _attend(
            query.view(shape).transpose(1, 2),
            key.view(shape).permute(0, 2, 3, 1),
            value.view(shape).transpose(1, 2),
            mask,
        )
        output: Tensor = self.out_projection(mixed)
        return output


class PooledAttention(nn.Module):
    """Attention of one query per sequence to all of its tokens.

    Args:
        fp32_output: Whether the last product is computed in fp32 whatever the others are.
    """

    def __init__(self, source: Any, dtype: torch.dtype, *, fp32_output: bool = False) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.width = source.in_proj_weight.shape[1]
        weight, bias = _scaled_in_projection(source)
        self.query = Affine(weight[: self.width], bias[: self.width], dtype)
        self.key_and_value = Affine(weight[self.width :], bias[self.width :], dtype)
        out = source.out_proj
        convolved = fp32_output and dtype != torch.float32
        self.out_projection: nn.Module = (
            ConvolvedAffine(out.weight, out.bias) if convolved else _affine(out, dtype)
        )

    def forward(
        self, queries: Tensor, rows: Tensor, length: int, mask: Tensor | None = None
    ) -> Tensor:
        """Mix rows (sequences * length, width) for queries (sequences, width); (sequences, ...)."""
        head_width = self.width // self.num_heads
        shape = (-1, length, self.num_heads, head_width)
        key, value = self.key_and_value(rows).split(self.width, dim=-1)
        mixed = _attend(
            self.query(queries).view(-1, self.num_heads, 1, head_width),
            key.view(shape).permute(0, 2, 3, 1),
            value.view(shape).transpose(1, 2),
            mask,
        )
        output: Tensor = self.out_projection(mixed)
        return output


class Mlp(nn.Module):
    """Two products with an activation in between."""

    def __init__(
        self, up: nn.Linear, activation: nn.Module, down: nn.Linear, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.up = _affine(up, dtype)
        self.activation = activation
        self.down = _affine(down, dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, width) to the same shape."""
        output: Tensor = self.down(self.activation(self.up(rows)))
        return output


class _PreNormBlock(nn.Module):
    """The parts of open_clip's `ResidualAttentionBlock`."""

    def __init__(self, source: Any, attention: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.ln_1), Norm(source.ln_2)
        self.attention = attention
        self.mlp = Mlp(source.mlp.c_fc, source.mlp.gelu, source.mlp.c_proj, dtype)


class Block(_PreNormBlock):
    """A pre-norm transformer block."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__(source, Attention(source.attn, dtype), dtype)

    def forward(self, rows: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
        """Map rows (sequences * length, width), fp32, to the same shape."""
        mixed: Tensor = self.attention(self.norm_1(rows), length, mask)
        rows = rows + mixed.float()
        output: Tensor = self.mlp(self.norm_2(rows))
        return rows + output.float()


class PooledBlock(_PreNormBlock):
    """The last pre-norm block of a tower, for the one token of each sequence that is used.

    Its keys and values come from all tokens; query, projection and MLP run for one.
    """

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__(source, PooledAttention(source.attn, dtype), dtype)

    def forward(
        self,
        rows: Tensor,
        length: int,
        pick: Callable[[Tensor], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map rows (sequences * length, width), fp32, to one row per sequence.

        `pick` takes the token of each sequence from rows, (sequences, width).
        """
        normed = self.norm_1(rows)
        mixed: Tensor = self.attention(pick(normed), normed, length, mask)
        picked = pick(rows) + mixed.float()
        output: Tensor = self.mlp(self.norm_2(picked))
        return picked + output.float()


@dataclass(frozen=True)
class PixelStatistics:
    """What the tower's pixels are normalised by: of red, green and blue in 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp64, shape (1, 3, 1, 1)."""
        mean, std = torch.tensor((self.mean, self.std), dtype=torch.float64).view(2, 1, 3, 1, 1)
        return mean, std


class PatchEmbedding(nn.Module):
    """Patches of raw frames times the first convolution, the normalisation folded into both.

    The bias that the folding leaves is not added here; `bias` goes into the position table.

    In fp16 the levels are moved to -1 .. 1 first, which is exact: weights made for 0 .. 255 would
    be so small that fp16 keeps few of their digits.

    Attributes:
        bias: What is to be added to every patch, shape (width,), fp64.
    """

    def __init__(self, visual: Any, pixels: PixelStatistics, dtype: torch.dtype) -> None:
        super().__init__()
        kernel = visual.conv1.weight.detach().double()  # (width, 3, patch, patch)
        self.dtype = dtype
        self.patch = kernel.shape[-1]
        self.grid = visual.grid_size[0]
        self.width = kernel.shape[0]
        self.offset, self.step = (0.0, 1.0) if dtype == torch.float32 else (128.0, 128.0)
        mean, std = pixels.tensors()
        weight = kernel * self.step / (_MAX_LEVEL * std)
        self.weight = constant(weight.permute(2, 3, 1, 0).flatten(0, 2), dtype)
        self.bias = (kernel * (self.offset / _MAX_LEVEL - mean) / std).sum((1, 2, 3))

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (..., S, S, 3), uint8, to rows of patches (frames * patches, width)."""
        # The cast comes first: TensorRT takes no transpose of uint8.
        levels = frames.to(self.dtype)
        if self.offset:
            levels = (levels - self.offset) * (1.0 / self.step)
        side = self.patch * 3
        strips = levels.view(-1, self.grid, self.patch, self.grid, side)
        patches = strips.permute(0, 1, 3, 2, 4).contiguous().view(-1, self.patch * side)
        return (patches @ self.weight).float()


class VitTower(nn.Module):
    """A ViT from raw frames to the features of its class token.

    Args:
        dtype: What the products are computed in; the last projection stays fp32.
        joint: Whether the patches of all frames of a clip form one sequence, with the tower's
            `time_embedding`; T is then fixed.
    """

    def __init__(
        self, visual: Any, pixels: PixelStatistics, dtype: torch.dtype, *, joint: bool = False
    ) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(visual, pixels, dtype)
        table = _token_table(visual, self.embedding.bias, joint=joint)
        self.table = constant(table)
        self.length = table.shape[0]
        self.norm_before, self.norm_after = Norm(visual.ln_pre), Norm(visual.ln_post)
        *blocks, last = visual.transformer.resblocks
        self.blocks = nn.ModuleList(Block(block, dtype) for block in blocks)
        self.last_block = PooledBlock(last, dtype)
        self.projection = LastProjection(visual.proj, dtype)

    def forward(self, frames: Tensor, shift_over: int | None = None) -> Tensor:
        """Encode frames.

        Args:
            frames: uint8, shape (N, S, S, 3); (B, T, S, S, 3) for joint.
            shift_over: T, to shift the tokens over time before each block; None for no shift.

        Returns:
            Features, fp32, shape (N, D); (B, D) for joint.
        """
        patches = self.embedding(frames).view(-1, self.length - 1, self.embedding.width)
        # Padding makes room for the class token without asking for the size of the batch.
        tokens = F.pad(patches, (0, 0, 1, 0)) + self.table
        rows = self.norm_before(tokens.view(-1, self.embedding.width))
        for block in self.blocks:
            rows = block(self._shifted(rows, shift_over), self.length)
        rows = self._shifted(rows, shift_over)
        class_rows = self.last_block(rows, self.length, self._class_rows)
        features: Tensor = self.projection(self.norm_after(class_rows))
        return features

    def _class_rows(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.length, self.embedding.width)[:, 0]

    def _shifted(self, rows: Tensor, num_frames: int | None) -> Tensor:
        if num_frames is None:
            return rows
        return shift_rows(rows, num_frames, self.length)


def _token_table(visual: Any, bias: Tensor, *, joint: bool) -> Tensor:
    """What is added to the tokens of a sequence: class token, positions, time and bias; fp64."""
    positions = visual.positional_embedding.detach().double()
    class_token = visual.class_embedding.detach().double() + positions[0]
    patches = positions[1:] + bias
    if joint:
        time = visual.time_embedding.detach().double()
        patches = (time[:, None] + patches).flatten(0, 1)  # all patches of a frame, then the next
    return torch.cat((class_token[None], patches))


def shift_rows(rows: Tensor, num_frames: int, length: int) -> Tensor:
    """Give the patches of each frame an eighth of the next and of the previous frame's channels.

    The class token, which comes first in a frame, keeps its own; beyond the ends there are zeros.

    Args:
        rows: Shape (B * T * length, width).
        length: Tokens of a frame.
    """
    width = rows.shape[-1]
    fold = width // SHIFT_FOLDS
    clips = rows.view(-1, num_frames, length, width)
    parts = torch.split(clips, [fold, fold, width - 2 * fold], dim=-1)
    from_next, from_previous, kept = parts
    # Padding before cutting leaves nothing empty in between where T is 1.
    after = F.pad(from_next, (0, 0, 0, 0, 0, 1))[:, 1:]
    before = F.pad(from_previous, (0, 0, 0, 0, 1, 0))[:, :-1]
    after = torch.cat((from_next[:, :, :1], after[:, :, 1:]), dim=2)
    before = torch.cat((from_previous[:, :, :1], before[:, :, 1:]), dim=2)
    return torch.cat((after, before, kept), dim=-1).view(-1, width)


class ResNetTower(nn.Module):
    """CLIP's ResNet from raw frames to the features of its attention pool.

    Batch normalisation is folded into the convolutions. The pixel normalisation is not: the
    first convolution pads with zeros, which are the mean colour only after it.

    Args:
        dtype: What convolutions and products are computed in; the last product stays fp32.
    """

    def __init__(self, visual: Any, pixels: PixelStatistics, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        mean, std = pixels.tensors()
        self.pixel_scale = constant(1.0 / (_MAX_LEVEL * std))
        self.pixel_shift = constant(-mean / std)
        convolutions = [_folded(visual, f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        stem = [layer for conv in convolutions for layer in (conv, nn.ReLU())]
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        blocks = [_folded_bottleneck(block) for stage in stages for block in stage]
        self.body = nn.Sequential(*stem, nn.AvgPool2d(2), *blocks).to(dtype)
        pool = visual.attnpool
        self.positions = constant(pool.positional_embedding)
        self.attention = PooledAttention(_pool_attention(pool), dtype, fp32_output=True)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, S, S, 3), uint8, to features (N, D), fp32."""
        levels = frames.float().permute(0, 3, 1, 2)
        normalised = levels * self.pixel_scale + self.pixel_shift
        maps = self.body(normalised.to(self.dtype)).float()
        length, width = self.positions.shape
        patches = maps.view(-1, width, length - 1).transpose(1, 2)
        tokens = torch.cat((patches.mean(dim=1, keepdim=True), patches), dim=1) + self.positions
        output: Tensor = self.attention(tokens[:, 0], tokens.view(-1, width), length)
        return output


def _folded(source: Any, convolution: str, norm: str) -> nn.Module:
    """A convolution of a module with the batch normalisation after it folded in."""
    conv, batch_norm = getattr(source, convolution), getattr(source, norm)
    folded: nn.Module = torch.nn.utils.fuse_conv_bn_eval(conv, batch_norm)
    return folded


def _folded_bottleneck(block: Any) -> Any:
    folded = copy.deepcopy(block)
    for i in (1, 2, 3):
        setattr(folded, f"conv{i}", _folded(block, f"conv{i}", f"bn{i}"))
        setattr(folded, f"bn{i}", nn.Identity())
    if block.downsample is not None:
        pool, convolution, norm = block.downsample
        fused = torch.nn.utils.fuse_conv_bn_eval(convolution, norm)
        folded.downsample = nn.Sequential(copy.deepcopy(pool), fused)
    return folded


def _pool_attention(pool: Any) -> SimpleNamespace:
    """The attention pool's weights under the names of torch's attention."""
    projections = (pool.q_proj, pool.k_proj, pool.v_proj)
    return SimpleNamespace(
        in_proj_weight=torch.cat([projection.weight for projection in projections]),
        in_proj_bias=torch.cat([projection.bias for projection in projections]),
        out_proj=pool.c_proj,
        num_heads=pool.num_heads,
    )


def temporal_head(model: Any, dtype: torch.dtype) -> nn.Module:
    """Build the head of a model's visual prompt.

    Args:
        dtype: What the products of a transformer are computed in. The other heads stay fp32:
            `meanp` and `conv1d` have next to no arithmetic, and an LSTM carries the rounding of
            each step into the next.
    """
    source = model.visual_prompt
    match model.config.head:
        case "transf":
            return TransformerHead(source, dtype)
        case "transf_cls":
            return ClassTokenHead(source, dtype)
        case "lstm":
            return LstmHead(source)
        case "conv1d":
            return Conv1dHead(source)
        case _:
            return MeanHead()


class MeanHead(nn.Module):
    """`meanp`: the mean over T."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        return features.mean(dim=1)


class LstmHead(nn.Module):
    """`lstm`: one LSTM layer, its input added, and the mean over T.

    The layer is ONNX's own LSTM and nothing that PyTorch can compute: torch 2.15 exports its LSTM
    with its weights cut up and put together again in the graph.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        lstm = source.lstm_visual
        self.width = lstm.hidden_size
        self.weight = constant(_onnx_gates(lstm.weight_ih_l0)[None])  # (1, 4 D, D)
        self.recurrence = constant(_onnx_gates(lstm.weight_hh_l0)[None])
        biases = (_onnx_gates(lstm.bias_ih_l0), _onnx_gates(lstm.bias_hh_l0))
        self.bias = constant(torch.cat(biases)[None])  # (1, 8 D)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_clips, num_frames, width = features.shape
        output = torch.onnx.ops.symbolic(
            "LSTM",
            (features.transpose(0, 1), self.weight, self.recurrence, self.bias),
            {"hidden_size": self.width},
            dtype=features.dtype,
            shape=(num_frames, 1, num_clips, width),
        )
        return output.mean(dim=0).view(-1, width) + features.mean(dim=1)


def _onnx_gates(weight: Tensor) -> Tensor:
    """Order the four gates, stacked in the first dimension, as ONNX has them.

    Source:
        torch: input, forget, cell, output. ONNX: input, output, forget, cell.
    """
    enter, forget, cell, output = weight.detach().chunk(4)
    return torch.cat((enter, output, forget, cell))


class Conv1dHead(nn.Module):
    """`conv1d`: a depthwise convolution, its input added, and the mean over T.

    As in the original, the memory of (B, T, D) is read as (B, D, T), which is not a transpose.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.weight = constant(source.shift.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_frames, width = features.shape[1:]
        x = features.view(-1, width, num_frames)
        mixed = F.conv1d(x, self.weight, padding=1, groups=width)
        # The mean over T comes before the transpose back, which it makes needless.
        return mixed.mean(dim=2) + features.mean(dim=1)


class TransformerHead(nn.Module):
    """`transf`: pre-norm blocks over T, a residual around them, and the mean over T."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.positions = constant(source.frame_position_embeddings.weight)
        self.blocks = nn.ModuleList(Block(block, dtype) for block in source.transformer.resblocks)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_frames, width = features.shape[1:]
        rows = (features + self.positions[:num_frames]).view(-1, width)
        for block in self.blocks:
            rows = block(rows, num_frames)
        return (rows.view(-1, num_frames, width) + features).mean(dim=1)


class ClassTokenHead(nn.Module):
    """`transf_cls`: the class token of a post-norm encoder over a fixed T."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        encoder = source.transformer
        table = encoder.pos_embed.detach()[0].clone()  # (1 + T, D)
        table[0] += encoder.cls_token.detach()[0, 0]
        self.table = constant(table)
        *layers, last = encoder.transformer_enc.layers
        self.layers = nn.ModuleList(_PostNormLayer(layer, dtype) for layer in layers)
        self.last_layer = _PooledPostNormLayer(last, dtype)
        self.norm = Norm(encoder.transformer_enc.norm)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        length, width = self.table.shape
        rows = (F.pad(features, (0, 0, 1, 0)) + self.table).view(-1, width)
        for layer in self.layers:
            rows = layer(rows, length)
        output: Tensor = self.norm(self.last_layer(rows, length))
        return output


class _PostNormParts(nn.Module):
    """The parts of torch's `TransformerEncoderLayer`."""

    def __init__(
        self, source: nn.TransformerEncoderLayer, attention: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.norm1), Norm(source.norm2)
        self.attention = attention
        self.mlp = Mlp(source.linear1, nn.ReLU(), source.linear2, dtype)


class _PostNormLayer(_PostNormParts):
    def __init__(self, source: nn.TransformerEncoderLayer, dtype: torch.dtype) -> None:
        super().__init__(source, Attention(source.self_attn, dtype), dtype)

    def forward(self, rows: Tensor, length: int) -> Tensor:
        rows = self.norm_1(rows + self.attention(rows, length).float())
        output: Tensor = self.norm_2(rows + self.mlp(rows).float())
        return output


class _PooledPostNormLayer(_PostNormParts):
    """The last layer, for the class token alone."""

    def __init__(self, source: nn.TransformerEncoderLayer, dtype: torch.dtype) -> None:
        super().__init__(source, PooledAttention(source.self_attn, dtype), dtype)

    def forward(self, rows: Tensor, length: int) -> Tensor:
        tokens = rows.view(-1, length, rows.shape[-1])[:, 0]
        tokens = self.norm_1(tokens + self.attention(tokens, rows, length).float())
        output: Tensor = self.norm_2(tokens + self.mlp(tokens).float())
        return output
