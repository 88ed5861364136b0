from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_programs import memory_bytes

from actionclip_deploy.errors import ShapeError, VideoError
from actionclip_deploy.preprocess import preprocess_frames, resize_frames

# Of all values of the frames below; the bound for the option that resizes the crop alone.
MAX_SHARE_OF_DIFFERENT_VALUES = 0.001
# Two levels where both passes tip the same value; about one in a million.
MAX_SHARE_OF_TWO_LEVELS = 1e-5


def noise(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth shapes with edges, more like a photograph than noise is."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + y / 29), np.cos(x / 7 - y / 41), np.sin(y / 11) * np.cos(x / 23)]
    frame = np.stack(waves, axis=-1) * 100 + 128
    frame[(x // 31 + y // 27) % 5 == 0] *= 0.4
    return frame.clip(0, 255).astype(np.uint8)[np.newaxis]


def resize_in_two_passes(frame: np.ndarray, size: tuple[int, int], resampling: int) -> np.ndarray:
    """Along rows, then along columns: the order of Pillow before version 13."""
    along_rows = Image.fromarray(frame).resize((size[0], frame.shape[0]), resampling)
    return np.asarray(along_rows.resize(size, resampling))


def test_preprocessing_equals_the_original_to_the_last_bit(
    preprocess_golden: dict[str, np.ndarray],
) -> None:
    sizes = [key.removeprefix("in_") for key in preprocess_golden if key.startswith("in_")]
    assert len(sizes) >= 5
    for size in sizes:
        crops = preprocess_frames(preprocess_golden[f"in_{size}"][np.newaxis])
        assert np.array_equal(crops[0, 0], preprocess_golden[f"u8_{size}"]), size


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width"),
    [(240, 320), (360, 640), (320, 240), (1280, 720), (461, 203), (80, 60), (700, 100), (1, 1)],
)
def test_one_crop_is_a_whole_resize_and_a_crop(height: int, width: int, interpolation: str) -> None:
    frames = noise(2, height, width)
    crops = preprocess_frames(frames, interpolation=interpolation)
    resampling = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    short_side = min(height, width)
    size = (int(256 * width / short_side), int(256 * height / short_side))
    left, top = (round((side - 224) / 2.0) for side in size)
    for n, frame in enumerate(frames):
        resized = resize_in_two_passes(frame, size, resampling[interpolation])
        assert np.array_equal(crops[0, n], resized[top : top + 224, left : left + 224])


def test_tall_frames_are_resized_in_the_original_order() -> None:
    # Pillow 13 would go along the columns of this one first and round otherwise.
    frame = noise(1, 1080, 461)[0]
    expected = resize_in_two_passes(frame, (256, 599), Image.Resampling.BICUBIC)
    crops = preprocess_frames(frame[np.newaxis])
    assert np.array_equal(crops[0, 0], expected[188:412, 16:240])


def test_a_frame_of_the_final_size_is_left_as_it_is() -> None:
    frames = noise(3, 96, 96)
    for region in ("frame", "crop"):
        crops = preprocess_frames(frames, input_size=96, resize_size=96, region=region)
        assert np.array_equal(crops[0], frames)


@pytest.mark.parametrize(("height", "width"), [(64, 101), (101, 64)])
def test_three_crops_lie_at_the_start_the_centre_and_the_end(height: int, width: int) -> None:
    frames = noise(2, height, width)
    crops = preprocess_frames(frames, input_size=64, num_crops=3)
    assert crops.shape == (3, 2, 64, 64, 3)
    # Steps of (101 - 64) // 2 = 18 pixels, as the original's helper has them.
    for crop, start in zip(crops, (0, 18, 36), strict=True):
        part = frames[:, :, start : start + 64] if width > height else frames[:, start : start + 64]
        assert np.array_equal(crop, part)


def test_three_crops_resize_the_shorter_side_to_the_input_size() -> None:
    frames = picture(120, 200)
    crops = preprocess_frames(frames, input_size=60, resize_size=80, num_crops=3)
    resized = resize_in_two_passes(frames[0], (100, 60), Image.Resampling.BICUBIC)
    for crop, start in zip(crops, (0, 20, 40), strict=True):
        assert np.array_equal(crop[0], resized[:, start : start + 60])


def test_three_crops_of_a_square_frame_are_the_same() -> None:
    crops = preprocess_frames(picture(90, 90), input_size=64, num_crops=3)
    assert np.array_equal(crops[0], crops[1])
    assert np.array_equal(crops[0], crops[2])


def test_frames_do_not_depend_on_their_neighbours() -> None:
    frames = noise(4, 100, 130)
    together = preprocess_frames(frames, input_size=32, resize_size=40)
    alone = [preprocess_frames(frames[n : n + 1], input_size=32, resize_size=40) for n in range(4)]
    assert np.array_equal(together, np.concatenate(alone, axis=1))


def test_an_array_that_is_not_contiguous_is_read_rightly() -> None:
    frames = noise(2, 50, 60)
    mirrored = preprocess_frames(frames[:, :, ::-1], input_size=32, resize_size=40)
    copied = preprocess_frames(frames[:, :, ::-1].copy(), input_size=32, resize_size=40)
    assert np.array_equal(mirrored, copied)


def test_resizing_the_crop_alone_differs_by_one_level_in_few_values() -> None:
    frames = [picture(*size) for size in [(240, 320), (360, 640), (720, 1280), (640, 360)]]
    frames += [noise(1, *size) for size in [(240, 320), (270, 480), (480, 271), (1080, 1920)]]
    wholes = np.concatenate([preprocess_frames(frame) for frame in frames]).astype(np.int64)
    parts = np.concatenate([preprocess_frames(frame, region="crop") for frame in frames])
    differences = np.abs(wholes - parts)
    assert differences.max() <= 2
    assert 0 < np.mean(differences > 0) < MAX_SHARE_OF_DIFFERENT_VALUES
    assert np.mean(differences > 1) < MAX_SHARE_OF_TWO_LEVELS


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            np.zeros((2, 8, 8, 3), np.float32),
            r"float32 of shape \(2, 8, 8, 3\); expected uint8 RGB",
        ),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 of shape \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"shape \(2, 8, 8, 4\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"shape \(0, 8, 8, 3\).*N, H and W of 1 or more"),
        (np.zeros((1, 0, 8, 3), np.uint8), r"shape \(1, 0, 8, 3\)"),
    ],
)
def test_other_arrays_are_refused(frames: np.ndarray, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        preprocess_frames(frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size is 0; it must be 1 or more"),
        ({"input_size": 257}, "resize_size is 256; it must be input_size, 257, or more"),
        ({"interpolation": "nearest"}, "'nearest'; it must be one of bicubic, bilinear"),
        ({"num_crops": 2}, "num_crops is 2; it must be 1 or 3"),
        ({"region": "centre"}, "'centre'; it must be one of frame, crop"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess_frames(noise(1, 8, 8), **arguments)


@pytest.mark.parametrize("shape", [(16_000, 1), (1, 16_000), (40_000, 3)])
@pytest.mark.parametrize("num_crops", [1, 3])
def test_frames_that_are_very_long_take_little_memory(
    shape: tuple[int, int], num_crops: int
) -> None:
    # Brighter along the long side, from 0 to 255: its middle is 127.
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    frames = np.empty((1, *shape, 3), np.uint8)
    frames[:] = (
        ramp[np.newaxis, :, np.newaxis, np.newaxis]
        if shape[0] == max(shape)
        else ramp[np.newaxis, np.newaxis, :, np.newaxis]
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_bytes(os.getpid())
    crops = preprocess_frames(frames, num_crops=num_crops)
    assert crops.shape == (num_crops, 1, 224, 224, 3)
    # 8.8 GB before.
    assert memory_bytes(os.getpid(), "VmHWM") - before < 400 * 2**20
    assert np.abs(crops[num_crops // 2].astype(int) - 127).max() <= 2
    with pytest.raises(VideoError, match="which is too much; leave the video out"):
        resize_frames(frames, short_side=256)
