"""Scores -> "unknown": a temperature and a threshold, fitted on held-out videos.

A model ranks the labels that it is given, also for a video that shows none of them. The scores of
a bank are made comparable between videos by a temperature T, which leaves their order alone,

    calibrated(c) = score(c)^(1/T) / sum over labels of score^(1/T)

and a video whose best calibrated score is below a threshold is "unknown".

A query that was saved from an archive is read otherwise, by `SavedQuery`: how far a window stands
above all windows of that archive.

Letters: N videos, C labels. Scores are rows that sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError, ShapeError
from actionclip_deploy.manifest import ScoreMethod

FloatArray: TypeAlias = NDArray[np.floating[Any]]
Float64Array: TypeAlias = NDArray[np.float64]

# The id of a video that shows none of the labels.
UNKNOWN = -1

# Videos that are all right would drive the temperature to 0, and scores to 0 and 1.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0

_NUM_BINS = 15  # of the expected calibration error, as Guo et al. 2017 take
_NUM_HALVINGS = 60
_SUM_TOLERANCE = 1e-3
_COUNTS = (("num_known", 10**12), ("num_unknown", 10**12))  # and the most that they can be


@dataclass(frozen=True)
class Calibration:
    """How the scores of a label bank are read, and what that gave on the videos of the fit.

    Attributes:
        temperature: T; above 1 it brings scores closer together.
        threshold: A video whose best calibrated score is below it is unknown.
        method: The method of scoring that it is for.
        views: Clips x crops of each video of the fit, such as "1x1".
        visual_sha256: `Bundle.visual_sha256` of the bundle whose scores were fitted.
        target_kept: Share of the known videos that were to be kept.
        kept_known: Share of the known videos whose best score is not below the threshold.
        rejected_unknown: Share of the unknown videos below it; None without such videos.
        num_known: Videos that show one of the labels.
        num_unknown: Videos that show none of them.
        error_before: Expected calibration error of the scores of the known videos, 0 to 1.
        error_after: The same of the calibrated scores.
    """

    temperature: float
    threshold: float
    method: ScoreMethod
    views: str
    visual_sha256: str
    target_kept: float
    kept_known: float
    rejected_unknown: float | None
    num_known: int
    num_unknown: int
    error_before: float
    error_after: float

    def __post_init__(self) -> None:
        """Check what scores are read by.

        Raises:
            ValueError: If the temperature or the threshold is not one that scores can have.
        """
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ArgumentError(
                "temperature",
                f"is {self.temperature}; it must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}.",
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise ArgumentError("threshold", f"is {self.threshold}; it must be from 0 to 1.")
        shares = ("target_kept", "kept_known", "rejected_unknown", "error_before", "error_after")
        for name, high in (*((name, 1) for name in shares), *_COUNTS):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise ValueError(f"{name} is {value:g}; it must be from 0 to {high}.")
        _check_method(self.method)


@dataclass(frozen=True)
class Answer:
    """The one label of a video, or that it shows none of them.

    Attributes:
        label: The best label; None where its score is below the threshold.
        score: The best calibrated score, in [0, 1].
        threshold: What it is compared with.
    """

    label: str | None
    score: float
    threshold: float

    @property
    def is_unknown(self) -> bool:
        """Whether the video shows none of the labels."""
        return self.label is None


@dataclass(frozen=True)
class SavedQuery:
    """How the bank of a query is read that was saved from a search of an archive.

    The first label of the bank is looked for. The others are what must not be shown, and are never
    told of: a window that is nearer to one of them than to the first shows nothing.

    Attributes:
        mean: Of the cosines of the first label and all windows of the archive.
        std: Their standard deviation.
        threshold_z: From how many standard deviations above the mean on a window shows the query.
        num_accepted: Moments that were accepted, by which the threshold was chosen; 0 for a guess.
        num_rejected: Moments that were not, though they ranked before an accepted one.
        num_windows: Of the archive.
        window_seconds: Their length.
        stride_seconds: From the start of a window to that of the next.
        visual_sha256: `Bundle.visual_sha256` of the bundle that made them.
    """

    mean: float
    std: float
    threshold_z: float
    num_accepted: int
    num_rejected: int
    num_windows: int
    window_seconds: float
    stride_seconds: float
    visual_sha256: str

    def __post_init__(self) -> None:
        """Check what scores are read by.

        Raises:
            ValueError: If a number is not one that an archive can have.
        """
        if not (-1.0 <= self.mean <= 1.0 and 0.0 < self.std <= 1.0):
            raise ValueError(f"The cosines' mean and deviation are {self.mean} and {self.std}.")
        if not (math.isfinite(self.threshold_z) and self.threshold_z > 0):
            raise ArgumentError(
                "threshold_z", f"is {self.threshold_z}; it must be a positive number."
            )
        for name in ("window_seconds", "stride_seconds"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("num_accepted", "num_rejected", "num_windows"):
            if not 0 <= getattr(self, name) <= 10**12:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")

    @property
    def threshold_cosine(self) -> float:
        """The cosine at which a window shows the query."""
        return self.mean + self.threshold_z * self.std

    def scores(self, cosines: FloatArray) -> Float64Array:
        """Scores from 0 to 1 of whether windows show the query; from 0.5 on they do.

        z / (z + threshold), where z is how many standard deviations the first label's cosine lies
        above the mean; 0 below it, and where another label is nearer. So a score of 0.8 times
        0.5, at which an event closes, is two thirds of the threshold's z.

        Args:
            cosines: Of N windows and the labels, shape (N, C); those of no window are NaN.

        Returns:
            float64, shape (N,); NaN for no window.
        """
        z = np.maximum((cosines[:, 0].astype(np.float64) - self.mean) / self.std, 0.0)
        if cosines.shape[1] > 1:
            z = np.where(cosines[:, 1:].max(axis=1) >= cosines[:, 0], 0.0, z)
        shares: Float64Array = z / (z + self.threshold_z)
        return shares


# Of scores of a saved query.
QUERY_THRESHOLD = 0.5
# For a query that is saved without accepted moments. Chosen, and not measured on recordings.
DEFAULT_QUERY_Z = 4.0
# Share of an archive's windows that a threshold leaves below itself, whatever was accepted.
_BACKGROUND_SHARE = 0.99


def query_threshold(accepted: FloatArray, rejected: FloatArray, others: FloatArray) -> float:
    """Choose from which z on a saved query is told of, by moments that somebody looked at.

    It lies halfway between the lowest accepted moment and the highest of what is to stay below it:
    the 99th percentile of the windows of the archive that are no part of an accepted moment, and
    those rejected moments that are lower than all accepted ones. So all accepted moments are told
    of; a rejected one that is higher than one of them is, too.

    Args:
        accepted: z of the best window of each accepted moment, one at least.
        rejected: z of those that were passed over.
        others: z of all other windows.

    Raises:
        ValueError: If an accepted moment does not stand out, so that every other window would be
            told of.
    """
    lowest = float(accepted.min())
    if not lowest > 0:
        raise ArgumentError(
            "accepted",
            f"holds a moment whose z is {lowest:.1f}: it is no nearer to the text than the mean of "
            "all windows; leave it out, or look for it in other words.",
        )
    below = max(0.0, float(np.quantile(others, _BACKGROUND_SHARE)) if len(others) else 0.0)
    below = max([below, *(float(each) for each in rejected if each < lowest)])
    return (lowest + min(below, lowest)) / 2


def calibrated_scores(scores: FloatArray, temperature: float) -> Float64Array:
    """Bring scores closer together (T above 1) or further apart, in the same order.

    Args:
        scores: Shape (N, C); rows sum to 1.
        temperature: T, positive.

    Returns:
        float64, shape (N, C); rows sum to 1.

    Raises:
        ShapeError: If the scores are not such an array.
        ValueError: If the temperature is not a positive number.
    """
    _check_scores(scores)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ArgumentError("temperature", f"is {temperature}; it must be a positive number.")
    return _softmax(_logs(scores) / temperature)


def calibrate(
    scores: FloatArray,
    label_ids: NDArray[np.int64],
    *,
    method: ScoreMethod,
    views: str,
    visual_sha256: str,
    target_kept: float = 0.95,
) -> Calibration:
    """Fit a temperature and a threshold on videos that the model was not trained with.

    The temperature has the smallest negative log likelihood of the known videos' labels. The
    threshold is the largest that keeps `target_kept` of the known videos, whether their best label
    is right or not: no other rejects more of the unknown ones. It lies halfway to the next lower
    score, so that another runtime's rounding does not move a video across it.

    Args:
        scores: Of N videos, shape (N, C); rows sum to 1.
        label_ids: What each shows, int64, shape (N,); UNKNOWN for none of the labels.
        method: How the scores were made, which is kept with the fit.
        views: Clips x crops, likewise.
        visual_sha256: `Bundle.visual_sha256`, likewise.
        target_kept: Share of the known videos that are to be kept, above 0 and at most 1.

    Raises:
        ShapeError: If scores and ids do not fit each other.
        ValueError: If no video is known, there are fewer than two labels, or the method or the
            share is not allowed.

    Source:
        Guo et al. 2017, On Calibration of Modern Neural Networks, sections 2 and 4.2.
    """
    _check_method(method)
    _check_scores(scores)
    num_labels = scores.shape[1]
    _check_ids(label_ids, scores)
    if num_labels < 2:
        raise ValueError(
            "The label bank has one label, whose score is always 1; give a bank of two or more."
        )
    if not 0.0 < target_kept <= 1.0:
        raise ArgumentError("target_kept", f"is {target_kept}; it must be above 0 and at most 1.")
    is_known = label_ids != UNKNOWN
    if not is_known.any():
        raise ValueError(
            "None of the videos shows a label of the bank; give some that do, to fit to."
        )
    known, ids = scores[is_known], label_ids[is_known]
    temperature = _fit_temperature(known, ids)
    best = calibrated_scores(scores, temperature).max(axis=1)
    threshold = _fit_threshold(best, is_known, target_kept, lowest=1.0 / num_labels)
    kept = best >= threshold
    num_unknown = int((~is_known).sum())
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        method=method,
        views=views,
        visual_sha256=visual_sha256,
        target_kept=target_kept,
        kept_known=float(kept[is_known].mean()),
        rejected_unknown=float((~kept[~is_known]).mean()) if num_unknown else None,
        num_known=len(known),
        num_unknown=num_unknown,
        error_before=expected_calibration_error(known, ids),
        error_after=expected_calibration_error(calibrated_scores(known, temperature), ids),
    )


def expected_calibration_error(scores: FloatArray, label_ids: NDArray[np.int64]) -> float:
    """How far the best scores are from the share of videos that they are right for.

    The mean over 15 bins of equal width of |mean best score - share that is right|, weighted by
    the videos in them.

    Args:
        scores: Shape (N, C); rows sum to 1.
        label_ids: The right labels, int64, shape (N,).

    Returns:
        From 0 to 1.

    Raises:
        ShapeError: If they do not fit each other.

    Source:
        Guo et al. 2017, equation 3, with 15 bins.
    """
    _check_scores(scores)
    _check_ids(label_ids, scores)
    best = scores.max(axis=1).astype(np.float64)
    is_right = scores.argmax(axis=1) == label_ids
    # Bins are open at their lower end, as the paper has them: a score of 1 is in the last.
    bins = np.clip(np.ceil(best * _NUM_BINS) - 1, 0, _NUM_BINS - 1).astype(np.int64)
    gaps = np.bincount(bins, weights=best - is_right, minlength=_NUM_BINS)
    return float(np.abs(gaps).sum() / len(best))


def _fit_temperature(scores: FloatArray, label_ids: NDArray[np.int64]) -> float:
    """Bisection on 1/T, in which the negative log likelihood is convex."""
    logs = _logs(scores)
    right = logs[np.arange(len(logs)), label_ids]

    def slope(inverse: float) -> float:
        return float(((_softmax(logs * inverse) * logs).sum(axis=1) - right).mean())

    low, high = 1.0 / MAX_TEMPERATURE, 1.0 / MIN_TEMPERATURE
    if slope(high) <= 0:
        return MIN_TEMPERATURE
    if slope(low) >= 0:
        return MAX_TEMPERATURE
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def _fit_threshold(
    best: Float64Array, is_known: NDArray[np.bool_], target_kept: float, *, lowest: float
) -> float:
    known = np.sort(best[is_known])[::-1]
    # A share such as 0.95 of 20 is 19, not 20 for the last bit of the product.
    num_kept = max(1, math.ceil(target_kept * len(known) - 1e-9))
    last_kept = float(known[num_kept - 1])
    below = float(best[best < last_kept].max(initial=min(lowest, last_kept)))
    return (last_kept + below) / 2


def _logs(scores: FloatArray) -> Float64Array:
    """Logarithms; a score that underflowed to 0 counts as the smallest float32."""
    logs: Float64Array = np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float32).tiny))
    return logs


def _softmax(logits: Float64Array) -> Float64Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Float64Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares


def _check_method(method: str) -> None:
    if method not in ("template-softmax", "mean-embedding"):
        raise ArgumentError(
            "method",
            f"is {method!r}, whose scores cannot be calibrated; "
            "choose template-softmax or mean-embedding, whose scores of a video sum to 1.",
        )


def _check_scores(scores: FloatArray) -> None:
    if scores.ndim != 2 or 0 in scores.shape or not np.issubdtype(scores.dtype, np.floating):
        raise ShapeError(
            f"scores has shape {scores.shape} and dtype {scores.dtype}; expected floating-point "
            "numbers of shape (N, C), none of its sizes zero."
        )
    if not (np.abs(scores.sum(axis=1) - 1.0) <= _SUM_TOLERANCE).all():  # written so that NaN fails
        raise ShapeError(
            "scores has rows that do not sum to 1; give those of template-softmax or "
            "mean-embedding."
        )


def _check_ids(label_ids: NDArray[np.int64], scores: FloatArray) -> None:
    num_videos, num_labels = scores.shape
    if label_ids.shape != (num_videos,) or label_ids.dtype != np.int64:
        raise ShapeError(
            f"label_ids has shape {label_ids.shape} and dtype {label_ids.dtype}; expected "
            f"({num_videos},) and int64, one for each row of scores."
        )
    if label_ids.min() < UNKNOWN or label_ids.max() >= num_labels:
        raise ShapeError(
            f"label_ids holds {label_ids.min()} to {label_ids.max()}; expected ids from 0 to "
            f"{num_labels - 1}, or {UNKNOWN} for none of the labels."
        )
