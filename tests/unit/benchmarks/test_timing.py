"""Warm-up and timing, with a clock that the tests turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actionclip_deploy.benchmarks.worker import CudaEventTimer, measure, warm_up


class TurnedClock:
    """A clock that stands still but for the calls, which take the given seconds."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now = 0.0
        self.num_calls = 0
        self._durations = durations

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.num_calls += 1
        self.now += next(self._durations)


def _falling(first: float, last: float) -> Iterator[float]:
    seconds = first
    while True:
        yield max(seconds, last)
        seconds *= 0.8


def test_warm_up_goes_on_until_latency_is_stable() -> None:
    clock = TurnedClock(_falling(0.4, 0.05))
    done = warm_up(clock.call, max_seconds=60.0, clock=clock)
    assert done.is_stable
    # 0.4 x 0.8 ** n reaches 0.05 at n = 10; two windows of five have to lie behind that, but that
    # the median of a window does not mind two that are larger.
    assert 10 + 10 - 2 <= done.num_calls <= 10 + 10
    assert done.seconds == pytest.approx(clock.now)


def test_a_warm_up_that_never_settles_says_so() -> None:
    clock = TurnedClock(iter([0.1 * 1.3**i for i in range(100)]))
    done = warm_up(clock.call, max_seconds=5.0, clock=clock)
    assert not done.is_stable
    assert done.seconds >= 5.0


def test_slow_calls_are_stable_after_fewer_of_them() -> None:
    clock = TurnedClock(iter([2.0] * 100))
    assert warm_up(clock.call, max_seconds=60.0, clock=clock).num_calls == 4


def test_a_warm_up_is_not_over_at_once_where_calls_are_quick() -> None:
    clock = TurnedClock(iter([0.001] * 1000))
    assert warm_up(clock.call, max_seconds=60.0, clock=clock).num_calls >= 200


def test_each_call_is_timed_until_the_time_is_up() -> None:
    clock = TurnedClock(iter([0.3, 0.4, 0.5, 0.6]))
    assert measure(clock.call, seconds=1.0, clock=clock).wall == pytest.approx([0.3, 0.4, 0.5])


def test_a_call_longer_than_the_round_is_timed_once() -> None:
    clock = TurnedClock(iter([7.0, 7.0]))
    assert measure(clock.call, seconds=0.5, clock=clock).wall == [7.0]


class FakeCuda:
    """`torch.cuda` with a device that goes on working after a call has returned."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self.busy_until = 0.0

    def launch(self, seconds: float) -> None:
        self.busy_until = self.clock.now + seconds

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.busy_until)

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802 - torch's name
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.at: float | None = None

    def record(self) -> None:
        self.at = self._cuda.clock.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return (other.at - self.at) * 1e3


def test_work_that_goes_on_after_the_call_returned_is_counted() -> None:
    clock = TurnedClock(iter([0.001] * 10))
    cuda = FakeCuda(clock)

    def call() -> None:
        clock.call()
        cuda.launch(0.25)

    timings = measure(call, seconds=0.5, device_timer=CudaEventTimer(cuda), clock=clock)
    assert timings.wall == pytest.approx([0.251, 0.251])
    assert timings.device == pytest.approx([0.251, 0.251])


def test_what_the_device_did_before_is_not_counted() -> None:
    clock = TurnedClock(iter([0.001] * 10))
    cuda = FakeCuda(clock)
    cuda.launch(3.0)
    timings = measure(clock.call, seconds=0.0, device_timer=CudaEventTimer(cuda), clock=clock)
    assert timings.device == pytest.approx([0.001])
