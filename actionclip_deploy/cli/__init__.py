"""The command line: `actionclip VERB`, one module per verb.

Exit codes: 0 success; 1 an error, told in one sentence on standard error; 2 wrong usage;
3 some of the videos failed and the others are reported; 4 a runtime disagrees with the reference;
130 interrupted; 143 told to end.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from actionclip_deploy import __version__
from actionclip_deploy.cli.benchmark import BenchmarkCommand, benchmark
from actionclip_deploy.cli.build import build
from actionclip_deploy.cli.classify import classify
from actionclip_deploy.cli.doctor import doctor
from actionclip_deploy.cli.engines import engines_app
from actionclip_deploy.cli.evaluate import evaluate
from actionclip_deploy.cli.export import export
from actionclip_deploy.cli.inspect import inspect
from actionclip_deploy.cli.labels import labels_app
from actionclip_deploy.cli.load import load
from actionclip_deploy.cli.output import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PARITY,
    EXIT_TERMINATED,
    print_error,
)
from actionclip_deploy.cli.predict import predict
from actionclip_deploy.cli.serve import serve
from actionclip_deploy.cli.train import train
from actionclip_deploy.cli.verify import verify
from actionclip_deploy.errors import ActionClipError, ParityError


class _Group(TyperGroup):
    """Turns the package's errors into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ParityError as exc:
            print_error(exc)
            raise typer.Exit(EXIT_PARITY) from exc
        except ActionClipError as exc:
            print_error(exc)
            raise typer.Exit(EXIT_ERROR) from exc
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    name="actionclip",
    cls=_Group,
    no_args_is_help=True,
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
    """


app.command()(export)
app.command()(inspect)
app.command()(verify)
app.command()(build)
app.add_typer(engines_app, name="engines")
app.add_typer(labels_app, name="labels")
app.command()(predict)
app.command()(classify)
app.command()(train)
app.command()(evaluate)
app.command(cls=BenchmarkCommand)(benchmark)
app.command()(serve)
app.command()(load)
app.command()(doctor)


def main() -> None:
    """Run the command line; the entry point `actionclip`."""
    # A job that is told to end cleans up as at Ctrl-C: the exception passes every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label may hold what the terminal cannot show
    app()
