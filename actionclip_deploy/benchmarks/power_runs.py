"""Power of a row that runs without turns: at first after a rest, and when it has been running.

A device that has rested may clock higher for some seconds than it can keep up, and needs less power
while it is cool. So neither the one nor the other stands for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from actionclip_deploy.benchmarks.measured import RowRun
from actionclip_deploy.benchmarks.power import EnergyMeter
from actionclip_deploy.benchmarks.report import Power, PowerUse

IDLE_SECONDS = 3.0
_BURST_SECONDS = 2.0


def measure_power(
    runs: Sequence[RowRun],
    batch_size: int,
    duration: float,
    idle_seconds: float,
    meter: EnergyMeter,
    tell: Callable[[str], None],
) -> None:
    """Let each row rest, then run for some time, and note what it took.

    Args:
        runs: The rows, warm; each notes its own.
        batch_size: Clips of a call.
        duration: Seconds that each runs for.
        idle_seconds: Seconds of the rest before.
        meter: Counts energy.
        tell: Called with a short sentence when a row begins.
    """
    for run in runs:
        tell(f"Batch {batch_size}: power of {run.spec.name}")
        meter.spent()
        time.sleep(idle_seconds)
        idle = meter.spent().watts
        burst_seconds = min(_BURST_SECONDS, duration / 3)
        burst = _measure(run, batch_size, burst_seconds, meter)
        _measure(run, batch_size, duration * 2 / 3 - burst_seconds, meter)
        sustained = _measure(run, batch_size, duration / 3, meter)
        if burst is not None and sustained is not None:
            run.powers[batch_size] = Power(idle_watts=idle, burst=burst, sustained=sustained)


def _measure(run: RowRun, batch_size: int, seconds: float, meter: EnergyMeter) -> PowerUse | None:
    meter.spent()
    timed = run.ask("measure", batch_size=batch_size, seconds=seconds)
    spent = meter.spent()
    if timed is None or spent.joules is None or spent.watts is None or spent.joules <= 0:
        return None
    num_clips = len(timed["wall"]) * batch_size
    rate = num_clips / spent.seconds
    return PowerUse(
        seconds=spent.seconds,
        num_clips=num_clips,
        watts=spent.watts,
        clips_per_second=rate,
        clips_per_second_per_watt=rate / spent.watts,
        joules_per_clip=spent.joules / num_clips,
    )
