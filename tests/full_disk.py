"""A disk that fills up, for whoever has no right to mount one."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

NO_ROOM = "make room there or choose another place."


def keep_files_small(num_bytes: int = 2000) -> tuple[int, int]:
    """Let no file of this process become larger; gives the limits that were there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    return limits


@contextmanager
def small_files(num_bytes: int = 2000) -> Iterator[None]:
    """Let no file of this process become larger while the block runs."""
    ignored = signal.getsignal(signal.SIGXFSZ)
    limits = keep_files_small(num_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
