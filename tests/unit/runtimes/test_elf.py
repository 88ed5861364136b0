from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from elf_files import shared_library

from actionclip_deploy.runtimes.elf import needed_libraries


def test_the_needed_libraries_are_read_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "provider.so"
    path.write_bytes(shared_library("libnvonnxparser.so.10", "libnvinfer.so.10", "libc.so.6"))
    assert needed_libraries(path) == ("libnvonnxparser.so.10", "libnvinfer.so.10", "libc.so.6")


def test_a_library_that_needs_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "alone.so").write_bytes(shared_library())
    assert needed_libraries(tmp_path / "alone.so") == ()


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's")
def test_a_real_library_is_read() -> None:
    (path,) = Path(np.__file__).parent.glob("_core/_multiarray_umath*.so")
    assert "libc.so.6" in needed_libraries(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_bytes(b"INPUT(libc.so.6)")
    with pytest.raises(ValueError, match=r"text\.so is no 64-bit little-endian ELF file"):
        needed_libraries(tmp_path / "text.so")


@pytest.mark.parametrize("keep", [20, 70, 180])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    (tmp_path / "half.so").write_bytes(shared_library("libnvinfer.so.10")[:keep])
    with pytest.raises(ValueError, match=r"half\.so is cut off or damaged"):
        needed_libraries(tmp_path / "half.so")
