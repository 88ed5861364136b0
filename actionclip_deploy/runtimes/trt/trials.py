"""Building a graph, or a part of one, and executing it once: for finding what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import TensorProto

from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.builder import BuildOptions, build_plan
from actionclip_deploy.runtimes.trt.driver import Cuda, DeviceMemory, HostMemory
from actionclip_deploy.runtimes.trt.messages import MessageLog
from actionclip_deploy.runtimes.trt.onnx_graphs import write_graph
from actionclip_deploy.runtimes.trt.profiles import ShapeRange

_NON_BLOCKING = 1  # cuda runtime: cudaStreamNonBlocking


def run_on_cpu(model: Any, inputs: Mapping[str, Array]) -> Float32Array:
    """Execute a graph with ONNX Runtime on the CPU, the reference of a search for a fault.

    Args:
        model: An `onnx.ModelProto` with one output.
        inputs: By name.

    Raises:
        EngineError: If ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise EngineError(
            "Finding the part that is wrong needs ONNX Runtime as its reference; run: pip install "
            "onnxruntime"
        ) from exc
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    output: Float32Array = session.run(None, dict(inputs))[0]
    return output.astype(np.float32)


class Trial:
    """Builds parts of a graph as an engine of the whole was built, and executes each once.

    Args:
        api: The TensorRT.
        cuda: The GPU.
        options: How the engine was built.
        shapes: Of the whole graph's input, in the profile to look at.
        rows: Rows of the whole graph's input; a part whose input has more gets a profile as many
            times as wide.
    """

    def __init__(
        self, api: Api, cuda: Cuda, options: BuildOptions, shapes: ShapeRange, rows: int
    ) -> None:
        self._api, self._cuda, self._options = api, cuda, options
        self._shapes, self._rows = shapes, rows

    def run(self, model: Any, inputs: Mapping[str, Array]) -> Float32Array:
        """Build a graph of one input and one output, and execute it.

        Args:
            model: An `onnx.ModelProto`.
            inputs: The one input, by its name.

        Raises:
            EngineError: If it cannot be built.
            InferenceError: If it cannot be executed.
        """
        ((name, array),) = inputs.items()
        with TemporaryDirectory(prefix="actionclip-") as folder:
            path = Path(folder) / "part.onnx"
            write_graph(model, path)
            plan = build_plan(self._api, path, [self._range(array)], self._options, input_name=name)
        log = MessageLog(self._api.trt)
        runtime = self._api.trt.Runtime(log.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"A part of the graph cannot be loaded: {log.text()}.")
        return self._execute(engine, log, name, np.ascontiguousarray(array), model)

    def _range(self, array: Array) -> ShapeRange:
        times = max(1, len(array) // self._rows)
        low, opt, high = (
            shape[0] * times for shape in (self._shapes.min, self._shapes.opt, self._shapes.max)
        )
        rest = array.shape[1:]
        low, high = min(low, len(array)), max(high, len(array))
        return ShapeRange((low, *rest), (opt, *rest), (high, *rest))

    def _execute(
        self, engine: Any, log: MessageLog, name: str, array: Array, model: Any
    ) -> Float32Array:
        cuda, result = self._cuda, model.graph.output[0]
        dtype = np.dtype(
            np.float16 if result.type.tensor_type.elem_type == TensorProto.FLOAT16 else np.float32
        )
        context = engine.create_execution_context()
        if context is None or not context.set_input_shape(name, array.shape):
            raise InferenceError(f"A part of the graph cannot be executed: {log.text()}.")
        context.infer_shapes()
        shape = tuple(context.get_tensor_shape(result.name))
        out_bytes = int(np.prod(shape)) * dtype.itemsize
        stream = int(cuda.call("cudaStreamCreateWithFlags", _NON_BLOCKING))
        sizes = (array.nbytes, out_bytes)
        host = [HostMemory(cuda, size) for size in sizes]
        device = [DeviceMemory(cuda, size) for size in sizes]
        try:
            host[0].bytes[:] = array.reshape(-1).view(np.uint8)
            cuda.copy_in(device[0].address, host[0].bytes, array.nbytes, stream)
            context.set_tensor_address(name, device[0].address)
            context.set_tensor_address(result.name, device[1].address)
            if not context.execute_async_v3(stream):
                raise InferenceError(f"A part of the graph failed: {log.text()}.")
            cuda.copy_out(host[1].bytes, device[1].address, out_bytes, stream)
            cuda.wait(stream)
            return host[1].bytes.view(dtype).reshape(shape).astype(np.float32)
        finally:
            memories: list[HostMemory | DeviceMemory] = [*host, *device]
            for memory in memories:
                memory.close()
            cuda.call("cudaStreamDestroy", stream)
