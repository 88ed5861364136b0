from __future__ import annotations

import pytest
import torch

from actionclip_deploy.model import (
    ActionCLIP,
    ModelConfig,
    build_model,
    count_flops,
    count_macs,
    count_parameters,
)

# The paper prints three to four digits; its counter counts a bias here and there otherwise.
RELATIVE_TOLERANCE = 0.002


@pytest.mark.parametrize(
    ("name", "visual", "total"),
    [("ViT-B-32", 87_849_216, 170_231_041), ("ViT-B-16", 86_192_640, 168_574_465)],
)
def test_parameters_are_those_of_the_originals_models(name, visual, total) -> None:
    assert count_parameters(ModelConfig.from_open_clip(name)) == {
        "visual": visual,
        "temporal": 18_953_728,
        "textual": 63_428_097,
        "total": total,
    }


@pytest.mark.parametrize(
    ("prompt", "parameters", "keys"),
    [
        ("transf", 18_953_728, 73),
        ("lstm", 2_140_672, 5),
        ("conv1d", 40_960, 2),
        ("transf_cls", 18_959_872, 77),
        ("meanp", 0, 0),
        ("shift", 0, 0),
        ("joint", 0, 0),
    ],
)
def test_heads_have_the_originals_tensors(prompt: str, parameters: int, keys: int) -> None:
    config = ModelConfig.from_open_clip("ViT-B-32", visual_prompt=prompt)
    with torch.device("meta"):
        model = ActionCLIP(config)
    assert count_parameters(model)["temporal"] == parameters
    assert len(model.visual_prompt.state_dict()) == keys
    assert len(model.towers.state_dict()) == 302 + (prompt == "joint")


@pytest.mark.parametrize(
    ("name", "num_frames", "giga"),
    [
        ("ViT-B-32", 8, 35.444),
        ("ViT-B-16", 8, 140.777),
        ("ViT-B-16", 16, 281.554),
        ("ViT-B-16", 32, 563.112),
    ],
)
def test_macs_are_those_of_the_paper(name: str, num_frames: int, giga: float) -> None:
    config = ModelConfig.from_open_clip(name)
    macs = count_macs(config, num_frames=num_frames)
    assert macs / 1e9 == pytest.approx(giga, rel=RELATIVE_TOLERANCE)
    assert round(macs / 1e9, 2) == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize(
    ("name", "num_frames", "giga"),
    [("ViT-B-32", 8, 35.422), ("ViT-B-16", 8, 140.659), ("ViT-B-16", 32, 562.641)],
)
def test_flops_are_twice_the_products(name: str, num_frames: int, giga: float) -> None:
    config = ModelConfig.from_open_clip(name)
    flops = count_flops(config, num_frames=num_frames)
    assert flops / 2e9 == pytest.approx(giga, abs=0.0005)


def count_by_running(model: ActionCLIP, clips: torch.Tensor) -> int:
    """FLOPs that torch counts, with attention spelled out so that none is missed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model.encode_video(clips)
    return counter.get_total_flops()


@pytest.mark.parametrize("prompt", ["meanp", "joint", "shift", "transf", "transf_cls", "conv1d"])
def test_flops_of_a_small_vit_are_those_that_torch_counts(small_model, clips, prompt) -> None:
    model = small_model(prompt).train()  # in training mode no fused layer hides its products
    assert count_by_running(model, clips[:1]) == count_flops(model.config)


def test_flops_of_a_small_resnet_are_those_that_torch_counts(small_model) -> None:
    model = small_model(
        "meanp", vision_layers=(1, 2, 1, 1), vision_width=8, patch_size=None, input_size=64
    ).train()
    counted = count_by_running(model, torch.randn(1, 4, 3, 64, 64))
    assert counted == count_flops(model.config)


def test_an_lstm_costs_eight_square_matrices_per_frame(small_config) -> None:
    lstm = small_config.with_visual_prompt("lstm", num_frames=4)
    # Four gates, each with a matrix for the input and one for the state.
    assert count_flops(lstm) - count_flops(small_config) == 2 * 4 * 8 * 32 * 32


def test_a_model_and_its_configuration_count_the_same(small_config) -> None:
    assert count_parameters(build_model(small_config)) == count_parameters(small_config)
