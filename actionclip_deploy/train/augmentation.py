"""What training does to the frames of a clip, in the original's order.

    RandAugment         drawn anew for each frame
    multi-scale crop    one for the clip
    horizontal flip     one for the clip
    colour jitter       yes or no for the clip; its strengths and their order for each frame
    grayscale           yes or no for the clip

All randomness comes from the generator that is given, so a clip is the same wherever it is made.

torchvision's own RandAugment knows fourteen operations, three of them others, with other strengths.
So the sixteen that the original trains with are here, in terms of torchvision's functions.

Source:
    sallymmx/ActionCLIP@31c34df utils/Augmentation.py, datasets/transforms_ss.py;
    ildoonet/pytorch-randaugment@48b8f50 RandAugment/augmentations.py, which the original imports.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from actionclip_deploy.preprocess import preprocess_frames

if TYPE_CHECKING:
    from actionclip_deploy.train.run_config import AugmentationSection


logger = logging.getLogger(__name__)

# Pillow pictures, which torchvision's functions treat as Pillow does: the original's pixels.
Picture: TypeAlias = Any
_Operation: TypeAlias = Callable[[Picture, float, np.random.Generator], Picture]

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of a crop over the frame's shorter side; width and height are at most one step apart."""

CROP_PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)
"""Left and top of a crop, in quarters of the room that it has."""

# A crop within so few pixels of the input size is taken at exactly that size.
_NEARLY_INPUT_SIZE = 3

FLIP_PROBABILITY = 0.5
_DIRECTION = re.compile(r"\b(?:left|right|(?:anti|counter)?-?clockwise)\b", re.IGNORECASE)

# Brightness, contrast and saturation are multiplied by 1 plus or minus this; hue is moved by it.
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}

MAX_MAGNITUDE = 30.0
_CUTOUT_COLOUR = (125, 123, 114)


class Augmentation:
    """Changes clips.

    Args:
        labels: What the clips show, which may forbid to flip them.
    """

    def __init__(
        self, section: AugmentationSection, *, labels: Sequence[str], input_size: int
    ) -> None:
        self._section = section
        self._flip = flip_probability(section.flip, labels)
        self._input_size = input_size

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Change the frames of one clip, RGB uint8 (T, H, W, 3), into (T, S, S, 3)."""
        section = self._section
        pictures = [
            randaugment(
                F.to_pil_image(frame),
                num_operations=section.randaugment_operations,
                magnitude=section.randaugment_magnitude,
                rng=rng,
            )
            for frame in frames
        ]
        pictures = self._crop(pictures, rng)
        # Each is drawn whether it can happen or not: to switch one off changes no other.
        probabilities = (self._flip, section.colour_jitter, section.grayscale)
        flips, jitters, grays = rng.random(3) < probabilities
        if flips:
            pictures = [F.horizontal_flip(picture) for picture in pictures]
        if jitters:
            pictures = [jitter_colours(picture, rng) for picture in pictures]
        if grays:
            pictures = [F.rgb_to_grayscale(picture, num_output_channels=3) for picture in pictures]
        return np.stack([np.asarray(picture) for picture in pictures])

    def _crop(self, pictures: list[Picture], rng: np.random.Generator) -> list[Picture]:
        size = self._input_size
        if not self._section.multi_scale_crop:
            frames = np.stack([np.asarray(picture) for picture in pictures])
            return [F.to_pil_image(frame) for frame in crop_centre(frames, size)]
        frame_width, frame_height = pictures[0].size
        left, top, width, height = draw_crop(frame_width, frame_height, size, rng)
        return [
            F.resized_crop(
                picture, top, left, height, width, [size, size], InterpolationMode.BILINEAR
            )
            for picture in pictures
        ]


def flip_probability(wanted: float | None, labels: Sequence[str]) -> float:
    """How often clips are flipped.

    The original flips half of them, but none of a data set that has "some" in its name, for the
    sake of Something-Something and its labels such as "Pushing something from left to right".
    Here the labels themselves decide.
    """
    if wanted is not None:
        return wanted
    directed = [label for label in labels if _DIRECTION.search(label)]
    if not directed:
        return FLIP_PROBABILITY
    logger.info("clips are not flipped, for the sake of labels such as %r", directed[0])
    return 0.0


def resize_size(input_size: int) -> int:
    """Short side, in pixels, of the frames that are cropped to `input_size`."""
    return input_size * 256 // 224


def crop_centre(frames: NDArray[np.uint8], input_size: int) -> NDArray[np.uint8]:
    """Resize and crop frames (T, H, W, 3), uint8, to (T, S, S, 3), as deployment does."""
    crops = preprocess_frames(frames, input_size=input_size, resize_size=resize_size(input_size))
    return np.asarray(crops[0], np.uint8)


def draw_crop(
    frame_width: int, frame_height: int, input_size: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw one of the fixed crops of a frame: left, top, width and height in pixels."""
    short = min(frame_width, frame_height)
    sides = [int(short * scale) for scale in CROP_SCALES]
    if input_size <= short:  # where the original, of a frame of 223 pixels, crops 224
        sides = [input_size if abs(s - input_size) < _NEARLY_INPUT_SIZE else s for s in sides]
    shapes = [
        (width, height)
        for i, height in enumerate(sides)
        for j, width in enumerate(sides)
        if abs(i - j) <= 1
    ]
    width, height = shapes[rng.integers(len(shapes))]
    across, down = CROP_PLACES[rng.integers(len(CROP_PLACES))]
    left = (frame_width - width) // 4 * across
    top = (frame_height - height) // 4 * down
    return left, top, width, height


def jitter_colours(picture: Picture, rng: np.random.Generator) -> Picture:
    """Change brightness, contrast, saturation and hue, in an order and by strengths drawn anew."""
    changes = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    for name in rng.permutation(list(JITTER)):
        middle = 0.0 if name == "hue" else 1.0
        picture = changes[name](picture, float(middle + rng.uniform(-1, 1) * JITTER[name]))
    return picture


def randaugment(
    picture: Picture, *, num_operations: int, magnitude: float, rng: np.random.Generator
) -> Picture:
    """Apply operations drawn with replacement.

    Args:
        magnitude: M, 0 to 30: how far each operation is between its weakest and strongest.
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
