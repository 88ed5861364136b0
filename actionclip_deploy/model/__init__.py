"""The PyTorch model: sizes, visual prompts, towers, and the import of checkpoints."""

from __future__ import annotations

from actionclip_deploy.model.actionclip import PIXEL_MEAN, PIXEL_STD, ActionCLIP, build_model
from actionclip_deploy.model.config import VISUAL_PROMPTS, ModelConfig

__all__ = [
    "PIXEL_MEAN",
    "PIXEL_STD",
    "VISUAL_PROMPTS",
    "ActionCLIP",
    "ModelConfig",
    "build_model",
]
