"""A disk that fills up, for whoever has no right to mount one."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

NO_ROOM = "make room there or choose another place."
# Python keeps what it compiled without a look at how much of it was written: half a file, at which
# whoever imports the module next fails.
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}


def keep_files_small(num_bytes: int = 2000) -> tuple[int, int]:
    """Let no file of this process become larger; gives the limits that were there.

    A process that is given an environment needs `NO_BYTECODE` in it.
    """
    os.environ.update(NO_BYTECODE)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    return limits


@contextmanager
def small_files(num_bytes: int = 2000) -> Iterator[None]:
    """Let no file of this process become larger while the block runs."""
    ignored, writes_none = signal.getsignal(signal.SIGXFSZ), sys.dont_write_bytecode
    with patch.dict(os.environ):
        limits = keep_files_small(num_bytes)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
            sys.dont_write_bytecode = writes_none
