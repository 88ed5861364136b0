"""No engine serves before it has agreed with the golden outputs on the card that it is for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError, ParityError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.parity import Golden, ParityReport, verify
from actionclip_deploy.runtimes.trt.api import Api, EngineRuntime
from actionclip_deploy.runtimes.trt.audit import Audit, audit
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.engine_entries import Entry
from actionclip_deploy.runtimes.trt.places import Place
from actionclip_deploy.runtimes.trt.products import find_products, read_products
from actionclip_deploy.runtimes.trt.profiles import ShapeRange
from actionclip_deploy.runtimes.trt.rewritten import rewritten_model
from actionclip_deploy.runtimes.trt.runtime import TensorRTRuntime, open_place, usable_entries

logger = logging.getLogger(__name__)


def verify_entry(bundle: Bundle, runtime: TensorRTRuntime) -> ParityReport:
    """Compare engines with the golden outputs at the batch sizes of their profiles.

    Raises:
        BundleError: If the bundle has no golden data.
    """
    return verify(runtime, Golden.load(bundle), batch_sizes=batch_sizes(bundle, runtime.entry))


def batch_sizes(bundle: Bundle, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Rows to verify each graph with: the ends of each profile, its middle, odd ones, one beyond.

    Kernels differ by batch size, and some are wrong at some sizes only.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for graph in bundle.manifest.graphs:
        shapes = entry.shapes(graph)
        sizes[graph] = _sizes(shapes)
    # The whole way goes through the graph that takes clips.
    sizes["scores"] = sizes["temporal" if "temporal" in sizes else "video"]
    return sizes


def _sizes(shapes: Sequence[ShapeRange]) -> tuple[int, ...]:
    found = {1, max(shape.max[0] for shape in shapes) + 1}
    for shape in shapes:
        low, opt, high = shape.min[0], shape.opt[0], shape.max[0]
        middle = (low + high) // 2
        # 1 is odd and an end, so the odd one inside is the next above the middle.
        found |= {low, opt, high, min(high, middle + 1 - middle % 2)}
    return tuple(sorted(found))


def audit_graph(bundle: Bundle, runtime: TensorRTRuntime, graph: GraphName) -> Audit:
    """Look in what precision an engine computes.

    Raises:
        EngineError: If the engine does not tell.
    """
    shape = (1, *runtime.entry.shapes(graph)[0].opt[1:])
    model = rewritten_model(bundle, graph, runtime.entry.rewrites.get(graph))
    if model is None:
        products = read_products(bundle.graph_path(graph), shape)
    else:
        products = find_products(model, shape)
    return audit(runtime.engine(graph).inspect(), products)


@dataclass(frozen=True, eq=False)
class Examined:
    """Engines, and what was found out about them on this card.

    Attributes:
        entry: With its record as it is now.
        report: What was compared with PyTorch.
        audits: By the name of the graph, what the engine computes in.
        api: The TensorRT that ran them.
        cuda: The GPU.
    """

    entry: Entry
    report: ParityReport
    audits: dict[str, Audit]
    api: Api
    cuda: Cuda


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
    return examine(bundle, usable_entries(bundle, name, place, cache=cache)[0], api, cuda, place)


def examine(bundle: Bundle, entry: Entry, api: Api, cuda: Cuda, place: Place) -> Examined:
    """Audit and verify engines on this card, and write down what came out."""
    runtime = TensorRTRuntime(bundle, entry, api, cuda)
    with runtime:
        audits: dict[str, Audit] = {
            graph: audit_graph(bundle, runtime, graph) for graph in bundle.manifest.graphs
        }
        report = verify_entry(bundle, runtime)
    refused = refused_by_audit(audits)
    verified = {
        "passed": report.passed and not refused,
        "audit_refused": refused,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "report": report.to_dict(),
    }
    record: dict[str, Any] = {
        "audit": {graph: found.to_dict() for graph, found in audits.items()},
        "verified": {**entry.record["verified"], str(place.card): verified},
    }
    return Examined(entry.save(**record), report, audits, api, cuda)


def check_examined(report: ParityReport, audits: dict[str, Audit]) -> None:
    """Do nothing where an engine may serve.

    Raises:
        EngineError: If it computes in another precision than was asked for.
        ParityError: If it disagrees with PyTorch.
    """
    for graph, why in refused_by_audit(audits).items():
        raise EngineError(f"{graph}: {why}")
    report.check()


def refused_by_audit(audits: Mapping[str, Audit]) -> dict[str, str]:
    """By the name of a graph, why its engine is not in the precision that was asked for."""
    errors = {}
    for graph, found in audits.items():
        try:
            found.check()
        except EngineError as exc:
            errors[graph] = str(exc)
    return errors


def open_verified(
    bundle: Bundle, entry: Entry, api: Api, cuda: Cuda, place: Place, *, cuda_graphs: bool
) -> TensorRTRuntime:
    """Open engines that are verified on this card: now, if they were not yet.

    What the record says is tried on one clip, because a record can be changed.

    Raises:
        EngineError: If they do not pass.
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
    try:
        check_examined(examined.report, examined.audits)
    except ParityError as exc:
        raise EngineError(str(exc)) from exc
    return TensorRTRuntime(bundle, examined.entry, api, cuda, cuda_graphs=cuda_graphs)
