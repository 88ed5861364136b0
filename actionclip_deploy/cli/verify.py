"""`actionclip verify`: proof that a runtime on this device computes what PyTorch computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.build import engine_runtime
from actionclip_deploy.cli.options import (
    RUNNING,
    BundlePath,
    JsonOption,
    RunOptions,
    use_device,
)
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    results,
    steps_are_shown,
    usage_error,
)
from actionclip_deploy.command_records import EngineParityRecord

if TYPE_CHECKING:
    from actionclip_deploy.runtimes.base import Audit
    from actionclip_deploy.runtimes.parity import Comparison, ParityReport
    from actionclip_deploy.runtimes.trt.faults import Fault


_NOT_VERIFIED = (
    "nothing is known of this machine yet, and the bundle is as it was; repeat the command."
)


@dataclass(frozen=True)
class _VerifyOptions(RunOptions):
    """As elsewhere, but for the default."""

    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="What is to be proven: onnxruntime, openvino, tensorrt, tensorrt-rtx or torch. "
            "Not auto, which takes by itself what agrees.",
        ),
    ] = "onnxruntime"


def verify(
    bundle: BundlePath,
    running: _VerifyOptions,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="For tensorrt and tensorrt-rtx: if the engines disagree, find the first part of "
            "the graph that is wrong.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every comparison, not a line for each graph.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare a runtime with the bundle's golden outputs, at every graph and end to end.

    The sha256 of every file is checked first, except those of label banks, which are checked
    whenever one is used. TensorRT's engines are compared at the batch sizes of their profiles. What
    engines and OpenVINO compute in is audited. The exit code is 4 if the runtime disagrees.

    Example:
        actionclip verify bundle
        actionclip verify bundle --device cuda
    """
    from actionclip_deploy.runtimes.parity import verify_bundle
    from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES

    runtime = running.runtime
    if runtime == "auto":
        raise usage_error(
            "--runtime is auto, which takes what agrees and would prove nothing; name what is to "
            "be proven."
        )
    if bisect and runtime not in ENGINE_RUNTIMES:
        raise usage_error(
            f"--bisect is for engines and --runtime is {runtime!r}; leave it out, or choose "
            f"{' or '.join(ENGINE_RUNTIMES)}."
        )
    if runtime in ENGINE_RUNTIMES:
        if use_device(running.device) not in (None, "cuda"):
            raise usage_error(
                f"--device is {running.device} and {runtime} runs on NVIDIA's GPUs; leave it out."
            )
        if running.precision is not None:
            raise usage_error(
                f"--precision is openvino's and --runtime is {runtime}, whose engines compute as "
                "they were built; leave it out."
            )
    with steps_are_shown(f"Checking the files of {bundle}", _NOT_VERIFIED) as on_step:
        opened = Bundle.open(bundle, check_hashes=True)
        if runtime not in ENGINE_RUNTIMES:
            on_step(f"Opening {runtime}")
            with running.open(opened) as opened_runtime:
                report = verify_bundle(opened, opened_runtime, on_step=on_step)
    if runtime in ENGINE_RUNTIMES:
        _verify_engines(
            opened, engine_runtime(runtime), bisect=bisect, verbose=verbose, as_json=as_json
        )
        return
    if as_json:
        print_json(report.record())
    else:
        info = report.runtime
        title = f"{info.title} against PyTorch"
        print_report(report, title=title, verbose=verbose)
        for graph, audit in report.audits.items():
            results.print(f"{graph} is computed in {in_shares(audit)}.", highlight=False)
    report.check()
    if not as_json:
        results.print(f"{bundle} is verified on this machine.", highlight=False)


def _verify_engines(
    bundle: Bundle, name: Any, *, bisect: bool, verbose: bool, as_json: bool
) -> None:
    from actionclip_deploy.runtimes.trt.runtime import verify_newest

    findings = []
    with steps_are_shown("Comparing the engines with the golden outputs", _NOT_VERIFIED) as on_step:
        examined = verify_newest(bundle, name)
        wrong = [c for c in examined.report.comparisons if not c.passed]
        if bisect and wrong:
            from actionclip_deploy.runtimes.trt.faults import find_faults

            on_step("Looking for the part that is wrong")
            findings = find_faults(bundle, examined)
    if as_json:
        record = EngineParityRecord(
            **dict(examined.report.record()),
            engine=examined.entry.name,
            audit={graph: found.record() for graph, found in examined.audits.items()},
            faults=tuple(fault.record() for fault in findings),
        )
        print_json(record)
    else:
        title = f"{examined.entry.name} ({name}) against PyTorch"
        print_report(examined.report, title=title, verbose=verbose)
        for fault in findings:
            results.print(_fault_table(fault))
            results.print(fault.in_words(), highlight=False, markup=False)
    if bisect and not wrong:
        notes.print("The engines agree, so there is no wrong part to find.", highlight=False)
    examined.check()
    if not as_json:
        results.print(f"{bundle.path} is verified on this device.", highlight=False, markup=False)


def _fault_table(fault: Fault) -> Table:
    """The parts that were looked at, to the first bad one."""
    table = Table(title=f"{fault.graph}, part by part", title_justify="left")
    for heading in ("part", "relative difference", "min cosine", ""):
        table.add_column(heading, justify="left" if heading in ("part", "") else "right")
    alone = [(c.what, c) for c in fault.finding.parts]
    grown = [(f"the beginning to {c.what}", c) for c in fault.finding.heads]
    for name, row in (*alone, *grown):
        mark = "[green]agrees[/]" if row.passed else "[red]differs[/]"
        table.add_row(name, f"{row.max_abs_difference:.1e}", f"{row.min_cosine:.7f}", mark)
    return table


def print_report(report: ParityReport, *, title: str, verbose: bool = False) -> None:
    """Print what was measured: a line for each graph, and each comparison that failed, or all."""
    if not verbose:
        results.print(_summary_table(report, title=title))
    rows = [row for row in report.comparisons if verbose or not row.passed]
    if rows:
        title = title if verbose else "What differs"
        results.print(_comparison_table(rows, title=title))


def in_shares(audit: Audit) -> str:
    """The precisions of some arithmetic in words, the largest share first."""
    shares = sorted(audit.computed().items(), key=lambda share: -share[1])
    words = [f"{kind} for {share:.1%}" if share < 1 else kind for kind, share in shares]
    if audit.unknown_share():
        words.append(f"what is not told for {audit.unknown_share():.1%}")
    return ", ".join(words)


def _summary_table(report: ParityReport, *, title: str) -> Table:
    """The worst that was measured at each graph, and of the scores in the end."""
    table = Table(title=title, title_justify="left")
    for heading in ("graph", "calls", "rows", "max abs difference", "min cosine", ""):
        table.add_column(heading, justify="left" if heading in ("graph", "") else "right")
    graphs: dict[str, list[Comparison]] = {}
    for row in report.comparisons:
        graphs.setdefault(row.what.partition(",")[0], []).append(row)
    for graph, rows in graphs.items():
        num_wrong = sum(not row.passed for row in rows)
        sizes = sorted({row.batch_size for row in rows})
        table.add_row(
            graph if graph != "scores" else "all, to scores",
            str(len(rows)),
            f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0]),
            _worst(max, [row.max_abs_difference for row in rows], ".1e"),
            _worst(min, [row.min_cosine for row in rows], ".7f"),
            f"[red]{num_wrong} differ[/]" if num_wrong else "[green]agrees[/]",
        )
    return table


def _worst(choose: Callable[[list[float]], float], values: list[float], form: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{choose(finite):{form}}" if len(finite) == len(values) else "none"


def _comparison_table(rows: Sequence[Comparison], *, title: str) -> Table:
    """The measurements as a table, one row per graph and batch size."""
    table = Table(title=title, title_justify="left")
    table.add_column("what", min_width=10, overflow="fold")  # the longest word there is
    for heading in ("batch", "max abs difference", "min cosine", "top-1", "top-5", "margin", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row.what,
            str(row.batch_size),
            f"{row.max_abs_difference:.1e}",
            f"{row.min_cosine:.7f}",
            *("" if v is None else f"{v:.0%}" for v in (row.top1_agreement, row.top5_agreement)),
            "" if row.margin is None else f"{row.margin:.3f}",
            "[green]agrees[/]" if row.passed else "[red]differs[/]",
        )
    return table
