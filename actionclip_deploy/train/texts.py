"""The texts of a run: every label in every template, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.prompts import describe_text, fill_prompts
from actionclip_deploy.tokenizer import NUM_TOKENS, Tokenizer, find_clip_merges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actionclip_deploy.model import ModelConfig


def tokenise_prompts(
    labels: Sequence[str], templates: Sequence[str], config: ModelConfig
) -> torch.Tensor:
    """Turn every label in every template into tokens.

    Args:
        labels: C labels.
        templates: K templates.
        config: Of the model that is to read them.

    Returns:
        Token ids, int32, shape (K * C, L), template-major, with L of the longest.

    Raises:
        LabelError: If a prompt is longer than the model's context.
        TrainingError: If the model's token table is too small.
    """

    def describe(index: int) -> str:
        label = describe_text(labels, index % len(labels), "label")
        return f"{label} in template {templates[index // len(labels)]!r}"

    tokens = Tokenizer.from_clip_merges(find_clip_merges())(
        fill_prompts(labels, templates), context_length=config.context_length, describe=describe
    )
    if tokens.max() >= config.vocab_size:
        raise TrainingError(
            f"The model has {config.vocab_size} tokens, and CLIP's tokenizer gives numbers up to "
            f"{tokens.max()}; give model.sizes.vocab_size {NUM_TOKENS}."
        )
    return torch.from_numpy(tokens)
