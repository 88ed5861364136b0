"""What training does to the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageOps

from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.train.augmentation import (
    CROP_PLACES,
    OPERATIONS,
    Augmentation,
    draw_crop,
    flip_probability,
    jitter_colours,
    randaugment,
)
from actionclip_deploy.train.run_config import AugmentationSection

SIZE = 64


OFF: dict[str, Any] = {
    "multi_scale_crop": False,
    "flip": 0,
    "colour_jitter": 0,
    "grayscale": 0,
    "randaugment_operations": 0,
}


def _frame(width: int = 120, height: int = 90) -> NDArray[np.uint8]:
    noise = np.random.default_rng(5).integers(0, 256, (height // 6, width // 6, 3))
    picture = Image.fromarray(noise.astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _augment(seed: int, *, frames: NDArray[np.uint8] | None = None, **on: Any) -> NDArray[np.uint8]:
    """Augment a clip of four equal frames with nothing but what is named."""
    if frames is None:
        frames = np.stack([_frame()] * 4)
    augmentation = Augmentation(AugmentationSection(**{**OFF, **on}), labels=(), input_size=SIZE)
    return augmentation(frames, np.random.default_rng(seed))


def _frames_are_alike(clip: NDArray[np.uint8]) -> bool:
    return all((frame == clip[0]).all() for frame in clip)


SHARED = {
    "multi-scale crop": {"multi_scale_crop": True},
    "flip": {"flip": 0.5},
    "grayscale": {"grayscale": 0.5},
}


INDEPENDENT = {
    "colour jitter": {"colour_jitter": 1.0},
    "RandAugment": {"randaugment_operations": 2},
}


@pytest.mark.parametrize("on", SHARED.values(), ids=SHARED)
def test_a_change_is_shared_by_all_frames_of_a_clip(on: dict[str, Any]) -> None:
    clips = [_augment(seed, **on) for seed in range(12)]

    assert all(_frames_are_alike(clip) for clip in clips)
    assert len({clip.tobytes() for clip in clips}) > 1


@pytest.mark.parametrize("on", INDEPENDENT.values(), ids=INDEPENDENT)
def test_a_change_is_drawn_for_each_frame(on: dict[str, Any]) -> None:
    for seed in range(6):
        clip = _augment(seed, **on)

        assert len({frame.tobytes() for frame in clip}) == 4


def test_whether_colours_are_jittered_is_drawn_once_for_a_clip() -> None:
    plain = _augment(0)
    clips = [_augment(seed, colour_jitter=0.5) for seed in range(40)]

    changed = [(clip != plain).any(axis=(1, 2, 3)) for clip in clips]

    # A draw for each frame would mix changed and unchanged frames in most clips.
    assert all(frames.all() or not frames.any() for frames in changed)
    assert 10 <= sum(frames.all() for frames in changed) <= 30


def test_nothing_switched_on_is_the_preprocessing_of_deployment() -> None:
    frames = np.stack([_frame()] * 4)

    expected = preprocess_frames(frames, input_size=SIZE, resize_size=SIZE * 256 // 224)[0]

    assert (_augment(0, frames=frames) == expected).all()


def test_the_same_seed_gives_the_same_pixels() -> None:
    everything = AugmentationSection(randaugment_operations=2)
    augmentation = Augmentation(everything, labels=(), input_size=SIZE)
    frames = np.stack([_frame()] * 4)

    first, again, other = (augmentation(frames, np.random.default_rng(s)) for s in (1, 1, 2))

    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == (4, SIZE, SIZE, 3)
    assert first.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "is_changed"),
    [
        ("flip", lambda clip, plain: (clip == plain[:, :, ::-1]).all()),
        ("grayscale", lambda clip, _: np.ptp(clip, axis=3).max() == 0),
        ("colour_jitter", lambda clip, plain: (clip != plain).any()),
    ],
)
def test_a_change_comes_as_often_as_it_is_said_to(
    change: str, is_changed: Callable[..., bool]
) -> None:
    plain = _augment(0)

    clips = [_augment(seed, **{change: 0.3}) for seed in range(200)]

    share = np.mean([bool(is_changed(clip, plain)) for clip in clips])
    assert share == pytest.approx(0.3, abs=0.1)
    assert all(is_changed(clip, plain) or (clip == plain).all() for clip in clips)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("arm wrestling", 0.5),
        ("leftover cooking, bright", 0.5),
        ("Pushing something from left to right", 0.0),
        ("a red star turning clockwise", 0.0),
        ("turning counterclockwise", 0.0),
        ("Right hook", 0.0),
    ],
)
def test_labels_with_a_direction_forbid_to_flip(label: str, expected: float) -> None:
    assert flip_probability(None, ("yoga", label)) == expected
    assert flip_probability(0.25, ("yoga", label)) == 0.25


def test_no_label_of_the_common_data_sets_has_a_direction(
    kinetics_400: tuple[str, ...],
) -> None:
    assert flip_probability(None, kinetics_400) == 0.5


def test_clips_of_labels_with_a_direction_are_never_flipped() -> None:
    section = AugmentationSection(colour_jitter=0, grayscale=0)
    augmentation = Augmentation(section, labels=("moving left",), input_size=SIZE)
    left_to_right = np.zeros((1, 90, 120, 3), np.uint8) + np.arange(120, dtype=np.uint8)[:, None]

    for seed in range(60):
        row = augmentation(left_to_right, np.random.default_rng(seed))[0, 0, :, 0].astype(int)
        assert row[0] < row[-1]


def test_a_crop_is_cut_out_and_then_resized_by_pillow() -> None:
    frame = _frame()
    for seed in range(10):
        left, top, width, height = draw_crop(120, 90, SIZE, np.random.default_rng(seed))
        part = Image.fromarray(frame).crop((left, top, left + width, top + height))

        clip = _augment(seed, multi_scale_crop=True)

        wanted = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        assert (clip[0] == wanted).all()


def test_crops_are_those_of_the_original() -> None:
    rng = np.random.default_rng(0)

    crops = {draw_crop(340, 256, 224, rng) for _ in range(5000)}

    # 256 x 1, 0.875, 0.75, 0.66, and the second of them is the input size itself.
    sides = (256, 224, 192, 168)
    shapes = {(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1}
    assert {crop[2:] for crop in crops} == shapes
    assert len(shapes) == 10
    places = {
        (left // ((340 - width) // 4), top // ((256 - height) // 4))
        for left, top, width, height in crops
        if height < 256
    }
    assert places == set(CROP_PLACES)
    assert len(CROP_PLACES) == 13


def test_a_crop_of_nearly_the_input_size_is_of_that_size() -> None:
    rng = np.random.default_rng(0)

    # 0.875 of 254 is 222, two pixels from 224; 0.875 of 252 is 220, four pixels away.
    near = {draw_crop(400, 254, 224, rng)[3] for _ in range(300)}
    far = {draw_crop(400, 252, 224, rng)[3] for _ in range(300)}

    assert near == {254, 224, 190, 167}
    assert far == {252, 220, 189, 166}


def test_crops_stay_within_the_frame() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((64, 64), (65, 333), (223, 300), (224, 225), (1920, 1080), (5, 4)):
        for _ in range(200):
            left, top, crop_width, crop_height = draw_crop(width, height, 224, rng)

            assert 0 <= left <= width - crop_width
            assert 0 <= top <= height - crop_height


def test_jitter_stays_within_its_bounds_and_uses_all_of_them() -> None:
    gray = Image.new("RGB", (8, 8), (100, 100, 100))

    means = [
        np.asarray(jitter_colours(gray, np.random.default_rng(seed))).mean() for seed in range(400)
    ]

    # A gray picture has no hue and no saturation, and its contrast is about its own mean.
    assert 59 <= min(means) < 65
    assert 135 < max(means) <= 141


NEAREST = Image.Resampling.NEAREST


AFFINE = Image.Transform.AFFINE


def _picture(width: int = 61, height: int = 47) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda p: p.transform(p.size, AFFINE, matrix, NEAREST)


def _solarize_add(picture: Image.Image) -> Image.Image:
    values = np.clip(np.asarray(picture).astype(int) + 33, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(values), 128)


# The values at magnitude 9 of 30, and what the reference does with them.
AT_9: dict[str, tuple[Callable[[Image.Image], Image.Image], ...]] = {
    "autocontrast": (ImageOps.autocontrast,),
    "equalize": (ImageOps.equalize,),
    "invert": (ImageOps.invert,),
    "rotate": (lambda p: p.rotate(9), lambda p: p.rotate(-9)),
    "posterize": (lambda p: ImageOps.posterize(p, 1),),
    "solarize": (lambda p: ImageOps.solarize(p, 76.8),),
    "solarize-add": (_solarize_add,),
    "colour": (lambda p: ImageEnhance.Color(p).enhance(0.64),),
    "contrast": (lambda p: ImageEnhance.Contrast(p).enhance(0.64),),
    "brightness": (lambda p: ImageEnhance.Brightness(p).enhance(0.64),),
    "sharpness": (lambda p: ImageEnhance.Sharpness(p).enhance(0.64),),
    "shear-x": (_affine(1, 0.09, 0, 0, 1, 0), _affine(1, -0.09, 0, 0, 1, 0)),
    "shear-y": (_affine(1, 0, 0, 0.09, 1, 0), _affine(1, 0, 0, -0.09, 1, 0)),
    "translate-x": (_affine(1, 0, 30, 0, 1, 0), _affine(1, 0, -30, 0, 1, 0)),
    "translate-y": (_affine(1, 0, 0, 0, 1, 30), _affine(1, 0, 0, 0, 1, -30)),
}


def _apply(name: str, magnitude: float, seed: int) -> Image.Image:
    operation, weakest, strongest = OPERATIONS[name]
    value = magnitude / 30 * (strongest - weakest) + weakest
    result: Image.Image = operation(_picture(), value, np.random.default_rng(seed))
    return result


def test_there_are_the_sixteen_operations_of_the_reference() -> None:
    assert len(OPERATIONS) == 16
    assert set(OPERATIONS) == {*AT_9, "cutout"}


@pytest.mark.parametrize("name", AT_9)
def test_an_operation_gives_the_pixels_of_pillow(name: str) -> None:
    wanted = {reference(_picture()).tobytes() for reference in AT_9[name]}

    given = {_apply(name, 9, seed).tobytes() for seed in range(12)}

    # All of the references, so both signs, and nothing else.
    assert given == wanted


def test_a_cutout_is_a_gray_square_within_the_frame() -> None:
    for seed in range(20):
        changed = ImageChops.difference(_apply("cutout", 9, seed), _picture()).getbbox()

        assert changed is not None
        left, top, right, bottom = changed
        assert right - left <= 13
        assert bottom - top <= 13
        wanted = _picture()
        draw = np.random.default_rng(seed)
        x, y = draw.uniform(0, 61), draw.uniform(0, 47)
        corner = int(max(0, x - 6)), int(max(0, y - 6))
        end = min(61, corner[0] + 12), min(47, corner[1] + 12)
        ImageDraw.Draw(wanted).rectangle((*corner, *end), (125, 123, 114))
        assert _apply("cutout", 9, seed).tobytes() == wanted.tobytes()


def test_no_magnitude_makes_a_frame_black() -> None:
    assert np.asarray(_apply("posterize", 0, 0)).max() > 0


def test_operations_are_drawn_evenly_and_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name, (_, *strengths) in list(OPERATIONS.items()):

        def note(picture: object, value: float, rng: object, name: str = name) -> object:
            drawn.append(name)
            return picture

        monkeypatch.setitem(OPERATIONS, name, (note, *strengths))

    rng = np.random.default_rng(0)
    for _ in range(800):
        randaugment(_picture(4, 4), num_operations=2, magnitude=9, rng=rng)

    assert len(drawn) == 1600
    assert all(70 <= drawn.count(name) <= 135 for name in OPERATIONS)
    assert any(first == second for first, second in zip(drawn[::2], drawn[1::2], strict=True))


def test_no_operations_change_nothing() -> None:
    rng = np.random.default_rng(0)

    assert randaugment(_picture(), num_operations=0, magnitude=9, rng=rng) == _picture()
