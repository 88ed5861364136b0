"""`actionclip benchmark`: runtimes side by side, with parity beside every speed-up."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    RESULTS,
    BaseOption,
    CheckpointOption,
    DeviceOptions,
    JsonOption,
    MaxPixelsOption,
    OtherNumFramesOption,
    PlotOption,
    schema_option,
    use_device,
)
from actionclip_deploy.cli.output import (
    EXIT_PARITY,
    Terminal,
    check_suffix,
    find_videos,
    notes,
    print_json,
    print_warning,
    results,
    steps_are_shown,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verb import Verb
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.runtimes.machine import (
    check_memory,
    check_num_threads,
    num_available_cores,
)
from actionclip_deploy.video import MAX_PIXELS

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.candidates import RowSpec
    from actionclip_deploy.benchmarks.report import BenchmarkReport, ReportComparison

# As wide as its tables need: a number that is cut to the terminal's width is another number.
_wide_results = Terminal(width=200)

_ROWS, _TURNS = "Which rows", "How they are measured"


class BenchmarkCommand(Verb):
    """Says where `--url` has gone, before the options that went with it are called unknown."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        if any(word.partition("=")[0] == "--url" for word in args):
            raise usage_error("A server is put under load by `actionclip load URL`, not by --url.")
        return super().parse_args(ctx, args)


def _report_class() -> type[BenchmarkReport]:
    from actionclip_deploy.benchmarks.report import BenchmarkReport

    return BenchmarkReport


def benchmark(
    where: DeviceOptions,
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="BUNDLE", help="Folder that `actionclip export` wrote."),
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(
            "--runtimes",
            metavar="NAME,...",
            help="torch, onnxruntime, openvino, tensorrt, tensorrt-rtx; peers: torch-compile, "
            "onnxruntime-plain. By default onnxruntime, and torch if there is a checkpoint; not "
            "auto, since runtimes are what is compared.",
        ),
    ] = None,
    precisions: Annotated[
        str,
        typer.Option(
            "--precisions",
            metavar="NAME,...",
            help="By default the bundle's own; others are exported from --checkpoint for this run. "
            "bf16 is a row of openvino on the bundle that is not quantised.",
            rich_help_panel=_ROWS,
        ),
    ] = "",
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="BUNDLE",
            help="Another bundle to measure as well; repeatable.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="B,...", help="Clips in a call.")
    ] = "1,2,4,8,16,32",
    num_frames: OtherNumFramesOption = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            "--videos",
            metavar="DIR",
            exists=True,
            help="Measure the stages from files on, too.",
            rich_help_panel=_TURNS,
        ),
    ] = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    duration_seconds: Annotated[
        float,
        typer.Option(
            "--duration",
            metavar="SECONDS",
            help="Of measurement for each row and batch size.",
        ),
    ] = 10.0,
    num_rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            min=9,
            metavar="N",
            help="Rounds in which the rows take turns.",
            rich_help_panel=_TURNS,
        ),
    ] = 15,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Write the report."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE.html",
            help="Write one page that holds everything.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="A.json B.json",
            help="Say what changed between two reports.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    schema: Annotated[bool, schema_option(_report_class)] = False,  # noqa: ARG001 - it has a callback
) -> None:
    """Measure runtimes side by side: latency, throughput, memory, stages, and parity beside them.

    Each runtime lives in a process of its own, and they take turns in rounds. Where power can be
    read, each runs once more without turns, for the energy of a clip. The exit code is 4 if one of
    them disagrees with PyTorch.

    Example:
        actionclip benchmark bundle --batch 1,8 --output report.json
        actionclip benchmark --compare before.json after.json
    """
    if compare is not None:
        _print_comparison(*compare, as_json=as_json)
        return
    if bundle is None:
        raise usage_error("Give a BUNDLE to measure, or two reports to --compare.")
    from actionclip_deploy.benchmarks import RowSpec, run_benchmark

    writers = _writers(output, page, plot)
    wanted = _split(precisions)
    names = _split(runtimes or ("onnxruntime" if checkpoint is None else "torch,onnxruntime"))
    batch_sizes = _numbers(batch)
    files = find_videos([videos], recursive=True) if videos else []
    given = [Bundle.open(path) for path in (bundle, *(others or ()))]
    with wrong_arguments_are_usage_errors():
        check_num_threads("num_threads", where.num_threads)
        for opened in given:
            model = opened.manifest.model
            size = num_frames or model.num_frames
            check_memory("num_frames", size, model.frame_bytes)
            check_memory("batch", max(batch_sizes), size * model.frame_bytes)
    if where.device is not None and where.execution_provider is not None:
        raise usage_error("--device and --execution-provider were given; give one of them.")
    row = RowSpec(
        name="",
        runtime="",
        bundle=bundle,
        checkpoint=checkpoint,
        base=base,
        execution_provider=where.execution_provider or use_device(where.device) or "cpu",
        num_threads=where.num_threads or num_available_cores(),
        num_frames=num_frames or 0,
    )
    with (
        _bundles(given, [p for p in wanted if p != "bf16"], checkpoint, base) as bundles,
        wrong_arguments_are_usage_errors(),
    ):
        rows = [] if wanted == ["bf16"] else _rows(row, names, bundles)
        if "bf16" in wanted:
            rows += _bf16_rows(row, names, bundles)
        outcome = (
            "no report was written, so begin again, with fewer sizes of --batch or a shorter "
            "--duration."
        )
        with steps_are_shown("Starting", outcome) as on_step:
            report = run_benchmark(
                rows,
                batch_sizes=batch_sizes,
                duration_seconds=duration_seconds,
                num_rounds=num_rounds,
                videos=files,
                max_pixels=max_pixels,
                on_step=on_step,
            )
    for write in writers:
        write(report)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print_report(report)
    if not report.passed:
        raise typer.Exit(EXIT_PARITY)


def _writers(
    output: Path | None, page: Path | None, plot: Path | None
) -> list[Callable[[BenchmarkReport], None]]:
    """What writes the files that were asked for; what could not be written is found out now."""
    from actionclip_deploy.benchmarks.report import write_atomically, write_report

    check_suffix("--output", output, ".json")
    check_suffix("--html", page, ".html", ".htm")
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
    given: list[Bundle], precisions: Sequence[str], checkpoint: Path | None, base: Path | None
) -> Iterator[list[Bundle]]:
    """The bundles to measure: those given, and exported ones for precisions that none has."""
    if not precisions:
        yield given
        return
    own = {opened.manifest.precision() for opened in given}
    missing = [name for name in precisions if name not in own]
    if missing and checkpoint is None:
        raise usage_error(
            f"{given[0].path} is {', '.join(sorted(own))} and {', '.join(missing)} was asked for; "
            "give --checkpoint to export it for this run, or a bundle of that precision with "
            "--with."
        )
    with tempfile.TemporaryDirectory(prefix="actionclip-benchmark-") as folder:
        exported = [
            _export(given[0], name, checkpoint, base, Path(folder) / name)
            for name in missing
            if checkpoint is not None
        ]
        yield [each for each in given if each.manifest.precision() in precisions] + exported


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


def _rows(row: RowSpec, runtimes: Sequence[str], bundles: Sequence[Bundle]) -> list[RowSpec]:
    """A row of each runtime with each bundle; one alone where it runs the checkpoint.

    Args:
        row: What they share; 0 frames are those of the bundle's model.
        runtimes: Names of runtimes.
        bundles: Open ones.
    """
    from actionclip_deploy.benchmarks.candidates import FROM_CHECKPOINT, RUNTIMES

    rows: list[RowSpec] = []
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise usage_error(f"--runtimes has {runtime!r}; choose from {', '.join(RUNTIMES)}.")
        from_checkpoint = runtime in FROM_CHECKPOINT
        for opened in bundles[:1] if from_checkpoint else bundles:
            name = runtime if from_checkpoint else f"{runtime} {opened.manifest.precision()}"
            if any(each.name == name for each in rows):
                name = f"{name} {opened.path.name}"
            num_frames = row.num_frames or opened.manifest.model.num_frames
            rows.append(
                replace(row, name=name, runtime=runtime, bundle=opened.path, num_frames=num_frames)
            )
    return rows


def _bf16_rows(row: RowSpec, names: Sequence[str], bundles: Sequence[Bundle]) -> list[RowSpec]:
    """A row of openvino for each bundle that it can compute in bf16."""
    able = [each for each in bundles if each.manifest.quantization is None]
    if "openvino" not in names or not able:
        raise usage_error(
            "--precisions has bf16, which openvino computes a bundle in that is not quantised; "
            "give --runtimes openvino, and such a bundle."
        )
    rows = _rows(row, ["openvino"], able)
    return [
        replace(each, precision="bf16", name=" ".join(["openvino bf16", *each.name.split()[2:]]))
        for each in rows
    ]


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(text: str) -> list[int]:
    words = _split(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise usage_error(f"--batch is {text!r}; give numbers of 1 or more, as in 1,8,32.")
    return [int(word) for word in words]


def _print_report(report: BenchmarkReport) -> None:
    """Print the context, the tables in brief, and what is wrong with the numbers."""
    from actionclip_deploy.benchmarks.show import context, remarks, tables

    facts = Table(show_header=False, box=None)
    for name, value in context(report):
        facts.add_row(f"[bold]{name}[/]", escape(value))
    results.print(facts)
    for words in tables(report, brief=True):
        table = _table(words.title, words.headings)
        for row in words.rows:
            table.add_row(*(escape(cell) for cell in row))
        _wide_results.print(table)
    for remark in remarks(report):
        print_warning(remark)


def _print_comparison(first: Path, second: Path, *, as_json: bool) -> None:
    """Print what changed from the first report to the second."""
    from actionclip_deploy.benchmarks import compare_reports, read_report

    comparison = compare_reports(read_report(first), read_report(second))
    if not as_json:
        _print_changes(comparison)
        return
    changes = [
        {**vars(change), "speedup": change.speedup.model_dump()} for change in comparison.changes
    ]
    rest = {name: values for name, values in asdict(comparison).items() if name != "changes"}
    print_json(json.loads(json.dumps({"changes": changes, **rest})))


def _print_changes(comparison: ReportComparison) -> None:
    colours = {"faster": "green", "slower": "red"}
    headings = ("row", "batch", "before ms", "after ms", "times as fast", "")
    table = _table("From the first report to the second", headings)
    table.columns[-1].justify = "left"
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


def _table(title: str, headings: Sequence[str]) -> Table:
    """Without rows; the first column is text and the others are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table
