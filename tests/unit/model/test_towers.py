from __future__ import annotations

import numpy as np
import pytest
import torch

from actionclip_deploy.model.actionclip import (
    causal_mask,
    encode_jointly,
    encode_shifted,
    encode_tokens,
    shift_frames,
)

# Float32 through two blocks against float64.
TOLERANCE = 1e-5


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


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


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
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=TOLERANCE)


def test_joint_tells_the_order_of_frames_by_its_time_embedding_alone(small_model, clips) -> None:
    visual = small_model("joint").towers.visual
    assert not torch.allclose(encode_jointly(visual, clips), encode_jointly(visual, clips.flip(1)))
    visual.time_embedding.zero_()
    torch.testing.assert_close(
        encode_jointly(visual, clips), encode_jointly(visual, clips.flip(1)), rtol=0, atol=TOLERANCE
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
    np.testing.assert_allclose(got, np.array(expected), rtol=0, atol=TOLERANCE)


def test_shift_of_one_frame_leaves_zeros_in_a_quarter_of_the_channels() -> None:
    shifted = shift_frames(torch.ones(2, 3, 16), 1)
    expected = torch.ones(2, 3, 16)
    expected[:, 1:, :4] = 0
    assert torch.equal(shifted, expected)


def test_clips_of_a_batch_do_not_shift_into_each_other(small_model, clips) -> None:
    visual = small_model("shift").towers.visual
    together = encode_shifted(visual, clips)
    alone = torch.cat([encode_shifted(visual, clip[None]) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


def test_the_causal_mask_hides_what_comes_later() -> None:
    mask = causal_mask(3)
    inf = float("inf")
    assert mask.tolist() == [[0, -inf, -inf], [0, 0, -inf], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_short_prompts_encode_as_open_clip_encodes_them_padded(small_model, tokens, dtype) -> None:
    towers = small_model().towers
    padded = torch.nn.functional.pad(tokens, (0, 12 - tokens.shape[1]))
    torch.testing.assert_close(
        encode_tokens(towers, tokens.to(dtype)), towers.encode_text(padded), rtol=0, atol=TOLERANCE
    )


def test_padding_behind_the_end_of_text_changes_nothing(small_model, tokens) -> None:
    towers = small_model().towers
    other = tokens.clone()
    other[1, 3:] = 11
    torch.testing.assert_close(
        encode_tokens(towers, other), encode_tokens(towers, tokens), rtol=0, atol=TOLERANCE
    )
