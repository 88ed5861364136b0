from __future__ import annotations

import pytest
import torch

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.model import VISUAL_PROMPTS, build_model

# Float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("visual_prompt", VISUAL_PROMPTS)
def test_every_visual_prompt_embeds_clips_to_unit_norm(small_model, clips, visual_prompt) -> None:
    model = small_model(visual_prompt)
    embeddings = model.encode_video(clips)
    assert embeddings.shape == (2, 32)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    features = model.encode_video_features(clips)
    torch.testing.assert_close(embeddings, features / features.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("visual_prompt", ["meanp", "conv1d", "lstm", "transf", "transf_cls"])
def test_frames_may_be_encoded_before_they_are_fused(small_model, clips, visual_prompt) -> None:
    model = small_model(visual_prompt)
    assert model.frames_are_independent
    features = torch.stack([model.encode_frames(clip) for clip in clips])
    torch.testing.assert_close(
        model.encode_clips(features), model.encode_video(clips), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("visual_prompt", ["joint", "shift"])
def test_frames_of_a_mixing_tower_cannot_be_encoded_alone(
    small_model, clips, visual_prompt
) -> None:
    model = small_model(visual_prompt)
    assert not model.frames_are_independent
    with pytest.raises(ValueError, match=f"'{visual_prompt}' mixes the frames.*use encode_video"):
        model.encode_frames(clips[0])


def test_joint_has_no_frame_features_to_fuse(small_model) -> None:
    with pytest.raises(ValueError, match="one feature for a clip and none for its frames"):
        small_model("joint").encode_clips(torch.zeros(1, 4, 32))


def test_prompts_are_embedded_to_unit_norm(small_model, tokens) -> None:
    embeddings = small_model().encode_text(tokens)
    assert embeddings.shape == (3, 32)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


def test_a_forward_pass_embeds_clips_and_prompts(small_model, clips, tokens) -> None:
    model = small_model()
    video, text = model(clips, tokens)
    torch.testing.assert_close(video, model.encode_video(clips))
    torch.testing.assert_close(text, model.encode_text(tokens))


def test_frames_of_another_size_are_refused(small_model) -> None:
    with pytest.raises(ShapeError, match=r"frames have shape \(2, 3, 32, 64\); give \(any, 3, 32"):
        small_model().encode_frames(torch.zeros(2, 3, 32, 64))


def test_clips_without_a_batch_are_refused(small_model) -> None:
    with pytest.raises(ShapeError, match=r"clips have shape \(4, 3, 32, 32\); give \(any, any, 3"):
        small_model().encode_video(torch.zeros(4, 3, 32, 32))


def test_features_of_another_width_are_refused(small_model) -> None:
    with pytest.raises(ShapeError, match=r"frame features have shape .*; give \(any, any, 32\)"):
        small_model().encode_clips(torch.zeros(1, 4, 31))


def test_more_frames_than_positions_are_refused(small_model) -> None:
    with pytest.raises(ShapeError, match=r"T = 13 frames .* positions for 12; give at most 12"):
        small_model("transf").encode_clips(torch.zeros(1, 13, 32))


@pytest.mark.parametrize("visual_prompt", ["transf_cls", "joint"])
def test_a_fixed_number_of_frames_allows_no_other(small_model, clips, visual_prompt) -> None:
    with pytest.raises(ShapeError, match=r"T = 3 frames .* positions for 4; give exactly 4"):
        small_model(visual_prompt).encode_video(clips[:, :3])


@pytest.mark.parametrize("visual_prompt", ["meanp", "conv1d", "lstm", "transf", "shift"])
@pytest.mark.parametrize("num_frames", [1, 2, 11])
def test_other_prompts_run_any_number_of_frames(
    small_model, clips, visual_prompt, num_frames
) -> None:
    repeated = clips[:, :1].expand(-1, num_frames, -1, -1, -1)
    assert small_model(visual_prompt).encode_video(repeated).shape == (2, 32)


def test_tokens_longer_than_the_context_are_refused(small_model) -> None:
    with pytest.raises(ShapeError, match="longer than the context of 12; shorten"):
        small_model().encode_text(torch.zeros(1, 13, dtype=torch.int64))


def test_a_seed_makes_the_same_weights_and_leaves_the_global_generator_alone(small_config) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(small_config, seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, third = build_model(small_config, seed=1), build_model(small_config, seed=2)
    conv = "towers.visual.conv1.weight"
    assert torch.equal(first.state_dict()[conv], second.state_dict()[conv])
    assert not torch.equal(first.state_dict()[conv], third.state_dict()[conv])
    assert not first.training


def test_without_a_seed_the_global_generator_is_used(small_config) -> None:
    torch.manual_seed(5)
    first = build_model(small_config).state_dict()["towers.visual.proj"]
    second = build_model(small_config).state_dict()["towers.visual.proj"]
    assert not torch.equal(first, second)


def test_towers_are_initialised_as_in_the_original(small_model) -> None:
    towers = small_model().towers
    assert towers.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert towers.positional_embedding.std().item() == pytest.approx(0.01, rel=0.15)
    assert towers.visual.proj.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert towers.visual.positional_embedding.std().item() == pytest.approx(64**-0.5, rel=0.15)
    assert towers.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_a_resnet_encodes_frames_too(small_model) -> None:
    model = small_model(
        vision_layers=(1, 1, 1, 1), vision_width=8, patch_size=None, input_size=64, backbone="RN"
    )
    assert model.encode_video(torch.zeros(1, 4, 3, 64, 64)).shape == (1, 32)


@pytest.mark.parametrize("visual_prompt", VISUAL_PROMPTS)
def test_every_parameter_that_is_read_can_be_trained(small_model, clips, visual_prompt) -> None:
    model = small_model(visual_prompt).train()
    with torch.enable_grad():
        model.encode_video(clips).sum().backward()
    untouched = {
        key
        for key, value in model.named_parameters()
        if value.grad is None and key.startswith(("towers.visual.", "visual_prompt."))
    }
    unread = {"visual_prompt.frame_position_embeddings.weight"}
    assert untouched <= (set() if visual_prompt == "transf" else unread)
