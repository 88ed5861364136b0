"""The command line: `actionclip VERB`, one module per verb.

`main` is the entry point. It imports nothing until it has seen to it that Ctrl-C and SIGTERM end
the program in a sentence: the verbs take a second to import.
"""

import atexit
import gc
import os
import signal
import sys

TYPE_CHECKING = False  # of `typing`, which would have to be imported first
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from actionclip_deploy.cli.commands import app as app


def __getattr__(name: str) -> "Any":
    """Give `app` when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from actionclip_deploy.cli.commands import app

    return app


def leave_with(sentence: str) -> "Callable[[int, object], None]":
    """What ends the program at once at a signal, where nothing is open that has to be closed.

    An exception would not do while modules are imported, since some libraries turn it into an
    `ImportError` of theirs.
    """

    def leave(signum: int, _: object) -> None:
        if signum == signal.SIGINT:
            os.write(2, f"error: {sentence}\n".encode())
        os._exit(128 + signum)

    return leave


def _ignore_signals() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def main() -> None:
    """Run the command line; the entry point `actionclip`."""
    # Modules are made of objects that stay. At its usual 700 new ones the collector would look at
    # them so often that it takes a tenth of the time to start.
    gc.set_threshold(20_000, 20, 20)
    leave = leave_with("Interrupted before it had begun: nothing was done; repeat the command.")
    can_interrupt = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as under nohup
    if can_interrupt:
        signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    # Python gives signals their default action back before it takes itself down, half a second in
    # which a Ctrl-C would make a failure of what succeeded. What is registered first runs last.
    atexit.register(_ignore_signals)
    from actionclip_deploy.cli.commands import run

    code = run(can_interrupt=can_interrupt)
    if code == 128 + signal.SIGINT:
        # Where the interruption met an `exec` of text, Python would now end itself by the signal.
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)
