"""The batch sizes of one optimization profile: buffers, contexts, recorded work."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.errors import InferenceError
from actionclip_deploy.manifest import GraphSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.cache_entries import replace_file
from actionclip_deploy.runtimes.ort_cuda import BATCH_SIZES
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda, DeviceMemory, HostMemory
from actionclip_deploy.runtimes.trt.messages import MessageLog
from actionclip_deploy.runtimes.trt.profiles import ShapeRange

logger = logging.getLogger(__name__)

MAX_RECORDED = 8  # shapes of one profile, each with a context of its own


class RtxSettings:
    """How TensorRT for RTX runs an engine: it compiles on the GPU and records by itself.

    Args:
        api: TensorRT for RTX.
        engine: The engine.
        path: Where what it compiles is kept from one start to the next; None for nowhere.
    """

    def __init__(self, api: Api, engine: Any, path: Path | None) -> None:
        self._path = path
        self.settings = engine.create_runtime_config()
        self.settings.cuda_graph_strategy = api.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self.settings.create_runtime_cache()
        self._known = b""
        if path is not None and path.exists():
            self._known = path.read_bytes()
            if not self._cache.deserialize(self._known):
                logger.warning("%s is of another GPU or version and is made anew.", path)
        self.settings.set_runtime_cache(self._cache)

    def close(self) -> None:
        """Keep what was compiled."""
        compiled = bytes(self._cache.serialize() or b"")
        if self._path is None or not compiled or compiled == self._known:
            return
        try:
            replace_file(self._path, compiled)
        except OSError as exc:
            logger.warning("compiled kernels are not kept: %s", exc)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A deserialized engine and what it runs on.

    Attributes:
        title: Name and version of the TensorRT, for messages.
        cuda: The GPU.
        engine: TensorRT's engine.
        log: What TensorRT says.
        spec: The graph's input and output.
        stream: All work goes through it.
        record: Whether work is recorded once per batch size and replayed.
        rtx: For TensorRT for RTX, how it runs.
    """

    title: str
    cuda: Cuda
    engine: Any
    log: MessageLog
    spec: GraphSpec
    stream: int
    record: bool
    rtx: RtxSettings | None


class Lane:
    """One optimization profile: its buffers and its contexts; not thread-safe.

    Args:
        loaded: The engine and what it runs on.
        place: Number of the profile.
        shape: Of the input in it.
    """

    def __init__(self, loaded: Loaded, place: int, shape: ShapeRange) -> None:
        self._loaded, self._place, self._shape = loaded, place, shape
        self._cuda, self._stream, self._spec = loaded.cuda, loaded.stream, loaded.spec
        self._dtype = np.dtype(self._spec.input.dtype)
        self._width = int(self._spec.output.shape[-1])
        num_bytes = int(np.prod(self._shape.max)) * self._dtype.itemsize
        out_bytes = self._shape.max[0] * self._width * 4
        self._memory: list[HostMemory | DeviceMemory] = []
        self._host_in, self._host_out = self._host(num_bytes), self._host(out_bytes)
        self._device_in, self._device_out = self._on_device(num_bytes), self._on_device(out_bytes)
        self._context: Any = None
        self._recorded: OrderedDict[tuple[int, ...], tuple[Any, Any]] = OrderedDict()

    def _host(self, num_bytes: int) -> Array:
        memory = HostMemory(self._cuda, num_bytes)
        self._memory.append(memory)
        return memory.bytes

    def _on_device(self, num_bytes: int) -> int:
        memory = DeviceMemory(self._cuda, num_bytes)
        self._memory.append(memory)
        return memory.address

    def run(self, array: Array) -> Float32Array:
        """Execute at most as many rows as the profile takes."""
        shape = self._place_rows(array)
        record = self._loaded.record and self._shape.is_fixed_but_rows
        if record and shape in self._recorded:
            self._recorded.move_to_end(shape)
            self._cuda.replay(self._recorded[shape][1], self._stream)
        elif record:
            self._run_and_record(shape)
        else:
            self._context = self._context or self._new_context()
            self._prepare(self._context, shape)
            self._enqueue(self._context, shape)
        self._cuda.wait(self._stream)
        values = self._host_out[: shape[0] * self._width * 4].view(np.float32)
        return np.array(values.reshape(shape[0], self._width)[: len(array)])

    def copy_in(self, array: Array) -> None:
        """Begin the copy of rows to the GPU."""
        shape = self._place_rows(array)
        self._cuda.copy_in(self._device_in, self._host_in, self._num_bytes(shape), self._stream)

    def _place_rows(self, array: Array) -> tuple[int, ...]:
        """Write rows into page-locked memory, filled up; gives the shape."""
        rows = self._filled(len(array))
        shape = (rows, *array.shape[1:])
        host = self._host_in[: self._num_bytes(shape)].view(self._dtype).reshape(shape)
        host[: len(array)] = array
        host[len(array) :] = array[-1]
        return shape

    def _filled(self, rows: int) -> int:
        least = max(rows, self._shape.min[0])
        if not self._loaded.record:
            return least
        # Few sizes, so that they recur; the one that kernels were chosen for is among them.
        sizes = sorted({*BATCH_SIZES, self._shape.opt[0], self._shape.max[0]})
        return next(s for s in sizes if least <= s <= self._shape.max[0])

    def _num_bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * self._dtype.itemsize

    def _new_context(self) -> Any:
        loaded = self._loaded
        make = loaded.engine.create_execution_context
        context = make() if loaded.rtx is None else make(loaded.rtx.settings)
        if context is None:
            raise InferenceError(
                f"{loaded.title} gives no execution context ({loaded.log.text()}); memory of "
                "the GPU may have run out: close other programs, or build a smaller --profile."
            )
        if self._place and not context.set_optimization_profile_async(self._place, self._stream):
            raise InferenceError(f"The profile {self._place} was refused: {loaded.log.text()}.")
        self._cuda.wait(self._stream)
        return context

    def _prepare(self, context: Any, shape: tuple[int, ...]) -> None:
        given, result = self._spec.input.name, self._spec.output.name
        done = context.set_input_shape(given, shape) and not context.infer_shapes()
        expected = (shape[0], self._width)
        if not done or tuple(context.get_tensor_shape(result)) != expected:
            raise InferenceError(
                f"The engine does not take an input of shape {shape} ({self._loaded.log.text()}); "
                "build it again with a --profile that holds it."
            )
        context.set_tensor_address(given, self._device_in)
        context.set_tensor_address(result, self._device_out)

    def _enqueue(self, context: Any, shape: tuple[int, ...]) -> None:
        cuda, stream = self._cuda, self._stream
        cuda.copy_in(self._device_in, self._host_in, self._num_bytes(shape), stream)
        if not context.execute_async_v3(stream):
            raise InferenceError(
                f"{self._loaded.title} failed on an input of shape {shape}: "
                f"{self._loaded.log.text()}; run `actionclip verify` on this bundle."
            )
        cuda.copy_out(self._host_out, self._device_out, shape[0] * self._width * 4, stream)

    def _run_and_record(self, shape: tuple[int, ...]) -> None:
        while len(self._recorded) >= MAX_RECORDED:
            _, (_, oldest) = self._recorded.popitem(last=False)
            self._cuda.forget(oldest)
        context = self._new_context()
        self._prepare(context, shape)
        self._enqueue(context, shape)  # what is done once only must not be recorded
        self._cuda.wait(self._stream)
        self._cuda.begin_recording(self._stream)
        try:
            self._enqueue(context, shape)
        except BaseException:
            self._cuda.forget(self._cuda.end_recording(self._stream))
            raise
        self._recorded[shape] = (context, self._cuda.end_recording(self._stream))

    def close(self) -> None:
        """Free buffers, contexts and recordings."""
        for _, recorded in self._recorded.values():
            self._cuda.forget(recorded)
        self._recorded.clear()
        self._context = None
        for memory in self._memory:
            memory.close()
