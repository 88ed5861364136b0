"""The bundle: a directory with graphs, tokenizer, golden data and a manifest that describes them.

The format is written down in docs/bundle-format.md. A bundle is opened without running or
unpickling anything in it: JSON, safetensors and ONNX only, and no path may lead out of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from actionclip_deploy.errors import BundleError, IntegrityError
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
        bundle = cls(path, _read_manifest(path))
        for name, spec in bundle.manifest.files.items():
            try:
                _check_file(bundle.file(name), name, spec, check_hashes=check_hashes)
            except OSError as exc:
                raise IntegrityError(
                    f"The bundle's file {name} cannot be read ({exc.strerror}); "
                    "copy the bundle again or change its permissions."
                ) from exc
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
        names = [n for n in self.manifest.files if n.startswith((f"{stem}.", "tokenizer."))]
        text = "".join(f"{name} {self.manifest.files[name].sha256}\n" for name in sorted(names))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def visual_sha256(self) -> str:
        """Hash of what makes scores beside texts: the files of the other graphs, and the scale."""
        graphs = [spec for name, spec in self.manifest.graphs.items() if name != "textual"]
        stems = tuple(f"{PurePosixPath(graph.file).stem}." for graph in graphs)
        names = [name for name in self.manifest.files if name.startswith(stems)]
        text = "".join(f"{name} {self.manifest.files[name].sha256}\n" for name in sorted(names))
        return hashlib.sha256(f"{text}{self.manifest.scores.scale}".encode()).hexdigest()

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

    def label_bank_names(self) -> tuple[str, ...]:
        """Names of the label banks in the bundle, sorted."""
        folder = self.path / LABELS_FOLDER
        if not folder.is_dir():
            return ()
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
            f"{path} has no {MANIFEST_NAME}, so it is no bundle; "
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
    if not path.is_file():
        raise IntegrityError(
            f"The bundle's file {name} is missing ({path}); "
            "copy the bundle again or export it again."
        )
    if path.stat().st_size != spec.size_bytes:
        raise IntegrityError(
            f"The bundle's file {name} has {path.stat().st_size} bytes and the manifest says "
            f"{spec.size_bytes}; it was altered or cut off: "
            "copy the bundle again or export it again."
        )
    if check_hashes and sha256_of_file(path) != spec.sha256:
        raise IntegrityError(
            f"The bundle's file {name} does not have the sha256 of the manifest; it was altered: "
            "copy the bundle again or export it again."
        )


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(target: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place if the block succeeds.

    A reader sees the old folder or the new one, never a half-written one (for the instant
    between two renames it may see none); a block that raises leaves nothing behind.

    Args:
        target: The folder to make.
        overwrite: Whether an existing folder may be replaced.
        marker: A file that an existing folder must hold to be replaced, so that a mistyped path
            does not delete something else.

    Raises:
        BundleError: If the target exists and may not be replaced, or cannot be written.
    """
    check_replaceable(target, overwrite=overwrite, marker=marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as exc:
        raise _not_writable(target, exc) from exc
    try:
        # mkdtemp makes a private folder; the one inside of it gets the permissions of the umask.
        staging = workspace / "new"
        staging.mkdir()
        yield staging
        # Another program may have written the target while the block ran.
        check_replaceable(target, overwrite=overwrite, marker=marker)
        try:
            _replace_folder(staging, target, workspace / "old")
        except OSError as exc:
            raise _not_writable(target, exc) from exc
    finally:
        # What was replaced is kept where nothing stands in its place.
        if target.exists() or not (workspace / "old").exists():
            shutil.rmtree(workspace, ignore_errors=True)


def check_replaceable(target: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse a target that exists, unless it may be replaced and is what it should be.

    Raises:
        BundleError: If the target may not be replaced.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
    except OSError as exc:
        raise _not_writable(target, exc) from exc
    if not (target / marker).is_file():
        raise BundleError(
            f"{target} exists and has no {marker}, so it is not replaced even with --overwrite; "
            "remove it yourself or choose another name."
        )
    if not overwrite:
        raise BundleError(
            f"{target} exists already; choose another name or replace it with --overwrite."
        )


def _replace_folder(staging: Path, target: Path, old: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        # Where this fails too, another program has put its own folder there.
        with suppress(OSError):
            old.rename(target)
        raise


def _not_writable(target: Path, exc: OSError) -> BundleError:
    return BundleError(
        f"{target} cannot be written ({exc.strerror}); choose a place that can be, and that no "
        "other program writes to."
    )
