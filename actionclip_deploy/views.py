"""From an open video to the input of a graph: samples the views, reads, resizes, crops."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import VideoError, VideoWarning
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.runtimes.machine import num_available_cores
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


# Full calls of a graph across videos: rows of several in one call, each gets its own back.


Owner = TypeVar("Owner")


@dataclass(eq=False)
class Job(Generic[Owner]):
    """Rows of one owner that a graph is to encode.

    Attributes:
        owner: Whose they are.
        num_rows: How many; one without rows is passed on in its place.
        take: Gives rows [start, stop) of the graph's input.
        outputs: What came out so far, in parts of shape (n, D).
        seconds: Its share of the time of the calls.
    """

    owner: Owner
    num_rows: int
    take: Callable[[int, int], NDArray[np.uint8]]
    outputs: list[Float32Array] = field(default_factory=list)
    seconds: float = 0.0
    num_taken: int = 0

    @property
    def num_left(self) -> int:
        """Rows that have not been encoded."""
        return self.num_rows - self.num_taken

    def output(self) -> Float32Array:
        """What came out, shape (num_rows, D)."""
        return self.outputs[0] if len(self.outputs) == 1 else np.concatenate(self.outputs)


def encode_in_full_calls(
    jobs: Iterable[Job[Owner]],
    encode: Callable[[NDArray[np.uint8]], Float32Array],
    *,
    rows_per_call: int,
    shares_calls: bool = True,
) -> Iterator[Job[Owner]]:
    """Encode the rows of jobs in calls of a fixed number of rows; gives the jobs in their order.

    Which rows go into which call depends on the jobs alone, never on time, so that a run can be
    repeated to the last bit.

    Args:
        jobs: Drawn from until a call is full.
        encode: Encodes rows; output i belongs to row i.
        rows_per_call: Rows of a call; the last one may have fewer.
        shares_calls: Whether a call may hold rows of several jobs.
    """
    waiting: deque[Job[Owner]] = deque()
    for job in jobs:
        waiting.append(job)
        while (num_left := sum(each.num_left for each in waiting)) >= rows_per_call or (
            num_left and not shares_calls
        ):
            _call(waiting, encode, min(num_left, rows_per_call))
        yield from _pop_done(waiting)
    while num_left := sum(each.num_left for each in waiting):
        _call(waiting, encode, min(num_left, rows_per_call))
        yield from _pop_done(waiting)


def _call(
    waiting: Iterable[Job[Owner]],
    encode: Callable[[NDArray[np.uint8]], Float32Array],
    num_rows: int,
) -> None:
    """Encode the next rows, those of the first jobs first."""
    shares: list[tuple[Job[Owner], int]] = []
    parts: list[NDArray[np.uint8]] = []
    num_open = num_rows
    for job in waiting:
        count = min(job.num_left, num_open)
        if count:
            parts.append(job.take(job.num_taken, job.num_taken + count))
            shares.append((job, count))
            num_open -= count
        if not num_open:
            break
    start = time.perf_counter()
    outputs = encode(parts[0] if len(parts) == 1 else np.concatenate(parts))
    seconds = time.perf_counter() - start
    place = 0
    for job, count in shares:
        job.outputs.append(outputs[place : place + count])
        job.seconds += seconds * count / num_rows
        job.num_taken += count
        place += count


def _pop_done(waiting: deque[Job[Owner]]) -> Iterator[Job[Owner]]:
    while waiting and not waiting[0].num_left:
        yield waiting.popleft()


# Threads that work ahead of who takes their results: in order, and never too far ahead.
#
# Threads, not processes: FFmpeg, Pillow and numpy let go of Python's lock while they work.


Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEFAULT_WORKERS = 8


def default_num_workers() -> int:
    """As many as the cores that this process may use, up to a bound."""
    return min(MAX_DEFAULT_WORKERS, num_available_cores())


def work_ahead(
    items: Iterable[Item],
    work: Callable[[Item, Event], Result],
    *,
    num_workers: int,
    max_ahead: int,
) -> Generator[Result, None, None]:
    """Do work on items in threads; gives the results in the order of the items.

    However the generator ends (its items run out, an error, an interruption, `close`), work that
    has not begun is dropped, and it waits for what has.

    Args:
        items: Drawn from no more than `max_ahead` before the last result that was taken.
        work: Called in a thread with an item, and an event that is set once nobody waits for
            the result. What it raises is raised in the place of its result.
        num_workers: Threads.
        max_ahead: Results and work in hand at a time, those that are taken left out.
    """
    stop = Event()
    source = iter(items)
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="actionclip-read")
    try:
        while True:
            for item in islice(source, max_ahead - len(pending)):
                pending.append(pool.submit(work, item, stop))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
