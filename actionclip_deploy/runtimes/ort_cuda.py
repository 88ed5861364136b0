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

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from actionclip_deploy.manifest import GraphSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.pinned_memory import PinnedArray

logger = logging.getLogger(__name__)


T = TypeVar("T")

# Rows of a batch are filled up to one of these; at most a third of the work is for nothing.
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
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
        largest = BATCH_SIZES[-1]
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
        return next(size for size in BATCH_SIZES if size >= rows)

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
