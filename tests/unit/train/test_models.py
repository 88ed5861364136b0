from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fakes import toy_config

from actionclip_deploy.errors import CheckpointError, TrainingError
from actionclip_deploy.model import VISUAL_PROMPTS, load_checkpoint, save_original_checkpoint
from actionclip_deploy.train.models import TrainedModel, bound_scale, build_trained_model
from actionclip_deploy.train.run_config import TrainConfig


def build(*overrides: str, seed: int = 0) -> TrainedModel:
    config: TrainConfig = toy_config("unused", *overrides)
    return build_trained_model(config.model, config.loss, num_labels=4, seed=seed)


def from_checkpoint(path: Path, *overrides: str) -> TrainedModel:
    start = [f"model.checkpoint={path}", "model.sizes=null", "model.prompt_layers=null"]
    return build(*start, "model.num_frames=8", *overrides)


def trained_names(model: TrainedModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def weights(model: TrainedModel, prefix: str) -> torch.Tensor:
    state = model.model.state_dict()
    return torch.cat([v.flatten() for k, v in state.items() if k.startswith(prefix)])


@pytest.mark.parametrize("prompt", VISUAL_PROMPTS)
def test_a_new_model_survives_the_originals_format(tmp_path: Path, prompt: str) -> None:
    model = build(f"model.visual_prompt={prompt}")
    save_original_checkpoint(model.model, tmp_path / "model.pt")
    again = load_checkpoint(tmp_path / "model.pt", num_frames=4).model
    assert (again.config.visual_prompt, again.config.num_frames) == (prompt, 4)
    pixels = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.model.eval().encode_video(pixels)
        assert torch.equal(again.encode_video(pixels), wanted)


def test_random_weights_follow_from_the_seed() -> None:
    assert torch.equal(weights(build(), ""), weights(build(), ""))
    assert not torch.equal(weights(build(), ""), weights(build(seed=1), ""))


def test_a_backbone_gives_its_sizes() -> None:
    config = build(
        "model.sizes=null", "model.backbone=RN50", "model.visual_prompt=meanp"
    ).model.config
    assert (config.embed_dim, config.patch_size, config.visual_prompt) == (1024, None, "meanp")


def test_a_checkpoint_gives_its_weights(tiny_checkpoints: dict[str, Path]) -> None:
    model = from_checkpoint(tiny_checkpoints["Transf"])
    wanted = load_checkpoint(tiny_checkpoints["Transf"], num_frames=8).model.state_dict()
    found = model.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("option", "random", "kept"),
    [
        ("model.random_visual=true", "towers.visual.", "towers.transformer."),
        ("model.random_textual=true", "towers.transformer.", "towers.visual."),
    ],
)
def test_a_random_tower_leaves_the_other_as_it_was(
    tiny_checkpoints: dict[str, Path], option: str, random: str, kept: str
) -> None:
    plain = from_checkpoint(tiny_checkpoints["Transf"])
    changed = from_checkpoint(tiny_checkpoints["Transf"], option)
    assert torch.equal(weights(plain, kept), weights(changed, kept))
    assert torch.equal(weights(plain, "visual_prompt."), weights(changed, "visual_prompt."))
    correlation = np.corrcoef(weights(plain, random), weights(changed, random))[0, 1]
    norms = weights(plain, random).std() / weights(changed, random).std()
    assert not torch.equal(weights(plain, random), weights(changed, random))
    assert np.isfinite(correlation)
    assert 0.1 < norms < 10


def test_freezing_leaves_the_rest_to_be_trained() -> None:
    everything = trained_names(build())
    visual = {name for name in everything if name.startswith("model.towers.visual.")}
    prompt = {name for name in everything if name.startswith("model.visual_prompt.")}
    scale = {"model.towers.logit_scale"}
    assert trained_names(build("model.freeze=visual")) == everything - visual
    assert trained_names(build("model.freeze=textual")) == visual | prompt | scale
    assert trained_names(build("model.freeze=both")) == prompt | scale


@pytest.mark.parametrize("prompt", ["lstm", "conv1d", "transf_cls"])
def test_a_table_that_nothing_reads_is_not_trained(prompt: str) -> None:
    model = build(f"model.visual_prompt={prompt}")
    table = "model.visual_prompt.frame_position_embeddings.weight"
    everything = {name for name, _ in model.named_parameters()}
    assert trained_names(model) == everything - {table}


def test_the_table_of_transf_is_trained() -> None:
    table = "model.visual_prompt.frame_position_embeddings.weight"
    assert table in trained_names(build("model.visual_prompt=transf"))


def test_a_frozen_tower_stays_in_evaluation() -> None:
    model = build("model.sizes=null", "model.backbone=RN50", "model.visual_prompt=meanp")
    model.freeze("visual")
    model.train()
    assert not any(module.training for module in model.model.towers.visual.modules())
    assert model.model.towers.transformer.training


def test_a_classifier_trains_no_text() -> None:
    model = build("model.classifier=true")
    names = trained_names(model)
    assert {"classifier.weight", "classifier.bias"} <= names
    allowed = ("classifier.", "model.towers.visual.", "model.visual_prompt.")
    assert all(name.startswith(allowed) for name in names)
    frames = torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8)
    logits = model(frames, torch.zeros(2, 3, dtype=torch.int64))
    assert logits.shape == (2, 4)


def test_every_trained_parameter_gets_a_gradient() -> None:
    for prompt in VISUAL_PROMPTS:
        model = build(f"model.visual_prompt={prompt}")
        tokens = torch.tensor([[49406, 320, 49407], [49406, 7, 49407]])
        frames = torch.randint(0, 255, (2, 4, 3, 32, 32), dtype=torch.uint8)
        videos, texts, scale = model(frames, tokens)
        (scale * videos @ texts.T).square().sum().backward()
        without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert without == set(), prompt


def test_frames_are_normalised_as_clip_wants_them() -> None:
    model = build("model.visual_prompt=meanp").eval()
    frames = torch.randint(0, 255, (1, 4, 3, 32, 32), dtype=torch.uint8)
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    pixels = torch.from_numpy((frames.numpy() / 255 - mean) / std).float()
    with torch.no_grad():
        torch.testing.assert_close(model.embed_clips(frames), model.model.encode_video(pixels))


def test_the_scale_starts_where_it_is_told() -> None:
    logit_scale = build("loss.initial_scale=50", "loss.learn_scale=false").model.towers.logit_scale
    assert float(logit_scale.detach()) == pytest.approx(math.log(50))
    assert not logit_scale.requires_grad
    # A new CLIP starts at 1 / 0.07.
    assert float(build().model.towers.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)


def test_the_scale_is_bounded() -> None:
    model = build("loss.initial_scale=200")
    bound_scale(model, None)
    assert float(model.model.towers.logit_scale.detach().exp()) == pytest.approx(200)
    bound_scale(model, 100.0)
    assert float(model.model.towers.logit_scale.detach().exp()) == pytest.approx(100)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"Nothing is left to train with model.freeze both"):
        build("model.freeze=both", "model.visual_prompt=meanp", "loss.learn_scale=false")


def test_a_backbone_that_is_not_there_is_refused() -> None:
    with pytest.raises(TrainingError, match="cannot be built: open_clip has no model 'ViT-Q'"):
        build("model.sizes=null", "model.backbone=ViT-Q")


def test_weights_that_the_originals_format_cannot_hold_are_refused(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    # In mmaction2's format LayerNorms have another epsilon.
    content = torch.load(tiny_checkpoints["Transf"], weights_only=True)
    tensors = {f"clip.{key}": value for key, value in content["model_state_dict"].items()}
    for key, value in content["fusion_model_state_dict"].items():
        name = f"adapter.{key.removeprefix('module.')}"
        tensors[name] = value[:8] if "frame_position" in name else value
    torch.save({"state_dict": tensors}, tmp_path / "mmaction2.pth")
    with pytest.raises(TrainingError, match=r"epsilon 1e-05; the original's format"):
        from_checkpoint(tmp_path / "mmaction2.pth")


def test_another_visual_prompt_than_the_checkpoints_is_refused(
    tiny_checkpoints: dict[str, Path],
) -> None:
    with pytest.raises(CheckpointError, match="trained with visual prompt 'transf', and 'lstm'"):
        from_checkpoint(tiny_checkpoints["Transf"], "model.visual_prompt=lstm")


def test_a_new_visual_prompt_takes_the_place_of_the_checkpoints(
    tiny_checkpoints: dict[str, Path],
) -> None:
    plain = from_checkpoint(tiny_checkpoints["Transf"])
    new = ["model.new_prompt=true", "model.visual_prompt=transf_cls", "model.prompt_layers=2"]
    changed = from_checkpoint(tiny_checkpoints["Transf"], *new)
    assert torch.equal(weights(plain, "towers."), weights(changed, "towers."))
    config = changed.model.config
    assert (config.visual_prompt, config.prompt_layers) == ("transf_cls", 2)


def test_a_new_visual_prompt_leaves_nothing_of_the_one_before(
    small_mmaction2: Path,
) -> None:
    new = ["model.new_prompt=true", "model.visual_prompt=transf", "model.prompt_layers=1"]
    config = from_checkpoint(small_mmaction2, *new).model.config
    assert config.prompt_norm_eps == 1e-12  # and not mmaction2's, which belonged to its prompt


@pytest.fixture
def small_mmaction2(golden_weights: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The golden Transf model in the format of mmaction2."""

    def part(prefix: str, new: str) -> dict[str, torch.Tensor]:
        return {
            key.replace(prefix, new): torch.from_numpy(value.copy())
            for key, value in golden_weights.items()
            if key.startswith(prefix)
        }

    head = part("head_Transf/module.", "adapter.")
    path = tmp_path / "mmaction2.pth"
    torch.save({"state_dict": {**part("model/", "clip."), **head}}, path)
    return path


LINEAR = r"(c_fc|c_proj|out_proj|linear\d)\.weight"
POSITIONS = r"(frame_position_embeddings\.weight|pos_embed|time_embedding)"


@pytest.mark.parametrize("prompt", ["transf", "transf_cls", "joint"])
@pytest.mark.parametrize(
    ("key", "names"), [("prompt_std", LINEAR), ("prompt_position_std", POSITIONS)]
)
def test_a_new_prompt_starts_with_the_deviation_asked_for(
    prompt: str, key: str, names: str
) -> None:
    usual, other = (
        build(f"model.visual_prompt={prompt}", *extra).model.state_dict()
        for extra in ([], [f"model.{key}=0.7"])
    )
    new = [name for name in usual if name.startswith("visual_prompt") or "time_emb" in name]
    changed = {name for name in new if re.search(names, name)}
    assert bool(changed) == (prompt != "joint" or names == POSITIONS)
    for name, value in usual.items():
        if name in changed:
            assert float(other[name].std()) == pytest.approx(0.7)
            torch.testing.assert_close(other[name] / 0.7, value / value.std())
        else:
            assert torch.equal(other[name], value)


def test_visual_positions_start_with_the_deviation_asked_for() -> None:
    positions = build("model.sizes.position_std=0.9").model.towers.visual.positional_embedding
    assert float(positions.detach().std()) == pytest.approx(0.9)
