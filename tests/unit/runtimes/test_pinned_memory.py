from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver

from actionclip_deploy.runtimes.ort_cuda import PinnedArray


def test_memory_is_locked_as_long_as_it_is_used() -> None:
    driver = FakeDriver()
    pinned = PinnedArray((3, 5), np.uint8, driver=lambda: driver)
    assert pinned.pinned
    assert driver.locked == {pinned.array.ctypes.data: 15}
    assert pinned.array.ctypes.data % mmap.PAGESIZE == 0
    pinned.array[...] = 7
    pinned.close()
    pinned.close()
    assert driver.locked == {}
    assert (driver.contexts, driver.retained) == (0, 0)
    assert not pinned.pinned


def test_memory_that_cannot_be_locked_is_used_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = FakeDriver(code=712)
    pinned = PinnedArray((2, 2), np.float32, driver=lambda: driver)
    assert not pinned.pinned
    assert (driver.contexts, driver.retained) == (0, 0)
    assert (
        "16 bytes of host memory are not page-locked: the CUDA driver answers with error 712"
        in (caplog.text)
    )
    pinned.array[...] = 1
    assert pinned.array.sum() == 4
    pinned.close()


def test_without_a_driver_memory_is_ordinary(caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    pinned = PinnedArray((4,), np.int32, driver=missing)
    assert not pinned.pinned
    assert pinned.array.dtype == np.int32
    assert "libcuda.so.1: cannot open" in caplog.text
    pinned.close()
