"""What training does to the frames of a clip, in the original's order.

    RandAugment         drawn anew for each frame
    multi-scale crop    one for the clip
    horizontal flip     one for the clip
    colour jitter       yes or no for the clip; its strengths and their order for each frame
    grayscale           yes or no for the clip

All randomness comes from the generator that is given, so a clip is the same wherever it is made.

Source:
    sallymmx/ActionCLIP@31c34df utils/Augmentation.py, datasets/transforms_ss.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.train.randaugment import Picture, randaugment

if TYPE_CHECKING:
    from actionclip_deploy.train.run_config import AugmentationSection

logger = logging.getLogger(__name__)

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of a crop over the frame's shorter side; width and height are at most one step apart."""

CROP_PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)
"""Left and top of a crop, in quarters of the room that it has."""

FLIP_PROBABILITY = 0.5

_DIRECTION = re.compile(r"\b(?:left|right|(?:anti|counter)?-?clockwise)\b", re.IGNORECASE)

# Brightness, contrast and saturation are multiplied by 1 plus or minus this; hue is moved by it.
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}

# A crop within so few pixels of the input size is taken at exactly that size.
_NEARLY_INPUT_SIZE = 3


class Augmentation:
    """Changes clips.

    Args:
        section: Which changes, and how often.
        labels: What the clips show, which may forbid to flip them.
        input_size: Height and width of the result, S.
    """

    def __init__(
        self, section: AugmentationSection, *, labels: Sequence[str], input_size: int
    ) -> None:
        self._section = section
        self._flip = flip_probability(section.flip, labels)
        self._input_size = input_size

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Change the frames of one clip.

        Args:
            frames: RGB, uint8, shape (T, H, W, 3).
            rng: The source of all randomness.

        Returns:
            RGB, uint8, shape (T, S, S, 3).
        """
        section = self._section
        pictures = [F.to_pil_image(frame) for frame in frames]
        if section.randaugment_operations:
            pictures = [
                randaugment(
                    picture,
                    num_operations=section.randaugment_operations,
                    magnitude=section.randaugment_magnitude,
                    rng=rng,
                )
                for picture in pictures
            ]
        pictures = self._crop(pictures, rng)
        # Each is drawn whether it can happen or not: to switch one off changes no other.
        flips, jitters, grays = rng.random(3) < (
            self._flip,
            section.colour_jitter,
            section.grayscale,
        )
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

    Args:
        wanted: What the configuration asks for; None leaves it to the labels.
        labels: C labels.
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
    """Resize and crop as the original and the bundles of its checkpoints do.

    Args:
        frames: RGB, uint8, shape (T, H, W, 3).
        input_size: S.

    Returns:
        RGB, uint8, shape (T, S, S, 3).
    """
    crops = preprocess_frames(frames, input_size=input_size, resize_size=resize_size(input_size))
    return np.asarray(crops[0], np.uint8)


def draw_crop(
    frame_width: int, frame_height: int, input_size: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw one of the fixed crops of a frame.

    Args:
        frame_width: In pixels.
        frame_height: In pixels.
        input_size: What it will be resized to.
        rng: The source of randomness.

    Returns:
        Left, top, width and height in pixels.
    """
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
    """Change brightness, contrast, saturation and hue, in an order and by strengths drawn anew.

    Args:
        picture: RGB, of Pillow.
        rng: The source of randomness.
    """
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
