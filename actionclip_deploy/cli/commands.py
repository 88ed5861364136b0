"""All verbs of the command line, and how it ends.

Exit codes: 0 success; 1 an error, told in one sentence on standard error; 2 wrong usage;
3 some of the videos failed and the others are reported; 4 a runtime disagrees with the reference;
130 interrupted; 143 told to end.

It is a module of its own, with `cli/__init__.py` as its importer, so that the entry point takes no
time to import.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.main import get_command, get_group

from actionclip_deploy import __version__
from actionclip_deploy.cli import leave_with
from actionclip_deploy.cli.output import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PARITY,
    EXIT_TERMINATED,
    label_warnings_are_printed,
    note_interruption,
    print_error,
    show_progress,
    what_was_done,
)
from actionclip_deploy.cli.verb import Described, Verb, VerbApp, Verbs
from actionclip_deploy.errors import ActionClipError, FileWriteError, MissingExtraError, ParityError
from actionclip_deploy.files import is_full_disk
from actionclip_deploy.published import show_downloads

# A library may turn the exception of an interruption into another one, or swallow it.
_interruptions: list[int] = []  # signals that came
_told_of_them: list[int] = []  # those that were answered in a sentence
_terminations: list[int] = []
_IMPORT_POLL_SECONDS = 0.02
_UNFINISHED = "Interrupted before it had finished"

# What a system says of a path as it is written, or of who asks; `Path.is_dir` raises it as well.
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


# The verbs by what they are for, in the order of the help, with the first sentence of each.
_PANELS: dict[str, dict[str, str]] = {
    "Make a bundle": {
        "models": (
            "List checkpoints that are known by name: what they recognise, how well, what is here."
        ),
        "export": (
            "Turn a checkpoint into a bundle of ONNX graphs that is proven to compute the same."
        ),
        "labels": "Label banks: build, list, show, diff, calibrate, rename, remove.",
        "train": (
            "Fine-tune a model as the paper does, and write a checkpoint in the original's format."
        ),
        "build": "Build TensorRT engines of a bundle for this device, audit and verify them.",
        "engines": "List and remove the TensorRT engines in the cache.",
    },
    "Recognise": {
        "predict": "Rank labels for videos: those of a label bank, of a file, or given one by one.",
        "watch": "Tell what happens in live sources: events with label, start and end.",
        "embed": "Write the embeddings of videos, as the model compares them with texts.",
        "classify": (
            "Score videos by a server of `actionclip serve`; no model and no runtime is "
            "needed here."
        ),
    },
    "Search": {
        "index": (
            "Embed the windows of videos into an archive, which `actionclip search` looks through."
        ),
        "search": "Find the moments of an archive that show what a text says.",
    },
    "Serve": {
        "serve": "Serve a bundle over HTTP until SIGTERM, with a web page at /.",
        "triton": (
            "Write a bundle as a model repository of Triton, or compare a running server with it."
        ),
    },
    "Measure": {
        "evaluate": "Measure accuracy on annotated videos, the way that videos are recognised.",
        "benchmark": (
            "Measure runtimes side by side: latency, throughput, memory, stages, and parity "
            "beside them."
        ),
        "load": "Put a server under load: goodput and latency at growing rates of requests.",
    },
    "Look": {
        "verify": (
            "Compare a runtime with the bundle's golden outputs, at every graph and end to end."
        ),
        "inspect": "Describe a checkpoint or a bundle: model, sizes, shapes, precision and origin.",
        "doctor": (
            "Report this machine, what really loads and runs on it, and which runtime to use."
        ),
    },
}
_PANEL_OF = {name: panel for panel, verbs in _PANELS.items() for name in verbs}
_SUMMARIES = {name: text for verbs in _PANELS.values() for name, text in verbs.items()}


class _Commands(MutableMapping[str, Any]):
    """The verbs by name, each imported when it is asked for: all of them take most of a second.

    A verb is the function of its name in the module of its name, or a group of verbs, `NAME_app`.
    """

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._imported:
            self[name] = _import_verb(name, _PANEL_OF[name])
        return self._imported[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._imported[name] = command

    def __delitem__(self, name: str) -> None:
        del self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_PANEL_OF)

    def __len__(self) -> int:
        return len(_PANEL_OF)


def _import_verb(name: str, panel: str) -> Any:
    module = import_module(f"actionclip_deploy.cli.{name}")
    group = getattr(module, f"{name}_app", None)
    if group is not None:
        command: Any = get_group(group)
    else:
        alone = VerbApp(add_completion=False)
        alone.command(cls=module.BenchmarkCommand if name == "benchmark" else Verb)(
            getattr(module, name)
        )
        command = get_command(alone)
    command.name, command.rich_help_panel = name, panel
    return command


class _Group(Verbs):
    """Turns the package's errors into one sentence and an exit code."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = _Commands()

    def describe_verbs(self, ctx: Any) -> list[Described]:  # noqa: ARG002
        """The verbs without an import of them."""
        return [Described(name, text, (), _PANEL_OF[name]) for name, text in _SUMMARIES.items()]

    def invoke(self, ctx: Any) -> Any:
        try:
            with label_warnings_are_printed():
                return super().invoke(ctx)
        except (typer.Exit, SystemExit):
            raise
        except BaseException as exc:
            code = _tell(exc)
            if code is None:
                raise
            raise typer.Exit(code) from exc


def _tell(exc: BaseException) -> int | None:
    """Print what ended the program, and give the exit code; None for what is nobody's fault."""
    if isinstance(exc, KeyboardInterrupt) or _interruptions:
        return _tell_of_the_interruption()
    if _terminations:  # whatever a library made of it, such as of processes that were told as well
        return EXIT_TERMINATED
    if isinstance(exc, OSError) and not isinstance(exc, ActionClipError) and is_full_disk(exc):
        # What we write ourselves is told by its name; without one it is what was printed.
        exc = FileWriteError(exc.errno, exc.strerror, exc.filename or "Standard output")
    if isinstance(exc, OSError) and not isinstance(exc, ActionClipError):
        if exc.filename is None or exc.errno not in _OF_A_PATH:
            return None
        print_error(
            f"{exc.filename} cannot be used ({exc.strerror}); give another path, or change the "
            "permissions of this one."
        )
        return EXIT_ERROR
    if isinstance(exc, ModuleNotFoundError) and not isinstance(exc, ActionClipError):
        if (exc.name or "actionclip_deploy").startswith("actionclip_deploy"):
            return None
        exc = MissingExtraError(f"This (by its module {exc.name})", "all")
    if not isinstance(exc, ActionClipError):
        return None
    print_error(exc)
    return EXIT_PARITY if isinstance(exc, ParityError) else EXIT_ERROR


def _tell_of_the_interruption() -> int:
    done = what_was_done()
    print_error(f"{_UNFINISHED}: {done}" if done else f"{_UNFINISHED}.")
    _told_of_them.extend(_interruptions)
    return EXIT_INTERRUPTED


app = VerbApp(
    name="actionclip",
    cls=_Group,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"actionclip-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """From a fine-tuned ActionCLIP checkpoint to a verified ONNX bundle that scores videos.

    Exit codes: 0 success, 1 error, 2 wrong usage, 3 some videos failed, 4 outputs disagree with
    the reference, 130 interrupted, 143 told to end.

    Example:
        actionclip export motions --output bundle
        actionclip predict bundle video.mp4 --label "a red star" --label "a cross"
    """


def run(*, can_interrupt: bool = True) -> int:
    """Run the command line to its end.

    Args:
        can_interrupt: Whether Ctrl-C ends it.

    Returns:
        The exit code, after all that was printed has arrived.
    """
    # A job that is told to end cleans up as at Ctrl-C: the exception passes every `finally`.
    _answer_signals_with(_end, can_interrupt=can_interrupt)
    _buffer_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label may hold what the terminal cannot show
    show_downloads(show_progress)
    try:
        app()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException as exc:
        told = _tell(exc)
        if told is None:
            raise
        code = told
    else:
        code = 0
    # Nothing is open any more.
    _answer_signals_with(leave_with(_UNFINISHED + "."), can_interrupt=can_interrupt)
    if _interruptions and code not in (0, EXIT_TERMINATED):
        code = EXIT_INTERRUPTED if _told_of_them else _tell_of_the_interruption()
    code = _flush(code)
    # It has ended; only threads are waited for.
    _answer_signals_with(lambda *_: os._exit(code), can_interrupt=can_interrupt)
    return code


def _buffer_output() -> None:
    """Write all that is printed, or fail, under `PYTHONUNBUFFERED` as well.

    There Python gives each text to the system once, and drops without an error what that did not
    take of it, as it does not where a disk is nearly full.
    """
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=sys.stdout.encoding, line_buffering=True
        )


def _answer_signals_with(handler: Callable[[int, Any], None], *, can_interrupt: bool) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, handler)
    if can_interrupt:
        signal.signal(signal.SIGINT, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    """Raise what ends the program, once no module is being imported and nothing is let go of.

    Some libraries turn an exception in an import into an `ImportError` of theirs, and compiled ones
    end the process (torch 2.12: `terminate called after throwing an instance of ...`). Where an
    object goes (`__del__`, the callback of a weak reference), Python prints an exception and goes
    on.
    """
    if _is_lost_in(frame) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, frame: _end(signum, frame))
        signal.setitimer(signal.ITIMER_REAL, _IMPORT_POLL_SECONDS)
        return
    if signum == signal.SIGTERM:
        _terminations.append(signum)
        sys.exit(EXIT_TERMINATED)
    _interruptions.append(signum)
    note_interruption()
    raise KeyboardInterrupt


def _is_lost_in(frame: FrameType | None) -> bool:
    """Whether an exception that is raised in a frame would not come out as it is."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib.") or code.co_name == "__del__":
            return True
        if code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def _flush(code: int) -> int:
    """Write out what was printed: that it cannot be is an error, which Python finds too late."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more at its end
        if code == 0 and exc.errno != errno.EPIPE:  # who reads no further has seen enough
            print_error(FileWriteError(exc.errno, exc.strerror, "Standard output"))
        return code or EXIT_ERROR
    return code
