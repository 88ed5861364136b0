"""Checkpoint files of every kind, read without running code that they hold."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    from collections.abc import Mapping


_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # a checkpoint of torch before 1.6
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
_REFUSED = re.compile(r"Trying to instantiate|Trying to call|Can only build|is not a tensor")

# What torch and pickle raise on bytes that are no checkpoint, or only half of one.
_DAMAGE = (
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    zipfile.BadZipFile,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_checkpoint_file(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint: a pickled dictionary, a TorchScript archive, or safetensors.

    Tensors of a pickled file stay on disk until they are used.

    Args:
        path: The file.

    Returns:
        What it holds: tensors by key, or dictionaries of them.

    Raises:
        CheckpointError: If the file is missing, empty, cut off, damaged or no checkpoint, or if
            reading it would mean running code from it.
    """
    _check_exists(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == _ZIP_MAGIC and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut off: the end of the file is missing; fetch it again")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if magic == _ZIP_MAGIC and is_torchscript(path):
            return read_torchscript(path)
        if magic != _ZIP_MAGIC and not magic.startswith(_PICKLE_MAGIC):
            raise CheckpointError(
                f"{path} is not a checkpoint: it starts with the bytes {magic!r}, as no file of "
                "torch.save does; give a .pt, .pth, .bin or .safetensors file"
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=magic == _ZIP_MAGIC)
    except _DAMAGE as exc:
        raise _explain(path, exc) from exc
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary of tensors, "
            "such as model.state_dict()"
        )
    return content


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a directory; a checkpoint is one file, such as vit-b-16-8f.pt"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; fetch or save the checkpoint again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read by this user; change its permissions")


def _explain(path: Path, exc: BaseException) -> CheckpointError:
    text = str(exc)
    refused = sorted(set(_REFUSED_CLASS.findall(text)))
    if refused or _REFUSED.search(text):
        what = ", ".join(refused) or text.splitlines()[-1].strip()
        return CheckpointError(
            f"{path} holds other objects than tensors ({what}), and reading those could run code "
            "from the file, so it is refused. If you trust it, save its tensors alone and give "
            "that file: d = torch.load(OLD, weights_only=False); keep = ('model', 'state_dict', "
            "'model_state_dict', 'fusion_model_state_dict'); "
            "torch.save({k: d[k] for k in keep if k in d}, NEW)"
        )
    detail = re.split(r"\.\s|\n", text, maxsplit=1)[0] or type(exc).__name__
    return CheckpointError(
        f"{path} cannot be read: it is cut off, damaged or no checkpoint ({detail}); fetch or "
        "save it again"
    )
