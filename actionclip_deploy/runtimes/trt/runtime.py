"""The runtimes `tensorrt` and `tensorrt-rtx`: engines that passed verification on this card."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError, EngineError, InferenceError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Array, Audit, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.onnx_graphs import read_model
from actionclip_deploy.runtimes.parity import Golden, ParityReport, verify
from actionclip_deploy.runtimes.trt.api import Api, EngineRuntime, load_api, require_gpu
from actionclip_deploy.runtimes.trt.audit import audit, find_products
from actionclip_deploy.runtimes.trt.driver import Cuda, open_cuda
from actionclip_deploy.runtimes.trt.engine import Engine
from actionclip_deploy.runtimes.trt.rewrites import rewritten_model
from actionclip_deploy.runtimes.trt.store import Entry, Place, find_place, open_store

logger = logging.getLogger(__name__)


class TensorRTRuntime(Runtime):
    """Executes a bundle's engines.

    Engines are loaded when they are first used. Calls may come from several threads; each engine
    executes one after the other. Batches beyond an engine's profiles are split.

    Args:
        bundle: The bundle.
        entry: Its engines.
        api: The TensorRT that built them.
        cuda: The GPU.
        cuda_graphs: Whether the work of each batch size is recorded once and replayed; batches
            are then filled up to a few sizes. TensorRT for RTX does so by itself.
    """

    def __init__(
        self, bundle: Bundle, entry: Entry, api: Api, cuda: Cuda, *, cuda_graphs: bool = False
    ) -> None:
        super().__init__(bundle.manifest)
        self.entry = entry
        self._api, self._cuda, self._cuda_graphs = api, cuda, cuda_graphs
        self._engines: dict[GraphName, Engine] = {}
        self._lock = threading.Lock()
        self._closed = False

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        return RuntimeInfo(
            name=self._api.name,
            execution_provider=self._cuda.device.name,
            precision=(
                "bf16" if "bf16" in self.entry.rewrites.values() else self.manifest.precision()
            ),
            num_threads=None,
            versions={self._api.name: self._api.version, "cuda driver": self._cuda.device.driver},
            engine=self.entry.name,
        )

    @property
    def has_device(self) -> bool:
        """Always: the graphs are executed on a GPU."""
        return True

    def copy_to_device(self, array: Array) -> None:
        """Copy an array of frames to the GPU and wait for it."""
        graph: GraphName = "visual" if self.frames_are_independent else "video"
        self.engine(graph).copy_to_device(array)

    def engine(self, graph: GraphName) -> Engine:
        """The engine of a graph.

        Raises:
            EngineError: If it is damaged or not of this bundle.
            InferenceError: If the runtime was closed.
        """
        with self._lock:
            if self._closed:
                raise InferenceError(
                    f"The {self._api.name} runtime was closed before its {graph} graph was run; "
                    "open it again with open_runtime."
                )
            if graph not in self._engines:
                self._engines[graph] = Engine(
                    self._api,
                    self._cuda,
                    self.entry.plan(graph),
                    self.manifest.graphs[graph],
                    self.entry.shapes(graph),
                    record=self._cuda_graphs,
                    host_code_allowed=bool(self.entry.key["options"].get("version_compatible")),
                    runtime_cache=self.entry.folder / f"{graph}.runtime-cache",
                )
            return self._engines[graph]

    def close(self) -> None:
        """Free the engines, after the calls that are under way; may be called again."""
        with self._lock:
            self._closed = True
            engines = list(self._engines.values())
            self._engines.clear()
        for engine in engines:
            engine.close()

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        return self.engine(graph).run(np.asarray(array))


def open_engines(
    bundle: Bundle,
    name: EngineRuntime,
    *,
    cache: bool | str | Path = True,
    cuda_graphs: bool = False,
) -> TensorRTRuntime:
    """Open the newest engines of a bundle that are for this machine and verified on this card.

    Engines that were not yet verified here are verified now, which takes seconds.

    Args:
        bundle: The bundle.
        name: `tensorrt` or `tensorrt-rtx`.
        cache: Folder of the cache that holds the engines; True for the usual one.
        cuda_graphs: See `TensorRTRuntime`.

    Raises:
        MissingExtraError: If TensorRT or cuda-python is not installed.
        RuntimeUnavailableError: If it cannot be used here.
        EngineError: If there are no engines for this machine, or none passed verification.
    """
    api, cuda, place = open_place(name)
    failures = []
    for entry in _usable_entries(bundle, name, place, cache=cache):
        if entry.verified_on(place.card) is False:
            failures.append(f"{entry.name} failed verification on this card.")
            continue
        try:
            return _open_verified(bundle, entry, api, cuda, place, cuda_graphs=cuda_graphs)
        except EngineError as exc:
            failures.append(f"{entry.name}: {exc}")
    raise EngineError(
        f"No engine of {bundle.path} may serve on this device: {'; '.join(failures)} Run "
        f"`actionclip verify {bundle.path} --runtime {name} --bisect` to see where it goes wrong, "
        f"and `actionclip build {bundle.path} --runtime {name} --repair` to try other forms."
    )


def open_place(name: EngineRuntime) -> tuple[Api, Cuda, Place]:
    """TensorRT, the GPU, and what the two are together.

    Raises:
        MissingExtraError: If TensorRT or cuda-python is not installed.
        RuntimeUnavailableError: If it cannot be used here.
    """
    api = load_api(name)
    require_gpu(api)
    cuda = open_cuda()
    return api, cuda, find_place(api, cuda)


def _usable_entries(
    bundle: Bundle, name: EngineRuntime, place: Place, *, cache: bool | str | Path
) -> list[Entry]:
    """Engines of a bundle that were built for this machine, the newest first; at least one."""
    store = open_store(cache)
    usable, others = [], []
    for entry in store.of_bundle(bundle, name):
        reasons = place.differences(entry)
        if reasons:
            others.append(f"{entry.name} was built for {', '.join(reasons)}")
        else:
            usable.append(entry)
    if not usable:
        known = f" ({'; '.join(others)})" if others else ""
        raise EngineError(
            f"There is no {name} engine of {bundle.path} for this device in {store.folder}{known}; "
            f"run: actionclip build {bundle.path} --runtime {name}"
        )
    return usable


def _open_verified(
    bundle: Bundle, entry: Entry, api: Api, cuda: Cuda, place: Place, *, cuda_graphs: bool
) -> TensorRTRuntime:
    """Open engines that are verified on this card: now, if they were not yet.

    What the record says is tried on one clip, because a record can be changed.
    """
    if entry.verified_on(place.card):
        with ExitStack() as stack:
            runtime = TensorRTRuntime(bundle, entry, api, cuda)
            stack.enter_context(runtime)
            passed = verify(runtime, Golden.load(bundle), batch_sizes=[1]).passed
            # One that records would keep a context for every batch size of the trial.
            if passed and not cuda_graphs:
                stack.pop_all()
                return runtime
        if passed:
            return TensorRTRuntime(bundle, entry, api, cuda, cuda_graphs=True)
        logger.warning("the engine %s was verified and disagrees now", entry.name)
    else:
        logger.warning("the engine %s is verified on this card for the first time", entry.name)
    examined = examine(bundle, entry, api, cuda, place)
    if why := examined.why_wrong():
        raise EngineError(why)
    return TensorRTRuntime(bundle, examined.entry, api, cuda, cuda_graphs=cuda_graphs)


# No engine serves before it has agreed with the golden outputs on the card that it is for.


@dataclass(frozen=True, eq=False)
class Examined:
    """Engines, and what was found out about them on this card."""

    entry: Entry  # with its record as it is now
    report: ParityReport
    audits: dict[str, Audit]  # by the name of the graph, what the engine computes in
    api: Api  # the TensorRT that ran them
    cuda: Cuda

    def refused_by_audit(self) -> dict[str, str]:
        """By the name of a graph, why its engine is not in the precision that was asked for."""
        reasons = {graph: found.why_refused() for graph, found in self.audits.items()}
        return {graph: why for graph, why in reasons.items() if why is not None}

    def check(self) -> None:
        """Do nothing where the engines may serve.

        Raises:
            EngineError: If one computes in another precision than was asked for.
            ParityError: If they disagree with PyTorch.
        """
        for graph, why in self.refused_by_audit().items():
            raise EngineError(f"{graph}: {why}")
        self.report.check()

    def why_wrong(self) -> str | None:
        """Why the engines may not serve; None where they may."""
        try:
            self.check()
        except ActionClipError as exc:
            return str(exc)
        return None


def verify_newest(
    bundle: Bundle, name: EngineRuntime, *, cache: bool | str | Path = True
) -> Examined:
    """Audit and verify the newest engines of a bundle that are for this machine.

    Raises:
        MissingExtraError: If TensorRT or cuda-python is not installed.
        RuntimeUnavailableError: If it cannot be used here.
        EngineError: If there are none, or they cannot be loaded.
    """
    api, cuda, place = open_place(name)
    entry = _usable_entries(bundle, name, place, cache=cache)[0]
    return examine(bundle, entry, api, cuda, place)


def examine(bundle: Bundle, entry: Entry, api: Api, cuda: Cuda, place: Place) -> Examined:
    """Audit and verify engines on this card, and write down what came out.

    Raises:
        BundleError: If the bundle has no golden data.
        EngineError: If an engine cannot be loaded, or its inspector gives no layers.
    """
    runtime, audits = TensorRTRuntime(bundle, entry, api, cuda), dict[str, Audit]()
    with runtime:
        for graph in bundle.manifest.graphs:
            audits[graph] = _audit_graph(bundle, runtime, graph)
        report = verify(runtime, Golden.load(bundle), batch_sizes=_batch_sizes(bundle, entry))
    examined = Examined(entry, report, audits, api, cuda)
    refused = examined.refused_by_audit()
    verified = {
        "passed": report.passed and not refused,
        "audit_refused": refused,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "report": report.to_dict(),
    }
    saved = entry.save(
        audit={graph: found.record().to_dict() for graph, found in audits.items()},
        verified={**entry.record["verified"], str(place.card): verified},
    )
    return replace(examined, entry=saved)


def _audit_graph(bundle: Bundle, runtime: TensorRTRuntime, graph: GraphName) -> Audit:
    rewrite = runtime.entry.rewrites.get(graph)
    if rewrite is None:
        model = read_model(bundle.graph_path(graph), weights=False)
    else:
        model = rewritten_model(bundle, graph, rewrite)
    products = find_products(model, (1, *runtime.entry.shapes(graph)[0].opt[1:]))
    return audit(runtime.engine(graph).inspect(), products)


def _batch_sizes(bundle: Bundle, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Rows to verify each graph with: the ends of each profile, its middle, odd ones, one beyond.

    Kernels differ by batch size, and some are wrong at some sizes only.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for graph in bundle.manifest.graphs:
        shapes = entry.shapes(graph)
        found = {1, max(shape.max[0] for shape in shapes) + 1}
        for shape in shapes:
            low, opt, high = shape.min[0], shape.opt[0], shape.max[0]
            middle = (low + high) // 2
            # 1 is odd and an end, so the odd one inside is the next above the middle.
            found |= {low, opt, high, min(high, middle + 1 - middle % 2)}
        sizes[graph] = tuple(sorted(found))
    # The whole way goes through the graph that takes clips.
    sizes["scores"] = sizes["temporal" if "temporal" in sizes else "video"]
    return sizes
