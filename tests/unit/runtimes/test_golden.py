from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from safetensors.numpy import load_file, save_file

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import BundleError, IntegrityError, ShapeError
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.scoring import score_clips

LABELS = ("run", "hide", "jump")


def make_golden(bundle: Bundle, *, num_clips: int = 2, num_frames: int = 4) -> Golden:
    generator = np.random.default_rng(3)
    frames = generator.integers(0, 256, (num_clips, num_frames, 32, 32, 3), dtype=np.uint8)
    tokens = generator.integers(1, 99, (2 * len(LABELS), 6), dtype=np.int32)
    reference = FakeRuntime(bundle.manifest)
    return Golden.from_reference(reference, frames, tokens, LABELS, origin="random numbers")


def with_golden(bundle: Bundle, golden: Golden) -> Bundle:
    golden.save(bundle.path)
    return rehashed(bundle)


def rehashed(bundle: Bundle) -> Bundle:
    files = hash_files(bundle.path)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": files}))
    return Bundle.open(bundle.path, check_hashes=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


def test_golden_data_holds_what_the_reference_computes(bundle: Bundle) -> None:
    golden = make_golden(bundle)
    reference = FakeRuntime(bundle.manifest)
    assert golden.frame_features is not None
    for b in range(2):
        features = reference.encode_frames(golden.frames[b])
        np.testing.assert_array_equal(golden.frame_features[b], features)
        np.testing.assert_array_equal(
            golden.video_embeddings[b], reference.encode_clips(features[np.newaxis])[0]
        )
    embeddings = reference.encode_text(golden.tokens)
    np.testing.assert_array_equal(golden.text_embeddings, embeddings)
    by_template = np.stack([embeddings[:3], embeddings[3:]])
    np.testing.assert_array_equal(golden.scores, score_clips(golden.video_embeddings, by_template))


@pytest.mark.parametrize("visual_prompt", ["transf", "joint"])
@pytest.mark.parametrize("num_clips", [1, 3])
def test_golden_data_survives_the_bundle(
    tmp_path: Path, visual_prompt: str, num_clips: int
) -> None:
    bundle = write_fake_bundle(tmp_path, visual_prompt=visual_prompt)
    golden = make_golden(bundle, num_clips=num_clips)
    loaded = Golden.load(with_golden(bundle, golden))
    assert (golden.frame_features is None) == (visual_prompt == "joint")
    for name, value in vars(golden).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert getattr(getattr(loaded, name), "dtype", None) == getattr(value, "dtype", None)


def test_arrays_that_are_not_contiguous_are_saved_as_they_look(bundle: Bundle) -> None:
    golden = make_golden(bundle)
    mirrored = Golden(**{**vars(golden), "frames": golden.frames[:, :, :, ::-1]})
    loaded = Golden.load(with_golden(bundle, mirrored))
    np.testing.assert_array_equal(loaded.frames, golden.frames[:, :, :, ::-1])


def test_a_bundle_without_golden_data_says_so(bundle: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"has no golden/golden\.safetensors, so there is nothing to compare"
    ):
        Golden.load(bundle)


def drop_scores(path: Path) -> None:
    arrays = load_file(path / "golden/golden.safetensors")
    del arrays["scores"]
    save_file(arrays, path / "golden/golden.safetensors")


def pickle(path: Path) -> None:
    (path / "golden/golden.safetensors").write_bytes(b"\x80\x04K\x01.")


def no_json(path: Path) -> None:
    (path / "golden/golden.json").write_text("{")


def a_list(path: Path) -> None:
    (path / "golden/golden.json").write_text("[]")


def no_labels(path: Path) -> None:
    (path / "golden/golden.json").write_text('{"labels": [], "origin": "x"}')


def fewer_labels(path: Path) -> None:
    (path / "golden/golden.json").write_text('{"labels": ["run", "hide"], "origin": "x"}')


@pytest.mark.parametrize("damage", [drop_scores, pickle, no_json, a_list, no_labels, fewer_labels])
def test_golden_data_that_cannot_be_used_is_refused(
    bundle: Bundle, damage: Callable[[Path], None]
) -> None:
    with_golden(bundle, make_golden(bundle))
    damage(bundle.path)
    with pytest.raises(
        IntegrityError, match=r"The golden data of .* cannot be used .*copy the bun"
    ):
        Golden.load(rehashed(bundle))


def test_golden_data_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "wide", embedding_dim=24)
    golden = make_golden(write_fake_bundle(tmp_path / "narrow"))
    with pytest.raises(
        IntegrityError, match=r"\(T, S\), D and K x C of \(\(4, 32\), 16, 6\) and the model .* 24,"
    ):
        Golden.load(with_golden(bundle, golden))


def test_golden_data_of_another_number_of_frames_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ShapeError, match="they are of different models"):
        make_golden(bundle, num_frames=5).check_model(bundle.manifest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", np.zeros((2, 4, 32, 30, 3), np.uint8)),
        ("frame_features", np.zeros((2, 4, 15), np.float32)),
        ("video_embeddings", np.zeros((2, 16))),
        ("tokens", np.zeros((6, 6), np.int64)),
        ("text_embeddings", np.zeros((5, 16), np.float32)),
        ("scores", np.zeros((2, 4), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    bundle: Bundle, name: str, value: np.ndarray
) -> None:
    fields: dict[str, Any] = {**vars(make_golden(bundle)), name: value}
    with pytest.raises(ShapeError, match=rf"^{name} has shape .*; expected shape"):
        Golden(**fields)


def test_prompts_that_are_no_multiple_of_the_labels_are_refused(bundle: Bundle) -> None:
    golden = make_golden(bundle)
    fields = {
        **vars(golden),
        "tokens": golden.tokens[:5],
        "text_embeddings": golden.text_embeddings[:5],
    }
    with pytest.raises(ShapeError, match="tokens are 5 prompts and there are 3 labels"):
        Golden(**fields)


def test_the_text_of_golden_data_can_be_read_by_people(bundle: Bundle) -> None:
    make_golden(bundle).save(bundle.path)
    text = json.loads((bundle.path / "golden/golden.json").read_text())
    assert text == {"labels": ["run", "hide", "jump"], "origin": "random numbers"}
