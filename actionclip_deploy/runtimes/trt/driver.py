"""CUDA through cuda-python: the device, its memory, streams and recorded graphs of work.

Every call gives an error code first; here it becomes an `InferenceError` that names the call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from actionclip_deploy.errors import InferenceError, MissingExtraError, RuntimeUnavailableError
from actionclip_deploy.runtimes.base import Array

_NON_BLOCKING = 1  # cudaStreamNonBlocking


@dataclass(frozen=True)
class Device:
    """The GPU that everything runs on."""

    name: str
    compute_capability: str  # such as 8.7
    uuid: str  # of this very card, hexadecimal
    total_bytes: int
    integrated: bool  # whether it shares the memory of the CPU, as on a Jetson
    driver: str  # its CUDA version, such as 13.0


class Cuda:
    """The first GPU of this process.

    Args:
        runtime: `cuda.bindings.runtime`, or something with the same functions.

    Raises:
        InferenceError: If the driver fails.
    """

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime
        properties = self.call("cudaGetDeviceProperties", 0)
        driver = self.call("cudaDriverGetVersion")
        self.device = Device(
            name=_text(properties.name).strip("\0"),
            compute_capability=f"{properties.major}.{properties.minor}",
            uuid=bytes(properties.uuid.bytes).hex(),
            total_bytes=int(properties.totalGlobalMem),
            integrated=bool(properties.integrated),
            driver=f"{driver // 1000}.{driver % 1000 // 10}",
        )

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return what it gives besides the error code.

        Raises:
            InferenceError: If it gives an error.
        """
        code, *given = getattr(self._rt, function)(*arguments)
        if code != self._rt.cudaError_t.cudaSuccess:
            _, name = self._rt.cudaGetErrorName(code)
            raise InferenceError(
                f"CUDA's {function} failed with {_text(name)}; give smaller batches if memory ran "
                "out, otherwise see what `actionclip doctor` says about the driver."
            )
        return tuple(given) if len(given) > 1 else given[0] if given else None

    def free_bytes(self) -> int:
        """Memory of the GPU that is not in use."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def new_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def wait(self, stream: int) -> None:
        """Wait for everything on a stream."""
        self.call("cudaStreamSynchronize", stream)

    def copy_in(self, target: int, source: Array, num_bytes: int, stream: int) -> None:
        """Begin a copy from page-locked memory to the GPU."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source.ctypes.data, num_bytes, kind, stream)

    def copy_out(self, target: Array, source: int, num_bytes: int, stream: int) -> None:
        """Begin a copy from the GPU to page-locked memory."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, source, num_bytes, kind, stream)

    def begin_recording(self, stream: int) -> None:
        """Record what follows on a stream instead of doing it; other threads may go on."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)

    def end_recording(self, stream: int) -> Any:
        """End the recording; gives what `replay` takes."""
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def replay(self, recorded: Any, stream: int) -> None:
        """Begin what was recorded."""
        self.call("cudaGraphLaunch", recorded, stream)

    def forget(self, recorded: Any) -> None:
        """Free a recording."""
        self.call("cudaGraphExecDestroy", recorded)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


class HostMemory:
    """Page-locked memory of the host, as an array of bytes."""

    def __init__(self, cuda: Cuda, num_bytes: int) -> None:
        self._cuda = cuda
        self._address = int(cuda.call("cudaHostAlloc", num_bytes, 0))
        memory = (ctypes.c_uint8 * num_bytes).from_address(self._address)
        self.bytes: Array = np.ctypeslib.as_array(memory)

    def close(self) -> None:
        """Free it; the array must not be used afterwards. May be called again."""
        if self._address:
            self._cuda.call("cudaFreeHost", self._address)
            self._address = 0


class DeviceMemory:
    """Memory of the GPU."""

    def __init__(self, cuda: Cuda, num_bytes: int) -> None:
        self._cuda = cuda
        self.address = int(cuda.call("cudaMalloc", num_bytes))

    def close(self) -> None:
        """Free it; may be called again."""
        if self.address:
            self._cuda.call("cudaFree", self.address)
            self.address = 0


def open_cuda() -> Cuda:
    """CUDA on the first GPU of this process.

    Raises:
        MissingExtraError: If cuda-python is not installed.
        RuntimeUnavailableError: If it cannot be loaded or the driver fails.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as exc:
        raise MissingExtraError("TensorRT on a GPU", "cuda") from exc
    except ImportError as exc:
        raise RuntimeUnavailableError(
            f"cuda-python is installed but cannot be loaded ({exc}); install the version of your "
            "CUDA: cuda-python<13 for CUDA 12, as on JetPack 6."
        ) from exc
    try:
        return Cuda(runtime)
    except InferenceError as exc:
        raise RuntimeUnavailableError(f"The GPU cannot be used: {exc}") from exc
