"""Building a graph, or a part of one, and executing it once: for finding what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.onnx_graphs import write_model
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda, DeviceMemory, HostMemory
from actionclip_deploy.runtimes.trt.messages import MessageLog
from actionclip_deploy.runtimes.trt.plan import BuildOptions, build_plan
from actionclip_deploy.runtimes.trt.profiles import ShapeRange

_NON_BLOCKING = 1  # cuda runtime: cudaStreamNonBlocking


def run_on_cpu(model: Any, inputs: Mapping[str, Array]) -> Float32Array:
    """Execute a graph with ONNX Runtime on the CPU, the reference of a search for a fault.

    Args:
        model: An `onnx.ModelProto` with one output.
        inputs: By name.

    Raises:
        EngineError: If ONNX Runtime is not installed, or has no kernels for the graph.
    """
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernelError
    except ImportError as exc:
        raise EngineError(
            "Finding the part that is wrong needs ONNX Runtime as its reference; run: pip install "
            "onnxruntime"
        ) from exc
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except NoKernelError as exc:
        raise EngineError(
            "ONNX Runtime, the reference of the search, cannot compute this form of the graph on "
            f"the CPU ({str(exc).strip().splitlines()[0]}); remove these engines with `actionclip "
            "engines remove` and search those of the bundle's own graphs."
        ) from exc
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
        """Build a graph and execute it.

        Args:
            model: An `onnx.ModelProto` with one output.
            inputs: By name.

        Raises:
            EngineError: If it cannot be built.
            InferenceError: If it cannot be executed.
        """
        ranges = {name: [self._range(array)] for name, array in inputs.items()}
        with TemporaryDirectory(prefix="actionclip-") as folder:
            path = Path(folder) / "part.onnx"
            write_model(model, path)
            plan = build_plan(self._api, path, ranges, self._options)
        log = MessageLog(self._api.trt)
        runtime = self._api.trt.Runtime(log.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise EngineError(f"A part of the graph cannot be loaded: {log.text()}.")
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise InferenceError(f"A part of the graph takes no {array.shape}: {log.text()}.")
        return self._execute(context, log, inputs, model.graph.output[0].name)

    def _range(self, array: Array) -> ShapeRange:
        times = max(1, len(array) // self._rows)
        low, opt, high = (
            shape[0] * times for shape in (self._shapes.min, self._shapes.opt, self._shapes.max)
        )
        rest = array.shape[1:]
        low, high = min(low, len(array)), max(high, len(array))
        return ShapeRange((low, *rest), (opt, *rest), (high, *rest))

    def _execute(
        self, context: Any, log: MessageLog, inputs: Mapping[str, Array], output: str
    ) -> Float32Array:
        cuda = self._cuda
        context.infer_shapes()
        result = np.empty(tuple(context.get_tensor_shape(output)), np.float32)
        stream = int(cuda.call("cudaStreamCreateWithFlags", _NON_BLOCKING))
        memories: list[HostMemory | DeviceMemory] = []

        def make(name: str, num_bytes: int) -> tuple[HostMemory, DeviceMemory]:
            host, device = HostMemory(cuda, num_bytes), DeviceMemory(cuda, num_bytes)
            memories.extend((host, device))
            context.set_tensor_address(name, device.address)
            return host, device

        try:
            for name, array in inputs.items():
                host, device = make(name, array.nbytes)
                host.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                cuda.copy_in(device.address, host.bytes, array.nbytes, stream)
            host, device = make(output, result.nbytes)
            if not context.execute_async_v3(stream):
                raise InferenceError(f"A part of the graph failed: {log.text()}.")
            cuda.copy_out(host.bytes, device.address, result.nbytes, stream)
            cuda.wait(stream)
            result[:] = host.bytes.view(np.float32).reshape(result.shape)
            return result
        finally:
            for memory in memories:
                memory.close()
            cuda.call("cudaStreamDestroy", stream)
