"""What the rows have measured, and the report that it makes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.conditions import toolkit_commit
from actionclip_deploy.benchmarks.processes import RowHandle
from actionclip_deploy.benchmarks.report import (
    BatchResult,
    BenchmarkReport,
    Conditions,
    MatmulRate,
    Parity,
    Power,
    Row,
    Settings,
    Stages,
    Start,
    Subject,
    WarmUp,
)
from actionclip_deploy.benchmarks.statistics import (
    latency_distribution,
    paired_ratio,
    round_medians,
    throughput,
)
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BenchmarkError
from actionclip_deploy.runtimes.machine import describe_machine, installed_versions

MIN_ROUNDS = 9  # below, the bootstrap's intervals mean little


@dataclass
class RowRun:
    """A row while it is being measured."""

    spec: RowSpec
    handle: RowHandle
    start: dict[str, Any] = field(default_factory=dict)
    second_start: dict[str, Any] = field(default_factory=dict)
    rounds_ms: dict[int, list[list[float]]] = field(default_factory=dict)
    device_ms: dict[int, list[float]] = field(default_factory=dict)
    watts: dict[int, list[float]] = field(default_factory=dict)
    powers: dict[int, Power] = field(default_factory=dict)
    warm_ups: dict[int, WarmUp] = field(default_factory=dict)
    parities: dict[int, Parity] = field(default_factory=dict)
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

    def close(self) -> None:
        """End the row's process, the last one that it had."""
        self.handle.close()


def best_matmul_rate(samples: Sequence[dict[str, Any]]) -> MatmulRate | None:
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


def make_report(
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
        transfers=_transfers(run.start),
        is_reference=run is reference,
        start=_start(run.start, run.first_memory or run.memory),
        second_start=_start(run.second_start, run.memory),
        results=tuple(
            _batch_result(run, reference, batch_size, subject, rate)
            for batch_size, parts in run.rounds_ms.items()
            if len(parts) >= MIN_ROUNDS and batch_size in run.parities
        ),
        stages=_stages(run),
        error=run.error,
    )


def _transfers(start: dict[str, Any]) -> Literal["inside", "none"] | None:
    # Every row takes and gives numpy arrays, so what runs on a device copies inside of its calls.
    if not start:
        return None
    return "inside" if start["has_device"] else "none"


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
) -> BatchResult:
    parts = run.rounds_ms[batch_size]
    latency = latency_distribution(parts)
    medians = round_medians(parts)
    reference_medians = round_medians(reference.rounds_ms.get(batch_size, []))
    comparable = run is not reference and len(reference_medians) == len(medians)
    utilisation = None
    if rate is not None and subject.num_flops is not None and _ran_where(run, rate):
        flops_per_second = subject.num_flops * batch_size / (latency.median.value / 1e3)
        utilisation = flops_per_second / rate.flops_per_second
    device, watts = run.device_ms[batch_size], run.watts[batch_size]
    return BatchResult(
        batch_size=batch_size,
        num_calls=sum(len(part) for part in parts),
        warm_up=run.warm_ups[batch_size],
        latency_ms=latency,
        round_medians_ms=tuple(medians),
        device_ms=statistics.median(device) if device else None,
        clips_per_second=throughput(parts, batch_size),
        speedup=paired_ratio(reference_medians, medians) if comparable else None,
        utilisation=utilisation,
        watts=statistics.fmean(watts) if watts else None,
        power=run.powers.get(batch_size),
        parity=run.parities[batch_size],
    )


def _ran_where(run: RowRun, rate: MatmulRate) -> bool:
    """Whether a row ran on what the rate is of: without torch on a GPU, that is the CPU."""
    return not run.start["has_device"] or rate.precision != "fp32"


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
