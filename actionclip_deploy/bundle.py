"""The bundle: a folder of graphs, tokenizer and golden data, and the manifest that describes them.

The format is written down in docs/bundle-format.md. Opening a bundle runs and unpickles nothing:
it holds JSON, safetensors and ONNX alone, and no path may lead out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from actionclip_deploy.errors import BundleError, FileWriteError, IntegrityError
from actionclip_deploy.files import (
    finish_replacements,
    read_replaceable,
    sha256_of,
    sha256_of_file,
    staged_folder,
    why_altered,
    write_text,
)
from actionclip_deploy.manifest import SCHEMA_VERSION, FileSpec, GraphName, Manifest

MANIFEST_NAME = "manifest.json"
LABELS_FOLDER = "labels"
BANK_RECORD_NAME = "bank.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, check_hashes: bool = False) -> Bundle:
        """Read the manifest and check that the files it names are there.

        Args:
            path: Folder of the bundle.
            check_hashes: Whether to read every file and compare its sha256; without it only
                presence and size are checked.

        Raises:
            BundleError: If there is no bundle, or its schema is not one that this version reads.
            IntegrityError: If a file is missing, altered, or lies outside of the bundle.
        """
        path = Path(path)
        return read_replaceable(path, lambda: cls._open(path, check_hashes), BundleError)

    @classmethod
    def _open(cls, path: Path, check_hashes: bool) -> Bundle:
        bundle = cls(path, _read_manifest(path))
        for name, spec in bundle.manifest.files.items():
            _check_file(bundle.file(name), name, spec, check_hashes=check_hashes)
        for graph, graph_spec in bundle.manifest.graphs.items():
            if graph_spec.file not in bundle.manifest.files:
                raise IntegrityError(
                    f"The manifest of {path} names {graph_spec.file} as its {graph} graph but "
                    "gives no checksum for it; export the bundle again."
                )
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file of the bundle, given as the manifest writes it.

        Raises:
            IntegrityError: If the name, or a link that it passes through, leads out of the bundle.
        """
        return _path_inside(self.path, name)

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
        return self.file(self.manifest.graphs[graph].file)

    @property
    def textual_sha256(self) -> str:
        """Hash of all that makes text embeddings: the textual graph's files and the tokenizer."""
        stem = PurePosixPath(self.manifest.graphs["textual"].file).stem
        return sha256_of(self._hashes_of(f"{stem}.", "tokenizer."))

    @property
    def visual_sha256(self) -> str:
        """Hash of what scores depend on besides texts: the other graphs' files, and the scale."""
        graphs = [spec for name, spec in self.manifest.graphs.items() if name != "textual"]
        hashes = self._hashes_of(*(f"{PurePosixPath(graph.file).stem}." for graph in graphs))
        return sha256_of(f"{hashes}{self.manifest.scores.scale}")

    def _hashes_of(self, *prefixes: str) -> str:
        """A line for each file whose name begins with one of these, sorted by name."""
        files = sorted(self.manifest.files.items())
        return "".join(
            f"{name} {spec.sha256}\n" for name, spec in files if name.startswith(prefixes)
        )

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
        banks = (p.name for p in folder.iterdir() if (p / BANK_RECORD_NAME).is_file())
        return tuple(sorted(name for name in banks if _NAME.fullmatch(name)))


def _path_inside(folder: Path, name: str) -> Path:
    """Path of the file `name` of a bundle, after links are followed inside of `folder`."""
    parts = PurePosixPath(name)
    target = folder / parts
    try:
        inside = target.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null character
        inside = False
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not inside:
        raise IntegrityError(
            f"The bundle {folder} names the file {name!r}, which lies outside of it; "
            "do not use this bundle, and export it again from its checkpoint."
        )
    return target


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
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
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path / MANIFEST_NAME} does not describe a bundle: {where}: {first['msg']}; "
            "export the bundle again."
        ) from exc


def _read_json(path: Path) -> object:
    manifest = _path_inside(path, MANIFEST_NAME)
    try:
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


def _check_file(path: Path, name: str, spec: FileSpec, *, check_hashes: bool) -> None:
    try:
        why = why_altered(
            path, size_bytes=spec.size_bytes, sha256=spec.sha256, check_hash=check_hashes
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
            f"{target} exists already; choose another name or replace it with --overwrite."
        )
