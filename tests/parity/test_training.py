"""The loss and the schedule against the original's, as stored in the golden data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actionclip_deploy.train.learner import Schedule
from actionclip_deploy.train.loss import (
    contrastive_loss,
    find_positives,
    kl_divergence,
    softmax_targets,
)

RELATIVE = 1e-6  # the golden numbers are float32, of 1.2e-7


@pytest.fixture
def inputs(expected: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    video, text, scale = (
        torch.tensor(expected[f"loss_{name}"], dtype=torch.float64, requires_grad=True)
        for name in ("video", "text", "scale")
    )
    return video, text, scale


def relative_error(found: torch.Tensor, wanted: np.ndarray) -> float:
    difference = found.detach().numpy() - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def positives(expected: dict[str, np.ndarray]) -> torch.Tensor:
    labels = F.one_hot(torch.tensor(expected["loss_labels"])).bool()
    return find_positives(labels, labels)


def test_the_loss_of_each_way_is_the_originals(
    expected: dict[str, np.ndarray], inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    video, text, scale = inputs
    logits = scale * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    targets = softmax_targets(positives(expected))
    assert kl_divergence(logits, targets).item() == pytest.approx(
        float(expected["loss_v2t"]), rel=RELATIVE
    )
    assert kl_divergence(logits.T, targets).item() == pytest.approx(
        float(expected["loss_t2v"]), rel=RELATIVE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradients_are_the_originals(
    expected: dict[str, np.ndarray],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    video, text, scale = inputs
    loss = contrastive_loss(
        F.normalize(video.to(dtype), dim=-1),
        F.normalize(text.to(dtype), dim=-1),
        scale.to(dtype),
        positives(expected),
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss_total"]), rel=RELATIVE)
    for tensor, name in zip(inputs, ("video", "text", "scale"), strict=True):
        assert tensor.grad is not None
        assert relative_error(tensor.grad, expected[f"loss_grad_{name}"]) < RELATIVE, name


def test_learning_rates_are_the_originals(expected: dict[str, np.ndarray]) -> None:
    schedule = Schedule(total=50.0, warmup=5.0)
    factors = np.array([schedule.factor(float(epoch)) for epoch in expected["lr_epochs"]])
    found = factors[:, None] * np.array([5e-6, 5e-6, 5e-5])
    np.testing.assert_allclose(found, expected["lr_values"], rtol=RELATIVE, atol=1e-20)
