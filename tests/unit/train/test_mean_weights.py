from __future__ import annotations

import torch
from torch import nn

from actionclip_deploy.train.learner import MeanWeights


def model_with(value: float) -> nn.Module:
    model = nn.BatchNorm1d(1)
    nn.init.constant_(model.weight, value)
    return model


def set_weight(model: nn.Module, value: float) -> None:
    nn.init.constant_(model.get_parameter("weight"), value)


def test_the_mean_forgets_at_the_rate_of_its_decay() -> None:
    model = model_with(1.0)
    mean = MeanWeights(model, decay=0.75)
    set_weight(model, 2.0)
    mean.update()
    set_weight(model, 4.0)
    mean.update()
    # 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    torch.testing.assert_close(mean.state_dict()["weight"], torch.tensor([1.9375]))


def test_counts_are_taken_over_as_they_are() -> None:
    model = model_with(1.0)
    mean = MeanWeights(model, decay=0.5)
    model.get_buffer("num_batches_tracked").fill_(7)
    mean.update()
    assert int(mean.state_dict()["num_batches_tracked"]) == 7


def test_the_model_has_its_own_weights_again_after_the_block() -> None:
    model = model_with(1.0)
    mean = MeanWeights(model, decay=0.5)
    set_weight(model, 3.0)
    mean.update()
    with mean.in_model():
        assert model.get_parameter("weight").tolist() == [2.0]
    assert model.get_parameter("weight").tolist() == [3.0]
    assert mean.state_dict()["weight"].tolist() == [2.0]


def test_a_mean_is_taken_up_again() -> None:
    model = model_with(1.0)
    mean = MeanWeights(model, decay=0.5)
    set_weight(model, 3.0)
    mean.update()
    again = MeanWeights(model, decay=0.5)
    again.load_state_dict(mean.state_dict())
    assert again.state_dict()["weight"].tolist() == [2.0]
