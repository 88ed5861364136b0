"""Captions of single pictures: what a model learns before it is shown anything that moves.

CLIP knows things and places before ActionCLIP teaches it actions. The default model starts without
such knowledge, and clips alone teach it slowly: a place has no word in "moving left". So it first
learns pictures that say what a thing is, where it is, how large, and which way its mark points.

A picture has one caption for each of these. One caption of everything would teach less: colour
and place alone nearly always tell the pictures of a batch apart, and shapes would go unlearned.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from actionclip_deploy.motions.vocabulary import COLOURS, SHAPES, article

if TYPE_CHECKING:
    from actionclip_deploy.motions.paths import Path

SIZES = ("tiny", "small", "large", "huge")
DIRECTIONS = ("up", "right", "down", "left")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("far left", "left", "right", "far right")
NOTHING = "nothing"

_SIZE_BOUNDS = (0.17, 0.215, 0.26)  # radius, in parts of the frame's side
_PLACE_BOUNDS = (0.37, 0.5, 0.63)


@cache
def all_captions() -> tuple[str, ...]:
    """Every caption that a picture can have, in a fixed order: 193."""
    captions = [NOTHING]
    for shape in SHAPES:
        captions += [_of_colour(shape, colour) for colour in COLOURS]
        captions += [_of_size(shape, size) for size in SIZES]
        captions += [_of_direction(shape, direction) for direction in DIRECTIONS]
        captions += [_of_place(shape, place) for place in (*ROWS, *COLUMNS)]
    return tuple(captions)


def describe_moment(shape: str, colour: str, path: Path) -> tuple[str, ...]:
    """Say what a moment shows: its captions, all of them of `all_captions`.

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        path: Of one frame.
    """
    if not path.visible[0]:
        return (NOTHING,)
    # Where the mark of a moon is, is a quarter of a turn away from that of the others.
    quarters = float(path.angle[0]) / (np.pi / 2) - (shape == "moon")
    return (
        _of_colour(shape, colour),
        _of_size(shape, SIZES[np.searchsorted(_SIZE_BOUNDS, path.radius[0])]),
        _of_direction(shape, DIRECTIONS[round(quarters) % 4]),
        _of_place(shape, ROWS[np.searchsorted(_PLACE_BOUNDS, path.y[0])]),
        _of_place(shape, COLUMNS[np.searchsorted(_PLACE_BOUNDS, path.x[0])]),
    )


def _of_colour(shape: str, colour: str) -> str:
    return f"{article(colour)} {colour} {shape}"


def _of_size(shape: str, size: str) -> str:
    return f"a {size} {shape}"


def _of_direction(shape: str, direction: str) -> str:
    return f"a {shape} pointing {direction}"


def _of_place(shape: str, place: str) -> str:
    return f"a {shape}, {place}"
