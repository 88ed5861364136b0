"""`actionclip verify`: proof that a runtime on this device computes what PyTorch computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.output import (
    BaseOption,
    BundlePath,
    CheckpointOption,
    JsonOption,
    ProviderOption,
    RuntimeOption,
    ThreadsOption,
    notes,
    print_json,
    results,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.runtimes import open_runtime

if TYPE_CHECKING:
    from actionclip_deploy.runtimes.parity import ParityReport


def verify(
    bundle: BundlePath,
    runtime: RuntimeOption = "onnxruntime",
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a runtime with the bundle's golden outputs, at every graph and end to end.

    The sha256 of every file is checked first, but those of label banks, which are checked
    whenever one is used. The exit code is 4 if the runtime disagrees.
    """
    from actionclip_deploy.runtimes.parity import verify_bundle

    opened = Bundle.open(bundle, check_hashes=True)
    with wrong_arguments_are_usage_errors():
        running = open_runtime(
            opened,
            runtime,
            execution_provider=execution_provider,
            num_threads=threads,
            checkpoint=checkpoint,
            base=base,
        )
    with running, notes.status("Comparing with the golden outputs"):
        report = verify_bundle(opened, running)
    if as_json:
        print_json(report.to_dict())
    else:
        info = report.runtime
        title = f"{info.name} ({info.execution_provider}, {info.precision}) against PyTorch"
        results.print(report_table(report, title=title))
    report.check()
    if not as_json:
        results.print(f"{bundle} is verified on this machine.", highlight=False)


def report_table(report: ParityReport, *, title: str) -> Table:
    """The measurements as a table, one row per graph and batch size."""
    table = Table(title=title, title_justify="left")
    headings = ("what", "batch", "max abs difference", "min cosine", "top-1", "top-5", "margin", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("what", "") else "right")
    for row in report.comparisons:
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
