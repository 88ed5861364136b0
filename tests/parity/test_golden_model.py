"""The PyTorch model against features and probabilities of the original implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actionclip_deploy.model import PIXEL_MEAN, PIXEL_STD, load_checkpoint

# Both sides are fp32 on a CPU; the order of additions differs. Features are of the size of 1.
TOLERANCE = 1e-5
SCALE = 100.0

HEADS = {"Transf": "transf", "LSTM": "lstm", "Conv_1D": "conv1d", "meanP": "meanp"}


def close(given: torch.Tensor, wanted: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(given.numpy(), wanted, rtol=0, atol=TOLERANCE)


def probabilities(
    video: NDArray[np.float32], text: NDArray[np.float32], num_templates: int
) -> NDArray[np.float64]:
    """Softmax over labels per template, then the mean over templates."""
    video = video / np.linalg.norm(video, axis=-1, keepdims=True)
    text = text / np.linalg.norm(text, axis=-1, keepdims=True)
    logits = (SCALE * video @ text.T).reshape(len(video), num_templates, -1).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=1)


def normalise(frames: NDArray[np.uint8]) -> torch.Tensor:
    """Frames (..., H, W, 3) as normalised pixels (..., 3, H, W)."""
    scaled = frames.astype(np.float64) / 255
    moved = np.moveaxis((scaled - PIXEL_MEAN) / PIXEL_STD, -1, -3)
    return torch.from_numpy(moved.astype(np.float32))


def check_probabilities(
    video: torch.Tensor, expected: dict[str, np.ndarray], wanted: NDArray[np.float32]
) -> None:
    got = probabilities(video.numpy(), expected["text_features"], int(expected["num_templates"]))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("head", HEADS)
def test_clips_have_the_originals_features_and_probabilities(
    head: str, tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    loaded = load_checkpoint(tiny_checkpoints[head])
    video = loaded.model.encode_video_features(torch.from_numpy(expected["pixels"]))
    assert loaded.model.config.visual_prompt == HEADS[head]
    close(video, expected[f"video_features_{head}"])
    check_probabilities(video, expected, expected[f"probabilities_{head}"])


def test_frames_have_the_originals_features(
    tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(tiny_checkpoints["meanP"]).model
    pixels = torch.from_numpy(expected["pixels"]).flatten(0, 1)
    close(model.encode_frames(pixels).reshape(2, 8, -1), expected["frame_features"])


@pytest.mark.parametrize("length", [77, 24, 20])
def test_prompts_have_the_originals_features_at_any_length(
    length: int, tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(tiny_checkpoints["meanP"]).model
    assert (expected["tokens"][:, length:] == 0).all()
    tokens = torch.from_numpy(expected["tokens"][:, :length])
    close(model.encode_text_features(tokens), expected["text_features"])


@pytest.mark.parametrize("num_frames", [1, 4, 16])
def test_transf_gives_the_originals_features_at_other_numbers_of_frames(
    num_frames: int, tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    features = torch.from_numpy(expected[f"transf_T{num_frames}_in"])
    close(model.fuse_frames(features), expected[f"transf_T{num_frames}_out"])


def test_uint8_frames_have_the_originals_features_and_probabilities(
    tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    pixels = normalise(expected["frames_u8"])
    features = model.encode_frames(pixels.flatten(0, 1)).reshape(2, 8, -1)
    close(features, expected["frame_features_u8"])
    video = model.fuse_frames(features)
    close(video, expected["video_features_u8_Transf"])
    check_probabilities(video, expected, expected["probabilities_u8_Transf"])


def shifted_checkpoint(weights: dict[str, np.ndarray], path: Path) -> Path:
    """The golden weights under the names that a model with temporal shift saves them."""
    blocks = "visual.transformer.resblocks."
    towers = {}
    for key, value in weights.items():
        if key.startswith("model/"):
            name = key.removeprefix("model/")
            if name.startswith(blocks):
                index, rest = name.removeprefix(blocks).split(".", 1)
                name = f"{blocks}{index}.net.{rest}"
            towers[name] = torch.from_numpy(value.copy())
    torch.save({"epoch": 3, "model_state_dict": towers, "fusion_model_state_dict": {}}, path)
    return path


def check_shift(path: Path, expected: dict[str, np.ndarray]) -> None:
    from actionclip_deploy.model.network import encode_shifted

    loaded = load_checkpoint(path, num_frames=8)
    pixels = torch.from_numpy(expected["pixels"])
    assert loaded.model.config.visual_prompt == "shift"
    features = encode_shifted(loaded.model.towers.visual, pixels)
    close(features, expected["frame_features_tsm"])
    close(loaded.model.encode_video_features(pixels), expected["video_features_tsm"])


def test_temporal_shift_gives_the_originals_features(
    golden_weights: dict[str, np.ndarray], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    check_shift(shifted_checkpoint(golden_weights, tmp_path / "tsm.pt"), expected)


@pytest.mark.parametrize("head", ["Transf", "LSTM", "Conv_1D"])
def test_temporal_shift_with_another_head_is_that_head_of_the_originals_features(
    golden_weights: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    tiny_checkpoints: dict[str, Path],
    tmp_path: Path,
    head: str,
) -> None:
    path = shifted_checkpoint(golden_weights, tmp_path / "tsm.pt")
    content = torch.load(path)
    content["fusion_model_state_dict"] = {
        key.removeprefix(f"head_{head}/"): torch.from_numpy(value.copy())
        for key, value in golden_weights.items()
        if key.startswith(f"head_{head}/")
    }
    torch.save(content, path)
    model = load_checkpoint(path, num_frames=8).model
    assert model.config.visual_prompt.startswith("shift+")
    # The original's head on its own gives the golden numbers in the tests above; train.py puts
    # it after the image encoder whether that shifts or not.
    alone = load_checkpoint(tiny_checkpoints[head]).model
    wanted = alone.fuse_frames(torch.from_numpy(expected["frame_features_tsm"]))
    close(model.encode_video_features(torch.from_numpy(expected["pixels"])), wanted.numpy())


def test_the_originals_own_file_with_temporal_shift_gives_its_features(
    shared: Path, expected: dict[str, np.ndarray]
) -> None:
    check_shift(shared / "golden" / "tiny_tsm_meanP.pt", expected)


def test_the_originals_own_file_gives_its_features(
    shared: Path, expected: dict[str, np.ndarray]
) -> None:
    loaded = load_checkpoint(shared / "golden" / "tiny_Transf.pt", num_frames=8)
    video = loaded.model.encode_video_features(torch.from_numpy(expected["pixels"]))
    close(video, expected["video_features_Transf"])


def test_transf_cls_gives_the_originals_features_and_probabilities(
    shared: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    golden = shared / "golden"
    content = torch.load(golden / "tiny_Transf.pt", weights_only=True)
    content.update(torch.load(golden / "head_Transf_cls.pt", weights_only=True))
    torch.save(content, tmp_path / "cls.pt")
    loaded = load_checkpoint(tmp_path / "cls.pt")
    assert (loaded.num_frames, loaded.num_frames_from) == (8, "position table")
    video = loaded.model.encode_video_features(torch.from_numpy(expected["pixels"]))
    close(video, expected["video_features_Transf_cls"])
    check_probabilities(video, expected, expected["probabilities_Transf_cls"])


def test_mmaction2_weights_give_the_originals_features_but_for_their_epsilon(
    shared: Path, expected: dict[str, np.ndarray]
) -> None:
    loaded = load_checkpoint(shared / "golden" / "tiny_mmaction2.pth")
    assert (loaded.family, loaded.num_frames, loaded.num_frames_from) == (
        "mmaction2",
        8,
        "position table",
    )
    pixels = torch.from_numpy(expected["pixels"])
    features = loaded.model.encode_frames(pixels.flatten(0, 1)).reshape(2, 8, -1)
    close(features, expected["frame_features"])
    # LayerNorm eps 1e-5 for 1e-12 moves features of the size of 1 by up to about 1e-4.
    video = loaded.model.fuse_frames(features).numpy()
    np.testing.assert_allclose(video, expected["video_features_Transf"], rtol=0, atol=3e-4)
    assert np.abs(video - expected["video_features_Transf"]).max() > 0
