"""Tensors of a TorchScript archive, read without running any of it.

OpenAI publishes CLIP as TorchScript archives. `torch.load(weights_only=True)` refuses those and
`torch.jit.load` compiles and partly runs the program inside, so neither will do. The archive is a
zip whose `data.pkl` describes a tree of objects with their tensors; here it is unpickled with a
reader that knows nothing but tensors, storages, dictionaries and inert stand-ins for the
program's classes. No name in the file is ever imported or called.
"""

from __future__ import annotations

import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Inert:
    """Stands for an object of the program: holds its fields and does nothing."""

    def __init__(self, *_: object) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


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


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read every tensor attribute of a TorchScript archive.

    Args:
        path: The archive.

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


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript archive rather than a pickled state dict."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


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
