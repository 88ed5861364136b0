"""Small models and checkpoints for the tests of the PyTorch model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from actionclip_deploy.model import ActionClipNetwork, ModelConfig

NUM_FRAMES = 4


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """Two blocks of width 64 and 64 pixels; T = 4; visual prompt meanp."""
    from actionclip_deploy.model import ModelConfig

    return ModelConfig(
        backbone="custom ViT (width 64, layers 2, patch 16)",
        embed_dim=32,
        input_size=32,
        vision_layers=2,
        vision_width=64,
        patch_size=16,
        context_length=12,
        vocab_size=50,
        text_width=64,
        text_heads=1,
        text_layers=2,
        visual_prompt="meanp",
        num_frames=NUM_FRAMES,
    )


@pytest.fixture(scope="session")
def small_model(small_config: ModelConfig) -> Callable[..., ActionClipNetwork]:
    """Builds a seeded small model with a visual prompt and any other field of its config."""
    from actionclip_deploy.model import build_model

    def build(
        visual_prompt: str = "transf", *, rows: int | None = None, **fields
    ) -> ActionClipNetwork:
        config = replace(small_config, **fields)
        config = config.with_visual_prompt(visual_prompt, num_frames=NUM_FRAMES, position_rows=rows)
        return build_model(config, seed=7)

    return build


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves an object with torch.save under a name in a folder of its own."""
    import torch

    def write(content: object, name: str = "small-4f.pt") -> Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write


@pytest.fixture
def clips(small_config: ModelConfig) -> Tensor:
    """Two clips of normalised frames, (B, T, 3, S, S)."""
    import torch

    size = small_config.input_size
    return torch.randn(2, NUM_FRAMES, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens() -> Tensor:
    """Three prompts of 7 tokens, of which 49 ends the text."""
    import torch

    return torch.tensor([[48, 5, 6, 49, 0, 0, 0], [48, 9, 49, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, 49]])
