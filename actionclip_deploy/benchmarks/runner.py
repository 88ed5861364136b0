"""Runs a benchmark: opens the rows, lets them take turns, and makes the report of what they say.

Each row lives in a process of its own (worker.py), so that thread pools, allocators and settings
of one do not touch the others, and they take turns in rounds, so that what the machine does
meanwhile happens to all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.power import EnergyMeter, open_nvml
from actionclip_deploy.benchmarks.report import (
    BatchResult,
    BenchmarkReport,
    Conditions,
    MatmulRate,
    Parity,
    Power,
    PowerUse,
    Row,
    Settings,
    Stages,
    Start,
    Subject,
    WarmUp,
    latency_distribution,
    paired_ratio,
    round_medians,
    throughput,
)
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ActionClipError,
    ArgumentError,
    BenchmarkError,
    MissingExtraError,
)
from actionclip_deploy.runtimes.machine import check_seconds, describe_machine, installed_versions
from actionclip_deploy.video import MAX_PIXELS

try:
    import psutil
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NUM_ROUNDS = 15
_MAX_ROUNDS = 10_000
MIN_ROUNDS = 9  # below, the bootstrap's intervals mean little
DURATION_SECONDS = 10.0
_STAGE_PASSES = 5

# Threads of OpenMP and of other pools go on spinning after a call, some for 200 ms; the next row
# waits for them to fall asleep, or it would have to share its cores with the one before.
SETTLE_SECONDS = 0.25
# A device that has rested may clock higher for some seconds than it can keep up, and needs less
# power while it is cool. So power is measured twice, and neither number stands for both.
IDLE_SECONDS = 3.0
_BURST_SECONDS = 2.0

_END_SECONDS = 10
_PACKAGE = Path(__file__).resolve().parents[1]

Tell = Callable[[str], None]


class RowHandle(Protocol):
    """A row that can be asked to measure; see `worker.CandidateWorker` for what it can be asked."""

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer; a `BenchmarkError` says why there is none."""

    def close(self) -> None:
        """End it."""


@dataclass
class BatchRun:
    """What a row has measured at one batch size."""

    parity: Parity | None = None
    warm_up: WarmUp | None = None
    rounds_ms: list[list[float]] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    power: Power | None = None


@dataclass
class RowRun:
    """A row while it is being measured."""

    spec: RowSpec
    handle: RowHandle
    start: dict[str, Any] = field(default_factory=dict)
    second_start: dict[str, Any] = field(default_factory=dict)
    batches: defaultdict[int, BatchRun] = field(default_factory=lambda: defaultdict(BatchRun))
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    videos_per_second: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    first_memory: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def ask(self, what: str, **arguments: Any) -> dict[str, Any] | None:
        """Ask the row; where it fails it is out of the race, and the others go on."""
        if self.error is None:
            try:
                return self.handle.ask(what, **arguments)
            except BenchmarkError as exc:
                self.error = str(exc)
        return None


def run_benchmark(
    specs: Sequence[RowSpec],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    duration_seconds: float = DURATION_SECONDS,
    num_rounds: int = NUM_ROUNDS,
    videos: Sequence[Path] = (),
    max_pixels: int = MAX_PIXELS,
    settle_seconds: float = SETTLE_SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    on_step: Tell | None = None,
    open_row: Callable[[RowSpec], RowHandle] | None = None,
    open_meter: Callable[[], EnergyMeter] = EnergyMeter,
) -> BenchmarkReport:
    """Measure rows side by side.

    A row that fails is reported with its reason and the others go on. Where power can be read,
    each row runs once more at each batch size, without turns and after a rest, for as long again.

    Args:
        specs: The rows; the first one that runs torch is the reference, or else the first.
        batch_sizes: Clips of a call.
        duration_seconds: How long each row is measured at each batch size.
        num_rounds: Rounds that this time is divided into; 9 or more. A round has at least one
            call, so slow calls take longer than `duration_seconds`.
        videos: Files for the stages from the file on; without them, those from frames on.
        max_pixels: Most pixels of a frame of those; a video with more fails.
        settle_seconds: How long nothing runs before a row has its turn.
        idle_seconds: How long nothing runs before the run whose power is measured.
        on_step: Called with a short sentence when a step begins.
        open_row: Makes the handle of a row, by default a process; another one in tests.
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
        make = open_row or RowProcess
        runs = [_open(spec, make, stack, folder / str(i), tell) for i, spec in enumerate(specs)]
        if all(run.error for run in runs):
            raise BenchmarkError(f"No row could be opened; the first one says: {runs[0].error}")
        meter = stack.enter_context(open_meter())
        race = _Race(runs, duration_seconds, num_rounds, settle_seconds, idle_seconds, meter, tell)
        reader.read("")
        for batch_size in batch_sizes:
            race.measure_batch(batch_size)
            if meter.source is not None:
                race.measure_power(batch_size)
            rates += [rate for run in runs if (rate := run.ask("matmul_rate"))]
            conditions.append(reader.read(f"batch {batch_size}"))
        race.measure_stages(videos, max_pixels)
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
    return _make_report(runs, settings, _best_matmul_rate(rates), tuple(conditions), meter.source)


def _check(
    specs: Sequence[RowSpec], batch_sizes: Sequence[int], duration: float, num_rounds: int
) -> None:
    if not specs:
        raise ValueError("There is no row to measure; name at least one runtime.")
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise ArgumentError(
            "batch_sizes",
            f"is {', '.join(map(str, batch_sizes)) or 'empty'}; give numbers of clips "
            "of 1 or more, each once.",
        )
    check_seconds("duration_seconds", duration)
    if not MIN_ROUNDS <= num_rounds <= _MAX_ROUNDS:
        raise ArgumentError(
            "num_rounds",
            f"is {num_rounds}; it must be {MIN_ROUNDS} or more, and {_MAX_ROUNDS:,} at most.",
        )


def _open(
    spec: RowSpec,
    open_row: Callable[[RowSpec], RowHandle],
    stack: ExitStack,
    folder: Path,
    tell: Tell,
) -> RowRun:
    tell(f"Opening {spec.name}")
    prepared, error = {}, None
    try:
        prepared = spec.prepare(folder).to_dict()
    except ActionClipError as exc:
        error = str(exc)
    # After that, since the time of a process counts from its start.
    run = RowRun(spec, open_row(spec), error=error)
    stack.callback(lambda: run.handle.close())  # noqa: PLW0108 - the last one that it has
    run.start = run.ask("open", **prepared) or {}
    if run.start and prepared["cache"]:
        tell(f"Opening {spec.name} again")
        run.first_memory = run.ask("memory") or {}
        run.handle.close()
        run.handle = open_row(spec)
        run.second_start = run.ask("open", **prepared) or {}
    return run


@dataclass
class _Race:
    """Open rows that take turns; each notes what it has measured."""

    runs: Sequence[RowRun]
    duration_seconds: float
    num_rounds: int
    settle_seconds: float
    idle_seconds: float
    meter: EnergyMeter
    tell: Tell

    def measure_batch(self, batch_size: int) -> None:
        for run in self.runs:
            self.tell(f"Batch {batch_size}: warming up {run.spec.name}")
            batch = run.batches[batch_size]
            if parity := run.ask("parity", batch_size=batch_size):
                batch.parity = Parity.model_validate(parity)
            if done := run.ask("warm_up", batch_size=batch_size, max_seconds=self.duration_seconds):
                batch.warm_up = WarmUp.model_validate(done)
        seconds = self.duration_seconds / self.num_rounds
        for number in range(self.num_rounds):
            self.tell(f"Batch {batch_size}: round {number + 1} of {self.num_rounds}")
            # Each round begins with another row, so that none always follows the same one.
            shift = number % len(self.runs)
            for run in (*self.runs[shift:], *self.runs[:shift]):
                time.sleep(self.settle_seconds)
                self.meter.spent()
                timed = run.ask("measure", batch_size=batch_size, seconds=seconds)
                if timed is None:
                    continue
                batch = run.batches[batch_size]
                if (watts := self.meter.spent().watts) is not None:
                    batch.watts.append(watts)
                batch.rounds_ms.append([1e3 * each for each in timed["wall"]])
                batch.device_ms += [1e3 * each for each in timed["device"]]

    def measure_power(self, batch_size: int) -> None:
        """Let each row rest, then run without turns; the rows are warm."""
        for run in self.runs:
            self.tell(f"Batch {batch_size}: power of {run.spec.name}")
            self.meter.spent()
            time.sleep(self.idle_seconds)
            idle = self.meter.spent().watts
            third = self.duration_seconds / 3
            burst_seconds = min(_BURST_SECONDS, third)
            burst = self._power_use(run, batch_size, burst_seconds)
            self._power_use(run, batch_size, 2 * third - burst_seconds)
            sustained = self._power_use(run, batch_size, third)
            if burst is not None and sustained is not None:
                power = Power(idle_watts=idle, burst=burst, sustained=sustained)
                run.batches[batch_size].power = power

    def _power_use(self, run: RowRun, batch_size: int, seconds: float) -> PowerUse | None:
        self.meter.spent()
        timed = run.ask("measure", batch_size=batch_size, seconds=seconds)
        spent = self.meter.spent()
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

    def measure_stages(self, videos: Sequence[Path], max_pixels: int) -> None:
        for number in range(_STAGE_PASSES):
            self.tell(f"Stages: pass {number + 1} of {_STAGE_PASSES}")
            for run in self.runs:
                time.sleep(self.settle_seconds)
                if not videos:
                    if timed := run.ask("stages"):
                        run.stages_ms.append(timed["stages_ms"])
                    continue
                for path in videos:
                    # The first pass reads the files into the page cache.
                    timed = run.ask("video", path=str(path), max_pixels=max_pixels)
                    if timed and number:
                        run.stages_ms.append(timed["stages_ms"])
                paths = [str(path) for path in videos]
                timed = run.ask("directory", paths=paths, max_pixels=max_pixels)
                if timed and number:
                    run.videos_per_second.append(len(videos) / timed["seconds"])


# The report.


def _best_matmul_rate(samples: Sequence[dict[str, Any]]) -> MatmulRate | None:
    """Of the fastest library: what a runtime could have reached at best."""
    if not samples:
        return None
    by_library: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        key = (sample["library"], sample["precision"])
        by_library.setdefault(key, []).append(sample["flops_per_second"])
    (library, precision), rates = max(
        by_library.items(), key=lambda item: statistics.median(item[1])
    )
    return MatmulRate(
        flops_per_second=statistics.median(rates),
        precision=precision,
        library=library,
        num_samples=len(rates),
    )


def _make_report(
    runs: Sequence[RowRun],
    settings: Settings,
    rate: MatmulRate | None,
    conditions: tuple[Conditions, ...],
    power_source: str | None,
) -> BenchmarkReport:
    """Put together what was measured; at least one row has been opened."""
    opened = [run for run in runs if run.start]
    reference = next((run for run in opened if run.spec.runtime == "torch"), opened[0])
    manifest = Bundle.open(reference.spec.bundle).manifest
    model, num_frames = manifest.model, reference.spec.num_frames
    subject = Subject(
        backbone=model.backbone,
        visual_prompt=model.visual_prompt,
        num_frames=num_frames,
        input_size=model.input_size,
        num_flops=model.num_flops if num_frames == model.num_frames else None,
        source_sha256=manifest.source.sha256,
        golden_origin=reference.start["golden_origin"],
    )
    return BenchmarkReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=toolkit_commit(),
        subject=subject,
        settings=settings,
        machine=describe_machine(),
        versions=installed_versions(),
        matmul_rate=rate,
        power_source=power_source,
        conditions=conditions,
        rows=tuple(_row(run, reference, subject, rate) for run in runs),
    )


def _row(run: RowRun, reference: RowRun, subject: Subject, rate: MatmulRate | None) -> Row:
    info = run.start.get("info", {})
    return Row(
        name=run.spec.name,
        runtime=run.spec.runtime,
        precision=info.get("precision", "unknown"),
        execution_provider=info.get("execution_provider"),
        num_threads=info.get("num_threads"),
        versions=info.get("versions", {}),
        # Every row takes and gives numpy arrays: what runs on a device copies inside of its calls.
        transfers=("inside" if run.start["has_device"] else "none") if run.start else None,
        is_reference=run is reference,
        start=_start(run.start, run.first_memory or run.memory),
        second_start=_start(run.second_start, run.memory),
        results=tuple(
            result
            for batch_size in run.batches
            if (result := _batch_result(run, reference, batch_size, subject, rate))
        ),
        stages=_stages(run),
        error=run.error,
    )


def _start(start: dict[str, Any], memory: dict[str, Any]) -> Start | None:
    if not start:
        return None
    names = ("import_seconds", "load_seconds", "first_result_seconds", "resident_bytes")
    return Start(
        **{name: start[name] for name in names},
        peak_resident_bytes=memory.get("peak_resident_bytes", start["resident_bytes"]),
        device_bytes=memory.get("device_bytes"),
    )


def _batch_result(
    run: RowRun, reference: RowRun, batch_size: int, subject: Subject, rate: MatmulRate | None
) -> BatchResult | None:
    """The numbers of one batch size; None where the row failed before it had them."""
    batch = run.batches[batch_size]
    if batch.parity is None or batch.warm_up is None or len(batch.rounds_ms) < MIN_ROUNDS:
        return None
    latency, medians = latency_distribution(batch.rounds_ms), round_medians(batch.rounds_ms)
    reference_medians = round_medians(reference.batches[batch_size].rounds_ms)
    comparable = run is not reference and len(reference_medians) == len(medians)
    utilisation = None
    # The rate is of the CPU where it is fp32, which says nothing of a row that ran on a GPU.
    ran_there = rate is not None and (not run.start["has_device"] or rate.precision != "fp32")
    if rate is not None and ran_there and subject.num_flops is not None:
        flops_per_second = subject.num_flops * batch_size / (latency.median.value / 1e3)
        utilisation = flops_per_second / rate.flops_per_second
    return BatchResult(
        batch_size=batch_size,
        num_calls=sum(len(part) for part in batch.rounds_ms),
        warm_up=batch.warm_up,
        latency_ms=latency,
        round_medians_ms=tuple(medians),
        device_ms=statistics.median(batch.device_ms) if batch.device_ms else None,
        clips_per_second=throughput(batch.rounds_ms, batch_size),
        speedup=paired_ratio(reference_medians, medians) if comparable else None,
        utilisation=utilisation,
        watts=statistics.fmean(batch.watts) if batch.watts else None,
        power=batch.power,
        parity=batch.parity,
    )


def _stages(run: RowRun) -> Stages | None:
    if not run.stages_ms:
        return None
    names = run.stages_ms[0]
    rates = run.videos_per_second
    return Stages(
        stages_ms={name: statistics.median(t[name] for t in run.stages_ms) for name in names},
        total_ms=statistics.median(sum(timed.values()) for timed in run.stages_ms),
        num_clips=len(run.stages_ms),
        end_to_end_videos_per_second=statistics.median(rates) if rates else None,
    )


# A row's process, as its parent has it.


class RowProcess:
    """A row in a process of its own; it is opened by `ask("open", **spec.to_dict())`."""

    def __init__(self, spec: RowSpec) -> None:
        self._name = spec.name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actionclip_deploy.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            BenchmarkError: With the row's own sentence; or with the last line that it printed, if
                its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(self._why_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it ends by itself when there is nothing more to read."""
        if self._process.stdin is not None:
            # Of a process that has ended, what could not be written is still there to be flushed.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        last = lines[-1].strip() if lines else "it printed nothing"
        how = f"signal {-code}, as where memory runs out" if code < 0 else f"code {code}"
        return (
            f"The process of the row {self._name} ended with {how} ({last}); leave the row out, "
            "or give smaller batches if memory ran out."
        )


# What surrounds a measurement: clocks, load, and which code it was.


class ConditionsReader:
    """Reads what the machine is doing; None for what it does not tell."""

    def __init__(self) -> None:
        self._nvml = open_nvml()
        self._busy, self._since = _busy_seconds_of_others(), time.monotonic()

    def read(self, moment: str) -> Conditions:
        """Read the conditions; the share of others is since the reading before.

        Args:
            moment: What is being done, for the report.
        """
        busy, now = _busy_seconds_of_others(), time.monotonic()
        span = (now - self._since) * (os.cpu_count() or 1)
        others = None if busy is None or self._busy is None else (busy - self._busy) / span * 100
        self._busy, self._since = busy, now
        frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
        gpu = self._nvml.read() if self._nvml else {}
        return Conditions(
            moment=moment,
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            cpu_mhz=frequency.current if frequency and frequency.current else None,
            cpu_percent_of_others=None if others is None else max(0.0, others),
            gpu_mhz=gpu.get("mhz"),
            gpu_watts=gpu.get("watts"),
            gpu_celsius=gpu.get("celsius"),
        )


def describe_surroundings() -> dict[str, Any]:
    """Machine, load, versions and commit, for the head of a report."""
    machine = describe_machine()
    names = ("cpu", "cpu_flags", "cpu_cores_available", "memory_bytes", "gpus", "os", "python")
    return {
        "machine": {name: machine[name] for name in names},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": installed_versions(),
        "commit": toolkit_commit(),
    }


def toolkit_commit() -> str | None:
    """Commit of the checkout that this package lies in, with `-dirty` after it if it differs."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    is_ours = _PACKAGE.parent.joinpath(".git").exists()
    return done.stdout.strip() or None if is_ours and done.returncode == 0 else None


def _busy_seconds_of_others() -> float | None:
    """Seconds that all cores have been busy for anything but this process and its children."""
    try:
        times = psutil.cpu_times()
        total = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # Guests are counted in user time already.
        total -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        own = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            spent = process.cpu_times()
            own += spent.user + spent.system
            # Those of children that have ended, which are no processes any more.
            own += getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)
        return float(total - own)
    except psutil.Error:
        return None
