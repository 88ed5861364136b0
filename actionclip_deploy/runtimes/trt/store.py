"""Where engines are kept: outside of the bundle, under a key of everything that they depend on.

Entries are written aside and renamed, so that nobody finds half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.cache_entries import (
    RECORD_NAME,
    TEMPORARY,
    NotCachedError,
    Source,
    put_in_place,
    remove_entry,
    write_record,
)
from actionclip_deploy.runtimes.graph_cache import FOLDER_VARIABLE, GraphCache, cache_folder
from actionclip_deploy.runtimes.machine import nvidia_driver, read_jetson
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.plan import BuildOptions, ShapeRange

logger = logging.getLogger(__name__)


# The engines of a bundle as they are kept: the key of what they depend on, and their record.
#
# An entry is a folder: a plan for each graph, and `entry.json`, which holds the key, how the
# engines
# were built, what the audit found, and on which cards they passed verification. The folder's
# name is
# the hash of the key, so a record that was changed no longer fits its name; the plans'
# checksums are
# in the record.


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


# Where an engine was built and where it may run.


_ANY = "any"
_FIELDS = ("runtime", "version", "gpu", "compute_capability", "cuda", "driver", "l4t")
_ROOT = Path("/")


@dataclass(frozen=True)
class Place:
    """A machine with a TensorRT."""

    # What an engine depends on, of `_FIELDS`; only the first two where there is no GPU.
    fields: dict[str, str]
    # The very card with driver and versions, on which a verification counts; None without a GPU.
    card: str | None

    def built_with(self, options: BuildOptions) -> dict[str, str]:
        """The place that an engine built here with some options is for."""
        place = dict(self.fields)
        if options.targets:
            return {"runtime": place["runtime"], "version": place["version"]}
        if options.hardware_compatible:
            place |= {"gpu": _ANY, "compute_capability": _ANY}
        if options.version_compatible:
            place |= {"version": _ANY}
        return place

    def differences(self, entry: Entry) -> list[str]:
        """In words, why an engine cannot run here; empty if it can."""
        built: dict[str, Any] = entry.key["place"]
        return [
            f"{name.replace('_', ' ')} {built[name]} and not {self.fields.get(name, 'none')}"
            for name in _FIELDS
            if name in built and built[name] not in (_ANY, self.fields.get(name))
        ]


def find_place(api: Api, cuda: Cuda | None, *, root: Path = _ROOT) -> Place:
    """The place that this process is at.

    Without `cuda` it has no GPU, which TensorRT for RTX can build without. `root` is where `/proc`
    and `/etc` are, another folder in tests.
    """
    fields = {"runtime": api.name, "version": api.version}
    if cuda is None:
        return Place(fields, None)
    # The power mode, for which alone another program would be asked, is no part of a place.
    device, jetson = cuda.device, read_jetson(root, query=lambda: "")
    fields |= {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "cuda": device.driver,
        "driver": nvidia_driver(root) or "unknown",
        "l4t": (jetson.l4t if jetson else None) or "none",
    }
    card = (device.uuid, fields["driver"], device.driver, api.name, api.version)
    return Place(fields, " ".join(card))
