"""Checkpoint files of every kind, read without running code that they hold.

OpenAI publishes CLIP as TorchScript archives. `torch.load(weights_only=True)` refuses those, and
`torch.jit.load` compiles and partly runs the program inside, so neither will do. The archive is a
zip whose `data.pkl` describes a tree of objects with their tensors; here it is unpickled with a
reader that knows nothing but tensors, storages, dictionaries and inert stand-ins for the program's
classes. No name in the file is ever imported or called.
"""

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
from torch import Tensor

from actionclip_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # a checkpoint of torch before 1.6
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
_REFUSED = re.compile(r"Trying to instantiate|Trying to call|Can only build|is not a tensor")

# What torch and pickle raise on bytes that are not a checkpoint, or only half of one.
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

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def read_checkpoint_file(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint: a pickled dictionary, a TorchScript archive, or safetensors.

    Tensors of a pickled file stay on disk until they are used.

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


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript archive rather than a pickled state dict."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read every tensor attribute of a TorchScript archive.

    Returns:
        Tensors under the dotted names that they have in the program's modules.

    Raises:
        pickle.UnpicklingError: If it holds other objects than such an archive does.
        KeyError: If a record of the archive is missing.
        zipfile.BadZipFile: If a record is damaged, or the tree of objects is missing.
    """
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(records) != 1:
            raise zipfile.BadZipFile(f"{len(records)} records are named data.pkl")
        root = _TensorReader(archive, records[0]).load()
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors)
    return tensors


class _TensorReader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, record: str) -> None:
        self._archive = archive
        self._folder = record.removesuffix("data.pkl")
        super().__init__(archive.open(record))

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "__torch__" or module_name.startswith("__torch__."):
            return _Inert
        if module_name == "torch" and global_name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[global_name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _view_storage,
            ("collections", "OrderedDict"): dict,
        }
        if module_name == "torch.jit._pickle":
            return _Inert  # typed lists, which hold no weights
        if (module_name, global_name) not in known:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a tensor")
        return known[module_name, global_name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} of type {dtype} is not a tensor's storage")
        data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _Inert:
    """Stands for an object of the program: holds its fields and does nothing."""

    def __init__(self, *_: object) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


def _view_storage(
    storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object
) -> Tensor:
    # as_strided refuses what lies outside of the storage.
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _collect(value: object, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, _Inert):
        for field, inner in value.fields.items():
            _collect(inner, f"{name}.{field}" if name else str(field), tensors)
