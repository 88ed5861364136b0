"""Which samples and which texts make up the batches of a run, and their loading.

The order of an epoch, the seeds of its samples and their texts follow from the seed of the run
and the number of the epoch. So the state of the sampler is the number of batches that are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.train.data import ClipDataset, ClipSample, SampleKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_TEXT_STREAM = 1  # keeps the draw of a text apart from the dataset's own draws


class Batch(NamedTuple):
    """The clips of one process and their texts.

    Attributes:
        frames: uint8, shape (B, T, 3, S, S).
        prompts: Number of the text among the K * C prompts, template-major, int64, shape (B,).
        video_labels: Which labels a video has, bool, shape (B, C).
        text_labels: Which label a text names, bool, shape (B, C).
        asked: Indices of the samples that were asked for, int64, shape (B,).
        given: Indices of the samples that came, int64, shape (B,).
    """

    frames: Tensor
    prompts: Tensor
    video_labels: Tensor
    text_labels: Tensor
    asked: Tensor
    given: Tensor


@dataclass(frozen=True)
class Sharding:
    """How the batches of a run are divided.

    Attributes:
        batch_size: Clips of a batch over all processes.
    """

    batch_size: int
    num_processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.num_processes:
            raise TrainingError(
                f"run.batch_size is {self.batch_size}, which {self.num_processes} processes "
                f"cannot share evenly; give a multiple of {self.num_processes}."
            )

    def count_batches(self, num_samples: int) -> int:
        """Batches of an epoch; the samples that are left over are too few for another."""
        if num_samples < self.batch_size:
            raise TrainingError(
                f"run.batch_size is {self.batch_size} and there are {num_samples} training "
                "videos; give a smaller batch or more videos."
            )
        return num_samples // self.batch_size

    def own_part(self, batch: Sequence[SampleKey]) -> list[SampleKey]:
        """The part of a batch that this process has; parts follow each other by process."""
        size = self.batch_size // self.num_processes
        return list(batch[self.process * size : (self.process + 1) * size])


class TrainingBatches(Sampler[list[SampleKey]]):
    """The keys of this process for the batches of a run, epochs one after the other.

    Every epoch has each sample at most once; the last samples, too few for a batch, are left out.

    Args:
        seed: Of order, samples and texts.
        first: Number of the batch to begin with, over all epochs.
        last: Number of the batch to end before.
    """

    def __init__(
        self, num_samples: int, sharding: Sharding, *, seed: int, first: int, last: int
    ) -> None:
        self._num_samples = num_samples
        self._sharding = sharding
        self._seed = seed
        self._numbers = range(first, last)
        self._per_epoch = sharding.count_batches(num_samples)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Give the keys batch by batch."""
        epoch, keys = -1, list[SampleKey]()
        size = self._sharding.batch_size
        for number in self._numbers:
            if epoch != number // self._per_epoch:
                epoch = number // self._per_epoch
                keys = _epoch_keys(self._num_samples, self._seed, epoch)
            start = number % self._per_epoch * size
            yield self._sharding.own_part(keys[start : start + size])


def _epoch_keys(num_samples: int, seed: int, epoch: int) -> list[SampleKey]:
    random = np.random.default_rng([seed, epoch])
    order: list[int] = random.permutation(num_samples).tolist()
    seeds = random.integers(1 << 63, size=num_samples, dtype=np.int64, endpoint=False).tolist()
    return [SampleKey(index, draw) for index, draw in zip(order, seeds, strict=True)]


class _Prompted(NamedTuple):
    sample: ClipSample
    template: int
    label: int
    asked: int


class _PromptedClips(Dataset[_Prompted]):
    """Adds a text to each sample: one of its labels in one of the templates."""

    def __init__(self, clips: ClipDataset, num_templates: int) -> None:
        self._clips = clips
        self._num_templates = num_templates

    def __getitem__(self, key: SampleKey) -> _Prompted:
        sample = self._clips[key]
        random = np.random.default_rng([key.seed, _TEXT_STREAM])
        template = int(random.integers(self._num_templates))
        label = sample.label_ids[int(random.integers(len(sample.label_ids)))]
        return _Prompted(sample, template, label, key.index)


class _Collate:
    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels

    def __call__(self, items: Sequence[_Prompted]) -> Batch:
        labels = torch.tensor([item.label for item in items])
        templates = torch.tensor([item.template for item in items])
        video_labels = torch.zeros(len(items), self._num_labels, dtype=torch.bool)
        for row, item in enumerate(items):
            video_labels[row, list(item.sample.label_ids)] = True
        return Batch(
            frames=torch.stack([item.sample.frames for item in items]),
            prompts=templates * self._num_labels + labels,
            video_labels=video_labels,
            text_labels=torch.nn.functional.one_hot(labels, self._num_labels).bool(),
            asked=torch.tensor([item.asked for item in items]),
            given=torch.tensor([item.sample.index for item in items]),
        )


def load_batches(
    clips: ClipDataset,
    keys: Iterable[list[SampleKey]],
    *,
    num_templates: int,
    num_labels: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterable[Batch]:
    """Load batches, ahead of their use where there are workers.

    Args:
        pin_memory: Whether batches are put where a GPU copies them from at once.
    """
    loader: Any = DataLoader(
        _PromptedClips(clips, num_templates),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_Collate(num_labels),
        pin_memory=pin_memory,
        # Its own generator: the loader would take a number from the global one at each start,
        # and a run that was resumed has one start more.
        generator=torch.Generator(),
    )
    batches: Iterable[Batch] = loader
    return batches
