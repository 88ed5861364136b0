"""Percentiles, intervals and ratios of rounds."""

from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.benchmarks.report import (
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
