"""ONNX Runtime: executes the graphs of a bundle on one execution provider.

ONNX Runtime falls back to the CPU without an error in three places: when a provider's library
does not load, when creating a session fails, and node by node where the provider has no kernel.
All three are errors here, unless the CPU was asked for.
"""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ActionClipError,
    ArgumentError,
    BundleError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command, pip_install
from actionclip_deploy.manifest import GraphName, TensorSpec
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.call_sizes import frames_in_caches
from actionclip_deploy.runtimes.graph_cache import (
    DATA_NAME,
    GraphCache,
    GraphFiles,
    NotCachedError,
)
from actionclip_deploy.runtimes.machine import check_num_threads, cpu_identity, num_available_cores
from actionclip_deploy.runtimes.ort_cuda import DeviceSession, DeviceThread

# From 1.32 on, the official builds send events to Microsoft (the machine's identifier, operating
# system, the program's path, and facts about models), and keep them in the user's cache folder
# meanwhile. This is read when the library is loaded; whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_native
except ModuleNotFoundError as exc:
    raise MissingExtraError("The onnxruntime runtime", "onnxruntime") from exc
except ImportError as exc:
    raise RuntimeUnavailableError(
        f"onnxruntime is installed and cannot be loaded ({exc}); reinstall it for this platform."
    ) from exc

logger = logging.getLogger(__name__)

VERSION: str = ort.__version__

# The native exceptions share no base class but Exception.
_FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(e for e in vars(ort_native).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,
    ValueError,
)

_TRIAL_ERRORS: tuple[type[Exception], ...] = (ActionClipError, *_FOREIGN_ERRORS)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# Short names, as --execution-provider takes them.
NAMES = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "qnn": "QNNExecutionProvider",
}


class OrtRuntime(Runtime):
    """Executes a bundle with ONNX Runtime.

    A graph is read when it is first used; the execution provider is tried at once. Calls may come
    from several threads at a time; on CUDA they are executed one after the other.

    Args:
        bundle: The bundle to execute.
        execution_provider: `cpu`, `cuda`, `tensorrt`, `openvino`, `coreml`, `directml`,
            `migraphx`, `qnn`, or ONNX Runtime's own name of one.
        num_threads: Threads of one call on the CPU; None takes the cores that this process may
            use, in a container those of its quota.
        spin_us: On the CPU, for how many microseconds threads without work look for some before
            they sleep, see `machine.choose_spin_us`; None for ONNX Runtime's own way.
        cache: Where to keep the graphs as they are optimised for this CPU; None for nowhere.
            Other execution providers do not use it.
        cuda_graphs: Whether CUDA records its work once per shape and replays it. Batches are
            then padded to a few sizes, and all graphs have to lie on the GPU as a whole.

    Raises:
        ValueError: If there is no such execution provider, `num_threads` is below 1 or far
            above the cores that there are or given elsewhere than on the CPU, or CUDA graphs are
            asked for elsewhere than on CUDA.
        RuntimeUnavailableError: If the execution provider cannot be used on this machine.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        execution_provider: str = "cpu",
        num_threads: int | None = None,
        spin_us: int | None = 0,
        cache: GraphCache | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(bundle.manifest)
        check_num_threads("num_threads", num_threads)
        known = {*ort.get_all_providers(), *ort.get_available_providers()}
        self._provider = full_name(execution_provider, known)
        if cuda_graphs and self._provider != CUDA:
            raise ValueError(
                f"cuda_graphs is True and execution_provider is {execution_provider!r}; only cuda "
                "has them: ask for cuda, or leave cuda_graphs out."
            )
        if num_threads is not None and self._provider != CPU:
            raise ArgumentError(
                "num_threads",
                f"is {num_threads} and execution_provider is {execution_provider!r}; threads are "
                "of use to cpu alone: leave them out, or ask for cpu.",
            )
        self._num_threads = num_threads or num_available_cores()
        self._spin_us = spin_us if self._provider == CPU else None
        self._cache = cache if self._provider == CPU else None
        self._cuda_graphs = cuda_graphs
        self._frames_per_call = frames_in_caches(bundle.manifest) if self._provider == CPU else None
        self._device = DeviceThread() if self._provider == CUDA else None
        self._bundle = bundle
        self._sessions: dict[GraphName, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        _check_provider(self._provider)

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        return RuntimeInfo(
            name="onnxruntime",
            execution_provider=self._provider,
            precision=self.manifest.precision(),
            num_threads=self._num_threads if self._provider == CPU else None,
            spin_us=self._spin_us,
            versions={"onnxruntime": VERSION},
        )

    def close(self) -> None:
        """Free the sessions; a call that is running keeps its own until it ends."""
        with self._lock:
            self._closed = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            if isinstance(session, DeviceSession):
                session.close()
        if self._device is not None:
            self._device.close()

    @property
    def has_device(self) -> bool:
        """Whether the graphs are executed on a GPU, in memory of its own."""
        return self._device is not None

    def copy_to_device(self, array: Array) -> None:
        """Copy an array to the GPU and wait for it; on the CPU there is nothing to do."""
        if self._device is not None:
            self._device.copy(array, ort)

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        session = self._session(graph)
        spec = self.manifest.graphs[graph]
        array = np.ascontiguousarray(array)
        try:
            if isinstance(session, DeviceSession):
                return session.run(array)
            step = self._frames_per_call if graph == "visual" else None
            parts = [array[i : i + step] for i in range(0, len(array), step)] if step else [array]
            outputs = [
                session.run([spec.output.name], {spec.input.name: part})[0] for part in parts
            ]
        except _FOREIGN_ERRORS as exc:
            raise InferenceError(
                f"The {graph} graph failed on {self._provider} with an input of shape "
                f"{array.shape}: {_first_line(exc)}; give smaller batches if memory ran out, and "
                "try `actionclip verify` on this bundle."
            ) from exc
        return np.concatenate(outputs, dtype=np.float32)

    def _session(self, graph: GraphName) -> Any:
        with self._lock:
            if self._closed:
                raise InferenceError(
                    f"The onnxruntime runtime was closed before its {graph} graph was run; "
                    "open it again with open_runtime."
                )
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    def _open(self, graph: GraphName) -> Any:
        files, spec = GraphFiles.of(self._bundle, graph), self.manifest.graphs[graph]
        session = self._open_cached(files)
        if session is None:
            session = open_session(
                files.graph,
                provider=self._provider,
                num_threads=self._num_threads,
                spin_us=self._spin_us,
                cuda_graphs=self._cuda_graphs,
                what=f"the {graph} graph of {self._bundle.path}",
            )
        _check_tensor(graph, session.get_inputs(), spec.input)
        _check_tensor(graph, session.get_outputs(), spec.output)
        check_placement(session, self._provider, f"the {graph} graph")
        logger.debug("opened %s on %s", files.graph, session.get_providers())
        if self._device is None:
            return session
        return DeviceSession(session, spec, self._device, ort, capture=self._cuda_graphs)

    def _open_cached(self, files: GraphFiles) -> Any:
        """A session of the optimised graph; None where there is none to be had."""
        if self._cache is None:
            return None

        def optimise(path: Path) -> None:
            try:
                open_session(files.graph, num_threads=self._num_threads, write_to=path)
            except ActionClipError as exc:
                raise NotCachedError(str(exc)) from exc

        made_by = {
            "onnxruntime": f"{VERSION} {ort.get_build_info()}",
            "execution_provider": self._provider,
            "optimisation": "all",
            "cpu": cpu_identity(),
        }
        path = self._cache.find_or_make(files, made_by, optimise)
        if path is None:
            return None
        try:
            return open_session(
                path, num_threads=self._num_threads, spin_us=self._spin_us, optimised=True
            )
        except ActionClipError as exc:
            self._cache.discard(path, f"it cannot be opened ({exc})")
            return None


# Sessions

# Precision is the graph's: CUDA would run fp32 matrix products in TF32, which keeps 10 bits of the
# mantissa and misses the tolerances of fp32 by far.
_OPTIONS = {CUDA: {"use_tf32": "0"}}

# Weights in a file of their own are mapped into memory and not copied, and those that a kernel
# wants in another layout are written in that one as well.
_WRITING_OPTIONS = {
    "session.optimized_model_external_initializers_file_name": DATA_NAME,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}

_FATAL = 4  # log severity


def open_session(
    model: Path | bytes,
    *,
    provider: str = CPU,
    num_threads: int | None = None,
    spin_us: int | None = None,
    cuda_graphs: bool = False,
    optimised: bool = False,
    write_to: Path | None = None,
    entries: Mapping[str, str] = MappingProxyType({}),
    what: str | None = None,
) -> Any:
    """Open a session of ONNX Runtime, which never changes to the CPU by itself.

    Args:
        model: An ONNX file, or the bytes of one that refers to no other file.
        provider: ONNX Runtime's name of the execution provider.
        num_threads: Threads of one call on the CPU; None takes the cores that this process may
            use.
        spin_us: As for `OrtRuntime`.
        cuda_graphs: Whether CUDA records its work and replays it.
        optimised: Whether the file was written by `write_to`, and has nothing left to optimise.
        write_to: Where to write the optimised graph.
        entries: ONNX Runtime's configuration of the session, by its own keys.
        what: The graph, in messages; None for the path.

    Raises:
        RuntimeUnavailableError: If the execution provider fails or has no kernels for the graph.
        BundleError: If the graph cannot be opened on the CPU.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or num_available_cores()
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
        for key, value in _WRITING_OPTIONS.items():
            options.add_session_config_entry(key, value)
    # What it would print is raised as well, and raised is what the caller can act on.
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in {**_spin_entries(spin_us), **entries}.items():
        options.add_session_config_entry(key, value)
    given = dict(_OPTIONS.get(provider, {}))
    if cuda_graphs:
        given["enable_cuda_graph"] = "1"
    try:
        session = ort.InferenceSession(
            # A path where there is one, so that external data is found beside the file.
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[(provider, given)],
            enable_fallback=0,  # no second try on the CPU where creating the session fails
        )
    except _FOREIGN_ERRORS as exc:
        title = what or ("a graph" if isinstance(model, bytes) else str(model))
        failure = f"onnxruntime {VERSION} cannot open {title} on {provider}: {_first_line(exc)}"
        # NotImplemented: a good graph for which this build has no kernel.
        if provider != CPU or isinstance(exc, ort_native.NotImplemented):
            raise RuntimeUnavailableError(
                f"{failure}; use another execution provider, a newer onnxruntime, or a bundle of "
                "another precision."
            ) from exc
        raise BundleError(
            f"{failure}; install a newer onnxruntime, or copy or export it again."
        ) from exc
    session.disable_fallback()  # nor where a run fails
    return session


def _spin_entries(spin_us: int | None) -> dict[str, str]:
    """The configuration of a session whose threads look for work for so long."""
    if spin_us is None:
        return {}
    if spin_us == 0:
        return {"session.intra_op.allow_spinning": "0"}
    # Known from ONNX Runtime 1.32 on; before, threads spin as long as they do by themselves.
    return {"session.intra_op.spin_duration_us": str(spin_us)}


class GraphSession:
    """A graph of one input that belongs to no bundle yet, on the CPU.

    Args:
        path: The ONNX file.
        outputs: Values of the graph to give; none for its first output.
        num_threads: As for `open_session`.
    """

    def __init__(
        self, path: Path, outputs: Sequence[str] = (), *, num_threads: int | None = None
    ) -> None:
        self._session = open_session(path, num_threads=num_threads)
        self._input = self._session.get_inputs()[0].name
        self._outputs = list(outputs) or [self._session.get_outputs()[0].name]

    def run(self, array: Array) -> list[Array]:
        """Give the outputs for an input."""
        arrays: list[Array] = self._session.run(self._outputs, {self._input: array})
        return arrays


def _first_line(exc: BaseException) -> str:
    """The first line of what a native error says; its name where it says nothing."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


# What a session is held to before it is used

# Work of which the time grows with the input; the rest is arithmetic on shapes, which ONNX
# Runtime keeps on the CPU on purpose.
_HEAVY = frozenset((
    "Attention", "BiasGelu", "Conv", "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "Gemm",
    "GroupNorm", "LSTM", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulNBits",
    "MultiHeadAttention", "QGemm", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "QuickGelu",
    "SkipLayerNormalization", "Softmax",
))  # fmt: skip


def check_placement(session: Any, provider: str, what: str) -> None:
    """Refuse a session of which the work is done on another execution provider.

    Args:
        session: A session of ONNX Runtime.
        provider: What it was asked for.
        what: What it runs, for messages.

    Raises:
        RuntimeUnavailableError: If it runs elsewhere, or leaves matrix products to the CPU.
    """
    # ONNX Runtime's own session.disable_cpu_ep_fallback also refuses the arithmetic on shapes that
    # CUDA sessions keep on the CPU on purpose.
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{provider} was asked for and ONNX Runtime runs {what} on "
            f"{session.get_providers()[0]} instead; install what {provider} needs or ask for cpu."
        )
    if provider == CPU:
        return
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.warning(
            "this onnxruntime cannot tell which nodes of %s run on %s; 1.24 and later can.",
            *(what, provider),
        )
        return
    ops: dict[bool, list[str]] = {True: [], False: []}
    for part in session.get_provider_graph_assignment_info():
        ops[part.ep_name == provider] += [node.op_type for node in part.get_nodes()]
    left = sorted(_HEAVY.intersection(ops[False]))
    if left or not ops[True]:
        raise RuntimeUnavailableError(
            f"{provider} was asked for and leaves {', '.join(left) or 'every node'} of {what} to "
            "the CPU; ask for cpu, or use a bundle of a precision that it has kernels for."
        )


def _check_tensor(graph: GraphName, tensors: Any, spec: TensorSpec) -> None:
    """Compare the one input or output of a session with the manifest."""
    given = [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
    types = {"uint8": "tensor(uint8)", "int32": "tensor(int32)", "float32": "tensor(float)"}
    fits = len(given) == 1 and given[0][:2] == (spec.name, types[spec.dtype])
    if not fits or [_free(size) for size in given[0][2]] != [_free(size) for size in spec.shape]:
        raise BundleError(
            f"The {graph} graph has {given} where the manifest says {spec.name} of type "
            f"{spec.dtype} and shape {spec.shape}; the two are of different bundles: export again."
        )


def _free(size: int | str | None) -> int | None:
    """A dimension's number, None where it is free whatever its letter."""
    return size if isinstance(size, int) else None


# Execution providers

_TRIAL_TIMEOUT_SECONDS = 120

# {gpu} and {pip} are commands, which depend on how this package was installed.
_GPU = (
    "run: {gpu} after uninstalling onnxruntime (the two overwrite each other), with the CUDA and "
    "cuDNN libraries that its version names; on a Jetson install the onnxruntime-gpu wheel made "
    "for its JetPack"
)
_NEEDS = {
    CUDA: _GPU,
    "TensorrtExecutionProvider": (
        f"{_GPU}, and the TensorRT libraries of the one major version that it is linked to; "
        "--runtime tensorrt takes any"
    ),
    "OpenVINOExecutionProvider": ("run: {pip} onnxruntime-openvino in the place of onnxruntime"),
    "CoreMLExecutionProvider": "it is part of onnxruntime on macOS alone",
    "DmlExecutionProvider": (
        "on Windows run: {pip} onnxruntime-directml in the place of onnxruntime"
    ),
}

# An ONNX model of one node, y = Add(x, x), float32 of shape (1,), written as the fields of its
# protocol buffer (a tag, a length, content), because devices have no onnx package.
_TYPE = b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # tensor, float32, dims [1]
_GRAPH = (
    b"\x0a\x0e\x0a\x01x\x0a\x01x\x12\x01y\x22\x03Add"  # node
    b"\x12\x05trial"  # name
    b"\x5a\x0f\x0a\x01x" + _TYPE + b"\x62\x0f\x0a\x01y" + _TYPE  # input, output
)
# IR version 7, the graph, opset 13.
TRIAL_MODEL = b"\x08\x07\x3a" + bytes([len(_GRAPH)]) + _GRAPH + b"\x42\x04\x0a\x00\x10\x0d"


def full_name(name: str, known: Collection[str]) -> str:
    """ONNX Runtime's name of an execution provider, given that name or a short one.

    Args:
        name: For example `cuda` or `CUDAExecutionProvider`.
        known: The names that the installed ONNX Runtime knows, whether built in or not.

    Raises:
        ValueError: If there is no such execution provider.
    """
    if name in known:
        return name
    if name.lower() in NAMES:
        return NAMES[name.lower()]
    raise ArgumentError(
        "execution_provider",
        f"is {name!r}; it must be one of {', '.join(NAMES)}, or a name of "
        "ONNX Runtime's such as CUDAExecutionProvider.",
    )


def available_providers() -> tuple[str, ...]:
    """Execution providers that this build of ONNX Runtime lists; not all of them need work."""
    # Azure's calls a web service and executes nothing itself.
    return tuple(p for p in ort.get_available_providers() if p != "AzureExecutionProvider")


def what_it_needs(provider: str) -> str:
    """What a user has to install or do to get this execution provider."""
    needs = _NEEDS.get(provider, "install a build of ONNX Runtime that has it")
    return needs.format(gpu=install_command("onnxruntime-gpu"), pip=pip_install())


def probe(provider: str) -> None:
    """Execute a graph of one node on an execution provider, or raise what it raises."""
    _preload_libraries(provider)
    try:
        session = open_session(TRIAL_MODEL, provider=provider, num_threads=1)
    except RuntimeUnavailableError as exc:
        # What ONNX Runtime said: the rest of ours is advice on bundles.
        raise RuntimeUnavailableError(_first_line(exc.__cause__ or exc)) from exc
    check_placement(session, provider, "a graph of one node")
    session.run(None, {"x": np.zeros(1, np.float32)})


def why_unavailable(provider: str) -> str | None:
    """Try an execution provider in a process of its own, which it may bring down.

    Args:
        provider: ONNX Runtime's name of it.

    Returns:
        None if it executed a graph of one node, otherwise the reason why it did not.
    """
    program = "import sys; from actionclip_deploy.runtimes import ort; ort.probe(sys.argv[1])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, provider],
            capture_output=True,
            text=True,
            timeout=_TRIAL_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"trying it failed ({exc})"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"trying it ended Python with signal {-done.returncode}"
    # The message that names the missing library is printed and not part of the exception.
    found = re.search(r"Failed to load library \S+ with error: (.+)", done.stderr)
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    return found[1] if found else re.sub(r"^[\w.]+(?:Error|Exception|Fail): ", "", lines[-1])


def _check_provider(provider: str) -> None:
    available = ort.get_available_providers()
    if provider not in available:
        raise RuntimeUnavailableError(
            f"onnxruntime {VERSION} was built without {provider}; it has "
            f"{', '.join(available)}: to get it, {what_it_needs(provider)}."
        )
    if provider == CPU:
        return
    try:
        probe(provider)
    except _TRIAL_ERRORS as exc:
        reason = why_unavailable(provider) or _first_line(exc)
        raise RuntimeUnavailableError(
            f"onnxruntime {VERSION} lists {provider}, which does not work on this machine: "
            f"{reason}. To get it, {what_it_needs(provider)}; or ask for cpu."
        ) from exc


def _preload_libraries(provider: str) -> None:
    """Load the CUDA libraries that pip installed; the system's are found by the provider itself."""
    if provider.startswith(("CUDA", "Tensorrt")) and hasattr(ort, "preload_dlls"):
        printed = io.StringIO()
        with redirect_stdout(printed):
            ort.preload_dlls()
        logger.debug("preload_dlls: %s", printed.getvalue().strip())
