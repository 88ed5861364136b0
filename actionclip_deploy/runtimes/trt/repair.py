"""Other ways to build engines where the usual one is wrong on this device.

Every attempt is audited and verified like any build. The fastest that passes is kept, with what
was tried and what came of it in its record; the engines of the other attempts are removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError, EngineError, InferenceError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.auto import median_latency_ms
from actionclip_deploy.runtimes.parity import ParityReport
from actionclip_deploy.runtimes.trt.audit import Audit
from actionclip_deploy.runtimes.trt.build import BuildRequest, BuildResult, EngineBuilder
from actionclip_deploy.runtimes.trt.engine_entries import Entry
from actionclip_deploy.runtimes.trt.profiles import Profile
from actionclip_deploy.runtimes.trt.rewrites import REWRITES
from actionclip_deploy.runtimes.trt.rewritten import rewritten_model
from actionclip_deploy.runtimes.trt.runtime import TensorRTRuntime
from actionclip_deploy.runtimes.trt.verification import check_examined, refused_by_audit

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
