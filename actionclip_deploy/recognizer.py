"""The whole way: a video file in, ranked labels out.

`views` turns videos into embeddings; here is the step from embeddings to a `Prediction`.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import Answer
from actionclip_deploy.errors import LabelBankError, VideoError, VideoMemoryError, VideoWarning
from actionclip_deploy.labels import LabelBank, warn_of_unknown_words
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.records import (
    Decision,
    ErrorRecord,
    FramesRecord,
    LabelScore,
    TemplateVote,
    VideoRecord,
)
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.machine import check_memory, check_num_threads
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import SCORE_METHODS, average_views, score, top_k
from actionclip_deploy.video import MAX_PIXELS, Decoder, VideoReader
from actionclip_deploy.views import (
    Encoded,
    FrameSource,
    Stopwatch,
    VideoFrames,
    ViewReader,
    default_num_workers,
    encode_views,
    work_ahead,
)

__all__ = [
    "FailedVideo",
    "FrameSource",
    "LabelScore",
    "Prediction",
    "Ranker",
    "Ranking",
    "Recognizer",
    "TemplateVote",
]

MAX_TOP_K = 10_000  # where a bank has no more labels than that


@dataclass(frozen=True, eq=False)
class Ranking:
    """The labels of one video.

    Attributes:
        scores: Of all labels in the order of the bank, shape (C,), float32.
        predictions: The best labels, best first.
        answer: The best label, or "unknown"; None where the bank was not calibrated, or for
            another method of scoring.
        votes: Of each template; None where nobody asked.
    """

    scores: Float32Array
    predictions: tuple[LabelScore, ...]
    answer: Answer | None
    votes: tuple[TemplateVote, ...] | None


@dataclass(frozen=True)
class Ranker:
    """Scores the embeddings of a video against a bank and ranks its labels.

    Attributes:
        bank: The labels to choose from.
        method: One of `scoring.SCORE_METHODS`.
        scale: Multiplier of the cosine.
        top_k: Labels of a ranking; fewer where the bank has fewer.
        votes: Whether to say what each template alone would have said.
    """

    bank: LabelBank
    method: str
    scale: float
    top_k: int
    votes: bool = False

    def num_cosines(self, num_views: int) -> int:
        """How much work a ranking is."""
        return num_views * len(self.bank.templates) * len(self.bank.labels) * (1 + self.votes)

    def rank(self, embeddings: Float32Array) -> Ranking:
        """Rank labels by the scores that a video's views have on average.

        Args:
            embeddings: Of the views, unit norm, float32, shape (V, D).
        """
        bank = self.bank
        scores = self._scores(embeddings, bank.embeddings)
        best, best_scores = top_k(scores[np.newaxis], self.top_k)
        ranked = zip(best[0], best_scores[0], strict=True)
        return Ranking(
            scores=scores,
            predictions=tuple(LabelScore(bank.labels[i], float(s)) for i, s in ranked),
            answer=bank.answer(scores, method=self.method),
            votes=self._votes(embeddings, int(best[0][0])) if self.votes else None,
        )

    def _scores(self, embeddings: Float32Array, label_embeddings: Float32Array) -> Float32Array:
        """Scores averaged over the views, shape (C,), float32, for (V, D) and (K, C, D)."""
        scores = score(self.method, embeddings, label_embeddings, scale=self.scale)
        averaged: Float32Array = average_views(scores[np.newaxis])[0]
        return averaged

    def _votes(self, embeddings: Float32Array, best: int) -> tuple[TemplateVote, ...]:
        votes = []
        for k, template in enumerate(self.bank.templates):
            scores = self._scores(embeddings, self.bank.embeddings[k : k + 1])
            first = int(scores.argmax())
            label = self.bank.labels[first]
            votes.append(TemplateVote(template, label, float(scores[first]), first == best))
        return tuple(votes)


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
    runtime allows. A `LabelWarning` names words of the labels that the model does not know.

    Args:
        runtime: An open runtime of the bundle that made the bank.
        bank: The labels to choose from.
        views: Clips and crops per video; their scores are averaged.
        top_k: How many labels a prediction holds; fewer where the bank has fewer.
        method: One of `scoring.SCORE_METHODS`; None takes the manifest's.
        region: `"frame"` resizes as the original does, to the last bit; `"crop"` resizes only
            what the crop keeps, which is faster and differs by one level, seldom two,
            in few values.
        decoder: What decodes videos, see `video.VideoReader`.
        max_pixels: Of a frame; a video with larger ones fails.

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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        manifest = runtime.manifest
        if bank.embeddings.shape[-1] != manifest.model.embedding_dim:
            raise LabelBankError(
                f"The label bank {bank.name!r} has embeddings of width "
                f"{bank.embeddings.shape[-1]} and the model's are {manifest.model.embedding_dim} "
                "wide; build the bank with this bundle."
            )
        bound = max(MAX_TOP_K, len(bank.labels))
        if not 1 <= top_k <= bound:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more and {bound} at most.")
        sampled = views or Views()
        model = manifest.model
        check_memory("The number of views", sampled.num_views, model.num_frames * model.frame_bytes)
        method = manifest.scores.method if method is None else method
        if method not in SCORE_METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(SCORE_METHODS)}.")
        if region not in get_args(Region):
            raise ValueError(f"region is {region!r}; it must be 'frame' or 'crop'.")
        if decoder not in get_args(Decoder):
            raise ValueError(f"decoder is {decoder!r}; it must be 'software' or 'nvdec'.")
        if max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; it must be 1 or more.")
        warn_of_unknown_words(bank.unknown_words)
        self.runtime = runtime
        self.bank = bank
        self.views = sampled
        self.top_k = top_k
        self.method = method
        self.region = region
        self.decoder = decoder
        self.max_pixels = max_pixels
        self.ranker = Ranker(bank, method, manifest.scores.scale, top_k)
        self._view_reader = ViewReader(manifest, self.views, region)

    def predict(self, video: str | Path) -> Prediction:
        """Score one video.

        Raises:
            VideoError: If no frame can be had from the file.
            InferenceError: If the runtime fails.
        """
        stopwatch = Stopwatch()
        with stopwatch.stage("open"):
            reader = VideoReader(video, decoder=self.decoder, max_pixels=self.max_pixels)
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

        Which rows go into which call depends on the videos alone, never on time, so a run can be
        repeated to the last bit. Beside `predict`, scores differ by rounding, since views of
        several videos are fused in one call. Calls are not shared where an int8 graph scales its
        activations by what is in the call.

        Args:
            videos: Video files; drawn from as far ahead as is read.
            num_workers: Threads that read; None takes as many as there are cores, at most 8.

        Raises:
            ValueError: If `num_workers` is not positive, or far above the cores that there are.
            InferenceError: If the runtime fails.
        """
        num_workers = default_num_workers() if num_workers is None else num_workers
        check_num_threads("num_workers", num_workers)
        return self._predict_all(map(Path, videos), num_workers)

    def _predict_all(
        self, videos: Iterable[Path], num_workers: int
    ) -> Generator[Prediction | FailedVideo, None, None]:
        rows_per_video, sizes = self.views.num_views, self._call_sizes()
        rows_per_call = sizes.video
        if self.runtime.frames_are_independent:
            rows_per_video *= self.runtime.manifest.model.num_frames
            rows_per_call = sizes.visual
        videos_per_call = -(-rows_per_call // rows_per_video)
        reads = work_ahead(
            videos,
            self._read_ahead,
            num_workers=num_workers,
            max_ahead=num_workers + 2 * videos_per_call,
        )
        with closing(reads):
            for encoded in encode_views(self.runtime, reads, sizes=sizes):
                video = encoded.work
                for warning in video.warnings:
                    warnings.warn(warning, stacklevel=2)
                if video.error is not None:
                    yield FailedVideo(video.video, video.error)
                else:
                    yield self._finish(encoded, total_is_sum=True)

    def _read_ahead(self, video: Path, stop: Event) -> VideoFrames:
        stopwatch = Stopwatch()
        found: list[VideoWarning] = []
        try:
            with stopwatch.stage("open"):
                reader = VideoReader(
                    video,
                    decoder=self.decoder,
                    max_pixels=self.max_pixels,
                    on_warning=found.append,
                )
            with reader:
                frames = self._view_reader.read(reader, video, stopwatch, stop)
        except MemoryError:
            frames = VideoFrames.failed(video, stopwatch, VideoMemoryError.of(video))
        except VideoError as exc:
            frames = VideoFrames.failed(video, stopwatch, exc)
        return replace(frames, warnings=found)

    def _predict(self, source: FrameSource, video: Path, stopwatch: Stopwatch) -> Prediction:
        frames = self._view_reader.read(source, video, stopwatch)
        (encoded,) = encode_views(self.runtime, [frames], sizes=self._call_sizes())
        return self._finish(encoded)

    def _call_sizes(self) -> CallSizes:
        return CallSizes.of_videos(self.runtime.manifest.model)

    def _finish(self, encoded: Encoded[VideoFrames], *, total_is_sum: bool = False) -> Prediction:
        video = encoded.work
        stopwatch = video.stopwatch
        for graph, seconds in encoded.seconds.items():
            stopwatch.add(graph, seconds)
        with stopwatch.stage("score"):
            ranking = self.ranker.rank(encoded.embeddings)
        return Prediction(
            video=video.video,
            predictions=ranking.predictions,
            frame_indices=video.indices,
            pts_seconds=video.pts_seconds,
            scores=ranking.scores,
            timings_ms=stopwatch.timings_ms(total_is_sum=total_is_sum),
            answer=ranking.answer,
        )

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
            bank=bank.used(bank.name),
            runtime=self.runtime.describe(),
            warnings=tuple(damage),
            timings_ms=outcome.timings_ms,
        )
