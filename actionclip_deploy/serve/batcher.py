"""Calls of a runtime that several requests share.

Work waits in a queue that is bounded in clips. A call is made as soon as the runtime is free and
as much waits as it computes best at a time, or nothing else is on its way, or the oldest has
waited long enough, or a deadline is near; it then takes all that waits, up to the largest call.
While one call runs, the next one fills, so under load calls are full without any waiting for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime
from actionclip_deploy.serve import refusals

Result = TypeVar("Result")
Execute = Callable[[Hashable, Sequence[Any]], Sequence[Any]]

# Weight of the newest call in the measured time of a clip.
_NEWEST = 0.2
_UNKNOWN_SECONDS = 0.05  # of a clip, until the first call has been measured
# Before a deadline, beyond the time that the call is expected to take.
_MARGIN_SECONDS = 0.005


@dataclass(frozen=True)
class Answer:
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
    future: asyncio.Future[Answer] = field(repr=False)


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
    ) -> Answer:
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
                item.future.set_result(Answer(output, started - item.entered, size))

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


# What a shared call computes, and how many clips a runtime computes best at a time.


# Nearer to the best time of a clip than this, a smaller call is as good.
_AS_GOOD = 1.05

GraphOrClip = Literal["visual", "temporal", "textual", "video", "clip"]


@dataclass(frozen=True, eq=False)
class ClipWork:
    """The preprocessed frames of one video.

    Attributes:
        pixels: Distinct frames, uint8, shape (F, S, S, 3).
        views: Rows of `pixels` that each view is made of, shape (V, T).
    """

    pixels: NDArray[np.uint8]
    views: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What came out.

    Attributes:
        output: Embeddings of the views, shape (V, D), or the rows of a graph.
        stages: Its share of the seconds of each graph.
    """

    output: Float32Array
    stages: dict[str, float] = field(default_factory=dict)


class SharedCalls:
    """Computes the work of several requests in one call.

    A group is `("views", T)` with `ClipWork`, or `(graph, shape of a row)` with arrays of rows,
    where `clip` stands for whole clips, whatever the visual prompt.

    Args:
        runtime: What executes the graphs.
        max_batch: Clips in a call; larger work is cut, which bounds memory.
    """

    def __init__(self, runtime: Runtime, *, max_batch: int) -> None:
        self._runtime = runtime
        self._max_batch = max_batch

    def __call__(self, group: Hashable, payloads: Sequence[Any]) -> list[Encoded]:
        """Compute payloads of one group; gives their outputs in order."""
        assert isinstance(group, tuple)
        if group[0] == "views":
            return self._encode_views(payloads)
        rows = [len(payload) for payload in payloads]
        started = time.perf_counter()
        output = self._run_graph(group[0], _joined(payloads))
        seconds = time.perf_counter() - started
        return [
            Encoded(part, {group[0]: seconds * len(part) / sum(rows)})
            for part in np.split(output, np.cumsum(rows)[:-1])
        ]

    def _run_graph(self, graph: GraphOrClip, array: Array) -> Float32Array:
        runtime = self._runtime
        if graph == "visual":
            num_frames = self._max_batch * runtime.manifest.model.num_frames
            return _in_parts(runtime.encode_frames, array, num_frames)
        run = {
            "temporal": runtime.encode_clips,
            "textual": runtime.encode_text,
            "video": runtime.encode_video,
            "clip": runtime.encode_video,
        }[graph]
        return _in_parts(run, array, self._max_batch)

    def _encode_views(self, works: Sequence[ClipWork]) -> list[Encoded]:
        if not self._runtime.frames_are_independent:
            clips = _joined([work.pixels[work.views] for work in works])
            started = time.perf_counter()
            embeddings = self._run_graph("video", clips)
            return _shares(works, embeddings, {"video": time.perf_counter() - started})
        started = time.perf_counter()
        features = self._run_graph("visual", _joined([work.pixels for work in works]))
        visual = time.perf_counter()
        starts = np.cumsum([0, *(len(work.pixels) for work in works)])
        rows = np.concatenate(
            [work.views + start for work, start in zip(works, starts, strict=False)]
        )
        embeddings = self._run_graph("temporal", features[rows])
        stages = {"visual": visual - started, "temporal": time.perf_counter() - visual}
        return _shares(works, embeddings, stages)


@dataclass(frozen=True)
class BatchFacts:
    """What the warm-up measured.

    Attributes:
        best: Clips of the smallest call that is about as good per clip as any.
        ms_per_clip: By the clips of a call.
    """

    best: int
    ms_per_clip: dict[int, float]


def measure_batches(runtime: Runtime, *, max_batch: int, budget_seconds: float) -> BatchFacts:
    """Run calls of growing size, which warms the runtime up, and find the best.

    Sizes double up to `max_batch`; those that the budget has no time for are left out.
    """
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    start = time.perf_counter()
    found: dict[int, float] = {}
    for size in sizes:
        spent = time.perf_counter() - start
        if found and 2 * size * min(found.values()) / 1000 > budget_seconds - spent:
            break
        found[size] = min(_seconds(runtime, size) for _ in range(3)) * 1000 / size
    best = min(found.values())
    smallest = min(size for size, ms in found.items() if ms <= best * _AS_GOOD)
    return BatchFacts(smallest, {size: round(ms, 3) for size, ms in found.items()})


def _seconds(runtime: Runtime, size: int) -> float:
    model = runtime.manifest.model
    shape = (size, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    started = time.perf_counter()
    runtime.encode_video(frames)
    return time.perf_counter() - started


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _in_parts(run: Any, array: Array, num_rows: int) -> Float32Array:
    starts = range(0, len(array), num_rows)
    parts: list[Float32Array] = [run(array[start : start + num_rows]) for start in starts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shares(
    works: Sequence[ClipWork], embeddings: Float32Array, stages: dict[str, float]
) -> list[Encoded]:
    num_views = [len(work.views) for work in works]
    parts = np.split(embeddings, np.cumsum(num_views)[:-1])
    return [
        Encoded(part, {name: s * len(part) / len(embeddings) for name, s in stages.items()})
        for part in parts
    ]
