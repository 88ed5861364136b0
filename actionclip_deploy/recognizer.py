"""The whole way: a video file in, ranked labels out."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import Answer
from actionclip_deploy.errors import LabelBankError, VideoError, VideoWarning
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.records import (
    Decision,
    ErrorRecord,
    FramesRecord,
    LabelScore,
    UsedBank,
    VideoRecord,
)
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import SCORE_METHODS, average_views, score, top_k
from actionclip_deploy.video import Decoder, VideoReader
from actionclip_deploy.views import (
    FrameSource,
    Job,
    Stopwatch,
    VideoFrames,
    ViewReader,
    default_num_workers,
    encode_in_full_calls,
    work_ahead,
)

__all__ = ["FailedVideo", "FrameSource", "LabelScore", "Prediction", "Recognizer"]

# Bounds memory: a ViT-B/16 holds about 10 MB of activations for each frame of a call.
FRAMES_PER_CALL = 32
CLIPS_PER_CALL = 8


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was recognised in one video.

    Attributes:
        video: The file.
        predictions: The best labels, best first.
        frame_indices: Frames that were used, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T).
        scores: Scores of all labels in the order of the bank, shape (C,), float32.
        timings_ms: Wall-clock milliseconds by stage, and `total`. Where videos overlap, `total`
            is the sum of the stages, and a call's time is shared out by the frames in it.
        answer: The best label, or "unknown"; None where the bank was not calibrated, or for
            another method of scoring.
    """

    video: Path
    predictions: tuple[LabelScore, ...]
    frame_indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]
    scores: Float32Array
    timings_ms: dict[str, float]
    answer: Answer | None = None


@dataclass(frozen=True)
class FailedVideo:
    """A video that gave no frames, and why."""

    video: Path
    error: VideoError


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
        decoder: What decodes videos, see `video.VideoReader`.

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
        method: ScoreMethod | None = None,
        region: Region = "frame",
        decoder: Decoder = "software",
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
        if decoder not in get_args(Decoder):
            raise ValueError(f"decoder is {decoder!r}; it must be 'software' or 'nvdec'.")
        self.runtime = runtime
        self.bank = bank
        self.views = views or Views()
        self.top_k = top_k
        self.method = method
        self.region = region
        self.decoder = decoder
        self._view_reader = ViewReader(manifest, self.views, region)

    def predict(self, video: str | Path) -> Prediction:
        """Score one video.

        Raises:
            VideoError: If no frame can be had from the file.
            InferenceError: If the runtime fails.
        """
        stopwatch = Stopwatch()
        with stopwatch.stage("open"):
            reader = VideoReader(video, decoder=self.decoder)
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
        return self._predict(source, Path(video), Stopwatch())

    def predict_all(
        self, videos: Iterable[str | Path], *, num_workers: int | None = None
    ) -> Generator[Prediction | FailedVideo, None, None]:
        """Score videos in their order; one that fails is given in its place, and the rest go on.

        Threads read ahead while the runtime computes, and its calls hold frames of several videos:
        outcomes come once a call is full, or the videos run out. How far ahead is bounded by two
        calls and one video for each thread. Warnings are given before the outcome of their video.

        Scores are those of `predict` to the last bit as long as the runtime gives a frame the same
        features whatever else is in the call. ONNX Runtime's CPU provider does in fp32; with
        others, differences are those of rounding. Calls are not shared where an int8 graph scales
        its activations by what is in the call.

        Args:
            videos: Video files; drawn from as far ahead as is read.
            num_workers: Threads that read; None takes as many as there are cores, at most 8.

        Raises:
            ValueError: If `num_workers` is not positive.
            InferenceError: If the runtime fails.
        """
        num_workers = default_num_workers() if num_workers is None else num_workers
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be 1 or more.")
        return self._predict_all(map(Path, videos), num_workers)

    def _predict_all(
        self, videos: Iterable[Path], num_workers: int
    ) -> Generator[Prediction | FailedVideo, None, None]:
        rows_per_video = self.views.num_views
        if self.runtime.frames_are_independent:
            rows_per_video *= self.runtime.manifest.model.num_frames
        videos_per_call = -(-self._rows_per_call() // rows_per_video)
        reads = work_ahead(
            videos,
            self._read_ahead,
            num_workers=num_workers,
            max_ahead=num_workers + 2 * videos_per_call,
        )
        with closing(reads), closing(self._encode_all(reads)) as jobs:
            for job in jobs:
                for warning in job.owner.warnings:
                    warnings.warn(warning, stacklevel=2)
                if job.owner.error is not None:
                    yield FailedVideo(job.owner.video, job.owner.error)
                else:
                    yield self._finish(job, total_is_sum=True)

    def _read_ahead(self, video: Path, stop: Event) -> VideoFrames:
        stopwatch = Stopwatch()
        found: list[VideoWarning] = []
        try:
            with stopwatch.stage("open"):
                reader = VideoReader(video, decoder=self.decoder, on_warning=found.append)
            with reader:
                frames = self._view_reader.read(reader, video, stopwatch, stop)
        except VideoError as exc:
            frames = VideoFrames(video, stopwatch, error=exc)
        frames.warnings = found
        return frames

    def _predict(self, source: FrameSource, video: Path, stopwatch: Stopwatch) -> Prediction:
        frames = self._view_reader.read(source, video, stopwatch)
        (job,) = self._encode_all([frames])
        return self._finish(job)

    def _rows_per_call(self) -> int:
        return FRAMES_PER_CALL if self.runtime.frames_are_independent else CLIPS_PER_CALL

    def _encode_all(self, videos: Iterable[VideoFrames]) -> Generator[Job[VideoFrames], None, None]:
        """Run the graph that does nearly all the work; its rows are frames, or else views."""
        runtime = self.runtime
        quantization = runtime.manifest.quantization

        def job(video: VideoFrames) -> Job[VideoFrames]:
            pixels, views = video.pixels, video.views
            if runtime.frames_are_independent:
                return Job(video, len(pixels), lambda start, stop: pixels[start:stop])
            return Job(video, len(views), lambda start, stop: pixels[views[start:stop]])

        yield from encode_in_full_calls(
            map(job, videos),
            runtime.encode_frames if runtime.frames_are_independent else runtime.encode_video,
            rows_per_call=self._rows_per_call(),
            shares_calls=quantization is None or quantization.recipe != "dynamic",
        )

    def _finish(self, job: Job[VideoFrames], *, total_is_sum: bool = False) -> Prediction:
        video, stopwatch, embeddings = job.owner, job.owner.stopwatch, job.output()
        if self.runtime.frames_are_independent:
            stopwatch.add("visual", job.seconds)
            # A call of its own for each video: this graph's last bits do depend on the others.
            with stopwatch.stage("temporal"):
                embeddings = self.runtime.encode_clips(embeddings[video.views])
        else:
            stopwatch.add("video", job.seconds)
        with stopwatch.stage("score"):
            scores = self.score_embeddings(embeddings)
            best, best_scores = top_k(scores[np.newaxis], self.top_k)
            answer = self.bank.answer(scores, method=self.method)
        ranked = zip(best[0], best_scores[0], strict=True)
        return Prediction(
            video=video.video,
            predictions=tuple(LabelScore(self.bank.labels[i], float(s)) for i, s in ranked),
            frame_indices=video.indices,
            pts_seconds=video.pts_seconds,
            scores=scores,
            timings_ms=stopwatch.timings_ms(total_is_sum=total_is_sum),
            answer=answer,
        )

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

    def record(
        self, outcome: Prediction | FailedVideo, *, damage: Sequence[str] = ()
    ) -> VideoRecord:
        """Put down what came out for a video, as it leaves the program.

        Args:
            outcome: Of this recognizer.
            damage: Warnings about the video.
        """
        if isinstance(outcome, FailedVideo):
            error = ErrorRecord(status=None, code="video_unreadable", message=str(outcome.error))
            return VideoRecord(
                video=str(outcome.video),
                name=outcome.video.name,
                warnings=tuple(damage),
                error=error,
            )
        bank, answer = self.bank, outcome.answer
        return VideoRecord(
            video=str(outcome.video),
            name=outcome.video.name,
            predictions=outcome.predictions,
            answer=None if answer is None else Decision.model_validate(answer),
            frames=FramesRecord.of(outcome.frame_indices, outcome.pts_seconds),
            method=self.method,
            bank=UsedBank(
                name=bank.name,
                version=None,
                sha256=bank.sha256,
                num_labels=len(bank.labels),
                num_templates=len(bank.templates),
                textual_sha256=bank.textual_sha256,
            ),
            runtime=self.runtime.describe(),
            warnings=tuple(damage),
            timings_ms=outcome.timings_ms,
        )
