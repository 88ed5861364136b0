from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_manifest, write_fake_bundle

from actionclip_deploy.bundle import Bundle, write_manifest
from actionclip_deploy.errors import (
    BundleError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.installation import install_command
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.model import PIXEL_MEAN, PIXEL_STD, load_checkpoint
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.pyt import TorchRuntime

# Agreement promised by the golden data for features of this scale in fp32.
GOLDEN_TOLERANCE = 1e-5


def tiny_manifest(**changes: Any) -> Manifest:
    """A manifest of the tiny golden model; `changes` replace fields of the manifest."""
    sizes = {"num_frames": 8, "input_size": 64, "embedding_dim": 64, "max_frames": 77}
    manifest = fake_manifest(**sizes)
    preprocessing = manifest.preprocessing.model_copy(
        update={"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
    )
    return manifest.model_copy(update={"preprocessing": preprocessing, **changes})


@pytest.fixture(scope="module")
def runtime(tiny_checkpoints: dict[str, Path]) -> Iterator[TorchRuntime]:
    loaded = load_checkpoint(tiny_checkpoints["Transf"])
    with TorchRuntime(tiny_manifest(), loaded.model) as opened:
        yield opened  # type: ignore[misc]


@pytest.fixture
def bundle(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> Bundle:
    """A bundle whose source is the tiny golden checkpoint."""
    bundle = write_fake_bundle(tmp_path / "bundle")
    checkpoint = tiny_checkpoints["Transf"]
    source = bundle.manifest.source.model_copy(
        update={"file": checkpoint.name, "sha256": sha256_of_file(checkpoint)}
    )
    write_manifest(bundle.path, tiny_manifest(files=bundle.manifest.files, source=source))
    return Bundle.open(bundle.path)


def test_frames_are_encoded_as_the_original_does(
    runtime: TorchRuntime, expected: dict[str, np.ndarray]
) -> None:
    frames = expected["frames_u8"]
    features = runtime.encode_frames(frames.reshape(-1, 64, 64, 3))
    wanted = expected["frame_features_u8"].reshape(16, 64)
    np.testing.assert_allclose(features, wanted, rtol=0, atol=GOLDEN_TOLERANCE)
    assert features.dtype == np.float32


def test_clips_are_encoded_as_the_original_does(
    runtime: TorchRuntime, expected: dict[str, np.ndarray]
) -> None:
    wanted = expected["video_features_u8_Transf"]
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    from_frames = runtime.encode_video(expected["frames_u8"])
    np.testing.assert_allclose(from_frames, wanted, rtol=0, atol=GOLDEN_TOLERANCE)
    features = expected["frame_features_u8"].reshape(2, 8, 64).astype(np.float32)
    from_features = runtime.encode_clips(features)
    np.testing.assert_allclose(from_features, wanted, rtol=0, atol=GOLDEN_TOLERANCE)


def test_prompts_are_encoded_as_the_original_does(
    runtime: TorchRuntime, expected: dict[str, np.ndarray]
) -> None:
    wanted = expected["text_features"]
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    embeddings = runtime.encode_text(expected["tokens"].astype(np.int32))
    np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=GOLDEN_TOLERANCE)


def test_a_model_that_mixes_frames_is_run_whole(
    tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    graphs = fake_manifest(visual_prompt="shift").graphs
    with TorchRuntime(tiny_manifest(graphs=graphs), model) as runtime:
        embeddings = runtime.encode_video(expected["frames_u8"])
    assert embeddings.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, atol=1e-6)


def test_pixels_are_normalised_by_the_manifest(tiny_checkpoints: dict[str, Path]) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    manifest = tiny_manifest()
    preprocessing = manifest.preprocessing.model_copy(update={"pixel_mean": mean, "pixel_std": std})
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with TorchRuntime(tiny_manifest(preprocessing=preprocessing), model) as runtime:
        features = runtime.encode_frames(frames)
    pixels = np.stack([(frames[..., c] / 255 - mean[c]) / std[c] for c in range(3)], axis=1).astype(
        np.float32
    )
    with torch.inference_mode():
        wanted = model.encode_frames(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(features, wanted, rtol=0, atol=GOLDEN_TOLERANCE)


def test_a_checkpoint_is_opened_by_its_bundle(
    bundle: Bundle, tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    checkpoint = tiny_checkpoints["Transf"]
    with open_runtime(bundle, "torch", checkpoint=checkpoint) as runtime:
        features = runtime.encode_frames(expected["frames_u8"][0])
        info = runtime.describe()
    wanted = expected["frame_features_u8"].reshape(2, 8, 64)[0]
    np.testing.assert_allclose(features, wanted, rtol=0, atol=GOLDEN_TOLERANCE)
    assert (info.name, info.execution_provider, info.precision) == ("torch", "cpu", "fp32")
    assert info.num_threads == torch.get_num_threads()
    assert info.versions == {"torch": str(torch.__version__)}


def test_another_checkpoint_is_refused(bundle: Bundle, tiny_checkpoints: dict[str, Path]) -> None:
    with pytest.raises(
        BundleError, match=r"tiny_LSTM_8f\.pt is not the file .* \(tiny_Transf_8f\.pt, sha256 "
    ):
        TorchRuntime.from_bundle(bundle, tiny_checkpoints["LSTM"])


def test_a_base_that_was_not_used_is_refused(
    bundle: Bundle, tiny_checkpoints: dict[str, Path]
) -> None:
    checkpoint = tiny_checkpoints["Transf"]
    with pytest.raises(BundleError, match=r"was exported without one; leave it out"):
        TorchRuntime.from_bundle(bundle, checkpoint, checkpoint)


@pytest.mark.parametrize("base", [None, "LSTM"])
def test_the_base_has_to_be_the_one_that_was_used(
    bundle: Bundle, tiny_checkpoints: dict[str, Path], base: str | None
) -> None:
    source = bundle.manifest.source.model_copy(
        update={"base_file": "clip.pt", "base_sha256": "1" * 64}
    )
    manifest = bundle.manifest.model_copy(update={"source": source})
    with pytest.raises(BundleError, match=r"base clip\.pt and none|base .* is not the file .*clip"):
        TorchRuntime.from_bundle(
            Bundle(bundle.path, manifest),
            tiny_checkpoints["Transf"],
            None if base is None else tiny_checkpoints[base],
        )


def test_weights_of_a_tag_have_to_be_those_of_the_bundle(
    bundle: Bundle, tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_checkpoint(tiny_checkpoints["LSTM"])
    monkeypatch.setattr("actionclip_deploy.runtimes.pyt.load_checkpoint", lambda *_, **__: other)
    with pytest.raises(
        BundleError, match=r"open_clip:RN50/openai gives weights of sha256 .*export"
    ):
        TorchRuntime.from_bundle(bundle, Path("open_clip:RN50/openai"))


def test_a_token_outside_of_the_vocabulary_is_told(runtime: TorchRuntime) -> None:
    with pytest.raises(
        InferenceError,
        match=r"The textual part of the model failed in torch on cpu .*shape \(1, 4\)",
    ):
        runtime.encode_text(np.full((1, 4), 10**6, np.int32))


def test_a_closed_runtime_says_so(tiny_checkpoints: dict[str, Path]) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    with TorchRuntime(tiny_manifest(), model) as runtime:
        pass
    with pytest.raises(
        InferenceError, match="was closed before its textual graph was run; open it"
    ):
        runtime.encode_text(np.ones((1, 4), np.int32))


def test_an_unknown_device_is_refused(tiny_checkpoints: dict[str, Path]) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    with pytest.raises(
        ValueError, match="device is 'tpu'; for the torch runtime it must be one of cpu, cuda"
    ):
        TorchRuntime(tiny_manifest(), model, device="tpu")


def test_a_device_that_is_not_there_is_refused(
    tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    with pytest.raises(RuntimeUnavailableError, match="finds no CUDA device; ask for cpu, or inst"):
        TorchRuntime(tiny_manifest(), model, device="cuda")


def test_threads_are_set_for_the_process_when_asked_for(
    tiny_checkpoints: dict[str, Path],
) -> None:
    model = load_checkpoint(tiny_checkpoints["Transf"]).model
    before = torch.get_num_threads()
    try:
        TorchRuntime(tiny_manifest(), model)
        assert torch.get_num_threads() == before
        info = TorchRuntime(tiny_manifest(), model, num_threads=1).describe()
        assert torch.get_num_threads() == info.num_threads == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="num_threads is 0; it must be 1 or more"):
        TorchRuntime(tiny_manifest(), model, num_threads=0)
    with pytest.raises(ValueError, match="'cuda'; threads are of use to cpu alone"):
        TorchRuntime(tiny_manifest(), model, device="cuda", num_threads=1)


def test_the_callers_gradients_stay_on(runtime: TorchRuntime) -> None:
    runtime.encode_text(np.ones((1, 4), np.int32))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.pyt")
    with pytest.raises(MissingExtraError, match=re.escape(install_command("torch"))):
        importlib.import_module("actionclip_deploy.runtimes.pyt")
