"""Banks of the labels that a request brings along: embedded once, then kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankVersion

ADHOC_NAME = "adhoc"

_MAX_BYTES = 64 * 1024 * 1024
_MAX_UNDER_WAY = 32
_RETRY_SECONDS = 1.0

Key = tuple[tuple[str, ...], tuple[str, ...]]
BuildAdhoc = Callable[[Sequence[str], Sequence[str]], BankVersion]


class AdhocBanks:
    """Banks by their labels and templates; the ones that were not used for longest go first.

    Args:
        build: Makes a bank of labels and templates, in a thread.
        max_bytes: What the embeddings that are kept may take.
    """

    def __init__(self, build: BuildAdhoc, *, max_bytes: int = _MAX_BYTES) -> None:
        self._build = build
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, BankVersion] = OrderedDict()
        self._under_way: dict[Key, asyncio.Future[BankVersion]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="actionclip-adhoc")

    async def get(
        self, labels: tuple[str, ...], templates: tuple[str, ...], *, deadline: float | None = None
    ) -> BankVersion:
        """The bank of labels and templates; requests with the same ones wait for one build.

        Raises:
            RequestRefusedError: If too many are being made (429), or the deadline passes (504).
            LabelError: If the labels or templates cannot be used.
        """
        key = (labels, templates)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._under_way:
            if len(self._under_way) >= _MAX_UNDER_WAY:
                raise refusals.queue_full(
                    f"{_MAX_UNDER_WAY} sets of labels are being embedded; try again after the "
                    "time in Retry-After, or use a label bank.",
                    retry_after_seconds=_RETRY_SECONDS,
                )
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._threads, self._build, labels, templates)
            self._under_way[key] = future
            future.add_done_callback(lambda done: self._keep(key, done))
        left = None if deadline is None else deadline - asyncio.get_running_loop().time()
        try:
            # Others may wait for it too, and it is of use to the next who asks.
            return await asyncio.wait_for(asyncio.shield(self._under_way[key]), left)
        except asyncio.TimeoutError:
            raise refusals.deadline() from None

    def stop(self) -> None:
        """Make no more banks."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _keep(self, key: Key, done: asyncio.Future[BankVersion]) -> None:
        self._under_way.pop(key, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._kept[key] = done.result()
        while len(self._kept) > 1 and self._num_bytes() > self._max_bytes:
            self._kept.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(each.bank.embeddings.nbytes for each in self._kept.values())
