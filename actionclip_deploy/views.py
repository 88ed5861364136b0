"""From an open video to the input of a graph: samples the views, reads, resizes, crops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import VideoError, VideoWarning
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.sampling import Views, sample_views
from actionclip_deploy.video import Clip

# Bounds memory: a decoded frame of 1080p has 6 MB.
FRAMES_PER_READ = 32


class FrameSource(Protocol):
    """Where frames are read from: a `video.VideoReader`, or what looks like one."""

    @property
    def num_frames(self) -> int:
        """Frames there are, N."""
        ...

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, shape (N,)."""
        ...

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        ...


class ReadingStoppedError(Exception):
    """Nobody wants the frames any more; never leaves the pipeline."""


class Stopwatch:
    """Adds up wall-clock time by stage."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block as that of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._stages[name] = self._stages.get(name, 0.0) + seconds

    def timings_ms(self, *, total_is_sum: bool = False) -> dict[str, float]:
        """Milliseconds by stage, and `total`: since the start, or the sum of the stages."""
        total = time.perf_counter() - self._start
        if total_is_sum:
            total = sum(self._stages.values())
        return {
            name: round(seconds * 1e3, 3)
            for name, seconds in {**self._stages, "total": total}.items()
        }


@dataclass(eq=False)
class VideoFrames:
    """The preprocessed frames of one video, each wanted one once. V views of T frames.

    Attributes:
        video: What the video is called.
        stopwatch: Times the stages, those to come as well.
        indices: Frames of each clip, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T).
        pixels: Distinct frames, those of each crop in a row, uint8, shape (F, S, S, 3).
        views: Rows of `pixels` that each view is made of, shape (V, T).
        warnings: What was found damaged on the way.
        error: Why there are no frames; then the arrays are empty.
    """

    video: Path
    stopwatch: Stopwatch
    indices: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    pts_seconds: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    views: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    warnings: list[VideoWarning] = field(default_factory=list)
    error: VideoError | None = None


@dataclass(frozen=True)
class ViewReader:
    """Reads the views of videos as a model takes them.

    Attributes:
        manifest: Of the model's bundle.
        sampled: Clips and crops per video.
        region: See `preprocess.preprocess_frames`.
    """

    manifest: Manifest
    sampled: Views
    region: Region

    def read(
        self,
        source: FrameSource,
        video: Path,
        stopwatch: Stopwatch,
        stop: Event | None = None,
    ) -> VideoFrames:
        """Sample the clips and read them; again if damage found on the way left fewer frames.

        Args:
            source: Where frames are read from.
            video: What it is called.
            stopwatch: Gets the stages `read` and `preprocess`.
            stop: Once set, reading ends at the next chance.

        Raises:
            VideoError: If a frame cannot be read.
            ReadingStoppedError: If `stop` was set.
        """
        model = self.manifest.model
        while True:
            num_video_frames = source.num_frames
            indices = sample_views(num_video_frames, model.num_frames, self.sampled.num_clips)
            distinct = np.unique(indices)
            crops = self._read_distinct(source, distinct, stopwatch, stop)
            if source.num_frames == num_video_frames:
                break
        num_crops, num_distinct = crops.shape[:2]
        places = np.searchsorted(distinct, indices)
        return VideoFrames(
            video=video,
            stopwatch=stopwatch,
            indices=indices,
            pts_seconds=source.pts_seconds[indices],
            pixels=crops.reshape(num_crops * num_distinct, *crops.shape[2:]),
            views=np.concatenate([crop * num_distinct + places for crop in range(num_crops)]),
        )

    def _read_distinct(
        self,
        source: FrameSource,
        wanted: NDArray[np.int64],
        stopwatch: Stopwatch,
        stop: Event | None,
    ) -> NDArray[np.uint8]:
        """Read each wanted frame once; gives (num_crops, number of distinct frames, S, S, 3)."""
        parts = []
        for start in range(0, len(wanted), FRAMES_PER_READ):
            if stop is not None and stop.is_set():
                raise ReadingStoppedError
            with stopwatch.stage("read"):
                clip = source.read(wanted[start : start + FRAMES_PER_READ])
            with stopwatch.stage("preprocess"):
                part = preprocess_frames(
                    clip.frames,
                    input_size=self.manifest.model.input_size,
                    resize_size=self.manifest.preprocessing.resize_size,
                    interpolation=self.manifest.preprocessing.interpolation,
                    num_crops=self.sampled.num_crops,
                    region=self.region,
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
