"""Which part of which graph an engine computes wrongly; what `actionclip verify --bisect` tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Array
from actionclip_deploy.runtimes.comparison import tolerance_of
from actionclip_deploy.runtimes.onnx_graphs import read_model
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.runtimes.trt.bisect import Finding, find_first_bad_part
from actionclip_deploy.runtimes.trt.plan import BuildOptions
from actionclip_deploy.runtimes.trt.profiles import narrowest
from actionclip_deploy.runtimes.trt.rewritten import rewritten_model
from actionclip_deploy.runtimes.trt.trials import Trial, run_on_cpu
from actionclip_deploy.runtimes.trt.verification import Examined


@dataclass(frozen=True)
class Fault:
    """What was found in one graph.

    Attributes:
        graph: Its name.
        rows: Rows of the batch that was looked at: the smallest of those that are wrong.
        finding: What is wrong.
    """

    graph: str
    rows: int
    finding: Finding

    def in_words(self) -> str:
        """The finding as a sentence or two."""
        return f"{self.graph}, {self.rows} rows: {self.finding.in_words()}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "graph": self.graph,
            "rows": self.rows,
            "first_bad": self.finding.first_bad,
            "needs_company": self.finding.needs_company,
            **asdict(self.finding),
        }


def find_faults(bundle: Bundle, examined: Examined) -> list[Fault]:
    """Look in each graph that disagrees for the first part that does.

    Args:
        bundle: The bundle.
        examined: Engines of it that were verified.

    Raises:
        EngineError: If a part cannot be built, or the reference cannot be had.
    """
    golden = Golden.load(bundle)
    faults = []
    for graph in bundle.manifest.graphs:
        sizes = [
            c.batch_size
            for c in examined.report.comparisons
            if not c.passed and c.what.partition(",")[0] == graph
        ]
        if sizes:
            faults.append(_find_fault(bundle, examined, golden, graph, min(sizes)))
    return faults


def _find_fault(
    bundle: Bundle, examined: Examined, golden: Golden, graph: GraphName, rows: int
) -> Fault:
    entry = examined.entry
    shapes = entry.shapes(graph)
    rows = min(rows, shapes[-1].max[0])
    inputs = _golden_inputs(golden, graph)
    inputs = inputs[np.arange(rows) % len(inputs)]
    trial = Trial(
        examined.api,
        examined.cuda,
        _options_of(entry.key["options"]),
        shapes[narrowest(shapes, rows)],
        rows,
    )
    model = rewritten_model(bundle, graph, entry.rewrites.get(graph))
    if model is None:
        model = read_model(bundle.graph_path(graph))
    finding = find_first_bad_part(
        model,
        run_on_cpu,
        trial.run,
        {bundle.manifest.graphs[graph].input.name: inputs},
        tolerance=tolerance_of(bundle.manifest, graph),
    )
    return Fault(graph, rows, finding)


def _golden_inputs(golden: Golden, graph: GraphName) -> Array:
    if graph == "textual":
        return golden.tokens
    if graph == "temporal":
        assert golden.frame_features is not None
        return golden.frame_features
    frames = golden.frames
    return frames if graph == "video" else frames.reshape(-1, *frames.shape[2:])


def _options_of(options: dict[str, Any]) -> BuildOptions:
    """How to build a part: as the engine was built, but whole and for this GPU."""
    return BuildOptions(workspace_bytes=options["workspace_bytes"], opt_level=options["opt_level"])
