"""From a bundle to engines that are kept, audited and verified; what `actionclip build` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError, InferenceError, ShapeError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import median_latency_ms
from actionclip_deploy.runtimes.machine import cuda_devices
from actionclip_deploy.runtimes.onnx_graphs import structure_hash
from actionclip_deploy.runtimes.onnx_references import check_onnx_file
from actionclip_deploy.runtimes.trt.api import EngineRuntime, load_api, require_gpu
from actionclip_deploy.runtimes.trt.driver import Cuda, open_cuda
from actionclip_deploy.runtimes.trt.plan import (
    BuildOptions,
    Profile,
    ShapeRange,
    build_plan,
    default_targets,
    default_workspace_bytes,
    refit_plan,
    shape_ranges,
)
from actionclip_deploy.runtimes.trt.rewrites import REWRITES, graph_file, rewritten_model
from actionclip_deploy.runtimes.trt.runtime import Examined, TensorRTRuntime, examine
from actionclip_deploy.runtimes.trt.store import (
    EngineKey,
    Entry,
    find_place,
    graph_hashes,
    open_store,
)


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built."""

    profiles: tuple[Profile, ...]
    num_frames: int | None = None  # T; None for that of the bundle
    options: BuildOptions = field(default_factory=BuildOptions)
    # By the name of a graph, a rewrite of it to build instead.
    rewrites: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BuildResult:
    """Engines, and what is known of them."""

    entry: Entry  # where they are kept
    is_new: bool  # whether they were built now and not found
    why: str | None  # why engines that were there were not used; None where there were none
    examined: Examined | None  # what was found out about them; None where no GPU is to run them on

    def why_wrong(self) -> str | None:
        """Why the engines may not serve; None where they may, or none could be run."""
        return None if self.examined is None else self.examined.why_wrong()


class EngineBuilder:
    """Builds engines of a bundle at this place.

    Args:
        bundle: The bundle.
        name: `tensorrt` or `tensorrt-rtx`.
        cache: Folder of the cache; True for the usual one.
        tell: Called with a short sentence when a step begins.
        on_phase: Called with a graph, a phase of its build, steps done and steps.

    Raises:
        MissingExtraError: If something is not installed.
        RuntimeUnavailableError: If it cannot be used here.
        EngineError: If the bundle cannot become engines.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: EngineRuntime,
        *,
        cache: bool | str | Path = True,
        tell: Callable[[str], None] = lambda _: None,
        on_phase: Callable[[str, str, int, int], None] = lambda *_: None,
    ) -> None:
        self.bundle = bundle
        self.api = load_api(name)
        self.cuda: Cuda | None = None
        # TensorRT for RTX compiles for GPUs that are elsewhere.
        if not self.api.is_rtx or cuda_devices()[0]:
            require_gpu(self.api)
            self.cuda = open_cuda()
        self.place = find_place(self.api, self.cuda)
        self.store = open_store(cache)
        self.tell, self._on_phase = tell, on_phase
        spec = bundle.manifest.quantization
        if spec is not None and spec.recipe == "dynamic":
            raise EngineError(
                "The bundle's int8 graph scales its activations in each call, which is for CPUs; "
                "TensorRT takes fixed scales: export with --int8-recipe static --calibration "
                "VIDEOS."
            )

    def build(
        self, request: BuildRequest, *, rebuild: bool = False, base: Entry | None = None
    ) -> BuildResult:
        """Find or build the engines of a request, then audit and verify them if a GPU is there.

        Args:
            request: What is to be built.
            rebuild: Whether to build what is there already.
            base: Engines whose plans are taken where the request asks for the same.

        Raises:
            EngineError: If an engine cannot be built or kept.
        """
        request = self._completed(request)
        key = self.key_of(request)
        entry, why = (None, "a new build was asked for") if rebuild else self.store.find(key)
        is_new = entry is None
        if entry is None:
            self.store.check_writable()
            if request.options.strip:
                entry = self._refitted(request, key, rebuild=rebuild)
            else:
                known = {} if base is None else _same_plans(base, key)
                entry = self._built(request, key, rebuild=rebuild, known=known)
        if self.cuda is None:
            return BuildResult(entry, is_new, why, None)
        self.tell("Verifying the engines on this device")
        examined = examine(self.bundle, entry, self.api, self.cuda, self.place)
        return BuildResult(examined.entry, is_new, why, examined)

    def key_of(self, request: BuildRequest, *, stripped: bool = False) -> EngineKey:
        """What the engines of a request depend on; stripped ones on no weights."""
        request = self._completed(request)
        graphs = self.bundle.manifest.graphs
        options = {**request.options.identity(), "rewrites": dict(request.rewrites)}
        options |= {"strip": stripped, "refitted": request.options.strip and not stripped}
        structures: dict[str, dict[str, str]] = {
            graph: {"structure": structure_hash(self.bundle.graph_path(graph))}
            for graph in (graphs if stripped else ())
        }
        return EngineKey(
            graphs=structures or graph_hashes(self.bundle),
            place=self.place.built_with(request.options),
            precision=self.bundle.manifest.precision(),
            shapes={graph: self._shapes(graph, request) for graph in graphs},
            options=options,
        )

    def _completed(self, request: BuildRequest) -> BuildRequest:
        """A request with this place's choice of what it leaves open."""
        options = request.options
        if self.api.is_rtx:
            targets = options.targets or default_targets(self.bundle.manifest)
            options = replace(options, targets=targets)
            if options.timing_cache is not None:
                raise EngineError(
                    "--timing-cache was given, and TensorRT for RTX measures no kernels while it "
                    "builds; leave it out."
                )
            if options.strip and self.cuda is None:
                raise EngineError(
                    "--strip was given, and an engine is filled with weights on a GPU, which this "
                    "machine does not have; leave it out."
                )
        elif options.targets:
            raise EngineError(
                f"Targets were given ({', '.join(options.targets)}) and {self.api.name} builds for "
                "the GPU of this machine alone; leave them out, or use --runtime tensorrt-rtx."
            )
        if request.rewrites:
            options = replace(options, strip=False)  # a refit takes the bundle's own graph
        num_frames = request.num_frames or self.bundle.manifest.model.num_frames
        try:
            self.bundle.manifest.model.check_num_frames(num_frames)
        except ShapeError as exc:
            raise EngineError(f"--num-frames does not fit the bundle: {exc}") from exc
        return replace(request, options=options, num_frames=num_frames)

    def _shapes(self, graph: GraphName, request: BuildRequest) -> tuple[ShapeRange, ...]:
        assert request.num_frames is not None
        return shape_ranges(self.bundle.manifest, graph, request.profiles, request.num_frames)

    def _refitted(self, request: BuildRequest, key: EngineKey, *, rebuild: bool) -> Entry:
        """Engines without weights, built once per structure, filled with this bundle's."""
        stripped_key = self.key_of(request, stripped=True)
        stripped, _ = (None, None) if rebuild else self.store.find(stripped_key)
        if stripped is None:
            stripped = self._built(request, stripped_key, rebuild=rebuild, known={})
        plans: dict[str, bytes] = {}
        seconds: dict[str, float] = {}
        for graph in self.bundle.manifest.graphs:
            self.tell(f"Filling the {graph} engine with its weights")
            started = time.monotonic()
            plan = stripped.plan(graph)
            plans[graph] = refit_plan(self.api, plan, self.bundle.graph_path(graph))
            seconds[graph] = time.monotonic() - started
        details = {"refitted_from": stripped.name, "refit_seconds": seconds}
        return self.store.add(key, plans, details, replace=rebuild)

    def _built(
        self, request: BuildRequest, key: EngineKey, *, rebuild: bool, known: Mapping[str, bytes]
    ) -> Entry:
        """Engines of all graphs; of those that are known, the plan is taken."""
        options = request.options
        if options.workspace_bytes is None and self.cuda is not None:
            free, integrated = self.cuda.free_bytes(), self.cuda.device.integrated
            workspace = default_workspace_bytes(free, integrated=integrated)
            options = replace(options, workspace_bytes=workspace)
        plans: dict[str, bytes] = {}
        seconds: dict[str, float] = {}
        graphs = self.bundle.manifest.graphs
        for graph, spec in graphs.items():
            if graph in known:
                plans[graph], seconds[graph] = known[graph], 0.0
                continue
            check_onnx_file(self.bundle.graph_path(graph), self.bundle)
            self.tell(f"Building the {graph} engine ({spec.precision})")
            started = time.monotonic()
            with graph_file(self.bundle, graph, request.rewrites.get(graph)) as path:
                plans[graph] = build_plan(
                    self.api,
                    path,
                    {spec.input.name: self._shapes(graph, request)},
                    options,
                    on_progress=partial(self._on_phase, graph),
                )
            seconds[graph] = time.monotonic() - started
        details = {
            "build_seconds": seconds,
            "precisions": {graph: spec.precision for graph, spec in graphs.items()},
            "bundle": self.bundle.path.resolve().name,
        }
        return self.store.add(key, plans, details, replace=rebuild)


def _same_plans(base: Entry, key: EngineKey) -> dict[str, bytes]:
    """Plans of other engines that are what a key asks for, by the name of the graph."""
    wanted = key.to_dict()
    rewrites = wanted["options"].pop("rewrites")
    has = {**base.key, "options": {**base.key["options"]}}
    has["options"].pop("rewrites", None)
    if any(wanted[part] != has[part] for part in ("options", "graphs", "place")):
        return {}
    return {
        graph: base.plan(graph)
        for graph, shapes in wanted["shapes"].items()
        if shapes == has["shapes"].get(graph) and rewrites.get(graph) == base.rewrites.get(graph)
    }


def check_precision(bundle: Bundle, precision: str | None) -> None:
    """Compare a precision that was asked for with the one that the bundle's graphs have.

    Raises:
        EngineError: If they differ: no flag of a build changes what a graph computes in.
    """
    has = bundle.manifest.precision()
    if precision not in (None, has):
        raise EngineError(
            f"The graphs of {bundle.path} are {has} and {precision} was asked for; an engine has "
            f"the precision of its graph: export the checkpoint with --precision {precision}."
        )


# Other ways to build engines where the usual one is wrong on this device. Every attempt is audited
# and verified like any build.

_LOWER_LEVELS = (2, 1)


@dataclass(frozen=True)
class Attempt:
    """One other way of building, and what came of it."""

    name: str  # what was changed
    # Whether its engines agree with PyTorch and compute in the precision of their graph.
    passed: bool
    outcome: str
    # Median of one clip from host memory to its embedding; None if it did not pass.
    latency_ms: float | None = None
    engine: str | None = None  # name of the entry; None if there is none


@dataclass(frozen=True, eq=False)
class Repair:
    """The engines that are kept, and everything that was tried."""

    entry: Entry  # the fastest engines that passed
    attempts: tuple[Attempt, ...]


def repair_engines(builder: EngineBuilder, request: BuildRequest, result: BuildResult) -> Repair:
    """Try other forms of the graphs and other ways to build them, and keep the fastest that passes.

    Args:
        builder: What built the engines.
        request: What was asked for.
        result: The engines that are wrong.

    Raises:
        EngineError: If none passes; says what was tried.
    """
    why = result.why_wrong()
    if why is None or result.examined is None:
        raise EngineError("There is nothing to repair: the engines passed, or could not be run.")
    attempts: list[Attempt] = []
    entries: dict[str, Entry] = {}
    for name, other in _other_requests(builder.bundle, request, _wrong_graphs(result.examined)):
        builder.tell(f"Repair: {name}")
        attempt, entry = _try(builder, name, other, result.entry)
        attempts.append(attempt)
        if entry is not None:
            entries[entry.name] = entry
    passing = [attempt for attempt in attempts if attempt.passed]
    best = min(passing, key=lambda a: a.latency_ms or math.inf, default=None)
    for name in entries:
        if best is None or name != best.engine:
            builder.store.remove(name)
    if best is None or best.engine is None:
        tried = "; ".join(f"{attempt.name}: {attempt.outcome}" for attempt in attempts)
        raise EngineError(
            f"No other form of the graphs gives engines that pass on this device ({tried}). Use "
            "another version of TensorRT, a bundle of another --precision, or --runtime "
            "onnxruntime."
        )
    record = {"why": why, "kept": best.name, "attempts": [asdict(a) for a in attempts]}
    return Repair(entries[best.engine].save(repair=record), tuple(attempts))


def _wrong_graphs(examined: Examined) -> list[str]:
    """Graphs that failed by themselves; all of those that see frames where none did."""
    wrong = {c.what.partition(",")[0] for c in examined.report.comparisons if not c.passed}
    wrong |= set(examined.refused_by_audit())
    graphs = [graph for graph in examined.audits if graph in wrong]
    return graphs or [graph for graph in examined.audits if graph != "textual"]


def _other_requests(
    bundle: Bundle, request: BuildRequest, wrong: Sequence[str]
) -> Iterator[tuple[str, BuildRequest]]:
    """The attempts, in their order; rewrites that change nothing are left out."""
    graphs: list[GraphName] = [graph for graph in bundle.manifest.graphs if graph in wrong]
    for name in REWRITES:
        changed = [g for g in graphs if rewritten_model(bundle, g, name) is not None]
        if changed:
            yield name, replace(request, rewrites=dict.fromkeys(changed, name))
    for level in _LOWER_LEVELS:
        if level < request.options.opt_level:
            options = replace(request.options, opt_level=level)
            yield f"optimization level {level}", replace(request, options=options)
    for profile in _narrower(request.profiles):
        yield f"profile of {profile.name} clips", replace(request, profiles=(profile,))


def _narrower(profiles: Sequence[Profile]) -> list[Profile]:
    """Profiles of one size each, the larger first; those that were asked for are left out."""
    sizes = sorted({p.opt_clips for p in profiles} | {1}, reverse=True)
    exact = [Profile(f"{size},{size},{size}", size, size, size) for size in sizes]
    widths = {(p.min_clips, p.opt_clips, p.max_clips) for p in profiles}
    alone = len(profiles) == 1
    return [p for p in exact if not (alone and (p.min_clips, p.opt_clips, p.max_clips) in widths)]


def _try(
    builder: EngineBuilder, name: str, request: BuildRequest, base: Entry
) -> tuple[Attempt, Entry | None]:
    try:
        result = builder.build(request, base=base)
    except (EngineError, InferenceError) as exc:
        return Attempt(name, False, str(exc)), None
    why = result.why_wrong()
    if why is not None:
        return Attempt(name, False, why, engine=result.entry.name), result.entry
    assert builder.cuda is not None
    with TensorRTRuntime(builder.bundle, result.entry, builder.api, builder.cuda) as runtime:
        latency = median_latency_ms(runtime)
    words = f"agrees with PyTorch, {latency:.2f} ms a clip"
    return Attempt(name, True, words, latency, result.entry.name), result.entry
