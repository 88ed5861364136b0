"""The engines of a bundle as they are kept: the key of what they depend on, and their record.

An entry is a folder: a plan for each graph, and `entry.json`, which holds the key, how the engines
were built, what the audit found, and on which cards they passed verification. The folder's name is
the hash of the key, so a record that was changed no longer fits its name; the plans' checksums are
in the record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.cache_entries import RECORD_NAME, Source, write_record
from actionclip_deploy.runtimes.trt.profiles import ShapeRange

_FORMAT = 1
_KEY_LENGTH = 24


@dataclass(frozen=True)
class EngineKey:
    """Everything that the engines of a bundle depend on.

    Attributes:
        graphs: Of each graph, the sha256 of its files by name.
        place: What builds and what runs: runtime, version, GPU, compute capability, CUDA, driver,
            L4T.
        precision: Of the graph that does nearly all the work.
        shapes: Of each graph's input, in each optimization profile.
        options: Of the build, and the rewrite of the graph if there was one.
    """

    graphs: Mapping[str, Mapping[str, str]]
    place: Mapping[str, str]
    precision: str
    shapes: Mapping[str, tuple[ShapeRange, ...]]
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As the record holds it."""
        return {
            "format": _FORMAT,
            "graphs": {name: dict(files) for name, files in self.graphs.items()},
            "place": dict(self.place),
            "precision": self.precision,
            "shapes": {name: [s.to_list() for s in shapes] for name, shapes in self.shapes.items()},
            "options": dict(self.options),
        }

    @property
    def name(self) -> str:
        """Name of the entry."""
        return hash_of(self.to_dict())


def hash_of(key: Mapping[str, Any]) -> str:
    """The name that belongs to the key of a record."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def graph_hashes(bundle: Bundle) -> dict[str, dict[str, str]]:
    """The sha256 of the files of each graph, as the manifest has them."""
    return {
        graph: {name: sha256 for name, (_, sha256) in Source.of(bundle, graph).files.items()}
        for graph in bundle.manifest.graphs
    }


@dataclass(frozen=True)
class Entry:
    """One entry of the store; `record` is what `entry.json` holds."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The key's hash."""
        return self.folder.name

    @property
    def key(self) -> dict[str, Any]:
        """What the engines depend on."""
        key: dict[str, Any] = self.record["key"]
        return key

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def plan(self, graph: str) -> bytes:
        """The plan of a graph, after its checksum was compared.

        Raises:
            EngineError: If it is missing or damaged.
        """
        given = self.record["plans"].get(graph)
        path = self.folder / f"{graph}.plan"
        try:
            data = path.read_bytes() if given else b""
        except OSError as exc:
            raise EngineError(f"{path} cannot be read ({exc}); build the engine again.") from exc
        if not given or len(data) != given["size"] or sha256_of(data) != given["sha256"]:
            raise EngineError(
                f"{path} has {len(data)} bytes that are not those that were built; build the "
                "engine again with `actionclip build`."
            )
        return data

    def shapes(self, graph: str) -> tuple[ShapeRange, ...]:
        """Of the graph's input, in each profile."""
        return tuple(ShapeRange.from_list(shape) for shape in self.key["shapes"][graph])

    @property
    def rewrites(self) -> dict[str, str]:
        """By the name of a graph, which rewrite of it the engine is of; empty for none."""
        return dict(self.key["options"].get("rewrites", {}))

    def verified_on(self, card: str | None) -> bool | None:
        """Whether verification passed on a card; None where it was not tried there."""
        found = self.record["verified"].get(str(card))
        return None if found is None else bool(found["passed"])

    def save(self, **changes: Any) -> Entry:
        """Write the record with some of its fields replaced."""
        entry = Entry(self.folder, {**self.record, **changes})
        write_record(self.folder, entry.record)
        return entry


def read_entry(folder: Path) -> Entry:
    """Read the record of an entry.

    Raises:
        EngineError: If it cannot be read, or is not the record of this entry.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        entry = Entry(folder, record)
        fits = hash_of(entry.key) == folder.name and entry.key["format"] == _FORMAT
        complete = all(isinstance(record[name], dict) for name in ("plans", "verified", "audit"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(
            f"The record of the engine {folder} cannot be read ({type(exc).__name__}: {exc}); "
            "build it again with `actionclip build`."
        ) from exc
    if not fits or not complete:
        raise EngineError(
            f"The record of the engine {folder} is not the one that was written: its key gives "
            "another name. Build it again with `actionclip build`."
        )
    return entry


def is_whole(folder: Path) -> bool:
    """Whether the record and every plan are what was written."""
    try:
        entry = read_entry(folder)
        for graph in entry.record["plans"]:
            entry.plan(graph)
    except EngineError:
        return False
    return True


def sha256_of(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()
