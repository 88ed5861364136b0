"""Accuracy against labels: top-k, per class, average precision, confusion, and how sure it is.

Letters: N videos, C labels. Targets say which labels a video has, bool, shape (N, C). Among equal
scores the lower id comes first, as in `scoring.top_k`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.motions import ORDER_PAIRS, MotionLabel, all_labels, labels

Scores: TypeAlias = NDArray[np.floating[Any]]
Targets: TypeAlias = NDArray[np.bool_]

TOP_K = (1, 5)


@dataclass(frozen=True, eq=False)
class Metrics:
    """What was measured.

    Attributes:
        num_videos: N, those without a label left out.
        top1: Share of videos with one of their labels ranked first.
        top1_interval: 95% Wilson interval of `top1`.
        top5: Share with one of their labels among the first five.
        mean_class_accuracy: Mean of `class_accuracy` over the labels that some video has.
        mean_average_precision: Mean of `class_average_precision` over the same.
        class_count: Videos with each label, int64, shape (C,).
        class_accuracy: Share of a label's videos with one of their labels ranked first, shape
            (C,); NaN where no video has the label.
        class_average_precision: Average precision of each label's ranking of the videos, shape
            (C,); NaN likewise.
        confusion: Videos by label and by the label ranked first, int64, shape (C, C); None where
            a video has several labels.
    """

    num_videos: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    mean_class_accuracy: float
    mean_average_precision: float
    class_count: NDArray[np.int64]
    class_accuracy: NDArray[np.float64]
    class_average_precision: NDArray[np.float64]
    confusion: NDArray[np.int64] | None

    def summary(self) -> dict[str, Any]:
        """The numbers that stand for all videos, as JSON."""
        return {
            "num_videos": self.num_videos,
            "top1": self.top1,
            "top1_interval": list(self.top1_interval),
            "top5": self.top5,
            "mean_class_accuracy": self.mean_class_accuracy,
            "mean_average_precision": self.mean_average_precision,
        }

    def per_class(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The numbers of each label, as JSON; null where no video has it."""
        columns = (self.class_count, self.class_accuracy, self.class_average_precision)
        return [
            {
                "label": label,
                "num_videos": int(count),
                "accuracy": _number_or_none(accuracy),
                "average_precision": _number_or_none(precision),
            }
            for label, count, accuracy, precision in zip(labels, *columns, strict=True)
        ]


def measure(scores: Scores, targets: Targets) -> Metrics:
    """Measure scores against labels.

    Videos without any label are left out: they would count as wrong whatever their scores.

    Raises:
        ShapeError: If the two do not fit together, no video has a label, or a score is not finite.
    """
    _check(scores, targets)
    has_label = targets.any(axis=1)
    scores, targets = scores[has_label], targets[has_label]
    if not len(scores):
        raise ShapeError("No video has a label; give annotations that name the labels.")
    hits = hits_at(scores, targets, 1)
    accuracy = class_accuracy(scores, targets)
    rankings = zip(scores.T, targets.T, strict=True)
    precision = np.array([average_precision(*ranking) for ranking in rankings])
    return Metrics(
        num_videos=len(scores),
        top1=float(hits.mean()),
        top1_interval=wilson_interval(int(hits.sum()), len(hits)),
        top5=float(hits_at(scores, targets, 5).mean()),
        mean_class_accuracy=float(np.nanmean(accuracy)),
        mean_average_precision=float(np.nanmean(precision)),
        class_count=targets.sum(axis=0, dtype=np.int64),
        class_accuracy=accuracy,
        class_average_precision=precision,
        confusion=confusion_matrix(scores, targets) if (targets.sum(axis=1) == 1).all() else None,
    )


def hits_at(scores: Scores, targets: Targets, k: int) -> NDArray[np.bool_]:
    """Which videos have one of their labels among the k best, shape (N,)."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    hits = np.take_along_axis(targets, best, axis=1).any(axis=1)
    return np.asarray(hits, np.bool_)


def class_accuracy(scores: Scores, targets: Targets) -> NDArray[np.float64]:
    """Share of each label's videos with one of their labels ranked first, shape (C,)."""
    hits = hits_at(scores, targets, 1)
    counts = targets.sum(axis=0)
    correct = (targets & hits[:, np.newaxis]).sum(axis=0)
    shares = np.full(len(counts), np.nan)
    np.divide(correct, counts, out=shares, where=counts > 0)
    return shares


def confusion_matrix(scores: Scores, targets: Targets) -> NDArray[np.int64]:
    """Count videos by their label (row) and the label ranked first (column), shape (C, C).

    Args:
        targets: Shape (N, C), one label for each video.
    """
    num_labels = scores.shape[1]
    cells = targets.argmax(axis=1) * num_labels + scores.argmax(axis=1)
    return np.bincount(cells, minlength=num_labels**2).reshape(num_labels, num_labels)


def average_precision(scores: Scores, targets: Targets) -> float:
    """Average precision of one label's ranking of the videos.

    The sum over thresholds of precision x gained recall, equal scores being one threshold: the
    definition of scikit-learn. Without equal scores it is also that of Charades, the mean over
    the label's videos of the precision at their rank. Charades puts videos without any label
    last, which equals leaving them out, as `measure` does.

    Args:
        scores: Of the label for each video, shape (N,).
        targets: Whether a video has the label, shape (N,); NaN comes of none that has.

    Source:
        Charades_v1_classify.m of the Charades benchmark, as the authors of
        gsig/charades-algorithms put it in Python; scikit-learn, average_precision_score.
    """
    num_positive = int(targets.sum())
    if not num_positive:
        return math.nan
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(targets[order])
    ranked = scores[order]
    # The last rank of each run of equal scores.
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    gained = np.diff(found[ends], prepend=0)
    return float((found[ends] / (ends + 1) * gained).sum() / num_positive)


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share of which a sample is known; they stay within 0 and 1.

    Args:
        confidence: Probability with which such an interval holds the true share, in (0, 1).

    Source:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"successes is {successes} of {total}; give 0 to total, and total >= 1.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = share + z**2 / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def _check(scores: Scores, targets: Targets) -> None:
    if scores.ndim != 2 or targets.shape != scores.shape or targets.dtype != np.bool_:
        raise ShapeError(
            f"scores have shape {scores.shape} and targets {targets.shape} ({targets.dtype}); "
            "expected (N, C) for both, and targets of bool."
        )
    if not np.isfinite(scores).all():
        raise ShapeError("A score is not a finite number; check the runtime with verify.")


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


# What a model gets right and wrong of `motions`: shape, colour, motion, and order of frames.


_OPPOSITES = {a: b for pair in ORDER_PAIRS for a, b in (pair, pair[::-1])}


def measure_motions(
    scores: NDArray[np.floating[Any]], label_ids: Sequence[int]
) -> dict[str, float | dict[str, float]]:
    """Measure scores of videos of `motions`.

    Args:
        scores: Shape (N, C), C labels in the order of `all_labels`.

    Returns:
        Shares of the videos: `top1`; `shape`, `colour` and `motion`, where that word of the first
        label is right; `order`, where of the label and the same with the motion played backwards
        the right one has the higher score, among the videos whose motion can be played backwards
        (chance is 0.5), and `order_pairs`, the same for each two. A label of which only one
        direction occurs in training is left out there: the other ranks low for that alone.
        `top1_of_held_out`, where only
        the labels that never occur in training are ranked, among the videos that show one.
    """
    shown = all_labels()
    ids = np.asarray(label_ids)
    best = scores.argmax(axis=1)
    words = np.array(shown)
    right = words[best] == words[ids]  # (N, 3)
    measured: dict[str, float | dict[str, float]] = {
        "top1": float((best == ids).mean()),
        **{name: float(right[:, k].mean()) for k, name in enumerate(MotionLabel._fields)},
        **_measure_order(scores, ids),
    }
    held_out = np.array(sorted(shown.index(label) for label in labels("heldout")))
    unseen = np.isin(ids, held_out)
    if unseen.any():
        ranked = held_out[scores[unseen][:, held_out].argmax(axis=1)]
        measured["top1_of_held_out"] = float((ranked == ids[unseen]).mean())
    return measured


def _measure_order(
    scores: NDArray[np.floating[Any]], ids: NDArray[np.int64]
) -> dict[str, float | dict[str, float]]:
    shown = all_labels()
    numbers = {label: number for number, label in enumerate(shown)}
    held_out = set(labels("heldout"))
    hits: dict[str, list[bool]] = {}
    for row, number in zip(scores, ids.tolist(), strict=True):
        label = shown[number]
        if label.motion not in _OPPOSITES:
            continue
        other = label._replace(motion=_OPPOSITES[label.motion])
        if (label in held_out) == (other in held_out):
            pair = next(" / ".join(pair) for pair in ORDER_PAIRS if label.motion in pair)
            hits.setdefault(pair, []).append(bool(row[number] > row[numbers[other]]))
    if not hits:
        return {}
    return {
        "order": float(np.mean([hit for found in hits.values() for hit in found])),
        "order_pairs": {pair: float(np.mean(found)) for pair, found in sorted(hits.items())},
    }
