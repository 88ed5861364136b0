"""What changed between two reports, and whether it is more than noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from actionclip_deploy.benchmarks.report import BatchResult, BenchmarkReport, Estimate, Row
from actionclip_deploy.benchmarks.statistics import unpaired_ratio

Verdict = Literal["faster", "slower", "within noise"]

# Two runs on one machine differ by a few per cent whatever the code does: memory is laid out
# otherwise, clocks boost otherwise. What an interval within a run says is too narrow for that.
_SMALLEST_CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    """One row at one batch size in two reports.

    Attributes:
        row: Name of the row.
        batch_size: Clips of a call.
        before_ms: Median latency of the first report.
        after_ms: Of the second.
        speedup: First over second, so above 1 is faster.
        verdict: Beyond noise: the interval lies on one side of 1, and the change is larger than
            3 % and than what the rounds of either report scatter by.
    """

    row: str
    batch_size: int
    before_ms: float
    after_ms: float
    speedup: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two reports beside each other.

    Attributes:
        changes: Of the rows and batch sizes that both have.
        differences: What else differs, in words: machine, model, versions, settings.
        only_before: Rows that the second report lacks.
        only_after: Rows that the first one lacks.
    """

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]


def compare_reports(before: BenchmarkReport, after: BenchmarkReport) -> Comparison:
    """Say what changed from one report to another.

    Args:
        before: The first one.
        after: The second one.
    """
    rows_before = {row.name: row for row in before.rows if row.results}
    rows_after = {row.name: row for row in after.rows if row.results}
    changes = [
        change
        for name, row in rows_before.items()
        if name in rows_after
        for change in _row_changes(row, rows_after[name])
    ]
    return Comparison(
        changes=tuple(changes),
        differences=tuple(_differences(before, after)),
        only_before=tuple(name for name in rows_before if name not in rows_after),
        only_after=tuple(name for name in rows_after if name not in rows_before),
    )


def _row_changes(before: Row, after: Row) -> list[Change]:
    results = {result.batch_size: result for result in after.results}
    return [
        _change(before.name, result, results[result.batch_size])
        for result in before.results
        if result.batch_size in results
    ]


def _change(row: str, before: BatchResult, after: BatchResult) -> Change:
    ratio = unpaired_ratio(before.round_medians_ms, after.round_medians_ms)
    noise = max(_SMALLEST_CHANGE, _scatter(before), _scatter(after))
    verdict: Verdict = "within noise"
    if ratio.low > 1.0 and ratio.value > 1.0 + noise:
        verdict = "faster"
    elif ratio.high < 1.0 and ratio.value < 1.0 / (1.0 + noise):
        verdict = "slower"
    return Change(
        row=row,
        batch_size=before.batch_size,
        before_ms=before.latency_ms.median.value,
        after_ms=after.latency_ms.median.value,
        speedup=ratio,
        verdict=verdict,
    )


def _scatter(result: BatchResult) -> float:
    """Half of the middle half of the rounds' medians, as a share of their median."""
    low, middle, high = np.percentile(result.round_medians_ms, (25, 50, 75))
    return float((high - low) / 2 / middle)


def _differences(before: BenchmarkReport, after: BenchmarkReport) -> list[str]:
    found = []
    for what in ("cpu", "cpu_cores_available", "gpus", "nvidia_driver", "os", "python"):
        pair = (before.machine.get(what), after.machine.get(what))
        if pair[0] != pair[1]:
            found.append(f"{what.replace('_', ' ')}: {pair[0]} -> {pair[1]}")
    if before.subject.source_sha256 != after.subject.source_sha256:
        found.append("the reports are of different checkpoints")
    if before.subject.num_frames != after.subject.num_frames:
        found.append(f"frames: {before.subject.num_frames} -> {after.subject.num_frames}")
    if before.settings.num_threads != after.settings.num_threads:
        found.append(f"threads: {before.settings.num_threads} -> {after.settings.num_threads}")
    for name in sorted(before.versions.keys() | after.versions.keys()):
        versions = (before.versions.get(name), after.versions.get(name))
        if versions[0] != versions[1]:
            found.append(f"{name}: {versions[0]} -> {versions[1]}")
    rates = before.matmul_rate, after.matmul_rate
    if rates[0] and rates[1] and rates[0].library == rates[1].library:
        ratio = rates[1].flops_per_second / rates[0].flops_per_second
        if abs(ratio - 1) > _SMALLEST_CHANGE:
            found.append(f"the machine multiplied matrices {ratio:.2f} times as fast")
    if before.commit != after.commit:
        found.append(f"commit: {before.commit} -> {after.commit}")
    return found
