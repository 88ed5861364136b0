"""Checkpoints in, models out, and back."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model import (
    FAMILIES,
    VISUAL_PROMPTS,
    families,
    initialise_tower,
    load_checkpoint,
    save_original_checkpoint,
)
from actionclip_deploy.model.checkpoints import complete_towers, find_visual_prompt
from actionclip_deploy.model.config import COMBINED_PROMPTS
from actionclip_deploy.model.families import FamilyWeights

if TYPE_CHECKING:
    from actionclip_deploy.model import ActionClipNetwork

# The same weights in the same order of operations.
TOLERANCE = 1e-6


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def original(model: ActionClipNetwork) -> dict:
    """The original's format, for heads that keep the towers as they are."""
    return {
        "epoch": 1,
        "model_state_dict": model.towers.state_dict(),
        "fusion_model_state_dict": prefixed(model.visual_prompt.state_dict(), "module."),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }


def mmaction2(model: ActionClipNetwork) -> dict:
    towers = prefixed(model.towers.state_dict(), "clip.")
    return {
        "meta": {},
        "state_dict": towers | prefixed(model.visual_prompt.state_dict(), "adapter."),
    }


def openai(model: ActionClipNetwork) -> dict:
    """OpenAI's flat state dict: matrices as fp16, sizes among the tensors."""
    towers = {
        key: value.half() if key == "text_projection" else value
        for key, value in model.towers.state_dict().items()
    }
    sizes = {"input_resolution": torch.tensor(32), "vocab_size": torch.tensor(50)}
    return towers | sizes | {"context_length": torch.tensor(12)}


def open_clip(model: ActionClipNetwork) -> dict:
    towers = prefixed(model.towers.state_dict(), "module.")
    return {"epoch": 1, "name": "run", "state_dict": towers}


def text4vis(model: ActionClipNetwork) -> dict:
    towers = model.towers.state_dict()
    kept = {k: v for k, v in towers.items() if k.startswith("visual.") or k == "logit_scale"}
    head = prefixed(model.visual_prompt.state_dict(), "fusion_model.")
    return {"epoch": 1, "model_state_dict": kept | head, "optimizer_state_dict": {}}


def vificlip(model: ActionClipNetwork) -> dict:
    names = {}
    for key, value in model.towers.state_dict().items():
        if key.startswith("visual."):
            names["module.image_encoder." + key.removeprefix("visual.")] = value
        elif key == "logit_scale":
            names["module.logit_scale"] = value
        elif not key.startswith("token_embedding."):
            names["module.text_encoder." + key] = value
    names["module.prompt_learner.complete_text_embeddings"] = torch.zeros(3, 12, 64)
    return {"model": names, "max_accuracy": 80.0, "epoch": 1}


def bike(model: ActionClipNetwork) -> dict:
    content = original(model)
    content["fusion_model_state_dict"] = model.visual_prompt.state_dict()
    return content


def check_same(loaded: ActionClipNetwork, model: ActionClipNetwork, clips, tokens) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.encode_video_features(clips),
            model.encode_video_features(clips),
            rtol=0,
            atol=TOLERANCE,
        )
        torch.testing.assert_close(
            loaded.encode_text_features(tokens),
            model.encode_text_features(tokens),
            rtol=0,
            atol=TOLERANCE,
        )
    assert not loaded.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("prompt", ["meanp", "conv1d", "lstm", "transf", "transf_cls", "joint"])
def test_the_originals_files_load(small_model, save, clips, tokens, prompt: str) -> None:
    model = small_model(prompt)
    content = original(model)
    loaded = load_checkpoint(save(content))
    assert loaded.family == "original"
    assert loaded.model.config == model.config
    assert loaded.templates is None
    assert loaded.notes == ()
    check_same(loaded.model, model, clips, tokens)


def test_the_originals_temporal_shift_loads(small_model, save, clips, tokens) -> None:
    model = small_model("shift")
    content = original(model)
    content["model_state_dict"] = {
        key.replace("resblocks.0.", "resblocks.0.net.").replace("resblocks.1.", "resblocks.1.net.")
        if key.startswith("visual.")
        else key: value
        for key, value in model.towers.state_dict().items()
    }
    loaded = load_checkpoint(save(content))
    assert loaded.model.config.visual_prompt == "shift"
    check_same(loaded.model, model, clips, tokens)


def test_the_prefix_is_taken_off_as_a_word_and_not_letter_by_letter(small_model, save) -> None:
    # str.lstrip("module.") would eat the "m", "o", "d", "u", "l" and "e" that a name begins with.
    content = original(small_model("lstm"))
    assert any(key.startswith("module.lstm_visual") for key in content["fusion_model_state_dict"])
    assert load_checkpoint(save(content)).model.config.visual_prompt == "lstm"


def test_mmaction2_files_load(small_model, save, clips, tokens) -> None:
    model = small_model("transf", rows=4, prompt_norm_eps=1e-5)
    loaded = load_checkpoint(save(mmaction2(model), "best.pth"))
    assert (loaded.family, loaded.num_frames_from) == ("mmaction2", "position table")
    assert loaded.model.config == model.config
    check_same(loaded.model, model, clips, tokens)


def test_openai_files_load(small_model, save, clips, tokens) -> None:
    model = small_model("meanp")
    with torch.no_grad():
        model.towers.text_projection.copy_(model.towers.text_projection.half())
    loaded = load_checkpoint(save(openai(model)))
    assert loaded.family == "openai"
    assert loaded.model.config.quick_gelu
    assert loaded.model.config.scale == 100.0
    assert "input_resolution" in loaded.notes[0]
    check_same(loaded.model, model, clips, tokens)


class Inert(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def module_tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules that hold tensors under dotted names."""
    root = Inert()
    for key, value in tensors.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Inert())
            module = getattr(module, parent)
        module.register_buffer(name, value)
    return root


def test_openais_torchscript_archive_loads(small_model, tmp_path, clips, tokens) -> None:
    model = small_model("meanp")
    with torch.no_grad():
        model.towers.text_projection.copy_(model.towers.text_projection.half())
    path = tmp_path / "ViT-4f.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(module_tree(openai(model))), path)
    loaded = load_checkpoint(path)
    assert loaded.family == "openai"
    check_same(loaded.model, model, clips, tokens)


@pytest.mark.parametrize("prompt", [*VISUAL_PROMPTS, "shift+transf"])
def test_plain_clip_takes_any_visual_prompt(small_model, save, clips, prompt: str) -> None:
    path = save(openai(small_model("meanp")))
    loaded = load_checkpoint(path, visual_prompt=prompt)
    again = load_checkpoint(path, visual_prompt=prompt)
    assert loaded.model.config.visual_prompt == prompt
    has_new = prompt not in ("meanp", "shift")
    assert any(f"{prompt!r} has new weights" in note for note in loaded.notes) == has_new
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_video(clips), again.model.encode_video(clips))


def test_open_clips_training_files_load(small_model, save, clips, tokens) -> None:
    model = small_model("meanp", quick_gelu=False)
    loaded = load_checkpoint(save(open_clip(model)))
    assert loaded.family == "open_clip"
    assert not loaded.model.config.quick_gelu
    assert loaded.model.config.scale == pytest.approx(1 / 0.07)
    check_same(loaded.model, model, clips, tokens)


def test_open_clips_safetensors_load(small_model, tmp_path, clips, tokens) -> None:
    model = small_model("meanp", quick_gelu=False)
    path = tmp_path / "open_clip_model.safetensors"
    safetensors.torch.save_file(model.towers.state_dict(), path)
    loaded = load_checkpoint(path, num_frames=4)
    assert loaded.family == "open_clip"
    check_same(loaded.model, model, clips, tokens)


def test_open_clips_separate_textual_tower_loads(small_model, save, clips, tokens) -> None:
    model = small_model("meanp", quick_gelu=False)
    content = {
        key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": value
        for key, value in model.towers.state_dict().items()
    }
    loaded = load_checkpoint(save({"state_dict": content}))
    check_same(loaded.model, model, clips, tokens)


def test_text4vis_files_load_with_the_textual_tower_of_their_base(
    small_model, save, clips, tokens
) -> None:
    model = small_model("transf")
    base = save(openai(model), "clip.pt")
    loaded = load_checkpoint(save(text4vis(model), "k400-vitb-32-f4.pt"), base=base)
    assert (loaded.family, loaded.num_frames, loaded.num_frames_from) == (
        "text4vis",
        4,
        "file name",
    )
    assert loaded.templates == ("a video of a person {}.",)
    assert loaded.base == base
    assert loaded.base_sha256 == hashlib.sha256(base.read_bytes()).hexdigest()
    with torch.no_grad():
        model.towers.text_projection.copy_(model.towers.text_projection.half())
    check_same(loaded.model, model, clips, tokens)


def test_text4vis_without_a_head_loads_as_mean_pooling(small_model, save, clips, tokens) -> None:
    model = small_model("meanp")
    base = save(open_clip_like_openai(model), "clip.pt")
    loaded = load_checkpoint(save(text4vis(model)), base=base)
    assert (loaded.family, loaded.model.config.visual_prompt) == ("text4vis", "meanp")
    check_same(loaded.model, model, clips, tokens)


def open_clip_like_openai(model: ActionClipNetwork) -> dict:
    """Plain CLIP in fp32 that does not say whose it is; good enough as a base."""
    return model.towers.state_dict()


def test_vificlip_files_load_with_the_token_embedding_of_their_base(
    small_model, save, clips, tokens
) -> None:
    model = small_model("meanp")
    with torch.no_grad():
        model.towers.logit_scale.fill_(float(np.log(50)))
    base = save(open_clip_like_openai(model), "clip.pt")
    loaded = load_checkpoint(save(vificlip(model)), base=base)
    assert loaded.family == "vificlip"
    assert loaded.model.config.scale == pytest.approx(50)
    assert loaded.templates == ("a photo of a {}.",)
    assert loaded.pixel_mean == (0.485, 0.456, 0.406)
    assert "dropped prompt_learner.complete_text_embeddings" in loaded.notes[0]
    check_same(loaded.model, model, clips, tokens)


def test_vificlip_with_learned_prompts_is_refused(small_model, save) -> None:
    content = vificlip(small_model("meanp"))
    content["model"]["module.prompt_learner.ctx"] = torch.zeros(4, 64)
    base = save(open_clip_like_openai(small_model("meanp")), "clip.pt")
    with pytest.raises(CheckpointError, match=r"1 left over: prompt_learner.ctx"):
        load_checkpoint(save(content), base=base)


def test_bike_files_load_in_their_mean_pooling_form(small_model, save, clips, tokens) -> None:
    model = small_model("transf")
    loaded = load_checkpoint(save(bike(model)))
    assert (loaded.family, loaded.model.config.visual_prompt) == ("bike", "transf")
    assert loaded.templates == ("This is a video about {}",)
    assert "interaction DP" in loaded.notes[0]
    check_same(loaded.model, model, clips, tokens)


def test_a_resnet_loads_without_its_count_of_batches(small_model, save, tokens) -> None:
    model = small_model(
        "meanp", vision_layers=(1, 1, 1, 1), vision_width=8, patch_size=None, input_size=64
    )
    content = {
        key: value
        for key, value in openai(model).items()
        if not key.endswith("num_batches_tracked")
    }
    with torch.no_grad():
        model.towers.text_projection.copy_(model.towers.text_projection.half())
    loaded = load_checkpoint(save(content))
    check_same(loaded.model, model, torch.randn(1, 4, 3, 64, 64), tokens)


def test_a_checkpoint_can_be_a_base(small_model, save, clips, tokens) -> None:
    model = small_model("transf")
    base = save(original(model), "whole.pt")
    loaded = load_checkpoint(save(text4vis(model)), base=base)
    check_same(loaded.model, model, clips, tokens)


def test_a_base_that_is_not_needed_is_noted(small_model, save) -> None:
    path = save(original(small_model("transf")))
    loaded = load_checkpoint(path, base=path)
    assert (loaded.base, loaded.base_sha256) == (None, None)
    assert "was not needed" in loaded.notes[0]


def test_the_hash_of_the_file_is_kept(small_model, save) -> None:
    path = save(original(small_model("meanp")))
    loaded = load_checkpoint(str(path))
    assert loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_model_does_not_depend_on_the_file_any_more(small_model, save, clips) -> None:
    path = save(original(small_model("meanp")))
    model = load_checkpoint(path).model
    with torch.no_grad():
        before = model.encode_video(clips)
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(model.encode_video(clips), before)


@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("vit-b-16-8f.pt", 8),
        ("vit-b-16-32f.pt", 32),
        ("vit-32-8f.pt", 8),
        ("k400-vitb-32-f16.pt", 16),
        ("K400_ViTB16_F8.pth", 8),
        ("vifi_16_frames.pth", 16),
        ("tiny_Transf_8f.pt", 8),
        ("8f.pt", 8),
    ],
)
def test_the_files_name_may_tell_the_number_of_frames(
    small_model, save, name: str, num_frames: int
) -> None:
    loaded = load_checkpoint(save(original(small_model("meanp")), name))
    assert (loaded.num_frames, loaded.num_frames_from) == (num_frames, "file name")
    assert loaded.model.config.num_frames == num_frames


@pytest.mark.parametrize(
    "name", ["model_best.pt", "ViT-B-32.pt", "a1b2f8c.pt", "fp16.pt", "32fps.pt"]
)
def test_a_name_that_tells_no_number_of_frames_asks_for_it(small_model, save, name: str) -> None:
    path = save(original(small_model("meanp")), name)
    with pytest.raises(CheckpointError, match=r"how many frames .* its name has none; give num_fr"):
        load_checkpoint(path)


def test_a_name_with_two_numbers_of_frames_asks_which(small_model, save) -> None:
    path = save(original(small_model("meanp")), "8f-to-16f.pt")
    with pytest.raises(CheckpointError, match="its name has more than one; give num_frames"):
        load_checkpoint(path)


def test_the_option_goes_before_table_and_name(small_model, save) -> None:
    path = save(mmaction2(small_model("transf", rows=4)), "x-3f.pth")
    loaded = load_checkpoint(path, num_frames=2)
    assert (loaded.num_frames, loaded.num_frames_from) == (2, "option")


@pytest.mark.parametrize("prompt", ["transf_cls", "joint"])
def test_a_table_of_fixed_length_tells_the_number_of_frames(small_model, save, prompt) -> None:
    loaded = load_checkpoint(save(original(small_model(prompt)), "x-3f.pt"))
    assert (loaded.num_frames, loaded.num_frames_from) == (4, "position table")


def test_more_frames_than_the_table_has_are_refused(small_model, save) -> None:
    path = save(mmaction2(small_model("transf", rows=4)))
    with pytest.raises(ValueError, match=r"num_frames is 8, .* allows T from 1 to 4"):
        load_checkpoint(path, num_frames=8)


def test_the_choice_of_frames_is_logged(small_model, save, caplog) -> None:
    path = save(original(small_model("meanp")))
    with caplog.at_level(logging.INFO, "actionclip_deploy"):
        load_checkpoint(path)
    assert "family original, T = 4 from the file name" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_can_be_named(small_model, save, family: str) -> None:
    writers = {f.__name__: f for f in (original, mmaction2, openai, open_clip, text4vis, vificlip)}
    writers |= {"bike": bike, "open_clip-quickgelu": open_clip}
    prompt = "transf" if family in ("original", "mmaction2", "bike", "text4vis") else "meanp"
    model = small_model(prompt)
    content = writers[family](model)
    base = save(open_clip_like_openai(model), "clip.pt")
    loaded = load_checkpoint(save(content), family=family, num_frames=4, base=base)
    assert loaded.family == family
    assert loaded.model.config.quick_gelu == (family != "open_clip")


def test_an_unknown_family_is_refused(save) -> None:
    with pytest.raises(ValueError, match="family is 'clip'; it has to be 'auto' or one of"):
        load_checkpoint(save({"a": torch.zeros(1)}), family="clip")


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_tower_can_be_random(small_model, save, clips, tokens, tower: str) -> None:
    model = small_model("transf")
    loaded = load_checkpoint(save(original(model)), random_towers=[tower], seed=5).model
    with torch.no_grad():
        video = torch.allclose(loaded.encode_video(clips), model.encode_video(clips))
        text = torch.allclose(loaded.encode_text(tokens), model.encode_text(tokens))
    assert (video, text) == (tower != "visual", tower != "text")
    for key, value in loaded.visual_prompt.state_dict().items():
        assert torch.equal(value, model.visual_prompt.state_dict()[key])


@pytest.mark.parametrize("prompt", [*VISUAL_PROMPTS, *COMBINED_PROMPTS])
def test_saving_in_the_originals_format_and_loading_loses_nothing(
    small_model, tmp_path, prompt: str
) -> None:
    model = small_model(prompt)
    save_original_checkpoint(model, tmp_path / "saved-4f.pt", epoch=9)
    loaded = load_checkpoint(tmp_path / "saved-4f.pt")
    assert loaded.family == "original"
    assert loaded.model.config == model.config
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    content = torch.load(tmp_path / "saved-4f.pt", weights_only=True)
    assert content["epoch"] == 9
    assert all(key.startswith("module.") for key in content["fusion_model_state_dict"])
    shifted = [key for key in content["model_state_dict"] if ".net." in key]
    assert len(shifted) == (2 * 12 if prompt.startswith("shift") else 0)


def test_saving_in_mixed_precision_stores_the_types_of_a_published_file(
    tiny_checkpoints, golden_weights, tmp_path
) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    save_original_checkpoint(model, tmp_path / "mixed.pt", mixed=True)
    content = torch.load(tmp_path / "mixed.pt", weights_only=True)
    stored = prefixed(content["model_state_dict"], "model/")
    stored |= prefixed(content["fusion_model_state_dict"], "head_Transf/")
    golden = {k: v for k, v in golden_weights.items() if k.startswith(("model/", "head_Transf/"))}
    assert stored.keys() == golden.keys()
    for key, value in golden.items():
        assert stored[key].numpy().dtype == value.dtype, key
        assert np.array_equal(stored[key].numpy(), value), key


@pytest.mark.parametrize("fields", [{"quick_gelu": False}, {"prompt_norm_eps": 1e-5}])
def test_what_the_originals_format_cannot_say_is_refused(small_model, tmp_path, fields) -> None:
    with pytest.raises(ValueError, match="original's format means True and 1e-12"):
        save_original_checkpoint(small_model("transf", **fields), tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    small_model, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: object, file) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    path = tmp_path / "saved.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_original_checkpoint(small_model("meanp"), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_saved_files_permissions_are_those_of_any_new_file(small_model, tmp_path) -> None:
    other: Path = tmp_path / "other"
    other.touch()
    save_original_checkpoint(small_model("meanp"), tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_mode == other.stat().st_mode


def test_weights_that_are_no_numbers_are_named(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    data = torch.load(tiny_checkpoints["Transf"], weights_only=True)
    data["model_state_dict"]["visual.proj"][0, 0] = float("nan")
    path = tmp_path / "diverged_8f.pt"
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=r"NaN or infinity\) in 1 tensors, .*visual\.proj"):
        load_checkpoint(path)


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
    with pytest.raises(CheckpointError, match="lacks the tensor 'text_projection', which gives"):
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


@pytest.mark.parametrize("shifted", [True, False])
def test_frames_mixed_by_joint_and_something_else_are_refused(shifted: bool) -> None:
    towers = {"visual.time_embedding": torch.zeros(4, 64)}
    head = {} if shifted else {"transformer.resblocks.0.ln_1.bias": torch.zeros(1)}
    weights = FamilyWeights("original", towers, head, shifted=shifted)
    match = r"mixes frames inside the visual tower .'joint'. and has (weights of a temp|'shift')"
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


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("original", "bike")])
def test_a_forced_family_does_not_drop_a_trained_head(content, save, small_model, family) -> None:
    base = save(open_clip_like_openai(small_model("meanp")), "clip.pt")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(save(content), family=family, num_frames=4, base=base)
    assert re.search(
        "left over: fusion_model_state_dict.module.frame_position|not the structure of the family",
        str(refused.value),
    )


@pytest.mark.parametrize(
    ("writer", "extra"),
    [
        (original, {"adapter_state_dict": {"weight": torch.zeros(2)}}),
        (original, {"classifier": [torch.zeros(2)]}),
        (mmaction2, {"model": {"weight": torch.zeros(2)}}),
        (text4vis, {"text_state_dict": {"weight": torch.zeros(2)}}),
        (lambda model: {"state_dict": openai(model)}, {"head": torch.zeros(2)}),
    ],
)
def test_tensors_beside_the_weights_are_left_over(small_model, save, writer, extra) -> None:
    content = writer(small_model("transf" if writer is mmaction2 else "meanp"))
    with pytest.raises(CheckpointError, match=f"left over: {next(iter(extra))}"):
        load_checkpoint(save(content | extra))


def test_the_state_of_training_is_no_weight(small_model, save, clips, tokens) -> None:
    model = small_model("transf")
    content = original(model)
    content["optimizer_state_dict"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    content |= {"lr_scheduler": {"t": torch.ones(1)}, "scaler": {"s": torch.ones(1)}}
    content |= {"rng_state": torch.zeros(3), "best_acc1": torch.tensor(77.0)}
    content["model_state_dict"] = dict(content["model_state_dict"])
    content["model_state_dict"]["position_ids"] = torch.arange(12)
    content["state_dict_ema"] = {"visual.proj": torch.zeros(3)}
    loaded = load_checkpoint(save(content))
    check_same(loaded.model, model, clips, tokens)
    assert any("state_dict_ema was left alone" in note for note in loaded.notes)


def renamed(content: dict, rename) -> dict:
    """Every key of a tensor under another name."""
    return {
        name: {rename(key): value for key, value in part.items()}
        if isinstance(part, dict) and name not in ("optimizer_state_dict", "meta")
        else part
        for name, part in content.items()
    }


@pytest.mark.parametrize("writer", [original, mmaction2, open_clip, vificlip, text4vis])
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: "_orig_mod." + key,
        lambda key: "module._orig_mod." + key,
        lambda key: "_orig_mod.module._orig_mod." + key,
        lambda key: "module." + key.replace("resblocks.0.", "resblocks.0._orig_mod."),
        lambda key: key.replace("visual.", "visual._orig_mod.", 1),
        lambda key: "_fsdp_wrapped_module." + key.replace("0.", "0._checkpoint_wrapped_module.", 1),
        lambda key: "module._fsdp_wrapped_module._orig_mod." + key,
    ],
)
def test_names_of_wrapping_modules_change_nothing(
    small_model, save, clips, tokens, writer, rename
) -> None:
    model = small_model("transf" if writer in (original, mmaction2, text4vis) else "meanp")
    base = save(open_clip_like_openai(model), "clip.pt")
    plain = load_checkpoint(save(writer(model)), num_frames=4, base=base)
    loaded = load_checkpoint(save(renamed(writer(model), rename)), num_frames=4, base=base)
    assert loaded.family == plain.family
    assert loaded.model.config == plain.model.config
    assert loaded.templates == plain.templates
    check_same(loaded.model, plain.model, clips, tokens)


def test_a_compiled_head_that_nothing_else_wraps_is_the_originals(small_model, save) -> None:
    content = original(small_model("transf"))
    head = content["fusion_model_state_dict"]
    content["fusion_model_state_dict"] = {
        key.replace("module.", "_orig_mod."): value for key, value in head.items()
    }
    assert load_checkpoint(save(content)).family == "original"


def test_two_tensors_of_one_name_are_refused(content, save) -> None:
    content["model_state_dict"]["_orig_mod.visual.proj"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"more than one tensor for visual.proj"):
        load_checkpoint(save(content))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.arange(32), "has dtype int64"),
        (torch.ones(32, dtype=torch.bool), "has dtype bool"),
        (torch.zeros(32, dtype=torch.complex64), "has dtype complex64"),
        (torch.zeros(32).to(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
        (None, r"is quantised \(qint8"),
        (torch.eye(4).to_sparse(), r"is sparse \(sparse_coo"),
        (torch.zeros(32, device="meta"), "has a shape and no values"),
        (torch.zeros(0), "has no values, shape"),
        (torch.zeros(1).expand(10**7, 2500), r"has shape .* and only 1 stored values"),
    ],
)
@pytest.mark.parametrize("part", ["model_state_dict", "fusion_model_state_dict"])
def test_tensors_that_are_no_weights_are_named(content, save, tensor, what, part) -> None:
    key = {
        "model_state_dict": "token_embedding.weight",
        "fusion_model_state_dict": "module.transformer.resblocks.0.ln_1.bias",
    }[part]
    if tensor is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # quantised tensors are on their way out
            tensor = torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8)
    content[part][key] = tensor
    match = rf"has the tensor {key.removeprefix('module.')}, which {what}.*weights are dense"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(save(content))


def test_more_weights_than_a_machine_holds_are_refused_unread(
    content, save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "machine_memory_bytes", lambda: 100_000)
    with pytest.raises(CheckpointError, match=r"has \d+ parameters, most of them in .* 100000 by"):
        load_checkpoint(save(content))


def test_a_token_table_of_100_gb_is_refused_before_it_takes_memory(small_model, tmp_path) -> None:
    tensors = dict(small_model("meanp").towers.state_dict())
    shape = [50_000_000, 512]
    header = {
        "token_embedding.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [0, math.prod(shape) * 4],
        }
    }
    start = math.prod(shape) * 4
    rest = b""
    for key, value in tensors.items():
        if key != "token_embedding.weight":
            data = value.numpy().tobytes()
            places = [start + len(rest), start + len(rest) + len(data)]
            header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": places}
            rest += data
    text = json.dumps(header).encode()
    path = tmp_path / "open_clip_huge.safetensors"
    with path.open("wb") as file:  # nearly all of it is a hole that takes no space
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(start, os.SEEK_CUR)
        file.write(rest)
    match = r"2560\d+ parameters, most of them in token_embedd|1024\d+ bytes, and this machine has"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(path, num_frames=4)


@pytest.mark.parametrize("part", [None, "model_state_dict", "fusion_model_state_dict"])
@pytest.mark.parametrize("key", [3, ("a", 1), None, b"visual.proj"])
def test_keys_that_are_not_text_are_refused(content, save, part, key) -> None:
    (content if part is None else content[part])[key] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"has keys that are not text \(.*state_dict\(\)"):
        load_checkpoint(save(content))


@pytest.mark.parametrize("value", [1000.0, -1000.0, 11.0])
def test_a_logit_scale_beyond_sense_is_refused(content, save, value: float) -> None:
    content["model_state_dict"]["logit_scale"] = torch.tensor(value)
    with pytest.raises(CheckpointError, match=rf"logit_scale {value:g}; .* from -10 to 10"):
        load_checkpoint(save(content))


def test_a_logit_scale_of_several_is_refused(content, save) -> None:
    content["model_state_dict"]["logit_scale"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"logit_scale of shape \(3,\); CLIP has a single"):
        load_checkpoint(save(content))


def test_blocks_that_are_shifted_in_part_are_refused(content, save) -> None:
    towers = content["model_state_dict"]
    content["model_state_dict"] = {
        k.replace("visual.transformer.resblocks.1.", "visual.transformer.resblocks.1.net."): v
        for k, v in towers.items()
    }
    with pytest.raises(CheckpointError, match=r"shifts frames in some blocks .* and not in all"):
        load_checkpoint(save(content))


def test_heads_that_do_not_divide_a_width_are_refused(small_model, save) -> None:
    content = original(small_model("meanp"))
    for key, value in dict(content["model_state_dict"]).items():
        if not key.startswith("visual."):
            continue
        wide = [{64: 200, 192: 600, 256: 800}.get(size, size) for size in value.shape]
        content["model_state_dict"][key] = torch.zeros(wide)
    with pytest.raises(CheckpointError, match="no CLIP has"):
        load_checkpoint(save(content))


def test_a_prompt_that_is_left_out_on_purpose_is_noted(content, save) -> None:
    loaded = load_checkpoint(save(content), new_prompt=True, visual_prompt="meanp")
    assert any("'transf'" in note and "left out" in note for note in loaded.notes)


def test_the_result_of_a_run_with_a_classifier_is_refused_by_what_it_is(
    small_model, tmp_path: Path
) -> None:
    path = tmp_path / "renamed-4f.pt"
    layer = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}
    save_original_checkpoint(small_model("transf"), path, classifier=layer)
    with pytest.raises(CheckpointError, match=r"model.classifier: true .*metrics.json; train with"):
        load_checkpoint(path)
    assert load_checkpoint(path, with_classifier=True).family == "original"
    assert load_checkpoint(path, base=None, with_classifier=True).notes == ()


def test_a_classifier_of_an_earlier_version_lies_beside_its_model(small_model, tmp_path) -> None:
    save_original_checkpoint(small_model("transf"), tmp_path / "model.pt")
    layer = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}
    safetensors.torch.save_file(layer, tmp_path / "classifier.safetensors")
    with pytest.raises(CheckpointError, match=r"model.classifier: true \(classifier.safetensors\)"):
        load_checkpoint(tmp_path / "model.pt", num_frames=4)
    with pytest.raises(CheckpointError, match="is one linear layer, such as the classifier"):
        load_checkpoint(tmp_path / "classifier.safetensors", num_frames=4)


@pytest.mark.parametrize(
    ("stated", "found"),
    [(2.5, 2.5), (10, 10.0), (None, None), (-1.0, None), (1e9, None), (True, None), ("4", None)],
)
def test_a_checkpoint_says_how_long_the_clips_of_its_training_were(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, stated: object, found: float | None
) -> None:
    content = torch.load(tiny_checkpoints["meanP"], weights_only=True)
    if stated is not None:
        content["clip_seconds"] = stated
    path = tmp_path / "seconds_8f.pt"
    torch.save(content, path)
    assert load_checkpoint(path).clip_seconds == found


def test_the_length_of_clips_is_saved_with_the_weights(tmp_path: Path) -> None:
    model = load_checkpoint("motions").model
    save_original_checkpoint(model, tmp_path / "saved_8f.pt", clip_seconds=3.25)
    assert load_checkpoint(tmp_path / "saved_8f.pt").clip_seconds == 3.25
    assert load_checkpoint("motions").clip_seconds == 2.0
