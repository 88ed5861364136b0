"""The whole way: a video file in, ranked labels out.

`views` turns videos into embeddings; here is the step from embeddings to a `Prediction`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import Answer
from actionclip_deploy.errors import (
    ArgumentError,
    LabelBankError,
    MissingExtraError,
    VideoError,
    VideoMemoryError,
    VideoWarning,
    WrongKindError,
)
from actionclip_deploy.known_words import warn_of_unknown_words
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region, check_region
from actionclip_deploy.records import (
    LABEL_COLUMNS,
    Decision,
    EmbeddedVideoRecord,
    ErrorRecord,
    FramesRecord,
    LabelScore,
    RuntimeInfo,
    TemplateVote,
    VideoRecord,
    json_text,
    label_rows,
    printable,
)
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.machine import check_memory, check_num_threads
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import SCORE_METHODS, average_views, score, top_k
from actionclip_deploy.video import MAX_PIXELS, Decoder, VideoReader
from actionclip_deploy.video.memory import OpenVideo, VideoSource
from actionclip_deploy.video.reader import check_max_pixels
from actionclip_deploy.views import (
    Encoded,
    FeatureCache,
    FrameSource,
    Stopwatch,
    VideoFrames,
    ViewReader,
    default_num_workers,
    encode_views,
    work_ahead,
)

if TYPE_CHECKING:
    from actionclip_deploy.plot import Picture

__all__ = [
    "FailedVideo",
    "FrameSource",
    "LabelScore",
    "Prediction",
    "Predictions",
    "Ranker",
    "Ranking",
    "Recognizer",
    "Scoring",
    "TemplateVote",
    "VideoEncoder",
]

MAX_TOP_K = 10_000  # where a bank has no more labels than that


@dataclass(frozen=True, eq=False)
class Ranking:
    """The labels of one video.

    Attributes:
        scores: Of all labels in the order of the bank, shape (C,), float32; of a saved query, of
            the one that it looks for, shape (1,).
        predictions: The best labels, best first.
        answer: The best label, or "unknown"; None where the bank is no saved query and was
            not calibrated, or for another method of scoring.
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
        if bank.reads_query(self.method):
            return self._rank_query(embeddings, scores)
        best, best_scores = top_k(scores[np.newaxis], self.top_k)
        ranked = zip(best[0], best_scores[0], strict=True)
        return Ranking(
            scores=scores,
            predictions=tuple(LabelScore(bank.labels[i], float(s)) for i, s in ranked),
            answer=bank.answer(scores, method=self.method),
            votes=self._votes(embeddings, int(best[0][0])) if self.votes else None,
        )

    def _rank_query(self, embeddings: Float32Array, scores: Float32Array) -> Ranking:
        """The ranking of the one label of a saved query, by the score that it is told of by."""
        answer = self.bank.answer(scores, method=self.method)
        assert answer is not None, "of a saved query"
        return Ranking(
            scores=np.array([answer.score], np.float32),
            predictions=(LabelScore(self.bank.labels[0], answer.score),),
            answer=answer,
            votes=self._query_votes(embeddings, answer) if self.votes else None,
        )

    def _query_votes(self, embeddings: Float32Array, answer: Answer) -> tuple[TemplateVote, ...]:
        votes = []
        for k, template in enumerate(self.bank.templates):
            scores = self._scores(embeddings, self.bank.embeddings[k : k + 1])[np.newaxis]
            (own,) = self.bank.query_scores(scores, template=k).tolist()
            agrees = (own >= answer.threshold) != answer.is_unknown
            votes.append(TemplateVote(template, self.bank.labels[0], own, agrees))
        return tuple(votes)

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
class Scoring:
    """What a prediction was made with.

    Attributes:
        bank: The labels to choose from.
        method: One of `scoring.SCORE_METHODS`.
        runtime: What really ran.
        decoder: What decoded the video.
        max_pixels: Most pixels of a frame.
    """

    bank: LabelBank
    method: ScoreMethod
    runtime: RuntimeInfo
    decoder: Decoder = "software"
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was recognised in one video. It prints as its best labels, and a notebook shows bars.

    Attributes:
        video: The file, or what frames in memory are called.
        predictions: The best labels, best first.
        frame_indices: Frames that were used, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T); NaN where frames have none.
        scores: Scores of `labels`, in the order of the bank, shape (C,), float32.
        timings_ms: Wall-clock milliseconds by stage, and `total`. Where videos overlap, `total`
            is the sum of the stages, and a call's time is shared out by the frames in it.
        answer: The best label, or "unknown"; None where the bank is no saved query and was
            not calibrated, or for another method of scoring.
        scoring: What it was made with.
        warnings: Damage that was found in the video.
        source: What was opened; None where it is the file `video`.
        num_frames_encoded: Frames that went through the graphs for this video.
        num_frames_reused: Frames whose features were known from equal ones, of this video or of
            one before it in the same run.
    """

    video: Path
    predictions: tuple[LabelScore, ...]
    frame_indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]
    scores: Float32Array
    timings_ms: dict[str, float]
    answer: Answer | None = None
    scoring: Scoring | None = None
    warnings: tuple[str, ...] = ()
    source: VideoSource | None = None
    num_frames_encoded: int | None = None
    num_frames_reused: int | None = None

    @property
    def name(self) -> str:
        """The last part of the video's path."""
        return self.video.name

    @property
    def label(self) -> str | None:
        """The best label; None where a calibrated bank says that the video shows none of its."""
        return None if _is_unknown(self) else self.predictions[0].label

    @property
    def score(self) -> float:
        """The score of the best label, 0 to 1."""
        return self.predictions[0].score

    @property
    def labels(self) -> tuple[str, ...]:
        """All C labels of the bank, of a saved query the one it looks for; `scores` are theirs."""
        scoring = self._scoring()
        labels = scoring.bank.labels
        return labels[:1] if scoring.bank.reads_query(scoring.method) else labels

    def to_dict(self) -> dict[str, Any]:
        """The record that `actionclip predict --json` prints, as plain JSON values."""
        return _record_of(self, self._scoring()).to_dict()

    def to_json(self) -> str:
        """The record that `actionclip predict --json` prints."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A pandas table of `predictions`, best first: `video`, `rank` from 1, `label`, `score`.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return Predictions([self]).to_dataframe()

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw the frames that were used, and the best labels as bars.

        Args:
            path: A file to write: PNG, JPEG, PDF or SVG by its suffix.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            VideoError: If the video cannot be read again.
            ValueError: If the suffix is not one of these.
            FileWriteError: If the file cannot be written.
        """
        return Predictions([self]).plot(path)

    @contextmanager
    def open_frames(self) -> Iterator[OpenVideo]:
        """Open the video again for the time of a block; what is damaged was told before.

        Raises:
            VideoError: If it is not there any more.
        """
        source: Path | VideoSource = self.video if self.source is None else self.source
        with open_again(source, self.scoring) as frames:
            yield frames

    def __repr__(self) -> str:
        found = "unknown" if self.label is None else f"{self.label!r} {self.score:.4f}"
        return f"<Prediction of {_shown(self.name)}: {found}>"

    def __str__(self) -> str:
        lines = [_shown(self.name)]
        if self.label is None:
            lines.append("  unknown, none of these:")
        lines += [f"  {best.score:.4f}  {_shown(best.label)}" for best in self.predictions]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return Predictions([self])._repr_html_()

    def _scoring(self) -> Scoring:
        if self.scoring is None:
            raise ValueError(
                f"{self!r} does not say which labels it was chosen from; take the predictions of "
                "a Recognizer or an ActionCLIP, which do."
            )
        return self.scoring


@dataclass(frozen=True, repr=False)
class FailedVideo:
    """A video that gave no frames, and why."""

    video: Path
    error: VideoError
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the video's path."""
        return self.video.name

    def to_dict(self) -> dict[str, Any]:
        """The record that `actionclip predict --json` prints, as plain JSON values."""
        return _record_of_failure(self).to_dict()

    def to_json(self) -> str:
        """The record that `actionclip predict --json` prints."""
        return json_text(self.to_dict())

    def __repr__(self) -> str:
        return f"<FailedVideo {_shown(self.name)}: {_shown(str(self.error))}>"

    def __str__(self) -> str:
        return f"{_shown(self.name)}\n  failed: {_shown(str(self.error))}"


class Predictions(list[Prediction | FailedVideo]):
    """What was recognised in several videos, in their order; failed ones stand in their place."""

    @property
    def failed(self) -> list[FailedVideo]:
        """Those that gave no frames."""
        return [each for each in self if isinstance(each, FailedVideo)]

    @property
    def scored(self) -> list[Prediction]:
        """The others."""
        return [each for each in self if isinstance(each, Prediction)]

    def to_dict(self) -> list[dict[str, Any]]:
        """The record of each video, as plain JSON values."""
        return [each.to_dict() for each in self]

    def to_json(self) -> str:
        """A JSON list with the record of each video."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each label of each video, best first.

        Its columns are `video`, `rank` (from 1), `label`, `score` and `error`: a video that
        failed has one row, with nothing but the error.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as exc:
            raise MissingExtraError("to_dataframe", "dataframe") from exc
        rows = [
            row
            for each in self
            for row in (
                label_rows(str(each.video), None, str(each.error))
                if isinstance(each, FailedVideo)
                else label_rows(str(each.video), each.predictions, None)
            )
        ]
        table = pd.DataFrame(rows, columns=list(LABEL_COLUMNS))
        return table.astype({"rank": "Int64", "score": "float64"})

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw a row for each video that did not fail; see `Prediction.plot`."""
        from actionclip_deploy.plot import SUFFIXES, plot_predictions

        target = None if path is None else Path(path)
        if target is not None and target.suffix.lower() not in SUFFIXES:
            raise ArgumentError(
                "path", f"is {path}; give a file that ends in {', '.join(SUFFIXES)}."
            )
        if not self.scored:
            raise ValueError("There is no prediction to draw; every video failed.")
        return plot_predictions(self.scored, target)

    def __repr__(self) -> str:
        lines = [f"  {each!r}," for each in self[:_SHOWN_VIDEOS]]
        return "\n".join(["Predictions([", *lines, *self._left_out("  "), "])"])

    def __str__(self) -> str:
        return "\n".join([*map(str, self[:_SHOWN_VIDEOS]), *self._left_out("")])

    def _left_out(self, indent: str) -> list[str]:
        more = len(self) - _SHOWN_VIDEOS
        return [f"{indent}and {more} more"] if more > 0 else []

    def _repr_html_(self) -> str:
        rows = [row for each in self[:_SHOWN_VIDEOS] for row in _html_rows(each)]
        rows += [f"<tr><td colspan=4>{text}</td></tr>" for text in self._left_out("")]
        return (
            f"<table><thead><tr><th{_HTML_LEFT}>video</th><th{_HTML_LEFT}>label</th><th>score</th>"
            f"<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


_SHOWN_VIDEOS = 50
_BAR_PIXELS = 160
_HTML_LEFT = ' style="text-align:left"'


def _html_rows(outcome: Prediction | FailedVideo) -> list[str]:
    from html import escape

    name = escape(_shown(outcome.name))
    if isinstance(outcome, FailedVideo):
        why = escape(_shown(str(outcome.error)))
        return [f"<tr><td{_HTML_LEFT}>{name}</td><td colspan=3{_HTML_LEFT}>failed: {why}</td></tr>"]
    rows = []
    if outcome.label is None:
        what = "unknown, none of these:"
        rows.append(f"<tr><td{_HTML_LEFT}>{name}</td><td colspan=3{_HTML_LEFT}>{what}</td></tr>")
        name = ""
    for best in outcome.predictions:
        width = round(_BAR_PIXELS * best.score)
        bar = f'<div style="background:#4878a8;height:0.9em;width:{width}px"></div>'
        rows.append(
            f"<tr><td{_HTML_LEFT}>{name}</td><td{_HTML_LEFT}>{escape(_shown(best.label))}</td>"
            f'<td>{best.score:.4f}</td><td style="min-width:{_BAR_PIXELS}px">{bar}</td></tr>'
        )
        name = ""
    return rows


def _shown(text: str) -> str:
    return printable(text, kept="")


def _is_unknown(prediction: Prediction) -> bool:
    return prediction.answer is not None and prediction.answer.label is None


def _record_of_failure(outcome: FailedVideo, damage: Sequence[str] = ()) -> VideoRecord:
    error = ErrorRecord(status=None, code="video_unreadable", message=str(outcome.error))
    return VideoRecord(
        video=str(outcome.video),
        name=outcome.video.name,
        warnings=_each_once(outcome.warnings, damage),
        error=error,
    )


def _record_of(outcome: Prediction, scoring: Scoring, damage: Sequence[str] = ()) -> VideoRecord:
    bank, answer = scoring.bank, outcome.answer
    return VideoRecord(
        video=str(outcome.video),
        name=outcome.video.name,
        predictions=outcome.predictions,
        answer=None if answer is None else Decision.model_validate(answer),
        frames=_frames_of(outcome.frame_indices, outcome.pts_seconds),
        method=scoring.method,
        bank=bank.used(None if bank.is_adhoc else bank.name),
        runtime=scoring.runtime,
        num_frames_encoded=outcome.num_frames_encoded,
        num_frames_reused=outcome.num_frames_reused,
        warnings=_each_once(outcome.warnings, damage),
        timings_ms=outcome.timings_ms,
    )


def _frames_of(indices: NDArray[np.int64], seconds: NDArray[np.float64]) -> FramesRecord:
    return FramesRecord.of(indices, None if np.isnan(seconds).any() else seconds)


def _each_once(*texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for part in texts for text in part))


# From videos to the embeddings of their views


def _given_video(video: object) -> Path | VideoSource:
    """A video as it was given; what is none is told in a sentence."""
    if isinstance(video, str | os.PathLike):
        return Path(video)
    if hasattr(video, "open") and hasattr(video, "name"):
        return cast(VideoSource, video)
    raise WrongKindError(
        f"video is of type {type(video).__name__}; give the name of a file as a string or a Path. "
        "Frames in an array, and the bytes of a file, are taken by ActionCLIP."
    )


@contextmanager
def _open(
    video: Path | VideoSource,
    decoder: Decoder,
    max_pixels: int,
    on_warning: Callable[[VideoWarning], None],
    num_threads: int = 1,
) -> Iterator[OpenVideo]:
    if isinstance(video, Path):
        with VideoReader(
            video,
            num_threads=num_threads,
            decoder=decoder,
            max_pixels=max_pixels,
            on_warning=on_warning,
        ) as reader:
            yield reader
        return
    with video.open(decoder=decoder, max_pixels=max_pixels, on_warning=on_warning) as opened:
        yield opened


def open_again(
    video: Path | VideoSource, scoring: Scoring | None = None
) -> AbstractContextManager[OpenVideo]:
    """Open a video that was scored before; what is damaged was told then.

    Raises:
        VideoError: If it is not there any more, on entering the block.
    """
    decoder: Decoder = "software" if scoring is None else scoring.decoder
    max_pixels = MAX_PIXELS if scoring is None else scoring.max_pixels
    return _open(video, decoder, max_pixels, lambda _: None)


class VideoEncoder:
    """Turns videos into the embeddings of their views.

    It keeps no state between videos, so one may be used from several threads as far as its
    runtime allows.

    Args:
        runtime: An open runtime.
        views: Clips and crops per video.
        region: `"frame"` resizes as the original does, to the last bit; `"crop"` resizes only
            what the crop keeps, which is faster and differs by one level, seldom two,
            in few values; `"swscale"` scales frames of files while their colours are converted,
            which is fastest and differs by several levels in many (docs/howto/videos.md).
        decoder: What decodes videos, see `video.VideoReader`.
        max_pixels: Of a frame; a video with larger ones fails.
        reuse: Whether frames of a run that are equal at the model's input are encoded once; never
            where a graph mixes the frames of a clip, or scales int8 by what is in the call.

    Raises:
        ValueError: If an argument has a value that is not allowed.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        views: Views | None = None,
        region: Region = "frame",
        decoder: Decoder = "software",
        max_pixels: int = MAX_PIXELS,
        reuse: bool = True,
    ) -> None:
        sampled = views or Views()
        model = runtime.manifest.model
        check_memory("The number of views", sampled.num_views, model.num_frames * model.frame_bytes)
        check_region(region)
        if decoder not in get_args(Decoder):
            raise ArgumentError("decoder", f"is {decoder!r}; it must be 'software' or 'nvdec'.")
        check_max_pixels(max_pixels)
        self.runtime = runtime
        self.views = sampled
        self.region = region
        self.decoder: Decoder = decoder
        self.max_pixels = max_pixels
        self.reuse = reuse and runtime.frames_are_independent and runtime.calls_can_be_shared
        self._view_reader = ViewReader(
            runtime.manifest, self.views, region, names_frames=self.reuse
        )

    def open_video(
        self,
        video: str | Path | VideoSource,
        on_warning: Callable[[VideoWarning], None],
        *,
        num_threads: int = 1,
    ) -> AbstractContextManager[OpenVideo]:
        """Open a video as this encoder reads it, for the time of a block.

        Args:
            video: A file, or what is opened like one.
            on_warning: Is told of damage.
            num_threads: Of the decoder of a file; more than one where a single video is read.

        Raises:
            VideoError: If no frame can be had from it, on entering the block.
            WrongKindError: If it is neither.
        """
        given = _given_video(video)
        return _open(given, self.decoder, self.max_pixels, on_warning, num_threads)

    def encode(self, video: str | Path | VideoSource) -> Encoded[VideoFrames]:
        """Encode one video; warnings about it are given and in the frames.

        Raises:
            VideoError: If no frame can be had from it.
            InferenceError: If the runtime fails.
            WrongKindError: If it is not the name of a file, nor what is opened as one.
        """
        given, stopwatch = _given_video(video), Stopwatch()
        found: list[VideoWarning] = []

        def tell(warning: VideoWarning) -> None:
            found.append(warning)
            warnings.warn(warning, stacklevel=4)

        frames = self._read(given, stopwatch, tell)
        return self.encode_frames(replace(frames, warnings=found))

    def features(self) -> FeatureCache | None:
        """A place for the features of a run, by which frames are known again; None for none."""
        return FeatureCache.of_files(self.runtime.manifest) if self.reuse else None

    def encode_frames(
        self, frames: VideoFrames, features: FeatureCache | None = None
    ) -> Encoded[VideoFrames]:
        """Encode the views of one video that were read, which may be one of a run."""
        cache = self.features() if features is None else features
        (encoded,) = encode_views(self.runtime, [frames], sizes=self._call_sizes(), cache=cache)
        return encoded

    def read_views(self, source: FrameSource, video: Path) -> VideoFrames:
        """Read the views of what is open already."""
        return self._view_reader.read(source, video, Stopwatch())

    def encode_all(
        self, videos: Iterable[str | Path | VideoSource], *, num_workers: int | None = None
    ) -> Generator[Encoded[VideoFrames], None, None]:
        """Encode videos in their order; of one that fails, the frames hold the error.

        See `Recognizer.predict_all`. Warnings are in the frames alone.

        Raises:
            ValueError: If `num_workers` is not positive, or far above the cores that there are.
            InferenceError: If the runtime fails.
            WrongKindError: As for `encode`, once it is a video's turn.
        """
        num_workers = default_num_workers() if num_workers is None else num_workers
        check_num_threads("num_workers", num_workers)
        if isinstance(videos, str | os.PathLike):
            raise WrongKindError(f"videos is {videos!r}; give several, as a list of names.")
        return self._encode_all(map(_given_video, videos), num_workers)

    def _encode_all(
        self, videos: Iterable[Path | VideoSource], num_workers: int
    ) -> Generator[Encoded[VideoFrames], None, None]:
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
            yield from encode_views(self.runtime, reads, sizes=sizes, cache=self.features())

    def record(self, encoded: Encoded[VideoFrames]) -> EmbeddedVideoRecord:
        """Put down what came out for a video, as it leaves the program."""
        video = encoded.work
        about: dict[str, Any] = {"video": str(video.video), "name": video.video.name}
        if video.error is not None:
            error = ErrorRecord(status=None, code="video_unreadable", message=str(video.error))
            return EmbeddedVideoRecord(**about, warnings=_texts_of(video.warnings), error=error)
        return EmbeddedVideoRecord(
            **about,
            embeddings=encoded.embeddings,
            frames=_frames_of(video.indices, video.pts_seconds),
            num_frames_encoded=encoded.num_frames_encoded,
            num_frames_reused=encoded.num_frames_reused,
            warnings=_texts_of(video.warnings),
            timings_ms=_times_of(encoded).timings_ms(total_is_sum=True),
        )

    def _read_ahead(self, video: Path | VideoSource, stop: Event) -> VideoFrames:
        stopwatch = Stopwatch()
        found: list[VideoWarning] = []
        path = video if isinstance(video, Path) else Path(video.name)
        try:
            frames = self._read(video, stopwatch, found.append, stop)
        except MemoryError:
            frames = VideoFrames.failed(path, stopwatch, VideoMemoryError.of(path))
        except VideoError as exc:
            frames = VideoFrames.failed(path, stopwatch, exc)
        return replace(frames, warnings=found)

    def _read(
        self,
        video: Path | VideoSource,
        stopwatch: Stopwatch,
        on_warning: Callable[[VideoWarning], None],
        stop: Event | None = None,
    ) -> VideoFrames:
        with ExitStack() as stack:
            with stopwatch.stage("open"):
                reader = stack.enter_context(
                    _open(video, self.decoder, self.max_pixels, on_warning)
                )
            if isinstance(video, Path):
                return self._view_reader.read(reader, video, stopwatch, stop)
            frames = self._view_reader.read(reader, Path(video.name), stopwatch, stop)
            return replace(frames, source=video)

    def _call_sizes(self) -> CallSizes:
        return CallSizes.of_videos(self.runtime.manifest.model)


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
            in few values; `"swscale"` scales frames of files while their colours are converted,
            which is fastest and differs by several levels in many (docs/howto/videos.md).
        decoder: What decodes videos, see `video.VideoReader`.
        max_pixels: Of a frame; a video with larger ones fails.
        reuse: As for `VideoEncoder`.

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
        reuse: bool = True,
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
            raise ArgumentError("top_k", f"is {top_k}; it must be 1 or more and {bound} at most.")
        method = bank.method_for(method, manifest.scores.method)
        if method not in SCORE_METHODS:
            raise ArgumentError(
                "method", f"is {method!r}; it must be one of {', '.join(SCORE_METHODS)}."
            )
        self.encoder = VideoEncoder(
            runtime,
            views=views,
            region=region,
            decoder=decoder,
            max_pixels=max_pixels,
            reuse=reuse,
        )
        warn_of_unknown_words(bank.unknown_words)
        self.runtime = runtime
        self.bank = bank
        self.views = self.encoder.views
        self.top_k = top_k
        self.method = method
        self.region = region
        self.decoder = decoder
        self.max_pixels = max_pixels
        self.ranker = Ranker(bank, method, manifest.scores.scale, top_k)
        self.scoring = Scoring(bank, method, runtime.describe(), decoder, max_pixels)

    def predict(self, video: str | Path | VideoSource) -> Prediction:
        """Score one video.

        Args:
            video: A file, or what is opened like one, such as `video.memory.ArrayVideo`.

        Raises:
            VideoError: If no frame can be had from the file.
            InferenceError: If the runtime fails.
            WrongKindError: If it is neither.
        """
        return self._finish(self.encoder.encode(video))

    def predict_frames(
        self,
        source: FrameSource,
        *,
        video: str | Path,
        features: FeatureCache | None = None,
    ) -> Prediction:
        """Score the frames of a video that is open already, or of what looks like one.

        Args:
            source: Where frames are read from.
            video: What it is called in the prediction.
            features: Of the run that the video is one of, see `VideoEncoder.features`.

        Raises:
            VideoError: If a frame cannot be read.
            InferenceError: If the runtime fails.
        """
        frames = self.encoder.read_views(source, Path(video))
        return self._finish(self.encoder.encode_frames(frames, features))

    def predict_all(
        self, videos: Iterable[str | Path | VideoSource], *, num_workers: int | None = None
    ) -> Generator[Prediction | FailedVideo, None, None]:
        """Score videos in their order; one that fails is given in its place, and the rest go on.

        Threads read ahead while the runtime computes, and its calls hold frames of several videos:
        outcomes come once a call is full, or the videos run out. How far ahead is bounded by two
        calls and one video for each thread, and two calls of known frames. Warnings are given
        before the outcome of their video.

        Which rows go into which call depends on the videos alone, never on time, so a run can be
        repeated to the last bit. Beside `predict`, scores differ by rounding, since views of
        several videos are fused in one call. Calls are not shared where an int8 graph scales its
        activations by what is in the call.

        Args:
            videos: As for `predict`; drawn from as far ahead as is read.
            num_workers: Threads that read; None takes as many as there are cores, at most 8.

        Raises:
            ValueError: If `num_workers` is not positive, or far above the cores that there are.
            InferenceError: If the runtime fails.
        """
        return self._predict_all(self.encoder.encode_all(videos, num_workers=num_workers))

    def _predict_all(
        self, outcomes: Generator[Encoded[VideoFrames], None, None]
    ) -> Generator[Prediction | FailedVideo, None, None]:
        with closing(outcomes):
            for encoded in outcomes:
                video = encoded.work
                for warning in video.warnings:
                    warnings.warn(warning, stacklevel=2)
                if video.error is not None:
                    yield FailedVideo(video.video, video.error, _texts_of(video.warnings))
                else:
                    yield self._finish(encoded, total_is_sum=True)

    def _finish(self, encoded: Encoded[VideoFrames], *, total_is_sum: bool = False) -> Prediction:
        video = encoded.work
        stopwatch = _times_of(encoded)
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
            scoring=self.scoring,
            warnings=_texts_of(video.warnings),
            source=video.source,
            num_frames_encoded=encoded.num_frames_encoded,
            num_frames_reused=encoded.num_frames_reused,
        )

    def record(
        self, outcome: Prediction | FailedVideo, *, damage: Sequence[str] = ()
    ) -> VideoRecord:
        """Put down what came out for a video, as it leaves the program.

        Args:
            outcome: Of this recognizer.
            damage: Warnings about the video besides its own.
        """
        if isinstance(outcome, FailedVideo):
            return _record_of_failure(outcome, damage)
        return _record_of(outcome, outcome.scoring or self.scoring, damage)


def _times_of(encoded: Encoded[VideoFrames]) -> Stopwatch:
    """The times of the stages, those of the graphs included; to be asked for once."""
    stopwatch = encoded.work.stopwatch
    for graph, seconds in encoded.seconds.items():
        stopwatch.add(graph, seconds)
    return stopwatch


def _texts_of(damage: Iterable[VideoWarning]) -> tuple[str, ...]:
    return tuple(map(str, damage))
