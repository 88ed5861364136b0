"""What the verbs share: printing, exit codes, and options that mean the same everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from actionclip_deploy.errors import ActionClipError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_PARITY = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_SHORT_WORD = 12  # characters; a list of such words is printed in one line

BundlePath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `actionclip export` wrote.")
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")
]
RuntimeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="What executes the graphs: onnxruntime, tensorrt, tensorrt-rtx, torch, or auto for "
        "the fastest that is verified here.",
    ),
]
ProviderOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--execution-provider", help="ONNX Runtime's execution provider: cpu, cuda, ... by name."
    ),
]
ThreadsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads of one call on the CPU; by default, the cores there are."
    ),
]
CheckpointOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="The bundle's checkpoint; needed by --runtime torch."),
]
BaseOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--base", metavar="CHECKPOINT", help="Supplies the tower that the checkpoint lacks."
    ),
]
OverwriteOption: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there under this name.")
]

# Progress and notes go to standard error, so that standard output holds the result alone.
notes = Console(stderr=True)
results = Console(soft_wrap=True)


def print_json(data: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(_to_json(data, indent=2) + "\n")


def print_json_line(data: Any) -> None:
    """Print one JSON object on a line of its own, at once, so that a reader can follow."""
    sys.stdout.write(_to_json(data) + "\n")
    sys.stdout.flush()


def print_sections(report: dict[str, dict[str, Any]]) -> None:
    """Print a table for each part of a report, a row for each of its entries."""
    for title, rows in report.items():
        table = Table(title=title.replace("_", " "), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key.replace("_", " "), escape(_in_words(value)))
        results.print(table)


def print_error(error: Exception) -> None:
    """Print an error as one sentence on standard error."""
    notes.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def print_warning(text: object) -> None:
    """Print a warning on standard error."""
    notes.print(f"[bold yellow]warning:[/] {escape(str(text))}", highlight=False, soft_wrap=True)


def given_options(context: typer.Context) -> dict[str, str]:
    """Parameters that the command line has, by their names in Python, as one writes them."""
    return {
        param.name: param.opts[0] if param.opts[0].startswith("-") else param.name.upper()
        for param in context.command.params
        if param.name and str(context.get_parameter_source(param.name)).endswith("COMMANDLINE")
    }


def usage_error(text: object) -> typer.BadParameter:
    """An error about the arguments; raise it."""
    return typer.BadParameter(str(text))


@contextmanager
def wrong_arguments_are_usage_errors() -> Iterator[None]:
    """Turn a `ValueError` of the block, but none of the package's own errors, into wrong usage."""
    try:
        yield
    except ActionClipError:
        raise
    except ValueError as exc:
        raise usage_error(exc) from exc


def progress_bar(*, quiet: bool = False) -> Progress:
    """A progress bar on standard error; invisible where that is no terminal or on request."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=quiet or not notes.is_terminal,
    )


def _to_json(data: Any, *, indent: int | None = None) -> str:
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(data, indent=indent, ensure_ascii=not is_unicode, allow_nan=False)


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        words = [_in_words(item) for item in value]
        short = all(len(word) <= _SHORT_WORD for word in words)
        return (", " if short else "\n").join(words) or "none"
    return str(value)
