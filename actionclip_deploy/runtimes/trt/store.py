"""Where engines are kept: outside of the bundle, under a key of everything that they depend on.

An entry holds a plan for each graph, and a record of how the engines were built, what the audit
found, and on which cards they passed verification.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import DamagedFileError, EngineError, FileWriteError
from actionclip_deploy.files import remove_folder, sha256_of
from actionclip_deploy.keyed_store import CACHE_VARIABLE, Store, StoredEntry, cache_folder, key_name
from actionclip_deploy.runtimes.graph_cache import GraphFiles
from actionclip_deploy.runtimes.machine import nvidia_driver, read_jetson
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.plan import BuildOptions, ShapeRange

logger = logging.getLogger(__name__)

_FORMAT = 1


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
        return key_name(self.to_dict())


def graph_hashes(bundle: Bundle) -> dict[str, dict[str, str]]:
    """The sha256 of the files of each graph, which they have."""
    return {graph: GraphFiles.of(bundle, graph).hashes for graph in bundle.manifest.graphs}


@dataclass(frozen=True)
class Entry(StoredEntry):
    """The engines of a bundle, as the store keeps them."""

    def plan(self, graph: str) -> bytes:
        """The plan of a graph, after its checksum was compared.

        Raises:
            EngineError: If it is missing or damaged.
        """
        try:
            return self.read(_plan_name(graph))
        except DamagedFileError as exc:
            raise EngineError(_in_words(self.folder, exc)) from exc

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


class EngineStore:
    """The folder of all engines of this user.

    Args:
        folder: Where; made when it is first written to, for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store = Store(folder, upgrade=_checked_record)

    def find(self, key: EngineKey) -> tuple[Entry | None, str | None]:
        """The entry of a key, and why one that is there is not used."""
        try:
            found = self._store.find(key.to_dict())
        except (DamagedFileError, FileWriteError) as exc:
            return None, _in_words(self.folder / key.name, exc)
        return None if found is None else Entry(found.folder, found.record), None

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

        def write(folder: Path) -> dict[str, Any]:
            for graph, plan in plans.items():
                (folder / _plan_name(graph)).write_bytes(plan)
            return {
                "plans": {
                    graph: {"size": len(plan), "sha256": sha256_of(plan)}
                    for graph, plan in plans.items()
                },
                "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "audit": {},
                "verified": {},
                **details,
            }

        with self._errors_told():
            added = self._store.add(key.to_dict(), write, replace=replace)
        return Entry(added.folder, added.record)

    def check_writable(self) -> None:
        """Try to write to the folder, so that no build of an hour ends in nothing.

        Raises:
            EngineError: If it cannot be written to, or others may.
        """
        with self._errors_told():
            self._store.check_writable()

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except FileWriteError as exc:
            raise EngineError(
                f"The engine cannot be kept in {self.folder} ({exc.strerror}); name another "
                f"folder with {CACHE_VARIABLE}."
            ) from exc

    def entries(self) -> list[Entry]:
        """All entries whose record can be read, the newest first."""
        found = []
        for folder in self._store.folders():
            try:
                found.append(Entry(folder, self._store.read(folder).record))
            except DamagedFileError as exc:
                logger.warning("%s", _in_words(folder, exc))
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

        Returns:
            What it was; with an empty record where that could not be read.

        Raises:
            EngineError: If none does, or several, or it cannot be removed.
        """
        found = [path for path in self._store.folders() if name and path.name.startswith(name)]
        if len(found) != 1:
            raise EngineError(
                f"{len(found)} engines in {self.folder} have a name that begins with {name!r}; "
                "give one name as `actionclip engines list` prints it."
            )
        record: dict[str, Any] = {}
        with suppress(DamagedFileError):
            record = self._store.read(found[0]).record
        try:
            remove_folder(found[0])
        except OSError as exc:
            raise EngineError(
                f"{found[0]} cannot be removed ({exc.strerror}); remove it yourself."
            ) from exc
        return Entry(found[0], record)

    def prune(self, is_usable: Callable[[Entry], bool]) -> list[Path]:
        """Remove what can serve no more: damaged entries, remains of a crash, and those refused.

        Args:
            is_usable: Whether an entry that is whole is to stay.

        Returns:
            The folders that were removed.
        """
        removed = self._store.prune()
        for folder in self._store.folders():
            whole = self._store.is_whole(folder)
            if not whole or not is_usable(Entry(folder, self._store.read(folder).record)):
                with suppress(OSError):
                    remove_folder(folder)
                    removed.append(folder)
        return removed


def _plan_name(graph: str) -> str:
    return f"{graph}.plan"


def _checked_record(record: dict[str, Any]) -> dict[str, Any]:
    """Refuse a record that is not an engine's, and bring an old one up to date."""
    if not all(isinstance(record[name], dict) for name in ("plans", "verified", "audit")):
        raise TypeError("it is not the record of an engine")
    if "files" in record:
        return record
    # Engines take an hour to build on a small device, so those of earlier versions are kept.
    files = {_plan_name(graph): dict(given) for graph, given in record["plans"].items()}
    return {**record, "files": files}


def _in_words(folder: Path, exc: Exception) -> str:
    return (
        f"The engine {folder.name} cannot be used: {str(exc).rstrip('.')}; build it again with "
        "`actionclip build`."
    )


def open_store(cache: bool | str | Path = True) -> EngineStore:
    """The store of this user.

    Raises:
        EngineError: If caches are switched off, since engines have no other place.
    """
    folder = cache_folder(cache)
    if folder is None:
        raise EngineError(
            f"Engines are kept in the cache, which is off; set {CACHE_VARIABLE} to a folder."
        )
    return EngineStore(engines_folder(folder))


def engines_folder(cache: Path) -> Path:
    """Where engines lie in the folder of a cache."""
    return cache / "engines"


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
