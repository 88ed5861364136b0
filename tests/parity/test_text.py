"""Tokens and probabilities of the original implementation."""

from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.prompts import TEMPLATES, fill_prompts
from actionclip_deploy.scoring import score_clips, top_k
from actionclip_deploy.tokenizer import Tokenizer

# The original computed in float32 on another machine; its sums differ in their order.
TOLERANCE = 1e-5

HEADS = ["meanP", "Transf", "Transf_cls", "LSTM", "Conv_1D", "u8_Transf"]


def padded(tokens: np.ndarray, length: int) -> np.ndarray:
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def test_tokens_of_the_golden_prompts_are_the_original_s(
    clip_tokenizer: Tokenizer, expected: dict[str, np.ndarray]
) -> None:
    labels = tuple(str(label) for label in expected["labels"])
    tokens = clip_tokenizer(fill_prompts(labels, TEMPLATES), context_length=77)
    np.testing.assert_array_equal(padded(tokens, 77), expected["tokens"])


def test_tokens_of_all_prompts_of_kinetics_400_are_the_original_s(
    clip_tokenizer: Tokenizer, expected: dict[str, np.ndarray], kinetics_400: tuple[str, ...]
) -> None:
    tokens = clip_tokenizer(fill_prompts(kinetics_400, TEMPLATES), context_length=77)
    assert tokens.shape == (6400, 16)
    np.testing.assert_array_equal(padded(tokens, 24), expected["tokens_k400_16_first24"])


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_of_every_head_are_the_original_s(
    expected: dict[str, np.ndarray], head: str
) -> None:
    def unit_norm(features: np.ndarray) -> np.ndarray:
        return features / np.linalg.norm(features, axis=-1, keepdims=True)

    num_templates = int(expected["num_templates"])
    text = unit_norm(expected["text_features"])
    label_embeddings = text.reshape(num_templates, -1, text.shape[-1])
    scores = score_clips(unit_norm(expected[f"video_features_{head}"]), label_embeddings)
    golden = expected[f"probabilities_{head}"]
    np.testing.assert_allclose(scores, golden, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(top_k(scores, 5)[0], np.argsort(-golden, axis=1)[:, :5])
