from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.families import FAMILIES, read_family

HERE = Path("file.pt")
TENSOR = torch.zeros(1)


def tensors(*keys: str) -> dict[str, torch.Tensor]:
    return dict.fromkeys(keys, TENSOR)


@pytest.mark.parametrize(
    ("content", "family"),
    [
        (
            {
                "model_state_dict": tensors("visual.proj", "ln_final.weight"),
                "fusion_model_state_dict": {},
            },
            "original",
        ),
        (
            {
                "model_state_dict": tensors("visual.proj", "ln_final.weight"),
                "fusion_model_state_dict": tensors("module.shift.weight"),
            },
            "original",
        ),
        (
            {
                "model_state_dict": tensors("visual.proj", "ln_final.weight"),
                "fusion_model_state_dict": tensors("frame_position_embeddings.weight"),
            },
            "bike",
        ),
        ({"state_dict": tensors("clip.visual.proj", "adapter.x")}, "mmaction2"),
        (tensors("clip.visual.proj", "adapter.x"), "mmaction2"),
        ({"model_state_dict": tensors("visual.proj", "fusion_model.x")}, "text4vis"),
        ({"model_state_dict": tensors("module.visual.proj", "module.logit_scale")}, "text4vis"),
        ({"model": tensors("module.image_encoder.proj", "module.logit_scale")}, "vificlip"),
        (tensors("visual.proj", "text_projection", "input_resolution"), "openai"),
        ({"visual.proj": TENSOR, "text_projection": TENSOR.half()}, "openai"),
        ({"state_dict": tensors("module.visual.proj", "module.text_projection")}, "open_clip"),
    ],
)
def test_families_are_told_by_their_keys(content: dict, family: str) -> None:
    weights = read_family(content, HERE)
    assert weights.family == family
    assert "visual.proj" in weights.towers


def test_a_released_open_clip_file_is_told_by_its_name() -> None:
    content = tensors("visual.proj", "text_projection")
    assert read_family(content, Path("open_clip_pytorch_model.bin")).family == "open_clip"


def test_plain_clip_that_does_not_tell_its_activation_asks_for_the_family() -> None:
    content = tensors("visual.proj", "text_projection")
    with pytest.raises(CheckpointError, match="QuickGELU or open_clip's GELU; give the family"):
        read_family(content, HERE)
    assert read_family(content, HERE, "open_clip").quick_gelu is False
    assert read_family(content, HERE, "openai").quick_gelu is True
    assert read_family(content, HERE, as_base=True).family == "openai"


@pytest.mark.parametrize(
    "keys",
    [
        ("visual.proj", "mit.positional_embedding"),
        ("visual.transformer.resblocks.0.message_fc.weight",),
        ("module.visual.proj", "module.prompts_generator.alpha"),
        ("vision_model.x", "mit.position_embedding"),
    ],
)
def test_xclip_is_refused_with_the_reason(keys: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError, match="X-CLIP changes its text features with every video"):
        read_family({"model": tensors(*keys)}, HERE)


def test_open_vclip_is_refused_with_the_reason() -> None:
    content = {"model_state": tensors("model.visual.proj", "model.text_projection")}
    with pytest.raises(CheckpointError, match="an Open-VCLIP checkpoint; its frames attend to the"):
        read_family(content, HERE)


def test_froster_is_refused_with_the_reason() -> None:
    content = {"model_state": tensors("model.visual.proj", "model.projector_v.0.weight")}
    with pytest.raises(CheckpointError, match="a FROSTER checkpoint; its frames attend to the"):
        read_family(content, HERE)


def test_names_of_transformers_are_refused_with_the_way_out() -> None:
    content = tensors("vision_model.embeddings.class_embedding", "text_model.x")
    with pytest.raises(CheckpointError, match="Hugging Face's transformers; give the checkpoint"):
        read_family(content, HERE)


def test_an_unknown_file_is_refused_with_its_first_keys() -> None:
    with pytest.raises(CheckpointError, match=r"no known family: .* start with conv1, fc. Known"):
        read_family(tensors("conv1", "fc"), HERE)


def test_an_empty_dictionary_is_refused() -> None:
    with pytest.raises(CheckpointError, match="its keys start with nothing"):
        read_family({}, HERE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "text4vis"])
def test_a_family_that_the_file_is_not_of_is_refused(family: str) -> None:
    match = f"not the structure of the family '{family}'; its keys start with conv1, fc"
    with pytest.raises(CheckpointError, match=match):
        read_family(tensors("conv1", "fc"), HERE, family)


def test_entries_that_are_no_tensors_are_listed() -> None:
    content = tensors("visual.proj", "input_resolution") | {"logit_scale": 4.6, "epoch": 3}
    with pytest.raises(CheckpointError, match="that are not tensors: logit_scale, epoch; save it"):
        read_family(content, HERE)


def test_a_head_alone_is_no_original_checkpoint() -> None:
    content = {"fusion_model_state_dict": tensors("module.shift.weight")}
    with pytest.raises(CheckpointError, match="has not the structure of the family 'original'"):
        read_family(content, HERE)
