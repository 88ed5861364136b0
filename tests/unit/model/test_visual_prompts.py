from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from actionclip_deploy.model.visual_prompts import (
    ClassTokenPrompt,
    Conv1dPrompt,
    LstmPrompt,
    MeanPool,
    TransformerPrompt,
    build_visual_prompt,
)

# Float32 sums in another order.
TOLERANCE = 1e-5
NUM_FRAMES = 4
WIDTH = 16


@pytest.fixture
def features() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, NUM_FRAMES, WIDTH)


def prompts() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "meanp": MeanPool(),
        "lstm": LstmPrompt(WIDTH, 77),
        "conv1d": Conv1dPrompt(WIDTH, 77),
        "transf": TransformerPrompt(WIDTH, 2, 2, 77, 1e-12),
        "transf_cls": ClassTokenPrompt(WIDTH, 2, NUM_FRAMES, 77),
    }


@pytest.mark.parametrize("name", list(prompts()))
def test_every_prompt_maps_frames_to_one_feature_per_clip(
    name: str, features: torch.Tensor
) -> None:
    prompt = prompts()[name].eval()
    with torch.no_grad():
        together = prompt(features)
        alone = torch.cat([prompt(features[i : i + 1]) for i in range(3)])
    assert together.shape == (3, WIDTH)
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", list(prompts()))
def test_every_prompt_gives_the_type_it_was_given(name: str, features: torch.Tensor) -> None:
    with torch.no_grad():
        assert prompts()[name].eval()(features.half()).dtype == torch.float16


@pytest.mark.parametrize("name", ["lstm", "conv1d", "transf", "transf_cls"])
def test_every_trained_prompt_passes_gradients_to_its_weights(
    name: str, features: torch.Tensor
) -> None:
    prompt = prompts()[name].train()
    prompt(features).square().sum().backward()
    unused = {"frame_position_embeddings.weight"} if name != "transf" else set()
    without = {key for key, value in prompt.named_parameters() if value.grad is None}
    assert without == unused


def test_conv1d_starts_as_a_shift_of_half_the_channels() -> None:
    kernels = Conv1dPrompt(WIDTH, 77).shift.weight[:, 0].tolist()
    before, same, after = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert kernels == [before] * 4 + [same] * 8 + [after] * 4


def test_conv1d_reads_time_and_channels_in_the_originals_mixed_order(
    features: torch.Tensor,
) -> None:
    prompt = Conv1dPrompt(WIDTH, 77)
    torch.nn.init.normal_(prompt.shift.weight)
    kernel = prompt.shift.weight.detach().numpy()[:, 0]
    clips = features.numpy()
    expected = np.zeros((3, WIDTH))
    for b, clip in enumerate(clips):
        rows = clip.reshape(-1).reshape(WIDTH, NUM_FRAMES)  # no transpose: the original's view
        padded = np.pad(rows, ((0, 0), (1, 1)))
        for c in range(WIDTH):
            for t in range(NUM_FRAMES):
                expected[b, c] += padded[c, t : t + 3] @ kernel[c] + clip[t, c]
    with torch.no_grad():
        got = prompt(features).numpy()
    np.testing.assert_allclose(got, expected / NUM_FRAMES, rtol=0, atol=TOLERANCE)


def test_transf_adds_no_positions_to_its_residual(features: torch.Tensor) -> None:
    prompt = TransformerPrompt(WIDTH, 2, 2, 77, 1e-12)
    for block in prompt.transformer.resblocks:  # blocks that pass their input on
        for matrix in (block.attn.out_proj, block.mlp.c_proj):
            nn.init.zeros_(matrix.weight)
            nn.init.zeros_(matrix.bias)
    positions = prompt.frame_position_embeddings.weight[:NUM_FRAMES].mean(0)
    with torch.no_grad():
        torch.testing.assert_close(prompt(features), 2 * features.mean(1) + positions)


def test_transf_uses_quick_gelu_and_the_epsilon_it_was_given() -> None:
    block = TransformerPrompt(WIDTH, 1, 2, 77, 1e-5).transformer.resblocks[0]
    assert (block.ln_1.eps, block.ln_2.eps) == (1e-5, 1e-5)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(block.mlp.gelu(x), x / (1 + torch.exp(-1.702 * x)))


def test_transf_cls_is_torchs_post_norm_encoder(features: torch.Tensor) -> None:
    prompt = ClassTokenPrompt(WIDTH, 2, NUM_FRAMES, 77).eval()
    layer = nn.TransformerEncoderLayer(d_model=WIDTH, nhead=8)  # torch's defaults, time first
    peer = nn.TransformerEncoder(
        layer, num_layers=2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
    ).eval()
    peer.load_state_dict(prompt.transformer.transformer_enc.state_dict())
    ours = prompt.transformer
    with torch.no_grad():
        tokens = torch.cat((ours.cls_token.repeat(3, 1, 1), features), dim=1) + ours.pos_embed
        expected = peer(tokens.transpose(0, 1))[0]
        torch.testing.assert_close(prompt(features), expected, rtol=0, atol=TOLERANCE)


def test_transf_cls_is_post_norm_with_relu(features: torch.Tensor) -> None:
    """One block by hand."""
    prompt = ClassTokenPrompt(WIDTH, 1, NUM_FRAMES, 77).eval()
    ours, layer = prompt.transformer, prompt.transformer.transformer_enc.layers[0]
    norm = ours.transformer_enc.norm
    with torch.no_grad():
        x = torch.cat((ours.cls_token.repeat(3, 1, 1), features), dim=1) + ours.pos_embed
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        torch.testing.assert_close(prompt(features), norm(x)[:, 0], rtol=0, atol=TOLERANCE)
    assert layer.norm1.eps == 1e-5


def test_transf_cls_runs_its_own_number_of_frames_alone(features: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        prompts()["transf_cls"](features[:, :3])


@pytest.mark.parametrize(("name", "count"), [("lstm", 5), ("conv1d", 2), ("meanp", 0)])
def test_small_prompts_hold_as_many_tensors_as_the_originals(name: str, count: int) -> None:
    assert len(prompts()[name].state_dict()) == count


def test_new_prompts_are_initialised_as_in_the_original() -> None:
    torch.manual_seed(0)
    transf = TransformerPrompt(256, 1, 4, 77, 1e-12)
    block = transf.transformer.resblocks[0]
    for matrix in (
        transf.frame_position_embeddings.weight,
        block.attn.out_proj.weight,
        block.mlp.c_fc.weight,
    ):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
    xavier = (6 / (256 + 3 * 256)) ** 0.5  # torch's uniform bound for the three projections
    assert block.attn.in_proj_weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
    for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias):
        assert not bias.any()
    token = ClassTokenPrompt(256, 1, 4, 77).transformer
    matrix = token.transformer_enc.layers[0].linear1.weight
    assert matrix.abs().max().item() <= 2 * 0.02
    assert token.pos_embed.abs().max().item() <= 2 * 0.02
    assert 0.015 < matrix.std().item() < 0.02  # folded at two deviations


def test_joint_leaves_nothing_to_fuse_and_shift_takes_the_mean(small_config) -> None:
    joint = small_config.with_visual_prompt("joint", num_frames=4)
    shift = small_config.with_visual_prompt("shift", num_frames=4)
    assert isinstance(build_visual_prompt(joint), nn.Identity)
    assert isinstance(build_visual_prompt(shift), MeanPool)
