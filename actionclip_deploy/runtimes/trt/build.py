"""From a bundle to engines that are kept, audited and verified; what `actionclip build` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError, EngineError, InferenceError, ShapeError
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.runtimes.auto import median_latency_ms
from actionclip_deploy.runtimes.machine import cuda_devices
from actionclip_deploy.runtimes.onnx_files import check_onnx_file
from actionclip_deploy.runtimes.parity import ParityReport
from actionclip_deploy.runtimes.trt.api import Api, EngineRuntime, load_api, require_gpu
from actionclip_deploy.runtimes.trt.audit import Audit
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
    structure_hash,
)
from actionclip_deploy.runtimes.trt.rewrites import REWRITES, graph_file, rewritten_model
from actionclip_deploy.runtimes.trt.runtime import (
    TensorRTRuntime,
    check_examined,
    examine,
    refused_by_audit,
)
from actionclip_deploy.runtimes.trt.store import (
    EngineKey,
    EngineStore,
    Entry,
    Place,
    find_place,
    graph_hashes,
    open_store,
)

OnPhase = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built.

    Attributes:
        profiles: Batch sizes.
        num_frames: T; None for that of the bundle.
        options: How to build.
        rewrites: By the name of a graph, a rewrite of it to build instead.
    """

    profiles: tuple[Profile, ...]
    num_frames: int | None = None
    options: BuildOptions = field(default_factory=BuildOptions)
    rewrites: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BuildResult:
    """Engines, and what is known of them.

    Attributes:
        entry: Where they are kept.
        is_new: Whether they were built now and not found.
        why: Why engines that were there were not used; None where there were none.
        report: What was compared with PyTorch; None where no GPU is to run them on.
        audits: By the name of a graph, what the engine computes in; empty in the same case.
    """

    entry: Entry
    is_new: bool
    why: str | None
    report: ParityReport | None
    audits: dict[str, Audit]


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
        tell: Callable[[str], None] | None = None,
        on_phase: OnPhase | None = None,
    ) -> None:
        self.bundle = bundle
        self.api: Api = load_api(name)
        self.cuda: Cuda | None = None
        # TensorRT for RTX compiles for GPUs that are elsewhere.
        if not self.api.is_rtx or cuda_devices()[0]:
            require_gpu(self.api)
            self.cuda = open_cuda()
        self.place: Place = find_place(self.api, self.cuda)
        self.store: EngineStore = open_store(cache)
        self._tell = tell or (lambda _: None)
        self._on_phase = on_phase
        _check_recipe(bundle.manifest)

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
            entry = self._build(request, key, rebuild=rebuild, base=base)
        if self.cuda is None:
            return BuildResult(entry, is_new, why, None, {})
        self._tell("Verifying the engines on this device")
        examined = examine(self.bundle, entry, self.api, self.cuda, self.place)
        return BuildResult(examined.entry, is_new, why, examined.report, examined.audits)

    def key_of(self, request: BuildRequest, *, stripped: bool = False) -> EngineKey:
        """What the engines of a request depend on; stripped ones on no weights."""
        request = self._completed(request)
        options = {**request.options.identity(), "rewrites": dict(request.rewrites)}
        options |= {"strip": stripped, "refitted": request.options.strip and not stripped}
        return EngineKey(
            graphs=self._structures() if stripped else graph_hashes(self.bundle),
            place=self.place.built_with(request.options),
            precision=self.bundle.manifest.precision(),
            shapes={graph: self._shapes(graph, request) for graph in self.bundle.manifest.graphs},
            options=options,
        )

    def _structures(self) -> dict[str, dict[str, str]]:
        paths = {graph: self.bundle.graph_path(graph) for graph in self.bundle.manifest.graphs}
        return {graph: {"structure": structure_hash(path)} for graph, path in paths.items()}

    def _completed(self, request: BuildRequest) -> BuildRequest:
        """A request with what it leaves to this place."""
        options = request.options
        if self.api.is_rtx:
            targets = options.targets or default_targets(self.bundle.manifest)
            options = replace(options, targets=targets)
            _check_rtx(options, has_gpu=self.cuda is not None)
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
            raise EngineError(f"--frames cannot be kept to: {exc}") from exc
        return replace(request, options=options, num_frames=num_frames)

    def _shapes(self, graph: GraphName, request: BuildRequest) -> tuple[ShapeRange, ...]:
        assert request.num_frames is not None
        return shape_ranges(self.bundle.manifest, graph, request.profiles, request.num_frames)

    def _build(
        self, request: BuildRequest, key: EngineKey, *, rebuild: bool, base: Entry | None
    ) -> Entry:
        if request.options.strip:
            return self._refitted(request, key, rebuild=rebuild)
        known = {} if base is None else _same_plans(base, key)
        return self._add(key, self._plans(request, known), replace=rebuild)

    def _refitted(self, request: BuildRequest, key: EngineKey, *, rebuild: bool) -> Entry:
        """Engines without weights, built once per structure, filled with this bundle's."""
        stripped_key = self.key_of(request, stripped=True)
        stripped, _ = (None, None) if rebuild else self.store.find(stripped_key)
        if stripped is None:
            stripped = self._add(stripped_key, self._plans(request, {}), replace=rebuild)
        plans: dict[str, bytes] = {}
        seconds: dict[str, float] = {}
        for graph in self.bundle.manifest.graphs:
            self._tell(f"Filling the {graph} engine with its weights")
            started = time.monotonic()
            plan = stripped.plan(graph)
            plans[graph] = refit_plan(self.api, plan, self.bundle.graph_path(graph))
            seconds[graph] = time.monotonic() - started
        details = {"refitted_from": stripped.name, "refit_seconds": seconds}
        return self.store.add(key, plans, details, replace=rebuild)

    def _plans(
        self, request: BuildRequest, known: Mapping[str, bytes]
    ) -> dict[GraphName, tuple[bytes, float]]:
        options = request.options
        if options.workspace_bytes is None and self.cuda is not None:
            free, integrated = self.cuda.free_bytes(), self.cuda.device.integrated
            workspace = default_workspace_bytes(free, integrated=integrated)
            options = replace(options, workspace_bytes=workspace)
        plans: dict[GraphName, tuple[bytes, float]] = {}
        for graph, spec in self.bundle.manifest.graphs.items():
            if graph in known:
                plans[graph] = (known[graph], 0.0)
                continue
            check_onnx_file(self.bundle.graph_path(graph), self.bundle)
            self._tell(f"Building the {graph} engine ({spec.precision})")
            started = time.monotonic()
            with graph_file(self.bundle, graph, request.rewrites.get(graph)) as path:
                plan = build_plan(
                    self.api,
                    path,
                    {spec.input.name: self._shapes(graph, request)},
                    options,
                    on_progress=self._progress_of(graph),
                )
            plans[graph] = (plan, time.monotonic() - started)
        return plans

    def _progress_of(self, graph: str) -> Callable[[str, int, int], None] | None:
        on_phase = self._on_phase
        if on_phase is None:
            return None
        return lambda phase, done, steps: on_phase(graph, phase, done, steps)

    def _add(
        self, key: EngineKey, plans: Mapping[GraphName, tuple[bytes, float]], *, replace: bool
    ) -> Entry:
        details: dict[str, Any] = {
            "build_seconds": {graph: seconds for graph, (_, seconds) in plans.items()},
            "precisions": {g: spec.precision for g, spec in self.bundle.manifest.graphs.items()},
            "bundle": str(self.bundle.path.resolve().name),
        }
        given: dict[str, bytes] = {graph: plan for graph, (plan, _) in plans.items()}
        return self.store.add(key, given, details, replace=replace)


def _same_plans(base: Entry, key: EngineKey) -> dict[str, bytes]:
    """Plans of other engines that are what a key asks for, by the name of the graph."""
    wanted, has = key.to_dict(), base.key
    rewrites = wanted["options"].pop("rewrites")
    others = {**has["options"]}
    others.pop("rewrites", None)
    if (wanted["options"], wanted["graphs"], wanted["place"]) != (
        others,
        has["graphs"],
        has["place"],
    ):
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


def _check_recipe(manifest: Manifest) -> None:
    spec = manifest.quantization
    if spec is not None and spec.recipe == "dynamic":
        raise EngineError(
            "The bundle's int8 graph scales its activations in each call, which is for CPUs; "
            "TensorRT takes fixed scales: export with --int8-recipe static --calibration VIDEOS."
        )


def _check_rtx(options: BuildOptions, *, has_gpu: bool) -> None:
    if options.timing_cache is not None or (options.strip and not has_gpu):
        what = "--timing-cache" if options.timing_cache is not None else "--strip"
        raise EngineError(
            f"{what} was given, which TensorRT for RTX has no use for without a GPU; leave it out."
        )


# Other ways to build engines where the usual one is wrong on this device.
#
# Every attempt is audited and verified like any build. The fastest that passes is kept, with what
# was tried and what came of it in its record; the engines of the other attempts are removed.


_LOWER_LEVELS = (2, 1)


@dataclass(frozen=True)
class Attempt:
    """One other way of building, and what came of it.

    Attributes:
        name: What was changed.
        passed: Whether its engines agree with PyTorch and compute in the precision of their graph.
        outcome: In words.
        latency_ms: Median of one clip from host memory to its embedding; None if it did not pass.
        engine: Name of the entry; None if there is none.
    """

    name: str
    passed: bool
    outcome: str
    latency_ms: float | None = None
    engine: str | None = None


@dataclass(frozen=True, eq=False)
class Repair:
    """The engines that are kept, and everything that was tried.

    Attributes:
        entry: The fastest engines that passed.
        attempts: In their order.
    """

    entry: Entry
    attempts: tuple[Attempt, ...]


def why_wrong(result: BuildResult) -> str | None:
    """What is wrong with engines that were built; None for nothing, or where none could run."""
    if result.report is None:
        return None
    try:
        check_examined(result.report, result.audits)
    except ActionClipError as exc:
        return str(exc)
    return None


def repair(
    builder: EngineBuilder,
    request: BuildRequest,
    result: BuildResult,
    *,
    tell: Callable[[str], None] | None = None,
) -> Repair:
    """Try other forms of the graphs and other ways to build them, and keep the fastest that passes.

    Args:
        builder: What built the engines.
        request: What was asked for.
        result: The engines that are wrong.
        tell: Called with a short sentence when an attempt begins.

    Raises:
        EngineError: If none passes; says what was tried.
    """
    why = why_wrong(result)
    if why is None or result.report is None:
        raise EngineError("There is nothing to repair: the engines passed, or could not be run.")
    wrong = _wrong_graphs(result.report, result.audits)
    attempts: list[Attempt] = []
    entries: dict[str, Entry] = {}
    for name, other in _other_requests(builder.bundle, request, wrong):
        if tell is not None:
            tell(f"Repair: {name}")
        attempt, entry = _try(builder, name, other, result.entry)
        attempts.append(attempt)
        if entry is not None:
            entries[entry.name] = entry
    return _keep_fastest(builder, why, attempts, entries)


def _wrong_graphs(report: ParityReport, audits: dict[str, Audit]) -> list[str]:
    """Graphs that failed by themselves; all of those that see frames where none did."""
    wrong = {c.what.partition(",")[0] for c in report.comparisons if not c.passed}
    wrong |= set(refused_by_audit(audits))
    graphs = [graph for graph in audits if graph in wrong]
    return graphs or [graph for graph in audits if graph != "textual"]


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
    why = why_wrong(result)
    if why is not None:
        return Attempt(name, False, why, engine=result.entry.name), result.entry
    assert builder.cuda is not None
    with TensorRTRuntime(builder.bundle, result.entry, builder.api, builder.cuda) as runtime:
        latency = median_latency_ms(runtime)
    words = f"agrees with PyTorch, {latency:.2f} ms a clip"
    return Attempt(name, True, words, latency, result.entry.name), result.entry


def _keep_fastest(
    builder: EngineBuilder, why: str, attempts: list[Attempt], entries: dict[str, Entry]
) -> Repair:
    passing = [attempt for attempt in attempts if attempt.passed]
    best = min(passing, key=lambda a: a.latency_ms or math.inf) if passing else None
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
    record = {
        "why": why,
        "kept": best.name,
        "attempts": [asdict(attempt) for attempt in attempts],
    }
    return Repair(entries[best.engine].save(repair=record), tuple(attempts))
