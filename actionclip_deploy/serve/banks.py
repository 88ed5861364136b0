"""Named label banks with versions, built in the background and activated at once.

A request takes the active version when it begins and keeps it, so one answer never mixes two.
Everything here happens in the event loop but for the builds, which have a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, cast

from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.labels import LabelBank, LabelBankDiff, diff_label_banks
from actionclip_deploy.serve import refusals

_KEPT_VERSIONS = 10

Progress = Callable[[int, int], None]
BuildBank = Callable[[str, Sequence[str], Sequence[str] | None, Progress], LabelBank]
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
    """

    name: str
    state: State = "waiting"
    done: int = 0
    total: int = 0
    error: str | None = None
    version: int | None = None
    num_bytes: int = 0
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
    """

    def __init__(
        self,
        build: BuildBank,
        *,
        max_banks: int,
        max_bytes: int,
        on_change: Callable[[str, BankVersion | None], None] | None = None,
        save: Callable[[LabelBank], object] | None = None,
    ) -> None:
        self._build = build
        self._max_banks = max_banks
        self._max_bytes = max_bytes
        self._on_change = on_change
        self._save = save
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
        version = self._last_version.get(bank.name, 0) + 1
        active = BankVersion(bank, version, bank.sha256, time.time())
        return self._activate(active)

    def start_build(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        *,
        num_bytes: int = 0,
    ) -> Build:
        """Build a bank in the background; it becomes active once it is done.

        Args:
            name: Of the bank.
            labels: C labels.
            templates: K templates; None for the bundle's.
            num_bytes: What its embeddings will take.

        Raises:
            RequestRefusedError: If this bank is being built (409), or there are too many (413).
        """
        known = self._builds.get(name)
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
        build = Build(name, num_bytes=num_bytes)
        self._builds[name] = build
        self._forget_failures()
        build.task = asyncio.ensure_future(self._run(build, labels, templates))
        return build

    async def remove(self, name: str) -> None:
        """Remove a bank and end its build; requests that have begun finish with it.

        Raises:
            RequestRefusedError: If there is neither bank nor build (404).
        """
        build = self._builds.get(name)
        was_building = build is not None and build.is_under_way
        if not was_building:
            self.get(name)
        self._active.pop(name, None)
        self._history.pop(name, None)
        if self._on_change is not None:
            self._on_change(name, None)
        if build is not None:
            await self._cancel(build)
            if self._builds.get(name) is build:  # and not one that was begun meanwhile
                del self._builds[name]

    async def stop(self) -> None:
        """End the builds."""
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
        def progress(done: int, total: int) -> None:
            if build.state == "cancelled":
                raise _CancelledError
            build.done, build.total = done, total

        def work() -> tuple[LabelBank, str]:
            if build.state == "cancelled":
                raise _CancelledError
            build.state = "building"
            bank = self._build(build.name, labels, templates, progress)
            if self._save is not None:
                self._save(bank)
            return bank, bank.sha256

        try:
            bank, sha256 = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except _CancelledError:
            return
        except (ActionClipError, ValueError, OSError, MemoryError) as exc:
            build.state, build.error = "failed", str(exc) or type(exc).__name__
            return
        if build.state == "cancelled":
            return
        version = self._last_version.get(build.name, 0) + 1
        self._activate(BankVersion(bank, version, sha256, time.time()))
        build.version, build.state = version, "ready"

    def _activate(self, active: BankVersion) -> BankVersion:
        name, bank = active.name, active.bank
        self._last_version[name] = active.version
        old = OldVersion(
            active.version, active.sha256, active.activated_seconds, bank.labels, bank.templates
        )
        self._history[name] = [*self._history.get(name, []), old][-_KEPT_VERSIONS:]
        self._active[name] = active
        if self._on_change is not None:
            self._on_change(name, active)
        return active
