"""What a run learns from: clips of annotated videos, decoded as deployment decodes them.

All that is random about a sample is a function of the seed in its key, so the number of loader
workers and processes, and a stop and a start in between, change nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actionclip_deploy.errors import LabelError, VideoError
from actionclip_deploy.evaluate.annotations import (
    Sample,
    Subset,
    labels_of_folders,
    read_annotations,
    score_method_of,
)
from actionclip_deploy.evaluate.frames import FrameCache, open_frames
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.model import ModelConfig, load_checkpoint
from actionclip_deploy.prompts import (
    LABEL_ONLY,
    TEMPLATES,
    check_labels,
    check_templates,
    read_labels,
    read_templates,
)
from actionclip_deploy.records import counted
from actionclip_deploy.sampling import sample_random_segments, sample_segments
from actionclip_deploy.train.augmentation import Augmentation, crop_centre, resize_size
from actionclip_deploy.video import MAX_PIXELS
from actionclip_deploy.video.border import check_path, is_missing

if TYPE_CHECKING:
    from torch import Tensor

    from actionclip_deploy.train.run_config import DataSection, ModelSection, TrainConfig
    from actionclip_deploy.views import FrameSource

logger = logging.getLogger(__name__)

Problem = Literal["missing", "unreadable", "too short"]

# Keeps the draws of a dataset apart from those of the text of a sample, which has stream 1.
_STREAM = 0
_MAX_TRIES = 10
_NUM_TIMED = 50  # videos whose length is looked at
_LISTED = 10  # bad videos in a message


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
        index: Of the sample that this is. It differs from the one asked for where a dataset
            replaces a video that cannot be read.
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
        """One sample."""
        ...

    def typical_seconds(self) -> float | None:
        """How long the videos are, the median of some; None where they have no times."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples to learn from, C labels, K templates, and samples to measure on, or None.

    `scores` is how the latter are scored; None for the original's way.

    A `LabelError` refuses labels and templates that cannot be used.
    """

    training: ClipDataset
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    validation: ClipDataset | None = None
    scores: ScoreMethod | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels)
        check_templates(self.templates)


def open_training_data(config: TrainConfig) -> TrainingData:
    """Open the videos, labels and templates that a configuration names.

    With `bad_videos: fail` every video is opened first, so that the run fails at its start and
    lists all of them; with `skip`, missing ones are left out, and others are replaced on the way.

    Raises:
        LabelError: If labels, templates or annotations cannot be used.
        VideoError: If a video cannot be used and that is to end the run, or none can.
        CheckpointError: If the checkpoint to start from cannot be read.
    """
    section = config.data
    labels = _read_labels(section)
    size = _input_size(config.model)
    clips = partial(
        VideoClips,
        num_frames=config.model.num_frames,
        input_size=size,
        bad_videos=section.bad_videos,
        min_frames=section.min_frames,
        cache=open_cache(section, size),
        max_pixels=section.max_pixels,
    )
    training = _usable(section, _read_samples(section, labels, "train"))
    if section.few_shot is not None:
        training = draw_few_shot(training, section.few_shot, seed=config.run.seed)
    validation = scores = None
    if section.validation is not None:
        listed = _read_samples(section, labels, "test")
        scores = score_method_of(listed)
        validation = clips(_usable(section, listed))
    templates = TEMPLATES
    if section.label_only:
        templates = LABEL_ONLY
    elif section.templates is not None:
        templates = read_templates(section.templates)
    return TrainingData(
        training=clips(
            training,
            sampling=section.sampling,
            augmentation=Augmentation(section.augmentation, labels=labels, input_size=size),
        ),
        labels=labels,
        templates=templates,
        validation=validation,
        scores=scores,
    )


def open_cache(section: DataSection, input_size: int) -> FrameCache | None:
    """Open the cache that a configuration names, for frames of a model's input size."""
    if section.cache is None:
        return None
    return FrameCache(section.cache, short_side=resize_size(input_size))


def _input_size(section: ModelSection) -> int:
    """Height and width of the frames that the model of a configuration takes."""
    if section.sizes is not None:
        return section.sizes.input_size
    if section.backbone is not None:
        return ModelConfig.from_open_clip(section.backbone).input_size
    assert section.checkpoint is not None, "the section has exactly one of the three"
    loaded = load_checkpoint(
        section.checkpoint,
        family=section.family,
        num_frames=section.num_frames,
        base=section.base,
        visual_prompt=section.visual_prompt,
        new_prompt=section.new_prompt,
        with_classifier=True,
    )
    return loaded.model.config.input_size


def _read_labels(section: DataSection) -> tuple[str, ...]:
    if section.labels is not None:
        return read_labels(section.labels)
    if _format_of(section, section.annotations) != "folders":
        raise LabelError(
            f"data.labels is missing, and {section.annotations} is not a folder with a folder of "
            "videos for each label; give a label file."
        )
    return labels_of_folders(section.annotations)


def _format_of(section: DataSection, path: Path) -> str:
    # A list of videos, which is the default, cannot be a folder.
    is_folder = section.format == "videos" and path.is_dir()
    return "folders" if is_folder else section.format


def _read_samples(section: DataSection, labels: Sequence[str], subset: Subset) -> list[Sample]:
    path = section.annotations if subset == "train" else section.validation
    assert path is not None, "asked for only where there is one"
    return read_annotations(
        path,
        labels,
        format=_format_of(section, path),
        root=section.root,
        subset=subset,
        split=section.split,
        image_template=section.image_template,
        index_bias=section.index_bias,
    )


def _usable(section: DataSection, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    labelled = [sample for sample in samples if sample.label_ids]
    if len(labelled) < len(samples):
        logger.info("%d videos of a list have no label", len(samples) - len(labelled))
    return screen_samples(
        labelled,
        bad_videos=section.bad_videos,
        min_frames=section.min_frames,
        open_videos=section.bad_videos == "fail",
        max_pixels=section.max_pixels,
    ).samples


class VideoClips:
    """Clips of annotated videos, each with a label at least: a `ClipDataset`.

    A clip is a function of its key. Where a video gives no frames, another one drawn by the same
    key is given in its place, or the error is raised.

    Args:
        augmentation: What is done to frames; None for the resize and crop of deployment.
        bad_videos: "skip" replaces a video that cannot be read by another one.
        min_frames: A video with fewer frames counts as one that cannot be read.
        max_pixels: So does a video with frames of more pixels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        num_frames: int,
        input_size: int,
        sampling: Literal["random", "centre"] = "centre",
        augmentation: Augmentation | None = None,
        bad_videos: Literal["skip", "fail"] = "skip",
        min_frames: int = 1,
        cache: FrameCache | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.samples = tuple(samples)
        self._num_frames = num_frames
        self._input_size = input_size
        self._sampling = sampling
        self._augmentation = augmentation
        self._bad_videos = bad_videos
        self._min_frames = min_frames
        self._cache = cache
        self._max_pixels = max_pixels
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey) -> ClipSample:
        """One clip."""
        rng = np.random.default_rng([key.seed, _STREAM])
        index = key.index
        for _ in range(_MAX_TRIES):
            try:
                return ClipSample(self._read(index, rng), self.samples[index].label_ids, index)
            except VideoError as exc:
                if self._bad_videos == "fail":
                    raise
                if index not in self._warned:
                    self._warned.add(index)
                    logger.warning("A video is replaced by another one: %s", exc)
            index = int(rng.integers(len(self.samples)))
        raise VideoError(
            f"{self.samples[key.index].path} gives no frames, and neither do {_MAX_TRIES - 1} "
            "videos in its place; check the folder of the videos."
        )

    def typical_seconds(self) -> float | None:
        """How long the videos are, the median of some; None where they have no times.

        It is the window that a stream is best looked at through, since a clip is made of all of
        its video.
        """
        places = np.linspace(0, len(self.samples) - 1, _NUM_TIMED).astype(int)
        lengths = [self._seconds(index) for index in dict.fromkeys(places.tolist())]
        known = [seconds for seconds in lengths if seconds]
        return round(float(np.median(known)), 3) if known else None

    def _seconds(self, index: int) -> float | None:
        """From the first frame of a video until one frame after the last."""
        try:
            with open_frames(
                self.samples[index],
                min_frames=self._min_frames,
                cache=self._cache,
                max_pixels=self._max_pixels,
            ) as source:
                seconds = source.pts_seconds
        except VideoError:
            return None
        if len(seconds) < 2 or np.isnan(seconds).any():
            return None
        return float(np.ptp(seconds)) * len(seconds) / (len(seconds) - 1)

    def _read(self, index: int, rng: np.random.Generator) -> Tensor:
        sample = self.samples[index]
        with open_frames(
            sample, min_frames=self._min_frames, cache=self._cache, max_pixels=self._max_pixels
        ) as source:
            frames = self._sample(source, rng)
        changed = self._change(frames, rng)
        return torch.from_numpy(np.ascontiguousarray(changed.transpose(0, 3, 1, 2)))

    def _sample(self, source: FrameSource, rng: np.random.Generator) -> NDArray[np.uint8]:
        while True:
            count = source.num_frames
            if self._sampling == "random":
                places = sample_random_segments(count, self._num_frames, rng)
            else:
                places = sample_segments(count, self._num_frames)
            clip = source.read(places)
            if source.num_frames == count:  # or damage was found, and there are fewer
                return clip.frames

    def _change(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        if self._augmentation is not None:
            return self._augmentation(frames, rng)
        return crop_centre(frames, self._input_size)


def draw_few_shot(samples: Sequence[Sample], per_label: int, *, seed: int) -> tuple[Sample, ...]:
    """Draw K videos of each label, as in the paper's figure 3.

    A label with fewer videos gives all it has, and a warning is logged. A video with several
    labels that was drawn for one of them counts for the others as well.
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
            "There are fewer than %d videos of %s, the first of them label %d with %d",
            per_label,
            counted(len(few), "label"),
            few[0],
            counts[few[0]],
        )
    return tuple(samples[index] for index in sorted(drawn))


@dataclass(frozen=True)
class BadVideo:
    """A video that cannot be used."""

    path: Path
    problem: Problem
    reason: str


@dataclass(frozen=True)
class Screening:
    """The samples that can be used, and the videos of the others, each once."""

    samples: tuple[Sample, ...]
    bad: tuple[BadVideo, ...]

    def describe(self) -> str:
        """How many cannot be used, why, and which; all in one sentence."""
        counts = Counter(video.problem for video in self.bad)
        counted = ", ".join(f"{count} {problem}" for problem, count in counts.items())
        listed = ", ".join(f"{video.path} ({video.problem})" for video in self.bad[:_LISTED])
        more = f" and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
        return f"{len(self.bad)} videos cannot be used ({counted}): {listed}{more}"


def screen_samples(
    samples: Sequence[Sample],
    *,
    bad_videos: Literal["skip", "fail"] = "skip",
    min_frames: int = 1,
    open_videos: bool = False,
    max_pixels: int = MAX_PIXELS,
    threads: int = 8,
) -> Screening:
    """Sort out samples whose videos cannot be used, and report all of them at once.

    Args:
        bad_videos: "skip" leaves them out and logs one warning; "fail" raises.
        open_videos: Whether each video is opened, which reads it once. Without that only
            missing ones are found, and those that the annotation says to be too short.

    Raises:
        VideoError: If a video cannot be used and that is to fail, or none can.
    """
    with ThreadPoolExecutor(threads) as pool:
        find = partial(
            _find_problem, min_frames=min_frames, open_videos=open_videos, max_pixels=max_pixels
        )
        found = list(pool.map(find, samples))
    bad = {video.path: video for video in found if video is not None}
    kept = tuple(s for s, video in zip(samples, found, strict=True) if video is None)
    screening = Screening(kept, tuple(bad.values()))
    if bad and (bad_videos == "fail" or not kept):
        raise VideoError(f"{screening.describe()}; correct the list or the folder it starts from.")
    if bad:
        logger.warning("%s; they are left out", screening.describe())
    return screening


def _find_problem(
    sample: Sample, *, min_frames: int, open_videos: bool, max_pixels: int
) -> BadVideo | None:
    path = sample.path
    try:
        check_path(path, is_folder=sample.image_template is not None)
    except VideoError as exc:
        return BadVideo(path, "missing" if is_missing(exc) else "unreadable", str(exc))
    if sample.num_frames is not None and sample.num_frames < min_frames:
        return BadVideo(path, "too short", f"it is said to have {sample.num_frames} frames")
    if not open_videos:
        return None
    try:
        with open_frames(sample, min_frames=0, max_pixels=max_pixels) as frames:
            if frames.num_frames < min_frames:
                return BadVideo(path, "too short", f"it has {frames.num_frames} frames")
            frames.read(np.zeros(1, np.int64))
    except VideoError as exc:
        return BadVideo(path, "unreadable", str(exc))
    return None
