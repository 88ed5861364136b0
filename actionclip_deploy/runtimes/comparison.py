"""Comparing one output of a runtime with what it should be, and how far it may be from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from actionclip_deploy.manifest import QUANTIZED_PRECISIONS, GraphName, Manifest, Precision
from actionclip_deploy.runtimes.base import Float32Array

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


# fp32: kernels sum in another order than PyTorch; ViT-B differs by 2e-6 of its features on CPUs.
# A score moves by at most half of 100 times the cosine's error, so 1e-4 allows 2e-6 there, ten
# times what CPUs show. A row may be summed in other blocks at another place of the batch.
# fp16: 11 bits of mantissa. A cosine of 0.9999 is a difference vector of length 0.014, which also
# bounds each value of an embedding; what it moves a score by is seen at 100 times that, spread
# over the width, hence 0.05. A row's result may differ by some roundings of 5e-4.
# int8: how far a good graph is from PyTorch depends on the weights, so the export measures it and
# `tolerance_of` starts from that; these are what no int8 graph has to be better than. A cosine of
# 0.999, the bound of an export without accuracy, is a difference vector of 0.045; 100 times that
# along the difference of two labels moves a score by a quarter at most of it, hence 0.25 with the
# ways that are not the worst. Rows: see `tolerance_of`.
# fp8: as int8. Its bound of 0.99 is a difference vector of 0.14, three times as long; scores of
# the default model moved by 0.02.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(difference=1e-4, min_cosine=0.99999, score=1e-4, row=1e-5),
    "fp16": Tolerance(difference=2e-2, min_cosine=0.9999, score=5e-2, row=5e-3),
    "int8": Tolerance(difference=2e-2, min_cosine=0.9999, score=0.25, row=2e-2),
    "fp8": Tolerance(difference=2e-2, min_cosine=0.9999, score=0.5, row=2e-2),
}

# How much further than at its export a quantised graph may be from PyTorch elsewhere. Measured on a
# ViT-B/32: on a CPU without VNNI the distance 1 - cosine of `reduced` weights is 0.98 of that with
# VNNI, as other sums round otherwise; that of `full` weights is 360 times as large, as sums
# saturate there. No GPU was at hand for fp8: a graph whose other products are fp32 instead of
# fp16, and so round elsewhere, is 1.4 times as far.
QUANTIZED_MARGIN = 2.0


def tolerance_of(manifest: Manifest, graph: GraphName) -> Tolerance:
    """How far the outputs of a graph of this bundle may be from the reference's.

    For an int8 or fp8 graph all differences are relative to the largest absolute value of the
    reference, and two results for the same row may be as far apart as from the reference: the
    dynamic recipe scales all rows of a call together, so a row depends a little on the others.
    """
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
