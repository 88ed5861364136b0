"""A loaded plan that runs, with contexts and buffers that stay, and recorded work.

- A context belongs to one call at a time, so an engine executes one call after the other, whatever
  the number of threads.
- A recorded graph of work replays the addresses and the shape of its recording, and shares the
  state of its context. So each recorded shape has a context of its own, buffers never move, and
  the first execution of a shape is never the recorded one.
- A new shape has to be inferred through before it runs, and refused if it is not complete.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.files import write_bytes
from actionclip_deploy.manifest import GraphSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.call_sizes import RECORDED_SIZES
from actionclip_deploy.runtimes.trt.api import Api, MessageLog
from actionclip_deploy.runtimes.trt.driver import Cuda, DeviceMemory, HostMemory
from actionclip_deploy.runtimes.trt.plan import ShapeRange, narrowest

logger = logging.getLogger(__name__)

MAX_RECORDED = 8  # shapes of one profile, each with a context of its own


class Engine:
    """One graph, deserialized and ready; thread-safe, one call at a time.

    Args:
        api: The TensorRT that built the plan.
        cuda: The GPU.
        plan: The serialized engine.
        spec: The graph's input and output, from the manifest.
        shapes: Of the input in each optimization profile, as the engine was built.
        record: Whether to record the work of each batch size once and replay it.
        host_code_allowed: Whether the plan holds code to load it with, as one that later
            versions can load does.
        runtime_cache: For TensorRT for RTX: file of the kernels that were compiled on this GPU.

    Raises:
        EngineError: If the plan cannot be loaded or is not of this graph.
        InferenceError: If the GPU gives no memory.
    """

    def __init__(
        self,
        api: Api,
        cuda: Cuda,
        plan: bytes,
        spec: GraphSpec,
        shapes: Sequence[ShapeRange],
        *,
        record: bool = False,
        host_code_allowed: bool = False,
        runtime_cache: Path | None = None,
    ) -> None:
        self._api, self.cuda, self.spec = api, cuda, spec
        self.title, self.shapes = api.title, tuple(shapes)
        self._lock = threading.Lock()
        self.log = MessageLog(api.trt)
        self._runtime = api.trt.Runtime(self.log.logger)
        if host_code_allowed:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{api.title} cannot load the engine ({self.log.text()}); it was built for "
                "another GPU or version, or is damaged: build it again with `actionclip build`."
            )
        self._check()
        self._rtx = _RtxSettings(api, self._engine, runtime_cache) if api.is_rtx else None
        self.stream = cuda.new_stream()
        self.records = record and not api.is_rtx  # TensorRT for RTX records by itself
        self._lanes: dict[int, _Lane] = {}

    def _check(self) -> None:
        """Compare inputs, outputs and profiles with what the engine is said to be."""
        trt, engine = self._api.trt, self._engine
        types = {
            trt.DataType.UINT8: "uint8",
            trt.DataType.INT32: "int32",
            trt.DataType.FLOAT: "float32",
        }
        modes = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
        found = {}
        for place in range(engine.num_io_tensors):
            name = engine.get_tensor_name(place)
            dtype = types.get(engine.get_tensor_dtype(name), "another type")
            shape = tuple(engine.get_tensor_shape(name))
            found[modes[engine.get_tensor_mode(name)], name] = (dtype, len(shape), shape[-1])
        given, result = self.spec.input, self.spec.output
        wanted = {
            ("input", given.name): (given.dtype, len(given.shape), self.shapes[0].max[-1]),
            ("output", result.name): (result.dtype, len(result.shape), int(result.shape[-1])),
        }
        # The last size of an input may be free, as that of prompts.
        fits = found.keys() == wanted.keys() and all(
            found[key] in (tensor, (*tensor[:2], -1)) for key, tensor in wanted.items()
        )
        profiles = tuple(
            ShapeRange(*(tuple(s) for s in engine.get_tensor_profile_shape(given.name, i)))
            for i in range(engine.num_optimization_profiles)
            if fits
        )
        if profiles != self.shapes:
            raise EngineError(
                f"The engine has {found} with the profiles {[p.to_list() for p in profiles]}, "
                f"expected {wanted} with {[s.to_list() for s in self.shapes]}; it is of another "
                "graph: build it again with `actionclip build`."
            )

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch that is executed at once."""
        return max(shape.max[0] for shape in self.shapes)

    def new_context(self) -> Any:
        """TensorRT's execution context, or None where it gives none."""
        make = self._engine.create_execution_context
        return make() if self._rtx is None else make(self._rtx.settings)

    def run(self, array: Array) -> Float32Array:
        """Execute the graph.

        Args:
            array: Of the input's dtype; any number of rows: a batch beyond the profiles is split,
                one below them is filled up.

        Returns:
            Shape (rows, D), float32.

        Raises:
            InferenceError: If the other sizes are beyond the profiles, or the GPU fails.
        """
        array = self._fitting(np.ascontiguousarray(array))
        output = np.empty((len(array), int(self.spec.output.shape[-1])), np.float32)
        with self._lock:
            if self._engine is None:
                raise InferenceError("The engine was closed; open the runtime again.")
            for start, stop, place in self._parts(len(array)):
                output[start:stop] = self._lane(place).run(array[start:stop])
        return output

    def inspect(self) -> str:
        """What the engine's inspector tells of its layers, JSON."""
        inspector = self._engine.create_engine_inspector()
        form = self._api.trt.LayerInformationFormat.JSON
        return str(inspector.get_engine_information(form))

    def close(self) -> None:
        """Free everything, after the call that is under way; may be called again."""
        with self._lock:
            if self._engine is None:
                return
            self.cuda.wait(self.stream)
            for lane in self._lanes.values():
                lane.close()
            self._lanes.clear()
            if self._rtx is not None:
                self._rtx.close()
            # In this order: each was made by the one after it.
            self._rtx = None
            self._engine = None
            self._runtime = None
            self.cuda.call("cudaStreamDestroy", self.stream)

    def copy_to_device(self, array: Array) -> None:
        """Copy an array to where inputs lie, and wait; for measuring."""
        with self._lock:
            for start, stop, place in self._parts(len(array)):
                self._lane(place).copy_in(array[start:stop])
            self.cuda.wait(self.stream)

    def _fitting(self, array: Array) -> Array:
        """Fill prompts up that are shorter than the profile; refuse what is beyond it."""
        low, high = self.shapes[0].min[1:], self.shapes[0].max[1:]
        missing = [max(0, few - size) for size, few in zip(array.shape[1:], low, strict=True)]
        why = None
        if any(size > most for size, most in zip(array.shape[1:], high, strict=True)):
            why = f"at most {high}"
        elif any(missing) and self.spec.input.dtype != "int32":
            why = f"at least {low}"
        if why is not None:
            raise InferenceError(
                f"The input has shape {array.shape} and the engine takes {why} in each row; build "
                "one with `actionclip build --num-frames`."
            )
        if not any(missing):
            return array
        return np.pad(array, [(0, 0), *((0, count) for count in missing)])

    def _parts(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """First row, last row and profile of each execution."""
        for start in range(0, rows, self.max_rows):
            stop = min(rows, start + self.max_rows)
            yield start, stop, narrowest(self.shapes, stop - start)

    def _lane(self, place: int) -> _Lane:
        if place not in self._lanes:
            self._lanes[place] = _Lane(self, place)
        return self._lanes[place]


class _Lane:
    """One optimization profile of an engine: its buffers and contexts; not thread-safe."""

    def __init__(self, owner: Engine, place: int) -> None:
        self._owner, self._place, self._shape = owner, place, owner.shapes[place]
        self._cuda, self._stream, self._spec = owner.cuda, owner.stream, owner.spec
        self._dtype = np.dtype(self._spec.input.dtype)
        self._width = int(self._spec.output.shape[-1])
        num_bytes = self._num_bytes(self._shape.max)
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
        if not (self._owner.records and self._shape.is_fixed_but_rows):
            self._context = self._context or self._new_context()
            self._prepare(self._context, shape)
            self._enqueue(self._context, shape)
        elif shape in self._recorded:
            self._recorded.move_to_end(shape)
            self._cuda.replay(self._recorded[shape][1], self._stream)
        else:
            self._run_and_record(shape)
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
        if not self._owner.records:
            return least
        # Few sizes, so that they recur; the one that kernels were chosen for is among them.
        sizes = sorted({*RECORDED_SIZES, self._shape.opt[0], self._shape.max[0]})
        return next(s for s in sizes if least <= s <= self._shape.max[0])

    def _num_bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * self._dtype.itemsize

    def _new_context(self) -> Any:
        context = self._owner.new_context()
        if context is None:
            raise InferenceError(
                f"{self._owner.title} gives no execution context ({self._owner.log.text()}); "
                "memory of the GPU may have run out: close other programs, or build a smaller "
                "--profile."
            )
        if self._place and not context.set_optimization_profile_async(self._place, self._stream):
            why = self._owner.log.text()
            raise InferenceError(f"The profile {self._place} was refused: {why}.")
        self._cuda.wait(self._stream)
        return context

    def _prepare(self, context: Any, shape: tuple[int, ...]) -> None:
        given, result = self._spec.input.name, self._spec.output.name
        done = context.set_input_shape(given, shape) and not context.infer_shapes()
        expected = (shape[0], self._width)
        if not done or tuple(context.get_tensor_shape(result)) != expected:
            raise InferenceError(
                f"The engine does not take an input of shape {shape} ({self._owner.log.text()}); "
                "build it again with a --profile that holds it."
            )
        context.set_tensor_address(given, self._device_in)
        context.set_tensor_address(result, self._device_out)

    def _enqueue(self, context: Any, shape: tuple[int, ...]) -> None:
        cuda, stream = self._cuda, self._stream
        cuda.copy_in(self._device_in, self._host_in, self._num_bytes(shape), stream)
        if not context.execute_async_v3(stream):
            raise InferenceError(
                f"{self._owner.title} failed on an input of shape {shape}: "
                f"{self._owner.log.text()}; run `actionclip verify` on this bundle."
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


class _RtxSettings:
    """How TensorRT for RTX runs an engine: it compiles on the GPU and records by itself.

    What it compiles is kept in the file `path` from one start to the next.
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
            write_bytes(self._path, compiled)
        except OSError as exc:
            logger.warning("compiled kernels are not kept: %s", exc)
