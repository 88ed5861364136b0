"""The command line: `actionclip VERB`, one module per verb.

`main` is the entry point. It imports nothing until it has seen to it that Ctrl-C and SIGTERM end
the program in a sentence: the verbs take a second to import.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # of `typing`, which would have to be imported first
if TYPE_CHECKING:
    from typing import Any

    from actionclip_deploy.cli.commands import app as app


def __getattr__(name: str) -> "Any":
    """Give `app` when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from actionclip_deploy.cli.commands import app

    return app


def _leave(signum: int, _: object) -> None:
    """End at once: while modules are imported, nothing is open that would have to be closed.

    An exception would not do, since some libraries turn it into an `ImportError` of theirs.
    """
    if signum == signal.SIGINT:
        os.write(2, b"error: Interrupted before it had begun.\n")
    os._exit(128 + signum)


def main() -> None:
    """Run the command line; the entry point `actionclip`."""
    can_interrupt = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as under nohup
    if can_interrupt:
        signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    from actionclip_deploy.cli.commands import run

    sys.exit(run(can_interrupt=can_interrupt))
