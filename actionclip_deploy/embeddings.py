"""Tables of unit vectors on disk: the vectors in one file, and beside it a record of what they are.

The vectors are one tensor, `embeddings`, float32, of a safetensors file; the record is JSON and
holds the size and sha256 of that file among whatever else its owner needs to know.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from actionclip_deploy.errors import DamagedFileError
from actionclip_deploy.files import (
    sha256_of,
    why_altered,
    write_bytes,
    write_text,
)
from actionclip_deploy.manifest import FileSpec, describe_invalid

_TENSOR = "embeddings"

RecordT = TypeVar("RecordT", bound=BaseModel)


def write_embeddings(
    path: Path, embeddings: NDArray[np.float32], metadata: dict[str, str] | None = None
) -> FileSpec:
    """Write vectors, and give what their record says of the file.

    Args:
        path: Of the safetensors file.
        embeddings: float32, any number of axes, of which the last is D.
        metadata: What the file says besides, which readers that do not know it pass over.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    data = save_safetensors({_TENSOR: np.ascontiguousarray(embeddings)}, metadata)
    write_bytes(path, data)
    return FileSpec(sha256=sha256_of(data), size_bytes=len(data))


def check_embeddings(path: Path, spec: FileSpec) -> None:
    """Check what can be checked without reading the vectors.

    Raises:
        DamagedFileError: If the file is missing or of another size.
    """
    why = why_altered(path, size_bytes=spec.size_bytes, sha256=spec.sha256, check_hash=False)
    if why is not None:
        raise DamagedFileError(f"{path.name} {why}")


def read_embeddings(path: Path, spec: FileSpec) -> NDArray[np.float32]:
    """Read vectors and compare the file with its record.

    Returns:
        The tensor as it lies in the file; its shape, dtype and norms are unchecked.

    Raises:
        DamagedFileError: If the file is missing, was altered, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DamagedFileError(f"{path.name} cannot be read ({exc.strerror})") from exc
    if sha256_of(data) != spec.sha256:
        raise DamagedFileError(f"{path.name} does not have the sha256 that it was written with")
    try:
        embeddings: NDArray[np.float32] = load_safetensors(data)[_TENSOR]
    except (SafetensorError, KeyError) as exc:
        raise DamagedFileError(f"{path.name} holds no embeddings ({exc})") from exc
    return embeddings


def read_metadata(path: Path) -> dict[str, str]:
    """What a file that `read_embeddings` has read says besides.

    Raises:
        DamagedFileError: If it cannot be read any more, as while it is replaced.
    """
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as exc:
        raise DamagedFileError(f"{path.name} cannot be read ({exc})") from exc


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record; after the vectors, so that a table with a record is whole.

    Raises:
        FileWriteError: If it cannot be written.
    """
    write_text(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path, record_type: type[RecordT], *, versions: Collection[int]) -> RecordT:
    """Read a record.

    Args:
        path: Of the JSON file.
        record_type: What it holds.
        versions: Of `schema_version` that can be read.

    Raises:
        DamagedFileError: If it is missing, or not such a record.
        ValueError: If it is of another version.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise DamagedFileError(f"{path} cannot be read as JSON ({exc})") from exc
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in versions:
        raise ValueError(
            f"has schema version {version!r}, and this version of actionclip-deploy reads "
            f"{' and '.join(map(str, versions))}"
        )
    try:
        return record_type.model_validate(data)
    except ValidationError as exc:
        raise DamagedFileError(f"{path}: {describe_invalid(exc)}") from exc
