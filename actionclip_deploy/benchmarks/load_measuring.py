"""Rate after rate, until the server does not follow any more.

Without rates of the caller's, they double from 1 per second. The last one is the first at which
fewer than 9 of 10 requests are answered within the time that is of use (`slo_ms`): what was
refused, failed or came late is too much then, whichever of it it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from actionclip_deploy.benchmarks.load import Send, poisson_arrivals, run_closed_loop, run_open_loop
from actionclip_deploy.benchmarks.load_report import LoadResult, summarise

MIN_SHARE_IN_TIME = 0.9
MAX_RATE = 2.0**14
_REST_SECONDS = 1.0  # between two rates


@dataclass(frozen=True)
class LoadPlan:
    """What is measured.

    Attributes:
        rates: Requests per second; empty doubles them from 1 until the server does not follow.
        num_clients: Of the closed loop; None leaves it out, and the open one where there are no
            rates beside it.
        duration_seconds: Of each measurement.
        slo_ms: Within which an answer is of use.
        seed: Of the arrivals.
    """

    rates: tuple[float, ...] = ()
    num_clients: int | None = None
    duration_seconds: float = 10.0
    slo_ms: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duration_seconds", "slo_ms"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        if not all(0 < rate <= MAX_RATE for rate in self.rates):
            raise ValueError(
                f"The rates are {', '.join(f'{rate:g}' for rate in self.rates)}; each must be "
                f"above 0 and at most {MAX_RATE:g} per second."
            )
        if self.num_clients is not None and self.num_clients < 1:
            raise ValueError(f"num_clients is {self.num_clients}; it must be 1 or more.")


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        open_loop: One result for each rate.
        closed_loop: Of the clients, if there were any.
        stopped_because: Why no higher rate was tried; None where the rates were given.
    """

    open_loop: tuple[LoadResult, ...]
    closed_loop: LoadResult | None
    stopped_because: str | None


async def measure_load(
    send: Send, plan: LoadPlan, *, on_step: Callable[[str], None] = lambda _: None
) -> Measured:
    """Put a server under load.

    Args:
        send: Sends one request.
        plan: What is measured.
        on_step: Told what is being done.
    """
    closed = None
    if plan.num_clients is not None:
        on_step(f"{plan.num_clients} clients, one request after the other")
        samples = await run_closed_loop(send, plan.num_clients, plan.duration_seconds)
        closed = summarise(
            samples,
            seconds=plan.duration_seconds,
            slo_ms=plan.slo_ms,
            num_clients=plan.num_clients,
        )
    results: list[LoadResult] = []
    why = None
    doubles = not plan.rates and plan.num_clients is None
    todo = [1.0] if doubles else list(plan.rates)
    for rate in todo:  # which grows meanwhile
        results.append(await _measure_rate(send, plan, rate, on_step))
        if doubles:
            why = _why_stop(results[-1], plan)
            if why is None:
                todo.append(2 * rate)
    return Measured(tuple(results), closed, why)


async def _measure_rate(
    send: Send, plan: LoadPlan, rate: float, on_step: Callable[[str], None]
) -> LoadResult:
    on_step(f"{rate:g} requests per second")
    # The rate itself, so that it has the same arrivals whichever rates are before it.
    arrivals = poisson_arrivals(rate, plan.duration_seconds, (plan.seed, round(rate * 1000)))
    samples = await run_open_loop(send, arrivals)
    await asyncio.sleep(_REST_SECONDS)
    return summarise(
        samples,
        seconds=plan.duration_seconds,
        slo_ms=plan.slo_ms,
        offered_per_second=rate,
    )


def _why_stop(last: LoadResult, plan: LoadPlan) -> str | None:
    rate = last.offered_per_second
    assert rate is not None
    if last.share_in_time < MIN_SHARE_IN_TIME:
        return (
            f"at {rate:g} requests per second {last.share_in_time:.0%} were answered within "
            f"{plan.slo_ms:g} ms, fewer than {MIN_SHARE_IN_TIME:.0%}"
        )
    return f"{MAX_RATE:g} requests per second is the highest rate" if rate >= MAX_RATE else None
