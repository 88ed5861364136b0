"""TensorRT's Python module as far as the package calls it, on ONNX Runtime's CPU.

A test places this module under the name `tensorrt` in `sys.modules` (fixture `tensorrt`). Its
classes and their public names are those of the real module, which a test checks. A plan is a line
of JSON and the ONNX file. What a real TensorRT does wrong now and then is switched on in `state`.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cudart import FakeCudart
from onnx.reference import ReferenceEvaluator

__version__ = "10.13.3"


@dataclass
class _State:
    """What happens; a test changes it."""

    cudart: FakeCudart = field(default_factory=FakeCudart)
    faults: set[str] = field(default_factory=set)
    # Whether the faults of a built engine strike, given its model and what it was built with.
    strikes: Callable[[onnx.ModelProto, dict[str, Any]], bool] = lambda *_: True
    num_builds: int = 0
    num_refits: int = 0
    inspector_form: int = 10


state = _State()


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE


class IProgressMonitor:
    pass


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    UINT8 = 5


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 1
    VERSION_COMPATIBLE = 2
    STRIP_PLAN = 3
    REFIT = 4


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class HardwareCompatibilityLevel(enum.Enum):
    AMPERE_PLUS = 1


class LayerInformationFormat(enum.Enum):
    JSON = 1


class SerializationFlag(enum.Enum):
    EXCLUDE_WEIGHTS = 0


class ComputeCapability(enum.Enum):
    SM75 = 75
    SM86 = 86
    SM89 = 89
    SM120 = 120


class CudaGraphStrategy(enum.Enum):
    WHOLE_GRAPH_CAPTURE = 1


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model: onnx.ModelProto | None = None


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
            self._errors.append(ParserError("No importer registered for op: DynamicQuantizeLinear"))
            return False
        self._network._model = model
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data

    def combine(self, other: ITimingCache, ignore_mismatch: bool) -> bool:
        if other._data not in self._data:
            self._data += other._data
        return True


class IBuilderConfig:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.profiling_verbosity: Any = None
        self.hardware_compatibility_level: Any = None
        self.progress_monitor: Any = None
        self.num_compute_capabilities = 0
        self._flags = {BuilderFlag.TF32}
        self._pools: dict[MemoryPoolType, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._targets: dict[int, Any] = {}
        self._timing: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._pools[pool] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_compute_capability(self, capability: Any, place: int) -> bool:
        self._targets[place] = capability
        return True

    def create_timing_cache(self, data: bytes) -> ITimingCache | None:
        return None if data.startswith(b"not") else ITimingCache(data)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timing = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        assert self._timing is not None
        self._timing._data += b"[timed]"
        return self._timing


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        state.num_builds += 1
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 2)
        if not monitor.step_complete("Building Engine", 0):
            return None
        if "out of memory" in state.faults:
            text = "[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)"
            self._logger.log(ILogger.ERROR, text)
            return None
        monitor.step_complete("Building Engine", 1)
        monitor.phase_finish("Building Engine")
        return _write_plan(network, config)


def _write_plan(network: INetworkDefinition, config: IBuilderConfig) -> bytes:
    model = network._model
    assert model is not None
    head = {
        "version": __version__,
        "gpu": state.cudart.name,
        "level": config.builder_optimization_level,
        "profiles": [profile._shapes for profile in config._profiles],
        "strongly_typed": network._flags & 2,
        "stripped": BuilderFlag.STRIP_PLAN in config._flags,
        "tf32": BuilderFlag.TF32 in config._flags,
    }
    head["faults"] = sorted(state.faults) if state.strikes(model, head) else []
    if head["stripped"]:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= 1024:
                tensor.raw_data = bytes(len(tensor.raw_data))
    return json.dumps(head).encode() + b"\n" + model.SerializeToString()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        head, _, model = plan.partition(b"\n")
        try:
            built = json.loads(head)
            if (built["version"], built["gpu"]) != (__version__, state.cudart.name):
                raise ValueError("it was built for another version or GPU")
            return ICudaEngine(built, onnx.load_model_from_string(model))
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with a plan
            self._logger.log(ILogger.ERROR, f"Error Code 1: Serialization ({exc})")
            return None


class ISerializationConfig:
    def __init__(self) -> None:
        self._flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag: SerializationFlag) -> bool:
        self._flags.discard(flag)
        return True

    def set_flag(self, flag: SerializationFlag) -> bool:
        self._flags.add(flag)
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self._data = b""

    def deserialize(self, data: bytes) -> bool:
        self._data = data
        return True

    def serialize(self) -> bytes:
        return self._data or b"compiled kernels"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        return True


class ICudaEngine:
    def __init__(self, built: dict[str, Any], model: onnx.ModelProto) -> None:
        self._built, self._model = built, model
        self._session: Any = None
        self._output_shapes: dict[tuple[tuple[int, ...], ...], tuple[int, ...]] = {}
        self._tensors = {given.name: (TensorIOMode.INPUT, given) for given in model.graph.input}
        self._tensors |= {given.name: (TensorIOMode.OUTPUT, given) for given in model.graph.output}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._built["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {1: DataType.FLOAT, 2: DataType.UINT8, 6: DataType.INT32, 10: DataType.HALF}
        return kinds[self._tensors[name][1].type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = self._tensors[name][1].type.tensor_type.shape.dim
        return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._built["profiles"][profile_index][name]]

    def create_execution_context(self, config: IRuntimeConfig | None = None) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig()

    def serialize_with_config(self, config: ISerializationConfig) -> bytes:
        head = {**self._built, "stripped": SerializationFlag.EXCLUDE_WEIGHTS in config._flags}
        return json.dumps(head).encode() + b"\n" + self._model.SerializeToString()

    def _compute(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if self._session is None:
            self._session = _session(self._model)
        output: np.ndarray = self._session.run(None, inputs)[0]
        return _with_faults(output, set(self._built["faults"]))


def _session(model: onnx.ModelProto) -> Any:
    if any(t.data_type == onnx.TensorProto.BFLOAT16 for t in model.graph.initializer):
        return ReferenceEvaluator(model)  # ONNX Runtime's CPU has no kernels of bf16
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more would wait for one another at each node of so few
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _with_faults(output: np.ndarray, faults: set[str]) -> np.ndarray:
    if "wrong" in faults:
        output = output[..., ::-1].copy()
    if "wrong in batches" in faults and len(output) > 1:
        output = np.concatenate([output[:1], output[1:, ..., ::-1]])
    if "rows leak" in faults:
        output = output + 0.2 * np.roll(output, 1, axis=0)
    if "not finite" in faults:
        output = np.full_like(output, np.nan)
    return output


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self._shapes.pop(name, None)
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        return [name for name in self._inputs() if name not in self._shapes]

    def _inputs(self) -> dict[str, Any]:
        tensors = self._engine._tensors.items()
        return {name: given for name, (mode, given) in tensors if mode is TensorIOMode.INPUT}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        inputs = self._inputs()
        known, shapes = self._engine._output_shapes, tuple(self._shapes[n] for n in inputs)
        if shapes not in known:
            zeros = {n: np.zeros(self._shapes[n], _dtype(given)) for n, given in inputs.items()}
            known[shapes] = self._engine._compute(zeros).shape
        return known[shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if "execution fails" in self._engine._built["faults"]:
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        result = addresses[self._engine._model.graph.output[0].name]

        def work() -> None:
            inputs = {}
            for name, given in self._inputs().items():
                dtype = np.dtype(_dtype(given))
                size = int(np.prod(shapes[name])) * dtype.itemsize
                data = ctypes.string_at(addresses[name], size)
                inputs[name] = np.frombuffer(data, dtype).reshape(shapes[name])
            output = np.ascontiguousarray(self._engine._compute(inputs), np.float32)
            ctypes.memmove(result, output.ctypes.data, output.nbytes)

        state.cudart.submit(work)
        return True


def _dtype(given: Any) -> type:
    return {1: np.float32, 2: np.uint8, 6: np.int32}[given.type.tensor_type.elem_type]


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        from fake_inspector import engine_information

        lowered = "silently fp32" not in self._engine._built["faults"]
        return engine_information(self._engine._model, lowered, form=state.inspector_form)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._model: onnx.ModelProto | None = None

    def refit_cuda_engine(self) -> bool:
        if self._model is None:
            return False
        state.num_refits += 1
        self._engine._model = self._model
        self._engine._session = None
        return True

    def get_missing_weights(self) -> list[str]:
        return [] if self._model is not None else ["weights"]


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def refit_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        before = [(t.name, tuple(t.dims)) for t in self._refitter._engine._model.graph.initializer]
        if before != [(t.name, tuple(t.dims)) for t in model.graph.initializer]:
            self._errors.append(ParserError("the weights have other names or shapes"))
            return False
        self._refitter._model = model
        return True
