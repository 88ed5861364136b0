"""Timing of calls: warm-up until latency is stable, wall clock, CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from actionclip_deploy.benchmarks.report import WarmUp

# Stable: the median of the last calls is that of those before them, but for this share. Slow calls
# vary less, and ten of them would take longer than what is to be measured.
_STABLE_SHARE = 0.05
_WINDOW, _WINDOW_OF_SLOW_CALLS, _SLOW_SECONDS = 5, 2, 0.5
_MIN_WARM_UP_SECONDS = 0.2

Clock = Callable[[], float]


class DeviceTimer(Protocol):
    """Measures on the device's own clock what the host asks it to do."""

    def start(self) -> None:
        """Mark the start, once the device has finished what it was doing."""
        ...

    def stop(self) -> float:
        """Wait until the device has finished; gives the seconds since the start."""
        ...


class CudaEventTimer:
    """A `DeviceTimer` of two CUDA events.

    The device is waited for before the first event and after the second one, so work that a
    runtime leaves running when it returns is counted and not overlooked.

    Args:
        cuda: The module `torch.cuda`.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._first = cuda.Event(enable_timing=True)
        self._last = cuda.Event(enable_timing=True)

    def start(self) -> None:
        """Mark the start."""
        self._cuda.synchronize()
        self._first.record()

    def stop(self) -> float:
        """Seconds since the start, after everything on the device has ended."""
        self._cuda.synchronize()
        self._last.record()
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1e3


@dataclass
class Timings:
    """Seconds of calls, one entry per call.

    Attributes:
        wall: From before the call until its result was on the host and the device idle.
        device: Between CUDA events around the call; empty without a device timer.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def warm_up(
    call: Callable[[], Any], *, max_seconds: float, clock: Clock = time.perf_counter
) -> WarmUp:
    """Call until the latency is stable: two windows of five calls have medians within 5 %.

    Calls of more than half a second are taken in windows of two.

    Args:
        call: What will be measured.
        max_seconds: When to give up; the result says that it was not stable then.
        clock: Seconds; another one in tests.
    """
    start, seconds = clock(), []
    while True:
        before = clock()
        call()
        now = clock()
        seconds.append(now - before)
        if _is_stable(seconds) and now - start >= _MIN_WARM_UP_SECONDS:
            return WarmUp(num_calls=len(seconds), seconds=now - start, is_stable=True)
        if now - start >= max_seconds:
            return WarmUp(num_calls=len(seconds), seconds=now - start, is_stable=False)


def measure(
    call: Callable[[], Any],
    *,
    seconds: float,
    device_timer: DeviceTimer | None = None,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time calls one by one for so many seconds, at least one of them."""
    timings = Timings()
    start = clock()
    while not timings.wall or clock() - start < seconds:
        if device_timer is not None:
            device_timer.start()
        before = clock()
        call()
        if device_timer is not None:
            timings.device.append(device_timer.stop())
        timings.wall.append(clock() - before)
    return timings


def _is_stable(seconds: Sequence[float]) -> bool:
    window = _WINDOW if seconds[-1] < _SLOW_SECONDS else _WINDOW_OF_SLOW_CALLS
    if len(seconds) < 2 * window:
        return False
    last = float(np.median(seconds[-window:]))
    before = float(np.median(seconds[-2 * window : -window]))
    return abs(last - before) <= _STABLE_SHARE * before
