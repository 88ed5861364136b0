"""Pictures of a report: of runtimes side by side, and of a server under load."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actionclip_deploy.benchmarks.report import BatchResult, BenchmarkReport, Row
from actionclip_deploy.benchmarks.stages import STAGES
from actionclip_deploy.errors import MissingExtraError

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.load import LatencyMs, LoadReport

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from actionclip_deploy.plot import save_figure
except ImportError as exc:
    raise MissingExtraError("A benchmark's pictures", "plot") from exc

# Of Okabe and Ito, which differ for the colour-blind too.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#888888"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_INCH_PER_CHART = (7.2, 3.6)
_MANY_TICKS = 12

_Draw = Callable[[Any, BenchmarkReport], None]


def draw_report(report: BenchmarkReport, path: Path) -> None:
    """Draw all charts into one picture, in the format that its suffix says."""
    charts = _charts(report)
    width, height = _INCH_PER_CHART
    num_rows = (len(charts) + 1) // 2
    figure = Figure(figsize=(2 * width, num_rows * height + 0.4), layout="constrained")
    subject, machine = report.subject, report.machine
    device = ", ".join(machine["gpus"]) or machine["cpu"] or machine["architecture"]
    figure.suptitle(
        f"{subject.backbone}, {subject.visual_prompt}, {subject.num_frames} frames of "
        f"{subject.input_size} pixels; {device}, {report.settings.num_threads} threads",
        fontsize=10,
    )
    axes = figure.subplots(num_rows, 2, squeeze=False).ravel()
    for place, (_, draw) in enumerate(charts):
        draw(axes[place], report)
    for empty in axes[len(charts) :]:
        empty.set_axis_off()
    save_figure(figure, path)


def svg_charts(report: BenchmarkReport) -> list[tuple[str, str]]:
    """Each chart as a title and an SVG element."""
    drawn = []
    for title, draw in _charts(report):
        figure = Figure(figsize=_INCH_PER_CHART, layout="constrained")
        draw(figure.subplots(), report)
        text = io.StringIO()
        # Text as text, so that it can be selected; the salt makes the same report the same bytes.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "actionclip"}):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        drawn.append((title, svg[svg.index("<svg") :]))
    return drawn


def _charts(report: BenchmarkReport) -> list[tuple[str, _Draw]]:
    charts: list[tuple[str, _Draw]] = [
        ("Throughput", _draw_throughput),
        ("Latency", _draw_latency),
    ]
    if any(result.speedup for row in report.rows for result in row.results):
        charts.append(("Speed-up", _draw_speedup))
    if any(row.stages for row in report.rows):
        charts.append(("Stages", _draw_stages))
    return charts


def _draw_throughput(axes: Any, report: BenchmarkReport) -> None:
    def values(result: BatchResult) -> tuple[float, float, float]:
        rate = result.clips_per_second
        return rate.value, rate.low, rate.high

    _draw_lines(axes, report.rows, values)
    axes.set_ylabel("clips per second")
    axes.set_ylim(bottom=0)
    axes.set_title("Throughput, with 95 % intervals", fontsize=9)


def _draw_latency(axes: Any, report: BenchmarkReport) -> None:
    def values(result: BatchResult) -> tuple[float, float, float]:
        latency = result.latency_ms
        tail = latency.p95 or latency.p90 or latency.median
        return latency.median.value, latency.minimum, tail.value

    _draw_lines(axes, report.rows, values)
    axes.set_ylabel("ms per call")
    axes.set_yscale("log")
    axes.set_title("Latency: median, from the minimum to p95", fontsize=9)


def _draw_speedup(axes: Any, report: BenchmarkReport) -> None:
    def values(result: BatchResult) -> tuple[float, float, float] | None:
        ratio = result.speedup
        return (ratio.value, ratio.low, ratio.high) if ratio else None

    _draw_lines(axes, report.rows, values)
    axes.axhline(1.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    reference = report.reference
    axes.set_ylabel(f"times {reference.name if reference else 'the reference'}")
    axes.set_title("Speed-up, with 95 % intervals", fontsize=9)


def _draw_lines(
    axes: Any,
    rows: Sequence[Row],
    values: Callable[[BatchResult], tuple[float, float, float] | None],
) -> None:
    """One line per row over the batch sizes; a row has the same colour in every chart.

    `values` gives middle, low and high; None leaves a result out.
    """
    ticks: set[float] = set()
    for place, row in enumerate(rows):
        found = {r.batch_size: value for r in row.results if (value := values(r)) is not None}
        if not found:
            continue
        ticks |= found.keys()
        middle, low, high = np.array(list(found.values())).T
        colour = _COLOURS[place % len(_COLOURS)]
        axes.fill_between(list(found), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(list(found), middle, marker="o", markersize=4, color=colour, label=row.name)
    _set_ticks(axes, sorted(ticks))
    axes.set_xlabel("clips in a call")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    # Next to the lines, which there is no room among.
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _set_ticks(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_stages(axes: Any, report: BenchmarkReport) -> None:
    staged = [(row.name, row.stages.stages_ms) for row in report.rows if row.stages][::-1]
    lefts = np.zeros(len(staged))
    present = [stage for stage in STAGES if any(stage in times for _, times in staged)]
    for place, stage in enumerate(present):
        widths = np.array([times.get(stage, 0.0) for _, times in staged])
        colour = _COLOURS[place % len(_COLOURS)]
        axes.barh(range(len(staged)), widths, left=lefts, color=colour, label=stage, height=0.6)
        lefts += widths
    axes.set_yticks(range(len(staged)), [name for name, _ in staged], fontsize=8)
    axes.set_xlabel("ms of one clip")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    axes.set_title("Stages of one clip, medians", fontsize=9)


# A server under load.


def draw_load(report: LoadReport, path: Path) -> None:
    """Draw goodput and latency against the offered rate, in the format that the suffix says."""
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    runtime, settings = report.server["runtime"], report.settings
    figure.suptitle(
        f"{report.server['model']['backbone']} by {runtime['name']} "
        f"({runtime['execution_provider']}, {runtime['precision']}); requests with "
        f"{settings.mode}, Poisson arrivals, {settings.duration_seconds:g} s at each rate",
        fontsize=10,
    )
    rates = np.array([result.offered_per_second for result in report.open_loop], np.float64)
    goodput, latency = figure.subplots(1, 2)
    _draw_goodput(goodput, report, rates)
    _draw_load_latency(latency, report, rates)
    for axes in (goodput, latency):
        if len(rates):
            many = len(rates) > _MANY_TICKS
            _set_ticks(axes, list(rates[:: len(rates) // _MANY_TICKS + 1] if many else rates))
            axes.tick_params(axis="x", labelsize=8)
        else:
            axes.set_xticks([])
            axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("requests per second that arrive")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_goodput(axes: Any, report: LoadReport, rates: Any) -> None:
    goodput = [result.goodput_per_second for result in report.open_loop]
    answered = [result.answered_per_second for result in report.open_loop]
    if len(rates):
        axes.plot(rates, rates, color=_GREY, linewidth=0.8, linestyle=":", label="offered")
        axes.plot(rates, answered, color=_ORANGE, marker="s", markersize=4, label="answered")
        within = f"answered within {report.settings.slo_ms:g} ms"
        axes.plot(rates, goodput, color=_BLUE, marker="o", markersize=5, label=within)
    highest = [*goodput, *answered]
    if (closed := report.closed_loop) is not None:
        rate, label = closed.answered_per_second, f"{closed.num_clients} clients without a pause"
        axes.axhline(rate, color=_GREEN, linewidth=1.2, linestyle="--", label=label)
        highest.append(rate)
    # The line of what was offered leaves the picture where the server does not follow.
    axes.set_ylim(0, 1.25 * max(highest, default=0.0) or 1.0)
    axes.set_ylabel("requests per second")
    axes.set_title("Goodput", fontsize=9)


def _draw_load_latency(axes: Any, report: LoadReport, rates: Any) -> None:
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
