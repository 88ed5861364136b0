"""Finding the part of a graph that an engine computes wrongly.

Each part is built and run by itself, on what the reference gives it, so that the error of one part
is not carried into the next. What is wrong only in company is found by growing the graph from its
beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.runtimes.comparison import Comparison, Tolerance, compare
from actionclip_deploy.runtimes.trt.boundaries import (
    Boundary,
    find_boundaries,
    head_until,
    input_name,
    part_between,
)

RunGraph = Callable[[Any, Mapping[str, NDArray[Any]]], NDArray[Any]]


@dataclass(frozen=True)
class Finding:
    """What a bisection found.

    Attributes:
        parts: Each part by itself beside the reference, in their order, to the first bad one;
            differences are relative to the largest absolute value of the reference.
        heads: Likewise the graph from its beginning to the end of each part, to the first bad
            one; empty where a part by itself is bad.
    """

    parts: tuple[Comparison, ...]
    heads: tuple[Comparison, ...]

    @property
    def first_bad(self) -> str | None:
        """Name of the first part that is bad, alone or with those before it; None for none."""
        last = (self.heads or self.parts)[-1]
        return None if last.passed else last.what

    @property
    def needs_company(self) -> bool:
        """Whether every part is right by itself and the graph from its beginning is not."""
        return bool(self.heads) and not self.heads[-1].passed

    def in_words(self) -> str:
        """The finding as one or two sentences."""
        if self.first_bad is None:
            return (
                f"Each of the {len(self.parts)} parts of the graph is right by itself, and so is "
                "the graph as it grows from its beginning, on these inputs."
            )
        if self.needs_company:
            return (
                f"Each of the {len(self.parts)} parts of the graph is right by itself; the graph "
                f"from its beginning to {self.first_bad} is not: {self.heads[-1].in_words()}. The "
                "fault needs several parts together."
            )
        return f"The first bad part is {self.first_bad}: {self.parts[-1].in_words()}."


def find_first_bad_part(
    model: Any,
    run_reference: RunGraph,
    run_candidate: RunGraph,
    inputs: Mapping[str, NDArray[Any]],
    *,
    tolerance: Tolerance,
    on_result: Callable[[Comparison], None] | None = None,
) -> Finding:
    """Compare the parts of a graph in their order, and name the first that is bad.

    Args:
        model: The graph that the engine was built of, an `onnx.ModelProto` with its weights.
        run_reference: Computes a graph, an `onnx.ModelProto`, from its inputs by name, where it is
            trusted: in ONNX Runtime on the CPU.
        run_candidate: Likewise, as it is to be tried: by an engine built of it.
        inputs: Inputs of the graph by name.
        tolerance: How far two results may be apart; its `difference` relative to the largest
            absolute value, its `min_cosine` between two rows of the first dimension.
        on_result: Called with each comparison.

    Returns:
        The parts, and where all of them are right the growing graph.

    Raises:
        EngineError: If the reference gives values that are not finite.
    """

    def judge(graph: Any, boundary: Boundary, feeds: Mapping[str, Any], wanted: Any) -> Comparison:
        given = run_candidate(graph, feeds)
        result = _compare(boundary.part, given, wanted, tolerance)
        if on_result is not None:
            on_result(result)
        return result

    parts: list[Comparison] = []
    references: list[NDArray[Any]] = []
    before: Boundary | None = None
    boundaries = find_boundaries(model)
    for boundary in boundaries:
        graph = part_between(model, before, boundary)
        known = dict(inputs)
        if before is not None:
            known[input_name(before)] = references[-1]
        feeds = _inputs_of(graph, known)
        references.append(_finite(run_reference(graph, feeds), boundary))
        parts.append(judge(graph, boundary, feeds, references[-1]))
        if not parts[-1].passed:
            return Finding(tuple(parts), ())
        before = boundary
    heads: list[Comparison] = []
    # The first part by itself is the first head.
    for boundary, wanted in zip(boundaries[1:], references[1:], strict=True):
        graph = head_until(model, boundary)
        heads.append(judge(graph, boundary, _inputs_of(graph, inputs), wanted))
        if not heads[-1].passed:
            break
    return Finding(tuple(parts), tuple(heads))


def _inputs_of(graph: Any, known: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {value.name: known[value.name] for value in graph.graph.input}


def _finite(values: NDArray[Any], boundary: Boundary) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise EngineError(
            f"{boundary.part} gives values that are NaN or infinite in ONNX Runtime as well, so it "
            "is the graph that is wrong and not an engine; export the bundle again with "
            "--precision fp32."
        )
    return values


def _compare(
    part: str, given: NDArray[Any], wanted: NDArray[Any], tolerance: Tolerance
) -> Comparison:
    scale = float(np.abs(wanted).max(initial=0.0)) or 1.0

    def rows(values: NDArray[Any]) -> Float32Array:
        scaled: Float32Array = values.astype(np.float32) / np.float32(scale)
        return scaled.reshape(len(values), -1)

    return compare(part, rows(given), rows(wanted), tolerance.difference, tolerance.min_cosine)
