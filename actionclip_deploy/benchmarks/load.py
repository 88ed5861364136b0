"""Requests that arrive by a schedule, whatever the server does, and clients that wait for it.

In an open loop the next request does not wait for the last answer, as strangers do not either, and
latency is counted from the moment at which a request was due. A generator that waits for answers
sends less when the server is slow, and so leaves out just the requests that would have been late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ANSWERED = "answered"


@dataclass(frozen=True)
class Outcome:
    """What came of one request.

    Attributes:
        kind: `ANSWERED`; otherwise why not: status and code, `timeout`, or `connection`.
        batch_size: Clips in its call of the runtime, where the answer tells.
        is_wrong: Whether the answer differs from the one that was given without load.
    """

    kind: str
    batch_size: int | None = None
    is_wrong: bool = False


@dataclass(frozen=True)
class Sample:
    """One request; times in seconds since the measurement began.

    Attributes:
        due: When it had to be sent; in a closed loop, when it was.
        started: When it was sent.
        ended: When its answer was there, or it was given up.
        outcome: What came of it.
    """

    due: float
    started: float
    ended: float
    outcome: Outcome

    @property
    def latency_seconds(self) -> float:
        """From when it was due."""
        return self.ended - self.due

    @property
    def lag_seconds(self) -> float:
        """How late it was sent, which is the generator's own fault."""
        return self.started - self.due


# Sends the request of a number, and never raises for what the server does.
Send = Callable[[int], Awaitable[Outcome]]


def poisson_arrivals(
    rate: float, duration_seconds: float, seed: Sequence[int]
) -> NDArray[np.float64]:
    """Times at which requests arrive that know nothing of each other.

    Args:
        rate: Requests per second, on average.
        duration_seconds: None is later than that.
        seed: The same seed gives the same times.

    Returns:
        Seconds in ascending order; how many there are is random too.
    """
    rng = np.random.default_rng(list(seed))
    expected = rate * duration_seconds
    times = np.empty(0)
    last = 0.0
    while last <= duration_seconds:
        # Nearly always enough at the first try: five standard deviations more than expected.
        more = last + rng.exponential(1 / rate, int(expected + 5 * expected**0.5) + 5).cumsum()
        times = np.concatenate([times, more])
        last = float(times[-1])
    return times[times <= duration_seconds]


async def run_open_loop(send: Send, arrivals: NDArray[np.float64]) -> list[Sample]:
    """Send a request at each arrival and wait for all answers.

    Args:
        send: Sends one, in a time that it bounds itself.
        arrivals: Seconds from now, ascending.

    Returns:
        A sample for each arrival, in their order.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def one(index: int, due: float) -> Sample:
        started = loop.time() - begin
        outcome = await send(index)
        return Sample(due, started, loop.time() - begin, outcome)

    tasks = []
    try:
        for index, due in enumerate(arrivals.tolist()):
            # Also where it is late: the loop has to have its turn between two requests.
            await asyncio.sleep(max(0.0, begin + due - loop.time()))
            tasks.append(asyncio.ensure_future(one(index, due)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def run_closed_loop(send: Send, num_clients: int, duration_seconds: float) -> list[Sample]:
    """Let clients send one request after the other, each as soon as its last one is over.

    Args:
        send: Sends one.
        num_clients: Requests that are under way at any time.
        duration_seconds: No request begins later; those that have begun are waited for.

    Returns:
        A sample for each request, in the order of their ends.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    samples: list[Sample] = []
    num_sent = 0

    async def client() -> None:
        nonlocal num_sent
        while (started := loop.time() - begin) < duration_seconds:
            index, num_sent = num_sent, num_sent + 1
            outcome = await send(index)
            samples.append(Sample(started, started, loop.time() - begin, outcome))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return samples
