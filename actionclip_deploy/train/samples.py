"""What a run learns from: samples by key, labels and templates.

All that is random about a sample is a function of the seed in its key, so the number of loader
workers and processes, and a stop and a start in between, change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actionclip_deploy.prompts import check_labels, check_templates

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """Asks for a sample.

    Attributes:
        index: Which one, from 0.
        seed: Of all that is random about it (the frames of the clip, their augmentation), from
            0 to 2^63 - 1.
    """

    index: int
    seed: int


@dataclass(frozen=True, eq=False)
class ClipSample:
    """A clip and its labels.

    Attributes:
        frames: uint8, shape (T, 3, S, S), as the model is to see them but for normalisation.
        label_ids: At least one, each from 0 to C - 1.
        index: Of the sample that this is. It is another than was asked for where a dataset
            gives a readable video in the place of one that cannot be read.
    """

    frames: Tensor
    label_ids: tuple[int, ...]
    index: int


class ClipDataset(Protocol):
    """A map-style dataset: picklable, and drawing from nothing but the seed of the key."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, key: SampleKey) -> ClipSample:
        """One sample.

        Raises:
            VideoError: If it cannot be read and that is to end the run.
        """
        ...


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run learns from.

    Attributes:
        training: Samples to learn from.
        labels: C labels.
        templates: K templates.
        validation: Samples with the same labels to measure on, or None.

    Raises:
        LabelError: If labels or templates cannot be used.
    """

    training: ClipDataset
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    validation: ClipDataset | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels)
        check_templates(self.templates)
