from __future__ import annotations

import numpy as np
import pytest
from training_fakes import SIZES

from actionclip_deploy.errors import LabelError, TrainingError
from actionclip_deploy.model import ModelConfig
from actionclip_deploy.train.learner import prompt_tokens


def config(*, context_length: int = 77, vocab_size: int = 49408) -> ModelConfig:
    return ModelConfig(
        backbone="toy",
        visual_prompt="meanp",
        text_heads=1,
        vision_head_width=32,
        context_length=context_length,
        vocab_size=vocab_size,
        **SIZES,
    )


def test_prompts_are_tokenised_template_major() -> None:
    tokens = prompt_tokens(
        ("abseiling", "archery"), ("a photo of action {}", "{}"), config()
    ).numpy()
    # The specification gives the tokens of this prompt.
    wanted = [49406, 320, 1125, 539, 1816, 596, 567, 3299, 49407]
    assert tokens[0].tolist() == wanted
    assert tokens[2].tolist() == [49406, 596, 567, 3299, 49407, 0, 0, 0, 0]
    assert np.array_equal(tokens[1][:5], tokens[0][:5])


def test_a_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(
        LabelError, match=r"label 2 \('archery meeting'\) in template 2 \('very \{\}'\) is"
    ):
        prompt_tokens(("a", "archery meeting"), ("{}", "very {}"), config(context_length=4))


def test_a_model_with_too_few_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="The model has 512 tokens, and CLIP's tokenizer gives"):
        prompt_tokens(("archery",), ("{}",), config(vocab_size=512))
