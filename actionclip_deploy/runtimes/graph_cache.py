"""Graphs as a runtime optimised them for this machine, kept so that a later start is quick.

What must never happen is that a graph is answered for by the entry of another. The key of an entry
holds the sha256 of the files that it was made from, and `Bundle.file` held them against it.
Whatever else goes wrong (a full disk, a folder that cannot be written) costs the time that the
cache would have saved and nothing more, and is logged.

An entry of ONNX Runtime holds `graph.onnx`, the optimised graph, and `graph.data`, its weights, in
the layout that the kernels of this CPU read; one of OpenVINO holds `graph.blob`, which is both.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, DamagedFileError
from actionclip_deploy.files import remove_folder
from actionclip_deploy.keyed_store import Store, cache_folder, file_signature
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.onnx_references import check_onnx_file, read_references

logger = logging.getLogger(__name__)

GRAPH_NAME, DATA_NAME = "graph.onnx", "graph.data"
BLOB_NAME = "graph.blob"  # of OpenVINO
LIMIT_VARIABLE = "ACTIONCLIP_CACHE_GB"

_DEFAULT_LIMIT_BYTES = 8 * 2**30
_MAX_LIMIT_GIB = 2**20  # more than any disk
_MIN_GRAPH_BYTES = 2**20  # a smaller one is optimised in a few milliseconds
_SPACE_FACTOR = 3  # weights are written as they are and as the kernels want them


class NotCachedError(Exception):
    """A graph cannot be cached; the text says why. Never leaves the runtimes."""


@dataclass(frozen=True)
class GraphFiles:
    """The files of a bundle that a graph consists of.

    Attributes:
        graph: The ONNX file.
        files: That one and those of its weights, by name: path and sha256 in the manifest.
        are_verified: Whether they have these hashes.
    """

    graph: Path
    files: Mapping[str, tuple[Path, str]]
    are_verified: bool

    @classmethod
    def of(cls, bundle: Bundle, graph: GraphName) -> GraphFiles:
        """The graph's file and those that hold weights of it, fit for use.

        Raises:
            BundleError: If it is not an ONNX file.
            IntegrityError: If a file was altered, or refers to what is not of the bundle.
        """
        path = bundle.graph_path(graph)
        paths = {bundle.manifest.graphs[graph].file: path, **check_onnx_file(path, bundle)}
        known = bundle.manifest.files
        files = {name: (paths[name], known[name].sha256) for name in sorted(paths)}
        return cls(path, files, bundle.verify)

    @property
    def key(self) -> dict[str, Any]:
        """What tells them from others; the hashes alone would speak for files that lack them."""
        unverified = {} if self.are_verified else {"unverified": self.signature()}
        return {"files": self.hashes, **unverified}

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
        self,
        files: GraphFiles,
        made_by: Mapping[str, str],
        optimise: Callable[[Path], None],
        *,
        name: str = GRAPH_NAME,
    ) -> Path | None:
        """Path of the optimised graph; None where the cache is of no use, which is logged.

        Args:
            files: What the graph consists of.
            made_by: What an optimised graph depends on besides: library, machine, options.
            optimise: Writes the optimised graph to a path, its weights beside it as `DATA_NAME`;
                raises `NotCachedError` if it cannot.
            name: Of the optimised graph's file; what is an ONNX file is held to what holds for
                the graphs of a bundle.
        """

        def check(folder: Path) -> None:
            if name == GRAPH_NAME:
                _check_references(folder)
            elif not (folder / name).is_file():
                raise DamagedFileError(f"{name} is missing")

        try:
            if files.size_bytes < _MIN_GRAPH_BYTES:
                return None
            entry = self._store.find_or_add(
                {**files.key, **made_by},
                lambda new: self._make(new / name, files, optimise, check),
                check=lambda entry: check(entry.folder),
            )
            return entry.folder / name
        except (OSError, NotCachedError) as exc:
            logger.warning("%s is used without the cache in %s: %s", files.graph, self.folder, exc)
            return None

    def discard(self, graph: Path, why: str) -> None:
        """Remove the entry that a path of `find_or_make` belongs to."""
        logger.warning("the cached graph %s is removed: %s", graph.parent, why)
        with suppress(OSError):
            remove_folder(graph.parent)

    def _make(
        self,
        new: Path,
        files: GraphFiles,
        optimise: Callable[[Path], None],
        check: Callable[[Path], None],
    ) -> None:
        self._check_space(files)
        before = files.signature()
        optimise(new)
        if files.signature() != before:
            raise NotCachedError("its files were written to while it was read")
        try:
            check(new.parent)
        except DamagedFileError as exc:
            raise NotCachedError(f"what was written is of no use, {exc}") from exc
        logger.info("%s was optimised for the cache in %s", files.graph, self.folder)

    def _check_space(self, files: GraphFiles) -> None:
        wanted, free = _SPACE_FACTOR * files.size_bytes, shutil.disk_usage(self.folder).free
        if wanted > min(free, self.limit_bytes):
            raise NotCachedError(
                f"it may take {wanted / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB left "
                f"and the cache may take {self.limit_bytes / 2**20:.0f} MiB ({LIMIT_VARIABLE})"
            )


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
    if not 0 < limit <= _MAX_LIMIT_GIB:
        raise ValueError(
            f"{LIMIT_VARIABLE} is {text!r}; it must be a number of GiB above 0, such as 8, and at "
            f"most {_MAX_LIMIT_GIB}."
        )
    return int(limit * 2**30)
