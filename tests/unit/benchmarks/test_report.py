"""Statistics of a report, and two reports beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actionclip_deploy.benchmarks import BenchmarkReport, compare_reports
from actionclip_deploy.benchmarks.report import (
    BatchResult,
    MatmulRate,
    Parity,
    Row,
    Settings,
    Subject,
    WarmUp,
    latency_distribution,
    paired_ratio,
    round_medians,
    throughput,
    unpaired_ratio,
)


def _rounds(num_rounds: int, num_calls: int, *, scale: float = 1.0) -> list[list[float]]:
    values = np.random.default_rng(1).normal(10.0, 1.0, (num_rounds, num_calls)) * scale
    return [list(row) for row in values]


def test_percentiles_are_those_of_all_calls() -> None:
    rounds = _rounds(20, 10)
    found = latency_distribution(rounds)
    calls = np.array(rounds).ravel()
    assert found.minimum == calls.min()
    assert found.mean.value == pytest.approx(calls.mean())
    assert found.median.value == pytest.approx(np.median(calls))
    assert found.p99 is not None
    assert found.p99.value == pytest.approx(np.percentile(calls, 99))


@pytest.mark.parametrize(
    ("num_calls", "given"), [(9, ()), (10, ("p90",)), (20, ("p90", "p95")), (99, ("p90", "p95"))]
)
def test_a_percentile_needs_as_many_calls_as_it_speaks_of(
    num_calls: int, given: tuple[str, ...]
) -> None:
    found = latency_distribution([[float(i)] for i in range(num_calls)])
    assert [name for name in ("p90", "p95", "p99") if getattr(found, name)] == list(given)


def test_the_interval_holds_the_true_median_of_most_samples() -> None:
    inside = 0
    for seed in range(40):
        values = np.random.default_rng(seed).normal(10.0, 1.0, (15, 1))
        median = latency_distribution(values.tolist()).median
        inside += median.low <= 10.0 <= median.high
    assert inside >= 34  # 95 % of 40 are 38; 34 or fewer happen in one run of a hundred


def test_calls_of_one_round_are_no_independent_samples() -> None:
    # The same nine values: once each in a round of its own, once a hundred times in each round.
    values = np.random.default_rng(3).normal(10.0, 1.0, 9)
    once = latency_distribution([[v] for v in values]).mean
    often = latency_distribution([[v] * 100 for v in values]).mean
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)


def test_throughput_counts_the_clips_of_a_call() -> None:
    rate = throughput([[100.0, 300.0]] * 9, 4)
    assert rate.value == pytest.approx(4 / 0.2)
    assert rate.low == rate.high == pytest.approx(rate.value)


def test_what_slows_a_round_down_falls_out_of_the_paired_ratio() -> None:
    slowness = np.array([1.0, 5.0, 1.0, 9.0, 1.2, 1.0, 3.0, 1.0, 2.0])
    ratio = paired_ratio(30.0 * slowness, 20.0 * slowness)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_two_runs_of_the_same_have_a_ratio_of_about_one() -> None:
    first, second = np.random.default_rng(0).normal(10.0, 0.5, (2, 30))
    ratio = unpaired_ratio(first, second)
    assert ratio.low < 1.0 < ratio.high
    assert ratio.high - ratio.low < 0.15


def test_each_round_has_its_median() -> None:
    assert round_medians([[1.0, 9.0, 2.0], [4.0]]) == [2.0, 4.0]


def _row(name: str, rounds_ms: Any) -> Row:
    rounds = [[float(ms)] for ms in rounds_ms]
    result = BatchResult(
        batch_size=8,
        num_calls=len(rounds),
        warm_up=WarmUp(num_calls=1, seconds=1.0, is_stable=True),
        latency_ms=latency_distribution(rounds),
        round_medians_ms=tuple(part[0] for part in rounds),
        device_ms=None,
        clips_per_second=throughput(rounds, 8),
        speedup=None,
        utilisation=None,
        watts=None,
        parity=Parity(
            max_abs_difference=0.0,
            min_cosine=1.0,
            top1_agreement=1.0,
            top5_agreement=1.0,
            passed=True,
            problem=None,
        ),
    )
    return Row(
        name=name,
        runtime=name,
        precision="fp32",
        execution_provider="cpu",
        num_threads=2,
        versions={},
        is_reference=False,
        start=None,
        second_start=None,
        results=(result,),
        stages=None,
        error=None,
    )


def _report(*rows: Row, **changes: Any) -> BenchmarkReport:
    subject = Subject(
        backbone="ViT-B/32",
        visual_prompt="transf",
        num_frames=8,
        input_size=224,
        num_flops=None,
        source_sha256="0" * 64,
        golden_origin="rendered",
    )
    settings = Settings(
        batch_sizes=(8,), duration_seconds=1.0, num_rounds=9, num_threads=2, num_videos=0
    )
    values = {
        "created": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "subject": subject,
        "settings": settings,
        "machine": {"cpu": "A", "gpus": []},
        "versions": {"onnxruntime": "1.32.0"},
        "matmul_rate": None,
        "conditions": (),
        "rows": rows,
    }
    return BenchmarkReport(**{**values, **changes})


def _noisy(median: float, scatter: float = 0.01) -> Any:
    return median * np.random.default_rng(int(median * 100)).normal(1.0, scatter, 15)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (100.0, 80.0, "faster"),
        (100.0, 125.0, "slower"),
        (100.0, 101.0, "within noise"),
        (100.0, 98.0, "within noise"),
    ],
)
def test_a_change_counts_only_beyond_noise(before: float, after: float, verdict: str) -> None:
    comparison = compare_reports(
        _report(_row("onnxruntime", _noisy(before))), _report(_row("onnxruntime", _noisy(after)))
    )
    (change,) = comparison.changes
    assert change.verdict == verdict
    assert change.speedup.value == pytest.approx(before / after, rel=0.02)


def test_noisy_reports_hide_a_change_that_quiet_ones_show() -> None:
    def verdict(scatter: float) -> str:
        first, second = _noisy(100.0, scatter), _noisy(90.0, scatter)
        return (
            compare_reports(_report(_row("x", first)), _report(_row("x", second)))
            .changes[0]
            .verdict
        )

    assert verdict(0.005) == "faster"
    assert verdict(0.3) == "within noise"


def test_rows_of_one_report_alone_are_named() -> None:
    comparison = compare_reports(
        _report(_row("torch", [1.0] * 9), _row("old", [1.0] * 9)),
        _report(_row("torch", [1.0] * 9), _row("new", [1.0] * 9)),
    )
    assert comparison.only_before == ("old",)
    assert comparison.only_after == ("new",)


def test_what_else_differs_is_said() -> None:
    rate = MatmulRate(flops_per_second=1e11, precision="fp32", library="numpy 2", num_samples=3)
    other = rate.model_copy(update={"flops_per_second": 2e11})
    row = _row("x", [1.0] * 9)
    differences = compare_reports(
        _report(row, matmul_rate=rate),
        _report(
            row,
            machine={"cpu": "B", "gpus": []},
            versions={"onnxruntime": "1.33.0"},
            matmul_rate=other,
            commit="def",
        ),
    ).differences
    assert differences == (
        "cpu: A -> B",
        "onnxruntime: 1.32.0 -> 1.33.0",
        "the machine multiplied matrices 2.00 times as fast",
        "commit: abc -> def",
    )


def test_equal_reports_differ_in_nothing(tmp_path: Path) -> None:
    report = _report(_row("x", [1.0, 1.1, 1.2] * 3))
    comparison = compare_reports(report, report)
    assert comparison.differences == ()
    assert comparison.changes[0].verdict == "within noise"
