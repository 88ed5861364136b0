"""The two files of a label bank, `labels/NAME` in a bundle.

- `bank.json`: schema version, name, labels, templates, and the sha256 of the text encoder and
  tokenizer that made the embeddings, of the prompts, and of the other file; where the bank was
  calibrated, also how scores are read.
- `bank.safetensors`: one tensor, `embeddings`, float32, (K, C, D), of unit norm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from actionclip_deploy.bundle import BANK_RECORD_NAME, LABELS_FOLDER, Bundle, staged_folder
from actionclip_deploy.calibration import Calibration
from actionclip_deploy.errors import LabelBankError
from actionclip_deploy.manifest import FileSpec

# A calibration came with 2; without one a bank is as it was, and older versions read it.
BANK_SCHEMA_VERSION = 2
_WITHOUT_CALIBRATION = 1

_TENSORS_NAME = "bank.safetensors"


class BankRecord(BaseModel):
    """`bank.json`: what a bank holds and which bundle may use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    schema_version: int = BANK_SCHEMA_VERSION
    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    textual_sha256: str
    prompts_sha256: str
    embeddings: FileSpec
    calibration: Calibration | None = None

    @model_serializer(mode="wrap")
    def _without_absent_calibration(self, handler: SerializerFunctionWrapHandler) -> Any:
        fields = handler(self)
        if fields.get("calibration") is None:
            fields.pop("calibration", None)
        return fields


def write_bank(
    bundle: Bundle,
    name: str,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    embeddings: NDArray[np.float32],
    *,
    calibration: Calibration | None = None,
    overwrite: bool,
) -> Path:
    """Write a bank that the bundle made; a reader sees all of it or nothing.

    Args:
        bundle: The bundle that gets the bank.
        name: Name of the bank.
        labels: C labels.
        templates: K templates.
        embeddings: float32, shape (K, C, D).
        calibration: How its scores are read, if that was fitted.
        overwrite: Whether a bank of the same name may be replaced.

    Returns:
        The folder of the bank.

    Raises:
        LabelBankError: If the files cannot be written.
        BundleError: If there is a bank of this name that may not be replaced.
        ValueError: If the name is not one that a bank can have.
    """
    target = bundle.label_bank_path(name)
    data = save_safetensors({"embeddings": np.ascontiguousarray(embeddings)})
    record = BankRecord(
        schema_version=_WITHOUT_CALIBRATION if calibration is None else BANK_SCHEMA_VERSION,
        name=name,
        labels=labels,
        templates=templates,
        textual_sha256=bundle.textual_sha256,
        prompts_sha256=_prompts_sha256(labels, templates),
        embeddings=FileSpec(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)),
        calibration=calibration,
    )
    with staged_folder(target, overwrite=overwrite, marker=BANK_RECORD_NAME) as folder:
        try:
            (folder / _TENSORS_NAME).write_bytes(data)
            text = record.model_dump_json(indent=2) + "\n"
            (folder / BANK_RECORD_NAME).write_text(text, encoding="utf-8")
        except OSError as exc:
            raise LabelBankError(
                f"The label bank {name!r} cannot be written to {target} ({exc.strerror}); "
                "make room there or choose another place for the bundle."
            ) from exc
    return target


def read_record(bundle: Bundle, name: str) -> BankRecord:
    """Read `bank.json`.

    Raises:
        LabelBankError: If there is no such bank, or its record is not one that can be read.
        IntegrityError: If the file lies outside of the bundle.
        ValueError: If the name is not one that a bank can have.
    """
    path = bundle.label_bank_path(name) / BANK_RECORD_NAME
    if name not in bundle.label_bank_names():
        there = ", ".join(bundle.label_bank_names()) or "none"
        raise LabelBankError(
            f"The bundle {bundle.path} has no label bank {name!r} (it has: {there}); "
            "make it with `actionclip labels build`."
        )
    try:
        data = json.loads(bundle.file(f"{LABELS_FOLDER}/{name}/{BANK_RECORD_NAME}").read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise damaged(name, f"{path} cannot be read as JSON ({exc})") from exc
    return _parse_record(name, path, data)


def check_record(bundle: Bundle, name: str, record: BankRecord) -> None:
    """Check what can be checked without reading the embeddings.

    Raises:
        LabelBankError: If another text encoder or tokenizer made the bank, its labels or
            templates were altered, or the embeddings are missing or of another size.
        IntegrityError: If the file of the embeddings lies outside of the bundle.
    """
    if record.textual_sha256 != bundle.textual_sha256:
        raise of_other_encoder(name)
    if record.prompts_sha256 != _prompts_sha256(record.labels, record.templates):
        raise damaged(name, "its labels or templates are not those that were embedded")
    path = _tensors_path(bundle, name)
    size = path.stat().st_size if path.is_file() else None
    if size != record.embeddings.size_bytes:
        what = "is missing" if size is None else f"has {size} bytes"
        raise damaged(
            name, f"{_TENSORS_NAME} {what}; expected {record.embeddings.size_bytes} bytes"
        )


def check_calibration(bundle: Bundle, name: str, calibration: Calibration | None) -> None:
    """Check that a calibration is of the scores that the bundle gives.

    Raises:
        LabelBankError: If it was fitted to another bundle's.
    """
    if calibration is not None and calibration.visual_sha256 != bundle.visual_sha256:
        raise LabelBankError(
            f"The label bank {name!r} was calibrated for other weights, precision or scale than "
            'this bundle\'s, so its threshold for "unknown" would mean nothing; run '
            "`actionclip labels calibrate` again, or build it again without."
        )


def read_embeddings(bundle: Bundle, name: str, record: BankRecord) -> NDArray[np.float32]:
    """Read the embeddings and compare their sha256 with the record's.

    Returns:
        The tensor as it lies in the file; its shape and dtype are unchecked.

    Raises:
        LabelBankError: If the file was altered, or holds something else.
    """
    try:
        data = _tensors_path(bundle, name).read_bytes()
    except OSError as exc:
        raise damaged(name, f"{_TENSORS_NAME} cannot be read ({exc.strerror})") from exc
    if hashlib.sha256(data).hexdigest() != record.embeddings.sha256:
        raise damaged(name, f"{_TENSORS_NAME} does not have the sha256 of {BANK_RECORD_NAME}")
    try:
        embeddings: NDArray[np.float32] = load_safetensors(data)["embeddings"]
    except (SafetensorError, KeyError) as exc:
        raise damaged(name, f"{_TENSORS_NAME} holds no embeddings ({exc})") from exc
    return embeddings


def damaged(name: str, what: str) -> LabelBankError:
    """The error of a bank that was altered after it was made."""
    return LabelBankError(
        f"The label bank {name!r} is damaged: {what}; "
        "build it again with `actionclip labels build --overwrite`."
    )


def of_other_encoder(name: str) -> LabelBankError:
    """The error of a bank in a bundle that did not make it."""
    return LabelBankError(
        f"The label bank {name!r} was made by another text encoder or tokenizer than this "
        "bundle's, so its scores would mean nothing; build it again with "
        "`actionclip labels build --overwrite`."
    )


def _tensors_path(bundle: Bundle, name: str) -> Path:
    return bundle.file(f"{LABELS_FOLDER}/{name}/{_TENSORS_NAME}")


def _parse_record(name: str, path: Path, data: Any) -> BankRecord:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in (_WITHOUT_CALIBRATION, BANK_SCHEMA_VERSION):
        raise LabelBankError(
            f"The label bank {name!r} has schema version {version!r}, and this version of "
            f"actionclip-deploy reads {_WITHOUT_CALIBRATION} and {BANK_SCHEMA_VERSION}; build it "
            "again with `actionclip labels build --overwrite`."
        )
    try:
        return BankRecord.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(name, f"{path}: {where}: {first['msg']}") from exc


def _prompts_sha256(labels: Sequence[str], templates: Sequence[str]) -> str:
    # Embeddings belong to these texts; a label that was corrected by hand no longer has one.
    text = json.dumps([list(labels), list(templates)])
    return hashlib.sha256(text.encode()).hexdigest()
