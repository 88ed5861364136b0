"""The model: its towers, its embeddings and its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.model import (
    VISUAL_PROMPTS,
    ActionClipNetwork,
    ModelConfig,
    build_model,
    count_flops,
    count_macs,
    count_parameters,
)
from actionclip_deploy.model.network import (
    causal_mask,
    encode_jointly,
    encode_shifted,
    encode_tokens,
    shift_frames,
)

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


# Float32 through two blocks against float64.
TOWER_TOLERANCE = 1e-5


def layer_norm(x: np.ndarray, norm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    return scaled * norm.weight.numpy() + norm.bias.numpy()


def run_block(x: np.ndarray, block) -> np.ndarray:
    """One pre-norm block with one attention head, over tokens (L, width), in numpy."""
    width = x.shape[-1]
    normed = layer_norm(x, block.ln_1)
    qkv = normed @ block.attn.in_proj_weight.numpy().T + block.attn.in_proj_bias.numpy()
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    powers = np.exp(q @ k.T / np.sqrt(width))
    mixed = (powers / powers.sum(-1, keepdims=True)) @ v
    out = block.attn.out_proj
    x = x + mixed @ out.weight.numpy().T + out.bias.numpy()
    fc, proj = block.mlp.c_fc, block.mlp.c_proj
    hidden = layer_norm(x, block.ln_2) @ fc.weight.numpy().T + fc.bias.numpy()
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    return x + hidden @ proj.weight.numpy().T + proj.bias.numpy()


def patch_tokens(visual, frame: np.ndarray, patch: int) -> np.ndarray:
    """Tokens of one frame (3, S, S) with positions but no class token, patch by patch."""
    kernel = visual.conv1.weight.numpy().reshape(visual.conv1.weight.shape[0], -1)
    grid = frame.shape[-1] // patch
    rows = []
    for row in range(grid):
        for column in range(grid):
            pixels = frame[:, row * patch :, column * patch :][:, :patch, :patch]
            position = visual.positional_embedding[1 + row * grid + column].numpy()
            rows.append(kernel @ pixels.reshape(-1) + position)
    return np.stack(rows)


def class_token(visual) -> np.ndarray:
    return (visual.class_embedding + visual.positional_embedding[0]).numpy()


def finish(visual, tokens: np.ndarray) -> np.ndarray:
    return layer_norm(tokens[0], visual.ln_post) @ visual.proj.numpy()


def test_joint_attends_over_the_patches_of_all_frames(small_model, clips) -> None:
    model = small_model("joint")
    visual = model.towers.visual
    expected = []
    for clip in clips.double().numpy():
        tokens = [class_token(visual)[None]]
        for t, frame in enumerate(clip):
            tokens.append(patch_tokens(visual, frame, 16) + visual.time_embedding[t].numpy())
        x = layer_norm(np.concatenate(tokens), visual.ln_pre)
        for block in visual.transformer.resblocks:
            x = run_block(x, block)
        expected.append(finish(visual, x))
    got = encode_jointly(visual, clips).numpy()
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=TOWER_TOLERANCE)


def test_joint_tells_the_order_of_frames_by_its_time_embedding_alone(small_model, clips) -> None:
    visual = small_model("joint").towers.visual
    assert not torch.allclose(encode_jointly(visual, clips), encode_jointly(visual, clips.flip(1)))
    visual.time_embedding.zero_()
    torch.testing.assert_close(
        encode_jointly(visual, clips),
        encode_jointly(visual, clips.flip(1)),
        rtol=0,
        atol=TOWER_TOLERANCE,
    )


def test_shift_takes_neighbours_channels_before_every_block(small_model, clips) -> None:
    visual = small_model("shift").towers.visual
    fold = 64 // 8
    expected = []
    for clip in clips.double().numpy():
        frames = [
            layer_norm(np.vstack([class_token(visual), patch_tokens(visual, f, 16)]), visual.ln_pre)
            for f in clip
        ]
        for block in visual.transformer.resblocks:
            shifted = []
            for t, tokens in enumerate(frames):
                moved = tokens.copy()
                moved[1:, :fold] = frames[t + 1][1:, :fold] if t + 1 < len(frames) else 0
                moved[1:, fold : 2 * fold] = frames[t - 1][1:, fold : 2 * fold] if t else 0
                shifted.append(moved)
            frames = [run_block(tokens, block) for tokens in shifted]
        expected.append([finish(visual, tokens) for tokens in frames])
    got = encode_shifted(visual, clips).numpy()
    np.testing.assert_allclose(got, np.array(expected), rtol=0, atol=TOWER_TOLERANCE)


def test_shift_of_one_frame_leaves_zeros_in_a_quarter_of_the_channels() -> None:
    shifted = shift_frames(torch.ones(2, 3, 16), 1)
    expected = torch.ones(2, 3, 16)
    expected[:, 1:, :4] = 0
    assert torch.equal(shifted, expected)


def test_clips_of_a_batch_do_not_shift_into_each_other(small_model, clips) -> None:
    visual = small_model("shift").towers.visual
    together = encode_shifted(visual, clips)
    alone = torch.cat([encode_shifted(visual, clip[None]) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOWER_TOLERANCE)


def test_the_causal_mask_hides_what_comes_later() -> None:
    mask = causal_mask(3)
    inf = float("inf")
    assert mask.tolist() == [[0, -inf, -inf], [0, 0, -inf], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_short_prompts_encode_as_open_clip_encodes_them_padded(small_model, tokens, dtype) -> None:
    towers = small_model().towers
    padded = torch.nn.functional.pad(tokens, (0, 12 - tokens.shape[1]))
    torch.testing.assert_close(
        encode_tokens(towers, tokens.to(dtype)),
        towers.encode_text(padded),
        rtol=0,
        atol=TOWER_TOLERANCE,
    )


def test_padding_behind_the_end_of_text_changes_nothing(small_model, tokens) -> None:
    towers = small_model().towers
    other = tokens.clone()
    other[1, 3:] = 11
    torch.testing.assert_close(
        encode_tokens(towers, other), encode_tokens(towers, tokens), rtol=0, atol=TOWER_TOLERANCE
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
        model = ActionClipNetwork(config)
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


def count_by_running(model: ActionClipNetwork, clips: torch.Tensor) -> int:
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
