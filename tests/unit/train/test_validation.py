from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_fakes import LABELS, TEMPLATES, ColourClips, toy_config

from actionclip_deploy.model import load_checkpoint, save_original_checkpoint
from actionclip_deploy.scoring import score_clips
from actionclip_deploy.train.data import SampleKey
from actionclip_deploy.train.learner import prompt_tokens
from actionclip_deploy.train.loop import score_samples, start_accelerator
from actionclip_deploy.train.models import TrainedModel, build_trained_model

CONFIG = toy_config("unused")


def model(*overrides: str) -> TrainedModel:
    config = toy_config("unused", *overrides)
    return build_trained_model(config.model, config.loss, num_labels=4, seed=0)


def score(
    trained: TrainedModel, clips: ColourClips, batch_size: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    tokens = prompt_tokens(LABELS, TEMPLATES, trained.model.config)
    accelerator = start_accelerator(CONFIG.run)
    return score_samples(
        trained, clips, tokens, accelerator, num_labels=len(LABELS), batch_size=batch_size
    )


def test_scores_are_those_of_the_package(tmp_path: Path) -> None:
    trained, clips = model(), ColourClips(5)
    scores, labels = score(trained, clips)
    save_original_checkpoint(trained.model, tmp_path / "model.pt")
    other = TrainedModel(load_checkpoint(tmp_path / "model.pt", num_frames=4).model).eval()
    tokens = prompt_tokens(LABELS, TEMPLATES, other.model.config)
    texts = other.embed_texts(tokens).detach().numpy().reshape(3, 4, -1)
    for index in range(5):
        video = other.embed_clips(clips[SampleKey(index, 0)].frames[None]).detach().numpy()
        np.testing.assert_allclose(scores[index], score_clips(video, texts)[0], atol=1e-5)
    assert labels.argmax(axis=1).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_size_of_batches_changes_nothing(batch_size: int) -> None:
    trained, clips = model(), ColourClips(9)
    np.testing.assert_allclose(
        score(trained, clips, batch_size)[0], score(trained, clips)[0], atol=1e-5
    )


def test_a_sample_in_the_place_of_another_counts_once() -> None:
    scores, labels = score(model(), ColourClips(6, unreadable=[2, 3]))
    assert len(scores) == 4
    assert labels.argmax(axis=1).tolist() == [0, 1, 0, 1]


def test_a_classifier_gives_probabilities() -> None:
    scores, _ = score(model("model.classifier=true"), ColourClips(5))
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-6)


def test_the_model_stays_in_training_if_it_was() -> None:
    trained = model()
    trained.train()
    score(trained, ColourClips(2))
    assert trained.training
    trained.eval()
    score(trained, ColourClips(2))
    assert not trained.training
