from __future__ import annotations

import math

import numpy as np
import pytest

from actionclip_deploy.errors import InferenceError, ShapeError
from actionclip_deploy.scoring import (
    SCORE_METHODS,
    average_views,
    score,
    score_clips,
    score_independent,
    score_mean_embedding,
    top_k,
)

# One rounding of a cosine to float32, 6e-8, times the scale of 100, on a probability of at most 1.
ROUNDING = 1e-5


def unit_vectors(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(logit) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize(
    ("b", "k", "c", "d"), [(1, 1, 1, 4), (3, 1, 5, 8), (1, 4, 2, 8), (5, 3, 7, 16)]
)
def test_probabilities_are_the_mean_over_templates_of_a_softmax_over_labels(
    b: int, k: int, c: int, d: int
) -> None:
    videos, labels = unit_vectors(b, d), unit_vectors(k, c, d, seed=1)
    scores = score_clips(videos, labels, scale=30.0)
    assert scores.shape == (b, c)
    assert scores.dtype == np.float32
    for i in range(b):
        rows = []
        for template in labels.astype(float):
            cosines = [math.fsum(videos[i].astype(float) * label) for label in template]
            rows.append(softmax([30.0 * cosine for cosine in cosines]))
        for j in range(c):
            assert scores[i, j] == pytest.approx(sum(row[j] for row in rows) / k, abs=ROUNDING)


# Two templates, two labels, in a plane, with a scale of ln 3. Against the video (1, 0), cosines are
# (1, 0) in the first template and (0, -1) in the second: logits differ by ln 3 in both, so each
# softmax is (3/4, 1/4). The mean embeddings point to (1, 1) and (-1, 1): cosines 1/sqrt(2) and
# -1/sqrt(2), whose logits differ by sqrt(2) ln 3.
VIDEO = np.array([[1, 0]], np.float32)
LABELS = np.array([[[1, 0], [0, 1]], [[0, 1], [-1, 0]]], np.float32)


def test_the_softmax_per_template_by_hand() -> None:
    scores = score_clips(VIDEO, LABELS, scale=math.log(3))
    np.testing.assert_allclose(scores, [[3 / 4, 1 / 4]], atol=1e-6)


def test_the_mean_embedding_by_hand_is_another_number() -> None:
    scores = score_mean_embedding(VIDEO, LABELS, scale=math.log(3))
    power = 3 ** math.sqrt(2)
    np.testing.assert_allclose(scores, [[power / (1 + power), 1 / (1 + power)]], atol=1e-6)
    assert abs(scores[0, 0] - 3 / 4) > 0.07


def test_independent_scores_by_hand() -> None:
    scores = score_independent(VIDEO, LABELS)
    np.testing.assert_allclose(scores, [[3 / 4, 1 / 4]], atol=1e-6)
    assert scores.dtype == np.float32


def test_independent_scores_do_not_depend_on_the_other_labels() -> None:
    videos, labels = unit_vectors(4, 8), unit_vectors(3, 6, 8, seed=1)
    np.testing.assert_allclose(
        score_independent(videos, labels)[:, :2],
        score_independent(videos, labels[:, :2]),
        atol=1e-6,
    )


def test_independent_scores_stay_between_0_and_1() -> None:
    videos = unit_vectors(50, 8)
    labels = np.stack([videos, -videos])[:, :, :].reshape(1, 100, 8)
    scores = score_independent(videos, labels)
    assert scores.min() >= 0.0
    assert scores.max() <= 1.0


def test_one_template_gives_the_same_either_way() -> None:
    videos, labels = unit_vectors(3, 8), unit_vectors(1, 5, 8, seed=1)
    np.testing.assert_allclose(
        score_clips(videos, labels), score_mean_embedding(videos, labels), atol=ROUNDING
    )


def test_templates_that_cancel_out_give_a_cosine_of_0() -> None:
    labels = np.array([[[1, 0], [1, 0]], [[1, 0], [-1, 0]]], np.float32)
    scores = score_mean_embedding(VIDEO, labels, scale=math.log(3))
    np.testing.assert_allclose(scores, [[3 / 4, 1 / 4]], atol=1e-6)


@pytest.mark.parametrize("method", ["template-softmax", "mean-embedding"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1e6])
def test_rows_of_probabilities_sum_to_1(method: str, scale: float) -> None:
    scores = score(method, unit_vectors(4, 16), unit_vectors(3, 400, 16, seed=1), scale=scale)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-5)


def test_a_clip_scores_the_same_alone_and_in_a_batch() -> None:
    videos, labels = unit_vectors(6, 32), unit_vectors(2, 9, 32, seed=1)
    together = score_clips(videos, labels)
    for i in range(6):
        np.testing.assert_allclose(
            score_clips(videos[i : i + 1], labels)[0], together[i], atol=ROUNDING
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_dtypes_are_taken(dtype: type) -> None:
    scores = score_clips(VIDEO.astype(dtype), LABELS.astype(dtype), scale=math.log(3))
    np.testing.assert_allclose(scores, [[3 / 4, 1 / 4]], atol=1e-6)


def test_each_method_has_its_name() -> None:
    videos, labels = unit_vectors(2, 8), unit_vectors(3, 4, 8, seed=1)
    by_name = [score(method, videos, labels, scale=7.0) for method in SCORE_METHODS]
    np.testing.assert_array_equal(by_name[0], score_clips(videos, labels, scale=7.0))
    np.testing.assert_array_equal(by_name[1], score_mean_embedding(videos, labels, scale=7.0))
    np.testing.assert_array_equal(by_name[2], score_independent(videos, labels))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'max'; expected one of template-softmax, mean"):
        score("max", VIDEO, LABELS)


@pytest.mark.parametrize("method", SCORE_METHODS)
@pytest.mark.parametrize(
    ("videos", "labels", "match"),
    [
        (np.ones((1, 3), np.float32), LABELS, "has width 3 and label_embeddings 2"),
        (np.ones(2, np.float32), LABELS, r"video_embeddings has shape \(2,\).*shape \(B, D\)"),
        (VIDEO, LABELS[0], r"label_embeddings has shape \(2, 2\).*shape \(K, C, D\)"),
        (VIDEO.astype(np.int64), LABELS, "dtype int64; expected a floating-point array"),
        (VIDEO, LABELS.astype(np.uint8), "dtype uint8; expected a floating-point array"),
        (VIDEO[:0], LABELS, "none of its sizes zero"),
        ([[1.0, 0.0]], LABELS, "video_embeddings is a list; expected"),
    ],
)
def test_embeddings_of_other_shapes_and_dtypes_are_refused(
    method: str, videos: np.ndarray, labels: np.ndarray, match: str
) -> None:
    with pytest.raises(ShapeError, match=match):
        score(method, videos, labels)


@pytest.mark.parametrize("method", SCORE_METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(method: str, value: float) -> None:
    with pytest.raises(InferenceError, match=r"not finite.*actionclip verify"):
        score(method, np.full((1, 2), value, np.float32), LABELS)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("method", ["template-softmax", "mean-embedding"])
def test_a_scale_that_is_not_positive_is_refused(method: str, scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale is .*; expected a positive number"):
        score(method, VIDEO, LABELS, scale=scale)


def test_views_are_averaged_as_scores() -> None:
    views = np.array([[[0.9, 0.1], [0.2, 0.8]], [[1.0, 0.0], [0.5, 0.5]]], np.float32)
    mean = average_views(views)
    np.testing.assert_allclose(mean, [[0.55, 0.45], [0.75, 0.25]], atol=1e-7)
    assert mean.dtype == np.float32


@pytest.mark.parametrize("shape", [(2, 3), (2, 0, 3)])
def test_views_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected .* shape \(B, V, C\)"):
        average_views(np.zeros(shape, np.float32))


def test_the_best_come_first_and_ties_go_to_the_lower_index() -> None:
    scores = np.array([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32)
    indices, best = top_k(scores, 3)
    np.testing.assert_array_equal(indices, [[1, 3, 0], [0, 1, 2]])
    np.testing.assert_array_equal(best, np.array([[0.4, 0.4, 0.1], [0.25] * 3], np.float32))
    assert indices.dtype == np.int64
    assert best.dtype == np.float32


def test_more_than_all_labels_gives_all_labels() -> None:
    indices, best = top_k(np.array([[0.2, 0.5, 0.3]], np.float32), 10)
    np.testing.assert_array_equal(indices, [[1, 2, 0]])
    assert best.shape == (1, 3)


def test_a_k_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        top_k(np.ones((1, 3), np.float32), 0)


def test_top_k_refuses_one_row_without_its_batch() -> None:
    with pytest.raises(ShapeError, match=r"scores has shape \(3,\).*shape \(B, C\)"):
        top_k(np.ones(3, np.float32), 1)
