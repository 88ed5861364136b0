"""What `actionclip benchmark --url` prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from actionclip_deploy.cli.output import print_warning, results

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.load_report import LoadReport, LoadResult

# Above, the generator was busy itself, and latencies are its own in part.
_LATE_MS = 20.0
# As wide as its table needs: a number that is cut to the terminal's width is another number.
_wide_results = Console(width=160)


def print_load_report(report: LoadReport) -> None:
    """Print the table, errors by kind, and what is wrong with the numbers."""
    runtime, settings = report.server["runtime"], report.settings
    title = (
        f"{report.url}: {runtime['name']} ({runtime['execution_provider']}, "
        f"{runtime['precision']}), {settings.mode}, labels {settings.labels}, "
        f"{settings.mean_body_bytes / 1024:,.0f} KiB a request, "
        f"{settings.duration_seconds:g} s each"
    )
    results.print(title, highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ("load", "sent", "answered", "answered /s", f"in {settings.slo_ms:g} ms /s")
    tail = ("errors", "p50 ms", "p90", "p95", "p99", "max", "batch")
    for place, heading in enumerate((*headings, *tail)):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    every = [*report.open_loop, *([report.closed_loop] if report.closed_loop else [])]
    for result in every:
        table.add_row(*_cells(result))
    _wide_results.print(table)
    for result in every:
        if result.errors:
            told = ", ".join(f"{number} x {kind}" for kind, number in result.errors.items())
            results.print(f"{_load(result)}: {told}", highlight=False, markup=False)
    if report.stopped_because:
        results.print(f"Stopped: {report.stopped_because}.", highlight=False, markup=False)
    for remark in _remarks(report, every):
        print_warning(remark)


def _cells(result: LoadResult) -> list[str]:
    latency = result.latency_ms
    found = (latency.p50, latency.p90, latency.p95, latency.p99, latency.maximum) if latency else ()
    milliseconds = ["–" if ms is None else f"{ms:.1f}" for ms in found] or ["–"] * 5
    return [
        _load(result),
        str(result.num_sent),
        str(result.num_answered),
        f"{result.answered_per_second:.2f}",
        f"{result.goodput_per_second:.2f}",
        f"{result.error_rate:.1%}",
        *milliseconds,
        "–" if result.mean_batch_size is None else f"{result.mean_batch_size:.1f}",
    ]


def _load(result: LoadResult) -> str:
    if result.num_clients is not None:
        return f"{result.num_clients} clients"
    return f"{result.offered_per_second:g} /s"


def _remarks(report: LoadReport, every: Sequence[LoadResult]) -> list[str]:
    """What a reader has to know before trusting the numbers."""
    found = []
    wrong = sum(result.num_wrong for result in every)
    if wrong:
        found.append(
            f"{wrong} answers differ from those to the same requests without load; the server "
            "mixes requests up, or its runtime's results depend on what is in a call."
        )
    late = [result for result in every if result.lag_ms > _LATE_MS]
    if late:
        worst = max(result.lag_ms for result in late)
        found.append(
            f"Requests were sent up to {worst:.0f} ms late ({', '.join(map(_load, late))}), which "
            "latencies include; send from a machine with more time."
        )
    if report.is_local:
        found.append(
            f"The server ran on this machine, of which sending took its share of "
            f"{os.cpu_count()} cores; measure from another one for absolute numbers."
        )
    return found
