"""A model that is small in everything but the token table.

Tests import it by name: `from tiny_models import tiny_model_config`.
"""

from __future__ import annotations

from actionclip_deploy.model import ModelConfig


def tiny_model_config(*, vision_layers: int) -> ModelConfig:
    """Sizes of a ViT of so many blocks; the tokenizer's ids need all of the token table."""
    return ModelConfig(
        backbone="tiny",
        embed_dim=16,
        input_size=32,
        vision_layers=vision_layers,
        vision_width=64,
        patch_size=16,
        context_length=24,
        vocab_size=49408,
        text_width=16,
        text_heads=1,
        text_layers=1,
        visual_prompt="meanp",
        num_frames=3,
        prompt_layers=1,
    )
