from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest

from actionclip_deploy.errors import InferenceError, ShapeError


def fake(**manifest: Any) -> FakeRuntime:
    return FakeRuntime(fake_manifest(**manifest))  # S = 32, D = 16, T = 4, context 77


def frames(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.ones((*shape, 32, 32, 3), dtype)


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_frames_become_features(num_frames: int) -> None:
    assert fake().encode_frames(frames(num_frames)).shape == (num_frames, 16)


@pytest.mark.parametrize(
    "given",
    [
        np.ones((2, 32, 32, 3), np.float32),
        np.ones((2, 32, 32, 3), np.int8),
        np.ones((32, 32, 3), np.uint8),
        np.ones((2, 3, 32, 32), np.uint8),
        np.ones((2, 16, 32, 3), np.uint8),
        np.ones((0, 32, 32, 3), np.uint8),
    ],
    ids=["float", "signed", "one frame", "channels first", "size", "none"],
)
def test_frames_of_another_shape_or_dtype_are_refused(given: np.ndarray) -> None:
    expected = r"frames has shape .*; expected shape \(N, 32, 32, 3\) and dtype uint8, none of"
    with pytest.raises(ShapeError, match=expected):
        fake().encode_frames(given)


def test_frames_that_are_no_array_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"frames is a list; expected a numpy array of shape"):
        fake().encode_frames([[1, 2], [3, 4]])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 15), (0, 3, 16), (2, 0, 16)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    expected = r"features has shape .*; expected shape \(B, T, 16\) and dtype float32"
    with pytest.raises(ShapeError, match=expected):
        fake().encode_clips(np.ones(shape, np.float32))


def test_features_of_double_precision_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"dtype float64; expected .* dtype float32"):
        fake().encode_clips(np.ones((2, 3, 16)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_clips", "num_frames"), [(1, 1), (1, 4), (3, 5)])
def test_a_video_is_its_frames_fused(num_clips: int, num_frames: int) -> None:
    runtime = fake()
    clips = np.random.default_rng(0).integers(
        0, 256, (num_clips, num_frames, 32, 32, 3), dtype=np.uint8
    )
    for clip, embedding in zip(clips, runtime.encode_video(clips), strict=True):
        features = runtime.encode_frames(clip)
        np.testing.assert_array_equal(embedding, runtime.encode_clips(features[np.newaxis])[0])


def test_a_model_that_mixes_frames_is_run_as_one_graph() -> None:
    runtime = fake(visual_prompt="joint")
    assert not runtime.frames_are_independent
    assert runtime.encode_video(frames(2, 4)).shape == (2, 16)
    assert runtime.calls == [("video", (2, 4, 32, 32, 3))]


def test_a_model_that_mixes_frames_encodes_no_single_frames() -> None:
    with pytest.raises(ShapeError, match=r"'shift' mixes the frames of a clip.*call encode_video"):
        fake(visual_prompt="shift").encode_frames(frames(2))


def test_a_model_that_mixes_frames_fuses_no_features() -> None:
    with pytest.raises(ShapeError, match=r"'joint' has no frame features to fuse; call encode_vid"):
        fake(visual_prompt="joint").encode_clips(np.ones((2, 4, 16), np.float32))


@pytest.mark.parametrize("given", [frames(4), frames(2, 4, dtype=np.float32)])
def test_clips_of_another_shape_or_dtype_are_refused(given: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected shape \(B, T, 32, 32, 3\) and dtype uint8"):
        fake().encode_video(given)


def test_more_frames_than_the_model_has_positions_for_are_refused() -> None:
    runtime = fake(max_frames=4)
    runtime.encode_video(frames(1, 4))
    with pytest.raises(ShapeError, match=r"5 frames per clip .* has positions for 4; sample fewer"):
        runtime.encode_video(frames(1, 5))
    with pytest.raises(ShapeError, match="5 frames per clip"):
        runtime.encode_clips(np.ones((1, 5, 16), np.float32))


@pytest.mark.parametrize("num_frames", [3, 5])
def test_another_number_of_frames_is_refused_where_it_is_fixed(num_frames: int) -> None:
    runtime = fake(visual_prompt="transf_cls", fixed_num_frames=True, max_frames=4)
    with pytest.raises(ShapeError, match=rf"{num_frames} frames .*'transf_cls' takes exactly 4"):
        runtime.encode_video(frames(1, num_frames))


def test_tokens_become_embeddings() -> None:
    assert fake().encode_text(np.ones((3, 7), np.int32)).shape == (3, 16)


@pytest.mark.parametrize("given", [np.ones((3, 7), np.int64), np.ones(7, np.int32)])
def test_tokens_of_another_shape_or_dtype_are_refused(given: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected shape \(M, L\) and dtype int32"):
        fake().encode_text(given)


def test_prompts_longer_than_the_context_are_refused() -> None:
    fake().encode_text(np.ones((1, 77), np.int32))
    with pytest.raises(
        ShapeError, match=r"78 columns and the text encoder takes at most 77; short"
    ):
        fake().encode_text(np.ones((1, 78), np.int32))


def test_a_runtime_is_closed_at_the_end_of_its_block() -> None:
    with fake() as runtime:
        assert not runtime.closed  # type: ignore[attr-defined]
    assert runtime.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "output",
    [np.ones((1, 16), np.float32), np.ones((2, 15), np.float32), np.ones((2, 16))],
    ids=["rows", "width", "dtype"],
)
def test_an_output_that_does_not_fit_the_input_is_told(
    monkeypatch: pytest.MonkeyPatch, output: np.ndarray
) -> None:
    runtime = fake()
    monkeypatch.setattr(runtime, "_run", lambda *_: output)
    with pytest.raises(
        InferenceError,
        match=r"The textual graph gave shape .*; expected \(2, 16\) and float32 for 2",
    ):
        runtime.encode_text(np.ones((2, 5), np.int32))
