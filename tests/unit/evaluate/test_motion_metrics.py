from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.evaluate.metrics import measure_motions
from actionclip_deploy.motions import MOTIONS, ORDER_PAIRS, MotionLabel, all_labels, labels

SHOWN = all_labels()


def ids(*shown: MotionLabel) -> list[int]:
    return [SHOWN.index(label) for label in shown]


def scores(rows: list[dict[MotionLabel, float]]) -> np.ndarray:
    table = np.zeros((len(rows), len(SHOWN)), np.float32)
    for row, values in zip(table, rows, strict=True):
        for label, value in values.items():
            row[SHOWN.index(label)] = value
    return table


def test_each_word_of_the_first_label_counts_for_itself() -> None:
    truth = MotionLabel("star", "red", "bouncing")
    given = scores(
        [
            {truth: 1.0},
            {truth._replace(shape="moon"): 1.0},
            {truth._replace(motion="blinking", colour="blue"): 1.0},
            {truth._replace(motion="orbiting"): 1.0},
        ]
    )
    measured = measure_motions(given, ids(*[truth] * 4))
    assert measured["top1"] == 0.25
    assert (measured["shape"], measured["colour"], measured["motion"]) == (0.75, 0.75, 0.5)
    assert "order" not in measured  # bouncing has no other direction


def backwards(label: MotionLabel) -> MotionLabel:
    pair = next(pair for pair in ORDER_PAIRS if label.motion in pair)
    return label._replace(motion=pair[pair[0] == label.motion])


def first_pair(motion: str, *, seen: tuple[bool, bool]) -> MotionLabel:
    """A label with a motion, which it and its opposite are trained on or not as asked for."""
    trained = set(labels("train"))
    return next(
        label
        for label in SHOWN
        if label.motion == motion and (label in trained, backwards(label) in trained) == seen
    )


def test_order_compares_a_label_with_the_same_played_backwards() -> None:
    left, up = (first_pair(motion, seen=(True, True)) for motion in ("moving left", "moving up"))
    other = MotionLabel("moon", "white", "growing")
    given = scores(
        [
            {left: 0.2, backwards(left): 0.1, other: 0.7},  # right as to order
            {left: 0.1, backwards(left): 0.2},
            {up: 0.3, backwards(up): 0.2, other: 0.5},
        ]
    )
    measured = measure_motions(given, ids(left, left, up))
    assert measured["order"] == pytest.approx(2 / 3)
    assert measured["order_pairs"] == {
        "moving left / moving right": 0.5,
        "moving up / moving down": 1.0,
    }


def test_order_leaves_out_labels_of_which_one_direction_was_never_trained() -> None:
    mixed = first_pair("moving left", seen=(True, False))
    both = first_pair("moving left", seen=(False, False))
    measured = measure_motions(scores([{mixed: 1.0}, {backwards(both): 1.0}]), ids(mixed, both))
    assert measured["order"] == 0.0


def test_scores_that_know_no_order_are_right_by_chance() -> None:
    rng = np.random.default_rng(0)
    videos = [label for label in SHOWN if label.motion in MOTIONS[:10]]
    measured = measure_motions(rng.random((len(videos), len(SHOWN))), ids(*videos))
    assert measured["order"] == pytest.approx(0.5, abs=0.08)


def test_held_out_labels_are_also_ranked_among_themselves() -> None:
    unseen, another = labels("heldout")[:2]
    seen = labels("train")[0]
    given = scores([{unseen: 0.3, seen: 0.6}, {another: 0.3, unseen: 0.1}])
    measured = measure_motions(given, ids(unseen, another))
    assert (measured["top1"], measured["top1_of_held_out"]) == (0.5, 1.0)
    assert "top1_of_held_out" not in measure_motions(given[:1], ids(seen))
