"""Full calls of a graph across videos: rows of several in one call, each gets its own back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.runtimes.base import Float32Array

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
