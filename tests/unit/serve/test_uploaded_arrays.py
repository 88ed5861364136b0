"""Arrays of strangers, as .npy files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from serving import npy_bytes

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve.uploads import read_float_array, read_frames_file

FRAMES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def floats(data: bytes) -> np.ndarray:
    return read_float_array(io.BytesIO(data), len(data), "a.npy")


def test_frames_are_mapped_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy_bytes(FRAMES))
    np.testing.assert_array_equal(read_frames_file(path, "a.npy"), FRAMES)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_numbers_of_any_width_become_float32(dtype: str) -> None:
    given = np.linspace(-1, 1, 6).reshape(2, 3).astype(dtype)
    if dtype == ">f4":
        with pytest.raises(RequestRefusedError, match="expected an array of float32"):
            floats(npy_bytes(given))
        return
    read = floats(npy_bytes(given))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, given.astype(np.float32))


def header(text: str) -> bytes:
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .npy file"),
        (b"GIF89a", "not a .npy file"),
        (b"\x93NUMPY\x03\x00" + bytes(8), "version"),
        (header("{'descr': '<f4', 'fortran_order': False"), "not a .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}") + bytes(7), "7 bytes"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}"), "column order"),
        (header("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 1)}") + bytes(8), "column"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8), "column"),
        (header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62},)}}"), "bytes after"),
        (header("__import__('os').system('true')"), "not a .npy file"),
        (npy_bytes(np.ones(3, np.int64)), "expected an array of float32"),
        (npy_bytes(np.ones(3, np.float32))[:-1], "11 bytes after its header"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RequestRefusedError, match=message) as caught:
        floats(data)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "array",
    [FRAMES.astype(np.float32), FRAMES[..., :2], FRAMES[0], FRAMES[:0]],
    ids=["float", "two channels", "one frame", "no frame"],
)
def test_what_is_no_frames_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy_bytes(array))
    with pytest.raises(RequestRefusedError, match=r"expected frames, uint8 RGB"):
        read_frames_file(path, "a.npy")
