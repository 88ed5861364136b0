"""The runtimes `tensorrt` and `tensorrt-rtx`: engines that passed verification on this card."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.trt.api import Api, EngineRuntime, load_api, require_gpu
from actionclip_deploy.runtimes.trt.driver import Cuda, open_cuda
from actionclip_deploy.runtimes.trt.engine import Engine
from actionclip_deploy.runtimes.trt.engine_entries import Entry
from actionclip_deploy.runtimes.trt.places import Place, find_place
from actionclip_deploy.runtimes.trt.store import open_store

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
                self._engines[graph] = self._load(graph)
            return self._engines[graph]

    def _load(self, graph: GraphName) -> Engine:
        return Engine(
            self._api,
            self._cuda,
            self.entry.plan(graph),
            self.manifest.graphs[graph],
            self.entry.shapes(graph),
            record=self._cuda_graphs,
            host_code_allowed=bool(self.entry.key["options"].get("version_compatible")),
            runtime_cache=self.entry.folder / f"{graph}.runtime-cache",
        )

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
    from actionclip_deploy.runtimes.trt.verification import open_verified

    api, cuda, place = open_place(name)
    failures = []
    for entry in usable_entries(bundle, name, place, cache=cache):
        if entry.verified_on(place.card) is False:
            failures.append(f"{entry.name} failed verification on this card.")
            continue
        try:
            return open_verified(bundle, entry, api, cuda, place, cuda_graphs=cuda_graphs)
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


def usable_entries(
    bundle: Bundle, name: EngineRuntime, place: Place, *, cache: bool | str | Path = True
) -> list[Entry]:
    """Engines of a bundle that were built for this machine, the newest first.

    Raises:
        EngineError: If there are none; says for what there are some.
    """
    store = open_store(cache)
    others = []
    usable = []
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
