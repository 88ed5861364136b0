"""The bundle: a folder of graphs, tokenizer and golden data, and the manifest that describes them.

The format is written down in docs/bundle-format.md. Opening a bundle runs and unpickles nothing:
it holds JSON, safetensors and ONNX alone, and what lies outside of it is used by its hash alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from actionclip_deploy.errors import BundleError, FileWriteError, IntegrityError
from actionclip_deploy.files import (
    entries_of,
    finish_replacements,
    names_moved_aside,
    opening_may_wait,
    read_replaceable,
    sha256_of,
    sha256_of_file,
    staged_folder,
    why_altered,
    write_text,
)
from actionclip_deploy.keyed_store import Store, cache_folder, why_altered_since
from actionclip_deploy.manifest import (
    SCHEMA_VERSION,
    FileSpec,
    GraphName,
    Manifest,
    describe_invalid,
)

MANIFEST_NAME = "manifest.json"
LABELS_FOLDER = "labels"
BANK_RECORD_NAME = "bank.json"

_UNLINKED_FOLDER = "unlinked"
_MAX_UNLINKED_BYTES = 8 << 30

_MAX_MANIFEST_BYTES = 16 << 20  # a thousand templates of a thousand letters, thousands of files
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest.

    Attributes:
        path: The folder.
        manifest: What it holds.
        verify: Whether a file is held against its sha256 before it is used.
    """

    path: Path
    manifest: Manifest
    verify: bool = True

    @classmethod
    def open(cls, path: str | Path, *, check_hashes: bool = False, verify: bool = True) -> Bundle:
        """Read the manifest and check that the files it names are there.

        Args:
            path: Folder of the bundle.
            check_hashes: Whether to read every file now and compare its sha256. Without it,
                presence and size are checked now, and the hash of a file when it is used.
            verify: Whether files that are used are held against their hashes. What becomes of a
                label bank is held to them without it too.

        Raises:
            BundleError: If there is no bundle, or its schema is not one that this version reads.
            IntegrityError: If a file is missing, altered, or lies outside of the bundle.
        """
        path = Path(path)
        return read_replaceable(path, lambda: cls._open(path, check_hashes, verify), BundleError)

    @classmethod
    def _open(cls, path: Path, check_hashes: bool, verify: bool) -> Bundle:
        bundle = cls(path, _read_manifest(path), verify)
        for name, spec in bundle.manifest.files.items():
            file = _path_inside(path, name, is_hashed=True)
            link = _link_out(path, name)
            if link is None:
                _check_file(file, name, spec, "again" if check_hashes else "size")
            else:
                _check_linked_file(file, name, spec, link)
        for graph, graph_spec in bundle.manifest.graphs.items():
            if graph_spec.file not in bundle.manifest.files:
                raise IntegrityError(
                    f"The manifest of {path} names {graph_spec.file} as its {graph} graph but "
                    "gives no checksum for it; export the bundle again."
                )
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file of the bundle, which is as it was written; the one way to any of them.

        Label banks bring hashes of their own; of their files only the path is given. A file may be
        a link: within the bundle, into the store of a hub's cache, or, since its hash is what is
        trusted, anywhere if the manifest has a hash for it.

        Args:
            name: As the manifest writes it.

        Raises:
            IntegrityError: If the file was altered or has no checksum, or if its name, or a link
                that it passes through, leads out of the bundle otherwise.
        """
        path = _path_inside(self.path, name, is_hashed=name in self.manifest.files)
        if name.startswith(f"{LABELS_FOLDER}/"):
            return path
        spec = self.manifest.files.get(name)
        if spec is None:
            raise IntegrityError(
                f"The manifest of {self.path} gives no checksum for {name}, so it is not used; "
                "export the bundle again."
            )
        _check_file(path, name, spec, "known" if self.verify else "size")
        return path

    def check_text_encoder(self) -> None:
        """Hold all that `textual_sha256` speaks for against its hashes, whatever `verify` says.

        Raises:
            IntegrityError: If a file was altered: embeddings made by it would pass for the real
                ones for ever.
        """
        bundle = replace(self, verify=True)
        for name in self._names_of(*self._text_prefixes()):
            bundle.file(name)

    def graph_path(self, graph: GraphName) -> Path:
        """Path of a graph's ONNX file.

        Raises:
            BundleError: If the bundle has no such graph.
        """
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"The bundle {self.path} has no {graph} graph; it has "
                f"{', '.join(sorted(self.manifest.graphs))}."
            )
        name = self.manifest.graphs[graph].file
        stem = PurePosixPath(name).stem
        parts = [part for part in self.manifest.files if part.startswith(f"{stem}.")]
        if len(parts) > 1 and any(_link_out(self.path, part) for part in parts):
            return self._without_links(parts) / name
        return self.file(name)

    def _without_links(self, names: Sequence[str]) -> Path:
        """A folder in the cache with files of the bundle, all of them real and next to each other.

        ONNX Runtime follows the links of a graph and of its weights, and refuses weights that
        then lie in another folder or under another name than the graph says:
        https://github.com/microsoft/onnxruntime/issues/27353.

        Raises:
            BundleError: If there is no cache, or it cannot be written.
            IntegrityError: If a file does not have its hash.
        """
        specs = {name: self.manifest.files[name] for name in sorted(names)}
        advice = (
            "its graph and its weights are links, which a runtime needs next to each other; copy "
            f"the bundle with its files, as `cp -rL {self.path} COPY` does"
        )
        folder = cache_folder()
        if folder is None:
            raise BundleError(
                f"{self.path} cannot be used without the cache, which is off: {advice}."
            )
        store = Store(folder / _UNLINKED_FOLDER, limit_bytes=_MAX_UNLINKED_BYTES)
        key = {name: spec.sha256 for name, spec in specs.items()}

        def copy(target: Path) -> dict[str, Any]:
            for name, spec in specs.items():
                shutil.copyfile(self.file(name), target / name)
                _check_file(target / name, name, spec, "again")
            return {}

        try:
            return store.find_or_add(key, copy).folder
        except OSError as exc:
            raise BundleError(f"{self.path} cannot be used ({exc}): {advice}.") from exc

    @property
    def textual_sha256(self) -> str:
        """Hash of all that makes text embeddings: the textual graph's files and the tokenizer."""
        return sha256_of(self._hashes_of(*self._text_prefixes()))

    def _text_prefixes(self) -> tuple[str, str]:
        return f"{PurePosixPath(self.manifest.graphs['textual'].file).stem}.", "tokenizer."

    @property
    def visual_sha256(self) -> str:
        """Hash of what scores depend on besides texts: the other graphs' files, and the scale."""
        graphs = [spec for name, spec in self.manifest.graphs.items() if name != "textual"]
        hashes = self._hashes_of(*(f"{PurePosixPath(graph.file).stem}." for graph in graphs))
        return sha256_of(f"{hashes}{self.manifest.scores.scale}")

    def _hashes_of(self, *prefixes: str) -> str:
        """A line for each file whose name begins with one of these, sorted by name."""
        files = self.manifest.files
        return "".join(f"{name} {files[name].sha256}\n" for name in self._names_of(*prefixes))

    def _names_of(self, *prefixes: str) -> list[str]:
        return sorted(name for name in self.manifest.files if name.startswith(prefixes))

    def label_bank_path(self, name: str) -> Path:
        """Folder of a label bank, which need not exist yet.

        Raises:
            ValueError: If the name is not one that a folder can have everywhere.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"The label bank name {name!r} is not allowed; use letters, digits, '.', '_' "
                "and '-', beginning with a letter or digit, 128 at most."
            )
        return self.file(f"{LABELS_FOLDER}/{name}")

    def label_bank_state(self, name: str) -> str:
        """Hash of what is saved under the name of a bank, whole or not; "" where nothing is.

        Raises:
            BundleError: If it cannot be read.
            ValueError: If the name is not one that a bank can have.
        """
        folder = self.label_bank_path(name)
        try:
            return sha256_of_file(folder / BANK_RECORD_NAME)
        except FileNotFoundError:
            return ""
        except OSError as exc:
            raise BundleError(
                f"The label bank {name!r} cannot be read ({exc.strerror}); change its permissions."
            ) from exc

    def check_current(self) -> None:
        """Check that the folder still holds what was opened.

        Raises:
            BundleError: If another bundle is there by now, or none.
        """
        if Bundle.open(self.path).manifest != self.manifest:
            raise BundleError(
                f"{self.path} was replaced by another export since it was opened, so nothing was "
                "saved in it; open it again and repeat this."
            )

    def label_bank_names(self) -> tuple[str, ...]:
        """Names of the label banks in the bundle, sorted."""
        folder = self.path / LABELS_FOLDER
        if not folder.is_dir():
            return ()
        finish_replacements(folder)
        names: set[str] = set()
        for _ in range(2):  # a bank that was moved aside in the first look is back in the second
            names.update(
                p.name for p in entries_of(folder, "*") if (p / BANK_RECORD_NAME).is_file()
            )
            names |= names_moved_aside(folder)
        return tuple(sorted(name for name in names if _NAME.fullmatch(name)))


def _path_inside(folder: Path, name: str, *, is_hashed: bool = False) -> Path:
    """Path of the file `name` of a bundle.

    Args:
        folder: Of the bundle.
        name: As the manifest writes it.
        is_hashed: Whether what a link of this name leads to is held against a hash, so that it may
            lie anywhere.
    """
    parts = PurePosixPath(name)
    target = folder / parts
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise IntegrityError(
            f"The bundle {folder} names the file {name!r}, which lies outside of it; "
            "do not use this bundle, and export it again from its checkpoint."
        )
    link = _link_out(folder, name)
    if link is not None and not is_hashed and not _is_of_hub(folder, target):
        raise IntegrityError(
            f"The bundle {folder} has {name!r}, which lies outside of it: it is a link to {link}. "
            "Put the file itself in the place of the link, or export the bundle again."
        )
    return target


def _link_out(folder: Path, name: str) -> Path | None:
    """Where a file of a bundle really lies if that is outside of `folder`; None if it is not.

    Raises:
        IntegrityError: If its links lead nowhere.
    """
    try:
        real, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as exc:  # too long, or a loop of links
        raise IntegrityError(
            f"The bundle {folder} names the file {name!r}, which cannot be found ({exc}); export "
            "it again from its checkpoint."
        ) from exc
    return None if real.is_relative_to(root) else real


def _is_of_hub(folder: Path, target: Path) -> bool:
    """Whether a file is a link as Hugging Face's cache has them.

    There snapshots/REVISION/NAME links to blobs/HASH, next to `snapshots`. Files that the manifest
    has no hash for, itself above all, may only be links of this kind.
    """
    snapshots = folder.resolve().parent
    return target.is_symlink() and target.resolve().parent == snapshots.parent / "blobs"


def _read_manifest(path: Path) -> Manifest:
    # Unlike those of `Path`, these raise nothing of a name too long or a folder not readable.
    if not os.path.isdir(path):  # noqa: PTH112
        what = "is a file" if os.path.exists(path) else "does not exist"  # noqa: PTH110
        raise BundleError(
            f"{path} {what}; expected the folder of a bundle, as `actionclip export` writes it."
        )
    data = _read_json(path)
    if not isinstance(data, dict):
        raise BundleError(
            f"{path / MANIFEST_NAME} holds a {type(data).__name__}; expected a JSON object, as "
            "`actionclip export` writes it; export the bundle again."
        )
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}, and this version of actionclip-deploy reads "
            f"{SCHEMA_VERSION}; export the bundle again or install the version that wrote it."
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as exc:
        raise BundleError(
            f"{path / MANIFEST_NAME} does not describe a bundle: {describe_invalid(exc)}; "
            "export the bundle again."
        ) from exc


def _read_json(path: Path) -> object:
    manifest = _path_inside(path, MANIFEST_NAME)
    try:
        if opening_may_wait(manifest):
            raise BundleError(
                f"{manifest} is a pipe, a socket or a device; export the bundle again."
            )
        if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{manifest} has {manifest.stat().st_size} bytes; a manifest has "
                f"{_MAX_MANIFEST_BYTES} at most, so export the bundle again."
            )
        return json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path} has no {MANIFEST_NAME}, so it is not a bundle; "
            "make one with `actionclip export CHECKPOINT --output BUNDLE`."
        ) from None
    except OSError as exc:
        raise BundleError(
            f"{manifest} cannot be read ({exc.strerror}); "
            "copy the bundle again or change its permissions."
        ) from exc
    # JSONDecodeError and UnicodeDecodeError are ValueErrors; the parser itself recurses.
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{manifest} is not JSON ({exc}); export the bundle again.") from exc


def _check_file(
    path: Path, name: str, spec: FileSpec, how: Literal["size", "known", "again"]
) -> None:
    """Refuse a file that is not what was written.

    Args:
        path: The file.
        name: Its name in the manifest.
        spec: What was written.
        how: By its size alone; by its hash, unless that was compared before; or by reading it.
    """
    size_bytes, sha256 = spec.size_bytes, spec.sha256
    try:
        if how == "size":
            why = why_altered(path, size_bytes=size_bytes, sha256=sha256, check_hash=False)
        else:
            why = why_altered_since(
                path, size_bytes=size_bytes, sha256=sha256, read_again=how == "again"
            )
    except OSError as exc:
        raise IntegrityError(
            f"The bundle's file {name} cannot be read ({exc.strerror}); "
            "copy the bundle again or change its permissions."
        ) from exc
    if why is not None:
        raise IntegrityError(
            f"The bundle's file {name} {why} ({path}); copy the bundle again or export it again."
        )


def _check_linked_file(path: Path, name: str, spec: FileSpec, link: Path) -> None:
    """Check a file that lies outside of its bundle: its hash is what it is trusted for."""
    why = "leads to nothing"
    with suppress(OSError):
        if link.exists():
            why = why_altered(path, size_bytes=spec.size_bytes, sha256=spec.sha256) or ""
    if why:
        raise IntegrityError(
            f"The bundle's file {name} is a link to {link}, which lies outside of the bundle and "
            f"{why} ({path}). Put the file itself in the place of the link, or fetch or export "
            "the bundle again."
        )


def hash_files(folder: Path) -> dict[str, FileSpec]:
    """Checksums of every file below a folder, by name relative to it; label banks are left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [(p.relative_to(folder).as_posix(), p) for p in files]
    return {
        name: FileSpec(sha256=sha256_of_file(path), size_bytes=path.stat().st_size)
        for name, path in names
        if name != MANIFEST_NAME and not name.startswith(f"{LABELS_FOLDER}/")
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder of a bundle."""
    write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


@contextmanager
def new_folder(
    target: Path,
    *,
    overwrite: bool,
    marker: str,
    error: type[BundleError] = BundleError,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give a temporary folder that becomes a bundle, or a part of one, if the block succeeds.

    Args:
        target: As for `files.staged_folder`.
        overwrite: Whether an existing folder may be replaced.
        marker: A file that an existing folder must hold to be replaced, so that a mistyped path
            does not delete something else.
        error: What is raised if the folder cannot be written.
        check: As for `files.staged_folder`.

    Raises:
        BundleError: If the target exists and may not be replaced, or cannot be written.
    """

    def check_all() -> None:
        check_replaceable(target, overwrite=overwrite, marker=marker)
        check()

    try:
        with staged_folder(target, check=check_all) as folder:
            yield folder
    except FileWriteError as exc:
        raise error(str(exc)) from exc


def check_replaceable(target: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse a target that exists, unless it may be replaced and is what it should be.

    Raises:
        BundleError: If the target may not be replaced.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
    except OSError as exc:
        raise BundleError(
            f"{target} cannot be written ({exc.strerror}); choose another place."
        ) from exc
    if not (target / marker).is_file():
        raise BundleError(
            f"{target} exists and has no {marker}, so it is not replaced even with --overwrite; "
            "remove it yourself or choose another name."
        )
    if not overwrite:
        raise BundleError(
            f"{target} exists already; choose another name or replace it with --overwrite "
            "(in Python, overwrite=True)."
        )
