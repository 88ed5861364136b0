"""The ActionCLIP model: CLIP's two towers and a visual prompt.

    pixels (B, T, 3, S, S) -> frame features (B * T, D) -> features (B, D) -> embeddings (B, D)
    tokens (M, L) -> features (M, D) -> embeddings (M, D)

Letters as in the whole package: N frames, B clips of T frames, M prompts of L tokens, D channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.model.towers import (
    build_towers,
    encode_jointly,
    encode_shifted,
    encode_tokens,
)
from actionclip_deploy.model.visual_prompts import build_visual_prompt

if TYPE_CHECKING:
    from actionclip_deploy.model.config import ModelConfig

# Of red, green and blue in 0 to 1, the statistics of CLIP's training images.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class ActionCLIP(nn.Module):
    """CLIP's towers with one of the seven visual prompts.

    Args:
        config: Sizes and choices. Weights are random, as the original initialises them.

    Attributes:
        config: The sizes and choices given.
        towers: Both towers as `open_clip.model.CLIP`, under CLIP's key names.
        visual_prompt: Maps frame features (B, T, D) to features (B, D), not normalised.
        frames_are_independent: Whether frames can be encoded one by one; False for `joint` and
            `shift`, which mix them inside the visual tower.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.towers = build_towers(config)
        self.visual_prompt = build_visual_prompt(config)
        self.frames_are_independent = config.frames_are_independent

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed clips (B, T, 3, S, S) and prompts (M, L) as (B, D) and (M, D), unit norm."""
        return self.encode_video(pixels), self.encode_text(tokens)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Encode frames one by one.

        Args:
            pixels: Normalised frames, shape (N, 3, S, S).

        Returns:
            Frame features, shape (N, D), not normalised.

        Raises:
            ValueError: If the visual prompt mixes frames inside the tower.
            ShapeError: If the frames are not (N, 3, S, S).
        """
        if not self.frames_are_independent:
            raise ValueError(
                f"visual prompt {self.config.visual_prompt!r} mixes the frames of a clip inside "
                "the visual tower, so single frames have no feature; use encode_video"
            )
        size = self.config.input_size
        _check_shape("frames", pixels, (None, 3, size, size))
        features: Tensor = self.towers.visual(pixels)
        return features

    def fuse_frames(self, features: Tensor) -> Tensor:
        """Fuse frame features (B, T, D) into features of clips (B, D), not normalised.

        Raises:
            ValueError: If the visual prompt is `joint`, which has no features of frames.
            ShapeError: If D is another, or the model cannot run that T.
        """
        config = self.config
        if config.visual_prompt == "joint":
            raise ValueError(
                "visual prompt 'joint' gives one feature for a clip and none for its frames; "
                "use encode_video"
            )
        _check_shape("frame features", features, (None, None, config.embed_dim))
        self._check_num_frames(features)
        fused: Tensor = self.visual_prompt(features)
        return fused

    def encode_clips(self, features: Tensor) -> Tensor:
        """Fuse frame features (B, T, D) into embeddings (B, D), unit norm.

        Raises:
            ValueError: If the visual prompt is `joint`, which has no features of frames.
            ShapeError: If D is another, or the model cannot run that T.
        """
        return F.normalize(self.fuse_frames(features), dim=-1)

    def encode_video_features(self, pixels: Tensor) -> Tensor:
        """Encode whole clips under any visual prompt.

        Args:
            pixels: Normalised frames, shape (B, T, 3, S, S).

        Returns:
            Features, shape (B, D), not normalised.

        Raises:
            ShapeError: If the frames are not (B, T, 3, S, S), or the model cannot run that T.
        """
        size = self.config.input_size
        _check_shape("clips", pixels, (None, None, 3, size, size))
        self._check_num_frames(pixels)
        if self.config.visual_prompt == "joint":
            return encode_jointly(self.towers.visual, pixels)
        if self.config.visual_prompt == "shift":
            return self.fuse_frames(encode_shifted(self.towers.visual, pixels))
        features = self.encode_frames(pixels.flatten(0, 1))
        return self.fuse_frames(features.reshape(-1, pixels.shape[1], features.shape[-1]))

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode whole clips under any visual prompt, as `encode_video_features`, to unit norm.

        Args:
            pixels: Normalised frames, shape (B, T, 3, S, S).

        Returns:
            Embeddings, shape (B, D), unit norm.

        Raises:
            ShapeError: If the frames are not (B, T, 3, S, S), or the model cannot run that T.
        """
        return F.normalize(self.encode_video_features(pixels), dim=-1)

    def encode_text_features(self, tokens: Tensor) -> Tensor:
        """Encode prompts at their own length.

        Args:
            tokens: Token ids, shape (M, L), int32 or int64, L up to the context length.

        Returns:
            Features, shape (M, D), not normalised.

        Raises:
            ShapeError: If the tokens are not (M, L) or longer than the context.
        """
        _check_shape("tokens", tokens, (None, None))
        limit = self.config.context_length
        if not _is_traced() and tokens.shape[1] > limit:
            raise ShapeError(
                f"tokens have shape {tuple(tokens.shape)}, longer than the context of {limit}; "
                "shorten the prompts"
            )
        return encode_tokens(self.towers, tokens)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode prompts (M, L), as `encode_text_features`, to embeddings (M, D), unit norm.

        Raises:
            ShapeError: If the tokens are not (M, L) or longer than the context.
        """
        return F.normalize(self.encode_text_features(tokens), dim=-1)

    def _check_num_frames(self, clips: Tensor) -> None:
        rows = self.config.position_rows
        if rows is None or _is_traced():
            return
        num_frames = clips.shape[1]
        fixed = self.config.visual_prompt in ("transf_cls", "joint")
        if num_frames > rows or (fixed and num_frames != rows):
            raise ShapeError(
                f"clips of T = {num_frames} frames were given, but visual prompt "
                f"{self.config.visual_prompt!r} has positions for {rows}; give "
                f"{'exactly' if fixed else 'at most'} {rows} frames"
            )


def build_model(config: ModelConfig, *, seed: int | None = None) -> ActionCLIP:
    """Build a model in eval mode with random weights, as the original initialises them.

    Args:
        config: Sizes and choices.
        seed: Makes the weights repeatable and leaves torch's global generator untouched; None
            draws from the global generator.
    """
    with nullcontext() if seed is None else torch.random.fork_rng(devices=()):
        if seed is not None:
            torch.manual_seed(seed)
        return ActionCLIP(config).eval()


def _is_traced() -> bool:
    # Under an exporter sizes are symbols, and comparing one would fix it in the graph.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _check_shape(what: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if _is_traced():
        return
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        wanted in (None, got) for wanted, got in zip(shape, given, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{what} have shape {given}; give ({wanted})")
