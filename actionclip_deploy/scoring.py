"""Embeddings -> scores: the original's way, two others, averages over views, and the best k.

The three methods, by the names under which a manifest and the command line know them:

- `template-softmax`, the original's: softmax over labels for each template, then the mean over
  templates.
- `mean-embedding`: one embedding for each label, the mean of its templates', then one softmax. It
  gives other probabilities than the original and is offered because others report it.
- `independent`: each label by itself, for videos that show several actions or none of the labels.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError, InferenceError, ShapeError
from actionclip_deploy.manifest import ScoreMethod

FloatArray: TypeAlias = NDArray[np.floating[Any]]
Float32Array: TypeAlias = NDArray[np.float32]

SCORE_METHODS: tuple[ScoreMethod, ...] = get_args(ScoreMethod)


def score_clips(
    video_embeddings: FloatArray, label_embeddings: FloatArray, *, scale: float = 100.0
) -> Float32Array:
    """Turn clip and label embeddings into class probabilities, as the original does.

    The softmax over labels is taken for each template and then averaged over templates; averaging
    the label embeddings first gives different numbers (`score_mean_embedding`).

    Args:
        video_embeddings: Unit-norm embeddings of clips, shape (B, D).
        label_embeddings: Unit-norm embeddings, shape (K, C, D).
        scale: Multiplier of the cosine, dimensionless. The original uses 100 at test time,
            whatever its training has made of CLIP's own `logit_scale`.

    Returns:
        Probabilities, shape (B, C), float32; each row sums to 1.

    Raises:
        ShapeError: If the two do not share D, or have another number of dimensions or dtype.
        InferenceError: If an embedding is not finite.
        ValueError: If the scale is not a positive number.

    Source:
        sallymmx/ActionCLIP@31c34df test.py, validate.
    """
    _check_scale(scale)
    cosines = _cosines(video_embeddings, label_embeddings)
    scores: Float32Array = _softmax(scale * cosines).mean(axis=1).astype(np.float32)
    return scores


def score_mean_embedding(
    video_embeddings: FloatArray, label_embeddings: FloatArray, *, scale: float = 100.0
) -> Float32Array:
    """Turn embeddings into probabilities with one averaged embedding for each label.

    The mean over templates is brought back to unit norm before the cosine is taken. This is what
    CLIP does for images; ActionCLIP's published numbers were not made this way. Arguments, result
    and errors are those of `score_clips`.
    """
    _check_scale(scale)
    _check_pair(video_embeddings, label_embeddings)
    cosines = _cosines(video_embeddings, mean_embedding(label_embeddings))
    return _softmax(scale * cosines)[:, 0].astype(np.float32)


def mean_embedding(label_embeddings: FloatArray) -> Float32Array:
    """The unit-norm mean over templates, float32, shape (1, C, D), for (K, C, D)."""
    mean = label_embeddings.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(mean, axis=-1, keepdims=True)
    # Templates that cancel out leave no direction: the cosine with them is 0.
    mean = np.divide(mean, norms, out=np.zeros_like(mean), where=norms > 0)
    averaged: Float32Array = mean[None].astype(np.float32)
    return averaged


def score_independent(video_embeddings: FloatArray, label_embeddings: FloatArray) -> Float32Array:
    """Score each label by itself, for videos with several labels or none.

    The score is (1 + cosine) / 2, averaged over templates. The model was trained to rank labels
    against each other, so this ranks labels and videos (as mean average precision asks for) and is
    no probability: unrelated labels stay near the middle, rows do not sum to 1, and a threshold
    has to be found on labelled videos. Rows rank labels as their mean cosine does. Arguments and
    errors are those of `score_clips`.

    Returns:
        Scores from 0 to 1 inclusive, shape (B, C), float32.
    """
    mean = _cosines(video_embeddings, label_embeddings).mean(axis=1)
    # Rounding can bring the cosine of two equal vectors above 1.
    scores: Float32Array = np.clip((1.0 + mean) / 2.0, 0.0, 1.0).astype(np.float32)
    return scores


def score(
    method: str,
    video_embeddings: FloatArray,
    label_embeddings: FloatArray,
    *,
    scale: float = 100.0,
) -> Float32Array:
    """Score clips by the method of a name, one of `SCORE_METHODS`; (B, D), (K, C, D) -> (B, C).

    Arguments and errors are those of `score_clips`; "independent" has no use for the scale.

    Raises:
        ValueError: If the method is unknown.
    """
    if method == "template-softmax":
        return score_clips(video_embeddings, label_embeddings, scale=scale)
    if method == "mean-embedding":
        return score_mean_embedding(video_embeddings, label_embeddings, scale=scale)
    if method == "independent":
        return score_independent(video_embeddings, label_embeddings)
    raise ArgumentError("method", f"is {method!r}; expected one of {', '.join(SCORE_METHODS)}.")


def average_views(scores: FloatArray) -> Float32Array:
    """Average the scores of a video's views.

    Scores are averaged, not embeddings: the paper averages "similarity scores of all views".

    Args:
        scores: Scores of V views of each of B videos, shape (B, V, C).

    Returns:
        Mean over the views, shape (B, C), float32; rows that sum to 1 still do.

    Raises:
        ShapeError: If the scores have another number of dimensions or dtype, or none.

    Source:
        arXiv 2109.08472, table 8; the authors' code has no views.
    """
    _check_array("scores", scores, "BVC")
    mean: Float32Array = scores.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean


def top_k(scores: FloatArray, k: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Pick the labels with the highest scores.

    Args:
        scores: Scores, shape (B, C).
        k: How many, 1 or more; more than C gives C.

    Returns:
        Indices of labels, int64, shape (B, k), from the highest score down, the lower index first
        among equal scores; and their scores, shape (B, k), with the dtype given.

    Raises:
        ShapeError: If the scores have another number of dimensions or dtype, or none.
        ValueError: If k is below 1.
    """
    _check_array("scores", scores, "BC")
    if k < 1:
        raise ArgumentError("k", f"is {k}; expected 1 or more.")
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
    return indices, np.take_along_axis(scores, indices, axis=1)


def _cosines(video_embeddings: FloatArray, label_embeddings: FloatArray) -> NDArray[np.float64]:
    """(B, D) and (K, C, D) -> (B, K, C)."""
    _check_pair(video_embeddings, label_embeddings)
    num_templates, num_labels, width = label_embeddings.shape
    videos = np.asarray(video_embeddings, np.float32)
    labels = np.asarray(label_embeddings, np.float32).reshape(-1, width)
    # One product in float32, where the large factor need not be copied to be widened; what
    # follows it is small and in float64, so that the scale does not amplify its rounding.
    # Not by BLAS: the threads of OpenBLAS go on spinning for some 20 ms after each product, on
    # the cores that read the next videos, which cost a tenth of the throughput of a folder.
    with np.errstate(invalid="ignore", over="ignore"):  # an error says it below
        cosines = np.einsum("bd,md->bm", videos, labels).astype(np.float64)
    if not np.isfinite(cosines).all():
        raise InferenceError(
            "The embeddings hold values that are not finite; expected vectors of unit norm: check "
            "the runtime that made them with `actionclip verify`."
        )
    product: NDArray[np.float64] = cosines.reshape(-1, num_templates, num_labels)
    return product


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the last axis; the maximum is taken off first, so that nothing overflows."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ArgumentError(
            "scale", f"is {scale}; expected a positive number, such as the manifest's."
        )


def _check_pair(video_embeddings: FloatArray, label_embeddings: FloatArray) -> None:
    _check_array("video_embeddings", video_embeddings, "BD")
    _check_array("label_embeddings", label_embeddings, "KCD")
    if video_embeddings.shape[-1] != label_embeddings.shape[-1]:
        raise ShapeError(
            f"video_embeddings has width {video_embeddings.shape[-1]} and label_embeddings "
            f"{label_embeddings.shape[-1]}; expected the same: use a label bank of the bundle that "
            "made the video embeddings."
        )


def _check_array(name: str, array: object, letters: str) -> None:
    wanted = f"a floating-point array of shape ({', '.join(letters)}), none of its sizes zero"
    if not isinstance(array, np.ndarray):
        raise ShapeError(f"{name} is a {type(array).__name__}; expected {wanted}.")
    if (
        array.ndim != len(letters)
        or 0 in array.shape
        or not np.issubdtype(array.dtype, np.floating)
    ):
        raise ShapeError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; expected {wanted}."
        )
