"""Graphs as ONNX Runtime optimised them for this machine, kept so that a later start is quick.

What must never happen is that a graph is answered for by the entry of another. The key of an entry
holds the sha256 of the files that it was made from, which are read and compared with the manifest;
later starts compare size, times and inode, and read the files again if one has changed. Whatever
else goes wrong (a full disk, a folder that cannot be written) costs the time that the cache would
have saved and nothing more, and is logged.

An entry holds `graph.onnx`, the optimised graph, and `graph.data`, its weights, in the layout that
the kernels of this CPU read.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, DamagedFileError
from actionclip_deploy.files import (
    Store,
    StoredEntry,
    cache_folder,
    file_signature,
    remove_folder,
    sha256_of_file,
)
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.onnx_references import read_references

logger = logging.getLogger(__name__)

GRAPH_NAME, DATA_NAME = "graph.onnx", "graph.data"
LIMIT_VARIABLE = "ACTIONCLIP_CACHE_GB"

_DEFAULT_LIMIT_BYTES = 8 * 2**30
_MIN_GRAPH_BYTES = 2**20  # a smaller one is optimised in a few milliseconds
_SPACE_FACTOR = 3  # weights are written as they are and as the kernels want them
_MAX_SIGNATURES = 16  # copies of one bundle that an entry knows
_SETTLED_SECONDS = 2.0  # file systems count time in steps of up to two seconds


class NotCachedError(Exception):
    """A graph cannot be cached; the text says why. Never leaves the runtimes."""


@dataclass(frozen=True)
class GraphFiles:
    """The files of a bundle that a graph consists of, by name: path and sha256 in the manifest."""

    files: Mapping[str, tuple[Path, str]]

    @classmethod
    def of(cls, bundle: Bundle, graph: GraphName) -> GraphFiles:
        """The graph's file and those that hold weights of it."""
        path = bundle.graph_path(graph)
        names = {bundle.manifest.graphs[graph].file, *read_references(path)[0]}
        known = bundle.manifest.files
        return cls({name: (bundle.file(name), known[name].sha256) for name in sorted(names)})

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file, as the manifest has it."""
        return {name: sha256 for name, (_, sha256) in self.files.items()}

    @property
    def paths(self) -> list[Path]:
        """Of the files, by name."""
        return [path for path, _ in self.files.values()]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.paths)

    def signature(self) -> str:
        """What changes when one of the files is written to, and is quick to find out."""
        return " ".join(map(file_signature, self.paths))

    def is_settled(self) -> bool:
        """Whether a write from now on is sure to change the signature."""
        found = [path.stat() for path in self.paths]
        newest = max(max(status.st_mtime, status.st_ctime) for status in found)
        return time.time() - newest > _SETTLED_SECONDS

    def check(self) -> None:
        """Compare the bytes of all files with the manifest.

        Raises:
            NotCachedError: If one was altered.
        """
        for name, (path, sha256) in self.files.items():
            if sha256_of_file(path) != sha256:
                raise NotCachedError(
                    f"{name} does not have the sha256 of the manifest; it was altered: run "
                    "`actionclip verify`, and copy the bundle again or export it again"
                )


class GraphCache:
    """A folder of optimised graphs.

    Args:
        folder: Where; made when it is first needed, for this user alone.
        limit_bytes: What all entries may take together; the least recently used go first.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = _DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._store = Store(folder, limit_bytes=limit_bytes)

    def find_or_make(
        self, files: GraphFiles, made_by: Mapping[str, str], optimise: Callable[[Path], None]
    ) -> Path | None:
        """Path of the optimised graph; None where the cache is of no use, which is logged.

        Args:
            files: What the graph consists of.
            made_by: What an optimised graph depends on besides: library, machine, options.
            optimise: Writes the optimised graph to a path, its weights beside it as `DATA_NAME`;
                raises `NotCachedError` if it cannot.
        """
        try:
            if files.size_bytes < _MIN_GRAPH_BYTES:
                return None
            entry = self._store.find_or_add(
                {"files": files.hashes, **made_by},
                lambda new: self._make(new, files, optimise),
                check=lambda entry: _check(entry, files),
            )
            return entry.folder / GRAPH_NAME
        except (OSError, NotCachedError) as exc:
            logger.warning(
                "%s is used without the cache in %s: %s", files.paths[0], self.folder, exc
            )
            return None

    def discard(self, graph: Path, why: str) -> None:
        """Remove the entry that a path of `find_or_make` belongs to."""
        logger.warning("the cached graph %s is removed: %s", graph.parent, why)
        with suppress(OSError):
            remove_folder(graph.parent)

    def _make(
        self, new: Path, files: GraphFiles, optimise: Callable[[Path], None]
    ) -> dict[str, Any]:
        self._check_space(files)
        before = files.signature()
        # Reading gigabytes for their hash takes as long as optimising them, on a core of its own.
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(files.check)
            optimise(new / GRAPH_NAME)
            checked.result()
        if files.signature() != before:
            raise NotCachedError("its files were written to while it was read")
        try:
            _check_references(new)
        except DamagedFileError as exc:
            raise NotCachedError(f"what was written is of no use, {exc}") from exc
        logger.info("%s was optimised for the cache in %s", files.paths[0], self.folder)
        return {"sources": [before] if files.is_settled() else []}

    def _check_space(self, files: GraphFiles) -> None:
        wanted, free = _SPACE_FACTOR * files.size_bytes, shutil.disk_usage(self.folder).free
        if wanted > min(free, self.limit_bytes):
            raise NotCachedError(
                f"it may take {wanted / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB left "
                f"and the cache may take {self.limit_bytes / 2**20:.0f} MiB ({LIMIT_VARIABLE})"
            )


def _check(entry: StoredEntry, files: GraphFiles) -> None:
    """Hold an entry that is whole to what it is used for: this graph, as it lies there now."""
    _check_references(entry.folder)
    known, signature = entry.record["sources"], files.signature()
    if signature not in known:
        files.check()
        if files.is_settled():
            with suppress(OSError):  # a cache that is read-only is read
                entry.save(sources=[*known, signature][-_MAX_SIGNATURES:])


def _check_references(entry: Path) -> None:
    """Hold an optimised graph to what holds for the graphs of a bundle.

    Raises:
        DamagedFileError: If it refers to a file other than its own weights or to a compiled
            engine, or is not an ONNX file.
    """
    try:
        locations, op_types = read_references(entry / GRAPH_NAME)
    except BundleError as exc:
        raise DamagedFileError(f"{GRAPH_NAME} is not an ONNX file: {exc.__cause__}") from exc
    if not locations <= {DATA_NAME} or "EPContext" in op_types:
        raise DamagedFileError(
            f"it refers to {sorted(locations - {DATA_NAME}) or 'a compiled engine'}"
        )


def open_cache(cache: bool | str | Path) -> GraphCache | None:
    """The cache to use, by the caller's wish and the environment; None for none.

    Args:
        cache: A folder; True for the one of the environment or of the platform; False for none.

    Raises:
        ValueError: If `ACTIONCLIP_CACHE_GB` is not a number above 0.
    """
    folder = cache_folder(cache)
    return None if folder is None else GraphCache(folder / "graphs", limit_bytes=_limit_bytes())


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
