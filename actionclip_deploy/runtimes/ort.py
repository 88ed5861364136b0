"""ONNX Runtime: executes the graphs of a bundle on one execution provider.

ONNX Runtime falls back to the CPU without an error in three places: when a provider's library
does not load, when creating a session fails, and node by node where the provider has no kernel.
All three are errors here, unless the CPU was asked for.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from typing import Any

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    BundleError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.manifest import GraphName, TensorSpec
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.execution_providers import (
    CPU,
    OPTIONS,
    full_name,
    heavy_ops,
    what_it_needs,
    why_unavailable,
)
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.runtimes.onnx_files import check_onnx_file

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

# The native exceptions share no base class but Exception.
_FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(e for e in vars(ort_native).values() if isinstance(e, type) and issubclass(e, Exception)),
    RuntimeError,
    ValueError,
)
_TRIAL_ERRORS: tuple[type[Exception], ...] = (RuntimeUnavailableError, *_FOREIGN_ERRORS)
_FATAL = 4  # log severity

# An ONNX model of one node, y = Add(x, x), float32 of shape (1,), written as the fields of its
# protocol buffer (a tag, a length, content), because devices have no onnx package.
_TYPE = b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # tensor, float32, dims [1]
_GRAPH = (
    b"\x0a\x0e\x0a\x01x\x0a\x01x\x12\x01y\x22\x03Add"  # node
    b"\x12\x05trial"  # name
    b"\x5a\x0f\x0a\x01x" + _TYPE + b"\x62\x0f\x0a\x01y" + _TYPE  # input, output
)
# IR version 7, the graph, opset 13.
_TRIAL_MODEL = b"\x08\x07\x3a" + bytes([len(_GRAPH)]) + _GRAPH + b"\x42\x04\x0a\x00\x10\x0d"


class OrtRuntime(Runtime):
    """Executes a bundle with ONNX Runtime.

    A graph is read when it is first used; the execution provider is tried at once. Calls may come
    from several threads at a time.

    Args:
        bundle: The bundle to execute.
        execution_provider: `cpu`, `cuda`, `tensorrt`, `openvino`, `coreml`, `directml`,
            `migraphx`, `qnn`, or ONNX Runtime's own name of one.
        num_threads: Threads of one call on the CPU; None takes the cores that this process may
            use, in a container those of its quota.

    Raises:
        ValueError: If there is no such execution provider, or `num_threads` is below 1.
        RuntimeUnavailableError: If the execution provider cannot be used on this machine.
    """

    def __init__(
        self, bundle: Bundle, *, execution_provider: str = "cpu", num_threads: int | None = None
    ) -> None:
        super().__init__(bundle.manifest)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be 1 or more, or None.")
        known = {*ort.get_all_providers(), *ort.get_available_providers()}
        self._provider = full_name(execution_provider, known)
        self._num_threads = num_threads or num_available_cores()
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
            versions={"onnxruntime": ort.__version__},
        )

    def close(self) -> None:
        """Free the sessions; a call that is running keeps its own until it ends."""
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        session = self._session(graph)
        spec = self.manifest.graphs[graph]
        try:
            (output,) = session.run(
                [spec.output.name], {spec.input.name: np.ascontiguousarray(array)}
            )
        except _FOREIGN_ERRORS as exc:
            raise InferenceError(
                f"The {graph} graph failed on {self._provider} with an input of shape "
                f"{array.shape}: {_first_line(exc)}; give smaller batches if memory ran out, and "
                "try `actionclip verify` on this bundle."
            ) from exc
        return np.ascontiguousarray(output, dtype=np.float32)

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
        path = self._bundle.graph_path(graph)
        check_onnx_file(path, self._bundle)
        try:
            # The path and not the bytes, so that external data is found beside the file.
            session = _open_session(str(path), self._provider, self._num_threads)
        except _FOREIGN_ERRORS as exc:
            raise self._open_error(graph, exc) from exc
        _check_tensor(graph, session.get_inputs(), self.manifest.graphs[graph].input)
        _check_tensor(graph, session.get_outputs(), self.manifest.graphs[graph].output)
        _check_placement(session, self._provider, f"the {graph} graph")
        logger.debug("opened %s on %s", path, session.get_providers())
        return session

    def _open_error(self, graph: GraphName, exc: Exception) -> Exception:
        what = (
            f"onnxruntime {ort.__version__} cannot open the {graph} graph of {self._bundle.path} "
            f"on {self._provider}: {_first_line(exc)}"
        )
        # NotImplemented: a good graph for which this build has no kernel.
        if self._provider != CPU or isinstance(exc, ort_native.NotImplemented):
            return RuntimeUnavailableError(
                f"{what}; use another execution provider, a newer onnxruntime, or a bundle of "
                "another precision."
            )
        return BundleError(f"{what}; install a newer onnxruntime, or copy or export it again.")


def available_providers() -> tuple[str, ...]:
    """Execution providers that this build of ONNX Runtime lists; not all of them need work."""
    # Azure's calls a web service and executes nothing itself.
    return tuple(p for p in ort.get_available_providers() if p != "AzureExecutionProvider")


def probe(provider: str) -> None:
    """Execute a graph of one node on an execution provider, or raise what it raises."""
    _preload_libraries(provider)
    session = _open_session(_TRIAL_MODEL, provider, num_threads=1)
    _check_placement(session, provider, "a graph of one node")
    session.run(None, {"x": np.zeros(1, np.float32)})


def _check_provider(provider: str) -> None:
    available = ort.get_available_providers()
    if provider not in available:
        raise RuntimeUnavailableError(
            f"onnxruntime {ort.__version__} was built without {provider}; it has "
            f"{', '.join(available)}. To get it, {what_it_needs(provider)}."
        )
    if provider == CPU:
        return
    try:
        probe(provider)
    except _TRIAL_ERRORS as exc:
        reason = why_unavailable(provider) or _first_line(exc)
        raise RuntimeUnavailableError(
            f"onnxruntime {ort.__version__} lists {provider}, which does not work on this machine: "
            f"{reason}. To get it, {what_it_needs(provider)}; or ask for cpu."
        ) from exc


def _preload_libraries(provider: str) -> None:
    """Load CUDA's libraries from their Python packages, where the system has none."""
    if provider.startswith(("CUDA", "Tensorrt")) and hasattr(ort, "preload_dlls"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            ort.preload_dlls()
        logger.debug("preload_dlls: %s", printed.getvalue().strip())


def _open_session(model: str | bytes, provider: str, num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    # What it would print is raised as well, and raised is what the caller can act on.
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(
        model,
        options,
        providers=[(provider, OPTIONS.get(provider, {}))],
        enable_fallback=0,  # no second try on the CPU where creating the session fails
    )
    session.disable_fallback()  # nor where a run fails
    return session


def _check_placement(session: Any, provider: str, what: str) -> None:
    """Refuse a session of which the work is done on another execution provider.

    Not done with ONNX Runtime's `session.disable_cpu_ep_fallback`, which also refuses the
    arithmetic on shapes that CUDA sessions keep on the CPU on purpose.
    """
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{provider} was asked for and ONNX Runtime runs {what} on "
            f"{session.get_providers()[0]} instead; install what {provider} needs or ask for cpu."
        )
    if provider == CPU:
        return
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.warning(
            "onnxruntime %s cannot tell which nodes of %s run on %s; 1.24 and later can.",
            *(ort.__version__, what, provider),
        )
        return
    ops: dict[bool, list[str]] = {True: [], False: []}
    for part in session.get_provider_graph_assignment_info():
        ops[part.ep_name == provider] += [node.op_type for node in part.get_nodes()]
    left = heavy_ops(ops[False])
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


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
