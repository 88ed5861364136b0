"""An engine that runs: contexts, buffers that stay, and recorded work for the shapes that recur.

What has to be held to, and is here:

- A context belongs to one call at a time, so an engine executes one call after the other, whatever
  the number of threads.
- A recorded graph of work replays the addresses and the shape of its recording, and shares the
  state of its context. So each recorded shape has a context of its own, buffers never move, and
  the first execution of a shape is never the recorded one.
- A new shape has to be inferred through before it runs, and refused if it is not complete.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.manifest import GraphSpec, TensorSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.lanes import Lane, Loaded, RtxSettings
from actionclip_deploy.runtimes.trt.messages import MessageLog
from actionclip_deploy.runtimes.trt.profiles import ShapeRange, narrowest

_NON_BLOCKING = 1  # cuda runtime: cudaStreamNonBlocking


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
        self._api, self._cuda, self._spec = api, cuda, spec
        self._shapes = tuple(shapes)
        self._lock = threading.Lock()
        self._log = MessageLog(api.trt)
        self._runtime = api.trt.Runtime(self._log.logger)
        if host_code_allowed:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{api.title} cannot load the engine ({self._log.text()}); it was built for "
                "another GPU or version, or is damaged: build it again with `actionclip build`."
            )
        self._check()
        self._rtx = RtxSettings(api, self._engine, runtime_cache) if api.is_rtx else None
        self._stream = int(cuda.call("cudaStreamCreateWithFlags", _NON_BLOCKING))
        self._record = record and not api.is_rtx  # TensorRT for RTX records by itself
        self._lanes: dict[int, Lane] = {}

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
        given, result = self._spec.input, self._spec.output
        wanted = {
            ("input", given.name): _layout(given, self._shapes[0].max[-1]),
            ("output", result.name): _layout(result, int(result.shape[-1])),
        }
        # The last size of an input may be free, as that of prompts.
        fits = {k: v[:2] for k, v in found.items()} == {
            k: v[:2] for k, v in wanted.items()
        } and all(found[k][2] in (v[2], -1) for k, v in wanted.items())
        profiles = tuple(
            ShapeRange(*(tuple(s) for s in engine.get_tensor_profile_shape(given.name, i)))
            for i in range(engine.num_optimization_profiles)
            if fits
        )
        if not fits or profiles != self._shapes:
            raise EngineError(
                f"The engine has {found} with the profiles {[p.to_list() for p in profiles]}, "
                f"expected {wanted} with {[s.to_list() for s in self._shapes]}; it is of another "
                "graph: build it again with `actionclip build`."
            )

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch that is executed at once."""
        return max(shape.max[0] for shape in self._shapes)

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
        output = np.empty((len(array), int(self._spec.output.shape[-1])), np.float32)
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
            self._cuda.wait(self._stream)
            for lane in self._lanes.values():
                lane.close()
            self._lanes.clear()
            if self._rtx is not None:
                self._rtx.close()
            # In this order: each was made by the one after it.
            self._rtx = None
            self._engine = None
            self._runtime = None
            self._cuda.call("cudaStreamDestroy", self._stream)

    def copy_to_device(self, array: Array) -> None:
        """Copy an array to where inputs lie, and wait; for measuring."""
        with self._lock:
            for start, stop, place in self._parts(len(array)):
                self._lane(place).copy_in(array[start:stop])
            self._cuda.wait(self._stream)

    def _fitting(self, array: Array) -> Array:
        """Fill prompts up that are shorter than the profile; refuse what is beyond it."""
        low, high = self._shapes[0].min[1:], self._shapes[0].max[1:]
        sizes = array.shape[1:]
        if any(size > most for size, most in zip(sizes, high, strict=True)):
            raise InferenceError(
                f"The input has shape {array.shape} and the engine takes at most {high} in each "
                "row; build one with `actionclip build --frames`."
            )
        missing = [max(0, few - size) for size, few in zip(sizes, low, strict=True)]
        if not any(missing):
            return array
        if self._spec.input.dtype != "int32":
            raise InferenceError(
                f"The input has shape {array.shape} and the engine takes at least {low} in each "
                "row; build one with `actionclip build --frames`."
            )
        return np.pad(array, [(0, 0), *((0, count) for count in missing)])

    def _parts(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """First row, last row and profile of each execution."""
        for start in range(0, rows, self.max_rows):
            stop = min(rows, start + self.max_rows)
            yield start, stop, narrowest(self._shapes, stop - start)

    def _lane(self, place: int) -> Lane:
        if place not in self._lanes:
            loaded = Loaded(
                self._api.title,
                self._cuda,
                self._engine,
                self._log,
                self._spec,
                self._stream,
                self._record,
                self._rtx,
            )
            self._lanes[place] = Lane(loaded, place, self._shapes[place])
        return self._lanes[place]


def _layout(spec: TensorSpec, last: int) -> tuple[str, int, int]:
    return spec.dtype, len(spec.shape), last
