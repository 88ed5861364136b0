"""Watches live sources: one runtime for many cameras, windows as they come, events as they begin.

    cameras = read_cameras(Path("cameras.toml"))
    with Watcher(runtime, cameras, banks, on_event=print) as watcher:
        watcher.run(stop)

A thread for each source decodes it and prepares the frames of its grid. The scheduler, one thread,
takes what windows there are of all sources, encodes them in shared calls, and never waits for a
source. What is live may not get old: windows that waited longer than a stride are dropped, all but
the newest, and counted. Of files and pipes nothing is dropped; they wait.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, LabelBankError, LabelError, VideoError
from actionclip_deploy.events import EventTracker, ScoredWindow, WatchedLabels, utc_text
from actionclip_deploy.files import read_text
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod, Within, describe_invalid
from actionclip_deploy.preprocess import Region, check_region
from actionclip_deploy.records import EventRecord, LabelScore, StreamRecord, UsedBank
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.scoring import score
from actionclip_deploy.stream import (
    GridPoint,
    GridSelector,
    Window,
    WindowBuilder,
    WindowFrames,
    WindowGrid,
    encode_windows,
    preparation,
)
from actionclip_deploy.video.live import LiveFrame, LiveReader, SourceState
from actionclip_deploy.video.pixels import Scaling
from actionclip_deploy.video.reader import MAX_PIXELS
from actionclip_deploy.video.sources import Source, parse_source
from actionclip_deploy.views import FeatureCache, scaling_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

MAX_CAMERAS = 1000
# Windows of a file that wait to be encoded; its reader waits when there are as many.
_MAX_WAITING = 32
_NUM_AGES = 2000  # of which percentiles are told
HISTORY_SECONDS = 600.0
_IDLE_SECONDS = 0.1
_BANK_POLL_SECONDS = 1.0
# A camera that gives fewer frames than the grid has points is not broken off by each of them.
_NUM_INTERVALS = 25
_GAP_INTERVALS = 3.0
# A frame of each of so many grid steps may wait between a source and the scheduler.
_SLACK_FRAMES = 64


# What is watched


@dataclass(frozen=True)
class Camera:
    """A source and how it is watched.

    Attributes:
        source: Where frames come from; its name is the camera's.
        labels: Name of a label bank; None for the watcher's.
        window_seconds: None for that of the model, see `stream.WindowGrid.of_model`, or of a saved
            query.
        stride_seconds: None for one grid step, or that of a saved query.
        region: The part of a frame that is looked at: left, top, right and bottom as shares of
            its width and height; None for all of it.
        thresholds: Where events open, for all labels or by name; None for those of the bank.
        groups: Labels that count as one event, by the name of their group.
        still: See `stream.WindowBuilder`.
        cooldown_seconds: Time after an event in which none of the same label begins.
    """

    source: Source
    labels: str | None = None
    window_seconds: float | None = None
    stride_seconds: float | None = None
    region: tuple[float, float, float, float] | None = None
    thresholds: float | Mapping[str, float] | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    still: float = 0.0
    cooldown_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: If the region is not a part of a frame.
        """
        if self.region is not None:
            left, top, right, bottom = self.region
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"The region of the camera {self.name!r} is {list(self.region)}; give left, "
                    "top, right and bottom as shares of the frame, from 0 to 1 and ascending."
                )

    @property
    def name(self) -> str:
        """What it is called."""
        return self.source.name


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    labels: str | None = None
    window: Annotated[float, Within(1e-3, 3600)] | None = None
    stride: Annotated[float, Within(1e-3, 3600)] | None = None
    region: tuple[float, float, float, float] | None = None
    thresholds: float | dict[str, float] | None = None
    groups: dict[str, tuple[str, ...]] | None = None
    still: Annotated[float, Within(0, 255)] | None = None
    cooldown: Annotated[float, Within(0, 1e6)] | None = None


class _CameraEntry(_Entry):
    name: str
    source: str


class _CamerasFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    defaults: _Entry = _Entry()
    camera: tuple[_CameraEntry, ...] = Field(min_length=1, max_length=MAX_CAMERAS)


def read_cameras(path: Path) -> list[Camera]:
    """Read a file of cameras (docs/howto/streams.md); `${NAME}` is taken from the environment.

    Raises:
        ValueError: If it is not such a file; names the camera and the key.
        VideoError: If a source cannot be read here.
    """
    text = read_text(path, "file of cameras", ValueError)
    try:
        cameras = _CamerasFile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ValueError(f"{path} is not TOML: {exc}.") from exc
    except ValidationError as exc:
        raise ValueError(f"{path} is not a file of cameras: {describe_invalid(exc)}.") from exc
    found = [_camera(entry, cameras.defaults, path) for entry in cameras.camera]
    check_names(found)
    return found


def _camera(entry: _CameraEntry, defaults: _Entry, path: Path) -> Camera:
    def said(key: str, other: Any) -> Any:
        own, general = getattr(entry, key), getattr(defaults, key)
        return own if own is not None else general if general is not None else other

    if not re.fullmatch(r"[^\x00-\x1f/\\]{1,100}", entry.name):
        raise ValueError(
            f"{path}: the camera {entry.name!r} has a name that is empty, longer than 100 "
            "characters, or has a slash in it; give it another, which addresses will have."
        )
    try:
        return Camera(
            parse_source(entry.source, name=entry.name),
            labels=said("labels", None),
            window_seconds=said("window", None),
            stride_seconds=said("stride", None),
            region=said("region", None),
            thresholds=said("thresholds", None),
            groups=said("groups", {}),
            still=said("still", 0.0),
            cooldown_seconds=said("cooldown", 0.0),
        )
    except ValueError as exc:
        raise ValueError(f"{path}, camera {entry.name!r}: {exc}") from exc


def check_names(cameras: Iterable[Camera]) -> None:
    """Refuse two cameras of one name.

    Raises:
        ValueError: If there are.
    """
    seen: set[str] = set()
    for camera in cameras:
        if camera.name in seen:
            raise ValueError(f"Two cameras are called {camera.name!r}; give each its own name.")
        seen.add(camera.name)


@dataclass(frozen=True, eq=False)
class WatchedBank:
    """A label bank that cameras are watched with, and how records name it."""

    bank: LabelBank
    used: UsedBank

    @classmethod
    def of(cls, bank: LabelBank, version: int | None = None) -> WatchedBank:
        """A bank, with its version on a server."""
        used = bank.used(None if bank.is_adhoc else bank.name)
        return cls(bank, used if version is None else used.model_copy(update={"version": version}))


@contextmanager
def follow_banks(bundle: Bundle, watcher: Watcher, names: Sequence[str]) -> Iterator[None]:
    """For the time of a block, use label banks of a bundle anew when they are built anew.

    A bank that cannot be loaded, or lacks a label that a camera has a threshold for, leaves the
    one before in place; the log says so.

    Args:
        bundle: Where they are.
        watcher: What uses them.
        names: Of the banks.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(bundle, watcher, names, stop), name="actionclip-banks", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(bundle: Bundle, watcher: Watcher, names: Sequence[str], stop: threading.Event) -> None:
    states = {name: bundle.label_bank_state(name) for name in names}
    versions = dict.fromkeys(names, 1)
    while not stop.wait(_BANK_POLL_SECONDS):
        for name in names:
            state = bundle.label_bank_state(name)
            if state == states[name]:
                continue
            states[name] = state
            try:
                bank = LabelBank.load(bundle, name)
                versions[name] += 1
                watcher.set_bank(name, WatchedBank.of(bank, versions[name]))
            except (BundleError, LabelError) as exc:
                logger.warning("the label bank %r is used as it was: %s", name, exc)
            else:
                logger.info("the label bank %r was built anew, and is used", name)


# One source: from its frames to windows that wait


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A whole window that waits, and when its newest frame was shown and arrived."""

    window: Window
    session: int
    wall_start: float
    newest_wall: float
    newest_arrival: float


@dataclass
class DropCounts:
    """Windows of a source that were not scored, by reason."""

    stale: int = 0


class _Feed:
    """Reads a source in a thread and builds its windows."""

    def __init__(
        self,
        camera: Camera,
        grid: WindowGrid,
        reader: LiveReader,
        prepare: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
        scaling: Scaling | None,
        changed: threading.Condition,
        stop: threading.Event,
        on_frame: Callable[[str, LiveFrame], None] | None,
    ) -> None:
        self.camera, self.grid, self.reader = camera, grid, reader
        self.builder = WindowBuilder(grid, camera.name, still=camera.still)
        self.dropped = DropCounts()
        self.is_over = False
        self.last_frame: LiveFrame | None = None
        self._prepare = prepare
        # A part of a frame is cut out of all of its pixels.
        self._scaling = scaling if camera.region is None else None
        self._changed = changed
        self._stop = stop
        self._on_frame = on_frame
        self._selector = GridSelector[LiveFrame](grid, grid.step_seconds)
        self._intervals: deque[float] = deque(maxlen=_NUM_INTERVALS)
        self._session = -1
        self._waiting: deque[_Waiting] = deque()
        self._prepared: tuple[LiveFrame, NDArray[np.uint8]] | None = None
        self.thread = threading.Thread(
            target=self._read, name=f"actionclip-watch-{camera.name}", daemon=True
        )

    @property
    def num_waiting(self) -> int:
        """Windows that `take` could give."""
        return len(self._waiting)

    def take(self, now: float) -> tuple[WindowFrames, list[_Waiting]] | None:
        """Give the windows to score now; drops what has waited too long. Called under the lock."""
        num_all = len(self._waiting)
        if not num_all:
            return None
        num_kept = num_all
        if self.camera.source.is_live:
            oldest = now - self.grid.stride_seconds
            num_kept = max(1, sum(each.newest_arrival >= oldest for each in self._waiting))
            self.dropped.stale += num_all - num_kept
        kept = list(self._waiting)[num_all - num_kept :]
        self._waiting.clear()
        work = self.builder.take(newest=num_kept)
        assert work is not None
        self._changed.notify_all()
        return work, kept

    def _read(self) -> None:
        try:
            for frame in self.reader.frames(self._stop):
                self._take_frame(frame)
        except VideoError as exc:
            logger.error("%s: %s", self.camera.name, exc)
        except MemoryError:
            logger.exception("%s: memory ran out", self.camera.name)
        finally:
            if not self.camera.source.is_live:
                self._add(self._selector.end())
            with self._changed:
                self.is_over = True
                self._changed.notify_all()

    def _take_frame(self, frame: LiveFrame) -> None:
        last = self.last_frame
        if frame.session != self._session:
            self._add(self._selector.end())
            self._intervals.clear()
            self._session = frame.session
        elif last is not None:
            self._intervals.append(frame.pts_seconds - last.pts_seconds)
        # A camera may give fewer frames than the grid has points; a file's frames stand.
        step, usual = self.grid.step_seconds, 0.0
        if self._intervals:
            usual = float(np.median(self._intervals))
        longest = step if self.camera.source.is_live else self.grid.window_seconds
        self._selector.max_gap_seconds = max(longest, _GAP_INTERVALS * usual)
        points = self._selector.push(frame.pts_seconds, frame)
        self.last_frame = frame
        if self._on_frame is not None:
            self._on_frame(self.camera.name, frame)
        self._add(points)

    def _add(self, points: Sequence[GridPoint[LiveFrame]]) -> None:
        for point in points:
            if not self.grid.is_used(point.number):
                continue
            frame = point.frame
            pixels = self._pixels(frame)
            with self._changed:
                while (
                    not self.camera.source.is_live
                    and len(self._waiting) >= _MAX_WAITING
                    and not self._stop.is_set()
                ):
                    self._changed.wait(_IDLE_SECONDS)
                window = self.builder.add(point.of(pixels))
                if window is not None:
                    wall_start = frame.wall_seconds + window.start_seconds - frame.pts_seconds
                    self._waiting.append(
                        _Waiting(
                            window,
                            frame.session,
                            wall_start,
                            frame.wall_seconds,
                            frame.arrival_seconds,
                        )
                    )
                    self._changed.notify_all()

    def _pixels(self, frame: LiveFrame) -> NDArray[np.uint8]:
        if self._prepared is None or self._prepared[0] is not frame:
            pixels = crop_region(frame.to_rgb(self._scaling), self.camera.region)
            self._prepared = (frame, self._prepare(pixels))
        return self._prepared[1]


def crop_region(
    frame: NDArray[np.uint8], region: tuple[float, float, float, float] | None
) -> NDArray[np.uint8]:
    """Cut a region, in shares of a frame's sides, out of a frame (H, W, 3); a pixel at least."""
    if region is None:
        return frame
    height, width = frame.shape[:2]
    left, top, right, bottom = region
    x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
    return frame[y : max(y + 1, round(bottom * height)), x : max(x + 1, round(right * width))]


# All sources


@dataclass
class _Stream:
    """What is known of a camera besides its feed."""

    feed: _Feed
    watched: WatchedLabels
    bank: WatchedBank
    num_windows: int = 0
    num_encoded: int = 0
    ages_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_AGES))
    best: LabelScore | None = None
    history: deque[tuple[float, str, float]] = field(default_factory=deque)
    was_over: bool = False


class Watcher:
    """Scores the windows of many sources, and tells of events.

    A context manager. `run` is the scheduler, for one thread; everything else may be called from
    any thread.

    Args:
        runtime: What executes the graphs, shared by all cameras.
        cameras: What to watch; each by a name of its own.
        banks: By their names; the first is for the cameras that name none.
        on_event: Is told of each event by the thread of `run`; has to return soon.
        on_frame: Is given each decoded frame, by the thread that reads it; has to return soon.
        on_state: Is told when a source comes to another state, by the thread that reads it.
        on_window: Is told when a window was scored: the camera's name, the window's end by the
            wall's clock in seconds since 1970, and all scores, shape (C,).
        on_age: Is told of each window of a live source: the camera's name, and the seconds from
            its newest frame to its scores.
        on_call: Is told of each call that windows shared: how many they were.
        method: How scores are made; None for the model's way, or that of a saved query.
        region: See `preprocess.preprocess_frames`.
        realtime: Whether files are given as fast as they are to be shown, and no faster.
        max_pixels: Of a frame.
        render: Of the source `test:`, see `video.live.LiveReader`.
        execute: Runs a call of the runtime, where that is for one thread alone.

    Raises:
        ValueError: If a camera's window, stride, thresholds or groups are not allowed, or two
            have one name.
        LabelBankError: If a camera names a bank that is not among `banks`.
    """

    def __init__(
        self,
        runtime: Runtime,
        cameras: Sequence[Camera],
        banks: Mapping[str, WatchedBank],
        *,
        on_event: Callable[[EventRecord], None],
        on_frame: Callable[[str, LiveFrame], None] | None = None,
        on_state: Callable[[SourceState], None] | None = None,
        on_window: Callable[[str, float, NDArray[np.float32]], None] | None = None,
        on_age: Callable[[str, float], None] | None = None,
        on_call: Callable[[int], None] | None = None,
        method: ScoreMethod | None = None,
        region: Region = "frame",
        realtime: bool = False,
        max_pixels: int = MAX_PIXELS,
        render: Callable[[int], NDArray[np.uint8]] | None = None,
        execute: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ) -> None:
        if not cameras:
            raise ValueError("There is no source to watch; give one or more.")
        check_names(cameras)
        self._runtime = runtime
        self._on_event, self._on_window = on_event, on_window
        self._on_age, self._on_call = on_age, on_call
        self._method = method
        self._execute = execute
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._banks = dict(banks)
        self._trackers: dict[str, EventTracker] = {}
        self._streams: dict[str, _Stream] = {}
        self.batch_sizes: deque[int] = deque(maxlen=_NUM_AGES)
        check_region(region)
        prepare = preparation(runtime.manifest, region)
        scaling = scaling_of(runtime.manifest, region)
        num_frames = runtime.manifest.model.num_frames
        for camera in cameras:
            bank = self._bank_of(camera)
            window, stride = bank.bank.grid_for(camera.window_seconds, camera.stride_seconds)
            grid = WindowGrid.of_model(
                runtime.manifest, window_seconds=window, stride_seconds=stride
            )
            reader = LiveReader(
                camera.source,
                realtime=realtime,
                max_pixels=max_pixels,
                on_state=on_state,
                render=render,
            )
            feed = _Feed(
                camera, grid, reader, prepare, scaling, self._changed, self._stop, on_frame
            )
            self._streams[camera.name] = _Stream(feed, self._watched(camera, bank), bank)
            self._trackers[camera.name] = EventTracker(
                runtime=runtime.describe(), cooldown_seconds=camera.cooldown_seconds
            )
        self._cache = FeatureCache(len(cameras) * (num_frames + _SLACK_FRAMES))

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the cameras, in their order."""
        return tuple(self._streams)

    def set_bank(self, name: str, bank: WatchedBank) -> None:
        """Swap a label bank while everything runs: the next window is scored with it.

        Events of labels that it has go on, the others end.

        Raises:
            LabelError: If a camera has a threshold or group for a label that it lacks; then
                nothing is changed.
        """
        with self._changed:
            swapped = {
                camera: self._watched(stream.feed.camera, bank)
                for camera, stream in self._streams.items()
                if self._name_of_bank(stream.feed.camera) == name
            }
            self._banks[name] = bank
            for camera, watched in swapped.items():
                self._streams[camera].watched = watched
                self._streams[camera].bank = bank

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set, or each source was a file or pipe and is at its end.

        Raises:
            InferenceError: If the runtime fails.
        """
        for stream in self._streams.values():
            stream.feed.thread.start()
        try:
            while not stop.is_set():
                taken = self._take_what_is_there(stop)
                if taken:
                    self._score(taken)
                self._end_those_that_are_over()
                if not taken and all(stream.was_over for stream in self._streams.values()):
                    return
        finally:
            self.close()
            for name, tracker in self._trackers.items():
                self._tell(tracker.end(name))

    def close(self) -> None:
        """Ask all threads to end, and wait for them a little; a second call does nothing."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for stream in self._streams.values():
            if stream.feed.thread.ident is not None:
                stream.feed.thread.join(timeout=2.0)

    def snapshot(self, name: str) -> NDArray[np.uint8] | None:
        """The newest frame of a camera, RGB, uint8, shape (H, W, 3); None where none came yet.

        Raises:
            KeyError: If there is no such camera.
        """
        frame = self._streams[name].feed.last_frame
        return None if frame is None else frame.to_rgb()

    def history(self, name: str) -> list[tuple[float, str, float]]:
        """The best label of each window of the last minutes: end by the wall's clock and score.

        Raises:
            KeyError: If there is no such camera.
        """
        with self._changed:
            return list(self._streams[name].history)

    def states(self) -> list[StreamRecord]:
        """How each camera is, in their order."""
        with self._changed:
            return [self._state(name, stream) for name, stream in self._streams.items()]

    def ages_ms(self, name: str) -> list[float]:
        """Milliseconds from a frame to the answer of the window that it completed, the latest."""
        with self._changed:
            return list(self._streams[name].ages_ms)

    def _state(self, name: str, stream: _Stream) -> StreamRecord:
        feed = stream.feed
        state, counts = feed.reader.state, feed.builder.counts
        ages = np.percentile(stream.ages_ms, (50, 95, 99)) if stream.ages_ms else None
        return StreamRecord(
            name=name,
            source=feed.camera.source.shown,
            state=state.state,
            since=utc_text(state.since),
            reconnects=state.reconnects,
            last_error=state.last_error,
            seconds_since_frame=state.seconds_since_frame,
            frames=state.frames,
            grid_frames=counts.num_frames,
            frames_encoded=stream.num_encoded,
            frames_reused=counts.num_reused,
            windows=stream.num_windows,
            windows_dropped={"stale": feed.dropped.stale},
            windows_voided=counts.num_voided,
            age_ms=None
            if ages is None
            else dict(zip(("p50", "p95", "p99"), np.round(ages, 1).tolist(), strict=True)),
            window_seconds=feed.grid.window_seconds,
            stride_seconds=feed.grid.stride_seconds,
            best=stream.best,
            open_labels=tuple(self._trackers[name].open_labels(name)),
            bank=stream.bank.used,
        )

    def _name_of_bank(self, camera: Camera) -> str:
        return camera.labels if camera.labels is not None else next(iter(self._banks))

    def _bank_of(self, camera: Camera) -> WatchedBank:
        name = self._name_of_bank(camera)
        if name not in self._banks:
            raise LabelBankError(
                f"The camera {camera.name!r} is to be watched with the label bank {name!r}; there "
                f"is {', '.join(map(repr, self._banks))}."
            )
        return self._banks[name]

    def _watched(self, camera: Camera, bank: WatchedBank) -> WatchedLabels:
        return WatchedLabels.of(
            bank.bank,
            bank.bank.method_for(self._method, self._runtime.manifest.scores.method),
            thresholds=camera.thresholds,
            groups=camera.groups,
            used=bank.used,
        )

    def _take_what_is_there(
        self, stop: threading.Event
    ) -> list[tuple[_Stream, WatchedLabels, WatchedBank, WindowFrames, list[_Waiting]]]:
        with self._changed:
            is_idle = not any(stream.feed.num_waiting for stream in self._streams.values())
            if is_idle and not stop.is_set():
                self._changed.wait(_IDLE_SECONDS)
            now = time.monotonic()
            found = []
            for stream in self._streams.values():
                taken = stream.feed.take(now)
                if taken is not None:
                    found.append((stream, stream.watched, stream.bank, *taken))
            return found

    def _score(
        self,
        taken: list[tuple[_Stream, WatchedLabels, WatchedBank, WindowFrames, list[_Waiting]]],
    ) -> None:
        works = [work for *_, work, _ in taken]
        encoded = self._execute(
            lambda: list(encode_windows(self._runtime, works, cache=self._cache))
        )
        num_windows = sum(len(work.windows) for work in works)
        self.batch_sizes.append(num_windows)
        if self._on_call is not None:
            self._on_call(num_windows)
        for (stream, watched, bank, work, waiting), each in zip(taken, encoded, strict=True):
            scores = score(
                watched.method,
                each.embeddings,
                bank.bank.embeddings,
                scale=self._runtime.manifest.scores.scale,
            )
            answered, name = time.time(), stream.feed.camera.name
            with self._changed:
                stream.num_encoded += each.num_frames_encoded
            for window, row, when in zip(work.windows, scores, waiting, strict=True):
                self._take_scores(stream, watched, window, row, when, answered)
                told = self._trackers[name].push(
                    ScoredWindow(
                        source=name,
                        # A run that a gap ended is over as much as a connection that was lost.
                        session=window.run,
                        start_seconds=window.start_seconds,
                        end_seconds=window.end_seconds,
                        stride_seconds=stream.feed.grid.stride_seconds,
                        wall_start=when.wall_start,
                        wall_end=when.wall_start + window.end_seconds - window.start_seconds,
                        scores=row,
                        watched=watched,
                    )
                )
                self._tell(told)

    def _take_scores(
        self,
        stream: _Stream,
        watched: WatchedLabels,
        window: Window,
        scores: NDArray[np.float32],
        when: _Waiting,
        answered: float,
    ) -> None:
        row = watched.scores(scores[np.newaxis])[0]
        place = int(row.argmax())
        best = LabelScore(watched.names[place], float(row[place]))
        wall_end = when.wall_start + window.end_seconds - window.start_seconds
        with self._changed:
            stream.num_windows += 1
            stream.best = best
            stream.history.append((wall_end, best.label, best.score))
            while stream.history[0][0] < wall_end - HISTORY_SECONDS:
                stream.history.popleft()
            age_seconds = answered - when.newest_wall
            if stream.feed.camera.source.is_live:
                stream.ages_ms.append(age_seconds * 1000)
        if self._on_age is not None and stream.feed.camera.source.is_live:
            self._on_age(stream.feed.camera.name, age_seconds)
        if self._on_window is not None:
            self._on_window(stream.feed.camera.name, wall_end, scores)

    def _end_those_that_are_over(self) -> None:
        for name, stream in self._streams.items():
            if stream.was_over or not stream.feed.is_over or stream.feed.num_waiting:
                continue
            stream.was_over = True
            self._tell(self._trackers[name].end(name))

    def _tell(self, events: Iterable[EventRecord]) -> None:
        for event in events:
            self._on_event(event)
