"""Checkpoint files of every kind, read without running code that they hold.

OpenAI publishes CLIP as TorchScript archives. `torch.load(weights_only=True)` refuses those, and
`torch.jit.load` compiles and partly runs the program inside, so neither will do. The archive is a
zip whose `data.pkl` describes a tree of objects with their tensors; here it is unpickled with a
reader that knows nothing but tensors, storages, dictionaries and inert stand-ins for the program's
classes. No name in the file is ever imported or called.
"""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from actionclip_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # a checkpoint of torch before 1.6
_REFUSED_NAME = re.compile(
    r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)"
)
_REFUSED = re.compile(r"Trying to instantiate|Trying to call|Can only build|is not a tensor")

# Modules whose functions act on the machine; what a pickle names in one of them is a program.
_PROGRAM_MODULES = frozenset(
    {"os", "subprocess", "sys", "shutil", "runpy", "importlib", "socket", "pty", "ctypes", "code"}
    | {"pickle", "webbrowser"}
)
# How they are called where they are made, or by Python 2, whose names old protocols have.
_MODULES_TODAY = {"posix": "os", "nt": "os", "commands": "subprocess", "__builtin__": "builtins"}

# The description of the largest CLIP's tensors, with those of its optimizer, takes 2 MB.
_MAX_DESCRIPTION_BYTES = 64 << 20

# What torch and pickle raise on bytes that are not a checkpoint, or only half of one.
_DAMAGE = (
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
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
        if magic == _ZIP_MAGIC:
            _check_records(path)
            if is_torchscript(path):
                return read_torchscript(path)
        elif not magic.startswith(_PICKLE_MAGIC):
            program = _program_of(_named_objects(path))
            if program is not None:
                raise _asks_to_run(path, program)
            raise CheckpointError(
                f"{path} is not a checkpoint: it starts with the bytes {magic!r}, as no file of "
                "torch.save does; give a .pt, .pth, .bin or .safetensors file"
            )
        else:
            _check_fits_memory(path)
        with warnings.catch_warnings():
            # Of kinds of tensors that are refused by name in a moment.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=magic == _ZIP_MAGIC
            )
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
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path} is not a file but a pipe, a socket or a device; give the path of a checkpoint"
        )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; fetch or save the checkpoint again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read by this user; change its permissions")


def _check_records(path: Path) -> None:
    """Hold what the records of a zip say of themselves against bounds, before one is read.

    Raises:
        CheckpointError: If reading them would take memory that no checkpoint of this size needs.
    """
    with zipfile.ZipFile(path) as archive:
        # The program of a TorchScript archive is compressed and never read.
        records = [r for r in archive.infolist() if not re.search(r"/(code|extra)/", r.filename)]
    for record in records:
        is_tensor = re.search(r"/(data|constants)/[^/]+$", record.filename)
        if not is_tensor and record.file_size > _MAX_DESCRIPTION_BYTES:
            raise CheckpointError(
                f"{path} declares {record.file_size} bytes of {record.filename}, which describes "
                f"its tensors, and {_MAX_DESCRIPTION_BYTES} are the most that is read; it is no "
                "checkpoint of torch.save, so fetch or save it again"
            )
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path} has compressed records ({record.filename}: {record.compress_size} bytes "
                f"that declare {record.file_size}), and torch.save compresses none, so it is "
                "refused; fetch or save the checkpoint again, and do not pack it anew"
            )
    declared, size = sum(record.file_size for record in records), path.stat().st_size
    if declared > size:
        raise CheckpointError(
            f"{path} has {size} bytes and its records declare {declared}, so it is refused; fetch "
            "or save the checkpoint again"
        )


def _check_fits_memory(path: Path) -> None:
    # An old pickle is read whole; the tensors of the other kinds stay on disk until they are used.
    if path.stat().st_size > machine_memory_bytes():
        raise _too_large(path)


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has {path.stat().st_size} bytes, and this machine has {machine_memory_bytes()} "
        "bytes of memory to read it into; save the weights alone, without the optimizer, or use a "
        "larger machine"
    )


def machine_memory_bytes() -> int:
    """Memory of this machine, or a bound that no machine reaches where it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 1 << 50


def _named_objects(path: Path) -> list[str]:
    """What a pickle names, found without unpickling it; as far as it can be read."""
    names: list[str] = []
    pushed: list[str] = []
    memo: dict[int, str] = {}
    try:
        for code, value, _ in pickletools.genops(_description(path)):
            match code.name:
                case "GLOBAL" | "INST":
                    names.append(str(value).replace(" ", "."))
                case "STACK_GLOBAL":
                    names.append(".".join(pushed[-2:]))
                case "MEMOIZE":
                    memo[len(memo)] = pushed[-1] if pushed else ""
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(str(value))] = pushed[-1] if pushed else ""
                case "GET" | "BINGET" | "LONG_BINGET":
                    pushed.append(memo.get(int(str(value)), ""))
                case _ if isinstance(value, str):
                    pushed.append(value)
    except _DAMAGE:
        pass  # what came before stands
    return names


def _description(path: Path) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return archive.read(names[0]) if names else b""
    with path.open("rb") as file:
        return file.read(_MAX_DESCRIPTION_BYTES)


def _program_of(names: Iterable[str]) -> str | None:
    """The first of the names of objects that is a program's; None if there is none."""
    for name in names:
        module, _, function = name.rpartition(".")
        module = _MODULES_TODAY.get(module, module)
        if module.partition(".")[0] in _PROGRAM_MODULES:
            return f"{module}.{function}"
        found = getattr(builtins, function, None) if module in ("", "builtins") else None
        if callable(found) and not isinstance(found, type):
            return function
    return None


def _asks_to_run(path: Path, program: str) -> CheckpointError:
    return CheckpointError(
        f"{path} asks to run {program}, refused: a checkpoint holds tensors and runs nothing. Do "
        "not use this file, and fetch the checkpoint from a place that you trust"
    )


def _explain(path: Path, exc: BaseException) -> CheckpointError:
    text = str(exc)
    if isinstance(exc, MemoryError) or os.strerror(errno.ENOMEM) in text:
        return _too_large(path)
    refused = sorted(set(_REFUSED_NAME.findall(text)))
    program = _program_of([*refused, *_named_objects(path)])
    if program is not None:
        return _asks_to_run(path, program)
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
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
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
            # In the words of torch's own reader, which `_explain` knows.
            raise pickle.UnpicklingError(
                f"GLOBAL {module_name}.{global_name} was not an allowed global"
            )
        return known[module_name, global_name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} of type {dtype} is not a tensor's storage")
        if (key, dtype) not in self._storages:  # many tensors may share one
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key, dtype] = (
                torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._storages[key, dtype]


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
