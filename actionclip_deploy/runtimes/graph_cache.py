"""Graphs as ONNX Runtime optimised them for this machine, kept so that a later start is quick.

What must never happen is that a graph is answered for by the entry of another. The name of an
entry holds the sha256 of the files that it was made from, which are read and compared with the
manifest; later starts compare size, times and inode, and read the files again if one has changed.
An entry that was altered is made anew. Whatever else goes wrong (a full disk, a folder that cannot
be written) costs the time that the cache would have saved and nothing more, and is logged.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from actionclip_deploy.runtimes.cache_entries import (
    GRAPH_NAME,
    RECORD_NAME,
    TEMPORARY,
    NotCachedError,
    Source,
    check_entry,
    check_references,
    check_source,
    describe_file,
    is_settled,
    key_of,
    put_in_place,
    remove_entry,
    write_record,
)

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "ACTIONCLIP_CACHE"
LIMIT_VARIABLE = "ACTIONCLIP_CACHE_GB"

_DEFAULT_LIMIT_BYTES = 8 * 2**30
_MIN_GRAPH_BYTES = 2**20  # a smaller one is optimised in a few milliseconds
_SPACE_FACTOR = 3  # weights are written as they are and as the kernels want them
_MAX_SIGNATURES = 16  # copies of one bundle that an entry knows
_ABANDONED_SECONDS = 3600.0


class GraphCache:
    """A folder of optimised graphs.

    Args:
        folder: Where; made when it is first needed, for this user alone.
        limit_bytes: What all entries may take together; the least recently used go first.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = _DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def find_or_make(
        self, source: Source, made_by: Mapping[str, str], optimise: Callable[[Path], None]
    ) -> Path | None:
        """Path of the optimised graph; None where the cache is of no use, which is logged.

        Args:
            source: What the graph consists of.
            made_by: What an optimised graph depends on besides: library, machine, options.
            optimise: Writes the optimised graph to a path, its weights beside it as `DATA_NAME`;
                raises `NotCachedError` if it cannot.
        """
        try:
            if source.size_bytes < _MIN_GRAPH_BYTES:
                return None
            self.check_folder()
            entry = self.folder / key_of(source, made_by)
            if not self._is_good(entry, source):
                self._make(entry, source, made_by, optimise)
            with suppress(OSError):
                os.utime(entry / RECORD_NAME)
            return entry / GRAPH_NAME
        except (OSError, NotCachedError) as exc:
            logger.warning("%s is used without the cache in %s: %s", source.name, self.folder, exc)
            return None

    def discard(self, graph: Path, why: str) -> None:
        """Remove the entry that a path of `find_or_make` belongs to."""
        logger.warning("the cached graph %s is removed: %s", graph.parent, why)
        remove_entry(graph.parent)

    def check_folder(self) -> None:
        """Make the folder, and refuse one in which other users could place a graph."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sys.platform == "win32":
            return
        status = self.folder.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotCachedError(
                "other users may write to it; choose a folder of your own with "
                f"{FOLDER_VARIABLE}, or run chmod go-w on it"
            )

    def _is_good(self, entry: Path, source: Source) -> bool:
        if not entry.is_dir():
            return False
        try:
            record = json.loads((entry / RECORD_NAME).read_text(encoding="utf-8"))
            changed = check_entry(entry, record)
            known = record["sources"]
            signature = source.signature()
            if signature not in known:
                check_source(source)
                if is_settled(source):
                    record["sources"] = [*known, signature][-_MAX_SIGNATURES:]
                    changed = True
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            logger.warning("the cached graph %s is made anew: %s", entry, exc)
            return False
        if changed:
            with suppress(OSError):
                write_record(entry, record)
        return True

    def _make(
        self,
        entry: Path,
        source: Source,
        made_by: Mapping[str, str],
        optimise: Callable[[Path], None],
    ) -> None:
        self._check_space(source)
        new = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
        try:
            before = source.signature()
            with ThreadPoolExecutor(1) as pool:
                checked = pool.submit(check_source, source)
                optimise(new / GRAPH_NAME)
                checked.result()
            if source.signature() != before:
                raise NotCachedError("its files were written to while it was read")
            try:
                check_references(new)
            except ValueError as exc:
                raise NotCachedError(f"what was written is of no use, {exc}") from exc
            files = {path.name: describe_file(path) for path in sorted(new.iterdir())}
            sources = [before] if is_settled(source) else []
            record = {"made_by": dict(made_by), "sources": sources, "files": files}
            write_record(new, record)
            put_in_place(new, entry)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        logger.info("%s was optimised and is kept in %s", source.name, entry)
        self._prune(keep=entry)

    def _check_space(self, source: Source) -> None:
        wanted, free = _SPACE_FACTOR * source.size_bytes, shutil.disk_usage(self.folder).free
        if wanted > min(free, self.limit_bytes):
            raise NotCachedError(
                f"it may take {wanted / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB left "
                f"and the cache may take {self.limit_bytes / 2**20:.0f} MiB ({LIMIT_VARIABLE})"
            )

    def _prune(self, *, keep: Path) -> None:
        """Remove the least recently used entries beyond the limit, and what a crash left."""
        entries = []
        for folder in self.folder.iterdir():
            with suppress(OSError):  # another process may remove it at the same time
                if folder.name.startswith(TEMPORARY):
                    if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                        remove_entry(folder)
                    continue
                size = sum(path.stat().st_size for path in folder.iterdir())
                entries.append(((folder / RECORD_NAME).stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total > self.limit_bytes and folder != keep:
                logger.info("the cached graph %s is removed to stay below the limit", folder)
                remove_entry(folder)
                total -= size


def open_cache(cache: bool | str | Path) -> GraphCache | None:
    """The cache to use, after the caller's wish and the environment; None for none.

    Args:
        cache: A folder; True for the one of the environment or of the platform; False for none.

    Raises:
        ValueError: If `ACTIONCLIP_CACHE_GB` is no number above 0.
    """
    folder = cache_folder(cache)
    return None if folder is None else GraphCache(folder / "graphs", limit_bytes=_limit_bytes())


def cache_folder(cache: bool | str | Path = True) -> Path | None:
    """Where everything that is cached lies, after the caller's wish and the environment.

    Args:
        cache: A folder; True for the one of the environment or of the platform; False for none.

    Returns:
        The folder, which need not exist; None for none.
    """
    setting = os.environ.get(FOLDER_VARIABLE, "").strip()
    if cache is False or (cache is True and setting.lower() in ("off", "0")):
        return None
    try:
        folder = Path(cache) if cache is not True else Path(setting or _platform_folder())
        return folder.expanduser()
    except RuntimeError as exc:  # there is no home
        logger.warning("nothing is cached: %s; name a folder with %s", exc, FOLDER_VARIABLE)
        return None


def _limit_bytes() -> int:
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return _DEFAULT_LIMIT_BYTES
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(
            f"{LIMIT_VARIABLE} is {text!r}; it must be a number of GiB above 0, such as 8."
        )
    return int(limit * 2**30)


def _platform_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/actionclip-deploy"
    if sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA")
        return Path(given or Path.home() / "AppData/Local") / "actionclip-deploy/cache"
    given = os.environ.get("XDG_CACHE_HOME")
    # The specification of these folders says to ignore a relative path.
    base = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return base / "actionclip-deploy"
