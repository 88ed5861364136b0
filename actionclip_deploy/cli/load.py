"""`actionclip benchmark --url`: a server under load."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from urllib.parse import urlsplit

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from actionclip_deploy.cli.classify import given_labels, only_bank, read_api_key
from actionclip_deploy.cli.output import (
    find_videos,
    notes,
    print_json,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.client import Client

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.load import (
        LoadPlan,
        LoadReport,
        LoadRequest,
        LoadResult,
        Measured,
    )


# What `actionclip benchmark --url` prints.


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


_PANEL = "A server under load"
_LOCAL = ("127.0.0.1", "::1", "localhost")
_NUM_RENDERED = 4  # videos, where none is given

UrlOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--url", help="Put this server under load, instead of a BUNDLE.", rich_help_panel=_PANEL
    ),
]
ModeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--mode",
        help="What is sent: video files, frames (no decoding), tensors to /v2, or embeddings.",
        rich_help_panel=_PANEL,
    ),
]
VideoOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--video",
        metavar="FILE",
        help="A video to send, or a folder; repeatable. By default some are rendered.",
        rich_help_panel=_PANEL,
    ),
]
LabelsOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="NAME|FILE",
        help="A label bank of the server, or a file of labels that each request brings along.",
        rich_help_panel=_PANEL,
    ),
]
RatesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--rates",
        metavar="R,...",
        help="Requests per second; by default doubling from 1 until fewer than 9 of 10 are "
        "answered within --slo-ms.",
        rich_help_panel=_PANEL,
    ),
]
ClientsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--clients",
        min=1,
        help="Measure the highest throughput, by clients that send without a pause.",
        rich_help_panel=_PANEL,
    ),
]
SloOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--slo-ms", min=0.1, help="Within which an answer is of use.", rich_help_panel=_PANEL
    ),
]
ConnectionsOption: TypeAlias = Annotated[
    int,
    typer.Option("--connections", min=1, help="Requests at a time.", rich_help_panel=_PANEL),
]
TimeoutOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.1, help="Seconds until one is given up.", rich_help_panel=_PANEL
    ),
]
SeedOption: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, help="Of the arrivals.", rich_help_panel=_PANEL)
]
KeyFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="The server's key; otherwise the environment's ACTIONCLIP_API_KEY.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class LoadOptions:
    """What `actionclip benchmark --url` was given."""

    url: str
    mode: str
    videos: Sequence[Path]
    labels: str | None
    rates: str | None
    clients: int | None
    slo_ms: float
    connections: int
    timeout: float
    seed: int
    api_key_file: Path | None
    duration: float
    output: Path | None
    plot: Path | None
    as_json: bool


def benchmark_load(options: LoadOptions) -> None:
    """Put a server under load, and print, write and draw what came of it."""
    from actionclip_deploy.benchmarks.load import MODES

    if options.mode not in MODES:
        raise usage_error(f"--mode is {options.mode!r}; choose from {', '.join(MODES)}.")
    writers = _writers(options.output, options.plot)
    plan = _plan(options)
    report = _measure(options, plan)
    for write in writers:
        write(report)
    if options.as_json:
        print_json(report.model_dump(mode="json"))
    else:
        print_load_report(report)


def report_class() -> type[LoadReport]:
    """What a report is, for its schema."""
    from actionclip_deploy.benchmarks.load import LoadReport

    return LoadReport


def _writers(output: Path | None, plot: Path | None) -> list[Callable[[LoadReport], None]]:
    """What writes the files that were asked for; what could not be written is found out now."""
    from actionclip_deploy.benchmarks.load import write_load_report

    writers: list[Callable[[LoadReport], None]] = []
    if output is not None:
        if output.is_dir() or not output.parent.is_dir():
            raise usage_error(f"--output is {output}; give a file in a folder that exists.")
        writers.append(lambda report: write_load_report(report, output))
    if plot is not None:
        from actionclip_deploy.benchmarks.charts import draw_load
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
        writers.append(lambda report: draw_load(report, plot))
    return writers


def _plan(options: LoadOptions) -> LoadPlan:
    from actionclip_deploy.benchmarks.load import LoadPlan

    words = [word.strip() for word in (options.rates or "").split(",") if word.strip()]
    with wrong_arguments_are_usage_errors():
        try:
            rates = tuple(map(float, words))
        except ValueError:
            raise usage_error(
                f"--rates is {options.rates!r}; give numbers, as in 5,10,20."
            ) from None
        return LoadPlan(rates, options.clients, options.duration, options.slo_ms, options.seed)


def _measure(options: LoadOptions, plan: LoadPlan) -> LoadReport:
    labels = given_labels(options.labels, None)
    with wrong_arguments_are_usage_errors():
        key = read_api_key(options.api_key_file)
        client = Client(options.url, api_key=key, timeout_seconds=options.timeout)
    with client, notes.status("Preparing") as status:
        info = client.info()
        if labels is None:
            labels = "none" if options.mode == "tensors" else only_bank(client)
        requests = _requests(options, info, labels)
        measured = asyncio.run(_send_all(options, plan, requests, key, status.update))
    return _report(options, info, labels, requests, measured)


def _requests(
    options: LoadOptions, info: dict[str, Any], labels: str | Sequence[str]
) -> list[LoadRequest]:
    from actionclip_deploy.benchmarks.load import MODES, make_requests

    (mode,) = (each for each in MODES if each == options.mode)
    with ExitStack() as stack:
        videos = find_videos(options.videos, recursive=True)
        if mode == "video" and not videos:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="actionclip-load-"))
            videos = _rendered_videos(Path(folder))
        return make_requests(mode, info, labels=labels, videos=videos, seed=options.seed)


def _rendered_videos(folder: Path) -> list[Path]:
    from actionclip_deploy import motions

    every = motions.labels("test")
    chosen = every[:: len(every) // _NUM_RENDERED][:_NUM_RENDERED]
    return [
        motions.write_video(folder / f"{seed}.mp4", motions.render_clip(label, seed=seed))
        for seed, label in enumerate(chosen)
    ]


async def _send_all(
    options: LoadOptions,
    plan: LoadPlan,
    requests: Sequence[LoadRequest],
    key: str | None,
    on_step: Callable[[str], None],
) -> Measured:
    from actionclip_deploy.benchmarks.load import Sender, measure_load

    async with Sender(
        options.url,
        requests,
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        connections=options.connections,
        timeout_seconds=options.timeout,
    ) as sender:
        await sender.learn_answers()
        return await measure_load(sender.send, plan, on_step=on_step)


def _report(
    options: LoadOptions,
    info: dict[str, Any],
    labels: str | Sequence[str],
    requests: Sequence[LoadRequest],
    measured: Measured,
) -> LoadReport:
    from actionclip_deploy.benchmarks.load import LoadReport, LoadSettings
    from actionclip_deploy.benchmarks.runner import describe_surroundings, toolkit_commit
    from actionclip_deploy.runtimes.machine import installed_versions

    return LoadReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=toolkit_commit(),
        url=options.url,
        is_local=urlsplit(options.url).hostname in _LOCAL,
        server=info,
        settings=LoadSettings(
            mode=options.mode,  # type: ignore[arg-type]
            labels=labels if isinstance(labels, str) else f"{len(labels)} labels",
            num_bodies=len(requests),
            mean_body_bytes=sum(len(each.body) for each in requests) / len(requests),
            duration_seconds=options.duration,
            slo_ms=options.slo_ms,
            timeout_seconds=options.timeout,
            connections=options.connections,
            seed=options.seed,
        ),
        machine=describe_surroundings()["machine"],
        versions=installed_versions(),
        open_loop=measured.open_loop,
        closed_loop=measured.closed_loop,
        stopped_because=measured.stopped_because,
    )
