"""The PyTorch model and its checkpoints."""

from __future__ import annotations

from actionclip_deploy.model.checkpoints import (
    LoadedCheckpoint,
    initialise_tower,
    load_checkpoint,
    save_original_checkpoint,
)
from actionclip_deploy.model.config import VISUAL_PROMPTS, ModelConfig
from actionclip_deploy.model.families import FAMILIES
from actionclip_deploy.model.network import (
    PIXEL_MEAN,
    PIXEL_STD,
    ActionClipNetwork,
    build_model,
    count_flops,
    count_macs,
    count_parameters,
)

__all__ = [
    "FAMILIES",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "VISUAL_PROMPTS",
    "ActionClipNetwork",
    "LoadedCheckpoint",
    "ModelConfig",
    "build_model",
    "count_flops",
    "count_macs",
    "count_parameters",
    "initialise_tower",
    "load_checkpoint",
    "save_original_checkpoint",
]
