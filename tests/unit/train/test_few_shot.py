"""Subsets with K videos of each label."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.train.data import draw_few_shot

SAMPLES = [Sample(Path(f"{number}.mp4"), (number % 5,)) for number in range(60)]


@pytest.mark.parametrize("per_label", [1, 4, 12])
def test_each_label_has_k_videos(per_label: int) -> None:
    drawn = draw_few_shot(SAMPLES, per_label, seed=0)

    assert Counter(s.label_ids for s in drawn) == {(label,): per_label for label in range(5)}
    assert [SAMPLES.index(s) for s in drawn] == sorted(SAMPLES.index(s) for s in drawn)


def test_the_seed_decides_which() -> None:
    first, again, other = (draw_few_shot(SAMPLES, 3, seed=seed) for seed in (1, 1, 2))

    assert first == again != other


def test_a_label_with_fewer_videos_gives_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    samples = [*SAMPLES, Sample(Path("rare.mp4"), (7,))]

    with caplog.at_level(logging.WARNING):
        drawn = draw_few_shot(samples, 2, seed=0)

    assert samples[-1] in drawn
    assert len(drawn) == 11
    assert "1 labels have fewer than 2 videos, the first of them label 7 with 1" in caplog.text


def test_a_video_with_several_labels_counts_for_each() -> None:
    samples = [Sample(Path(f"{n}.mp4"), (n % 3, 3)) for n in range(30)]

    drawn = draw_few_shot(samples, 2, seed=0)

    assert Counter(s.label_ids[0] for s in drawn) == {0: 2, 1: 2, 2: 2}
