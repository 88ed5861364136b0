"""The whole way: a video file in, ranked labels out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import LabelBankError, VideoError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.sampling import Views, sample_views
from actionclip_deploy.scoring import SCORE_METHODS, average_views, score, top_k
from actionclip_deploy.video import Clip, VideoReader

# Bounds memory: a decoded frame of 1080p has 6 MB, and a ViT-B/16 holds about 10 MB of
# activations for each frame of a call.
FRAMES_PER_READ = 32
FRAMES_PER_CALL = 32
CLIPS_PER_CALL = 8


@dataclass(frozen=True)
class LabelScore:
    """A label and the score that it got, in [0, 1]."""

    label: str
    score: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was recognised in one video.

    Attributes:
        video: The file.
        predictions: The best labels, best first.
        frame_indices: Frames that were used, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T).
        scores: Scores of all labels in the order of the bank, shape (C,), float32.
        timings_ms: Wall-clock milliseconds by stage, and `total`.
    """

    video: Path
    predictions: tuple[LabelScore, ...]
    frame_indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]
    scores: Float32Array
    timings_ms: dict[str, float]


@dataclass(frozen=True)
class FailedVideo:
    """A video that gave no frames, and why."""

    video: Path
    error: VideoError


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


class Recognizer:
    """Scores videos against a label bank.

    It keeps no state between videos, so one may be used from several threads as far as its
    runtime allows.

    Args:
        runtime: An open runtime of the bundle that made the bank.
        bank: The labels to choose from.
        views: Clips and crops per video; their scores are averaged.
        top_k: How many labels a prediction holds; fewer where the bank has fewer.
        method: One of `scoring.SCORE_METHODS`; None takes the manifest's.
        region: `"frame"` resizes as the original does, to the last bit; `"crop"` resizes only
            what the crop keeps, which is faster and differs by one level in few values.

    Raises:
        LabelBankError: If the bank's embeddings have another width than the model's.
        ValueError: If `top_k` or `method` is not allowed.
    """

    def __init__(
        self,
        runtime: Runtime,
        bank: LabelBank,
        *,
        views: Views | None = None,
        top_k: int = 5,
        method: str | None = None,
        region: Region = "frame",
    ) -> None:
        manifest = runtime.manifest
        if bank.embeddings.shape[-1] != manifest.model.embedding_dim:
            raise LabelBankError(
                f"The label bank {bank.name!r} has embeddings of width "
                f"{bank.embeddings.shape[-1]} and the model's are {manifest.model.embedding_dim} "
                "wide; build the bank with this bundle."
            )
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more.")
        method = manifest.scores.method if method is None else method
        if method not in SCORE_METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(SCORE_METHODS)}.")
        if region not in get_args(Region):
            raise ValueError(f"region is {region!r}; it must be 'frame' or 'crop'.")
        self.runtime = runtime
        self.bank = bank
        self.views = views or Views()
        self.top_k = top_k
        self.method = method
        self.region = region

    def predict(self, video: str | Path) -> Prediction:
        """Score one video.

        Raises:
            VideoError: If no frame can be had from the file.
            InferenceError: If the runtime fails.
        """
        stopwatch = _Stopwatch()
        with stopwatch.stage("open"):
            reader = VideoReader(video)
        with reader:
            return self._predict(reader, Path(video), stopwatch)

    def predict_frames(self, source: FrameSource, *, video: str | Path) -> Prediction:
        """Score the frames of a video that is open already, or of what looks like one.

        Args:
            source: Where frames are read from.
            video: What it is called in the prediction.

        Raises:
            VideoError: If a frame cannot be read.
            InferenceError: If the runtime fails.
        """
        return self._predict(source, Path(video), _Stopwatch())

    def _predict(self, source: FrameSource, video: Path, stopwatch: _Stopwatch) -> Prediction:
        indices, frames = self._read_views(source, stopwatch)
        embeddings = self._embed(frames, indices, stopwatch)
        with stopwatch.stage("score"):
            scores = self.score_embeddings(embeddings)
            best, best_scores = top_k(scores[np.newaxis], self.top_k)
        ranked = zip(best[0], best_scores[0], strict=True)
        return Prediction(
            video=video,
            predictions=tuple(LabelScore(self.bank.labels[i], float(s)) for i, s in ranked),
            frame_indices=indices,
            pts_seconds=source.pts_seconds[indices],
            scores=scores,
            timings_ms=stopwatch.timings_ms(),
        )

    def predict_all(self, videos: Iterable[str | Path]) -> Iterator[Prediction | FailedVideo]:
        """Score videos in their order; one that fails is given in its place, and the rest go on."""
        for video in videos:
            try:
                yield self.predict(video)
            except VideoError as exc:
                yield FailedVideo(Path(video), exc)

    def score_embeddings(self, embeddings: Float32Array) -> Float32Array:
        """Score the views of one video.

        Args:
            embeddings: Video embeddings of unit norm, one per view, shape (V, D).

        Returns:
            Scores averaged over the views, shape (C,), float32.
        """
        scale = self.runtime.manifest.scores.scale
        scores = score(self.method, embeddings, self.bank.embeddings, scale=scale)
        averaged: Float32Array = average_views(scores[np.newaxis])[0]
        return averaged

    def _read_views(
        self, source: FrameSource, stopwatch: _Stopwatch
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Sample the clips and read them; again if damage found on the way left fewer frames."""
        while True:
            num_video_frames = source.num_frames
            indices = sample_views(
                num_video_frames, self.runtime.manifest.model.num_frames, self.views.num_clips
            )
            frames = self._read(source, indices, stopwatch)
            if source.num_frames == num_video_frames:
                return indices, frames

    def _read(
        self, source: FrameSource, indices: NDArray[np.int64], stopwatch: _Stopwatch
    ) -> NDArray[np.uint8]:
        """Read each wanted frame once; gives (num_crops, number of distinct frames, S, S, 3)."""
        manifest = self.runtime.manifest
        wanted = np.unique(indices)
        parts = []
        for start in range(0, len(wanted), FRAMES_PER_READ):
            with stopwatch.stage("read"):
                clip = source.read(wanted[start : start + FRAMES_PER_READ])
            with stopwatch.stage("preprocess"):
                part = preprocess_frames(
                    clip.frames,
                    input_size=manifest.model.input_size,
                    resize_size=manifest.preprocessing.resize_size,
                    interpolation=manifest.preprocessing.interpolation,
                    num_crops=self.views.num_crops,
                    region=self.region,
                )
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def _embed(
        self, frames: NDArray[np.uint8], indices: NDArray[np.int64], stopwatch: _Stopwatch
    ) -> Float32Array:
        """Embed every view: crops x clips of the distinct frames, shape (V, D)."""
        num_crops, num_distinct = frames.shape[:2]
        places = np.searchsorted(np.unique(indices), indices)
        # One row per view; each holds places in the frames of all crops laid end to end.
        views = np.concatenate([crop * num_distinct + places for crop in range(num_crops)])
        flat = frames.reshape(num_crops * num_distinct, *frames.shape[2:])
        if not self.runtime.frames_are_independent:
            with stopwatch.stage("video"):
                return np.concatenate(
                    [
                        self.runtime.encode_video(flat[views[start : start + CLIPS_PER_CALL]])
                        for start in range(0, len(views), CLIPS_PER_CALL)
                    ]
                )
        with stopwatch.stage("visual"):
            features = np.concatenate(
                [
                    self.runtime.encode_frames(flat[start : start + FRAMES_PER_CALL])
                    for start in range(0, len(flat), FRAMES_PER_CALL)
                ]
            )
        with stopwatch.stage("temporal"):
            return self.runtime.encode_clips(features[views])


class _Stopwatch:
    """Adds up wall-clock time by stage."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._stages[name] = self._stages.get(name, 0.0) + elapsed

    def timings_ms(self) -> dict[str, float]:
        stages = {**self._stages, "total": time.perf_counter() - self._start}
        return {name: round(seconds * 1e3, 3) for name, seconds in stages.items()}
