"""`actionclip load`: a server under load, by requests that do not wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actionclip_deploy.cli.classify import labels_of_server, read_api_key
from actionclip_deploy.cli.options import (
    ApiKeysOption,
    JsonOption,
    LabelOptions,
    PlotOption,
    schema_option,
)
from actionclip_deploy.cli.output import (
    Terminal,
    check_suffix,
    find_videos,
    print_json,
    print_warning,
    results,
    steps_are_shown,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.client import Client

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.load import LoadReport, LoadResult

# Above, the generator was busy itself, and latencies are its own in part.
_LATE_MS = 20.0
# As wide as its table needs: a number that is cut to the terminal's width is another number.
_wide_results = Terminal(width=160)


def _report_class() -> type[LoadReport]:
    from actionclip_deploy.benchmarks.load import LoadReport

    return LoadReport


_SENT = "What is sent, and how fast"


def load(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000.")
    ],
    labels: LabelOptions,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="NAME",
            help="What is sent: video (files), frames (no decoding), tensors to /v2, or "
            "embeddings.",
        ),
    ] = "video",
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="A video to send, or a folder; repeatable. By default some are rendered.",
            rich_help_panel=_SENT,
        ),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            "--rates",
            metavar="R,...",
            help="Requests per second; by default doubling from 1 until fewer than 9 of 10 are "
            "answered within --slo-ms.",
            rich_help_panel=_SENT,
        ),
    ] = "",
    num_clients: Annotated[
        int | None,
        typer.Option(
            "--clients",
            min=1,
            max=10_000,
            metavar="N",
            help="Measure the highest throughput, by clients that send without a pause.",
            rich_help_panel=_SENT,
        ),
    ] = None,
    slo_ms: Annotated[
        float,
        typer.Option(
            "--slo-ms",
            min=0.1,
            metavar="MS",
            help="Within which an answer is of use.",
            rich_help_panel=_SENT,
        ),
    ] = 1000.0,
    duration_seconds: Annotated[
        float,
        typer.Option("--duration", metavar="SECONDS", help="Of measurement at each rate."),
    ] = 10.0,
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            min=1,
            max=10_000,
            metavar="N",
            help="Requests at a time.",
            rich_help_panel=_SENT,
        ),
    ] = 512,
    timeout_seconds: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            metavar="SECONDS",
            help="Until a request is given up.",
            rich_help_panel=_SENT,
        ),
    ] = 30.0,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, metavar="N", help="Of the arrivals.", rich_help_panel=_SENT),
    ] = 0,
    api_keys: ApiKeysOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Write the report."),
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    schema: Annotated[bool, schema_option(_report_class)] = False,  # noqa: ARG001 - it has a callback
) -> None:
    """Put a server under load: goodput and latency at growing rates of requests.

    Requests arrive whether the server keeps up or not, and latency counts from the moment at which
    one was due. Every answer is compared with the one that the same request got alone.

    Example:
        actionclip load http://127.0.0.1:8000 --labels mine --rates 5,10,20
    """
    from actionclip_deploy.benchmarks.load import MODES, LoadPlan, run_load

    chosen = next((each for each in MODES if each == mode), None)
    if chosen is None:
        raise usage_error(f"--mode is {mode!r}; choose from {', '.join(MODES)}.")
    writers = _writers(output, plot)
    videos = find_videos(video or (), recursive=True)
    labels.check()
    templates = labels.sentences()
    with wrong_arguments_are_usage_errors():
        plan = LoadPlan(_rates(rates), num_clients, duration_seconds, slo_ms, seed)
        key = read_api_key(api_keys)
        client = Client(url, api_key=key, timeout_seconds=timeout_seconds)
    outcome = "no report was written, so begin again, with fewer --rates or a shorter --duration."
    with client, steps_are_shown("Preparing", outcome) as on_step:
        info = client.info()
        report = run_load(
            url,
            info,
            plan,
            labels="none" if mode == "tensors" else labels_of_server(client, labels),
            templates=templates,
            allow_unknown_words=labels.allow_unknown_words,
            mode=chosen,
            videos=videos,
            api_key=key,
            connections=connections,
            timeout_seconds=timeout_seconds,
            on_step=on_step,
        )
    for write in writers:
        write(report)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print_report(report)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise usage_error(f"--rates is {text!r}; give numbers, as in 5,10,20.") from None


def _writers(output: Path | None, plot: Path | None) -> list[Callable[[LoadReport], None]]:
    """What writes the files that were asked for; what could not be written is found out now."""
    from actionclip_deploy.benchmarks import write_report

    writers: list[Callable[[LoadReport], None]] = []
    check_suffix("--output", output, ".json")
    if output is not None:
        if output.is_dir() or not output.parent.is_dir():
            raise usage_error(f"--output is {output}; give a file in a folder that exists.")
        writers.append(lambda report: write_report(report, output))
    if plot is not None:
        from actionclip_deploy.benchmarks.charts import draw_load
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
        writers.append(lambda report: draw_load(report, plot))
    return writers


def _print_report(report: LoadReport) -> None:
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
            results.print(f"{_load_words(result)}: {told}", highlight=False, markup=False)
    if report.stopped_because:
        results.print(f"Stopped: {report.stopped_because}.", highlight=False, markup=False)
    for remark in _remarks(report, every):
        print_warning(remark)


def _cells(result: LoadResult) -> list[str]:
    latency = result.latency_ms
    found = (latency.p50, latency.p90, latency.p95, latency.p99, latency.maximum) if latency else ()
    milliseconds = ["–" if ms is None else f"{ms:.1f}" for ms in found] or ["–"] * 5
    return [
        _load_words(result),
        str(result.num_sent),
        str(result.num_answered),
        f"{result.answered_per_second:.2f}",
        f"{result.goodput_per_second:.2f}",
        f"{result.error_rate:.1%}",
        *milliseconds,
        "–" if result.mean_batch_size is None else f"{result.mean_batch_size:.1f}",
    ]


def _load_words(result: LoadResult) -> str:
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
            f"Requests were sent up to {worst:.0f} ms late ({', '.join(map(_load_words, late))}), "
            "which latencies include; send from a machine that is less busy."
        )
    if report.is_local:
        found.append(
            f"The server ran on this machine, and sending took its share of the "
            f"{os.cpu_count()} cores; measure from another one for absolute numbers."
        )
    return found
