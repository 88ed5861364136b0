"""The report of a benchmark: its schema, and reading and writing it as JSON.

docs/howto/benchmark.md describes every field; `actionclip benchmark --schema` prints the schema.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actionclip_deploy.errors import BenchmarkError

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
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
        staged = Path(file.name)
        staged.chmod(0o644)
        staged.replace(path)
    except OSError as exc:
        raise BenchmarkError(f"{path} cannot be written ({exc}); choose another place.") from exc
