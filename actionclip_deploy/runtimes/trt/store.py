"""Where engines are kept: outside of the bundle, under a key of everything that they depend on.

Entries are written aside and renamed, so that nobody finds half of one.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.cache_entries import (
    TEMPORARY,
    NotCachedError,
    put_in_place,
    remove_entry,
    write_record,
)
from actionclip_deploy.runtimes.graph_cache import FOLDER_VARIABLE, GraphCache, cache_folder
from actionclip_deploy.runtimes.trt.engine_entries import (
    EngineKey,
    Entry,
    graph_hashes,
    is_whole,
    read_entry,
    sha256_of,
)

logger = logging.getLogger(__name__)


_ABANDONED_SECONDS = 24 * 3600.0  # a build takes minutes, hours on the smallest devices


class EngineStore:
    """The folder of all engines of this user.

    Args:
        folder: Where; made when it is first written to, for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: EngineKey) -> tuple[Entry | None, str | None]:
        """The entry of a key, and why one that is there is not used."""
        folder = self.folder / key.name
        if not folder.is_dir():
            return None, None
        try:
            entry = read_entry(folder)
            for graph in key.shapes:
                entry.plan(graph)
        except EngineError as exc:
            return None, str(exc)
        return entry, None

    def add(
        self,
        key: EngineKey,
        plans: Mapping[str, bytes],
        details: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> Entry:
        """Write an entry; of two processes that write the same one, the first one's stays.

        Args:
            key: What the engines depend on.
            plans: By the name of the graph.
            details: What the record says besides.
            replace: Whether an entry that is there and whole is replaced.

        Raises:
            EngineError: If it cannot be written.
        """
        record = {
            "key": key.to_dict(),
            "plans": {
                graph: {"size": len(plan), "sha256": sha256_of(plan)}
                for graph, plan in plans.items()
            },
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "audit": {},
            "verified": {},
            **details,
        }
        entry = self.folder / key.name
        with self._errors_told():
            GraphCache(self.folder).check_folder()
            new = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
            try:
                for graph, plan in plans.items():
                    (new / f"{graph}.plan").write_bytes(plan)
                write_record(new, record)
                if replace or not is_whole(entry):
                    put_in_place(new, entry)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return read_entry(entry)

    def check_writable(self) -> None:
        """Try to write to the folder, so that no build of an hour ends in nothing.

        Raises:
            EngineError: If it cannot be written to, or others may.
        """
        with self._errors_told():
            GraphCache(self.folder).check_folder()
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.folder):
                pass

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, NotCachedError) as exc:
            raise EngineError(
                f"The engine cannot be kept in {self.folder} ({exc}); name another folder with "
                f"{FOLDER_VARIABLE}."
            ) from exc

    def entries(self) -> list[Entry]:
        """All entries whose record can be read, the newest first."""
        found = []
        for folder in self._folders():
            try:
                found.append(read_entry(folder))
            except EngineError as exc:
                logger.warning("%s", exc)
        return sorted(found, key=lambda entry: str(entry.record["built"]), reverse=True)

    def of_bundle(self, bundle: Bundle, runtime: str) -> list[Entry]:
        """Entries whose graphs are those of a bundle, for a runtime, the newest first."""
        hashes = graph_hashes(bundle)
        return [
            entry
            for entry in self.entries()
            if entry.key["graphs"] == hashes and entry.key["place"]["runtime"] == runtime
        ]

    def remove(self, name: str) -> Entry:
        """Remove the entry whose name begins with a text.

        Raises:
            EngineError: If none does, or several.
        """
        found = [folder for folder in self._folders() if name and folder.name.startswith(name)]
        if len(found) != 1:
            raise EngineError(
                f"{len(found)} engines in {self.folder} have a name that begins with {name!r}; "
                "give one name as `actionclip engines list` prints it."
            )
        entry = _read_or_empty(found[0])
        remove_entry(found[0])
        return entry

    def prune(self, is_usable: Callable[[Entry], bool]) -> list[Path]:
        """Remove what can serve no more: damaged entries, remains of a crash, and those refused.

        Args:
            is_usable: Whether an entry that is whole is to stay.

        Returns:
            The folders that were removed.
        """
        removed = []
        for folder in self._folders(with_remains=True):
            if folder.name.startswith(TEMPORARY):
                keep = time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS
            else:
                keep = is_whole(folder) and is_usable(read_entry(folder))
            if not keep:
                remove_entry(folder)
                removed.append(folder)
        return removed

    def _folders(self, *, with_remains: bool = False) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [
            folder
            for folder in sorted(self.folder.iterdir())
            if folder.is_dir() and (with_remains or not folder.name.startswith(TEMPORARY))
        ]


def open_store(cache: bool | str | Path = True) -> EngineStore:
    """The store of this user.

    Raises:
        EngineError: If caches are switched off, since engines have no other place.
    """
    folder = cache_folder(cache)
    if folder is None:
        raise EngineError(
            f"Engines are kept in the cache, which is off; set {FOLDER_VARIABLE} to a folder."
        )
    return EngineStore(engines_folder(folder))


def engines_folder(cache: Path) -> Path:
    """Where engines lie in the folder of a cache."""
    return cache / "engines"


def _read_or_empty(folder: Path) -> Entry:
    try:
        return read_entry(folder)
    except EngineError:
        return Entry(folder, {})
