from __future__ import annotations

import math

import pytest
import torch

from actionclip_deploy.train.loss import (
    classifier_loss,
    contrastive_loss,
    find_positives,
    gather_batch,
    kl_divergence,
    normalised_targets,
    softmax_targets,
)


def multi_hot(rows: list[set[int]], num_labels: int) -> torch.Tensor:
    return torch.tensor([[label in row for label in range(num_labels)] for row in rows])


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(value) for value in values]
    return [e / sum(exps) for e in exps]


def kl_by_hand(logits: torch.Tensor, targets: list[list[float]]) -> float:
    total = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        for p, q in zip(softmax(row), target, strict=True):
            total += q * math.log(q / p) if q > 0 else 0.0
    return total / len(targets)


def embeddings(seed: int, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_videos_and_texts_that_share_a_label_are_positives() -> None:
    videos = multi_hot([{0, 1}, {2}, {1}], 3)
    texts = multi_hot([{1}, {2}, {1}], 3)
    assert find_positives(videos, texts).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


def test_a_text_is_no_positive_for_a_label_that_it_does_not_name() -> None:
    # Both videos have label 0, and the text of the first names its other label.
    videos = multi_hot([{0, 1}, {0}], 2)
    texts = multi_hot([{1}, {0}], 2)
    assert find_positives(videos, texts).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    ("kind", "weigh"),
    [
        ("kl-softmax", lambda row: softmax([10.0 * value for value in row])),
        ("kl-normalised", lambda row: [value / sum(row) for value in row]),
    ],
)
def test_the_loss_is_the_divergence_of_both_ways(kind: str, weigh: object) -> None:
    assert callable(weigh)
    videos, texts = embeddings(1), embeddings(2)
    positives = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 1]]
    logits = 7.0 * videos @ texts.T
    transposed = [list(column) for column in zip(*positives, strict=True)]
    forth = kl_by_hand(logits, [weigh(row) for row in positives])
    back = kl_by_hand(logits.T, [weigh(row) for row in transposed])
    scale = torch.tensor(7.0, dtype=torch.float64)
    found = contrastive_loss(videos, texts, scale, torch.tensor(positives).bool(), kind=kind)  # type: ignore[arg-type]
    assert float(found) == pytest.approx((forth + back) / 2, rel=1e-6)


def test_the_diagonal_loss_knows_no_other_positive() -> None:
    videos, texts = embeddings(1), embeddings(2)
    logits = (7.0 * videos @ texts.T).tolist()
    columns = [list(column) for column in zip(*logits, strict=True)]
    by_hand = [
        -math.log(softmax(row)[i]) for rows in (logits, columns) for i, row in enumerate(rows)
    ]
    found = contrastive_loss(
        videos,
        texts,
        torch.tensor(7.0),
        torch.ones(4, 4, dtype=torch.bool),
        kind="cross-entropy-diagonal",
    )
    assert float(found) == pytest.approx(sum(by_hand) / 8, rel=1e-6)


def test_a_batch_of_one_has_no_loss() -> None:
    one = embeddings(3, count=1)
    loss = contrastive_loss(one, one, torch.tensor(100.0), torch.ones(1, 1, dtype=torch.bool))
    assert float(loss) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("batch_size", "target"), [(128, 0.9943), (64, 0.9971)])
def test_a_single_positive_has_nearly_all_of_the_target(batch_size: int, target: float) -> None:
    # The two numbers are those that the specification derives from the original.
    targets = softmax_targets(torch.eye(batch_size, dtype=torch.bool))
    assert float(targets[0, 0]) == pytest.approx(target, abs=5e-5)
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * batch_size)


def test_many_positives_share_a_row_of_targets() -> None:
    targets = normalised_targets(torch.tensor([[True, True, False], [False, True, False]]))
    assert targets.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]


def test_the_divergence_from_itself_is_zero() -> None:
    logits = embeddings(1) @ embeddings(2).T
    assert float(kl_divergence(logits, logits.softmax(dim=1))) == pytest.approx(0.0, abs=1e-12)


def test_an_unknown_kind_is_refused() -> None:
    one = embeddings(3)
    with pytest.raises(ValueError, match="kind of loss is 'mse'; it has to be 'kl-softmax'"):
        contrastive_loss(one, one, torch.tensor(1.0), torch.eye(4).bool(), kind="mse")  # type: ignore[arg-type]


def test_the_classifier_shares_the_target_among_the_labels_of_a_video() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 0.0]])
    p, q = softmax([1.0, 2.0, -1.0]), softmax([0.5, 0.0, 0.0])
    by_hand = (-0.5 * math.log(p[0]) - 0.5 * math.log(p[1]) - math.log(q[2])) / 2
    labels = multi_hot([{0, 1}, {2}], 3)
    assert float(classifier_loss(logits, labels)) == pytest.approx(by_hand, rel=1e-6)


def test_one_process_gathers_nothing() -> None:
    tensor = torch.ones(3, 2)
    assert gather_batch(tensor) is tensor
