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
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import click
import typer

from actionclip_deploy import __version__
from actionclip_deploy.cli import leave_with
from actionclip_deploy.cli.benchmark import BenchmarkCommand, benchmark
from actionclip_deploy.cli.build import build
from actionclip_deploy.cli.classify import classify
from actionclip_deploy.cli.doctor import doctor
from actionclip_deploy.cli.embed import embed
from actionclip_deploy.cli.engines import engines_app
from actionclip_deploy.cli.evaluate import evaluate
from actionclip_deploy.cli.export import export
from actionclip_deploy.cli.index import index
from actionclip_deploy.cli.inspect import inspect
from actionclip_deploy.cli.labels import labels_app
from actionclip_deploy.cli.load import load
from actionclip_deploy.cli.models import models_app, show_progress
from actionclip_deploy.cli.output import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PARITY,
    EXIT_TERMINATED,
    label_warnings_are_printed,
    note_interruption,
    print_error,
    what_was_done,
)
from actionclip_deploy.cli.predict import predict
from actionclip_deploy.cli.search import search
from actionclip_deploy.cli.serve import serve
from actionclip_deploy.cli.train import train
from actionclip_deploy.cli.triton import triton
from actionclip_deploy.cli.verb import Verb, VerbApp, Verbs
from actionclip_deploy.cli.verify import verify
from actionclip_deploy.cli.watch import watch
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


# The verbs by what they are for, in the order of the help.
_VERBS: dict[str, tuple[Callable[..., Any] | typer.Typer, ...]] = {
    "Make a bundle": (models_app, export, labels_app, train, build, engines_app),
    "Recognise": (predict, watch, embed, classify),
    "Search": (index, search),
    "Serve": (serve, triton),
    "Measure": (evaluate, benchmark, load),
    "Look": (verify, inspect, doctor),
}


class _Group(Verbs):
    """Turns the package's errors into one sentence and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs; typer would put the groups last."""
        names = [_name(verb) for verbs in _VERBS.values() for verb in verbs]
        return sorted(super().list_commands(ctx), key=names.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            with label_warnings_are_printed():
                return super().invoke(ctx)
        except (typer.Exit, click.ClickException, SystemExit):
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


def _name(verb: Callable[..., Any] | typer.Typer) -> str:
    return _GROUPS[id(verb)] if isinstance(verb, typer.Typer) else verb.__name__


_GROUPS = {id(models_app): "models", id(engines_app): "engines", id(labels_app): "labels"}

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


for _panel, _verbs in _VERBS.items():
    for _verb in _verbs:
        if isinstance(_verb, typer.Typer):
            app.add_typer(_verb, name=_name(_verb), rich_help_panel=_panel)
        else:
            app.command(
                cls=BenchmarkCommand if _verb is benchmark else Verb, rich_help_panel=_panel
            )(_verb)


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
