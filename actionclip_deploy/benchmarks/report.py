"""The report of a benchmark: its schema, and reading and writing it as JSON.

docs/howto/benchmark.md describes every field; `actionclip benchmark --schema` prints the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actionclip_deploy.errors import BenchmarkError, FileWriteError
from actionclip_deploy.files import write_text

REPORT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Record):
    """A number with the bounds of its 95 % confidence interval, from a bootstrap over rounds."""

    value: float
    low: float
    high: float


class Distribution(_Record):
    """Latency of one call in ms; a percentile is null where there are too few calls for it."""

    minimum: float
    mean: Estimate
    median: Estimate
    p90: Estimate | None
    p95: Estimate | None
    p99: Estimate | None


class WarmUp(_Record):
    """The calls before the measurement, until latency was stable or time was up."""

    num_calls: int
    seconds: float
    is_stable: bool


class Parity(_Record):
    """Agreement with PyTorch's golden outputs, at the batch size that was timed."""

    max_abs_difference: float | None = Field(description="of a value of a video embedding")
    min_cosine: float | None = Field(description="between a clip's embedding and the reference's")
    top1_agreement: float | None = Field(description="share of clips, 0 to 1")
    top5_agreement: float | None = Field(description="share of the first five labels, 0 to 1")
    passed: bool = Field(description="whether all are within the tolerances of the precision")
    problem: str | None = Field(description="why it did not pass, in words")


class PowerUse(_Record):
    """Power and energy of calls without a pause between them."""

    seconds: float
    num_clips: int
    watts: float = Field(description="mean power of what `power_source` of the report names")
    clips_per_second: float
    clips_per_second_per_watt: float
    joules_per_clip: float


class Power(_Record):
    """What one row takes when it has rested, and when it has been running."""

    idle_watts: float | None = Field(description="mean of the rest before, in which nothing ran")
    burst: PowerUse = Field(description="the first seconds after the rest")
    sustained: PowerUse = Field(
        description="the last third of a run as long as `duration_seconds`, after the burst"
    )


class BatchResult(_Record):
    """One row at one batch size."""

    batch_size: int = Field(description="clips in a call, B")
    num_calls: int
    warm_up: WarmUp
    latency_ms: Distribution
    round_medians_ms: tuple[float, ...] = Field(description="median latency of each round")
    device_ms: float | None = Field(
        description="median time between two CUDA events around the call; null without CUDA"
    )
    clips_per_second: Estimate
    speedup: Estimate | None = Field(
        description="reference's median latency over this row's, median over the same rounds"
    )
    utilisation: float | None = Field(
        description="the model's arithmetic over time, as a share of the matrix-product rate"
    )
    watts: float | None = Field(description="mean power while this row ran, where it is readable")
    power: Power | None = Field(
        default=None,
        description="of a run without turns; null where no power is readable, and in older reports",
    )
    parity: Parity


class Start(_Record):
    """The way from a new process to the first result."""

    import_seconds: float = Field(description="from the start of the process, Python's own too")
    load_seconds: float = Field(description="opening the runtime")
    first_result_seconds: float = Field(description="the first call, of one clip")
    resident_bytes: int = Field(description="memory of the process after the first result")
    peak_resident_bytes: int = Field(
        description="its largest memory: of a process that measured, over the whole benchmark"
    )
    device_bytes: int | None = Field(description="device memory that it holds; null without CUDA")


class Stages(_Record):
    """Median ms of each stage on the way of one clip, and of all of them together."""

    stages_ms: dict[str, float]
    total_ms: float
    num_clips: int = Field(description="clips that the medians are of")
    end_to_end_videos_per_second: float | None = Field(
        description="from files to scores over all videos, decoding ahead; null without --videos"
    )


class Row(_Record):
    """A runtime with a bundle in one precision: a line of the table."""

    name: str
    runtime: str
    precision: str
    execution_provider: str | None
    num_threads: int | None
    versions: dict[str, str]
    transfers: Literal["inside", "none"] | None = Field(
        default=None,
        description="the copies to and from a device's memory: `inside` of each latency, or "
        "`none` where the graphs run in host memory; null in older reports",
    )
    is_reference: bool
    start: Start | None
    second_start: Start | None = Field(
        description="with what the first start left in the cache of optimised graphs; null for "
        "runtimes that keep none"
    )
    results: tuple[BatchResult, ...]
    stages: Stages | None
    error: str | None = Field(description="why there are no results, or not all of them")


class MatmulRate(_Record):
    """The matrix-product rate of this machine, measured in between the rounds."""

    flops_per_second: float = Field(description="median over the samples")
    precision: str
    library: str
    num_samples: int


class Conditions(_Record):
    """What the machine was doing at some moment of the run."""

    moment: str
    load_average: float | None
    cpu_mhz: float | None
    cpu_percent_of_others: float | None = Field(
        description="share of all cores that other processes were using, per cent"
    )
    gpu_mhz: float | None
    gpu_watts: float | None
    gpu_celsius: float | None


class Subject(_Record):
    """The model that was measured."""

    backbone: str
    visual_prompt: str
    num_frames: int = Field(description="T of the clips that were timed")
    input_size: int
    num_flops: int | None = Field(description="of one clip; null where T is not the model's own")
    source_sha256: str
    golden_origin: str


class Settings(_Record):
    """What was asked for."""

    batch_sizes: tuple[int, ...]
    duration_seconds: float
    num_rounds: int
    num_threads: int
    num_videos: int


class BenchmarkReport(_Record):
    """Everything that one run of `actionclip benchmark` found out."""

    version: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601")
    commit: str | None = Field(description="of the toolkit's checkout; null where it is installed")
    subject: Subject
    settings: Settings
    machine: dict[str, Any]
    versions: dict[str, str]
    matmul_rate: MatmulRate | None
    power_source: str | None = Field(
        default=None,
        description="what power is of; null where none is readable, and in older reports",
    )
    conditions: tuple[Conditions, ...]
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row | None:
        """The row that speed-ups are relative to."""
        return next((row for row in self.rows if row.is_reference), None)

    @property
    def passed(self) -> bool:
        """Whether every row ran and agrees with PyTorch."""
        return all(
            row.error is None and all(r.parity.passed for r in row.results) for row in self.rows
        )


def write_report(report: BenchmarkReport, path: Path) -> None:
    """Write a report as JSON, all of it or nothing."""
    write_atomically(path, report.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> BenchmarkReport:
    """Read a report that `write_report` wrote.

    Raises:
        BenchmarkError: If it cannot be read or is no such report.
    """
    try:
        return BenchmarkReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchmarkError(f"{path} cannot be read ({exc}); give a report's JSON file.") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its start"
        raise BenchmarkError(
            f"{path} is no benchmark report of version {REPORT_VERSION} (at {place}: "
            f"{first['msg']}); give what `actionclip benchmark --output` wrote with this version."
        ) from exc


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under its name only once it is complete.

    Raises:
        BenchmarkError: If it cannot be written.
    """
    try:
        write_text(path, text)
    except FileWriteError as exc:
        raise BenchmarkError(str(exc)) from exc


# Latencies of interleaved rounds as percentiles, throughput and ratios, each with its interval.
#
# Calls of one round share what the machine did at that moment, so they are no independent samples.
# Every interval is therefore a bootstrap over rounds: rounds are drawn again, with all their calls.


CONFIDENCE = 0.95
_NUM_RESAMPLES = 1000
_SEED = 0

# A percentile beyond the slowest of so many calls would be made up: p99 needs 100 calls.
PERCENTILES = {"median": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}

Rounds = Sequence[Sequence[float]]


def latency_distribution(rounds: Rounds) -> Distribution:
    """Summarise the latencies of one row at one batch size.

    Args:
        rounds: Milliseconds of the calls of each round; no round is empty.

    Returns:
        Minimum, mean and percentiles in ms with intervals; a percentile is None where there are
        too few calls for it.
    """
    calls = np.concatenate([np.asarray(part, np.float64) for part in rounds])
    percentiles: dict[str, Estimate | None] = {}
    for name, percent in PERCENTILES.items():
        enough = percent <= 50.0 or len(calls) * (100.0 - percent) / 100.0 >= 1.0 - 1e-9
        percentiles[name] = _estimate(rounds, partial(_percentile, percent)) if enough else None
    median = percentiles["median"]
    assert median is not None
    return Distribution(
        minimum=float(calls.min()),
        mean=_estimate(rounds, lambda ms: float(ms.mean())),
        median=median,
        p90=percentiles["p90"],
        p95=percentiles["p95"],
        p99=percentiles["p99"],
    )


def throughput(rounds: Rounds, clips_per_call: int) -> Estimate:
    """Clips per second over all calls, from their latencies in ms."""
    return _estimate(rounds, lambda ms: 1e3 * clips_per_call / float(ms.mean()))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Median over rounds of the ratio of two rows that ran in the same rounds.

    What the machine did in a round happened to both, and falls out of their ratio.

    Args:
        numerators: One number per round, as the reference's median latency.
        denominators: The other row's, of the same rounds.
    """
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    return _estimate([[ratio] for ratio in ratios], lambda values: float(np.median(values)))


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Ratio of the medians of two runs that have nothing to do with each other."""
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    generator = np.random.default_rng(_SEED)
    drawn = [
        np.median(generator.choice(a, len(a))) / np.median(generator.choice(b, len(b)))
        for _ in range(_NUM_RESAMPLES)
    ]
    return _with_interval(float(np.median(a) / np.median(b)), np.asarray(drawn))


def round_medians(rounds: Rounds) -> list[float]:
    """The median of each round."""
    return [float(np.median(part)) for part in rounds]


def _percentile(percent: float, values: NDArray[np.float64]) -> float:
    return float(np.percentile(values, percent))


def _estimate(rounds: Rounds, statistic: Callable[[NDArray[np.float64]], float]) -> Estimate:
    parts = [np.asarray(part, np.float64) for part in rounds]
    generator = np.random.default_rng(_SEED)
    drawn = []
    for _ in range(_NUM_RESAMPLES):
        chosen = generator.integers(len(parts), size=len(parts))
        drawn.append(statistic(np.concatenate([parts[i] for i in chosen])))
    return _with_interval(statistic(np.concatenate(parts)), np.asarray(drawn))


def _with_interval(value: float, drawn: NDArray[np.float64]) -> Estimate:
    outside = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(drawn, (outside, 100.0 - outside))
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


# What changed between two reports, and whether it is more than noise.


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
