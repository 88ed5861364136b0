"""The report of a benchmark: its schema, its statistics, its file, and two of them compared.

docs/howto/benchmark.md describes every field; `actionclip benchmark --schema` prints the schema.
Calls of one round share what the machine did at that moment, so they are no independent samples:
every interval is a bootstrap over rounds, which are drawn again with all their calls.
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
from actionclip_deploy.files import read_text, write_text
from actionclip_deploy.manifest import describe_invalid

REPORT_VERSION = 1

CONFIDENCE = 0.95
_NUM_RESAMPLES = 1000
_SEED = 0

PERCENTILES = {"median": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}

# Two runs on one machine differ by a few per cent whatever the code does: memory is laid out
# otherwise, clocks boost otherwise. What an interval within a run says is too narrow for that.
_SMALLEST_CHANGE = 0.03

Rounds = Sequence[Sequence[float]]  # milliseconds of the calls of each round; none is empty


class ReportPart(BaseModel):
    """What a report is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(ReportPart):
    """A number with the bounds of its 95 % confidence interval, from a bootstrap over rounds."""

    value: float
    low: float
    high: float


class Distribution(ReportPart):
    """Latency of one call in ms; a percentile is null where there are too few calls for it."""

    minimum: float
    mean: Estimate
    median: Estimate
    p90: Estimate | None
    p95: Estimate | None
    p99: Estimate | None


class WarmUp(ReportPart):
    """The calls before the measurement, until latency was stable or time was up."""

    num_calls: int
    seconds: float
    is_stable: bool


class Parity(ReportPart):
    """Agreement with PyTorch's golden outputs, at the batch size that was timed."""

    max_abs_difference: float | None = Field(description="of a value of a video embedding")
    min_cosine: float | None = Field(description="between a clip's embedding and the reference's")
    top1_agreement: float | None = Field(description="share of clips, 0 to 1")
    top5_agreement: float | None = Field(description="share of the first five labels, 0 to 1")
    passed: bool = Field(description="whether all are within the tolerances of the precision")
    problem: str | None = Field(description="why it did not pass, in words")


class PowerUse(ReportPart):
    """Power and energy of calls without a pause between them."""

    seconds: float
    num_clips: int
    watts: float = Field(description="mean power of what `power_source` of the report names")
    clips_per_second: float
    clips_per_second_per_watt: float
    joules_per_clip: float


class Power(ReportPart):
    """What one row takes when it has rested, and when it has been running."""

    idle_watts: float | None = Field(description="mean of the rest before, in which nothing ran")
    burst: PowerUse = Field(description="the first seconds after the rest")
    sustained: PowerUse = Field(
        description="the last third of a run as long as `duration_seconds`, after the burst"
    )


class BatchResult(ReportPart):
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


class Start(ReportPart):
    """The way from a new process to the first result."""

    import_seconds: float = Field(description="from the start of the process, Python's own too")
    load_seconds: float = Field(description="opening the runtime")
    first_result_seconds: float = Field(description="the first call, of one clip")
    resident_bytes: int = Field(description="memory of the process after the first result")
    peak_resident_bytes: int = Field(
        description="its largest memory: of a process that measured, over the whole benchmark"
    )
    device_bytes: int | None = Field(description="device memory that it holds; null without CUDA")


class Stages(ReportPart):
    """Median ms of each stage on the way of one clip, and of all of them together."""

    stages_ms: dict[str, float]
    total_ms: float
    num_clips: int = Field(description="clips that the medians are of")
    end_to_end_videos_per_second: float | None = Field(
        description="from files to scores over all videos, decoding ahead; null without --videos"
    )


class Row(ReportPart):
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


class MatmulRate(ReportPart):
    """The matrix-product rate of this machine, measured in between the rounds."""

    flops_per_second: float = Field(description="median over the samples")
    precision: str
    library: str
    num_samples: int


class Conditions(ReportPart):
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


class Subject(ReportPart):
    """The model that was measured."""

    backbone: str
    visual_prompt: str
    num_frames: int = Field(description="T of the clips that were timed")
    input_size: int
    num_flops: int | None = Field(description="of one clip; null where T is not the model's own")
    source_sha256: str
    golden_origin: str


class Settings(ReportPart):
    """What was asked for."""

    batch_sizes: tuple[int, ...]
    duration_seconds: float
    num_rounds: int
    num_threads: int
    num_videos: int


class BenchmarkReport(ReportPart):
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


def write_report(report: ReportPart, path: Path) -> None:
    """Write a report, of a load too, as JSON, all of it or nothing."""
    write_atomically(path, report.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> BenchmarkReport:
    """Read a report that `write_report` wrote.

    Raises:
        BenchmarkError: If it cannot be read or is no such report.
    """
    text = read_text(path, "report", BenchmarkError)
    try:
        return BenchmarkReport.model_validate_json(text)
    except ValidationError as exc:
        raise BenchmarkError(
            f"{path} is not a benchmark report of version {REPORT_VERSION} "
            f"({describe_invalid(exc)}); give what `actionclip benchmark --output` wrote with this "
            "version."
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


def latency_distribution(rounds: Rounds) -> Distribution:
    """Summarise the latencies of one row at one batch size, in ms with intervals."""
    calls = np.concatenate([np.asarray(part, np.float64) for part in rounds])
    known = {
        name: _estimate(rounds, partial(np.percentile, q=percent))
        for name, percent in PERCENTILES.items()
        if percentile_if_known(calls, percent) is not None
    }
    return Distribution(
        minimum=float(calls.min()),
        mean=_estimate(rounds, np.mean),
        median=known["median"],
        p90=known.get("p90"),
        p95=known.get("p95"),
        p99=known.get("p99"),
    )


def percentile_if_known(values: NDArray[np.float64], percent: float) -> float | None:
    """A percentile; None above the median where it would be made up: p99 needs 100 values."""
    if percent > 50.0 and len(values) * (100.0 - percent) / 100.0 < 1.0 - 1e-9:
        return None
    return float(np.percentile(values, percent))


def throughput(rounds: Rounds, clips_per_call: int) -> Estimate:
    """Clips per second over all calls, from their latencies in ms."""
    return _estimate(rounds, lambda ms: 1e3 * clips_per_call / ms.mean())


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Median over rounds of the ratio of two rows, one number of each per round.

    What the machine did in a round happened to both, and falls out of their ratio.
    """
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    return _estimate(ratios[:, np.newaxis].tolist(), np.median)


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


def _estimate(rounds: Rounds, statistic: Callable[[NDArray[np.float64]], Any]) -> Estimate:
    parts = [np.asarray(part, np.float64) for part in rounds]
    generator = np.random.default_rng(_SEED)
    drawn = []
    for _ in range(_NUM_RESAMPLES):
        chosen = generator.integers(len(parts), size=len(parts))
        drawn.append(statistic(np.concatenate([parts[i] for i in chosen])))
    return _with_interval(float(statistic(np.concatenate(parts))), np.asarray(drawn))


def _with_interval(value: float, drawn: NDArray[np.float64]) -> Estimate:
    outside = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(drawn, (outside, 100.0 - outside))
    return Estimate(value=value, low=float(min(low, value)), high=float(max(high, value)))


Verdict = Literal["faster", "slower", "within noise"]


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
class ReportComparison:
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


def compare_reports(before: BenchmarkReport, after: BenchmarkReport) -> ReportComparison:
    """Say what changed from one report to another."""
    first, second = _results(before), _results(after)
    return ReportComparison(
        changes=tuple(
            _change(name, result, second[name][batch_size])
            for name in first
            if name in second
            for batch_size, result in first[name].items()
            if batch_size in second[name]
        ),
        differences=tuple(_differences(before, after)),
        only_before=tuple(name for name in first if name not in second),
        only_after=tuple(name for name in second if name not in first),
    )


def _results(report: BenchmarkReport) -> dict[str, dict[int, BatchResult]]:
    """Results by row and batch size."""
    return {row.name: {r.batch_size: r for r in row.results} for row in report.rows if row.results}


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

    def compare(name: str, first: object, second: object) -> None:
        if first != second:
            found.append(f"{name}: {first} -> {second}")

    for what in ("cpu", "cpu_cores_available", "gpus", "nvidia_driver", "os", "python"):
        compare(what.replace("_", " "), before.machine.get(what), after.machine.get(what))
    if before.subject.source_sha256 != after.subject.source_sha256:
        found.append("the reports are of different checkpoints")
    compare("frames", before.subject.num_frames, after.subject.num_frames)
    compare("threads", before.settings.num_threads, after.settings.num_threads)
    for name in sorted(before.versions.keys() | after.versions.keys()):
        compare(name, before.versions.get(name), after.versions.get(name))
    rates = before.matmul_rate, after.matmul_rate
    if rates[0] and rates[1] and rates[0].library == rates[1].library:
        ratio = rates[1].flops_per_second / rates[0].flops_per_second
        if abs(ratio - 1) > _SMALLEST_CHANGE:
            found.append(f"the machine multiplied matrices {ratio:.2f} times as fast")
    compare("commit", before.commit, after.commit)
    return found
