"""Parity: does a runtime compute what PyTorch computed?

Every graph is run by itself on the reference's own inputs, at several batch sizes, and then the
whole way from frames and tokens to scores. What a runtime may get wrong without an error shows in
one of these: a batch size that was fixed at export, rows that leak into each other, a precision
that is not the one asked for, a kernel that is wrong for some shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import InferenceError, ParityError
from actionclip_deploy.manifest import QUANTIZED_PRECISIONS, GraphName, Manifest
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.comparison import (
    TOLERANCES,
    Comparison,
    Tolerance,
    compare,
    failed,
    tolerance_of,
)
from actionclip_deploy.runtimes.golden import Golden, golden_scores

__all__ = [
    "TOLERANCES",
    "Comparison",
    "Golden",
    "ParityReport",
    "Tolerance",
    "verify",
    "verify_bundle",
]

_ROW_CHECK_SIZE = 5


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one runtime with the reference.

    Attributes:
        runtime: What ran.
        origin: Where the frames of the golden data came from.
        comparisons: In the order in which they ran.
    """

    runtime: RuntimeInfo
    origin: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison agrees."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON; numbers that are not finite are null."""
        rows = [
            {key: _finite_or_none(value) for key, value in asdict(comparison).items()}
            for comparison in self.comparisons
        ]
        return {
            "passed": self.passed,
            "runtime": asdict(self.runtime),
            "golden_origin": self.origin,
            "comparisons": rows,
        }

    def check(self) -> None:
        """Do nothing if every comparison agrees.

        Raises:
            ParityError: If one does not: which graph, at which batch size, by how much.
        """
        if self.passed:
            return
        failed = [c for c in self.comparisons if not c.passed]
        ran = f"{self.runtime.name} ({self.runtime.execution_provider}, {self.runtime.precision})"
        if not failed:
            raise ParityError(f"Nothing of {ran} was compared with PyTorch; export again.", self)
        first = failed[0]
        raise ParityError(
            f"{ran} disagrees with PyTorch in {len(failed)} of {len(self.comparisons)} "
            f"comparisons, first in {first.what} at batch size {first.batch_size}: "
            f"{first.in_words()}. Do not use it so; try another execution provider or version of "
            f"the runtime, or {self._other_export()}.",
            self,
        )

    def _other_export(self) -> str:
        if self.runtime.precision == "fp32":
            return "export the bundle again"
        if self.runtime.precision == "int8":
            return (
                "export the bundle with --int8-weights reduced, where it has full ones and this "
                "CPU has no VNNI, or with --precision fp32"
            )
        return "export the bundle with --precision fp32"


def verify_bundle(bundle: Bundle, runtime: Runtime) -> ParityReport:
    """Compare a runtime with the golden data of its bundle.

    Raises:
        BundleError: If the bundle has no golden data.
        IntegrityError: If it cannot be read or is not of this bundle's model.
    """
    return verify(runtime, Golden.load(bundle))


def verify(
    runtime: Runtime,
    golden: Golden,
    *,
    batch_sizes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> ParityReport:
    """Compare a runtime with golden data: each graph, then the whole way.

    Args:
        runtime: An open runtime of the same model.
        golden: What the reference gave.
        batch_sizes: Rows of the calls, the same for all graphs or by the name of the graph, with
            `scores` for the whole way; None, and a graph that is not named, takes 1, 2, 3, all
            rows, and one more than all.

    Raises:
        ShapeError: If the golden data is of another model.
        ValueError: If a batch size is below 1.
    """
    given = batch_sizes.values() if isinstance(batch_sizes, Mapping) else [batch_sizes]
    if any(sizes is not None and min(sizes, default=0) < 1 for sizes in given):
        raise ValueError(f"batch_sizes is {batch_sizes!r}; each must be 1 or more, and one given.")
    sizes_of = _sizes_by_name(batch_sizes)
    golden.check_model(runtime.manifest)
    comparisons: list[Comparison] = []
    for graph, run, inputs, reference in _graph_runs(runtime, golden):
        graph_check = _GraphCheck(runtime.manifest, graph, run, inputs, reference)
        comparisons += graph_check.against_reference(sizes_of(graph))
        comparisons += graph_check.rows_are_independent()
    comparisons += _compare_scores(runtime, golden, sizes_of("scores"))
    return ParityReport(runtime.describe(), golden.origin, tuple(comparisons))


def _sizes_by_name(
    batch_sizes: Sequence[int] | Mapping[str, Sequence[int]] | None,
) -> Callable[[str], Sequence[int] | None]:
    if isinstance(batch_sizes, Mapping):
        return batch_sizes.get
    return lambda _: batch_sizes


def _graph_runs(
    runtime: Runtime, golden: Golden
) -> list[tuple[GraphName, Callable[[Any], Float32Array], Array, Float32Array]]:
    """Each graph with the call that runs it, the reference's inputs to it, and its outputs."""
    runs: list[tuple[GraphName, Callable[[Any], Float32Array], Array, Float32Array]] = []
    if golden.frame_features is None:
        runs.append(("video", runtime.encode_video, golden.frames, golden.video_embeddings))
    else:
        features = golden.frame_features
        frames = golden.frames.reshape(-1, *golden.frames.shape[2:])
        flat_features = features.reshape(-1, features.shape[-1])
        runs.append(("visual", runtime.encode_frames, frames, flat_features))
        runs.append(("temporal", runtime.encode_clips, features, golden.video_embeddings))
    runs.append(("textual", runtime.encode_text, golden.tokens, golden.text_embeddings))
    return runs


class _GraphCheck:
    """Runs one graph on chosen rows of the golden inputs."""

    def __init__(
        self,
        manifest: Manifest,
        graph: GraphName,
        run: Callable[[Any], Float32Array],
        inputs: Array,
        reference: Float32Array,
    ) -> None:
        self._tolerance = tolerance_of(manifest, graph)
        self._context_length = manifest.model.context_length
        self._graph = graph
        self._run = run
        self._inputs = inputs
        self._reference = reference
        # Embeddings have unit norm; features are as large as the model makes them.
        relative = graph == "visual" or manifest.graphs[graph].precision in QUANTIZED_PRECISIONS
        self._scale = float(np.abs(reference).max()) if relative else 1.0

    def against_reference(self, batch_sizes: Sequence[int] | None) -> list[Comparison]:
        sizes = batch_sizes or _default_sizes(len(self._inputs))
        comparisons = []
        for size in sizes:
            rows = _spread_rows(len(self._inputs), size)
            comparisons.append(self._compare_rows(self._graph, rows, self._trimmed(rows)))
        if self._graph == "textual":
            rows = _spread_rows(len(self._inputs), 2)
            padding = self._context_length - self._inputs.shape[1]
            padded = np.pad(self._inputs[rows], ((0, 0), (0, padding)))
            comparisons.append(self._compare_rows("textual, full length", rows, padded))
        return comparisons

    def rows_are_independent(self) -> list[Comparison]:
        """The same row gives the same result, wherever in a batch and beside whatever it is."""
        rows = _spread_rows(len(self._inputs), _ROW_CHECK_SIZE)
        alternating = np.arange(len(rows)) % 2
        try:
            plain = self._run(self._inputs[rows])
            again = self._run(self._inputs[rows[::-1]])[::-1]
            twins = self._run(self._inputs[rows[alternating]])
            alone = np.concatenate([self._run(self._inputs[[row]]) for row in rows])
        except InferenceError as exc:
            return [failed(f"{self._graph}, same rows", len(rows), str(exc))]
        limit, cosine = self._tolerance.row * self._scale, self._tolerance.min_cosine
        return [
            compare(f"{self._graph}, reordered rows", again, plain, limit, cosine),
            compare(f"{self._graph}, repeated rows", twins, twins[alternating], limit, cosine),
            compare(f"{self._graph}, rows by themselves", alone, plain, limit, cosine),
        ]

    def _compare_rows(self, what: str, rows: NDArray[np.int64], inputs: Array) -> Comparison:
        try:
            output = self._run(inputs)
        except InferenceError as exc:
            return failed(what, len(rows), str(exc))
        limit, cosine = self._tolerance.difference * self._scale, self._tolerance.min_cosine
        return compare(what, output, self._reference[rows], limit, cosine)

    def _trimmed(self, rows: NDArray[np.int64]) -> Array:
        """Inputs of these rows; prompts without the columns that are padding in all of them."""
        inputs: Array = self._inputs[rows]
        if self._graph != "textual":
            return inputs
        return inputs[:, : int(np.nonzero(inputs.any(axis=0))[0].max()) + 1]


def _compare_scores(
    runtime: Runtime, golden: Golden, batch_sizes: Sequence[int] | None
) -> list[Comparison]:
    manifest = runtime.manifest
    # The graph of the lowest precision decides how far scores may be.
    limit = max(tolerance_of(manifest, graph).score for graph in manifest.graphs)
    comparisons = []
    try:
        text_embeddings = runtime.encode_text(golden.tokens)
    except InferenceError as exc:
        return [failed("scores", len(golden.frames), str(exc))]
    for size in batch_sizes or _default_sizes(len(golden.frames)):
        rows = _spread_rows(len(golden.frames), size)
        try:
            video_embeddings = runtime.encode_video(golden.frames[rows])
            scores = golden_scores(manifest, video_embeddings, text_embeddings)
        except InferenceError as exc:
            comparisons.append(failed("scores", size, str(exc)))
            continue
        comparisons.append(compare("scores", scores, golden.scores[rows], limit, labels=True))
    return comparisons


def _default_sizes(num_rows: int) -> tuple[int, ...]:
    return tuple(sorted({1, 2, 3, num_rows, num_rows + 1}))


def _spread_rows(num_rows: int, size: int) -> NDArray[np.int64]:
    """`size` rows spread evenly; from the first again where there are fewer."""
    if size >= num_rows:
        return np.arange(size) % num_rows
    return np.linspace(0, num_rows - 1, size).astype(np.int64)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
