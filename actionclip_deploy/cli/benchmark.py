"""`actionclip benchmark`: runtimes side by side, with parity beside every speed-up."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import load
from actionclip_deploy.cli.output import (
    EXIT_PARITY,
    BaseOption,
    CheckpointOption,
    JsonOption,
    ProviderOption,
    ThreadsOption,
    find_videos,
    given_options,
    notes,
    print_json,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.runtimes.machine import num_available_cores

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.candidates import RowSpec
    from actionclip_deploy.benchmarks.report import BenchmarkReport, Comparison
    from actionclip_deploy.benchmarks.show import WordTable


# What `actionclip benchmark` prints: a report's tables, or two reports beside each other.


# As wide as its tables need: a number that is cut to the terminal's width is another number.
_wide_results = Console(width=200)


def print_report(report: BenchmarkReport) -> None:
    """Print the context, the tables in brief, and what is wrong with the numbers."""
    from actionclip_deploy.benchmarks.show import context, remarks, tables

    facts = Table(show_header=False, box=None)
    for name, value in context(report):
        facts.add_row(f"[bold]{name}[/]", escape(value))
    results.print(facts)
    for words in tables(report, brief=True):
        _wide_results.print(_rich_table(words))
    for remark in remarks(report):
        print_warning(remark)


def _rich_table(words: WordTable) -> Table:
    table = Table(title=words.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(words.headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in words.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def print_comparison(first: Path, second: Path, *, as_json: bool) -> None:
    """Print what changed from the first report to the second."""
    from dataclasses import asdict

    from actionclip_deploy.benchmarks import compare_reports, read_report

    comparison = compare_reports(read_report(first), read_report(second))
    if as_json:
        changes = [
            {**vars(change), "speedup": change.speedup.model_dump()}
            for change in comparison.changes
        ]
        rest = {k: list(v) for k, v in asdict(comparison).items() if k != "changes"}
        print_json(json.loads(json.dumps({"changes": changes, **rest})))
        return
    _print_changes(comparison)


def _print_changes(comparison: Comparison) -> None:
    colours = {"faster": "green", "slower": "red"}
    title = "From the first report to the second"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("row", "batch", "before ms", "after ms", "times as fast", ""):
        justify: Literal["left", "right"] = "left" if heading in ("row", "") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for change in comparison.changes:
        ratio = change.speedup
        colour = colours.get(change.verdict, "dim")
        table.add_row(
            escape(change.row),
            str(change.batch_size),
            f"{change.before_ms:.2f}",
            f"{change.after_ms:.2f}",
            f"{ratio.value:.3f} {escape(f'[{ratio.low:.3f}, {ratio.high:.3f}]')}",
            f"[{colour}]{escape(change.verdict)}[/]",
        )
    _wide_results.print(table)
    for what, names in (("first", comparison.only_before), ("second", comparison.only_after)):
        if names:
            results.print(f"Only in the {what}: {', '.join(names)}.", highlight=False, markup=False)
    for difference in comparison.differences:
        results.print(f"differs: {difference}", highlight=False, markup=False)


_OF_A_SERVER = {
    *("url", "mode", "video", "labels", "rates", "clients", "slo_ms", "connections"),
    *("timeout", "seed", "api_key_file"),
}
_OF_BOTH = {"--duration", "--output", "--plot", "--json"}


def benchmark(
    context: typer.Context,
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="BUNDLE", help="Folder that `actionclip export` wrote."),
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(
            "--runtimes",
            metavar="NAME,...",
            help="torch, onnxruntime, tensorrt, tensorrt-rtx; peers: torch-compile, "
            "onnxruntime-plain, openvino. By default onnxruntime, and torch if there is a "
            "checkpoint.",
        ),
    ] = None,
    precisions: Annotated[
        str | None,
        typer.Option(
            "--precisions",
            metavar="NAME,...",
            help="By default the bundle's own; others are exported from --checkpoint for this run.",
        ),
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", metavar="BUNDLE", help="Another bundle to measure beside it; repeatable."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="B,...", help="Clips in a call.")
    ] = "1,2,4,8,16,32",
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="T; by default the model's own.")
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            "--videos",
            metavar="DIR",
            exists=True,
            help="Measure the stages from files on, too.",
        ),
    ] = None,
    duration: Annotated[
        float,
        typer.Option("--duration", help="Seconds of measurement for each row and batch size."),
    ] = 10.0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=9, help="Rounds in which the rows take turns.")
    ] = 15,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Write the report.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE.html", help="Write one page that holds everything."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the charts.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare", metavar="A.json B.json", help="Say what changed between two reports."
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of a report."),
    ] = False,
    as_json: JsonOption = False,
    url: load.UrlOption = None,
    mode: load.ModeOption = "video",
    video: load.VideoOption = None,
    labels: load.LabelsOption = None,
    rates: load.RatesOption = None,
    clients: load.ClientsOption = None,
    slo_ms: load.SloOption = 1000.0,
    connections: load.ConnectionsOption = 512,
    timeout: load.TimeoutOption = 30.0,
    seed: load.SeedOption = 0,
    api_key_file: load.KeyFileOption = None,
) -> None:
    """Measure runtimes side by side: latency, throughput, memory, stages, and parity beside them.

    Each runtime lives in a process of its own, and they take turns in rounds. Where power can be
    read, each runs once more without turns, for the energy of a clip. The exit code is 4 if one of
    them disagrees with PyTorch. With --url, a server is measured instead: goodput and latency at
    growing rates of requests, which do not wait for each other.
    """
    if schema:
        report_class = _report_class() if url is None else load.report_class()
        print_json(report_class.model_json_schema())
        return
    if compare is not None:
        print_comparison(*compare, as_json=as_json)
        return
    _refuse_options_of_the_other(context, of_a_server=url is not None)
    if url is not None:
        load.benchmark_load(
            load.LoadOptions(
                url=url,
                mode=mode,
                videos=video or (),
                labels=labels,
                rates=rates,
                clients=clients,
                slo_ms=slo_ms,
                connections=connections,
                timeout=timeout,
                seed=seed,
                api_key_file=api_key_file,
                duration=duration,
                output=output,
                plot=plot,
                as_json=as_json,
            )
        )
        return
    if bundle is None:
        raise usage_error("Give a BUNDLE to measure, --url of a server, or reports to --compare.")
    writers = _writers(output, page, plot)
    names = _names(runtimes or ("onnxruntime" if checkpoint is None else "torch,onnxruntime"))
    wanted = _names(precisions) if precisions else []
    batch_sizes = _numbers(batch)
    files = find_videos([videos], recursive=True) if videos else []
    num_threads = threads or num_available_cores()
    with _bundles(bundle, others or (), wanted, checkpoint, base) as bundles:
        specs = _specs(names, bundles, checkpoint, base, execution_provider, num_threads, frames)
        report = _measure(specs, batch_sizes, duration, rounds, files)
    for write in writers:
        write(report)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(EXIT_PARITY)


def _refuse_options_of_the_other(context: typer.Context, *, of_a_server: bool) -> None:
    """Refuse options that are given and are about a server where none is, or the other way."""
    given = given_options(context).items()
    wrong = [word for name, word in given if (name in _OF_A_SERVER) != of_a_server]
    names = ", ".join(word for word in wrong if word not in _OF_BOTH)
    if names:
        raise usage_error(
            f"--url measures a server, which {names} is not about; leave one out."
            if of_a_server
            else f"{names} is about a server; give its address with --url."
        )


def _report_class() -> type[BenchmarkReport]:
    from actionclip_deploy.benchmarks.report import BenchmarkReport

    return BenchmarkReport


def _measure(
    specs: Sequence[RowSpec],
    batch_sizes: Sequence[int],
    duration: float,
    rounds: int,
    files: Sequence[Path],
) -> BenchmarkReport:
    from actionclip_deploy.benchmarks import run_benchmark

    with wrong_arguments_are_usage_errors(), notes.status("Starting") as status:
        return run_benchmark(
            specs,
            batch_sizes=batch_sizes,
            duration_seconds=duration,
            num_rounds=rounds,
            videos=files,
            on_step=status.update,
        )


def _writers(
    output: Path | None, page: Path | None, plot: Path | None
) -> list[Callable[[BenchmarkReport], None]]:
    """What writes the files that were asked for; what could not be written is found out now."""
    from actionclip_deploy.benchmarks.report import write_atomically, write_report

    writers: list[Callable[[BenchmarkReport], None]] = []
    for option, path in (("--output", output), ("--html", page)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise usage_error(f"{option} is {path}; give a file in a folder that exists.")
    if output is not None:
        writers.append(lambda report: write_report(report, output))
    if page is not None:
        from actionclip_deploy.benchmarks.show import render_page

        writers.append(lambda report: write_atomically(page, render_page(report)))
    if plot is not None:
        from actionclip_deploy.benchmarks.charts import draw_report
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
        writers.append(lambda report: draw_report(report, plot))
    return writers


@contextmanager
def _bundles(
    bundle: Path,
    others: Sequence[Path],
    precisions: Sequence[str],
    checkpoint: Path | None,
    base: Path | None,
) -> Iterator[list[Bundle]]:
    """The bundles to measure: those given, and exported ones for precisions that none has."""
    given = [Bundle.open(path) for path in (bundle, *others)]
    if not precisions:
        yield given
        return
    own = {opened.manifest.precision() for opened in given}
    chosen = [opened for opened in given if opened.manifest.precision() in precisions]
    missing = [name for name in precisions if name not in own]
    if missing and checkpoint is None:
        raise usage_error(
            f"{bundle} is {', '.join(sorted(own))} and {', '.join(missing)} was asked for; give "
            "--checkpoint to export it for this run, or a bundle of that precision with --with."
        )
    with tempfile.TemporaryDirectory(prefix="actionclip-benchmark-") as folder:
        for precision in missing:
            assert checkpoint is not None
            made = _export(given[0], precision, checkpoint, base, Path(folder) / precision)
            chosen.append(made)
        yield chosen


def _export(
    bundle: Bundle, precision: str, checkpoint: Path, base: Path | None, output: Path
) -> Bundle:
    try:
        from actionclip_deploy.export import export_checkpoint
    except ImportError as exc:
        raise MissingExtraError("Exporting another precision", "export") from exc

    source, model = bundle.manifest.source, bundle.manifest.model
    with wrong_arguments_are_usage_errors(), notes.status(f"Exporting {precision}"):
        result = export_checkpoint(
            checkpoint,
            output,
            family=source.family,
            num_frames=model.num_frames,
            precision=precision,
            base=base,
            visual_prompt=model.visual_prompt,
            templates=bundle.manifest.templates,
        )
    return result.bundle


def _specs(
    runtimes: Sequence[str],
    bundles: Sequence[Bundle],
    checkpoint: Path | None,
    base: Path | None,
    execution_provider: str,
    num_threads: int,
    frames: int | None,
) -> list[RowSpec]:
    from actionclip_deploy.benchmarks.candidates import FROM_CHECKPOINT, RUNTIMES, RowSpec

    for name in runtimes:
        if name not in RUNTIMES:
            raise usage_error(f"--runtimes has {name!r}; choose from {', '.join(RUNTIMES)}.")
    specs: list[RowSpec] = []
    for runtime in runtimes:
        from_checkpoint = runtime in FROM_CHECKPOINT
        for opened in bundles[:1] if from_checkpoint else bundles:
            name = runtime if from_checkpoint else f"{runtime} {opened.manifest.precision()}"
            if any(spec.name == name for spec in specs):
                name = f"{name} {opened.path.name}"
            specs.append(
                RowSpec(
                    name=name,
                    runtime=runtime,
                    bundle=opened.path,
                    checkpoint=checkpoint,
                    base=base,
                    execution_provider=execution_provider,
                    num_threads=num_threads,
                    num_frames=frames or opened.manifest.model.num_frames,
                )
            )
    return specs


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(text: str) -> list[int]:
    words = _names(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise usage_error(f"--batch is {text!r}; give numbers of 1 or more, as in 1,8,32.")
    return [int(word) for word in words]
