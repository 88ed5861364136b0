"""The report of a server under load: its schema, and the numbers of one rate from its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from actionclip_deploy.benchmarks.load import ANSWERED, Sample
from actionclip_deploy.benchmarks.report import write_atomically
from actionclip_deploy.benchmarks.statistics import PERCENTILES


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatencyMs(_Record):
    """Latencies of the requests that were answered, in ms, from when each was due.

    A percentile is null where there are too few of them: p99 needs 100.
    """

    num_requests: int
    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    maximum: float


class LoadResult(_Record):
    """What the server did at one rate, or for so many clients."""

    offered_per_second: float | None = Field(
        description="requests that arrive per second, on average; null in a closed loop"
    )
    num_clients: int | None = Field(description="of a closed loop; null in an open one")
    seconds: float = Field(
        description="in which requests were sent; in a closed loop, until the last answer"
    )
    num_sent: int
    num_answered: int
    num_wrong: int = Field(
        description="answers that differ from the one to the same request without load"
    )
    errors: dict[str, int] = Field(
        description="requests without an answer: by status and code, `timeout`, `connection`"
    )
    error_rate: float = Field(description="share of those that were sent, 0 to 1")
    answered_per_second: float = Field(
        description="over `seconds`, or until the last answer where that is longer"
    )
    goodput_per_second: float = Field(
        description="answered within `slo_ms`, over `seconds` or until the last of them"
    )
    share_in_time: float = Field(description="answered within `slo_ms`, of those sent, 0 to 1")
    latency_ms: LatencyMs | None = Field(description="null where nothing was answered")
    mean_batch_size: float | None = Field(
        description="clips in a call of the runtime, averaged over answers; null where they do "
        "not tell"
    )
    lag_ms: float = Field(description="by how much the generator was late: p99, or the maximum")


class LoadSettings(_Record):
    """What was asked for."""

    mode: Literal["video", "frames", "tensors", "embeddings"]
    labels: str = Field(description="the label bank, or how many labels each request brings")
    num_bodies: int = Field(description="different requests, which take turns")
    mean_body_bytes: float
    duration_seconds: float
    slo_ms: float
    timeout_seconds: float
    connections: int
    seed: int


class LoadReport(_Record):
    """Everything that one run of `actionclip benchmark --url` found out."""

    version: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601")
    commit: str | None = Field(description="of the toolkit's checkout; null where it is installed")
    url: str
    is_local: bool = Field(description="whether the server shared this machine")
    server: dict[str, Any] = Field(description="what /v1/info told")
    settings: LoadSettings
    machine: dict[str, Any] = Field(description="where the load came from")
    versions: dict[str, str]
    open_loop: tuple[LoadResult, ...]
    closed_loop: LoadResult | None
    stopped_because: str | None = Field(description="why no higher rate was tried")


def summarise(
    samples: Sequence[Sample],
    *,
    seconds: float,
    slo_ms: float,
    offered_per_second: float | None = None,
    num_clients: int | None = None,
) -> LoadResult:
    """The numbers of one rate.

    Args:
        samples: Of all requests that were sent.
        seconds: In which they were sent; a closed loop's end where answers end later.
        slo_ms: Within which an answer is of use.
        offered_per_second: Of an open loop.
        num_clients: Of a closed one.
    """
    answered = [each for each in samples if each.outcome.kind == ANSWERED]
    errors = Counter(each.outcome.kind for each in samples if each.outcome.kind != ANSWERED)
    if num_clients is not None:
        seconds = max([seconds, *(each.ended for each in samples)])
    in_time = [each for each in answered if each.latency_seconds * 1000 <= slo_ms]
    sizes = [each.outcome.batch_size for each in answered if each.outcome.batch_size is not None]
    return LoadResult(
        offered_per_second=offered_per_second,
        num_clients=num_clients,
        seconds=seconds,
        num_sent=len(samples),
        num_answered=len(answered),
        num_wrong=sum(each.outcome.is_wrong for each in answered),
        errors=dict(errors.most_common()),
        error_rate=1 - len(answered) / len(samples) if samples else 0.0,
        answered_per_second=_per_second(answered, seconds),
        goodput_per_second=_per_second(in_time, seconds),
        share_in_time=len(in_time) / len(samples) if samples else 1.0,
        latency_ms=_latencies([each.latency_seconds * 1000 for each in answered]),
        mean_batch_size=float(np.mean(sizes)) if sizes else None,
        lag_ms=_lag_ms(samples),
    )


def write_load_report(report: LoadReport, path: Path) -> None:
    """Write a report as JSON, all of it or nothing.

    Raises:
        BenchmarkError: If it cannot be written.
    """
    write_atomically(path, report.model_dump_json(indent=2) + "\n")


def _per_second(samples: Sequence[Sample], seconds: float) -> float:
    return len(samples) / max([seconds, *(each.ended for each in samples)])


def _latencies(latencies_ms: Sequence[float]) -> LatencyMs | None:
    if not latencies_ms:
        return None
    values = np.asarray(latencies_ms)
    found = {
        name: float(np.percentile(values, percent))
        if percent <= 50.0 or len(values) * (100.0 - percent) / 100.0 >= 1.0 - 1e-9
        else None
        for name, percent in PERCENTILES.items()
    }
    median = found.pop("median")
    assert median is not None
    return LatencyMs(
        num_requests=len(values),
        mean=float(values.mean()),
        p50=median,
        **found,
        maximum=float(values.max()),
    )


def _lag_ms(samples: Sequence[Sample]) -> float:
    if not samples:
        return 0.0
    lags = np.array([each.lag_seconds * 1000 for each in samples])
    return float(np.percentile(lags, 99) if len(lags) >= 100 else lags.max())
