"""Arrays that strangers send, as .npy files: nothing is unpickled, and sizes are checked first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.serve import refusals

_HEADER_BYTES = 4096
_MAX_DIMENSIONS = 8  # numpy itself ends at 32 or 64


def read_frames_file(path: Path, name: str) -> NDArray[np.uint8]:
    """Map a .npy file of frames into memory.

    Args:
        path: The file.
        name: What its sender called it.

    Returns:
        RGB, uint8, shape (N, H, W, 3), read-only.

    Raises:
        RequestRefusedError: If it is not such a file.
    """
    with path.open("rb") as file:
        shape, dtype = _read_header(file, name)
        start = file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise refusals.bad_tensor(
            f"{name} holds {dtype} of shape {shape}; expected frames, uint8 RGB of shape "
            "(N, H, W, 3) with N, H and W of 1 or more."
        )
    _check_size(name, path.stat().st_size - start, shape, dtype)
    return np.memmap(path, np.uint8, "r", offset=start, shape=shape)


def read_float_array(file: BinaryIO, size_bytes: int, name: str) -> NDArray[np.float32]:
    """Read a .npy file of numbers.

    Args:
        file: The file, at its start.
        size_bytes: Of all of it.
        name: What its sender called it.

    Returns:
        float32, of the shape that the file says.

    Raises:
        RequestRefusedError: If it is not such a file.
    """
    shape, dtype = _read_header(file, name)
    if dtype not in (np.float16, np.float32, np.float64):
        raise refusals.bad_tensor(
            f"{name} holds {dtype}; expected an array of float32, float16 or float64."
        )
    _check_size(name, size_bytes - file.tell(), shape, dtype)
    array = np.frombuffer(file.read(), dtype).reshape(shape)
    return array.astype(np.float32)


def _read_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file, max_header_size=_HEADER_BYTES)
    # The header is the text of a Python literal: parsing it fails in more ways than can be listed,
    # each of them the sender's doing.
    except Exception as exc:
        reason = str(exc).partition("\n")[0]
        raise refusals.bad_tensor(
            f"{name} is not a .npy file that can be read ({reason}); write it with numpy.save."
        ) from exc
    is_odd = len(shape) > _MAX_DIMENSIONS or any(
        type(size) is not int or size < 0 for size in shape
    )
    if is_odd or is_fortran or dtype.hasobject:
        raise refusals.bad_tensor(
            f"{name} holds an array of an unusual shape, in column order or of Python objects; "
            "write a plain one with numpy.save(file, numpy.ascontiguousarray(array))."
        )
    return shape, dtype


def _check_size(name: str, size_bytes: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    wanted = math.prod(shape) * dtype.itemsize
    if size_bytes != wanted:
        raise refusals.bad_tensor(
            f"{name} has {size_bytes:,} bytes after its header and shape {shape} of {dtype} takes "
            f"{wanted:,}; write it again with numpy.save."
        )
