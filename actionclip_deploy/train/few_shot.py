"""Subsets with a few videos of each label, as in the paper's figure 3."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from actionclip_deploy.train.annotation_files import Sample

logger = logging.getLogger(__name__)


def draw_few_shot(samples: Sequence[Sample], per_label: int, *, seed: int) -> tuple[Sample, ...]:
    """Draw K videos of each label.

    A label with fewer videos gives all it has, and a warning is logged. A video with several
    labels that was drawn for one of them counts for the others as well.

    Args:
        samples: Videos with labels.
        per_label: K.
        seed: The same seed draws the same videos from the same list.

    Returns:
        The drawn ones in the order of `samples`.
    """
    rng = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    drawn = []
    for index in rng.permutation(len(samples)).tolist():
        labels = samples[index].label_ids
        if any(counts.get(label, 0) < per_label for label in labels):
            drawn.append(index)
            for label in labels:
                counts[label] = counts.get(label, 0) + 1
    few = sorted(label for label, count in counts.items() if count < per_label)
    if few:
        logger.warning(
            "%d labels have fewer than %d videos, the first of them label %d with %d",
            len(few),
            per_label,
            few[0],
            counts[few[0]],
        )
    return tuple(samples[index] for index in sorted(drawn))
