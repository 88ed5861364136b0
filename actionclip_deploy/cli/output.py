"""What the verbs share: printing and exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table

from actionclip_deploy.errors import (
    ActionClipError,
    AnnotationWarning,
    ArgumentError,
    LabelWarning,
)
from actionclip_deploy.records import EmbeddedVideoRecord, Record, VideoRecord, json_text, printable
from actionclip_deploy.video.reader import VIDEO_SUFFIXES, list_videos

if TYPE_CHECKING:
    from actionclip_deploy.published.download import OnBytes

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_PARITY = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_C1 = re.compile("[\x7f-\x9f]")
_ABOUT_LABELS = (LabelWarning, AnnotationWarning)
_FRAME_OF_PREDICTIONS = 16  # characters of a table of predictions besides videos and labels
_SHORT_WORD = 12  # characters; a list of such words is printed in one line


class Terminal(Console):
    """Prints control characters escaped, whosever text they come in; its own colours stay."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, and escape."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


# Progress and notes go to standard error, so that standard output holds the result alone.
notes = Terminal(stderr=True)
results = Terminal(soft_wrap=True)


def print_json(data: Any) -> None:
    """Print one JSON document on standard output: a record, records, or plain values."""
    sys.stdout.write(_to_json(data, indent=2) + "\n")


def print_json_line(record: Record) -> None:
    """Print a record on a line of its own, at once, so that a reader can follow."""
    sys.stdout.write(_to_json(record) + "\n")
    sys.stdout.flush()


def sections_of(record: Record) -> dict[str, dict[str, Any]]:
    """The parts of a record that are tables, as `print_sections` takes them."""
    return {name: part for name, part in record.to_dict().items() if isinstance(part, dict)}


def print_sections(report: dict[str, dict[str, Any]]) -> None:
    """Print a table for each part of a report, a row for each of its entries."""
    for title, rows in report.items():
        table = Table(title=title.replace("_", " "), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key.replace("_", " "), escape(_in_words(value)))
        results.print(table)


def print_error(error: object) -> None:
    """Print an error as one sentence on standard error."""
    notes.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def print_warning(text: object) -> None:
    """Print a warning on standard error."""
    notes.print(f"[bold yellow]warning:[/] {escape(str(text))}", highlight=False, soft_wrap=True)


@contextmanager
def label_warnings_are_printed() -> Iterator[None]:
    """Print each warning about labels once, as the other warnings of the command line."""
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, _ABOUT_LABELS):
            show_before(message, category, filename, lineno, file, line)
        elif str(message) not in told:
            told.add(str(message))
            print_warning(message)

    with warnings.catch_warnings():
        show_before = warnings.showwarning
        for each in _ABOUT_LABELS:
            warnings.simplefilter("always", each)
        warnings.showwarning = show
        yield


def given_options(context: typer.Context) -> dict[str, str]:
    """Parameters that the command line has, by their names in Python, as one writes them."""
    return {
        param.name: param.opts[0] if param.opts[0].startswith("-") else param.name.upper()
        for param in context.command.params
        if param.name and str(context.get_parameter_source(param.name)).endswith("COMMANDLINE")
    }


def usage_error(text: object) -> typer.BadParameter:
    """An error about the arguments; raise it."""
    return typer.BadParameter(printable(str(text)))


def check_suffix(option: str, path: Path | None, *suffixes: str) -> None:
    """Refuse, by a usage error, a file whose suffix promises what is not written.

    A name without a suffix, such as `/dev/stdout`, promises nothing.
    """
    if path is not None and path.suffix and path.suffix.lower() not in suffixes:
        raise usage_error(f"{option} is {path}; give a file that ends in {either(suffixes)}.")


def either(words: Sequence[str]) -> str:
    """What one may choose from, as a part of a sentence: "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


@contextmanager
def wrong_arguments_are_usage_errors() -> Iterator[None]:
    """Turn a `ValueError` of the block, but none of the package's own errors, into wrong usage.

    A verb says itself what is wrong with an argument, by its option.
    """
    try:
        yield
    except (ActionClipError, ArgumentError):
        raise
    except ValueError as exc:
        raise usage_error(exc) from exc


# What an interrupted verb has done: told by whoever counts it, at the innermost place.
_tellers: list[Callable[[], str]] = []
_at_interruption: list[Callable[[], str]] = []


@contextmanager
def tells_when_interrupted(tell: Callable[[], str]) -> Iterator[None]:
    """Let a Ctrl-C in the block say what was done so far, and how to go on.

    Args:
        tell: Gives both as a sentence that begins in lower case; called once the block has ended.
    """
    _tellers.append(tell)
    try:
        yield
    except KeyboardInterrupt:
        note_interruption()
        raise
    finally:
        _tellers.remove(tell)


@contextmanager
def steps_are_shown(first: str, outcome: str) -> Iterator[Callable[[str], None]]:
    """Show what a long work is at, and name its last step at a Ctrl-C.

    Args:
        first: What it is at until it says something.
        outcome: What its interruption means, and how to go on, as a sentence that begins in lower
            case.

    Yields:
        What is called with each step.
    """
    steps = [first]

    def on_step(text: str) -> None:
        steps.append(text)
        status.update(text)

    def tell() -> str:
        return f"its last step was: {steps[-1]}; {outcome}"

    with notes.status(first) as status, tells_when_interrupted(tell):
        yield on_step


def note_interruption() -> None:
    """Remember who can tell of the work that is interrupted now."""
    if _tellers and not _at_interruption:
        _at_interruption.append(_tellers[-1])


def what_was_done() -> str:
    """What was done until the interruption; empty where nobody can tell."""
    return _at_interruption.pop()() if _at_interruption else ""


def names_a_file(text: str) -> bool:
    """Whether a text that may also be the name of a bank is the path of a file, or of a pipe."""
    # Unlike those of `Path`, these raise nothing of a name too long or a folder not readable.
    return os.path.exists(text) and not os.path.isdir(text)  # noqa: PTH110, PTH112


def progress_bar(*, quiet: bool = False) -> Progress:
    """A progress bar on standard error; invisible where that is not a terminal, or on request."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=quiet or not notes.is_terminal,
    )


@contextmanager
def show_progress(name: str) -> Iterator[OnBytes]:
    """Show a download on standard error, where that is a terminal."""
    bar = Progress(
        TextColumn("Fetching {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        # A verb may be showing a bar of its own, and a console has room for one.
        console=Console(stderr=True),
        transient=True,
        disable=not notes.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _to_json(data: Any, *, indent: int | None = None) -> str:
    if isinstance(data, Record):
        data = data.to_dict()
    elif isinstance(data, list):
        data = [each.to_dict() if isinstance(each, Record) else each for each in data]
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    if not is_unicode:
        return json.dumps(data, indent=indent, allow_nan=False)
    # JSON escapes those below 32 itself, and these begin a terminal's sequences just as well.
    return _C1.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text(data, indent=indent))


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


# How `predict` and `classify` tell what was recognised.


def report_videos(
    records: Iterable[VideoRecord | EmbeddedVideoRecord],
    *,
    num_videos: int,
    num_done: int = 0,
    as_json: bool,
    shows_table: bool = True,
    tell: Callable[[int], str],
    title: str = "Scoring videos",
) -> int:
    """Tell what comes: warnings and failures at once, and JSON lines, or a table in the end.

    Without JSON, frames that were reused are counted at the end, if there were any.

    Args:
        records: What was recognised, as it comes.
        num_videos: Videos there are, for the progress bar.
        num_done: How many of them were done before.
        as_json: Whether each record is printed, on a line of its own.
        shows_table: Whether there is a table, without JSON.
        tell: Says at a Ctrl-C what it means that so many came, see `tells_when_interrupted`.
        title: Of the progress bar.

    Returns:
        How many failed.
    """
    kept = []  # of thousands of videos, only where they are shown
    num_failed = num_told = num_encoded = num_reused = 0
    with (
        tells_when_interrupted(lambda: tell(num_told)),
        progress_bar(quiet=as_json or num_videos == 1) as bar,
    ):
        task = bar.add_task(title, total=num_videos, completed=num_done)
        for record in records:
            for warning in record.warnings:
                print_warning(warning)
            if record.error is not None:
                num_failed += 1
                text = record.error.message  # a server's sentence may not name the video
                print_error(text if record.name in text else f"{record.video}: {text}")
            if as_json:
                print_json_line(record)
            elif shows_table and isinstance(record, VideoRecord):
                kept.append(record)
            bar.advance(task)
            num_told += 1
            num_encoded += record.num_frames_encoded or 0
            num_reused += record.num_frames_reused or 0
    if shows_table and not as_json:
        results.print(_prediction_table(kept))
    if num_reused and not as_json:
        results.print(f"{num_encoded:,} frames encoded, {num_reused:,} reused from equal ones.")
    return num_failed


def _prediction_table(records: Sequence[VideoRecord]) -> Table:
    table = Table()
    for heading in ("video", "label", "score"):
        is_number = heading == "score"
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    texts = [best.label for record in records for best in record.predictions or ()]
    room = results.width - _FRAME_OF_PREDICTIONS
    width = max(room // 3, room - max(map(len, texts), default=0))
    names = tell_apart([record.video for record in records], width=width)
    for record in records:
        shown = escape(names[record.video])
        if record.error is not None:
            table.add_row(shown, "[red]failed[/]", "")
        elif record.answer is not None and record.answer.is_unknown:
            table.add_row(shown, "[yellow]unknown[/], none of these:", "")
            shown = ""
        for best in record.predictions or ():
            table.add_row(shown, escape(printable(best.label, kept="")), f"{best.score:.4f}")
            shown = ""
        table.add_section()
    return table


def tell_apart(paths: Iterable[str], *, width: int) -> dict[str, str]:
    """What paths are called in a table, so that no two of them look the same.

    That is the last part of a path; of equal ones, as many parts as tell them apart. A long one
    is cut in its middle, or around what is different, and only where that does not do, not at all.

    Args:
        paths: Of files.
        width: Characters that there is room for.

    Returns:
        Names by path, without control characters.
    """
    parts = {path: PurePath(path).parts or (path,) for path in paths}
    taken = dict.fromkeys(parts, 1)
    while alike := [
        path
        for group in _alike({path: parts[path][-taken[path] :] for path in parts})
        for path in group
        if taken[path] < len(parts[path])
    ]:
        for path in alike:
            taken[path] += 1
    names = {
        path: printable(str(PurePath(*parts[path][-taken[path] :])), kept="") for path in parts
    }
    cut = {path: _cut_middle(name, width) for path, name in names.items()}
    for group in _alike(cut):
        cut |= _cut_to_differ({path: names[path] for path in group}, width)
    for group in _alike(cut):
        cut |= {path: names[path] for path in group}
    return cut


def _alike(names: dict[str, Any]) -> list[list[str]]:
    """Keys that have the same value, where there are several of them."""
    groups: dict[Any, list[str]] = {}
    for path, name in names.items():
        groups.setdefault(name, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _cut_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    kept = max(width - 1, 2)
    return f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"


def _cut_to_differ(names: dict[str, str], width: int) -> dict[str, str]:
    """Cut long names to what begins shortly before they differ."""
    place = len(os.path.commonprefix(list(names.values())))  # noqa: RUF071 - characters are meant
    kept = max(width - 2, 2)
    found = {}
    for path, text in names.items():
        start = max(0, min(place - kept // 3, len(text) - kept))
        end = start + kept
        found[path] = f"{'…' * (start > 0)}{text[start:end]}{'…' * (end < len(text))}"
    for group in _alike(found):
        if len(group) < len(names):  # they differ later than the others
            found |= _cut_to_differ({path: names[path] for path in group}, width)
    return found


# The videos that a command was given: files as they are, folders by what is in them.


def find_videos(paths: Iterable[Path], *, recursive: bool) -> list[Path]:
    """List the videos of files and folders: in the given order, those of a folder sorted.

    A file is taken whatever its suffix. Of a folder, files with the suffix of a video are taken
    and hidden ones are not; links to folders are not followed.

    Args:
        paths: Files and folders; what does not exist is passed on, for the reader to say so.
        recursive: Whether folders in the folders are looked through as well.

    Raises:
        typer.BadParameter: If a folder holds no video, or cannot be read.
    """
    videos: dict[Path, None] = {}  # each once, where a folder and a file of it are given
    for path in paths:
        # Unlike `Path.is_dir` this raises nothing, of a name too long or a folder not readable.
        is_folder = os.path.isdir(path)  # noqa: PTH112
        found = _videos_in(path, recursive=recursive) if is_folder else [path]
        videos.update(dict.fromkeys(found))
    return list(videos)


def _videos_in(folder: Path, *, recursive: bool) -> list[Path]:
    found = list_videos(folder, recursive=recursive, on_error=_raise_unreadable)
    if found:
        return found
    if not recursive and list_videos(folder, recursive=True):
        raise usage_error(
            f"{folder} holds no video files itself, but folders in it do; add --recursive."
        )
    raise usage_error(
        f"{folder} holds no video files, which are known by their suffixes "
        f"({', '.join(sorted(VIDEO_SUFFIXES))}); give another folder, or files by their names."
    )


def _raise_unreadable(error: OSError) -> None:
    raise usage_error(
        f"The folder {error.filename} cannot be read ({error.strerror}); change its permissions "
        "or give the videos by their names."
    )
