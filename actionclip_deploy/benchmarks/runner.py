"""Runs a benchmark: opens the rows and lets them take turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.conditions import ConditionsReader
from actionclip_deploy.benchmarks.measured import (
    MIN_ROUNDS,
    RowRun,
    best_matmul_rate,
    make_report,
)
from actionclip_deploy.benchmarks.power import EnergyMeter
from actionclip_deploy.benchmarks.power_runs import IDLE_SECONDS, measure_power
from actionclip_deploy.benchmarks.processes import OpenRow, RowProcess
from actionclip_deploy.benchmarks.report import BenchmarkReport, Parity, Settings, WarmUp
from actionclip_deploy.errors import ActionClipError, BenchmarkError

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NUM_ROUNDS = 15
DURATION_SECONDS = 10.0
_STAGE_PASSES = 5

# Threads of OpenMP and of other pools go on spinning after a call, some for 200 ms; the next row
# waits for them to fall asleep, or it would have to share its cores with the one before.
SETTLE_SECONDS = 0.25

Tell = Callable[[str], None]


def run_benchmark(
    specs: Sequence[RowSpec],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    duration_seconds: float = DURATION_SECONDS,
    num_rounds: int = NUM_ROUNDS,
    videos: Sequence[Path] = (),
    settle_seconds: float = SETTLE_SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    on_step: Tell | None = None,
    open_row: OpenRow = RowProcess,
    open_meter: Callable[[], EnergyMeter] = EnergyMeter,
) -> BenchmarkReport:
    """Measure rows side by side.

    Each row lives in a process of its own, and they take turns in rounds, so that what the
    machine does meanwhile happens to all of them. A row that fails is reported with its reason
    and the others go on. Where power can be read, each row runs once more at each batch size,
    without turns and after a rest, for as long again.

    Args:
        specs: The rows; the first one that runs torch is the reference, or else the first.
        batch_sizes: Clips of a call.
        duration_seconds: How long each row is measured at each batch size.
        num_rounds: Rounds that this time is divided into; 9 or more. A round has at least one
            call, so slow calls take longer than `duration_seconds`.
        videos: Files for the stages from the file on; without them, those from frames on.
        settle_seconds: How long nothing runs before a row has its turn.
        idle_seconds: How long nothing runs before the run whose power is measured.
        on_step: Called with a short sentence when a step begins.
        open_row: Makes the handle of a row; another one in tests.
        open_meter: Makes what counts energy; another one in tests.

    Raises:
        ValueError: If a number is not allowed, or there is no row.
        BenchmarkError: If no row could be opened.
    """
    _check(specs, batch_sizes, duration_seconds, num_rounds)
    tell = on_step or (lambda _: None)
    conditions, reader = [], ConditionsReader()
    rates: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actionclip-")))
        runs = [_open(spec, open_row, stack, folder / str(i), tell) for i, spec in enumerate(specs)]
        if all(run.error for run in runs):
            raise BenchmarkError(f"No row could be opened; the first one says: {runs[0].error}")
        meter = stack.enter_context(open_meter())
        reader.read("")
        for batch_size in batch_sizes:
            times = (duration_seconds, num_rounds, settle_seconds)
            _measure_batch(runs, batch_size, *times, meter, tell)
            if meter.source is not None:
                measure_power(runs, batch_size, duration_seconds, idle_seconds, meter, tell)
            rates += [rate for run in runs if (rate := run.ask("matmul_rate"))]
            conditions.append(reader.read(f"batch {batch_size}"))
        _measure_stages(runs, videos, settle_seconds, tell)
        conditions.append(reader.read("stages"))
        for run in runs:
            run.memory = run.ask("memory") or {}
    settings = Settings(
        batch_sizes=tuple(batch_sizes),
        duration_seconds=duration_seconds,
        num_rounds=num_rounds,
        num_threads=specs[0].num_threads,
        num_videos=len(videos),
    )
    return make_report(runs, settings, best_matmul_rate(rates), tuple(conditions), meter.source)


def _check(
    specs: Sequence[RowSpec], batch_sizes: Sequence[int], duration: float, num_rounds: int
) -> None:
    if not specs:
        raise ValueError("There is no row to measure; name at least one runtime.")
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise ValueError(
            f"batch_sizes is {', '.join(map(str, batch_sizes)) or 'empty'}; give numbers of clips "
            "of 1 or more, each once."
        )
    if not 0 < duration < float("inf"):
        raise ValueError(f"duration_seconds is {duration}; it must be above 0.")
    if num_rounds < MIN_ROUNDS:
        raise ValueError(f"num_rounds is {num_rounds}; it must be {MIN_ROUNDS} or more.")


def _open(spec: RowSpec, open_row: OpenRow, stack: ExitStack, folder: Path, tell: Tell) -> RowRun:
    tell(f"Opening {spec.name}")
    prepared, error = {}, None
    try:
        prepared = spec.prepare(folder).to_dict()
    except ActionClipError as exc:
        error = str(exc)
    # After that, since the time of a process counts from its start.
    run = RowRun(spec, open_row(spec), error=error)
    stack.callback(run.close)
    run.start = run.ask("open", **prepared) or {}
    if run.start and prepared["cache"]:
        tell(f"Opening {spec.name} again")
        run.first_memory = run.ask("memory") or {}
        run.handle.close()
        run.handle = open_row(spec)
        run.second_start = run.ask("open", **prepared) or {}
    return run


def _measure_batch(
    runs: Sequence[RowRun],
    batch_size: int,
    duration: float,
    num_rounds: int,
    settle: float,
    meter: EnergyMeter,
    tell: Tell,
) -> None:
    for run in runs:
        tell(f"Batch {batch_size}: warming up {run.spec.name}")
        if parity := run.ask("parity", batch_size=batch_size):
            run.parities[batch_size] = Parity.model_validate(parity)
        if done := run.ask("warm_up", batch_size=batch_size, max_seconds=duration):
            run.warm_ups[batch_size] = WarmUp.model_validate(done)
    for number in range(num_rounds):
        tell(f"Batch {batch_size}: round {number + 1} of {num_rounds}")
        # Each round begins with another row, so that none is always behind the same one.
        shift = number % len(runs)
        for run in (*runs[shift:], *runs[:shift]):
            time.sleep(settle)
            meter.spent()
            timed = run.ask("measure", batch_size=batch_size, seconds=duration / num_rounds)
            if timed is None:
                continue
            watts = meter.spent().watts
            run.rounds_ms.setdefault(batch_size, []).append([1e3 * s for s in timed["wall"]])
            run.device_ms.setdefault(batch_size, []).extend(1e3 * s for s in timed["device"])
            run.watts.setdefault(batch_size, []).extend([] if watts is None else [watts])


def _measure_stages(
    runs: Sequence[RowRun], videos: Sequence[Path], settle: float, tell: Tell
) -> None:
    for number in range(_STAGE_PASSES):
        tell(f"Stages: pass {number + 1} of {_STAGE_PASSES}")
        for run in runs:
            time.sleep(settle)
            if not videos:
                if timed := run.ask("stages"):
                    run.stages_ms.append(timed["stages_ms"])
                continue
            for path in videos:
                # The first pass reads the files into the page cache.
                if (timed := run.ask("video", path=str(path))) and number:
                    run.stages_ms.append(timed["stages_ms"])
            timed = run.ask("directory", paths=[str(path) for path in videos])
            if timed and number:
                run.videos_per_second.append(len(videos) / timed["seconds"])
