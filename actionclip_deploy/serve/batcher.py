"""The queue before a runtime: calls that several requests share.

Work waits in a queue that is bounded in clips. A call is made as soon as the runtime is free and
as much waits as it computes best at a time, or nothing else is on its way, or the oldest has
waited long enough, or a deadline is near. It then takes all that waits, up to the largest call.
While one call runs, the next one fills, so under load calls are full although none waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actionclip_deploy.serve import refusals

Result = TypeVar("Result")
Execute = Callable[[Hashable, Sequence[Any]], Sequence[Any]]

# Weight of the newest call in the measured time of a clip.
_NEWEST = 0.2
_UNKNOWN_SECONDS = 0.05  # of a clip, until the first call has been measured
# Before a deadline, beyond the time that the call is expected to take.
_MARGIN_SECONDS = 0.005


@dataclass(frozen=True)
class CallOutput:
    """What came out for one piece of work.

    Attributes:
        output: What `execute` gave for it.
        queue_seconds: How long it waited.
        batch_size: Clips in its call, those of others too.
    """

    output: Any
    queue_seconds: float
    batch_size: int


@dataclass(eq=False)
class _Item:
    group: Hashable
    payload: Any
    size: int
    entered: float
    deadline: float | None
    future: asyncio.Future[CallOutput] = field(repr=False)


class Batcher:
    """One queue before one runtime; to be used from one event loop.

    Args:
        execute: Computes payloads of one group in one call, in a thread; gives their outputs in
            order. Work of different groups is never in one call.
        max_batch: Clips in a call; a larger piece of work has a call for itself.
        max_delay_seconds: How long work may wait for more of its group.
        max_waiting: Clips that may wait.
        best_batch: Clips from which on a call does not wait for more.
        shares_calls: Whether a call may hold work of several requests.
        on_call: Told of each call: its group, clips and seconds.
        more_is_coming: Whether more work is on its way; while there is none, a call is made at
            once. None for not known, which counts as yes.
    """

    def __init__(
        self,
        execute: Execute,
        *,
        max_batch: int,
        max_delay_seconds: float,
        max_waiting: int,
        best_batch: int | None = None,
        shares_calls: bool = True,
        on_call: Callable[[Hashable, int, float], None] | None = None,
        more_is_coming: Callable[[], bool] | None = None,
    ) -> None:
        self.best_batch = best_batch or max_batch
        self.max_waiting = max_waiting
        self._execute = execute
        self._max_batch = max_batch
        self._max_delay = max_delay_seconds
        self._shares_calls = shares_calls
        self._on_call = on_call
        self._more_is_coming = more_is_coming or (lambda: True)
        self._waiting: dict[Hashable, deque[_Item]] = {}
        self._num_waiting = 0
        self._seconds_per_clip: float | None = None
        self._is_draining = False
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="actionclip-runtime")
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Clips that wait."""
        return self._num_waiting

    @property
    def seconds_per_clip(self) -> float:
        """Measured over the last calls."""
        return self._seconds_per_clip or _UNKNOWN_SECONDS

    @property
    def retry_after_seconds(self) -> float:
        """When what waits now will have been computed, by the measured rate."""
        return self._num_waiting * self.seconds_per_clip

    def start(self) -> None:
        """Begin to make calls."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def submit(
        self, group: Hashable, payload: Any, *, size: int = 1, deadline: float | None = None
    ) -> CallOutput:
        """Wait for a piece of work; cancelling this takes it out of the queue.

        Args:
            group: What it may share a call with.
            payload: Given to `execute`.
            size: Its clips.
            deadline: When it has to be done, by the event loop's clock.

        Raises:
            RequestRefusedError: If the queue is full (429), the deadline passes (504), or the
                server is ending (503).
            InferenceError: If the runtime fails.
        """
        if self._is_draining:
            raise refusals.shutting_down()
        if self._num_waiting and self._num_waiting + size > self.max_waiting:
            raise refusals.queue_full(
                f"{self._num_waiting} clips wait and {self.max_waiting} may; "
                "try again after the time in Retry-After.",
                retry_after_seconds=self.retry_after_seconds,
            )
        loop = asyncio.get_running_loop()
        item = _Item(group, payload, size, loop.time(), deadline, loop.create_future())
        self._waiting.setdefault(group, deque()).append(item)
        self._num_waiting += size
        self._idle.clear()
        self._changed.set()
        try:
            left = None if deadline is None else deadline - loop.time()
            return await asyncio.wait_for(item.future, left)
        except asyncio.TimeoutError:
            raise refusals.deadline() from None
        finally:
            self._remove(item)

    def in_thread(self, function: Callable[..., Result], *args: Any) -> ThreadFuture[Result]:
        """Call something in the thread of the runtime, between two calls; from any thread."""
        return self._thread.submit(function, *args)

    def wake(self) -> None:
        """Look again at whether more is coming."""
        self._changed.set()

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and finish what is there; gives whether all was done in time.

        What waits after that is refused; a call that is running goes on in its thread.
        """
        if self._is_draining and self._task is None:
            return True
        self._is_draining = True
        self._changed.set()
        done = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            done = False
        for item in [item for queue in self._waiting.values() for item in queue]:
            if not item.future.done():
                item.future.set_exception(refusals.shutting_down())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._thread.shutdown(wait=done, cancel_futures=True)
        return done

    def _remove(self, item: _Item) -> None:
        queue = self._waiting.get(item.group)
        if queue is None or item not in queue:
            return
        queue.remove(item)
        self._num_waiting -= item.size
        if not queue:
            del self._waiting[item.group]
        self._changed.set()

    async def _run(self) -> None:
        while True:
            group, due = self._next_due()
            delay = due - asyncio.get_running_loop().time()
            if group is not None and delay <= 0:
                await self._call(group, self._take(group))
                continue
            if group is None:
                self._idle.set()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), None if group is None else delay)
            except asyncio.TimeoutError:
                continue

    def _next_due(self) -> tuple[Hashable | None, float]:
        """The group whose call is due first, and when."""
        dues = [(self._due(queue), group) for group, queue in self._waiting.items()]
        if not dues:
            return None, 0.0
        due, group = min(dues, key=lambda pair: pair[0])
        return group, due

    def _due(self, queue: deque[_Item]) -> float:
        oldest = queue[0].entered
        size = sum(item.size for item in queue)
        is_full = size >= self.best_batch or not self._shares_calls
        if is_full or self._is_draining or not self._more_is_coming():
            return oldest
        expected = min(size, self._max_batch) * self.seconds_per_clip + _MARGIN_SECONDS
        deadlines = [item.deadline for item in queue if item.deadline is not None]
        return min([oldest + self._max_delay, *(at - expected for at in deadlines)])

    def _take(self, group: Hashable) -> list[_Item]:
        queue, size = self._waiting[group], 0
        taken: list[_Item] = []
        while queue and (not taken or size + queue[0].size <= self._max_batch):
            item = queue.popleft()
            self._num_waiting -= item.size
            if item.future.done():
                continue  # cancelled, or too late, in this very step of the loop
            taken.append(item)
            size += item.size
            if not self._shares_calls:
                break
        if not queue:
            del self._waiting[group]
        return taken

    async def _call(self, group: Hashable, items: list[_Item]) -> None:
        if not items:
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        size = sum(item.size for item in items)
        payloads = [item.payload for item in items]
        running = loop.run_in_executor(self._thread, self._execute, group, payloads)
        await asyncio.wait([running])
        seconds = loop.time() - started
        error = running.exception()
        if error is not None:
            await self._blame(group, items, error)
            return
        self._measure(seconds / size)
        if self._on_call is not None:
            self._on_call(group, size, seconds)
        for item, output in zip(items, running.result(), strict=True):
            if not item.future.done():
                item.future.set_result(CallOutput(output, started - item.entered, size))

    async def _blame(self, group: Hashable, items: list[_Item], error: BaseException) -> None:
        """Let a failed call fail for those alone who caused it."""
        if len(items) > 1:
            for item in items:
                await self._call(group, [item])
        elif not items[0].future.done():
            items[0].future.set_exception(error)

    def _measure(self, seconds_per_clip: float) -> None:
        known = self._seconds_per_clip
        self._seconds_per_clip = (
            seconds_per_clip if known is None else known + _NEWEST * (seconds_per_clip - known)
        )
