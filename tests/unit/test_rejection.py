from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from actionclip_deploy.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    UNKNOWN,
    Answer,
    Calibration,
    calibrate,
    calibrated_scores,
    expected_calibration_error,
)
from actionclip_deploy.errors import ShapeError

# Bisection ends at the temperature to the last bits; the search over a grid does not.
GRID_STEP = 1e-3


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def make_scores(num_known: int, num_unknown: int = 0, *, sharpness: float = 3.0) -> Any:
    """Scores of videos whose label has a higher logit; labels are right with odds of e^logit."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(num_known + num_unknown, 5))
    # Labels drawn from the logits' own softmax: at temperature 1 they are calibrated.
    shares = softmax(logits)
    ids = np.array([rng.choice(5, p=share) for share in shares], np.int64)
    ids[num_known:] = UNKNOWN
    return softmax(sharpness * logits).astype(np.float32), ids


def fit(scores: np.ndarray, ids: np.ndarray, **options: Any) -> Calibration:
    given: dict[str, Any] = {"method": "template-softmax", "views": "1x1", "visual_sha256": "0"}
    return calibrate(scores, ids, **{**given, **options})


def test_a_temperature_raises_each_score_to_its_inverse() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], np.float32)
    for temperature in (0.5, 1.0, 2.5):
        calibrated = calibrated_scores(scores, temperature)
        for row, expected in zip(calibrated, scores.tolist(), strict=True):
            powers = [value ** (1 / temperature) for value in expected]
            assert row.tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-6)


def test_a_temperature_keeps_the_order_and_a_temperature_of_1_the_scores() -> None:
    scores, _ = make_scores(50)
    calibrated = calibrated_scores(scores, 3.0)
    np.testing.assert_array_equal(
        np.argsort(calibrated, axis=1, kind="stable"), np.argsort(scores, axis=1, kind="stable")
    )
    np.testing.assert_allclose(calibrated_scores(scores, 1.0), scores, atol=1e-6)


def test_the_temperature_is_that_of_the_smallest_negative_log_likelihood() -> None:
    scores, ids = make_scores(200)

    def loss(temperature: float) -> float:
        total = 0.0
        for row, label in zip(scores.tolist(), ids, strict=True):
            powers = [value ** (1 / temperature) for value in row]
            total -= math.log(powers[label] / sum(powers))
        return total

    grid = np.arange(1.0, 6.0, GRID_STEP)
    best = grid[np.argmin([loss(temperature) for temperature in grid])]
    assert fit(scores, ids).temperature == pytest.approx(best, abs=2 * GRID_STEP)


def test_scores_that_were_sharpened_three_times_get_back_a_temperature_of_about_3() -> None:
    scores, ids = make_scores(4000)
    calibration = fit(scores, ids)
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)
    assert calibration.error_after < calibration.error_before / 4


def test_videos_that_are_all_right_or_all_wrong_stop_at_the_bounds() -> None:
    scores, _ = make_scores(30)
    assert fit(scores, scores.argmax(axis=1)).temperature == MIN_TEMPERATURE
    assert fit(scores, scores.argmin(axis=1)).temperature == MAX_TEMPERATURE


def test_unknown_videos_have_no_influence_on_the_temperature() -> None:
    scores, ids = make_scores(100, 60)
    assert fit(scores, ids).temperature == fit(scores[:100], ids[:100]).temperature


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("num_known", [1, 2, 19, 20, 100])
def test_no_threshold_that_keeps_as_many_known_videos_rejects_more(
    target: float, num_known: int
) -> None:
    scores, ids = make_scores(num_known, 40)
    calibration = fit(scores, ids, target_kept=target)
    best = calibrated_scores(scores, calibration.temperature).max(axis=1)

    def count(threshold: float) -> tuple[int, int]:
        kept = sum(score >= threshold for score, i in zip(best, ids, strict=True) if i >= 0)
        rejected = sum(score < threshold for score, i in zip(best, ids, strict=True) if i < 0)
        return kept, rejected

    kept, rejected = count(calibration.threshold)
    assert calibration.kept_known == kept / num_known >= target - 1e-12
    assert calibration.rejected_unknown == rejected / 40
    allowed = [t for t in [*best, 1.0] if count(t)[0] / num_known >= target - 1e-12]
    assert rejected == max(count(t)[1] for t in allowed)


def test_a_threshold_lies_between_scores_so_that_rounding_changes_nothing() -> None:
    scores, ids = make_scores(40, 40)
    calibration = fit(scores, ids)
    best = calibrated_scores(scores, calibration.temperature).max(axis=1)
    above, below = (
        best[best >= calibration.threshold].min(),
        best[best < calibration.threshold].max(),
    )
    assert calibration.threshold == pytest.approx((above + below) / 2)


def test_without_unknown_videos_nothing_is_said_about_them() -> None:
    scores, ids = make_scores(20)
    calibration = fit(scores, ids)
    assert calibration.rejected_unknown is None
    assert (calibration.num_known, calibration.num_unknown) == (20, 0)
    assert calibration.kept_known == 0.95


def test_scores_that_are_all_the_same_keep_every_video() -> None:
    calibration = fit(np.full((6, 4), 0.25, np.float32), np.zeros(6, np.int64))
    assert calibration.kept_known == 1.0


def test_scores_that_underflowed_to_0_can_be_calibrated() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    calibration = fit(scores, np.array([0, 1, 1]))
    assert np.isfinite(calibrated_scores(scores, calibration.temperature)).all()


def test_the_calibration_error_is_the_weighted_gap_of_15_bins() -> None:
    scores, ids = make_scores(300)
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [n for n in range(300) if low < scores[n].max() <= high]
        if inside:
            confidence = sum(float(scores[n].max()) for n in inside) / len(inside)
            accuracy = sum(int(scores[n].argmax() == ids[n]) for n in inside) / len(inside)
            total += abs(confidence - accuracy) * len(inside) / 300
    assert expected_calibration_error(scores, ids) == pytest.approx(total, abs=1e-6)


def test_an_answer_without_a_label_is_unknown() -> None:
    assert Answer(None, 0.2, 0.5).is_unknown
    assert not Answer("run", 0.7, 0.5).is_unknown


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scores": np.ones((4, 3), np.float32)}, ShapeError, "do not sum to 1"),
        ({"scores": np.full((4, 3), np.nan)}, ShapeError, "do not sum to 1"),
        ({"scores": np.ones(4)}, ShapeError, r"expected floating-point .* \(N, C\)"),
        ({"scores": np.ones((4, 1))}, ValueError, "one label, whose score is always 1"),
        ({"ids": np.zeros(3, np.int64)}, ShapeError, r"expected \(4,\) and int64"),
        ({"ids": np.zeros(4, np.int32)}, ShapeError, r"expected \(4,\) and int64"),
        ({"ids": np.full(4, 3)}, ShapeError, "expected ids from 0 to 2, or -1"),
        ({"ids": np.full(4, -2)}, ShapeError, "expected ids from 0 to 2, or -1"),
        ({"ids": np.full(4, UNKNOWN)}, ValueError, "give some that do, to fit to"),
        ({"target_kept": 0.0}, ValueError, "above 0 and at most 1"),
        ({"target_kept": 1.5}, ValueError, "above 0 and at most 1"),
        ({"target_kept": math.nan}, ValueError, "above 0 and at most 1"),
        ({"method": "independent"}, ValueError, "choose template-softmax or mean-embedding"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    given = {"scores": np.full((4, 3), 1 / 3), "ids": np.zeros(4, np.int64), **change}
    if given["scores"].shape == (4, 1):
        given["ids"] = np.zeros(4, np.int64)
    with pytest.raises(error, match=match):
        fit(given.pop("scores"), given.pop("ids"), **given)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        calibrated_scores(np.full((1, 2), 0.5), temperature)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kept_known", math.nan), ("error_after", math.inf), ("num_known", 10**30), ("num_known", -1)],
)
def test_a_calibration_has_possible_numbers(field: str, value: float) -> None:
    fields = {"temperature": 1.0, "threshold": 0.5, "method": "template-softmax", "views": "1x1"}
    fields |= {"visual_sha256": "0" * 64, "target_kept": 0.95, "kept_known": 0.95}
    fields |= {"rejected_unknown": None, "num_known": 10, "num_unknown": 0}
    fields |= {"error_before": 0.1, "error_after": 0.1}
    Calibration(**fields)
    with pytest.raises(ValueError, match=rf"{field} is .*; it must be from 0 to 1"):
        Calibration(**{**fields, field: value})
