"""The optimiser, its schedule, the mean of weights, and the tokens of prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_fakes import SIZES, toy_config

from actionclip_deploy.errors import LabelError, TrainingError
from actionclip_deploy.model import ModelConfig
from actionclip_deploy.train.learner import (
    MeanWeights,
    Schedule,
    build_optimiser,
    part_of,
    prompt_tokens,
    set_learning_rates,
)
from actionclip_deploy.train.models import build_trained_model
from actionclip_deploy.train.run_config import ScheduleSection

CONFIG = toy_config("unused", "optimiser.lr=5e-6", "optimiser.prompt_ratio=10")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.towers.visual.conv1.weight", "visual"),
        ("model.towers.visual.time_embedding", "visual"),
        ("model.towers.transformer.resblocks.0.ln_1.weight", "textual"),
        ("model.towers.token_embedding.weight", "textual"),
        ("model.towers.logit_scale", "textual"),
        ("model.visual_prompt.transformer.resblocks.0.ln_1.weight", "prompt"),
        ("classifier.weight", "prompt"),
    ],
)
def test_every_parameter_belongs_to_a_part(name: str, part: str) -> None:
    assert part_of(name) == part


def test_each_part_has_its_learning_rate_and_everything_decays() -> None:
    model = build_trained_model(CONFIG.model, CONFIG.loss, num_labels=4, seed=0)
    section = CONFIG.optimiser.model_copy(update={"visual_ratio": 0.5})
    optimiser = build_optimiser(model, section)
    rates = {group["part"]: group["lr"] for group in optimiser.param_groups}
    assert rates == pytest.approx({"textual": 5e-6, "visual": 2.5e-6, "prompt": 5e-5})
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.2}
    assert {group["betas"] for group in optimiser.param_groups} == {(0.9, 0.98)}
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_in_no_group() -> None:
    model = build_trained_model(CONFIG.model, CONFIG.loss, num_labels=4, seed=0)
    model.freeze("visual")
    groups = {g["part"]: g["params"] for g in build_optimiser(model, CONFIG.optimiser).param_groups}
    assert groups["visual"] == []
    assert len(groups["textual"]) > 0


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    schedule = Schedule(total=50.0, warmup=5.0)
    assert schedule.factor(0.0) == 0.0
    assert schedule.factor(1.0) == pytest.approx(0.2)
    assert schedule.factor(5.0) == 1.0
    assert schedule.factor(27.5) == pytest.approx(0.5)
    assert schedule.factor(50.0) == pytest.approx(0.0, abs=1e-15)
    assert schedule.factor(51.0) == pytest.approx(0.0, abs=1e-15)


def test_without_warmup_the_rate_begins_at_its_base() -> None:
    assert Schedule(total=10.0, warmup=0.0).factor(0.0) == 1.0


def test_epochs_are_counted_in_steps() -> None:
    section = ScheduleSection(unit="epochs", length=3, warmup=0.5)
    schedule = Schedule.in_steps(section, steps_per_epoch=2.5)
    assert (schedule.num_steps, schedule.warmup) == (8, 1.25)
    assert Schedule.in_steps(section, 1 / 3).num_steps == 1


def test_steps_are_counted_as_they_are() -> None:
    section = ScheduleSection(unit="steps", length=7, warmup=2)
    schedule = Schedule.in_steps(section, steps_per_epoch=100)
    assert (schedule.num_steps, schedule.warmup) == (7, 2)


def test_learning_rates_are_set_from_their_base_and_not_from_the_last() -> None:
    model = build_trained_model(CONFIG.model, CONFIG.loss, num_labels=4, seed=0)
    optimiser = build_optimiser(model, CONFIG.optimiser)
    set_learning_rates(optimiser, 0.5)
    rates = set_learning_rates(optimiser, 0.5)
    assert rates == pytest.approx({"textual": 2.5e-6, "visual": 2.5e-6, "prompt": 2.5e-5})
    assert [group["lr"] for group in optimiser.param_groups] == list(rates.values())


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    # AdamW with a gradient of zero does nothing but decay.
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    module = torch.nn.Module()
    module.register_parameter("classifier", parameter)
    optimiser = build_optimiser(module, CONFIG.optimiser)
    parameter.grad = torch.zeros(1)
    optimiser.step()
    assert float(parameter.detach()) == pytest.approx(2.0 * (1 - 5e-5 * 0.2), rel=1e-7)
    assert not math.isclose(float(parameter.detach()), 2.0, rel_tol=1e-8)


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


def config(*, context_length: int = 77, vocab_size: int = 49408) -> ModelConfig:
    return ModelConfig(
        backbone="toy",
        visual_prompt="meanp",
        text_heads=1,
        vision_head_width=32,
        context_length=context_length,
        vocab_size=vocab_size,
        **SIZES,
    )


def test_prompts_are_tokenised_template_major() -> None:
    tokens = prompt_tokens(
        ("abseiling", "archery"), ("a photo of action {}", "{}"), config()
    ).numpy()
    # The specification gives the tokens of this prompt.
    wanted = [49406, 320, 1125, 539, 1816, 596, 567, 3299, 49407]
    assert tokens[0].tolist() == wanted
    assert tokens[2].tolist() == [49406, 596, 567, 3299, 49407, 0, 0, 0, 0]
    assert np.array_equal(tokens[1][:5], tokens[0][:5])


def test_a_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(
        LabelError, match=r"label 2 \('archery meeting'\) in template 2 \('very \{\}'\) is"
    ):
        prompt_tokens(("a", "archery meeting"), ("{}", "very {}"), config(context_length=4))


def test_a_model_with_too_few_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="The model has 512 tokens, and CLIP's tokenizer gives"):
        prompt_tokens(("archery",), ("{}",), config(vocab_size=512))
