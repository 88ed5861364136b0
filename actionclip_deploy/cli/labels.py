"""`actionclip labels`: build, list, compare and calibrate label banks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import BANK_RECORD_NAME, Bundle, check_replaceable
from actionclip_deploy.cli.labels_calibrate import calibrate_bank
from actionclip_deploy.cli.output import (
    BundlePath,
    JsonOption,
    OverwriteOption,
    ProviderOption,
    ThreadsOption,
    notes,
    print_json,
    progress_bar,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.labels import LabelBank, diff_label_banks, list_label_banks
from actionclip_deploy.prompts import (
    LABEL_ONLY,
    read_labels,
    read_templates,
    split_labels,
)
from actionclip_deploy.runtimes import open_runtime

labels_app = typer.Typer(
    no_args_is_help=True, help="Label banks: build one, list them, compare two, calibrate one."
)


@labels_app.command()
def build(
    bundle: BundlePath,
    labels: Annotated[
        Path, typer.Option("--labels", metavar="FILE", help="CSV (id,name), text or JSON file.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the label bank.")],
    templates: Annotated[
        Path | None,
        typer.Option("--templates", metavar="FILE", help="By default, the bundle's own."),
    ] = None,
    label_only: Annotated[
        bool, typer.Option("--label-only", help="Use the bare label as the only template.")
    ] = False,
    split: Annotated[
        bool,
        typer.Option(
            "--split-labels",
            help="Write ApplyEyeMakeup as 'apply eye makeup'; differs from the published scores.",
        ),
    ] = False,
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed a set of labels and store it in the bundle under a name."""
    if templates is not None and label_only:
        raise usage_error("--templates and --label-only exclude each other; give one.")
    opened = Bundle.open(bundle)
    names = read_labels(labels)
    if split:
        names = split_labels(names)
    chosen = LABEL_ONLY if label_only else read_templates(templates) if templates else None
    with wrong_arguments_are_usage_errors():
        target = opened.label_bank_path(name)
        check_replaceable(target, overwrite=overwrite, marker=BANK_RECORD_NAME)
        runtime = open_runtime(
            opened, "onnxruntime", execution_provider=execution_provider, num_threads=threads
        )
    with runtime, progress_bar(quiet=as_json) as bar:
        task = bar.add_task("Embedding prompts", total=None)
        bank = LabelBank.build(
            opened,
            runtime,
            names,
            name=name,
            templates=chosen,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    bank.save(opened, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "name": name,
                "path": str(target),
                "num_labels": len(bank.labels),
                "num_templates": len(bank.templates),
            }
        )
        return
    results.print(
        f"Built {name}: {len(bank.labels)} labels x {len(bank.templates)} templates, {target}",
        highlight=False,
    )


@labels_app.command("list")
def list_(bundle: BundlePath, as_json: JsonOption = False) -> None:
    """List the label banks of a bundle."""
    banks = list_label_banks(Bundle.open(bundle))
    if as_json:
        print_json([asdict(bank) for bank in banks])
        return
    if not banks:
        notes.print(
            f"{bundle} has no label bank; build one with `actionclip labels build`.",
            highlight=False,
        )
        return
    table = Table()
    for heading in ("name", "labels", "templates", "unknown", "problem"):
        table.add_column(heading)
    for bank in banks:
        counts = ("" if n is None else str(n) for n in (bank.num_labels, bank.num_templates))
        calibrated = "calibrated" if bank.is_calibrated else ""
        table.add_row(bank.name, *counts, calibrated, escape(bank.problem or ""))
    results.print(table)


@labels_app.command()
def diff(
    bundle: BundlePath,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Name of a label bank.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of another.")],
    as_json: JsonOption = False,
) -> None:
    """Say which labels and templates one bank has and the other has not."""
    opened = Bundle.open(bundle)
    difference = diff_label_banks(LabelBank.load(opened, old), LabelBank.load(opened, new))
    data = asdict(difference)
    if as_json:
        print_json(data)
        return
    changes = {key: value for key, value in data.items() if value}
    if not changes:
        results.print(f"{old} and {new} hold the same labels and templates.", highlight=False)
    for what, values in changes.items():
        for value in values:
            results.print(f"{what.replace('_', ' ')}: {value}", highlight=False, markup=False)


labels_app.command("calibrate")(calibrate_bank)
