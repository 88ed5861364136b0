from __future__ import annotations

import pytest
import torch

from actionclip_deploy.model import ModelConfig
from actionclip_deploy.model.config import config_from_state_dict


def test_open_clips_sizes_are_taken_over() -> None:
    config = ModelConfig.from_open_clip("ViT-L-14-336", visual_prompt="transf", num_frames=16)
    assert (config.embed_dim, config.vision_width, config.vision_layers) == (768, 1024, 24)
    assert (config.input_size, config.patch_size, config.num_frames) == (336, 14, 16)
    assert (config.text_width, config.text_heads, config.text_layers) == (768, 12, 12)
    assert (config.position_rows, config.prompt_norm_eps, config.scale) == (77, 1e-12, 100.0)


def test_a_resnet_has_stages_and_no_patches() -> None:
    config = ModelConfig.from_open_clip("RN50", visual_prompt="meanp")
    assert config.vision_layers == (3, 4, 6, 3)
    assert config.patch_size is None
    assert config.embed_dim == 1024


@pytest.mark.parametrize(
    ("name", "wanted", "quick_gelu"),
    [
        ("ViT-B-32", None, True),  # OpenAI published it, so ActionCLIP has it with QuickGELU
        ("ViT-B-32", False, False),
        ("ViT-H-14", None, False),
        ("ViT-H-14-quickgelu", None, True),
        ("ViT-H-14", True, True),
    ],
)
def test_the_activation_follows_the_name_or_the_argument(name, wanted, quick_gelu) -> None:
    config = ModelConfig.from_open_clip(name, quick_gelu=wanted)
    assert config.quick_gelu is quick_gelu
    assert not config.backbone.endswith("quickgelu")


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [("transf", 77), ("transf_cls", 8), ("joint", 8), ("shift", None), ("meanp", None)],
)
def test_only_some_prompts_have_positions_over_time(prompt, rows) -> None:
    assert ModelConfig.from_open_clip("ViT-B-32", visual_prompt=prompt).position_rows == rows


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z-99'; use one of its ViT"):
        ModelConfig.from_open_clip("ViT-Z-99")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "convnext_base", "ViT-L-14-CLIPA"])
def test_another_architecture_is_refused_with_what_makes_it_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' sets .*only CLIP's plain ViT or ResNet"):
        ModelConfig.from_open_clip(name)


def test_an_unknown_visual_prompt_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"visual_prompt is 'seqTransf'; it has to be one of \['jo"
    ):
        ModelConfig.from_open_clip("ViT-B-32", visual_prompt="seqTransf")


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frames is 0; it has to be from 1 to"):
        ModelConfig.from_open_clip("ViT-B-32", num_frames=0)


def test_more_frames_than_the_table_has_rows_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"num_frames is 78, .*'transf' model allows T from 1 to 77"
    ):
        ModelConfig.from_open_clip("ViT-B-32", num_frames=78)


def test_a_fixed_table_allows_its_own_number_of_frames_alone(small_config) -> None:
    with pytest.raises(ValueError, match=r"num_frames is 2, .*'transf_cls' model allows T = 4"):
        small_config.with_visual_prompt("transf_cls", num_frames=2, position_rows=4)


@pytest.mark.parametrize("prompt", ["joint", "shift"])
def test_a_resnet_cannot_mix_tokens(prompt: str) -> None:
    with pytest.raises(ValueError, match=f"'{prompt}' works on the tokens of a ViT, and RN50 is"):
        ModelConfig.from_open_clip("RN50", visual_prompt=prompt)


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "ViT-H-14", "ViT-g-14"]
)
def test_sizes_are_read_back_off_the_shapes_of_a_state_dict(name: str) -> None:
    from actionclip_deploy.model.network import build_towers

    config = ModelConfig.from_open_clip(name, visual_prompt="meanp", num_frames=1)
    with torch.device("meta"):
        shapes = build_towers(config).state_dict()
    found = config_from_state_dict(shapes, quick_gelu=config.quick_gelu)
    hidden = [int(c.vision_width * c.vision_mlp_ratio) for c in (found, config)]
    assert hidden[0] == hidden[1]
    assert {**vars(found), "vision_mlp_ratio": 0} == {**vars(config), "vision_mlp_ratio": 0}


def test_a_known_backbone_at_another_size_says_so() -> None:
    from dataclasses import replace

    from actionclip_deploy.model.network import build_towers

    known = ModelConfig.from_open_clip("ViT-H-14", visual_prompt="meanp", num_frames=1)
    with torch.device("meta"):
        shapes = build_towers(replace(known, input_size=280)).state_dict()
    found = config_from_state_dict(shapes, quick_gelu=False)
    assert found.backbone == "ViT-H-14 at 280 pixels"
    assert found.vision_head_width == 80


def test_a_custom_backbone_is_described(small_model) -> None:
    shapes = small_model().towers.state_dict()
    found = config_from_state_dict(shapes, quick_gelu=True)
    assert found.backbone == "custom ViT (width 64, layers 2, patch 16)"
    assert (found.text_heads, found.vision_head_width, found.input_size) == (1, 64, 32)


def test_a_custom_resnet_is_described(small_model) -> None:
    model = small_model(
        vision_layers=(1, 1, 2, 1), vision_width=8, patch_size=None, input_size=64, backbone="RN"
    )
    found = config_from_state_dict(model.towers.state_dict(), quick_gelu=True)
    assert found.backbone == "custom RN (width 8, layers (1, 1, 2, 1))"
    assert found.input_size == 64
