"""What `motions` shows: shapes, colours and motions, and which combinations are held out."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "turning clockwise",
    "turning counterclockwise",
    "speeding up",
    "slowing down",
    "bouncing",
    "blinking",
    "orbiting",
    "standing still",
)

# The second of a pair is the first played backwards: their frames are the same as a set, and
# nothing but the order tells them apart.
ORDER_PAIRS = (
    ("moving left", "moving right"),
    ("moving up", "moving down"),
    ("growing", "shrinking"),
    ("turning clockwise", "turning counterclockwise"),
    ("speeding up", "slowing down"),
)

SPLITS = ("train", "test", "heldout")
_HELD_OUT_SEED = 20210917
_HELD_OUT_SHARE = 5  # one label of so many


class MotionLabel(NamedTuple):
    """What one video shows; `str` gives the label.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        motion: One of `MOTIONS`.
    """

    shape: str
    colour: str
    motion: str

    def __str__(self) -> str:
        return f"{article(self.colour)} {self.colour} {self.shape} {self.motion}"


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


@cache
def all_labels() -> tuple[MotionLabel, ...]:
    """Every combination, in a fixed order: 896."""
    return tuple(
        MotionLabel(shape, colour, motion)
        for shape in SHAPES
        for colour in COLOURS
        for motion in MOTIONS
    )


@cache
def labels(split: str) -> tuple[MotionLabel, ...]:
    """The labels of a split, in the order of `all_labels`.

    A fifth of the combinations is held out. Every shape, colour and motion occurs in training,
    and every two of them together; only the three together are new.

    Args:
        split: "train"; "test", the same labels in videos of other seeds; or "heldout", labels
            that never occur in training.

    Raises:
        ValueError: If there is no such split.
    """
    check_split(split)
    combinations = all_labels()
    # Drawn from floats, as no other way through `random` promises the same on every Python.
    draw = random.Random(_HELD_OUT_SEED)
    order = sorted(combinations, key=lambda _: draw.random())
    held_out = set(order[: len(order) // _HELD_OUT_SHARE])
    return tuple(label for label in combinations if (label in held_out) == (split == "heldout"))


def check_label(label: MotionLabel) -> None:
    """Refuse what is none of `all_labels`.

    Raises:
        ValueError: If it is none, naming what can be shown.
    """
    for given, allowed in zip(label, (SHAPES, COLOURS, MOTIONS), strict=True):
        if given not in allowed:
            raise ValueError(f"{given!r} is not among what motions shows: {list(allowed)}")


def check_split(split: str) -> None:
    """Refuse a name that is none of `SPLITS`.

    Raises:
        ValueError: If it is not.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it has to be one of {list(SPLITS)}")
