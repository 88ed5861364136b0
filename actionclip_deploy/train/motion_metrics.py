"""What a model gets right and wrong of `motions`: shape, colour, motion, and order of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.motions import ORDER_PAIRS, MotionLabel, all_labels, labels

_OPPOSITES = {a: b for pair in ORDER_PAIRS for a, b in (pair, pair[::-1])}


def measure_motions(
    scores: NDArray[np.floating[Any]], label_ids: Sequence[int]
) -> dict[str, float | dict[str, float]]:
    """Measure scores of videos of `motions`.

    Args:
        scores: Shape (N, C), C labels in the order of `all_labels`.
        label_ids: The label of each video, N.

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
