"""Host memory that the GPU may read on its own: page-locked through the CUDA driver.

ONNX Runtime's Python interface has no page-locked arrays (1.20 to 1.32 know no such device), so
ordinary memory is registered with the driver here, without any library besides it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from actionclip_deploy.runtimes.base import Array

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cuda.h: CU_MEMHOSTREGISTER_PORTABLE, locked for every context of the process


class PinnedArray:
    """An array whose memory is page-locked while it lives.

    Where the driver cannot lock it (a limit on locked memory, no driver), `pinned` is False, the
    reason is logged, and the array is ordinary memory: copies from it take longer.

    Args:
        shape: Of the array.
        dtype: Of the array.
        driver: Gives the CUDA driver's library; another one in tests.

    Attributes:
        array: The array; not to be used after `close`.
        pinned: Whether its memory is page-locked.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        driver: Callable[[], Any] | None = None,
    ) -> None:
        dtype = np.dtype(dtype)
        # Pages of their own, since the driver locks whole pages.
        num_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        self._memory = mmap.mmap(-1, num_bytes)
        self.array: Array = np.frombuffer(self._memory, dtype, count=int(np.prod(shape)))
        self.array = self.array.reshape(shape)
        self.pinned = False
        try:
            self._cuda = (driver or _load_driver)()
            with _primary_context(self._cuda) as self._device:
                address, flags = ctypes.c_void_p(self.array.ctypes.data), ctypes.c_uint(_PORTABLE)
                _check(self._cuda.cuMemHostRegister_v2(address, ctypes.c_size_t(num_bytes), flags))
            self.pinned = True
        except OSError as exc:
            logger.warning("%d bytes of host memory are not page-locked: %s", num_bytes, exc)

    def close(self) -> None:
        """Unlock the memory; may be called again."""
        if not self.pinned:
            return
        self.pinned = False
        with contextlib.suppress(OSError), _primary_context(self._cuda):
            _check(self._cuda.cuMemHostUnregister(ctypes.c_void_p(self.array.ctypes.data)))


def _load_driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@contextlib.contextmanager
def _primary_context(cuda: Any) -> Iterator[int]:
    """Make the first device's context, which ONNX Runtime uses as well, current for a while."""
    device, context, popped = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuInit(0))
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    try:
        _check(cuda.cuCtxPushCurrent_v2(context))
        try:
            yield device.value
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)


def _check(code: int) -> None:
    if code:
        raise OSError(f"the CUDA driver answers with error {code}")
