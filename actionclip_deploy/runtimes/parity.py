"""Parity: does a runtime compute what PyTorch computed?

Every graph is run by itself on the reference's own inputs, at several batch sizes, and then the
whole way from frames and tokens to scores. What a runtime may get wrong without an error shows in
one of these: a batch size that was fixed at export, rows that leak into each other, a precision
that is not the one asked for, a kernel that is wrong for some shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.command_records import (
    AuditedParityRecord,
    ComparisonRecord,
    ParityRecord,
)
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    InferenceError,
    IntegrityError,
    ParityError,
    ShapeError,
)
from actionclip_deploy.files import write_bytes, write_json
from actionclip_deploy.manifest import (
    QUANTIZED_PRECISIONS,
    GraphName,
    Manifest,
    TensorSpec,
)
from actionclip_deploy.runtimes.base import (
    Array,
    Audit,
    Float32Array,
    ProductPrecision,
    Runtime,
    RuntimeInfo,
)
from actionclip_deploy.scoring import score

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


def verify_bundle(
    bundle: Bundle, runtime: Runtime, *, on_step: Callable[[str], None] | None = None
) -> ParityReport:
    """Compare a runtime with the golden data of its bundle.

    Args:
        bundle: The bundle.
        runtime: An open runtime of it.
        on_step: Called with a few words when a step begins.

    Raises:
        BundleError: If the bundle has no golden data.
        IntegrityError: If it cannot be read or is not of this bundle's model.
    """
    return verify(runtime, Golden.load(bundle), on_step=on_step)


def verify(
    runtime: Runtime,
    golden: Golden,
    *,
    batch_sizes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a runtime with golden data: each graph, then the whole way.

    Args:
        runtime: An open runtime of the same model.
        golden: What the reference gave.
        batch_sizes: Rows of the calls, the same for all graphs or by the name of the graph, with
            `scores` for the whole way; None, and a graph that is not named, takes 1, 2, 3, all
            rows, and one more than all.
        on_step: See `verify_bundle`.

    Raises:
        ShapeError: If the golden data is of another model.
        ValueError: If a batch size is below 1.
    """
    given = batch_sizes.values() if isinstance(batch_sizes, Mapping) else [batch_sizes]
    if any(sizes is not None and min(sizes, default=0) < 1 for sizes in given):
        raise ArgumentError(
            "batch_sizes", f"is {batch_sizes!r}; each must be 1 or more, and one given."
        )
    sizes_of = batch_sizes.get if isinstance(batch_sizes, Mapping) else lambda _: batch_sizes
    golden.check_model(runtime.manifest)
    tell = on_step or (lambda _: None)
    comparisons: list[Comparison] = []
    for graph, run, inputs, reference in _graph_runs(runtime, golden):
        tell(f"Comparing the graph {graph} with the golden outputs")
        graph_check = _GraphCheck(runtime, graph, run, inputs, reference)
        comparisons += graph_check.against_reference(sizes_of(graph))
        comparisons += graph_check.rows_are_independent()
    tell("Comparing scores with the golden outputs")
    comparisons += _compare_scores(runtime, golden, sizes_of("scores"))
    return ParityReport(
        runtime.describe(), golden.origin, tuple(comparisons), audits=runtime.audit()
    )


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one runtime with the reference.

    Attributes:
        runtime: What ran.
        origin: Where the frames of the golden data came from.
        comparisons: In the order in which they ran.
        audits: What the graphs are computed in, of runtimes that tell.
    """

    runtime: RuntimeInfo
    origin: str
    comparisons: tuple[Comparison, ...]
    audits: Mapping[GraphName, Audit] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every comparison agrees, and each graph is computed in what was asked for."""
        agrees = bool(self.comparisons) and all(c.passed for c in self.comparisons)
        return agrees and not any(audit.why_refused() for audit in self.audits.values())

    def record(self) -> ParityRecord:
        """The report as it leaves the program; numbers that are not finite are null."""
        record = ParityRecord(
            passed=self.passed,
            runtime=self.runtime,
            golden_origin=self.origin,
            comparisons=tuple(map(ComparisonRecord.model_validate, self.comparisons)),
        )
        if not self.audits:
            return record
        audit = {str(graph): found.record() for graph, found in self.audits.items()}
        return AuditedParityRecord(**dict(record), audit=audit)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.record().to_dict()

    def check(self) -> None:
        """Do nothing if every comparison agrees.

        Raises:
            ParityError: If one does not: which graph, at which batch size, by how much; or if a
                graph is computed in another precision than was asked for.
        """
        if self.passed:
            return
        failed = [c for c in self.comparisons if not c.passed]
        ran = self.runtime.title
        if not self.comparisons:
            raise ParityError(f"Nothing of {ran} was compared with PyTorch; export again.", self)
        for graph, audit in self.audits.items():
            if why := audit.why_refused():
                raise ParityError(f"{graph}: {why}", self)
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
        if self.runtime.precision == "bf16":
            return "run it with --precision fp32"
        return "export the bundle with --precision fp32"


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
        runtime: Runtime,
        graph: GraphName,
        run: Callable[[Any], Float32Array],
        inputs: Array,
        reference: Float32Array,
    ) -> None:
        manifest = runtime.manifest
        self._tolerance = tolerance_of(manifest, graph, computed=runtime.precision_of(graph))
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
    limit = max(
        tolerance_of(manifest, graph, computed=runtime.precision_of(graph)).score
        for graph in manifest.graphs
    )
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


# One output beside what it should be, and how far it may be from it

_TOP_K = 5


@dataclass(frozen=True)
class Tolerance:
    """How far the outputs of a graph may be from the reference's.

    Attributes:
        difference: Largest absolute difference of an embedding's value; for frame features, which
            have no unit norm, and in int8 and fp8, relative to the largest absolute value of
            the reference.
        min_cosine: Smallest cosine between a row and the reference's.
        score: Largest absolute difference of a score. Two labels whose reference scores are
            closer than this may change places: which of them is first is then decided by
            rounding, and with random weights that is common.
        row: As `difference`, between two results of the runtime for the same row.
    """

    difference: float
    min_cosine: float
    score: float
    row: float

    def or_wider(self, other: Tolerance) -> Tolerance:
        """What the one or the other allows."""
        return Tolerance(
            difference=max(self.difference, other.difference),
            min_cosine=min(self.min_cosine, other.min_cosine),
            score=max(self.score, other.score),
            row=max(self.row, other.row),
        )


# fp32: kernels sum in another order than PyTorch; ViT-B differs by 2e-6 of its features on CPUs.
# A score moves by at most half of 100 times the cosine's error, so 1e-4 allows 2e-6 there, ten
# times what CPUs show. A row may be summed in other blocks at another place of the batch.
# fp16: 11 bits of mantissa. A cosine of 0.9999 is a difference vector of length 0.014, which also
# bounds each value of an embedding; what it moves a score by is seen at 100 times that, spread
# over the width, hence 0.05. A row's result may differ by some roundings of 5e-4.
# bf16: 8 bits of mantissa, so roundings eight times those of fp16: a ViT-B/32 has a cosine of
# 0.99994, a difference vector of 0.011. 0.999 is one of 0.045, within which the model answers as
# in int8 below, and as much moves a score. A row that is summed in other blocks rounds to the
# other neighbour now and then, which the layers after it carry on.
# int8: how far a good graph is from PyTorch depends on the weights, so the export measures it and
# `tolerance_of` starts from that; these are what no int8 graph has to be better than. A cosine of
# 0.999, the bound of an export without accuracy, is a difference vector of 0.045; 100 times that
# along the difference of two labels moves a score by a quarter at most of it, hence 0.25 with the
# ways that are not the worst. Rows: see `tolerance_of`.
# fp8: as int8. Its bound of 0.99 is a difference vector of 0.14, three times as long; scores of
# the default model moved by 0.02.
TOLERANCES: dict[ProductPrecision, Tolerance] = {
    "fp32": Tolerance(difference=1e-4, min_cosine=0.99999, score=1e-4, row=1e-5),
    "fp16": Tolerance(difference=2e-2, min_cosine=0.9999, score=5e-2, row=5e-3),
    "bf16": Tolerance(difference=5e-2, min_cosine=0.999, score=0.25, row=2e-2),
    "int8": Tolerance(difference=2e-2, min_cosine=0.9999, score=0.25, row=2e-2),
    "fp8": Tolerance(difference=2e-2, min_cosine=0.9999, score=0.5, row=2e-2),
}

# How much further than at its export a quantised graph may be from PyTorch elsewhere. Measured on a
# ViT-B/32: on a CPU without VNNI the distance 1 - cosine of `reduced` weights is 0.98 of that with
# VNNI, as other sums round otherwise; that of `full` weights is 360 times as large, as sums
# saturate there. No GPU was at hand for fp8: a graph whose other products are fp32 instead of
# fp16, and so round elsewhere, is 1.4 times as far.
QUANTIZED_MARGIN = 2.0


def tolerance_of(
    manifest: Manifest, graph: GraphName, *, computed: ProductPrecision | None = None
) -> Tolerance:
    """How far the outputs of a graph of this bundle may be from the reference's.

    For an int8 or fp8 graph all differences are relative to the largest absolute value of the
    reference, and two results for the same row may be as far apart as from the reference: the
    dynamic recipe scales all rows of a call together, so a row depends a little on the others.

    Args:
        manifest: Of the bundle.
        graph: The graph.
        computed: What it is computed in, where that is not its own precision. Its weights are
            rounded to that one all the same.
    """
    own = _own_tolerance(manifest, graph)
    return own if computed is None else own.or_wider(TOLERANCES[computed])


def _own_tolerance(manifest: Manifest, graph: GraphName) -> Tolerance:
    tolerance, spec = TOLERANCES[manifest.graphs[graph].precision], manifest.quantization
    if manifest.graphs[graph].precision not in QUANTIZED_PRECISIONS or spec is None:
        return tolerance
    difference = max(tolerance.difference, QUANTIZED_MARGIN * spec.golden_max_difference)
    cosine = 1 - QUANTIZED_MARGIN * (1 - spec.golden_min_cosine)
    return Tolerance(
        difference=difference,
        # Down to 7 decimals, which is what reports print.
        min_cosine=min(tolerance.min_cosine, math.floor(cosine * 1e7) / 1e7),
        score=tolerance.score,
        row=difference,
    )


@dataclass(frozen=True)
class Comparison:
    """One run of a runtime beside what it should have given.

    Attributes:
        what: The graph and, where it is not plain parity, what is checked; or `scores`.
        batch_size: Rows in the call: frames, clips or prompts.
        max_abs_difference: Over all values; NaN if the run failed or gave values that are not
            finite.
        min_cosine: Over rows; NaN in the same cases.
        tolerance: What `max_abs_difference` may be.
        cosine_tolerance: What `min_cosine` must be; None where it does not decide.
        top1_agreement: Share of rows whose first label is the reference's, 0 to 1; None where
            there are no labels. A label counts as agreeing where its reference score is within
            the tolerance of the reference's first, because rounding decides between these.
        top5_agreement: In the same way, the mean share of the first five labels that are among
            the reference's first five; it does not decide.
        passed: Whether it agrees.
        error: Why there is nothing to compare; None where there is.
        margin: Where there are labels, the smallest over rows of how far the score of the
            reference's first label is above the next one's: how near a row is to another answer.
            It does not decide.
    """

    what: str
    batch_size: int
    max_abs_difference: float
    min_cosine: float
    tolerance: float
    cosine_tolerance: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    passed: bool
    error: str | None = None
    margin: float | None = None

    def in_words(self) -> str:
        """The measurement beside what was allowed."""
        if self.error is not None:
            return self.error
        words = f"max abs difference {self.max_abs_difference:.2g}, allowed {self.tolerance:.2g}"
        if self.cosine_tolerance is not None:
            words += f"; min cosine {self.min_cosine:.7f}, allowed {self.cosine_tolerance}"
        if self.top1_agreement is not None:
            words += f"; the first label agrees for {self.top1_agreement:.0%} of the clips"
        return words


def failed(what: str, batch_size: int, error: str) -> Comparison:
    """A comparison that could not be made, and why."""
    return Comparison(
        what, batch_size, math.nan, math.nan, math.nan, None, None, None, False, error
    )


def compare(
    what: str,
    output: Float32Array,
    reference: Float32Array,
    tolerance: float,
    min_cosine: float | None = None,
    *,
    labels: bool = False,
) -> Comparison:
    """Compare an output with the reference's, row by row.

    Args:
        what: Goes into the result.
        output: float32, shape (rows, width).
        reference: float32, shape (rows, width).
        tolerance: Largest absolute difference allowed.
        min_cosine: Smallest cosine allowed between two rows; None lets any pass.
        labels: Whether the columns are labels, of which the first has to agree.
    """
    size = len(reference)
    if output.shape != reference.shape:
        words = f"the output has shape {output.shape}, expected {reference.shape}"
        return failed(what, size, words)
    num_bad = int(np.count_nonzero(~np.isfinite(output)))
    if num_bad:
        return failed(what, size, f"{num_bad} of {output.size} values are NaN or infinite")
    difference = float(np.abs(output.astype(np.float64) - reference).max())
    cosine = _min_cosine(output, reference)
    top1, top5 = (_agreement(output, reference, k, tolerance) for k in (1, _TOP_K))
    passed = difference <= tolerance and (min_cosine is None or cosine >= min_cosine)
    return Comparison(
        what=what,
        batch_size=size,
        max_abs_difference=difference,
        min_cosine=cosine,
        tolerance=tolerance,
        cosine_tolerance=min_cosine,
        top1_agreement=top1 if labels else None,
        top5_agreement=top5 if labels else None,
        passed=passed and (not labels or top1 == 1.0),
        margin=_margin(output, reference) if labels else None,
    )


def _margin(scores: Float32Array, reference: Float32Array) -> float | None:
    """The smallest lead of the reference's first label in the scores; None with a single label."""
    if scores.shape[1] < 2:
        return None
    first = reference.argmax(axis=1)[:, None]
    others = np.array(scores)
    np.put_along_axis(others, first, -np.inf, axis=1)
    return float((np.take_along_axis(scores, first, axis=1)[:, 0] - others.max(axis=1)).min())


def _min_cosine(output: Float32Array, reference: Float32Array) -> float:
    a, b = output.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # A row of zeros points nowhere and agrees with nothing.
    cosines = np.divide((a * b).sum(axis=-1), norms, out=np.full(len(a), -1.0), where=norms > 0)
    return float(cosines.min())


def _agreement(scores: Float32Array, reference: Float32Array, k: int, tolerance: float) -> float:
    """Mean share of the first k labels that the reference also puts first, within rounding."""
    k = min(k, scores.shape[1])
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kth_best = -np.sort(-reference, axis=1)[:, k - 1 : k]
    return float((np.take_along_axis(reference, first, axis=1) >= kth_best - tolerance).mean())


# Golden data: inputs, and what PyTorch computed from them, stored in the bundle

GOLDEN_ARRAYS = "golden/golden.safetensors"
GOLDEN_TEXT = "golden/golden.json"


@dataclass(frozen=True, eq=False)
class Golden:
    """Inputs and the reference's outputs at each graph and end to end.

    Letters: B clips of T frames of S x S pixels, M = K x C prompts of L tokens, D the embedding
    width. The K templates are those of the manifest; prompts are template-major.

    Attributes:
        frames: RGB, uint8, shape (B, T, S, S, 3).
        frame_features: Before normalisation, float32, shape (B, T, D); None where the visual
            prompt mixes the frames of a clip and there are none.
        video_embeddings: Unit norm, float32, shape (B, D).
        tokens: int32, shape (M, L).
        text_embeddings: Unit norm, float32, shape (M, D).
        scores: By the manifest's method and scale, float32, shape (B, C).
        labels: The C labels.
        origin: Where the frames came from, in words.
    """

    frames: NDArray[np.uint8]
    frame_features: Float32Array | None
    video_embeddings: Float32Array
    tokens: NDArray[np.int32]
    text_embeddings: Float32Array
    scores: Float32Array
    labels: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        for name, spec in self._specs().items():
            spec.check(getattr(self, name))
        if self.tokens.shape[0] % len(self.labels):
            raise ShapeError(
                f"The golden tokens are {self.tokens.shape[0]} prompts and there are "
                f"{len(self.labels)} labels; expected as many prompts of each label as templates."
            )

    def _specs(self) -> dict[str, TensorSpec]:
        """What each array has to be, given the first one's size of each letter."""
        num_clips, num_frames, size = self.frames.shape[:3]
        num_prompts, num_tokens = self.tokens.shape
        width = self.video_embeddings.shape[-1]
        features = (num_clips, num_frames, width)
        specs = [
            TensorSpec(name="frames", dtype="uint8", shape=(num_clips, num_frames, size, size, 3)),
            TensorSpec(name="frame_features", dtype="float32", shape=features),
            TensorSpec(name="video_embeddings", dtype="float32", shape=(num_clips, width)),
            TensorSpec(name="tokens", dtype="int32", shape=(num_prompts, num_tokens)),
            TensorSpec(name="text_embeddings", dtype="float32", shape=(num_prompts, width)),
            TensorSpec(name="scores", dtype="float32", shape=(num_clips, len(self.labels))),
        ]
        return {spec.name: spec for spec in specs if getattr(self, spec.name) is not None}

    @classmethod
    def from_reference(
        cls,
        reference: Runtime,
        frames: NDArray[np.uint8],
        tokens: NDArray[np.int32],
        labels: Sequence[str],
        *,
        origin: str,
    ) -> Golden:
        """Compute the outputs with a runtime that is trusted, which is `torch`.

        Args:
            reference: The runtime.
            frames: RGB, uint8, shape (B, T, S, S, 3).
            tokens: Of the manifest's templates filled with the labels, template-major, int32,
                shape (K x C, L).
            labels: The C labels.
            origin: Where the frames came from, in words.
        """
        features = None
        if reference.frames_are_independent:
            flat = frames.reshape(-1, *frames.shape[2:])
            features = reference.encode_frames(flat).reshape(*frames.shape[:2], -1)
            video_embeddings = reference.encode_clips(features)
        else:
            video_embeddings = reference.encode_video(frames)
        text_embeddings = reference.encode_text(tokens)
        scores = golden_scores(reference.manifest, video_embeddings, text_embeddings)
        return cls(
            frames, features, video_embeddings, tokens, text_embeddings, scores,
            labels=tuple(labels), origin=origin,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write the golden data into the folder of a bundle that is being made."""
        (folder / GOLDEN_ARRAYS).parent.mkdir(exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in self._specs()}
        # Not save_file, which makes a file that only its owner can read.
        write_bytes(folder / GOLDEN_ARRAYS, save(arrays))
        write_json(folder / GOLDEN_TEXT, {"labels": list(self.labels), "origin": self.origin})

    @classmethod
    def load(cls, bundle: Bundle) -> Golden:
        """Read the golden data of a bundle.

        Raises:
            BundleError: If the bundle has none.
            IntegrityError: If it cannot be read or is not of this bundle's model.
        """
        for name in (GOLDEN_ARRAYS, GOLDEN_TEXT):
            if name not in bundle.manifest.files:
                raise BundleError(
                    f"The bundle {bundle.path} has no {name}, so there is nothing to compare with; "
                    "export it again."
                )
        try:
            arrays = load_file(bundle.file(GOLDEN_ARRAYS))
            text = json.loads(bundle.file(GOLDEN_TEXT).read_text(encoding="utf-8"))
            if not all(isinstance(label, str) for label in [*text["labels"], text["origin"]]):
                raise TypeError(f"{GOLDEN_TEXT} holds labels or an origin that are not text")
            golden = cls(
                frames=arrays["frames"],
                frame_features=arrays.get("frame_features"),
                video_embeddings=arrays["video_embeddings"],
                tokens=arrays["tokens"],
                text_embeddings=arrays["text_embeddings"],
                scores=arrays["scores"],
                labels=tuple(text["labels"]),
                origin=text["origin"],
            )
            golden.check_model(bundle.manifest)
        # KeyError: an array is missing. ValueError: not JSON, or shapes that do not fit together.
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as exc:
            raise IntegrityError(
                f"The golden data of {bundle.path} cannot be used ({exc}); "
                "copy the bundle again or export it again."
            ) from exc
        return golden

    def check_model(self, manifest: Manifest) -> None:
        """Compare the shapes with those of a model.

        Raises:
            ShapeError: If they are of another model.
        """
        model = manifest.model
        size, width = model.input_size, model.embedding_dim
        given = (self.frames.shape[1:3], self.video_embeddings.shape[1], len(self.tokens))
        wanted = ((model.num_frames, size), width, len(manifest.templates) * len(self.labels))
        if given != wanted:
            raise ShapeError(
                f"The golden data has (T, S), D and K x C of {given} and the model {wanted}; "
                "they are of different models."
            )


def golden_scores(
    manifest: Manifest, video_embeddings: Float32Array, text_embeddings: Float32Array
) -> Float32Array:
    """Scores by the manifest's method and scale, float32, shape (B, C).

    Args:
        manifest: Says the method, the scale and K.
        video_embeddings: Shape (B, D).
        text_embeddings: Template-major, shape (K x C, D).

    Raises:
        InferenceError: If an embedding is not finite.
    """
    label_embeddings = text_embeddings.reshape(
        len(manifest.templates), -1, text_embeddings.shape[-1]
    )
    method, scale = manifest.scores.method, manifest.scores.scale
    return score(method, video_embeddings, label_embeddings, scale=scale)
