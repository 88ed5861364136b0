"""The picture of a server under load: goodput and latency against the offered rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.benchmarks.load_report import LatencyMs, LoadReport
from actionclip_deploy.errors import MissingExtraError

try:
    from matplotlib.figure import Figure
except ImportError as exc:
    raise MissingExtraError("A picture of a server under load", "plot") from exc

# Of Okabe and Ito, which differ for the colour-blind too.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#888888"
_MANY_TICKS = 12


def draw_load(report: LoadReport, path: Path) -> None:
    """Draw goodput and latency against the offered rate.

    Args:
        report: What was measured.
        path: The picture to write; its suffix says the format.
    """
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    figure.suptitle(_title(report), fontsize=10)
    goodput, latency = figure.subplots(1, 2)
    _draw_goodput(goodput, report)
    _draw_latency(latency, report)
    figure.savefig(path, dpi=110)


def _title(report: LoadReport) -> str:
    runtime, settings = report.server["runtime"], report.settings
    return (
        f"{report.server['model']['backbone']} by {runtime['name']} "
        f"({runtime['execution_provider']}, {runtime['precision']}); requests with "
        f"{settings.mode}, Poisson arrivals, {settings.duration_seconds:g} s at each rate"
    )


def _draw_goodput(axes: Any, report: LoadReport) -> None:
    rates = _rates(report)
    goodput = [result.goodput_per_second for result in report.open_loop]
    answered = [result.answered_per_second for result in report.open_loop]
    if len(rates):
        axes.plot(rates, rates, color=_GREY, linewidth=0.8, linestyle=":", label="offered")
        axes.plot(rates, answered, color=_ORANGE, marker="s", markersize=4, label="answered")
        within = f"answered within {report.settings.slo_ms:g} ms"
        axes.plot(rates, goodput, color=_BLUE, marker="o", markersize=5, label=within)
    closed = report.closed_loop
    if closed is not None:
        label = f"{closed.num_clients} clients without a pause"
        axes.axhline(
            closed.answered_per_second, color=_GREEN, linewidth=1.2, linestyle="--", label=label
        )
    highest = max([*goodput, *answered, closed.answered_per_second if closed else 0.0])
    # The line of what was offered leaves the picture where the server does not follow.
    axes.set_ylim(0, 1.25 * highest or 1.0)
    axes.set_ylabel("requests per second")
    axes.set_title("Goodput", fontsize=9)
    _finish(axes, report)


def _draw_latency(axes: Any, report: LoadReport) -> None:
    rates = _rates(report)

    def values(read: Callable[[LatencyMs], float | None]) -> Any:
        found = [result.latency_ms and read(result.latency_ms) for result in report.open_loop]
        return np.array([np.nan if value is None else value for value in found], np.float64)

    tail = values(lambda ms: ms.p99)
    lines: tuple[tuple[str, Any, str, str], ...] = (
        ("median", values(lambda ms: ms.p50), _BLUE, "o"),
        ("p90", values(lambda ms: ms.p90), _GREEN, "^"),
        ("p99", tail, _ORANGE, "s"),
    )
    for name, numbers, colour, marker in lines:
        if not np.isnan(numbers).all():
            axes.plot(rates, numbers, color=colour, marker=marker, markersize=4, label=name)
    few = np.isnan(tail)
    worst = values(lambda ms: ms.maximum)
    if few.any() and not np.isnan(worst[few]).all():
        label = "maximum, of fewer than 100"
        axes.plot(rates[few], worst[few], color=_ORANGE, marker="x", linestyle="", label=label)
    slo = report.settings.slo_ms
    axes.axhline(slo, color=_GREY, linewidth=0.8, linestyle=":", label=f"{slo:g} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("ms from when a request was due")
    axes.set_title("Latency of what was answered", fontsize=9)
    _finish(axes, report)


def _finish(axes: Any, report: LoadReport) -> None:
    rates = _rates(report)
    if len(rates):
        axes.set_xscale("log", base=2)
        ticks = rates if len(rates) <= _MANY_TICKS else rates[:: len(rates) // _MANY_TICKS + 1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
    else:
        axes.set_xticks([])
    axes.set_xlabel("requests per second that arrive")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def _rates(report: LoadReport) -> Any:
    return np.array([result.offered_per_second for result in report.open_loop], np.float64)
