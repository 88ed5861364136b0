"""Annotated videos as samples, decoded as deployment decodes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actionclip_deploy.errors import VideoError
from actionclip_deploy.evaluate.frames import open_frames
from actionclip_deploy.model import ModelConfig, load_checkpoint
from actionclip_deploy.prompts import LABEL_ONLY, TEMPLATES, read_labels, read_templates
from actionclip_deploy.sampling import sample_random_segments, sample_segments
from actionclip_deploy.train.annotations import Sample, Subset, read_annotations
from actionclip_deploy.train.augmentation import Augmentation, crop_centre, resize_size
from actionclip_deploy.train.few_shot import draw_few_shot
from actionclip_deploy.train.frame_cache import FrameCache
from actionclip_deploy.train.samples import ClipSample, SampleKey, TrainingData
from actionclip_deploy.train.screening import screen_samples

if TYPE_CHECKING:
    from actionclip_deploy.recognizer import FrameSource
    from actionclip_deploy.train.config import TrainConfig
    from actionclip_deploy.train.run_config import DataSection, ModelSection


logger = logging.getLogger(__name__)


# Keeps the draws of a dataset apart from those of the text of a sample, which has stream 1.
_STREAM = 0
_MAX_TRIES = 10


class VideoClips:
    """Clips of annotated videos: a `samples.ClipDataset`.

    A clip is a function of its key. Where a video gives no frames, another one drawn by the same
    key is given in its place, or the error is raised.

    Args:
        samples: The videos, each with a label at least.
        num_frames: T.
        input_size: Height and width of a frame, S.
        sampling: "random" draws one frame from each segment, "centre" takes the middle ones.
        augmentation: What is done to frames; None for the resize and crop of deployment.
        bad_videos: "skip" gives another video in the place of one that cannot be read.
        min_frames: A video with fewer frames counts as one that cannot be read.
        cache: Where decoded frames are kept.
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
    ) -> None:
        self.samples = tuple(samples)
        self._num_frames = num_frames
        self._input_size = input_size
        self._sampling = sampling
        self._augmentation = augmentation
        self._bad_videos = bad_videos
        self._min_frames = min_frames
        self._cache = cache
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey) -> ClipSample:
        """One clip.

        Raises:
            VideoError: If the video gives no frames and errors are to be raised, or neither do
                several others.
        """
        rng = np.random.default_rng([key.seed, _STREAM])
        index = key.index
        for _ in range(_MAX_TRIES):
            try:
                return ClipSample(self._read(index, rng), self.samples[index].label_ids, index)
            except VideoError as exc:
                if self._bad_videos == "fail":
                    raise
                if index not in self._told:
                    self._told.add(index)
                    logger.warning("Another video is taken in the place of one: %s", exc)
            index = int(rng.integers(len(self.samples)))
        raise VideoError(
            f"{self.samples[key.index].path} gives no frames, and neither do {_MAX_TRIES - 1} "
            "videos in its place; check the folder of the videos."
        )

    def _read(self, index: int, rng: np.random.Generator) -> Tensor:
        sample = self.samples[index]
        with open_frames(sample, min_frames=self._min_frames, cache=self._cache) as source:
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


def open_training_data(config: TrainConfig) -> TrainingData:
    """Open the videos, labels and templates that a configuration names.

    With `bad_videos: fail` every video is opened first, so that the run fails at its start and
    tells all of them; with `skip`, missing ones are left out, and others replaced when they come.

    Args:
        config: The configuration; its `data` section says which, and its model the size of
            frames.

    Raises:
        LabelError: If labels, templates or annotations cannot be used.
        VideoError: If a video cannot be used and that is to end the run, or none can.
        CheckpointError: If the checkpoint to start from cannot be read.
    """
    section = config.data
    labels = read_labels(section.labels)
    size = _input_size(config.model)
    num_frames = config.model.num_frames
    cache = open_cache(section, size)
    training = _usable_samples(section, labels, "train")
    if section.few_shot is not None:
        training = draw_few_shot(training, section.few_shot, seed=config.run.seed)
    validation = None
    if section.validation is not None:
        validation = VideoClips(
            _usable_samples(section, labels, "test"),
            num_frames=num_frames,
            input_size=size,
            bad_videos=section.bad_videos,
            min_frames=section.min_frames,
            cache=cache,
        )
    return TrainingData(
        training=VideoClips(
            training,
            num_frames=num_frames,
            input_size=size,
            sampling=section.sampling,
            augmentation=Augmentation(section.augmentation, labels=labels, input_size=size),
            bad_videos=section.bad_videos,
            min_frames=section.min_frames,
            cache=cache,
        ),
        labels=labels,
        templates=_templates(section),
        validation=validation,
    )


def open_cache(section: DataSection, input_size: int) -> FrameCache | None:
    """Open the cache that a configuration names, for frames of a model's input size.

    Raises:
        TrainingError: If its folder cannot be made.
    """
    if section.cache is None:
        return None
    return FrameCache(section.cache, short_side=resize_size(input_size))


def _usable_samples(
    section: DataSection, labels: Sequence[str], subset: Subset
) -> tuple[Sample, ...]:
    path = section.annotations if subset == "train" else section.validation
    assert path is not None, "asked for only where there is one"
    samples = read_annotations(
        path,
        labels,
        format=section.format,
        root=section.root,
        subset=subset,
        split=section.split,
        image_template=section.image_template,
        index_bias=section.index_bias,
    )
    labelled = [sample for sample in samples if sample.label_ids]
    if len(labelled) < len(samples):
        logger.info("%s: %d videos have no label", path, len(samples) - len(labelled))
    return screen_samples(
        labelled,
        bad_videos=section.bad_videos,
        min_frames=section.min_frames,
        open_videos=section.bad_videos == "fail",
    ).samples


def _templates(section: DataSection) -> tuple[str, ...]:
    if section.label_only:
        return LABEL_ONLY
    return read_templates(section.templates) if section.templates is not None else TEMPLATES


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
    )
    return loaded.model.config.input_size
