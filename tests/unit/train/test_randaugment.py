"""RandAugment against the same operations in Pillow's own terms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageOps

from actionclip_deploy.train.augmentation import OPERATIONS, randaugment

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
