"""From open videos to the embeddings of their views: the one road that all videos take.

    frames = ViewReader(manifest, Views(3, 1), "frame").read(video, path, Stopwatch())
    (encoded,) = encode_views(runtime, [frames], sizes=CallSizes.of_videos(manifest.model))
    encoded.embeddings  # (3, D)

`encode_views` takes the frames of any number of owners, one after the other, and fills calls of
the graphs with them; each owner gets its own embeddings back. Whoever has videos is a scheduler
of it: one video is a list of one, a folder is an iterable that is read ahead (`work_ahead`), the
server's batcher gives what waits, and a stream gives windows and a `FeatureCache`.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError, ShapeError, VideoError, VideoWarning
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.sampling import Views, sample_views
from actionclip_deploy.video import Clip, VideoReader
from actionclip_deploy.video.memory import VideoSource
from actionclip_deploy.video.pixels import Scaling

# Bound memory: a decoded frame of 1080p has 6 MB, one of 8K has 106.
FRAMES_PER_READ = 32
_BYTES_PER_READ = 256 * 2**20

# Of the features that a run over files keeps; 14,000 frames of D = 512.
_REUSE_BYTES = 32 * 2**20
_ENTRY_BYTES = 350  # of a feature's key and its objects in Python


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


def frames_per_read(source: FrameSource) -> int:
    """How many frames may be held at a time; one of a size that is not known counts as small."""
    frame_bytes = 3 * getattr(source, "width", 0) * getattr(source, "height", 0)
    return max(1, min(FRAMES_PER_READ, _BYTES_PER_READ // max(1, frame_bytes)))


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


@dataclass(frozen=True, eq=False)
class ViewFrames:
    """The preprocessed frames of some views, each frame once.

    Attributes:
        pixels: F frames, uint8, shape (F, S, S, 3).
        views: Which of them each of the V views is made of, shape (V, T).
        keys: A name for each frame, by which a `FeatureCache` knows it again, such as the number
            of a stream and that of a frame in it; None where no frame will come again.

    Raises:
        ShapeError: If the three do not fit each other.
    """

    pixels: NDArray[np.uint8]
    views: NDArray[np.int64]
    keys: Sequence[Hashable] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        num_frames, views = len(self.pixels), self.views
        if self.pixels.ndim != 4 or views.ndim != 2:
            raise ShapeError(
                f"The frames have shape {self.pixels.shape} and their views {views.shape}; "
                "expected (F, S, S, 3) and (V, T)."
            )
        if views.size and not 0 <= views.min() <= views.max() < num_frames:
            raise ShapeError(
                f"The views are made of frames {views.min()} to {views.max()}, and there are "
                f"{num_frames}; frames are counted from 0."
            )
        if self.keys is not None and len(self.keys) != num_frames:
            raise ShapeError(f"There are {len(self.keys)} keys for {num_frames} frames.")

    @classmethod
    def of_clips(cls, clips: NDArray[np.uint8]) -> ViewFrames:
        """Whole clips that share no frame, shape (B, T, S, S, 3), as B views."""
        num_clips, num_frames = clips.shape[:2]
        views = np.arange(num_clips * num_frames).reshape(num_clips, num_frames)
        return cls(clips.reshape(-1, *clips.shape[2:]), views)


def content_keys(pixels: NDArray[np.uint8]) -> list[bytes]:
    """A key for each frame that equal frames share, whatever their video, crop or place.

    SHA-256, so that no video can be made whose frames take the features of other ones, as could
    be done with a faster hash that is not cryptographic. For a frame of 224 pixels it takes
    0.08 ms on a CPU with instructions for it, where BLAKE2b takes 0.27 ms.

    Args:
        pixels: The frames as the model takes them, uint8, shape (F, S, S, 3).
    """
    return [hashlib.sha256(np.ascontiguousarray(frame).data).digest() for frame in pixels]


@dataclass(frozen=True, eq=False)
class VideoFrames(ViewFrames):
    """The views of one video, and what is known of it.

    Attributes:
        video: What the video is called.
        stopwatch: Times the stages, those to come as well.
        indices: Frames of each clip, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T).
        warnings: What was found damaged on the way.
        error: Why there are no frames; then there are no views either.
        source: What was opened; None where it is the file of this name.
    """

    video: Path
    stopwatch: Stopwatch
    indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]
    warnings: Sequence[VideoWarning] = ()
    error: VideoError | None = None
    source: VideoSource | None = None

    @classmethod
    def failed(
        cls,
        video: Path,
        stopwatch: Stopwatch,
        error: VideoError,
    ) -> VideoFrames:
        """A video that gave no frames."""
        indices = np.empty((0, 0), np.int64)
        pixels = np.empty((0, 0, 0, 3), np.uint8)
        seconds = np.empty((0, 0))
        return cls(pixels, indices, video, stopwatch, indices, seconds, error=error)


def scaling_of(manifest: Manifest, region: Region, num_crops: int = 1) -> Scaling | None:
    """To what a reader scales frames for a model, where `region` asks for it.

    `preprocess_frames` crops what comes of it. Beside resizing by Pillow in full colour, as
    `region="frame"` does, a frame takes a third to a sixth of the time.
    """
    if region != "swscale":
        return None
    given = manifest.preprocessing
    short_side = given.resize_size if num_crops == 1 else manifest.model.input_size
    return Scaling(short_side, given.interpolation)


def scale_frames_of(source: object, manifest: Manifest, region: Region, num_crops: int = 1) -> None:
    """Have the frames of an open video scaled where it decodes them; others are resized later."""
    if isinstance(source, VideoReader):
        source.scale_to(scaling_of(manifest, region, num_crops))


class ReadingStoppedError(Exception):
    """Nobody wants the frames any more; never leaves the threads that read."""


@dataclass(frozen=True)
class ViewReader:
    """Reads the views of videos as a model takes them.

    Attributes:
        manifest: Of the model's bundle.
        sampled: Clips and crops per video.
        region: See `preprocess.preprocess_frames`.
        num_frames: T; None takes that of the model.
        names_frames: Whether frames get their `content_keys`, in the stage `hash`.
    """

    manifest: Manifest
    sampled: Views
    region: Region
    num_frames: int | None = None
    names_frames: bool = False

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
        num_frames = self.num_frames or self.manifest.model.num_frames
        scale_frames_of(source, self.manifest, self.region, self.sampled.num_crops)
        while True:
            num_video_frames = source.num_frames
            indices = sample_views(num_video_frames, num_frames, self.sampled.num_clips)
            distinct = np.unique(indices)
            crops = self._read_distinct(source, distinct, stopwatch, stop)
            if source.num_frames == num_video_frames:
                break
        num_crops, num_distinct = crops.shape[:2]
        places = np.searchsorted(distinct, indices)
        pixels = crops.reshape(num_crops * num_distinct, *crops.shape[2:])
        keys = None
        if self.names_frames:
            with stopwatch.stage("hash"):
                keys = content_keys(pixels)
        return VideoFrames(
            pixels=pixels,
            keys=keys,
            views=np.concatenate([crop * num_distinct + places for crop in range(num_crops)]),
            video=video,
            stopwatch=stopwatch,
            indices=indices,
            pts_seconds=source.pts_seconds[indices],
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
        count = frames_per_read(source)
        for start in range(0, len(wanted), count):
            if stop is not None and stop.is_set():
                raise ReadingStoppedError
            with stopwatch.stage("read"):
                clip = source.read(wanted[start : start + count])
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


class FeatureCache:
    """The features of frames that come again, by their keys; the ones used longest ago go first.

    Args:
        max_frames: How many features are kept. Of a stream whose windows are L frames long, no
            window holds a frame that is L or more frames older than its newest.
    """

    def __init__(self, max_frames: int) -> None:
        if max_frames < 1:
            raise ArgumentError("max_frames", f"is {max_frames}; it must be 1 or more.")
        self.max_frames = max_frames
        self._features: OrderedDict[Hashable, Float32Array] = OrderedDict()

    @classmethod
    def of_files(cls, manifest: Manifest) -> FeatureCache:
        """For the frames of a run over files, in some 32 MiB."""
        feature_bytes = np.dtype(np.float32).itemsize * manifest.model.embedding_dim
        return cls(_REUSE_BYTES // (feature_bytes + _ENTRY_BYTES))

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: Hashable) -> Float32Array | None:
        """The feature of a frame, shape (D,); None where it is not kept."""
        if key not in self._features:
            return None
        self._features.move_to_end(key)
        return self._features[key]

    def put(self, key: Hashable, feature: Float32Array) -> None:
        """Keep the feature of a frame."""
        self._features[key] = feature
        self._features.move_to_end(key)
        while len(self._features) > self.max_frames:
            self._features.popitem(last=False)


# Calls' worth of frames that may wait, with known features, for a call that is not full.
_KNOWN_PER_CALL = 2

Owner = TypeVar("Owner")
Work = TypeVar("Work", bound=ViewFrames)


@dataclass(frozen=True, eq=False)
class Encoded(Generic[Work]):
    """The embeddings of the views of one owner.

    Attributes:
        work: What was encoded.
        embeddings: Of unit norm, float32, shape (V, D).
        features: Of the frames, before normalisation, float32, shape (F, D); None where the model
            mixes the frames of a clip.
        seconds: The owner's share of the time of the calls, by graph.
        num_frames_encoded: Frames that went through the visual graph for this owner; the features
            of the others were known. Of a model that mixes frames, those of all views.
    """

    work: Work
    embeddings: Float32Array
    features: Float32Array | None
    seconds: dict[str, float]
    num_frames_encoded: int

    @property
    def num_frames_reused(self) -> int:
        """Frames whose features were known; of a model that mixes frames, 0."""
        return 0 if self.features is None else len(self.features) - self.num_frames_encoded


def encode_views(
    runtime: Runtime,
    works: Iterable[Work],
    *,
    sizes: CallSizes,
    cache: FeatureCache | None = None,
) -> Iterator[Encoded[Work]]:
    """Turn the frames of views into embeddings, in calls that their owners share.

    Each frame goes through the visual graph once, and each view as a row of features through the
    temporal one; where the model mixes the frames of a clip, each view goes through its one graph.
    A frame's features do not depend on what else is in the call, but for rounding: ONNX Runtime's
    CPU provider gives the same bits for frames in fp32, and other last bits for views.

    Args:
        runtime: What executes the graphs.
        works: Frames and views, all of one T; drawn from until a call is full, so they may be
            endless. One without views is passed on in its place.
        sizes: The most rows of a call.
        cache: Where features of frames with keys are looked up and kept, in the order of the
            works, so what is found does not depend on time. Of no use where the model mixes the
            frames of a clip: each window of a stream is then encoded anew.

    Yields:
        What came out, in the order of the works, as soon as the calls that hold it are done.

    Raises:
        ShapeError: If the runtime does not take such frames, or so many in a view.
        InferenceError: If the runtime fails.
    """
    shares_calls = runtime.calls_can_be_shared
    if not runtime.frames_are_independent:
        for job in encode_in_full_calls(
            map(_clip_job, works),
            runtime.encode_video,
            rows_per_call=sizes.video,
            shares_calls=shares_calls,
        ):
            num_frames = job.owner.views.size
            yield Encoded(job.owner, job.output(), None, {"video": job.seconds}, num_frames)
        return
    frames = _FrameJobs[Work](cache)
    visual = encode_in_full_calls(
        map(frames.job, works),
        runtime.encode_frames,
        rows_per_call=sizes.visual,
        shares_calls=shares_calls,
    )
    temporal = encode_in_full_calls(
        map(frames.view_job, visual),
        runtime.encode_clips,
        rows_per_call=sizes.temporal,
        shares_calls=shares_calls,
    )
    for views in temporal:
        work, features, visual_seconds, num_frames = views.owner
        seconds = {"visual": visual_seconds, "temporal": views.seconds}
        yield Encoded(work, views.output(), features, seconds, num_frames)


@dataclass(eq=False)
class Job(Generic[Owner]):
    """Rows of one owner that a graph is to encode.

    Attributes:
        owner: Whose they are.
        num_rows: How many; one without rows is passed on in its place.
        num_known: Rows beyond those, whose output was known.
        take: Gives rows [start, stop) of the graph's input.
        outputs: What came out so far, in parts of shape (n, D).
        seconds: Its share of the time of the calls.
        num_taken: Rows that have been encoded.
    """

    owner: Owner
    num_rows: int
    take: Callable[[int, int], Array]
    outputs: list[Float32Array] = field(default_factory=list)
    seconds: float = 0.0
    num_taken: int = 0
    num_known: int = 0

    @classmethod
    def of_rows(cls, owner: Owner, rows: Array) -> Job[Owner]:
        """Rows that are there already."""
        return cls(owner, len(rows), lambda start, stop: rows[start:stop])

    @property
    def num_left(self) -> int:
        """Rows that have not been encoded."""
        return self.num_rows - self.num_taken

    def output(self) -> Float32Array:
        """What came out, shape (num_rows, D); (0, 0) without rows."""
        if len(self.outputs) != 1:
            self.outputs = [np.concatenate(self.outputs or [np.empty((0, 0), np.float32)])]
        return self.outputs[0]


def encode_in_full_calls(
    jobs: Iterable[Job[Owner]],
    encode: Callable[[Any], Float32Array],
    *,
    rows_per_call: int,
    shares_calls: bool = True,
) -> Iterator[Job[Owner]]:
    """Encode the rows of jobs in calls of a fixed number of rows; gives the jobs in their order.

    Which rows go into which call depends on the jobs alone, never on time, so that a run can be
    repeated to the last bit. Where most rows are known, a call is made before it is full, since
    the owners that wait for it hold their rows.

    Args:
        jobs: Drawn from until a call is full.
        encode: Encodes rows; output i belongs to row i.
        rows_per_call: Rows of a call; the last one may have fewer.
        shares_calls: Whether a call may hold rows of several jobs.
    """
    waiting: deque[Job[Owner]] = deque()
    for job in jobs:
        waiting.append(job)
        num_known = sum(each.num_known for each in waiting)
        while (num_left := sum(each.num_left for each in waiting)) >= rows_per_call or (
            num_left and (not shares_calls or num_known >= _KNOWN_PER_CALL * rows_per_call)
        ):
            _call(waiting, encode, min(num_left, rows_per_call))
        yield from _pop_done(waiting)
    while num_left := sum(each.num_left for each in waiting):
        _call(waiting, encode, min(num_left, rows_per_call))
        yield from _pop_done(waiting)


def _call(
    waiting: Iterable[Job[Owner]],
    encode: Callable[[Any], Float32Array],
    num_rows: int,
) -> None:
    """Encode the next rows, those of the first jobs first."""
    shares: list[tuple[Job[Owner], int]] = []
    parts: list[Array] = []
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


def _clip_job(work: Work) -> Job[Work]:
    """The views of a work as whole clips."""
    pixels, views = work.pixels, work.views
    return Job(work, len(views), lambda start, stop: pixels[views[start:stop]])


@dataclass(eq=False)
class _Frames(Generic[Work]):
    """The frames of a work, and where the feature of each comes from.

    Attributes:
        work: Whose they are.
        sources: A feature, or a job that will have encoded it and its row there; None where the
            work's own job encodes all of its frames.
    """

    work: Work
    sources: list[Float32Array | tuple[Job[Any], int]] | None


class _FrameJobs(Generic[Work]):
    """Jobs for the visual graph, without the frames that are in the cache or on their way there.

    Args:
        cache: Where features are found, and put once a job is done.
    """

    def __init__(self, cache: FeatureCache | None) -> None:
        self._cache = cache
        self._under_way: dict[Hashable, tuple[Job[_Frames[Work]], int]] = {}

    def job(self, work: Work) -> Job[_Frames[Work]]:
        """A job for the frames of a work that nobody has encoded yet."""
        pixels = work.pixels
        if self._cache is None or work.keys is None:
            return Job.of_rows(_Frames(work, None), pixels)
        sources: list[Float32Array | tuple[Job[Any], int]] = []
        rows: list[int] = []
        job = Job(_Frames(work, sources), 0, lambda start, stop: pixels[rows[start:stop]])
        for row, key in enumerate(work.keys):
            found = self._cache.get(key)
            if found is None and key not in self._under_way:
                self._under_way[key] = (job, len(rows))
                rows.append(row)
            sources.append(self._under_way[key] if found is None else found)
        job.num_rows, job.num_known = len(rows), len(sources) - len(rows)
        return job

    def view_job(self, job: Job[_Frames[Work]]) -> Job[tuple[Work, Float32Array, float, int]]:
        """A job for the temporal graph, of a work whose frames are encoded, as all before it."""
        work, features = job.owner.work, self._features(job)
        views = work.views
        return Job(
            (work, features, job.seconds, job.num_rows),
            len(views),
            lambda start, stop: features[views[start:stop]],
        )

    def _features(self, job: Job[_Frames[Work]]) -> Float32Array:
        sources, keys = job.owner.sources, job.owner.work.keys
        if sources is None or not sources:
            return job.output()
        assert self._cache is not None
        assert keys is not None
        features = np.stack(
            [s if isinstance(s, np.ndarray) else s[0].output()[s[1]] for s in sources]
        )
        sources.clear()  # which may hold a job that holds another, and so on
        for key, feature in zip(keys, features, strict=True):
            self._cache.put(key, feature.copy())
            if key in self._under_way and self._under_way[key][0] is job:
                del self._under_way[key]
        return features


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

    Threads and not processes, since FFmpeg, Pillow and numpy let go of Python's lock.

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
