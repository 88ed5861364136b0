"""Latencies of interleaved rounds as percentiles, throughput and ratios, each with its interval.

Calls of one round share what the machine did at that moment, so they are no independent samples.
Every interval is therefore a bootstrap over rounds: rounds are drawn again, with all their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.benchmarks.report import Distribution, Estimate

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
