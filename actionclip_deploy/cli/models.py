"""`actionclip models`: checkpoints that are known by name, and their copies in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from actionclip_deploy.cli.options import JsonOption
from actionclip_deploy.cli.output import print_json, results, usage_error
from actionclip_deploy.cli.verb import VerbApp
from actionclip_deploy.command_records import ModelsRecord, PublishedModelRecord
from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.published import PublishedCheckpoint, published_checkpoints

models_app = VerbApp(no_args_is_help=False, add_completion=False)


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List checkpoints that are known by name: what they recognise, how well, what is here.

    `actionclip export NAME` fetches one and exports it.

    Example:
        actionclip models
        actionclip export actionclip-k400-vit-b-32-8f
    """
    if context.invoked_subcommand is not None:
        return
    rows = [_describe(model) for model in published_checkpoints().values()]
    if as_json:
        print_json(ModelsRecord(motions="comes with the package", models=tuple(rows)))
        return
    table = Table(title="Published checkpoints", title_justify="left")
    for heading in ("name", "model, frames", "top-1/top-5", "in the cache"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.backbone}, {row.num_frames}",
            f"{row.top1:.1f}/{row.top5:.1f}",
            _in_cache(row),
        )
    results.print(table)
    for line in (
        "All recognise the 400 actions of Kinetics-400, and any label by its text.",
        "Accuracy: percent, as mmaction2 states it on its copy of Kinetics-400.",
        "Licence of the weights: unknown, nobody states one. Licence of their code:",
        *(f"  {licence}: {', '.join(names)}" for licence, names in _licences(rows).items()),
        "",
        "motions: 5 MB that come with the package; rendered shapes in motion only.",
        "open_clip:MODEL/TAG, such as open_clip:ViT-B-32/openai: CLIP itself, fetched by",
        "  open_clip; give --num-frames, and any label by its text.",
        "hf://USER/REPO/FILE and https addresses (with --sha256) are fetched too.",
        "",
        "Next: actionclip export actionclip-k400-vit-b-32-8f",
    ):
        results.print(line, highlight=False, markup=False)
    for row in rows:
        if row.bytes:
            results.print(f"In the cache: {row.path}", highlight=False, markup=False)


@models_app.command()
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Whose copies to remove.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the copies of all.")] = False,
) -> None:
    """Remove copies of published checkpoints from the cache; bundles stay as they are.

    Example:
        actionclip models remove --clear
    """
    known = published_checkpoints()
    if bool(names) == clear:
        raise usage_error("Give the names of checkpoints, or --clear for all of them.")
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise usage_error(
            f"{', '.join(unknown)} is not the name of a published checkpoint; `actionclip models` "
            "lists them."
        )
    freed = sum(known[name].download.remove() for name in names or known)
    results.print(f"Freed {freed / 1e6:.1f} MB.", highlight=False)


def _describe(model: PublishedCheckpoint) -> PublishedModelRecord:
    path: Path | None = None
    size = partial = 0
    try:
        download = model.download
        path, size, partial = download.path, download.copied_bytes, download.partial_bytes
    except CheckpointError:  # there is no cache
        pass
    return PublishedModelRecord(
        **asdict(model),
        path=None if path is None else str(path),
        bytes=size,
        partial_bytes=partial,
    )


def _licences(rows: Sequence[PublishedModelRecord]) -> dict[str, list[str]]:
    """Names by licence; those of one beginning stand together, as `actionclip-*`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        names = found.setdefault(row.licence, [])
        begin = f"{row.name.partition('-')[0]}-*"
        if begin not in names:
            names.append(begin)
    return found


def _in_cache(row: PublishedModelRecord) -> str:
    if row.bytes:
        return f"{row.bytes / 1e6:.0f} MB"
    return f"{row.partial_bytes / 1e6:.0f} MB so far" if row.partial_bytes else "no"
