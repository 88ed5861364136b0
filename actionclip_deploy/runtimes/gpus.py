"""The NVIDIA GPUs of this machine, as the CUDA driver tells them; no framework is imported."""

from __future__ import annotations

import ctypes
import os
from dataclasses import asdict, dataclass
from typing import Any

# CUDA driver API, cuda.h: CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as `8.7`.
        memory_bytes: All of it; on a Jetson, that of the board.
    """

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpus:
    """What the CUDA driver gives to this process.

    Attributes:
        found: The GPUs; may be none.
        cuda: Newest CUDA that the driver runs, such as `13.0`; None without a driver.
        missing_because: Why there are none; None where there are.
    """

    found: tuple[Gpu, ...] = ()
    cuda: str | None = None
    missing_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def in_words(self) -> list[str]:
        """A line for each GPU."""
        return [
            f"{gpu.name}, compute capability {gpu.compute_capability}, "
            f"{gpu.memory_bytes / 2**30:.1f} GiB, CUDA {self.cuda}"
            for gpu in self.found
        ]


def find_gpus() -> Gpus:
    """The GPUs that the CUDA driver gives to this process, or why there are none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as exc:
        return Gpus(missing_because=f"the CUDA driver is not installed ({exc})")
    count = ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return Gpus(missing_because=f"the CUDA driver fails with {_error_name(cuda, code)}")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return Gpus(
        found=tuple(_describe(cuda, i) for i in range(count.value)),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        missing_because=None if count.value else "the CUDA driver shows no device",
    )


def _error_name(cuda: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _describe(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        memory_bytes=memory.value,
    )
