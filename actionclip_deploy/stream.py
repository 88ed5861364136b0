"""Windows over time, of live sources and of long videos.

A window is a clip of T frames placed in time: the middle frames of its T equal parts. Windows lie
on a grid whose step is a part, W / T seconds, and start every k steps, so those that overlap have
frames in common: each frame goes through the visual graph once, T / k times less work than
windows that are recomputed.

    source -> frames and their times -> GridSelector -> WindowBuilder -> encode_windows

A window gives what `predict` gives for the same cut of the video, bit for bit in fp32 on a CPU,
where a grid step is a whole number of frames; elsewhere some of its frames may be the neighbours
of those that `predict` would take, since a grid that windows share cannot suit each of them.

Letters: W seconds and T frames of a window, k grid steps from one window to the next, S windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.views import Encoded, FeatureCache, ViewFrames, encode_views

# Of a model that does not say how long its training clips were: half a second for each frame,
# 4 s at T = 8. Kinetics, which most checkpoints were trained on, has clips of 10 s.
DEFAULT_STEP_SECONDS = 0.5
MAX_WINDOW_SECONDS = 3600.0
# A stride is taken for a whole number of grid steps if it is this near to one.
STEP_TOLERANCE = 1e-3
# Times are rounded to a millisecond by many containers; and a share of a frame's own length.
_CLOCK_SECONDS, _CLOCK_SHARE = 0.0006, 0.02


@dataclass(frozen=True)
class WindowGrid:
    """Where windows lie in time.

    Attributes:
        window_seconds: Length of a window, W.
        num_frames: Frames of a window, T.
        stride_steps: Grid steps from the start of a window to that of the next, k.

    Raises:
        ValueError: If one of the three is not allowed.
    """

    window_seconds: float
    num_frames: int
    stride_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.window_seconds <= MAX_WINDOW_SECONDS:
            raise ArgumentError(
                "window_seconds",
                f"is {self.window_seconds:g}; it must be above 0 and at most "
                f"{MAX_WINDOW_SECONDS:g}.",
            )
        for name in ("num_frames", "stride_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

    @classmethod
    def of_model(
        cls,
        manifest: Manifest,
        *,
        window_seconds: float | None = None,
        stride_seconds: float | None = None,
    ) -> WindowGrid:
        """The grid of a model's windows.

        Args:
            manifest: Says T, and how long the clips of the training were.
            window_seconds: None for as long as those, or where that is not known, half a second
                for each frame.
            stride_seconds: From one window to the next, a multiple of W / T; None for one step.

        Raises:
            ValueError: If one of the two is not allowed; says which strides are.
        """
        num_frames = manifest.model.num_frames
        if window_seconds is None:
            window_seconds = manifest.model.clip_seconds or DEFAULT_STEP_SECONDS * num_frames
        grid = cls(window_seconds, num_frames)
        if stride_seconds is None:
            return grid
        step = grid.step_seconds
        if not 0 < stride_seconds <= MAX_WINDOW_SECONDS:
            raise ArgumentError(
                "stride_seconds",
                f"is {stride_seconds:g}; it must be above 0 and at most {MAX_WINDOW_SECONDS:g}.",
            )
        steps = round(stride_seconds / step)
        if steps < 1 or abs(steps * step - stride_seconds) > STEP_TOLERANCE * stride_seconds:
            below = int(stride_seconds / step)
            near = " or ".join(f"{n * step:g}" for n in (below, below + 1) if n)
            raise ArgumentError(
                "stride_seconds",
                f"is {stride_seconds:g}; windows of {window_seconds:g} seconds and {num_frames} "
                f"frames start at multiples of {step:g} seconds, so give {near}, or a window of "
                "another length.",
            )
        return replace(grid, stride_steps=steps)

    @property
    def step_seconds(self) -> float:
        """From one point of the grid to the next, W / T."""
        return self.window_seconds / self.num_frames

    @property
    def stride_seconds(self) -> float:
        """From the start of a window to that of the next."""
        return self.stride_steps * self.step_seconds

    def is_used(self, number: int) -> bool:
        """Whether a point of the grid lies in any window: where windows touch or overlap, each."""
        return number % self.stride_steps < self.num_frames

    def ends_window(self, number: int) -> bool:
        """Whether a point is the last one of a window."""
        start = number - self.num_frames + 1
        return start >= 0 and start % self.stride_steps == 0


Frame = TypeVar("Frame")
Other = TypeVar("Other")


@dataclass(frozen=True)
class GridPoint(Generic[Frame]):
    """A frame that stands at a point of the grid.

    Attributes:
        run: Counted from 0; a new one begins after each gap.
        number: Of the point in its run, from 0; it lies (number + 1/2) steps after the start.
        start_seconds: Where the run starts, by the clock of the source.
        frame: Whatever was given with the frame's time.
    """

    run: int
    number: int
    start_seconds: float
    frame: Frame

    def of(self, frame: Other) -> GridPoint[Other]:
        """The same point with another frame, such as the prepared one."""
        return GridPoint(self.run, self.number, self.start_seconds, frame)


class GridSelector(Generic[Frame]):
    """Finds the frames that stand at the points of a grid, from their times alone.

    At a point stands the last frame that has been shown for half of its time there, which for a
    steady clock is the frame that `sampling.sample_segments` picks. It is known once the next
    frame has come. A frame that comes too late after the one before, or before it, starts a new
    run; windows never span two.

    Args:
        grid: Where the points are.
        max_gap_seconds: How long a frame may stand for itself until the next.
    """

    def __init__(self, grid: WindowGrid, max_gap_seconds: float) -> None:
        self.max_gap_seconds = max_gap_seconds
        self._grid = grid
        self._run = -1
        self._start_seconds = 0.0
        self._number = 0
        self._last: tuple[float, Frame] | None = None
        self._interval_seconds = 0.0

    def push(self, seconds: float, frame: Frame) -> list[GridPoint[Frame]]:
        """Take the next frame; gives the points at which the one before stands."""
        if self._last is None:
            self._begin(seconds, frame)
            return []
        interval = seconds - self._last[0]
        if not 0 <= interval <= self.max_gap_seconds:
            points = self.end()
            self._begin(seconds, frame)
            return points
        points = self._until(seconds + self._half(interval))
        self._last = (seconds, frame)
        self._interval_seconds = interval
        return points

    def end(self, last_seconds: float | None = None) -> list[GridPoint[Frame]]:
        """End the run; gives the last frame's points, as far as their parts of the grid go.

        Args:
            last_seconds: How long the last frame is shown; None for as long as the one before.
        """
        if self._last is None:
            return []
        length = self._interval_seconds if last_seconds is None else last_seconds
        half_step = self._grid.step_seconds / 2
        points = self._until(self._last[0] + length + length / 4 - half_step, is_inclusive=True)
        self._last = None
        self._interval_seconds = 0.0
        return points

    def _half(self, interval: float) -> float:
        """How long the next frame is shown before it stands at a point."""
        interval = min(interval, self._grid.step_seconds)
        return interval / 2 - min(_CLOCK_SECONDS + _CLOCK_SHARE * interval, interval / 4)

    def _begin(self, seconds: float, frame: Frame) -> None:
        self._run += 1
        self._number = 0
        self._start_seconds = seconds
        self._last = (seconds, frame)

    def _until(self, seconds: float, *, is_inclusive: bool = False) -> list[GridPoint[Frame]]:
        assert self._last is not None
        points: list[GridPoint[Frame]] = []
        while True:
            at = self._start_seconds + (self._number + 0.5) * self._grid.step_seconds
            if at > seconds or (at == seconds and not is_inclusive):
                return points
            points.append(GridPoint(self._run, self._number, self._start_seconds, self._last[1]))
            self._number += 1


@dataclass(frozen=True)
class Window:
    """A window and where it lies, by the clock of its source.

    Attributes:
        run: The run that it is in, from 0.
        number: Its place in the run, from 0.
        start_seconds: Its start.
        end_seconds: Its end.
    """

    run: int
    number: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, eq=False)
class WindowFrames(ViewFrames):
    """The preprocessed frames of some windows of one source; each window is a view.

    Attributes:
        windows: Where each of the views lies.
    """

    windows: tuple[Window, ...]


@dataclass
class WindowCounts:
    """What became of the frames and windows of a source.

    Attributes:
        num_frames: Points of the grid that had a frame.
        num_reused: Those for which the feature of the last encoded frame was taken.
        num_windows: Windows that were whole.
        num_voided: Windows that had begun when a gap came.
    """

    num_frames: int = 0
    num_reused: int = 0
    num_windows: int = 0
    num_voided: int = 0


@dataclass(frozen=True, eq=False)
class _GridFrame:
    """A frame at a point of the grid; those that share a feature share key and pixels."""

    key: int
    pixels: NDArray[np.uint8]


class WindowBuilder:
    """Collects the frames of a source's grid, and gives the windows that they complete.

    Args:
        grid: Where windows lie.
        source: Of the keys by which a `FeatureCache` that sources share tells frames apart.
        still: How much a frame may differ from the last one that was encoded for its feature to
            be taken again: the mean difference of their values at the model's input, from 0 to
            255. 0 takes equal ones alone, which changes no result.
    """

    def __init__(self, grid: WindowGrid, source: object = None, *, still: float = 0.0) -> None:
        if not 0 <= still <= 255:
            raise ArgumentError("still", f"is {still:g}; it must be from 0 to 255.")
        self.counts = WindowCounts()
        self._grid = grid
        self._source = source
        self._still = still
        self._run, self._last_number = -1, -1
        self._frames: deque[_GridFrame] = deque(maxlen=grid.num_frames)
        self._last: _GridFrame | None = None
        self._whole: list[tuple[Window, tuple[_GridFrame, ...]]] = []

    def add(self, point: GridPoint[NDArray[np.uint8]]) -> Window | None:
        """Take the next point and its preprocessed frame, uint8, shape (S, S, 3).

        Points that lie in no window (`WindowGrid.is_used`) are left out by the caller.

        Returns:
            The window that it completes, which `take` gives from now on.
        """
        grid = self._grid
        if point.run != self._run:
            self.end_run()
            self._run = point.run
        self._last_number = point.number
        self._frames.append(self._grid_frame(point.frame))
        if not grid.ends_window(point.number):
            return None
        first = point.number - grid.num_frames + 1
        start = point.start_seconds + first * grid.step_seconds
        window = Window(self._run, first // grid.stride_steps, start, start + grid.window_seconds)
        self._whole.append((window, tuple(self._frames)))
        self.counts.num_windows += 1
        return window

    def end_run(self) -> None:
        """Give up windows that have begun and are not whole."""
        if self._last_number >= 0:
            grid, last = self._grid, self._last_number
            num_begun = last // grid.stride_steps + 1
            num_whole = max(0, (last + 1 - grid.num_frames) // grid.stride_steps + 1)
            self.counts.num_voided += num_begun - num_whole
        self._last_number = -1
        self._frames.clear()

    @property
    def whole(self) -> tuple[Window, ...]:
        """Windows that `take` would give."""
        return tuple(window for window, _ in self._whole)

    def take(self, newest: int | None = None) -> WindowFrames | None:
        """Give the windows that were completed since the last call; None where none was.

        Args:
            newest: How many of them at most, the newest; the others are dropped. None for all.
        """
        taken, self._whole = self._whole, []
        if newest is not None:
            taken = taken[len(taken) - newest :] if newest < len(taken) else taken
        if not taken:
            return None
        rows: dict[int, int] = {}
        pixels: list[NDArray[np.uint8]] = []
        views = np.empty((len(taken), self._grid.num_frames), np.int64)
        for place, (_, frames) in enumerate(taken):
            for column, frame in enumerate(frames):
                if frame.key not in rows:
                    rows[frame.key] = len(pixels)
                    pixels.append(frame.pixels)
                views[place, column] = rows[frame.key]
        return WindowFrames(
            np.stack(pixels),
            views,
            keys=[(self._source, key) for key in rows],
            windows=tuple(window for window, _ in taken),
        )

    def _grid_frame(self, pixels: NDArray[np.uint8]) -> _GridFrame:
        self.counts.num_frames += 1
        last = self._last
        if last is not None and (pixels is last.pixels or self._is_still(pixels, last.pixels)):
            self.counts.num_reused += 1
            return last
        self._last = _GridFrame(0 if last is None else last.key + 1, pixels)
        return self._last

    def _is_still(self, pixels: NDArray[np.uint8], last: NDArray[np.uint8]) -> bool:
        if not self._still:
            return np.array_equal(pixels, last)
        difference = np.abs(pixels.astype(np.int16) - last)
        return float(difference.mean()) <= self._still


Windows = TypeVar("Windows", bound=WindowFrames)


def encode_windows(
    runtime: Runtime, works: Iterable[Windows], *, cache: FeatureCache
) -> Iterator[Encoded[Windows]]:
    """Turn windows into embeddings, each frame through the visual graph once.

    Args:
        runtime: What executes the graphs. Where the model mixes the frames of a clip (joint,
            shift), each window is encoded anew.
        works: The windows of one source or several, in their order.
        cache: Features of frames that windows to come share. For L frames of a grid that are
            read at a time it needs T + L of them for each source.

    Raises:
        ShapeError: If the runtime does not take such frames.
        InferenceError: If the runtime fails.
    """
    sizes = CallSizes.of_windows(runtime.manifest.model)
    return encode_views(runtime, works, sizes=sizes, cache=cache)


def preparation(
    manifest: Manifest, region: Region = "frame"
) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """What turns a frame (H, W, 3) into one of a model's input, (S, S, 3), as `predict` does."""
    model, given = manifest.model, manifest.preprocessing

    def prepare(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        prepared: NDArray[np.uint8] = preprocess_frames(
            frame[np.newaxis],
            input_size=model.input_size,
            resize_size=given.resize_size,
            interpolation=given.interpolation,
            num_crops=1,
            region=region,
        )[0, 0]
        return prepared

    return prepare
