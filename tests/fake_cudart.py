"""The CUDA runtime as cuda-python has it, on the host's memory.

Tests import it by name: `from fake_cudart import FakeCudart`. Streams do their work at once, unless
it is recorded; what was recorded runs again at `cudaGraphLaunch`, on the addresses of then.
"""

# ruff: noqa: N801, N802, N815 - the names are those of cuda-python

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class cudaError_t(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidValue = 1


class FakeCudart:
    """What `Cuda` takes.

    Args:
        name: Of the GPU.
        major: Of its compute capability.
        minor: Of its compute capability.
        uuid: Of the card.
        integrated: Whether it is a Jetson's.
        max_bytes: Beyond which there is no memory on the device.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(
        self,
        *,
        name: str = "Orin",
        major: int = 8,
        minor: int = 7,
        uuid: bytes = b"\x01" * 16,
        integrated: bool = True,
        max_bytes: int = 2**33,
    ) -> None:
        self.name, self.major, self.minor, self.uuid = name, major, minor, uuid
        self.integrated, self.max_bytes = integrated, max_bytes
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self._next = 1

    def submit(self, work: Callable[[], None]) -> None:
        """Do some work of the device now, or record it."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()

    def _number(self) -> int:
        self._next += 1
        return self._next

    def cudaGetErrorName(self, code: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, code.name.encode()

    def cudaGetDeviceProperties(self, device: int) -> Any:
        properties = SimpleNamespace(
            name=self.name.encode(),
            major=self.major,
            minor=self.minor,
            uuid=SimpleNamespace(bytes=self.uuid),
            totalGlobalMem=self.max_bytes,
            integrated=int(self.integrated),
        )
        return cudaError_t.cudaSuccess, properties

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, 12060

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        return cudaError_t.cudaSuccess, self.max_bytes - self._used(), self.max_bytes

    def _used(self) -> int:
        return sum(ctypes.sizeof(memory) for memory in self.memory.values())

    def cudaMalloc(self, size: int) -> Any:
        if self._used() + size > self.max_bytes:
            return cudaError_t.cudaErrorMemoryAllocation, 0
        memory = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(memory)] = memory
        return cudaError_t.cudaSuccess, ctypes.addressof(memory)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        del self.memory[address]
        return (cudaError_t.cudaSuccess,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[cudaError_t]:
        assert stream in self.streams
        self.submit(lambda: ctypes.memmove(target, source, size))
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        stream = self._number()
        self.streams.add(stream)
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        self.streams.remove(stream)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        assert self.recording is None, "a wait ends a recording on a real device"
        return (cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[cudaError_t]:
        self.recording = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        recorded, self.recording = self.recording, None
        graph = self._number()
        self.graphs[graph] = recorded or []
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        executable = self._number()
        self.graphs[executable] = self.graphs[graph]
        return cudaError_t.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[cudaError_t]:
        del self.graphs[graph]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[cudaError_t]:
        self.launches += 1
        for work in self.graphs[executable]:
            work()
        return (cudaError_t.cudaSuccess,)
