"""Sessions on CUDA: buffers that stay on the GPU, and CUDA graphs for the shapes that come back.

What ONNX Runtime does not tell, and what is done about it here:

- A recorded graph reads and writes the addresses of its first run. A later run with an input
  elsewhere gives the first input's result, without an error. So each shape has one input and one
  output on the GPU that live as long as its graph, and only their contents change.
- A number of a graph stands for one shape; another shape under it replays the old one. So each
  shape has a number of its own, which is never given again.
- Recording belongs to the thread that did it, is disturbed by any other CUDA call of the process,
  and replaying is not safe from two threads. So all work goes through one thread, and through one
  lock of the process.
- A copy to the GPU may still be under way when it returns. So inputs are waited for.

The module knows ONNX Runtime by the names that it is given, so that tests can give others.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from actionclip_deploy.manifest import GraphSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.call_sizes import RECORDED_SIZES

logger = logging.getLogger(__name__)


# Host memory that the GPU may read on its own: page-locked through the CUDA driver.
#
# ONNX Runtime's Python interface has no page-locked arrays (1.20 to 1.32 know no such device), so
# ordinary memory is registered with the driver here, without any library besides it.


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


T = TypeVar("T")

MAX_SHAPES = 16  # whose buffers are kept at a time
MAX_GRAPHS = 64  # recorded by one session ever, since not every version frees them
_NO_GRAPH = "-1"  # ONNX Runtime's number for a run that neither records nor replays
_DEVICE = "cuda"

_process_lock = threading.Lock()


class DeviceThread:
    """The one thread of a runtime that calls CUDA; other runtimes wait meanwhile."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cuda")

    def call(self, work: Callable[[], T]) -> T:
        """Do some work on the thread and give back what it gives, or raise what it raises."""

        def locked() -> T:
            with _process_lock:
                return work()

        return self._pool.submit(locked).result()

    def copy(self, array: Array, api: Any) -> None:
        """Copy an array to the GPU, wait for it, and forget it."""
        contiguous = np.ascontiguousarray(array)
        self.call(lambda: api.OrtValue.ortvalue_from_numpy(contiguous, _DEVICE, 0))

    def close(self) -> None:
        """End the thread after the work that it has."""
        self._pool.shutdown(wait=True)


class DeviceSession:
    """Runs one graph on the GPU.

    Args:
        session: ONNX Runtime's session on CUDA.
        spec: The graph's input and output.
        thread: What all sessions of the runtime run on.
        api: The onnxruntime module.
        capture: Whether the session records CUDA graphs; batches are then filled up.
    """

    def __init__(
        self, session: Any, spec: GraphSpec, thread: DeviceThread, api: Any, *, capture: bool
    ) -> None:
        self._session = session
        self._spec = spec
        self._thread = thread
        self._api = api
        self._capture = capture
        self._num_graphs = 0
        self._shapes: OrderedDict[tuple[int, ...], _Buffers] = OrderedDict()

    def run(self, array: Array) -> Float32Array:
        """Execute the graph on a contiguous array of the input's dtype; (rows, D), float32."""
        largest = RECORDED_SIZES[-1]
        parts = [array]
        if self._capture and len(array) > largest:
            parts = [array[i : i + largest] for i in range(0, len(array), largest)]
        outputs = [self._thread.call(lambda part=part: self._run(part)) for part in parts]  # type: ignore[misc]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _run(self, array: Array) -> Float32Array:
        rows = len(array)
        buffers = self._buffers((self._num_rows(rows), *array.shape[1:]))
        # The rows beyond hold those of an earlier call. No row depends on another.
        buffers.host.array[:rows] = array
        buffers.given.update_inplace(buffers.host.array)
        buffers.binding.synchronize_inputs()
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        buffers.binding.synchronize_outputs()
        return np.array(buffers.result.numpy()[:rows], np.float32)

    def _num_rows(self, rows: int) -> int:
        if not self._capture:
            return rows
        return next(size for size in RECORDED_SIZES if size >= rows)

    def _buffers(self, shape: tuple[int, ...]) -> _Buffers:
        if shape in self._shapes:
            self._shapes.move_to_end(shape)
            return self._shapes[shape]
        while len(self._shapes) >= MAX_SHAPES:
            _, oldest = self._shapes.popitem(last=False)
            self._free(oldest)
        number = _NO_GRAPH
        if self._capture and self._num_graphs < MAX_GRAPHS:
            self._num_graphs += 1  # 0 is ONNX Runtime's own
            number = str(self._num_graphs)
        elif self._capture:
            logger.warning(
                "%d CUDA graphs were recorded, which is the limit; shape %s runs without one.",
                *(MAX_GRAPHS, shape),
            )
        self._shapes[shape] = _Buffers(self._session, self._spec, self._api, shape, number)
        return self._shapes[shape]

    def _free(self, buffers: _Buffers) -> None:
        """Let go of a shape: first of its graph, then of the memory that the graph works on."""
        if buffers.number != _NO_GRAPH and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(int(buffers.number))
        buffers.host.close()

    def close(self) -> None:
        """Free all buffers after the work that is under way."""
        self._thread.call(self._free_all)

    def _free_all(self) -> None:
        for buffers in self._shapes.values():
            self._free(buffers)
        self._shapes.clear()


class _Buffers:
    """One shape's memory on the host and on the GPU, bound to a session."""

    def __init__(
        self, session: Any, spec: GraphSpec, api: Any, shape: tuple[int, ...], number: str
    ) -> None:
        dtype = np.dtype(spec.input.dtype)
        width = spec.output.shape[-1]
        make = api.OrtValue.ortvalue_from_shape_and_type
        self.number = number
        self.host = PinnedArray(shape, dtype)
        self.given = make(shape, dtype.type, _DEVICE, 0)
        self.result = make((shape[0], width), np.float32, _DEVICE, 0)
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_input(spec.input.name, self.given)
        self.binding.bind_ortvalue_output(spec.output.name, self.result)
        self.options = api.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", number)
