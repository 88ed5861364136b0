from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model import initialise_tower, load_checkpoint
from actionclip_deploy.model.checkpoints import complete_towers, find_visual_prompt
from actionclip_deploy.model.families import FamilyWeights

HERE = Path("file.pt")


@pytest.fixture
def content(small_model) -> dict:
    model = small_model("transf")
    return {
        "model_state_dict": dict(model.towers.state_dict()),
        "fusion_model_state_dict": {
            f"module.{key}": value for key, value in model.visual_prompt.state_dict().items()
        },
    }


def test_missing_tensors_are_listed(content, save) -> None:
    del content["model_state_dict"]["ln_final.bias"]
    del content["fusion_model_state_dict"]["module.transformer.resblocks.0.ln_1.bias"]
    match = (
        r"does not fit custom ViT .* 2 missing: ln_final.bias, "
        r"visual_prompt.transformer.resblocks.0.ln_1.bias. Check that the file is whole"
    )
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(save(content))


def test_tensors_left_over_are_listed(content, save) -> None:
    content["model_state_dict"]["visual.extra"] = torch.zeros(1)
    content["fusion_model_state_dict"]["module.other"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"2 left over: visual.extra, visual_prompt.other"):
        load_checkpoint(save(content))


def test_tensors_of_another_shape_are_listed_with_both_shapes(content, save) -> None:
    content["model_state_dict"]["visual.ln_post.bias"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"1 of another shape: visual.ln_post.bias \(3,\) for \(64,\)"
    ):
        load_checkpoint(save(content))


def test_long_lists_are_counted(content, save) -> None:
    for index in range(25):
        content["model_state_dict"][f"visual.extra{index:02}"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"25 left over: .*visual.extra19 and 5 more"):
        load_checkpoint(save(content))


def test_a_file_without_a_tensor_that_tells_a_size_is_refused(content, save) -> None:
    del content["model_state_dict"]["text_projection"]
    with pytest.raises(CheckpointError, match="lacks the tensor 'text_projection', which tells"):
        load_checkpoint(save(content))


def test_a_file_with_impossible_shapes_is_refused(content, save) -> None:
    content["model_state_dict"]["visual.conv1.weight"] = torch.zeros(64, 3)
    with pytest.raises(CheckpointError, match="tensors of shapes that no CLIP has"):
        load_checkpoint(save(content))


def test_a_lacking_tower_asks_for_a_base(content, save) -> None:
    towers = content["model_state_dict"]
    content["model_state_dict"] = {k: v for k, v in towers.items() if k.startswith("visual.")}
    with pytest.raises(
        CheckpointError, match="no textual tower and no token embedding; give the CLIP checkpoint"
    ):
        load_checkpoint(save(content))


def test_a_base_that_lacks_the_same_tower_is_refused(content, save) -> None:
    towers = content["model_state_dict"]
    content["model_state_dict"] = {k: v for k, v in towers.items() if k.startswith("visual.")}
    path = save(content)
    with pytest.raises(CheckpointError, match="no token embedding, and neither has its base"):
        load_checkpoint(path, base=path)


def test_a_base_of_another_width_is_refused(content, save, small_model) -> None:
    other = small_model("meanp", embed_dim=16)
    base = save(dict(other.towers.state_dict()), "base.pt")
    towers = content["model_state_dict"]
    content["model_state_dict"] = {k: v for k, v in towers.items() if k.startswith("visual.")}
    with pytest.raises(
        CheckpointError, match="visual tower gives 32 channels and the textual tower 16; give the"
    ):
        load_checkpoint(save(content), base=base)


def test_a_base_with_another_activation_is_refused() -> None:
    weights = FamilyWeights("text4vis", {"visual.proj": torch.zeros(1)}, {})
    base = FamilyWeights("open_clip", {"ln_final.bias": torch.zeros(1)}, None, quick_gelu=False)
    with pytest.raises(CheckpointError, match="wants QuickGELU and its base GELU"):
        complete_towers(weights, base, HERE)


@pytest.mark.parametrize("kind", ["shift", "joint"])
def test_frames_mixed_in_the_tower_and_a_head_behind_it_are_refused(kind: str) -> None:
    towers = {"visual.time_embedding": torch.zeros(4, 64)} if kind == "joint" else {}
    head = {"transformer.resblocks.0.ln_1.bias": torch.zeros(1)}
    weights = FamilyWeights("original", towers, head, shifted=kind == "shift")
    match = f"mixes frames inside the visual tower .'{kind}'. and has weights of a temporal head"
    with pytest.raises(CheckpointError, match=match):
        find_visual_prompt(weights, None, HERE)


def test_an_unknown_head_is_refused_with_its_keys() -> None:
    weights = FamilyWeights("original", {}, {"mamba.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unknown kind, with the keys mamba.weight; known"):
        find_visual_prompt(weights, None, HERE)


def test_a_visual_prompt_other_than_the_files_is_refused(content, save) -> None:
    with pytest.raises(CheckpointError, match="trained with visual prompt 'transf', and 'meanp'"):
        load_checkpoint(save(content), visual_prompt="meanp")


def test_an_unknown_visual_prompt_is_refused(content, save) -> None:
    with pytest.raises(ValueError, match="visual_prompt is 'Transf'; it has to be one of"):
        load_checkpoint(save(content), visual_prompt="Transf")


def test_a_files_own_visual_prompt_may_be_named(content, save) -> None:
    assert load_checkpoint(save(content), visual_prompt="transf").family == "original"


def test_half_precision_becomes_float32(content, save) -> None:
    towers = content["model_state_dict"]
    content["model_state_dict"] = {key: value.half() for key, value in towers.items()}
    model = load_checkpoint(save(content)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.towers.visual.proj, towers["visual.proj"].half().float())


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_one_tower_is_made_new_and_the_rest_stays(small_model, tower: str) -> None:
    model, before = small_model("transf"), small_model("transf").state_dict()
    initialise_tower(model, tower, seed=11)
    changed = {
        key.split(".")[1]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    text = {"transformer", "token_embedding", "positional_embedding", "text_projection"}
    assert changed == ({"visual"} if tower == "visual" else text)


def test_a_new_textual_tower_has_the_first_logit_scale(small_model) -> None:
    model = small_model("meanp")
    with torch.no_grad():
        model.towers.logit_scale.fill_(4.6)
    initialise_tower(model, "text", seed=0)
    assert model.towers.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_a_seed_makes_the_same_tower(small_model) -> None:
    first, second = small_model("joint"), small_model("joint")
    initialise_tower(first, "visual", seed=11)
    initialise_tower(second, "visual", seed=11)
    assert all(torch.equal(second.state_dict()[k], v) for k, v in first.state_dict().items())


def test_an_unknown_tower_is_refused(small_model) -> None:
    with pytest.raises(ValueError, match=r"tower is 'head'; it has to be one of \['visual', 'te"):
        initialise_tower(small_model(), "head", seed=0)
