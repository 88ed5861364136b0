"""The label banks of a server: named ones with versions, and those that a request brings along.

A named bank is built in the background and activated at once; a request takes the active version
when it begins and keeps it, so one answer never mixes two. Labels that a request brings along are
embedded once and kept for a while. All texts come from strangers: they are checked against the
limits, and embedded in small calls between those for clips.

Everything here happens in the event loop but for the builds, which have threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.command_records import LabelBankDiff
from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.known_words import (
    check_words,
    describe_unknown_words,
    read_vocabulary,
    unknown_words,
)
from actionclip_deploy.labels import LabelBank, diff_label_banks
from actionclip_deploy.prompts import check_labels, check_templates, clean_prompt, describe_text
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import PROMPTS_BETWEEN_CLIPS
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ADHOC_NAME = "adhoc"
_ADHOC_BYTES = 64 * 1024 * 1024
_MAX_UNDER_WAY = 32
_RETRY_SECONDS = 1.0
_KEPT_VERSIONS = 10

Key = tuple[tuple[str, ...], tuple[str, ...]]
InThread = Callable[..., "Future[Any]"]
Progress = Callable[[int, int], None]
BuildBank = Callable[[str, Sequence[str], Sequence[str] | None, Progress], LabelBank]
BuildAdhoc = Callable[[Sequence[str], Sequence[str]], "BankVersion"]
State = Literal["waiting", "building", "ready", "failed", "cancelled"]


@dataclass(frozen=True, eq=False)
class BankVersion:
    """One version of a bank, which never changes.

    Attributes:
        bank: The bank.
        version: Counts from 1 for each name, also over a deletion.
        sha256: Of labels, templates, embeddings and calibration.
        activated_seconds: When it became the active one, seconds since 1970.
    """

    bank: LabelBank
    version: int
    sha256: str
    activated_seconds: float

    @property
    def name(self) -> str:
        """Name of the bank."""
        return self.bank.name


@dataclass(frozen=True)
class OldVersion:
    """What is remembered of a version: all but its embeddings."""

    version: int
    sha256: str
    activated_seconds: float
    labels: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass
class Build:
    """A build that is under way, or the last one of its name.

    Attributes:
        name: Of the bank.
        state: Where it is.
        done: Prompts that are embedded.
        total: Prompts there are; 0 until that is known.
        error: Why it failed; None if it did not.
        version: What it became; None until then.
        num_bytes: What its embeddings will take.
        unknown_words: Words of its labels that the model does not know; None of one that knows
            every token.
    """

    name: str
    state: State = "waiting"
    done: int = 0
    total: int = 0
    error: str | None = None
    version: int | None = None
    num_bytes: int = 0
    unknown_words: tuple[str, ...] | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("waiting", "building")


class _CancelledError(Exception):
    """A build is not wanted any more; never leaves this module."""


class BankRegistry:
    """The label banks of a server.

    Args:
        build: Makes a bank, in a thread: name, labels, templates or None for the bundle's, and
            what to tell of progress.
        max_banks: Banks there may be at a time.
        max_bytes: What the embeddings of all of them may take.
        on_change: Told of each bank that became active; None in the place of the bank says that
            the name was removed.
        save: Called in the thread with a bank that was built, before it becomes active.
        forget: Called in a thread with the name of a bank that is removed, before it is.
    """

    def __init__(
        self,
        build: BuildBank,
        *,
        max_banks: int,
        max_bytes: int,
        on_change: Callable[[str, BankVersion | None], None] | None = None,
        save: Callable[[LabelBank], object] | None = None,
        forget: Callable[[str], object] | None = None,
    ) -> None:
        self._build = build
        self._max_banks = max_banks
        self._max_bytes = max_bytes
        self._on_change = on_change
        self._save = save
        self._forget = forget
        # Held while a bank is saved or forgotten, so that none is saved after its removal.
        self._saving = threading.Lock()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._active: dict[str, BankVersion] = {}
        self._history: dict[str, list[OldVersion]] = {}
        self._last_version: dict[str, int] = {}
        self._builds: dict[str, Build] = {}
        # One build at a time: each takes all that the runtime has to spare.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="actionclip-banks")

    def names(self) -> list[str]:
        """Names of the active banks, sorted."""
        return sorted(self._active)

    def building_names(self) -> list[str]:
        """Names of the banks that are being built, sorted."""
        return sorted(name for name, build in self._builds.items() if build.is_under_way)

    def get(self, name: str) -> BankVersion:
        """The active version.

        Raises:
            RequestRefusedError: If there is no such bank (404).
        """
        if name not in self._active:
            raise refusals.unknown_bank(name, self.names())
        return self._active[name]

    def build_of(self, name: str) -> Build | None:
        """The build that is under way, or the last one; None if there was none."""
        return self._builds.get(name)

    def history(self, name: str) -> tuple[OldVersion, ...]:
        """The last versions of a bank, oldest first, the active one too.

        Raises:
            RequestRefusedError: If there is no such bank (404).
        """
        self.get(name)
        return tuple(self._history[name])

    def diff(self, name: str, old: int, new: int) -> LabelBankDiff:
        """What changed from one version to another.

        Raises:
            RequestRefusedError: If there is no such bank or version (404).
        """
        known = {each.version: each for each in self.history(name)}
        for version in (old, new):
            if version not in known:
                raise refusals.unknown_bank(
                    f"{name} version {version}", [f"{name} version {v}" for v in known]
                )
        # Compares labels and templates alone, which an old version has as a bank does.
        return diff_label_banks(cast(LabelBank, known[old]), cast(LabelBank, known[new]))

    def activate(self, bank: LabelBank) -> BankVersion:
        """Make a bank the active one of its name, for all requests that begin from now on."""
        name = bank.name
        version = self._last_version.get(name, 0) + 1
        active = BankVersion(bank, version, bank.sha256, time.time())
        old = OldVersion(
            version, active.sha256, active.activated_seconds, bank.labels, bank.templates
        )
        self._last_version[name] = version
        self._history[name] = [*self._history.get(name, []), old][-_KEPT_VERSIONS:]
        self._active[name] = active
        if self._on_change is not None:
            self._on_change(name, active)
        return active

    def start_build(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        *,
        num_bytes: int = 0,
        unknown_words: tuple[str, ...] | None = None,
    ) -> Build:
        """Build a bank in the background; it becomes active once it is done.

        Args:
            name: Of the bank.
            labels: C labels.
            templates: K templates; None for the bundle's.
            num_bytes: What its embeddings will take.
            unknown_words: Words of the labels that the model does not know.

        Raises:
            RequestRefusedError: If this bank is being built (409), or there are too many (413).
        """
        known = self._builds.get(name)
        if name in self._leaving:
            raise refusals.bank_leaving(name)
        if known is not None and known.is_under_way:
            raise refusals.bank_building(name)
        taken = sum(each.bank.embeddings.nbytes for each in self._active.values())
        taken += sum(each.num_bytes for each in self._builds.values() if each.is_under_way)
        if taken + num_bytes > self._max_bytes:
            raise refusals.too_many(
                "bytes of label banks with those that are there", taken + num_bytes, self._max_bytes
            )
        num_banks = len({*self._active, *self.building_names(), name})
        if num_banks > self._max_banks:
            raise refusals.too_many("label banks with this one", num_banks, self._max_banks)
        build = Build(name, num_bytes=num_bytes, unknown_words=unknown_words)
        self._builds[name] = build
        self._forget_failures()
        build.task = asyncio.ensure_future(self._run(build, labels, templates))
        return build

    async def remove(self, name: str) -> None:
        """Remove a bank and end its build; requests that have begun finish with it.

        Raises:
            RequestRefusedError: If there is neither bank nor build (404), or what was saved of it
                cannot be removed (500), in which case the bank stays.
        """
        build = self._builds.get(name)
        was_building = build is not None and build.is_under_way
        if not was_building:
            self.get(name)
        if name not in self._leaving:
            task = asyncio.ensure_future(self._remove(name, build))
            self._leaving[name] = task
            task.add_done_callback(lambda _: self._leaving.pop(name))
        # A client that goes away leaves nothing half removed.
        await asyncio.shield(self._leaving[name])

    async def _remove(self, name: str, build: Build | None) -> None:
        if build is not None and build.is_under_way:
            build.state = "cancelled"
        if self._forget is not None:
            try:
                await asyncio.to_thread(self._forget_saved, name)
            except OSError as exc:
                raise refusals.bank_not_removed(name, exc.strerror or str(exc)) from exc
        self._active.pop(name, None)
        self._history.pop(name, None)
        if self._on_change is not None:
            self._on_change(name, None)
        if build is not None:
            await self._cancel(build)
            if self._builds.get(name) is build:  # and not one that was begun meanwhile
                del self._builds[name]

    def _forget_saved(self, name: str) -> None:
        assert self._forget is not None
        with self._saving:
            self._forget(name)

    async def stop(self) -> None:
        """End the builds."""
        for removal in list(self._leaving.values()):
            await asyncio.wait([removal])
        for build in list(self._builds.values()):
            await self._cancel(build)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _cancel(self, build: Build) -> None:
        if build.is_under_way:
            build.state = "cancelled"
        if build.task is not None:
            await asyncio.wait([build.task])

    def _forget_failures(self) -> None:
        """Keep the builds that became nothing of so many names as there may be banks."""
        ended = [
            name
            for name, build in self._builds.items()
            if not build.is_under_way and name not in self._active
        ]
        for name in ended[: -self._max_banks]:
            del self._builds[name]

    async def _run(
        self, build: Build, labels: Sequence[str], templates: Sequence[str] | None
    ) -> None:
        def check_wanted() -> None:
            if build.state == "cancelled":
                raise _CancelledError

        def progress(done: int, total: int) -> None:
            check_wanted()
            build.done, build.total = done, total

        def work() -> LabelBank:
            check_wanted()
            build.state = "building"
            bank = self._build(build.name, labels, templates, progress)
            if self._save is not None:
                with self._saving:
                    check_wanted()
                    self._save(bank)
            _ = bank.sha256  # which takes a while, and is kept
            return bank

        try:
            bank = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except _CancelledError:
            return
        except (ActionClipError, ValueError, OSError, MemoryError) as exc:
            build.state, build.error = "failed", str(exc) or type(exc).__name__
            return
        if build.state == "cancelled":
            return
        build.version, build.state = self.activate(bank).version, "ready"


class AdhocBanks:
    """Banks by their labels and templates, as the text encoder reads them.

    The ones that were not used for longest go first.

    Args:
        build: Makes a bank of labels and templates, in a thread.
        max_bytes: What the embeddings that are kept may take.
    """

    def __init__(self, build: BuildAdhoc, *, max_bytes: int = _ADHOC_BYTES) -> None:
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
        key = (_alike(labels), _alike(templates))
        if key in self._kept:
            self._kept.move_to_end(key)
            return _worded(self._kept[key], labels, templates)
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
            made = await asyncio.wait_for(asyncio.shield(self._under_way[key]), left)
            return _worded(made, labels, templates)
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


def _alike(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(clean_prompt, texts))


def _worded(made: BankVersion, labels: tuple[str, ...], templates: tuple[str, ...]) -> BankVersion:
    """A version with the texts as a request writes them, which the text encoder reads alike."""
    if (made.bank.labels, made.bank.templates) == (labels, templates):
        return made
    bank = replace(made.bank, labels=labels, templates=templates)
    return replace(made, bank=bank, sha256=bank.sha256)


class TextEncoder:
    """Makes label banks of the texts of strangers, and tokens of their prompts.

    Args:
        bundle: The bundle that is served.
        runtime: Its runtime.
        in_thread: Calls something in the thread of the runtime, between two calls for clips.
        limits: How many texts, and how long.

    Attributes:
        vocabulary: Tokens that the model knows; None for all.
    """

    def __init__(
        self, bundle: Bundle, runtime: Runtime, in_thread: InThread, limits: Limits
    ) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._in_thread = in_thread
        self._limits = limits
        self._tokenizer = Tokenizer.from_file(bundle.file("tokenizer.json"))
        self.vocabulary = read_vocabulary(bundle)
        self._adhoc = AdhocBanks(self._build_adhoc)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.num_tokens

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Tokens of prompts, shape (M, L).

        Raises:
            RequestRefusedError: If there are too many, or one is too long to look at.
            LabelError: If one is empty, holds control characters, or has too many tokens.
        """
        if not texts:
            raise refusals.bad_request("The request has no text; send a list of one or more.")
        if len(texts) > self._limits.rows:
            raise refusals.too_many("texts", len(texts), self._limits.rows)
        self._check_lengths(texts, "texts")
        for index, text in enumerate(texts):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise refusals.bad_value(
                    f"{describe_text(texts, index, 'text')} holds half a character (a surrogate); "
                    "send whole ones."
                )
        return self._tokenizer(
            list(texts),
            context_length=self._bundle.manifest.model.context_length,
            describe=lambda index: describe_text(texts, index, "text"),
        )

    def unknown_words(self, labels: Sequence[str]) -> tuple[str, ...] | None:
        """Words of labels that the model does not know; None of one that knows every token."""
        return unknown_words(labels, self._tokenizer, self.vocabulary)

    def check_bank(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        *,
        allow_unknown_words: bool = False,
    ) -> None:
        """Refuse labels and templates that no bank can be built of, before it is tried.

        Raises:
            RequestRefusedError: If there are too many, or one is too long.
            LabelError: If one cannot be used.
            UnknownWordsError: If the model knows no word of a label.
        """
        limits = self._limits
        self._check_set(labels, templates, limits.bank_labels, limits.bank_prompts)
        if not allow_unknown_words:
            self._check_words(labels)

    def build_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        progress: Callable[[int, int], None],
    ) -> LabelBank:
        """Build a bank of what was checked before; blocks, so it is for a thread."""
        return LabelBank.build(
            self._bundle,
            self._runtime,
            labels,
            name=name,
            templates=templates,
            batch_size=PROMPTS_BETWEEN_CLIPS,
            progress=progress,
            encode_text=self._encode_text,
            allow_unknown_words=True,  # whether they are was asked when the request came
        )

    async def adhoc_bank(
        self,
        labels: tuple[str, ...],
        templates: tuple[str, ...] | None,
        *,
        allow_unknown_words: bool = False,
        deadline: float | None = None,
        noun: str = "label",
    ) -> BankVersion:
        """The bank of the labels that a request brings along, or of the texts of a search.

        Args:
            labels: C labels.
            templates: K templates; None for the bundle's.
            allow_unknown_words: Whether a label is taken of which the model knows no word.
            deadline: When the time for it ends.
            noun: As `check_words` takes it.

        Raises:
            RequestRefusedError: If there are too many, one is too long, or the deadline passes.
            LabelError: If one cannot be used.
            UnknownWordsError: If the model knows no word of one.
        """
        self._check_set(labels, templates, self._limits.labels, self._limits.prompts)
        if not allow_unknown_words:
            self._check_words(labels, noun)
        chosen = self._bundle.manifest.templates if templates is None else templates
        return await self._adhoc.get(labels, tuple(chosen), deadline=deadline)

    def stop(self) -> None:
        """Make no more banks."""
        self._adhoc.stop()

    def _encode_text(self, tokens: NDArray[np.int32]) -> Float32Array:
        embeddings: Float32Array = self._in_thread(self._runtime.encode_text, tokens).result()
        return embeddings

    def _build_adhoc(self, labels: Sequence[str], templates: Sequence[str]) -> BankVersion:
        bank = self.build_bank(ADHOC_NAME, labels, templates, lambda *_: None)
        if bank.unknown_words:
            logger.warning("Labels of a request: %s", describe_unknown_words(bank.unknown_words))
        return BankVersion(bank, 0, bank.sha256, 0.0)

    def _check_set(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        max_labels: int,
        max_prompts: int,
    ) -> None:
        if len(labels) > max_labels:
            raise refusals.too_many("labels", len(labels), max_labels)
        if templates is not None and len(templates) > self._limits.templates:
            raise refusals.too_many("templates", len(templates), self._limits.templates)
        used = self._bundle.manifest.templates if templates is None else templates
        num_prompts = len(labels) * len(used)
        if num_prompts > max_prompts:
            raise refusals.too_many("prompts (labels x templates)", num_prompts, max_prompts)
        self._check_lengths(labels, "labels")
        self._check_lengths(used, "templates")
        check_labels(labels)
        check_templates(used)

    def _check_words(self, labels: Sequence[str], noun: str = "label") -> None:
        templates = self._bundle.manifest.templates
        check_words(labels, self._tokenizer, self.vocabulary, templates=templates, noun=noun)

    def _check_lengths(self, texts: Sequence[str], noun: str) -> None:
        limit = self._limits.text_characters
        longest = max((len(text) for text in texts), default=0)
        if longest > limit:
            raise refusals.too_many(f"characters in one of its {noun}", longest, limit)
