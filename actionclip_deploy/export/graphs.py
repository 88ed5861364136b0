"""The graphs of a bundle as PyTorch modules, made from an ActionCLIP model.

They compute what the model computes, rewritten for deployment: raw uint8 frames in, only the
token that is used in a tower's last block, unit-norm embeddings out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.export.layers import (
    MASKED,
    Block,
    LastProjection,
    Norm,
    PixelStatistics,
    PooledBlock,
    ResNetTower,
    VitTower,
    constant,
    normalise,
    temporal_head,
)
from actionclip_deploy.manifest import GraphName, RestPrecision, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from actionclip_deploy.model import ActionClipNetwork, ModelConfig

_DTYPES: dict[RestPrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# Of the heads that fuse frame features, those that an fp16 bundle computes in fp16; see
# `temporal_head` for why not the others.
_HALF_HEADS = frozenset({"transf", "transf_cls"})
_FIXED_LENGTH_PROMPTS = frozenset({"transf_cls", "joint"})


class VisualGraph(nn.Module):
    """Frames to frame features, one frame independent of the others."""

    def __init__(
        self, model: ActionClipNetwork, pixels: PixelStatistics, dtype: torch.dtype
    ) -> None:
        super().__init__()
        tower = ResNetTower if model.config.patch_size is None else VitTower
        self.tower = tower(model.towers.visual, pixels, dtype)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, S, S, 3), uint8, to features (N, D), fp32, not normalised."""
        features: Tensor = self.tower(frames)
        return features


class TemporalGraph(nn.Module):
    """Frame features to video embeddings."""

    def __init__(self, model: ActionClipNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = temporal_head(model, dtype)

    def forward(self, frame_features: Tensor) -> Tensor:
        """Map features (B, T, D), fp32, to embeddings (B, D), fp32, unit norm."""
        return normalise(self.head(frame_features))


class VideoGraph(nn.Module):
    """Clips to video embeddings, for the visual prompts that mix frames inside the tower."""

    def __init__(
        self, model: ActionClipNetwork, pixels: PixelStatistics, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.joint = model.config.visual_prompt == "joint"
        self.tower = VitTower(model.towers.visual, pixels, dtype, joint=self.joint)
        self.head = temporal_head(model, dtype)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (B, T, S, S, 3), uint8, to embeddings (B, D), fp32, unit norm."""
        if self.joint:
            return normalise(self.tower(frames))
        num_frames = frames.shape[1]
        features = self.tower(frames, shift_over=num_frames)
        return normalise(self.head(features.view(-1, num_frames, features.shape[-1])))


class TextualGraph(nn.Module):
    """Prompts to text embeddings, at the length that the tokens come with."""

    def __init__(self, model: ActionClipNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        towers: Any = model.towers
        self.token_table = constant(towers.token_embedding.weight, dtype)
        self.positions = constant(towers.positional_embedding)
        length = self.positions.shape[0]
        self.mask = constant(torch.full((length, length), MASKED).triu(1))
        *blocks, last = towers.transformer.resblocks
        self.blocks = nn.ModuleList(Block(block, dtype) for block in blocks)
        self.last_block = PooledBlock(last, dtype)
        self.norm = Norm(towers.ln_final)
        self.projection = LastProjection(towers.text_projection, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (M, L), int32, to embeddings (M, D), fp32, unit norm."""
        length = tokens.shape[1]
        width = self.positions.shape[1]
        mask = self.mask[:length, :length]
        # The end of text has the largest id. As fp32, since ids below 2**24 are exact in it and
        # every runtime has ArgMax of fp32; not all have that of integers.
        ends = tokens.float().argmax(dim=1, keepdim=True)  # (M, 1)

        def pick(rows: Tensor) -> Tensor:
            places = ends[:, :, None].expand(-1, 1, width)
            return rows.view(-1, length, width).gather(1, places).view(-1, width)

        embedded = F.embedding(tokens, self.token_table).float()
        rows = (embedded + self.positions[:length]).view(-1, width)
        for block in self.blocks:
            rows = block(rows, length, mask)
        end_mask = F.embedding(ends, mask)[:, None]  # (M, 1, 1, L)
        picked = self.last_block(rows, length, pick, end_mask)
        return normalise(self.projection(self.norm(picked)))


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """One graph to write.

    Attributes:
        input: Name, dtype and shape of its input; a letter is a free dimension.
        build: Makes the module; called when its turn comes, so that one copy of the weights
            exists at a time.
        limits: Largest sizes of free dimensions, where there is one.
    """

    name: GraphName
    precision: RestPrecision
    input: TensorSpec
    output: TensorSpec
    build: Callable[[], nn.Module]
    limits: dict[str, int] = field(default_factory=dict)


def plan_graphs(
    model: ActionClipNetwork,
    pixels: PixelStatistics,
    precision: RestPrecision,
    text_precision: RestPrecision = "fp32",
) -> tuple[GraphPlan, ...]:
    """Say which graphs a model becomes.

    Args:
        precision: Of the graphs of frames; heads that would lose by fp16 are fp32 whatever it is.
    """
    config = model.config
    dtype = _DTYPES[precision]
    size, dim = config.input_size, config.embed_dim
    num_frames, limits = _frames_dimension(config)
    video_embedding = _float32("video_embedding", "B", dim)
    textual = GraphPlan(
        "textual",
        text_precision,
        TensorSpec(name="tokens", dtype="int32", shape=("M", "L")),
        _float32("text_embedding", "M", dim),
        lambda: TextualGraph(model, _DTYPES[text_precision]),
        {"L": config.context_length},
    )
    if not config.frames_are_independent:
        clips = _frames("B", num_frames, size, size, 3)
        video = GraphPlan(
            "video",
            precision,
            clips,
            video_embedding,
            lambda: VideoGraph(model, pixels, dtype),
            limits,
        )
        return video, textual
    features = _float32("frame_features", "N", dim)
    visual = GraphPlan(
        "visual",
        precision,
        _frames("N", size, size, 3),
        features,
        lambda: VisualGraph(model, pixels, dtype),
    )
    temporal = GraphPlan(
        "temporal",
        precision if config.head in _HALF_HEADS else "fp32",
        _float32("frame_features", "B", num_frames, dim),
        video_embedding,
        lambda: TemporalGraph(model, dtype),
        limits,
    )
    return visual, temporal, textual


def _frames_dimension(config: ModelConfig) -> tuple[int | str, dict[str, int]]:
    """T as a number or a letter, and its limit if it has one."""
    rows = config.position_rows
    # torch cannot trace a free dimension that can only be 1.
    if config.head in _FIXED_LENGTH_PROMPTS or rows == 1:
        return config.num_frames, {}
    return "T", {} if rows is None else {"T": rows}


def _frames(*shape: int | str) -> TensorSpec:
    return TensorSpec(name="frames", dtype="uint8", shape=shape)


def _float32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)
