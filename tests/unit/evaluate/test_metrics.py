"""Accuracy against labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.evaluate.metrics import (
    average_precision,
    class_accuracy,
    confusion_matrix,
    hits_at,
    measure,
    measure_motions,
    wilson_interval,
)
from actionclip_deploy.motions import MOTIONS, ORDER_PAIRS, MotionLabel, all_labels, labels

RNG = np.random.default_rng(7)


def _one_label(num_videos: int, num_labels: int) -> NDArray[np.bool_]:
    return np.eye(num_labels, dtype=bool)[RNG.integers(num_labels, size=num_videos)]


def _charades_map(scores: NDArray[np.float64], targets: NDArray[np.bool_]) -> float:
    """The benchmark's: videos without labels go to the end, the mean is over all classes."""
    scores = scores.copy()
    scores[targets.sum(axis=1) == 0] = -np.inf
    precisions = []
    for column, wanted in zip(scores.T, targets.T, strict=True):
        right = wrong = 0
        total = 0.0
        for video in np.argsort(-column):
            if wanted[video]:
                right += 1
                total += right / (right + wrong)
            else:
                wrong += 1
        precisions.append(total / right)
    return float(np.mean(precisions))


def _sklearn_ap(scores: NDArray[np.float64], targets: NDArray[np.bool_]) -> float:
    """scikit-learn's: sum over thresholds, from high to low, of (R_n - R_(n-1)) P_n."""
    total = recall_before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        precision = targets[found].mean()
        recall = targets[found].sum() / targets.sum()
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


def test_mean_average_precision_is_that_of_charades() -> None:
    scores = RNG.random((60, 7))
    targets = RNG.random((60, 7)) < 0.2
    targets[:5] = False  # videos that show none of the actions
    targets[5] = True

    metrics = measure(scores, targets)

    assert metrics.mean_average_precision == pytest.approx(_charades_map(scores, targets))
    assert metrics.num_videos == targets.any(axis=1).sum()


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_that_of_scikit_learn_with_equal_scores(levels: int) -> None:
    scores = RNG.integers(levels, size=80) / levels
    targets = RNG.random(80) < 0.3

    assert average_precision(scores, targets) == pytest.approx(_sklearn_ap(scores, targets))


def test_average_precision_of_a_small_ranking() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    targets = np.array([True, False, True, False])

    assert average_precision(scores, targets) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_average_precision_without_positives_is_nan() -> None:
    assert math.isnan(average_precision(np.array([0.5, 0.4]), np.array([False, False])))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hits_agree_with_a_loop(k: int) -> None:
    scores, targets = RNG.integers(4, size=(50, 6)) / 4, RNG.random((50, 6)) < 0.3

    hits = hits_at(scores, targets, k)

    for row, wanted, hit in zip(scores, targets, hits, strict=True):
        ranked = sorted(range(6), key=lambda label: (-row[label], label))
        assert hit == any(wanted[label] for label in ranked[:k])


def test_class_accuracy_agrees_with_a_loop() -> None:
    scores, targets = RNG.random((50, 6)), _one_label(50, 6)
    targets[:, 3] = False
    targets[~targets.any(axis=1), 0] = True

    accuracy = class_accuracy(scores, targets)

    for label in range(6):
        own = [row for row, wanted in zip(scores, targets, strict=True) if wanted[label]]
        if not own:
            assert math.isnan(accuracy[label])
        else:
            assert accuracy[label] == sum(row.argmax() == label for row in own) / len(own)


def test_the_confusion_matrix_has_true_labels_in_rows() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    targets = np.array([[True, False], [True, False], [False, True]])

    assert confusion_matrix(scores, targets).tolist() == [[1, 1], [0, 1]]


def test_measures_of_one_label_per_video_fit_together() -> None:
    scores, targets = RNG.random((90, 9)), _one_label(90, 9)

    metrics = measure(scores, targets)

    assert metrics.confusion is not None
    assert metrics.confusion.sum() == metrics.num_videos == 90
    assert metrics.top1 == pytest.approx(np.trace(metrics.confusion) / 90)
    assert metrics.confusion.sum(axis=1).tolist() == metrics.class_count.tolist()
    assert metrics.top1 <= metrics.top5
    assert metrics.top1_interval[0] < metrics.top1 < metrics.top1_interval[1]


def test_several_labels_have_no_confusion_matrix() -> None:
    targets = np.array([[True, True], [False, True]])

    assert measure(np.array([[0.1, 0.9], [0.8, 0.2]]), targets).confusion is None


def test_labels_without_videos_count_in_no_mean() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    targets = np.array([[True, False, False], [False, True, False]])

    metrics = measure(scores, targets)

    assert metrics.mean_class_accuracy == metrics.mean_average_precision == 1.0
    assert metrics.per_class(("a", "b", "c"))[2] == {
        "label": "c",
        "num_videos": 0,
        "accuracy": None,
        "average_precision": None,
    }


def test_measures_are_ready_for_json() -> None:
    scores, targets = RNG.random((12, 4)).astype(np.float32), _one_label(12, 4)
    metrics = measure(scores, targets)

    text = json.dumps([metrics.summary(), metrics.per_class("abcd")], allow_nan=False)

    assert json.loads(text)[0]["num_videos"] == 12


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Of R's prop.test(x, n, correct = FALSE).
    [(15, 20, 0.5313, 0.8881), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson_intervals_are_those_of_r(
    successes: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_intervals_hold_the_true_share_as_often_as_they_say() -> None:
    right = RNG.binomial(200, 0.8, size=2000)

    held = [low <= 0.8 <= high for low, high in (wilson_interval(int(x), 200) for x in right)]

    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="successes is 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="confidence is 1; it must lie between 0 and 1"):
        wilson_interval(1, 2, confidence=1)


def test_scores_and_targets_have_to_fit() -> None:
    with pytest.raises(ShapeError, match=r"scores have shape \(2, 3\) and targets \(2, 2\)"):
        measure(np.zeros((2, 3)), np.ones((2, 2), bool))
    with pytest.raises(ShapeError, match="targets of bool"):
        measure(np.zeros((2, 3)), np.ones((2, 3)))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="not a finite number"):
        measure(np.full((2, 3), np.nan), np.ones((2, 3), bool))
    with pytest.raises(ShapeError, match="No video has a label"):
        measure(np.zeros((2, 3)), np.zeros((2, 3), bool))


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
