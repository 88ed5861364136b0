"""OpenVINO: executes the graphs of a bundle on a CPU, or on one of Intel's GPUs or NPUs.

What OpenVINO does by itself, and what this module does about it:

- It computes fp32 graphs in bf16 where the CPU has it and in fp16 on GPUs, and gives bf16 where
  fp16 was asked for and is not there, all without an error. So the precision is always named, and
  read back from what was compiled; `audit` looks at every product.
- It offers what is no ONNX file to the readers of other frameworks, which print. So ONNX is read
  by its own reader.
- It imports a compiled graph of which bytes were altered. So those are kept in the cache of all
  graphs, which compares their sha256.
- It pins threads to cores, the same ones in every process. So that is switched off.
- Its CPU plugin gives the thread that loads it a stack for signals, and frees that with the plugin
  (2026.4). After two that were closed in the order in which they were opened, or one that another
  thread closed, the next signal, such as Ctrl-C, would end the process without a word. So there
  is one `Core` in a process, for good.
- Its import tells Google Analytics of itself, from a fork of the process (2026.4) that may wait for
  ever for a lock which another thread held, and the process for it. Its converter of models does
  that, which nothing here needs and which takes a third of the import. So it is left out.
- A token outside of the vocabulary reads whatever lies there. So tokens are compared with it.
"""

from __future__ import annotations

import io
import logging
import queue
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.manifest import GraphName, TensorSpec
from actionclip_deploy.runtimes.base import (
    Array,
    Audit,
    AuditedProduct,
    Float32Array,
    GraphProduct,
    ProductPrecision,
    Runtime,
    RuntimeInfo,
)
from actionclip_deploy.runtimes.call_sizes import frames_in_caches
from actionclip_deploy.runtimes.graph_cache import (
    BLOB_NAME,
    GraphCache,
    GraphFiles,
    NotCachedError,
)
from actionclip_deploy.runtimes.machine import (
    check_num_threads,
    cpu_has_bf16,
    cpu_identity,
    num_available_cores,
    num_cores,
    version_numbers,
)

_CONVERTER = "openvino.tools.ovc"


def _convert_model(*given: Any, **options: Any) -> Any:
    """Stands for `openvino.convert_model` until somebody calls it."""
    openvino.convert_model = import_module(_CONVERTER).convert_model
    return openvino.convert_model(*given, **options)


@contextmanager
def _without_the_converter() -> Iterator[None]:
    if "openvino" in sys.modules:
        yield
        return
    # Its import fails, which OpenVINO takes for a package without it.
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(_CONVERTER, None)


try:
    with _without_the_converter():
        import openvino
        from openvino import frontend
except ModuleNotFoundError as exc:
    raise MissingExtraError("The openvino runtime", "openvino") from exc
except ImportError as exc:
    raise RuntimeUnavailableError(
        f"openvino is installed and cannot be loaded ({exc}); reinstall it for this platform."
    ) from exc

logger = logging.getLogger(__name__)

if not hasattr(openvino, "convert_model"):
    openvino.convert_model = _convert_model

_BUILD: str = openvino.__version__  # such as 2026.4.1-22982-e213a147257-releases/2026/4
VERSION = _BUILD.partition("-")[0]

_OLDEST = (2025, 4)  # takes a compiled graph in memory that is mapped

# Those of the readers share no base class but Exception.
_FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(e for e in vars(frontend).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,
    TypeError,
    ValueError,
)

FloatPrecision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[FloatPrecision, ...] = get_args(FloatPrecision)

# As a device lists what it computes in, and as it is asked for it.
_CAPABILITIES: dict[FloatPrecision, str] = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
_HINTS: dict[FloatPrecision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_TYPE_NAMES: dict[str, ProductPrecision] = {
    **{"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"},
}

DEVICES = ("cpu", "gpu", "npu")
_NEEDS = {
    "GPU": (
        "install Intel's compute runtime for it (on Ubuntu intel-opencl-icd and libze-intel-gpu1) "
        "and let this user open /dev/dri/renderD128, for example by the group render"
    ),
    "NPU": (
        "install Intel's NPU driver (on Linux intel/linux-npu-driver) and let this user open "
        "/dev/accel/accel0, for example by the group render"
    ),
}


class OpenVinoRuntime(Runtime):
    """Executes a bundle with OpenVINO.

    A graph is read when it is first used; the device is looked for at once. Calls may come from
    several threads at a time.

    Args:
        bundle: The bundle to execute.
        device: `cpu`; `gpu` for Intel's GPU, `gpu:1` for the second one; `npu`.
        precision: What is computed in where the graph is not quantised: `fp32`, `fp16` or `bf16`.
            None takes that of the graphs; fp16 graphs are computed in fp32 on a device without
            fp16. What is quantised stays int8.
        num_threads: Threads on the CPU; None takes the cores that this process may use, in a
            container those of its quota.
        cache: Where to keep the graphs as they are compiled for this device; None for nowhere.

    Raises:
        ValueError: If there is no such device or precision, or `num_threads` is below 1 or far
            above the cores that there are or given elsewhere than on the CPU.
        RuntimeUnavailableError: If the device is not there, or does not compute in this precision.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        precision: str | None = None,
        num_threads: int | None = None,
        cache: GraphCache | None = None,
    ) -> None:
        super().__init__(bundle.manifest)
        check_num_threads("num_threads", num_threads)
        _check_version()
        _check_quantization(bundle)
        self._device = _device_name(device)
        self._on_cpu = self._device == "CPU"
        # Whether the device takes no free sizes. Prompts then stay on the CPU: one of full length
        # is ten times the work, and texts are embedded once.
        self._is_fixed = self._device == "NPU"
        if num_threads is not None and not self._on_cpu:
            raise ArgumentError(
                "num_threads",
                f"is {num_threads} and device is {device!r}; threads are of use to cpu alone: "
                "leave them out, or ask for cpu.",
            )
        self._core = _core()
        self._check_device()
        self._asked: FloatPrecision | None = None
        self._asked = self._check_precision(precision)
        # OpenVINO takes no more threads than there are cores.
        self._num_threads = min(num_threads or num_available_cores(), num_cores())
        self._bundle = bundle
        self._cache = cache
        self._frames_per_call = frames_in_caches(bundle.manifest) if self._on_cpu else None
        self._programs: dict[GraphName, _Program] = {}
        self._lock = threading.Lock()
        self._closed = False

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        quantised = self.manifest.quantization is not None
        return RuntimeInfo(
            name="openvino",
            execution_provider="cpu" if self._on_cpu else self._property("FULL_DEVICE_NAME"),
            precision=(
                self.manifest.precision() if quantised else self._float_precision(self._main_graph)
            ),
            num_threads=self._num_threads if self._on_cpu else None,
            versions={"openvino": VERSION},
        )

    def precision_of(self, graph: GraphName) -> ProductPrecision:
        """What a graph is computed in, where it is not quantised."""
        return self._float_precision(graph)

    def audit(self) -> dict[GraphName, Audit]:
        """What the products of each graph are computed in, by the compiled graph.

        Without those of an NPU, where the compiled graph does not tell.
        """
        graphs = (graph for graph in self.manifest.graphs if self._device_of(graph) != "NPU")
        return {graph: self._audit(graph) for graph in graphs}

    def close(self) -> None:
        """Free the compiled graphs; a call that is running keeps its own until it ends."""
        with self._lock:
            self._closed = True
            self._programs.clear()

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        program = self._program(graph)
        parts = self._parts(graph, program, np.ascontiguousarray(array))
        try:
            outputs = program.run(parts)
        except _FOREIGN_ERRORS as exc:
            raise InferenceError(
                f"The {graph} graph failed in openvino on {self._device_of(graph)} with an input "
                f"of shape {array.shape}: {_reason(exc)}; give smaller batches if memory ran "
                "out, and try `actionclip verify` on this bundle."
            ) from exc
        return np.concatenate(outputs, dtype=np.float32)[: len(array)]

    def _parts(self, graph: GraphName, program: _Program, array: Array) -> list[Array]:
        """The rows of a call as the requests take them."""
        if program.num_tokens is not None and int(array.max()) >= program.num_tokens:
            raise InferenceError(
                f"The {graph} graph has a vocabulary of {program.num_tokens} tokens, and the input "
                f"holds {int(array.max())}; give tokens of this bundle's tokenizer."
            )
        if self._takes_fixed(graph):
            return list(_padded(array, self._fixed_shape(graph)))
        step = -(-len(array) // program.num_requests)
        if self._frames_per_call is not None and graph == "visual":
            step = min(step, self._frames_per_call)
        return [array[i : i + step] for i in range(0, len(array), step)]

    # Opening

    def _check_device(self) -> None:
        try:
            found = self._core.available_devices
        except _FOREIGN_ERRORS as exc:
            raise RuntimeUnavailableError(
                f"openvino {VERSION} cannot tell its devices: {_reason(exc)}; reinstall it."
            ) from exc
        # One GPU is called GPU, and of several the first GPU.0.
        if self._device in found or f"{self._device}.0" in found:
            return
        kind = self._device.partition(".")[0]
        remedy = _NEEDS.get(kind, "install openvino for this processor")
        raise RuntimeUnavailableError(
            f"openvino {VERSION} finds no {self._device} on this machine; it has "
            f"{', '.join(found) or 'nothing'}: {remedy}, or ask for another device."
        )

    def _check_precision(self, precision: str | None) -> FloatPrecision | None:
        if precision is None and self._computes_in("fp32"):
            return None
        # Not instead of what the graphs are without being asked.
        if precision is None:
            precision = self._float_precision(self._main_graph)
        if precision not in _HINTS:
            raise ArgumentError(
                "precision", f"is {precision!r}; it must be one of {', '.join(PRECISIONS)}."
            )
        able = [name for name in PRECISIONS if self._computes_in(name)]
        if precision not in able:
            raise RuntimeUnavailableError(
                f"precision is {precision!r}, which this {self._device} does not compute in; ask "
                f"for {' or '.join(able)}."
            )
        return precision

    @property
    def _main_graph(self) -> GraphName:
        return "visual" if self.frames_are_independent else "video"

    def _device_of(self, graph: GraphName) -> str:
        return "CPU" if self._is_fixed and graph == "textual" else self._device

    def _takes_fixed(self, graph: GraphName) -> bool:
        return self._is_fixed and graph != "textual"

    def _computes_in(self, precision: FloatPrecision) -> bool:
        if _CAPABILITIES[precision] not in self._property("OPTIMIZATION_CAPABILITIES"):
            return False
        # OpenVINO lists bf16 for every CPU with AVX-512, and emulates it where it is not there.
        return not (precision == "bf16" and self._on_cpu) or cpu_has_bf16()

    def _float_precision(self, graph: GraphName) -> FloatPrecision:
        if graph == "textual":
            # It finds the end of a prompt by its token, a number that narrow types round.
            return "fp32"
        if self._asked is not None:
            return self._asked
        spec = self.manifest.quantization
        own = self.manifest.graphs[graph].precision
        if spec is not None and own not in PRECISIONS:
            own = spec.rest_precision
        return "fp16" if own == "fp16" and self._computes_in("fp16") else "fp32"

    def _property(self, name: str) -> Any:
        try:
            return self._core.get_property(self._device, name)
        except _FOREIGN_ERRORS as exc:
            raise RuntimeUnavailableError(
                f"openvino {VERSION} cannot tell {name} of {self._device}: {_reason(exc)}; "
                "install a newer driver, or ask for cpu."
            ) from exc

    def _program(self, graph: GraphName) -> _Program:
        with self._lock:
            if self._closed:
                raise InferenceError(
                    f"The openvino runtime was closed before its {graph} graph was run; "
                    "open it again with open_runtime."
                )
            if graph not in self._programs:
                self._programs[graph] = self._open(graph)
            return self._programs[graph]

    def _open(self, graph: GraphName) -> _Program:
        files = GraphFiles.of(self._bundle, graph)
        config = self._config(graph)
        compiled, memory = self._open_cached(graph, files, config) or (
            self._compile(graph, files, config),
            None,
        )
        given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if given != config["INFERENCE_PRECISION_HINT"]:
            raise RuntimeUnavailableError(
                f"openvino {VERSION} was asked for {config['INFERENCE_PRECISION_HINT']} and "
                f"computes the {graph} graph in {given}; ask for another precision."
            )
        spec = self.manifest.graphs[graph]
        is_fixed = self._takes_fixed(graph)
        _check_tensor(graph, compiled.inputs, spec.input, is_fixed=is_fixed)
        _check_tensor(graph, compiled.outputs, spec.output, is_fixed=is_fixed)
        return _Program(compiled, memory)

    def _config(self, graph: GraphName) -> dict[str, Any]:
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[self._float_precision(graph)],
        }
        if self._device_of(graph) == "CPU":
            config |= {
                "INFERENCE_NUM_THREADS": self._num_threads,
                "NUM_STREAMS": _num_streams(
                    graph, self._num_threads, self.manifest.model.num_frames
                ),
                "ENABLE_CPU_PINNING": False,
            }
        return config

    def _read(self, graph: GraphName, files: GraphFiles, *, one_row: bool = False) -> Any:
        """The graph as OpenVINO reads it.

        Args:
            graph: Its name.
            files: Its files.
            one_row: Whether the sizes of the input that are free are made those of one row, or of
                a clip's frames.
        """
        try:
            reader = frontend.FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(str(files.graph)))
            if one_row or self._takes_fixed(graph):
                model.reshape({model.input(0): list(self._fixed_shape(graph))})
            return model
        except _FOREIGN_ERRORS as exc:
            raise BundleError(
                f"openvino {VERSION} cannot read the {graph} graph of {self._bundle.path}: "
                f"{_reason(exc)}; install a newer openvino, or copy or export it again."
            ) from exc

    def _fixed_shape(self, graph: GraphName) -> tuple[int, ...]:
        """Sizes for all of a graph's input: of one clip, or one prompt of full length."""
        model = self.manifest.model
        sizes = {"N": model.num_frames, "T": model.num_frames, "L": model.context_length}
        shape = self.manifest.input_spec(graph).shape
        return tuple(sizes.get(size, 1) if isinstance(size, str) else size for size in shape)

    def _compile(self, graph: GraphName, files: GraphFiles, config: Mapping[str, Any]) -> Any:
        model = self._read(graph, files)
        try:
            compiled = self._core.compile_model(model, self._device_of(graph), dict(config))
        except _FOREIGN_ERRORS as exc:
            raise RuntimeUnavailableError(
                f"openvino {VERSION} cannot compile the {graph} graph of {self._bundle.path} for "
                f"{self._device_of(graph)}: {_reason(exc)}; use another device, a newer "
                "openvino, or a bundle of another precision."
            ) from exc
        logger.debug("compiled %s for %s with %s", files.graph, self._device_of(graph), config)
        return compiled

    def _open_cached(
        self, graph: GraphName, files: GraphFiles, config: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """The compiled graph by way of the cache, and the memory that it lies in.

        None where the cache is of no use.
        """
        if self._cache is None:
            return None
        made: list[Any] = []
        device = self._device_of(graph)

        def compile_and_write(path: Path) -> None:
            compiled = self._compile(graph, files, config)
            try:
                stream = io.BytesIO()
                compiled.export_model(stream)
            except _FOREIGN_ERRORS as exc:
                raise NotCachedError(f"{device} gives no blob ({_reason(exc)})") from exc
            path.write_bytes(stream.getbuffer())
            made.append(compiled)

        made_by = {
            "openvino": _BUILD,
            "device": f"{device} {self._property('FULL_DEVICE_NAME')}",
            "precision": config["INFERENCE_PRECISION_HINT"],
            "cpu": cpu_identity(),
        }
        path = self._cache.find_or_make(files, made_by, compile_and_write, name=BLOB_NAME)
        if made or path is None:
            return (made[0], None) if made else None
        try:
            # Mapped, so that the weights are not copied. OpenVINO takes no array that is read-only,
            # and what it would write would not reach the file.
            blob = openvino.Tensor(np.memmap(path, np.uint8, "c"), shared_memory=True)
            return self._core.import_model(blob, device, config), blob
        except _FOREIGN_ERRORS as exc:
            self._cache.discard(path, f"it cannot be opened ({_reason(exc)})")
            return None

    # Auditing

    def _audit(self, graph: GraphName) -> Audit:
        model = self._read(graph, GraphFiles.of(self._bundle, graph), one_row=True)
        layers, num_layers = self._program(graph).layers()
        audited = []
        for product in _find_products(model, self._float_precision(graph)):
            named = layers.get(product.node, [])
            found = [layer for layer in named if layer.multiplies] or named
            precisions = {layer.precision for layer in found}
            precision = precisions.pop() if len(precisions) == 1 else None
            names = tuple(f"{layer.name} ({layer.kernel})" for layer in found)
            audited.append(AuditedProduct(product, names, precision))
        return Audit(
            tuple(audited),
            num_layers,
            subject=f"The {graph} graph in openvino {VERSION}",
            remedy="use another version of openvino",
            other_remedy="another precision or runtime",
        )


# Compiled graphs


@dataclass(frozen=True)
class _Layer:
    """What executes some nodes of a graph."""

    name: str
    kernel: str  # its kind, and what computes it
    precision: ProductPrecision | None

    @property
    def multiplies(self) -> bool:
        """Whether it does more than to scale or round what a product gives."""
        return self.kernel.partition(" ")[0] not in ("Eltwise", "FakeQuantize")


class _Program:
    """A compiled graph and the requests that execute it, for several callers at a time.

    Args:
        compiled: The graph.
        memory: What its weights lie in, which it does not keep alive by itself; or None.

    Attributes:
        num_requests: How many are executed at a time.
        num_tokens: Size of the vocabulary, of a graph that takes tokens.
    """

    def __init__(self, compiled: Any, memory: Any) -> None:
        self._memory = memory
        self._compiled = compiled
        self.num_requests = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(self.num_requests):
            self._free.put(compiled.create_infer_request())
        is_textual = compiled.input(0).get_element_type() == openvino.Type.i32
        self.num_tokens = self._vocabulary_size() if is_textual else None

    def run(self, parts: list[Array]) -> list[Float32Array]:
        """Execute the graph on each part, as many at a time as there are free requests."""
        outputs: list[Float32Array] = []
        running: deque[tuple[Any, Array]] = deque()
        try:
            for part in parts:
                request = self._take(running, outputs)
                running.append((request, part))  # the array lives as long as the request reads it
                request.set_input_tensor(openvino.Tensor(part, shared_memory=True))
                request.start_async()
            while running:
                self._finish(running, outputs)
        finally:
            for request, _ in running:
                # What failed is told already. A request that is cancelled is of no use any more.
                with suppress(*_FOREIGN_ERRORS):
                    request.wait()
                self._free.put(request)
        return outputs

    def _take(self, running: deque[tuple[Any, Array]], outputs: list[Float32Array]) -> Any:
        """A free request; one of this caller's own where others have the rest."""
        while True:
            try:
                # With nothing under way, another caller will give one back.
                return self._free.get(block=not running)
            except queue.Empty:
                self._finish(running, outputs)

    def _finish(self, running: deque[tuple[Any, Array]], outputs: list[Float32Array]) -> None:
        request, _ = running[0]
        request.wait()
        outputs.append(np.array(request.get_output_tensor(0).data, np.float32))
        running.popleft()
        self._free.put(request)

    def layers(self) -> tuple[dict[str, list[_Layer]], int]:
        """What executes each node of the graph, by the node's name; and how much there is."""
        found: dict[str, list[_Layer]] = {}
        nodes = self._compiled.get_runtime_model().get_ordered_ops()
        for node in nodes:
            facts = _facts(node)
            layer = _Layer(
                node.get_friendly_name(),
                f"{facts.get('layerType', '')} {facts.get('primitiveType', '')}".strip(),
                _TYPE_NAMES.get(facts.get("runtimePrecision", "")),
            )
            if facts.get("layerType") in _MOVING:
                continue
            for name in facts.get("originalLayersNames", "").split(","):
                found.setdefault(_plain(name), []).append(layer)
        return found, len(nodes)

    def _vocabulary_size(self) -> int | None:
        """Rows of the table that the input chooses from; None where it is not found."""
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            if _facts(node).get("layerType") != "Gather":
                continue
            table, indices = (node.input(i).get_source_output() for i in range(2))
            if indices.get_node().get_type_name() == "Parameter":
                shape = table.get_partial_shape()
                return int(shape[0].get_length()) if shape[0].is_static else None
        return None


# These only move numbers, though they name the nodes whose numbers those are.
_MOVING = frozenset({"Const", "Input", "Output", "Reorder", "Reshape", "Transpose", "Convert"})


def _facts(node: Any) -> dict[str, str]:
    """What a node of a compiled graph tells of itself."""
    told = node.get_rt_info()
    names = ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
    return {name: str(told[name].value) for name in names if name in told}


# What OpenVINO adds to a name where it takes a Gemm apart, or scales what an int8 product gives.
_ADDED_TO_NAMES = re.compile(r"(/WithoutBiases|/Dequantization\w+)+$")


def _plain(name: str) -> str:
    """The name of a node as the graph has it."""
    return _ADDED_TO_NAMES.sub("", name.strip())


# Between a product and the integers that were dequantised for it.
_DEQUANTISING = frozenset({"Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "Squeeze"})


def _find_products(model: Any, float_precision: FloatPrecision) -> Iterator[GraphProduct]:
    """The products of a graph of fixed shapes, and what each is to be computed in.

    The onnx package, with which those of engines are found, is no part of this environment.
    """
    for node in model.get_ordered_ops():
        num_macs = _num_macs(node)
        if num_macs:
            quantised = all(_is_dequantised(node.input_value(i)) for i in range(2))
            yield GraphProduct(
                _plain(node.get_friendly_name()),
                node.get_type_name(),
                num_macs,
                "int8" if quantised else float_precision,
            )


def _num_macs(node: Any) -> int:
    def size(shape: Any) -> int:
        return int(np.prod(list(shape), dtype=np.int64))

    kind = node.get_type_name()
    if kind == "MatMul":
        first = node.input(0).get_shape()
        inner = first[-2 if node.get_attributes()["transpose_a"] else -1]
        return size(node.output(0).get_shape()) * int(inner)
    if kind == "Convolution":  # weights (out, in, ...)
        return size(node.output(0).get_shape()) * size(list(node.input(1).get_shape())[1:])
    if kind == "GroupConvolution":  # weights (groups, out, in, ...)
        return size(node.output(0).get_shape()) * size(list(node.input(1).get_shape())[2:])
    if kind == "LSTMSequence":  # X (rows, steps, inputs); W and R (directions, 4 x hidden, ...)
        rows, steps, _ = node.input(0).get_shape()
        weights = size(node.input(4).get_shape()) + size(node.input(5).get_shape())
        return int(rows) * int(steps) * weights
    return 0


def _is_dequantised(output: Any) -> bool:
    """Whether a value was an integer of 8 bits before it became a float."""
    node = output.get_node()
    while node.get_type_name() in _DEQUANTISING:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Convert":
        return False
    return node.input(0).get_element_type() in (openvino.Type.i8, openvino.Type.u8)


# What is asked for and given


@cache
def _core() -> Any:
    return openvino.Core()


def _check_version() -> None:
    if version_numbers(VERSION) < _OLDEST:
        raise RuntimeUnavailableError(
            f"openvino {VERSION} is too old; this needs {'.'.join(map(str, _OLDEST))} or later, "
            f"so run: {install_command('openvino')} --upgrade"
        )


def _check_quantization(bundle: Bundle) -> None:
    spec = bundle.manifest.quantization
    if spec is not None and spec.recipe == "dynamic":
        raise RuntimeUnavailableError(
            f"{bundle.path} has the dynamic int8 recipe, whose products openvino computes in fp32; "
            "export it with --calibration for the static one, or use the onnxruntime runtime."
        )
    if bundle.manifest.precision() == "fp8":
        raise RuntimeUnavailableError(
            f"{bundle.path} is fp8, which openvino does not compute in; use a bundle of another "
            "precision, or the tensorrt runtime."
        )


def _device_name(device: str) -> str:
    """OpenVINO's name of a device."""
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (kind == "gpu" and index.isdecimal())):
        raise ArgumentError(
            "device",
            f"is {device!r}; openvino runs on cpu, gpu (of Intel, gpu:1 for the second) or npu.",
        )
    return f"{kind.upper()}.{index}" if colon else kind.upper()


_MIN_FRAMES_PER_REQUEST = 4  # of a lone clip


def _num_streams(graph: GraphName, num_threads: int, num_frames: int) -> int:
    """Requests at a time, among which the threads are divided evenly.

    Threads that share a request wait for each other at every layer, where another program may hold
    one of them up; requests share nothing. Frames are divided among requests as long as those of
    a lone clip give each enough to do.
    """
    most = num_frames // _MIN_FRAMES_PER_REQUEST if graph == "visual" else 1
    return max(n for n in range(1, max(1, most) + 1) if num_threads % n == 0)


def _padded(array: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """The rows in parts of a fixed shape, filled up with zeros."""
    if array.ndim == 2 and array.shape[1] < shape[1]:  # prompts, whose padding is 0
        array = np.pad(array, ((0, 0), (0, shape[1] - array.shape[1])))
    for start in range(0, len(array), shape[0]):
        part = array[start : start + shape[0]]
        missing = shape[0] - len(part)
        yield np.pad(part, ((0, missing), *[(0, 0)] * (part.ndim - 1))) if missing else part


def _check_tensor(graph: GraphName, tensors: Any, spec: TensorSpec, *, is_fixed: bool) -> None:
    """Compare the one input or output of a compiled graph with the manifest."""
    names = {"u8": "uint8", "i32": "int32", "f32": "float32"}
    given = [
        (
            tensor.get_any_name(),
            names.get(tensor.get_element_type().to_string()),
            [None if d.is_dynamic else d.get_length() for d in tensor.get_partial_shape()],
        )
        for tensor in tensors
    ]
    wanted = [size if isinstance(size, int) else None for size in spec.shape]
    fits = len(given) == 1 and given[0][:2] == (spec.name, spec.dtype)
    if not fits or len(given[0][2]) != len(wanted) or not (is_fixed or given[0][2] == wanted):
        raise BundleError(
            f"The {graph} graph has {given} where the manifest says {spec.name} of type "
            f"{spec.dtype} and shape {spec.shape}; the two are of different bundles: export again."
        )


def _reason(exc: BaseException) -> str:
    """What is wrong by a native error: the items of its summary, or else what it says last."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    items = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    return "; ".join(items) or (lines or [type(exc).__name__])[-1]


def devices() -> dict[str, str]:
    """The devices of this machine, by their names in OpenVINO, with what they are and compute in.

    Raises:
        RuntimeUnavailableError: If openvino cannot tell.
    """
    try:
        core, found = _core(), {}
        for name in core.available_devices:
            able = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
            kinds = [kind.lower() for kind in ("FP32", "FP16", "BF16", "INT8") if kind in able]
            title = core.get_property(name, "FULL_DEVICE_NAME").strip()
            found[name] = f"{title}, in {', '.join(kinds)}"
        return found
    except _FOREIGN_ERRORS as exc:
        raise RuntimeUnavailableError(
            f"openvino {VERSION} cannot tell its devices: {_reason(exc)}; reinstall it."
        ) from exc
