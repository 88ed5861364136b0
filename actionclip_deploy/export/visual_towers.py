"""The visual towers as graphs take them: raw uint8 frames in, features out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.export.layers import (
    Block,
    LastProjection,
    Norm,
    PooledAttention,
    PooledBlock,
    constant,
)
from actionclip_deploy.model.towers import SHIFT_FOLDS

_MAX_LEVEL = 255.0


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

    Args:
        visual: open_clip's `VisionTransformer`.
        pixels: What to normalise frames by.
        dtype: What the product is computed in.

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
        visual: open_clip's `VisionTransformer`.
        pixels: What to normalise frames by.
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


def shift_rows(rows: Tensor, num_frames: int, length: int) -> Tensor:
    """Give the patches of each frame an eighth of the next and of the previous frame's channels.

    The class token, which comes first in a frame, keeps its own; beyond the ends there are zeros.

    Args:
        rows: Shape (B * T * length, width).
        num_frames: T.
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
        visual: open_clip's `ModifiedResNet`.
        pixels: What to normalise frames by.
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


def _token_table(visual: Any, bias: Tensor, *, joint: bool) -> Tensor:
    """What is added to the tokens of a sequence: class token, positions, time and bias; fp64."""
    positions = visual.positional_embedding.detach().double()
    class_token = visual.class_embedding.detach().double() + positions[0]
    patches = positions[1:] + bias
    if joint:
        time = visual.time_embedding.detach().double()
        patches = (time[:, None] + patches).flatten(0, 1)  # all patches of a frame, then the next
    return torch.cat((class_token[None], patches))


def _folded(source: Any, convolution: str, norm: str) -> nn.Module:
    """A convolution of a module with the batch normalisation behind it folded in."""
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
