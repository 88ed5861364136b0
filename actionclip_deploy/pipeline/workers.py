"""Threads that work ahead of who takes their results: in order, and never too far ahead.

Threads, not processes: FFmpeg, Pillow and numpy let go of Python's lock while they work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Event
from typing import TypeVar

from actionclip_deploy.runtimes.machine import num_available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEFAULT_WORKERS = 8


def default_num_workers() -> int:
    """As many as the cores that this process may use, up to a bound."""
    return min(MAX_DEFAULT_WORKERS, num_available_cores())


def work_ahead(
    items: Iterable[Item],
    work: Callable[[Item, Event], Result],
    *,
    num_workers: int,
    max_ahead: int,
) -> Generator[Result, None, None]:
    """Do work on items in threads; gives the results in the order of the items.

    However the generator ends (its items run out, an error, an interruption, `close`), work that
    has not begun is dropped, and it waits for what has.

    Args:
        items: Drawn from no more than `max_ahead` before the last result that was taken.
        work: Called in a thread with an item, and an event that is set once nobody waits for
            the result. What it raises is raised in the place of its result.
        num_workers: Threads.
        max_ahead: Results and work in hand at a time, those that are taken left out.
    """
    stop = Event()
    source = iter(items)
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="actionclip-read")
    try:
        while True:
            for item in islice(source, max_ahead - len(pending)):
                pending.append(pool.submit(work, item, stop))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
