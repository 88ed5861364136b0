"""What labels score in a long video over time, and when they hold.

    grid = WindowGrid.of_model(manifest, window_seconds=4.0)
    timeline = read_timeline(recognizer, "long.mp4", grid)
    timeline.events

Letters: S windows, G grid steps, C labels, E labels and groups that are watched.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from html import escape
from itertools import repeat
from pathlib import Path
from threading import Event as ThreadEvent
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import (
    FramesChangedError,
    MissingExtraError,
    VideoError,
    VideoMemoryError,
    VideoWarning,
)
from actionclip_deploy.events import Event, WatchedLabels, find_events
from actionclip_deploy.files import staged_file
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import Recognizer, Scoring, open_again
from actionclip_deploy.records import (
    EVENT_COLUMNS,
    IntervalRecord,
    TimelineRecord,
    clock_text,
    event_rows,
    json_text,
    printable,
)
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.scoring import score
from actionclip_deploy.stream import (
    STEP_TOLERANCE,
    GridPoint,
    GridSelector,
    Window,
    WindowBuilder,
    WindowCounts,
    WindowFrames,
    WindowGrid,
    encode_windows,
    preparation,
)
from actionclip_deploy.video.memory import OpenVideo, VideoSource
from actionclip_deploy.views import (
    Encoded,
    FeatureCache,
    ReadingStoppedError,
    Stopwatch,
    default_num_workers,
    scale_frames_of,
    work_ahead,
)

if TYPE_CHECKING:
    from actionclip_deploy.plot import Picture

# Frames of the grid that are read, and then encoded, at a time.
FRAMES_PER_PART = 64


# Videos in files


class OpenFile(Protocol):
    """A video whose frames have times and are given in order: a `video.VideoReader`."""

    @property
    def num_frames(self) -> int:
        """Frames there are, N."""
        ...

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, shape (N,)."""
        ...

    @property
    def duration_seconds(self) -> float:
        """Of the video."""
        ...

    def read_in_order(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Give frames (H, W, 3) with their numbers, which grow."""
        ...


@dataclass(frozen=True, eq=False)
class FileGrid:
    """The grid of a video in a file, whose frames and times are known before they are decoded.

    Attributes:
        grid: Where windows lie. Of a video that is shorter than a window it is one window of all.
        points: The points that lie in a window and their frames, by their numbers in the file.
            Times are seconds from the first frame.
        duration_seconds: Of the video.
    """

    grid: WindowGrid
    points: tuple[GridPoint[int], ...]
    duration_seconds: float

    @classmethod
    def of(cls, video: OpenFile, grid: WindowGrid) -> FileGrid:
        """The grid of an open video.

        A frame stands until the next one comes, as in a recording of a screen; where that takes
        longer than a window, a new run begins.
        """
        seconds = _seconds_from_start(video.pts_seconds)
        duration = max(video.duration_seconds, float(seconds[-1]))
        if duration <= grid.window_seconds * (1 + STEP_TOLERANCE):
            grid = replace(grid, window_seconds=duration or grid.window_seconds, stride_steps=1)
            chosen = sample_segments(video.num_frames, grid.num_frames).tolist()
            whole = (GridPoint(0, number, 0.0, index) for number, index in enumerate(chosen))
            return cls(grid, tuple(whole), duration)
        intervals = np.diff(seconds)
        longest = max(grid.window_seconds, 2 * float(np.median(intervals)))
        selector = GridSelector[int](grid, longest)
        points: list[GridPoint[int]] = []
        for index, at in enumerate(seconds.tolist()):
            points += selector.push(at, index)
        last = duration - float(seconds[-1])
        points += selector.end(last)

        def is_inside(point: GridPoint[int]) -> bool:
            end = point.start_seconds + (point.number + 1) * grid.step_seconds
            return grid.is_used(point.number) and end <= duration + last / 4

        return cls(grid, tuple(filter(is_inside, points)), duration)


def _seconds_from_start(pts_seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times from the first frame on, shape (N,); a clock that starts again goes on instead."""
    steps = np.diff(pts_seconds)
    is_back = steps < 0
    if is_back.any():
        steps = np.where(is_back, np.median(np.abs(steps)), steps)
    return (
        np.concatenate([[0.0], np.cumsum(steps)]) if is_back.any() else pts_seconds - pts_seconds[0]
    )


def read_windows(
    video: OpenFile,
    file_grid: FileGrid,
    prepare: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    builder: WindowBuilder,
    stop: ThreadEvent | None = None,
) -> Iterator[WindowFrames]:
    """Read the windows of a video in one pass; only frames of the grid are converted.

    Args:
        video: Open, with the frames that `file_grid` was made of.
        file_grid: Which frames are wanted.
        prepare: Turns a frame (H, W, 3) into one of the model's, (S, S, 3).
        builder: Of the same grid.
        stop: Once set, reading ends at the next chance.

    Yields:
        The windows of some `FRAMES_PER_PART` frames of the grid at a time.

    Raises:
        FramesChangedError: If damage is found only now: begin again, with a new `FileGrid`.
        VideoError: If a frame cannot be read.
        ReadingStoppedError: If `stop` was set.
    """
    points = deque(file_grid.points)
    wanted = np.unique(np.array([point.frame for point in points], np.int64))
    if not len(wanted):
        return
    num_waiting = 0
    for index, frame in video.read_in_order(wanted):
        if stop is not None and stop.is_set():
            raise ReadingStoppedError
        pixels = prepare(frame)
        while points and points[0].frame == index:
            builder.add(points.popleft().of(pixels))
            num_waiting += 1
        if num_waiting >= FRAMES_PER_PART and builder.whole:
            num_waiting = 0
            work = builder.take()
            assert work is not None
            yield work
    work = builder.take()
    if work is not None:
        yield work


# What labels score over time


@dataclass(frozen=True, eq=False)
class Timeline:
    """What labels scored in a long video over time. It prints as its events.

    Times are seconds from the first frame.

    Attributes:
        video: The file, or what the video is called.
        grid: Where windows lie; of a video shorter than a window it is one window of all.
        windows: Those that are whole, S of them.
        scores: Of all labels in each window, as `predict` gives them, float32, shape (S, C).
        watched: Labels and groups that events are of, and their thresholds.
        events: When labels held, by their start.
        duration_seconds: Of the video.
        counts: What became of its frames and windows.
        scoring: What it was made with.
        timings_ms: Milliseconds by stage, and `total`; reading goes on while graphs run.
        warnings: Damage that was found in the video.
        source: What was opened; None where it is the file `video`.
    """

    video: Path
    grid: WindowGrid
    windows: tuple[Window, ...]
    scores: Float32Array
    watched: WatchedLabels
    events: tuple[Event, ...]
    duration_seconds: float
    counts: WindowCounts
    scoring: Scoring
    timings_ms: dict[str, float]
    warnings: tuple[str, ...] = ()
    source: VideoSource | None = None

    @property
    def name(self) -> str:
        """The last part of the video's path."""
        return self.video.name

    @property
    def labels(self) -> tuple[str, ...]:
        """All C labels of the bank; `scores` are theirs."""
        return self.scoring.bank.labels

    @property
    def watched_names(self) -> tuple[str, ...]:
        """Labels and groups that events are of, E of them."""
        return self.watched.names

    @property
    def starts_seconds(self) -> NDArray[np.float64]:
        """When each window starts, float64, shape (S,)."""
        return np.array([window.start_seconds for window in self.windows], np.float64)

    def step_scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What is watched, over time: in each step of the grid, the mean of the windows over it.

        Returns:
            When each step starts, float64, shape (G,), and the scores of `watched.names`, float64,
            shape (G, E), calibrated where the bank is. Steps in no whole window are left out.
        """
        watched = self.watched.scores(self.scores)
        return mean_over_windows(self.windows, watched, self.grid)

    def to_dict(self) -> dict[str, Any]:
        """The record that `actionclip predict --timeline --json` prints, as plain JSON values."""
        return self.record().to_dict()

    def to_json(self) -> str:
        """The record that `actionclip predict --timeline --json` prints."""
        return json_text(self.to_dict())

    def record(self) -> TimelineRecord:
        """Put it down as it leaves the program; the matrix of scores stays here."""
        bank = self.scoring.bank
        return TimelineRecord(
            video=str(self.video),
            name=self.name,
            events=tuple(IntervalRecord.model_validate(event) for event in self.events),
            duration_seconds=round(self.duration_seconds, 6),
            window_seconds=self.grid.window_seconds,
            stride_seconds=self.grid.stride_seconds,
            num_windows=len(self.windows),
            num_windows_voided=self.counts.num_voided,
            num_frames=self.counts.num_frames,
            num_frames_reused=self.counts.num_reused,
            method=self.scoring.method,
            bank=bank.used(None if bank.is_adhoc else bank.name),
            runtime=self.scoring.runtime,
            warnings=self.warnings,
            timings_ms=self.timings_ms,
        )

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each event.

        Its columns are `video`, `label`, `start_seconds`, `end_seconds`, `mean`, `peak` and
        `error`, which is empty.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as exc:
            raise MissingExtraError("to_dataframe", "dataframe") from exc
        rows = event_rows(str(self.video), self.record())
        table = pd.DataFrame(rows, columns=list(EVENT_COLUMNS))
        return table.astype(dict.fromkeys(EVENT_COLUMNS[2:6], "float64"))

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw when labels held, their scores over time, and frames of the video above.

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
        from actionclip_deploy.plot import SUFFIXES, plot_timeline

        target = None if path is None else Path(path)
        if target is not None and target.suffix.lower() not in SUFFIXES:
            raise ValueError(f"path is {path}; give a file that ends in {', '.join(SUFFIXES)}.")
        return plot_timeline(self, target)

    def save_subtitles(self, path: str | Path) -> None:
        """Write the events as subtitles, which players show in the video: WebVTT or SRT.

        Args:
            path: A file to write; its suffix, .vtt or .srt, says which.

        Raises:
            ValueError: If the suffix is another one.
            FileWriteError: If the file cannot be written.
        """
        target = Path(path)
        check_subtitles_path(target)
        text = _vtt(self.events) if target.suffix.lower() == ".vtt" else _srt(self.events)
        with staged_file(target) as staged:
            staged.write_text(text, encoding="utf-8", newline="\n")

    def save_annotated(self, path: str | Path, *, max_width: int = 1280) -> None:
        """Write a copy of the video, without its sound, with the events that hold at each frame.

        Args:
            path: A file to write, .mp4.
            max_width: Wider frames are made smaller.

        Raises:
            ValueError: If the suffix is another one.
            VideoError: If the video cannot be read again, or has no times.
            FileWriteError: If the file cannot be written.
        """
        from actionclip_deploy.video.recording import VideoWriter, draw_caption, shrink

        target = Path(path)
        if target.suffix.lower() != ".mp4":
            raise ValueError(f"{path} is no MP4 file by its name; give a name in .mp4.")
        with self.open_frames() as video, ExitStack() as stack:
            frames = cast(OpenFile, video)
            seconds = _seconds_from_start(frames.pts_seconds)
            writer: VideoWriter | None = None
            numbers = np.arange(frames.num_frames)
            for number, pixels in frames.read_in_order(numbers):
                pixels = shrink(pixels, max_width)
                if writer is None:
                    height, width = pixels.shape[:2]
                    writer = stack.enter_context(VideoWriter(target, width=width, height=height))
                at = float(seconds[number])
                lines = [
                    f"{_one_line(event.label)}  {event.mean:.2f}"
                    for event in self.events
                    if event.start_seconds <= at < event.end_seconds
                ]
                writer.write(draw_caption(pixels, lines), at)

    def open_frames(self) -> AbstractContextManager[OpenVideo]:
        """Open the video again for the time of a block.

        Raises:
            VideoError: If it is not there any more.
        """
        return open_again(self.video if self.source is None else self.source, self.scoring)

    def __repr__(self) -> str:
        return (
            f"<Timeline of {self.name}: {len(self.events)} events in "
            f"{self.duration_seconds:.1f} s, {len(self.windows)} windows>"
        )

    def __str__(self) -> str:
        lines = [f"{self.name}, {clock_text(self.duration_seconds)}"]
        lines += [
            f"  {clock_text(e.start_seconds)} - {clock_text(e.end_seconds)}  {e.label}  "
            f"{e.mean:.3f}, at most {e.peak:.3f}"
            for e in self.events
        ]
        return "\n".join(lines if self.events else [*lines, "  no label held"])


# Both formats are a few lines; libraries that were tried (webvtt-py, srt) escape no text.
SUBTITLE_SUFFIXES = (".vtt", ".srt")


def check_subtitles_path(path: Path) -> None:
    """Refuse a name that promises another format.

    Raises:
        ValueError: If it ends in neither .vtt nor .srt.
    """
    if path.suffix.lower() not in SUBTITLE_SUFFIXES:
        raise ValueError(f"{path} is neither WebVTT nor SRT; give a name in .vtt or .srt.")


def _vtt(events: Sequence[Event]) -> str:
    """The characters that begin a tag or an entity are written as entities."""
    cues = [
        f"{_cue_time(event.start_seconds, '.')} --> {_cue_time(event.end_seconds, '.')}\n"
        f"{escape(_one_line(event.label), quote=False)} ({event.mean:.2f})\n"
        for event in events
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _srt(events: Sequence[Event]) -> str:
    cues = [
        f"{number}\n"
        f"{_cue_time(event.start_seconds, ',')} --> {_cue_time(event.end_seconds, ',')}\n"
        f"{_one_line(event.label)} ({event.mean:.2f})\n"
        for number, event in enumerate(events, start=1)
    ]
    return "\n".join(cues)


def _one_line(label: str) -> str:
    return " ".join(printable(label, kept="").split())


def _cue_time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def mean_over_windows(
    windows: tuple[Window, ...], scores: NDArray[np.floating[Any]], grid: WindowGrid
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give each grid step the mean of the scores of the windows that it lies in.

    Args:
        windows: S windows in their order.
        scores: Of each, shape (S, C).
        grid: That they lie on.

    Returns:
        When steps start, float64, shape (G,), and their scores, float64, shape (G, C); without the
        steps that lie in no window.
    """
    starts: list[NDArray[np.floating[Any]]] = []
    means: list[NDArray[np.float64]] = []
    runs = np.array([window.run for window in windows], np.int64)
    for run in np.unique(runs):
        places = np.flatnonzero(runs == run)
        first = windows[int(places[0])]
        steps = np.array(
            [(windows[int(p)].number - first.number) * grid.stride_steps for p in places], np.int64
        )
        total = np.zeros((int(steps[-1]) + grid.num_frames, scores.shape[1]))
        count = np.zeros(len(total), np.int64)
        for offset in range(grid.num_frames):
            # No step twice, since windows start at different ones.
            total[steps + offset] += scores[places]
            count[steps + offset] += 1
        covered = np.flatnonzero(count)
        starts.append(first.start_seconds + covered * grid.step_seconds)
        means.append(total[covered] / count[covered, np.newaxis])
    if not starts:
        return np.empty(0), np.empty((0, scores.shape[1]))
    return np.concatenate(starts, dtype=np.float64), np.concatenate(means)


def read_timeline(
    recognizer: Recognizer,
    video: str | Path | VideoSource,
    grid: WindowGrid,
    *,
    watched: WatchedLabels | None = None,
    still: float = 0.0,
    min_seconds: float | None = None,
    merge_seconds: float | None = None,
    num_threads: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Timeline:
    """Score the windows of a long video, and find when labels held.

    The video is decoded once, in a thread, while the graphs run; memory grows with the scores
    alone, some 3 MB an hour for 400 labels and a window every half second.

    Args:
        recognizer: Its bank and how it scores; its views are not used, a window is one clip.
        video: A file, or what is opened like one.
        grid: Where windows lie.
        watched: What events are of; None for each label, at the thresholds of the bank.
        still: See `WindowBuilder`.
        min_seconds: Shorter events are left out; None for two strides.
        merge_seconds: Events of a label no further apart are one; None for a quarter of a window.
        num_threads: Of the decoder; None for the cores that there are.
        progress: Is told the seconds of the video that are done, and all of them.

    Raises:
        VideoError: If no frame can be had from the video, or its frames have no times.
        InferenceError: If the runtime fails.
        WrongKindError: If it is neither a file's name nor what is opened like a file.
    """
    stopwatch = Stopwatch()
    found: list[VideoWarning] = []
    threads = default_num_workers() if num_threads is None else num_threads
    path = Path(video if isinstance(video, str | Path) else getattr(video, "name", "video"))
    with recognizer.encoder.open_video(video, found.append, num_threads=threads) as opened:
        if not hasattr(opened, "read_in_order"):
            raise VideoError(
                f"{path} holds frames without times, and a timeline needs them; give the file of "
                "a video, or its bytes."
            )
        reader = cast(OpenFile, opened)
        watched = watched or WatchedLabels.of(recognizer.bank, recognizer.method)
        while True:
            file_grid = FileGrid.of(reader, grid)
            builder = WindowBuilder(file_grid.grid, still=still)
            try:
                windows, scores = _score_windows(
                    recognizer, reader, path, file_grid, builder, stopwatch, progress
                )
                break
            except FramesChangedError:
                continue  # at most once: from now on the reader decodes everything
    for warning in found:
        warnings.warn(warning, stacklevel=2)
    grid = file_grid.grid
    starts, steps = mean_over_windows(windows, watched.scores(scores), grid)
    events = find_events(
        steps,
        watched.names,
        starts_seconds=starts,
        step_seconds=grid.step_seconds,
        thresholds=watched.thresholds,
        min_seconds=2 * grid.stride_seconds if min_seconds is None else min_seconds,
        merge_seconds=grid.window_seconds / 4 if merge_seconds is None else merge_seconds,
    )
    return Timeline(
        video=path,
        grid=grid,
        windows=windows,
        scores=scores,
        watched=watched,
        events=tuple(events),
        duration_seconds=file_grid.duration_seconds,
        counts=builder.counts,
        scoring=recognizer.scoring,
        timings_ms=stopwatch.timings_ms(),
        warnings=tuple(map(str, found)),
        source=None if isinstance(video, str | Path) else video,
    )


def _score_windows(
    recognizer: Recognizer,
    reader: OpenFile,
    path: Path,
    file_grid: FileGrid,
    builder: WindowBuilder,
    stopwatch: Stopwatch,
    progress: Callable[[float, float], None] | None,
) -> tuple[tuple[Window, ...], Float32Array]:
    windows: list[Window] = []
    scores = [np.empty((0, len(recognizer.bank.labels)), np.float32)]
    encoded = encode_file(recognizer.runtime, reader, path, file_grid, builder, recognizer.region)
    with closing(encoded):
        for each in encoded:
            for graph, seconds in each.seconds.items():
                stopwatch.add(graph, seconds)
            with stopwatch.stage("score"):
                part = score(
                    recognizer.method,
                    each.embeddings,
                    recognizer.bank.embeddings,
                    scale=recognizer.ranker.scale,
                )
            scores.append(part)
            windows += each.work.windows
            if progress is not None:
                progress(windows[-1].end_seconds, file_grid.duration_seconds)
    return tuple(windows), np.concatenate(scores)


def encode_file(
    runtime: Runtime,
    reader: OpenFile,
    path: Path,
    file_grid: FileGrid,
    builder: WindowBuilder,
    region: Region = "frame",
) -> Generator[Encoded[WindowFrames], None, None]:
    """Read the windows of an open video in a thread, and encode them.

    Raises:
        FramesChangedError: As for `read_windows`.
        VideoError: As for `read_windows`.
        InferenceError: If the runtime fails.
    """
    prepare = preparation(runtime.manifest, region)
    scale_frames_of(reader, runtime.manifest, region)
    parts: Iterator[WindowFrames] | None = None

    def read(_: None, stop: ThreadEvent) -> WindowFrames | None:
        nonlocal parts
        if parts is None:
            parts = read_windows(reader, file_grid, prepare, builder, stop)
        try:
            return next(parts, None)
        except MemoryError as exc:
            raise VideoMemoryError.of(path) from exc

    def works(read_ahead: Iterator[WindowFrames | None]) -> Iterator[WindowFrames]:
        for work in read_ahead:
            if work is None:
                return
            yield work

    cache = FeatureCache(file_grid.grid.num_frames + 2 * FRAMES_PER_PART)
    # One thread, since a decoder goes on from frame to frame; the graphs run beside it.
    ahead = work_ahead(repeat(None), read, num_workers=1, max_ahead=2)
    with closing(ahead):
        yield from encode_windows(runtime, works(ahead), cache=cache)
