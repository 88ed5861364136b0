"""RandAugment: a few operations, drawn from sixteen, on one frame.

torchvision's own `RandAugment` knows fourteen operations, three of them others, with other
strengths; these are those that the original trains with, in terms of torchvision's functions.

Source:
    ildoonet/pytorch-randaugment@48b8f50 RandAugment/augmentations.py, which the original imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from torchvision.transforms.v2 import functional as F

# Pillow pictures, which torchvision's functions treat as Pillow does: the original's pixels.
Picture: TypeAlias = Any
_Operation: TypeAlias = Callable[[Picture, float, np.random.Generator], Picture]

MAX_MAGNITUDE = 30.0
_CUTOUT_COLOUR = (125, 123, 114)


def randaugment(
    picture: Picture, *, num_operations: int, magnitude: float, rng: np.random.Generator
) -> Picture:
    """Apply operations drawn with replacement.

    Args:
        picture: RGB, of Pillow.
        num_operations: N.
        magnitude: M, 0 to 30: how far each operation is between its weakest and strongest.
        rng: The source of randomness.
    """
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=num_operations):
        operation, weakest, strongest = OPERATIONS[names[number]]
        value = magnitude / MAX_MAGNITUDE * (strongest - weakest) + weakest
        picture = operation(picture, value, rng)
    return picture


def _with_random_sign(operation: Callable[[Picture, float], Picture]) -> _Operation:
    return lambda picture, value, rng: operation(picture, -value if rng.random() > 0.5 else value)


def _fixed(operation: Callable[[Picture, float], Picture]) -> _Operation:
    return lambda picture, value, _: operation(picture, value)


def _affine(
    picture: Picture,
    *,
    translate: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
) -> Picture:
    degrees = [math.degrees(math.atan(value)) for value in shear]
    return F.affine(
        picture, angle=0.0, translate=list(translate), scale=1.0, shear=degrees, center=[0.0, 0.0]
    )


def _posterize(picture: Picture, bits: float) -> Picture:
    return F.posterize(picture, max(1, int(bits)))  # 0 bits, below M = 7.5, would leave black


def _solarize_add(picture: Picture, addition: float) -> Picture:
    brighter = [min(value + int(addition), 255) for value in range(256)]
    return F.solarize(picture.point(brighter * 3), 128)


def _cutout(picture: Picture, side: float, rng: np.random.Generator) -> Picture:
    width, height = picture.size
    centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
    left, top = (int(max(0, centre - side / 2)) for centre in (centre_x, centre_y))
    # The original draws a rectangle, whose last row and column are within it.
    right, bottom = min(width, int(left + side) + 1), min(height, int(top + side) + 1)
    cut = picture.copy()
    cut.paste(_CUTOUT_COLOUR, (left, top, right, bottom))
    return cut


OPERATIONS: dict[str, tuple[_Operation, float, float]] = {
    "autocontrast": (_fixed(lambda picture, _: F.autocontrast(picture)), 0, 1),
    "equalize": (_fixed(lambda picture, _: F.equalize(picture)), 0, 1),
    "invert": (_fixed(lambda picture, _: F.invert(picture)), 0, 1),
    "rotate": (_with_random_sign(F.rotate), 0, 30),  # degrees
    "posterize": (_fixed(_posterize), 0, 4),  # bits that stay
    "solarize": (_fixed(F.solarize), 0, 256),  # brightest value that stays
    "solarize-add": (_fixed(_solarize_add), 0, 110),
    "colour": (_fixed(F.adjust_saturation), 0.1, 1.9),
    "contrast": (_fixed(F.adjust_contrast), 0.1, 1.9),
    "brightness": (_fixed(F.adjust_brightness), 0.1, 1.9),
    "sharpness": (_fixed(F.adjust_sharpness), 0.1, 1.9),
    "shear-x": (_with_random_sign(lambda p, v: _affine(p, shear=(v, 0))), 0, 0.3),
    "shear-y": (_with_random_sign(lambda p, v: _affine(p, shear=(0, v))), 0, 0.3),
    "cutout": (_cutout, 0, 40),  # pixels, whatever the frame's size
    "translate-x": (_with_random_sign(lambda p, v: _affine(p, translate=(v, 0))), 0, 100),
    "translate-y": (_with_random_sign(lambda p, v: _affine(p, translate=(0, v))), 0, 100),
}
"""Operations with the values of their strengths at M = 0 and M = 30."""
