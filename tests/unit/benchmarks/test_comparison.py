"""Two reports beside each other."""

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
    throughput,
)


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
