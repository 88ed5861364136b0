"""What an entry of the cache of graphs is made of, and how it is told from a damaged one.

An entry is a folder: `graph.onnx`, the optimised graph; `graph.data`, its weights, in the layout
that the kernels of this CPU read; and `entry.json`, which says what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle, sha256_of_file
from actionclip_deploy.errors import BundleError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.onnx_references import read_references

GRAPH_NAME, DATA_NAME, RECORD_NAME = "graph.onnx", "graph.data", "entry.json"
TEMPORARY = ".new-"

_FORMAT = 1  # of an entry; another one makes other names
_SETTLED_SECONDS = 2.0  # file systems count time in steps of up to two seconds


class NotCachedError(Exception):
    """A graph cannot be cached; the text says why. Never leaves the runtimes."""


@dataclass(frozen=True)
class Source:
    """The files of a bundle that a graph consists of, by name: path and sha256 in the manifest."""

    files: Mapping[str, tuple[Path, str]]

    @classmethod
    def of(cls, bundle: Bundle, graph: GraphName) -> Source:
        """The graph's file and those that hold weights of it."""
        path = bundle.graph_path(graph)
        names = {bundle.manifest.graphs[graph].file, *read_references(path)[0]}
        known = bundle.manifest.files
        return cls({name: (bundle.file(name), known[name].sha256) for name in sorted(names)})

    @property
    def name(self) -> str:
        """The path of a file of it, for messages."""
        return str(next(path for path, _ in self.files.values()))

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path, _ in self.files.values())

    def signature(self) -> str:
        """What changes when one of the files is written to, and is quick to find out."""
        return " ".join(_signature(path) for path, _ in self.files.values())

    def altered_file(self) -> str | None:
        """The first file whose bytes are not those of the manifest; reads all of them."""
        for name, (path, sha256) in self.files.items():
            if sha256_of_file(path) != sha256:
                return name
        return None


def key_of(source: Source, made_by: Mapping[str, str]) -> str:
    """Name of the entry of a graph."""
    hashes = {name: sha256 for name, (_, sha256) in source.files.items()}
    text = json.dumps([_FORMAT, hashes, dict(made_by)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _signature(path: Path) -> str:
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_size} {times} {status.st_ino} {status.st_dev}"


def is_settled(source: Source) -> bool:
    """Whether a write from now on is sure to change the signature."""
    newest = max(
        max(status.st_mtime, status.st_ctime)
        for status in (path.stat() for path, _ in source.files.values())
    )
    return time.time() - newest > _SETTLED_SECONDS


def check_source(source: Source) -> None:
    """Compare the files of a graph with the manifest.

    Raises:
        NotCachedError: If one was altered.
    """
    altered = source.altered_file()
    if altered is not None:
        raise NotCachedError(
            f"{altered} does not have the sha256 of the manifest; it was altered: run "
            "`actionclip verify`, and copy the bundle again or export it again"
        )


def describe_file(path: Path) -> dict[str, str | int]:
    """What the record says of a file of the entry."""
    size = path.stat().st_size
    return {"size": size, "sha256": sha256_of_file(path), "signature": _signature(path)}


def check_entry(entry: Path, record: dict[str, Any]) -> bool:
    """Compare the files of an entry with its record; tells whether the record was changed.

    Raises:
        ValueError: If one is damaged; says how.
    """
    changed = False
    for name in {GRAPH_NAME, *record["files"]}:
        path, given = entry / name, record["files"][name]
        if Path(name).name != name or path.stat().st_size != given["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {given['size']}")
        if _signature(path) != given["signature"]:
            if sha256_of_file(path) != given["sha256"]:
                raise ValueError(f"{name} was altered after it was written")
            given["signature"] = _signature(path)
            changed = True
    check_references(entry)
    return changed


def check_references(entry: Path) -> None:
    """Hold an optimised graph to what holds for the graphs of a bundle.

    Raises:
        ValueError: If it refers to a file other than its own weights or to a compiled engine, or
            is no ONNX file.
    """
    try:
        locations, op_types = read_references(entry / GRAPH_NAME)
    except BundleError as exc:
        raise ValueError(f"{GRAPH_NAME} is no ONNX file: {exc.__cause__}") from exc
    if not locations <= {DATA_NAME} or "EPContext" in op_types:
        raise ValueError(f"it refers to {sorted(locations - {DATA_NAME}) or 'a compiled engine'}")


def write_record(entry: Path, record: Mapping[str, object]) -> None:
    """Write or replace the record of an entry."""
    replace_file(entry / RECORD_NAME, json.dumps(record, indent=2).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds all of it or what was there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def put_in_place(new: Path, entry: Path) -> None:
    """Give a finished entry its name; where another process was first, one of the two stays."""
    with suppress(OSError):
        new.rename(entry)
        return
    # What stands there is damaged, or as good as this one.
    remove_entry(entry)
    with suppress(OSError):
        new.rename(entry)
    if not (entry / RECORD_NAME).is_file():
        raise NotCachedError(f"{entry} cannot be replaced")


def remove_entry(folder: Path) -> None:
    """Remove an entry so that nobody finds half of it."""
    aside = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
