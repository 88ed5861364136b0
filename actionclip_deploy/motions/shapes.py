"""The shapes of `motions`, as the part of each pixel that they cover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from actionclip_deploy.motions.paths import FloatArray, Path


_MARK_RADIUS = np.float32(0.26)  # over the object's
_MARK_PLACE = (0.0, -0.6)
_MARK_PLACES = {"moon": (-0.64, 0.0)}  # whose upper edge is bitten off


def cover_pixels(shape: str, x: FloatArray, y: FloatArray, path: Path) -> FloatArray:
    """How much of each pixel a shape covers, with soft edges one pixel wide.

    Args:
        shape: One of `SHAPES`.
        x: Places of the pixels, (F, 1, W), as parts of the frame's side, 1 / W apart.
        y: Places of the pixels, (F, H, 1).
        path: The object in each of the F frames.

    Returns:
        Shape (F, H, W), 0 to 1.
    """
    u, v, pixels_per_radius, visible = _own_measure(x, y, path)
    cover: FloatArray = np.clip(0.5 - _DISTANCES[shape](u, v) * pixels_per_radius, 0, 1) * visible
    return cover


def cover_mark(shape: str, x: FloatArray, y: FloatArray, path: Path) -> FloatArray:
    """How much of each pixel the mark on a shape covers, as `cover_pixels`, seen or not.

    The mark is a dot near the upper edge of an object that stands upright. Without it nobody could
    see a circle turn, nor which way a star does. It reaches beyond a slender shape; what is seen
    of it is bounded by the cover of the shape itself.
    """
    u, v, pixels_per_radius, _ = _own_measure(x, y, path)
    left, top = _MARK_PLACES.get(shape, _MARK_PLACE)
    distance = np.sqrt((u - np.float32(left)) ** 2 + (v - np.float32(top)) ** 2) - _MARK_RADIUS
    cover: FloatArray = np.clip(0.5 - distance * pixels_per_radius, 0, 1)
    return cover


def _own_measure(
    x: FloatArray, y: FloatArray, path: Path
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Places (F, H, W) in an object's own measure, where its radius is 1, turned back by its angle.

    With them pixels per radius and visibility, both (F, 1, 1).
    """
    centre_x, centre_y, radius, angle, visible = (
        values.astype(np.float32)[:, None, None]
        for values in (path.x, path.y, path.radius, path.angle, path.visible)
    )
    cos: FloatArray = np.divide(np.cos(angle), radius, dtype=np.float32)
    sin: FloatArray = np.divide(np.sin(angle), radius, dtype=np.float32)
    size = x.shape[-1]
    x, y = x - centre_x, y - centre_y
    return cos * x + sin * y, cos * y - sin * x, radius * size, visible


# Distances to the edge of each shape, negative inside; where they are inexact it is far from it.


def _circle(u: FloatArray, v: FloatArray) -> FloatArray:
    distance: FloatArray = np.sqrt(u * u + v * v) - 1
    return distance


def _ring(u: FloatArray, v: FloatArray) -> FloatArray:
    distance: FloatArray = np.abs(np.sqrt(u * u + v * v) - np.float32(0.77)) - np.float32(0.23)
    return distance


def _square(u: FloatArray, v: FloatArray) -> FloatArray:
    distance: FloatArray = np.maximum(np.abs(u), np.abs(v)) - np.float32(0.85)
    return distance


def _triangle(u: FloatArray, v: FloatArray) -> FloatArray:
    slanted = np.float32(np.sqrt(0.75)) * np.abs(u) - np.float32(0.5) * v
    distance: FloatArray = np.maximum(slanted, v) - np.float32(0.58)
    return distance


def _cross(u: FloatArray, v: FloatArray) -> FloatArray:
    u, v = np.abs(u), np.abs(v)
    longer, shorter = np.maximum(u, v), np.minimum(u, v)
    distance: FloatArray = np.maximum(longer - 1, shorter - np.float32(0.33))
    return distance


def _star(u: FloatArray, v: FloatArray) -> FloatArray:
    # Each fifth is folded onto the half-sector between a tip, (1.1, 0), and an inner corner.
    fifth = np.float32(2 * np.pi / 5)
    turn = np.arctan2(u, -v) / fifth
    fold = np.abs(turn - np.rint(turn)) * fifth
    length = np.sqrt(u * u + v * v)
    tip, inner = 1.1, 0.45
    corner = (inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5))
    edge = np.hypot(corner[1], tip - corner[0])
    normal = np.float32(corner[1] / edge), np.float32((tip - corner[0]) / edge)
    offset = np.float32(normal[0] * tip)
    distance: FloatArray = (
        normal[0] * length * np.cos(fold) + normal[1] * length * np.sin(fold) - offset
    )
    return distance


def _heart(u: FloatArray, v: FloatArray) -> FloatArray:
    # A square on its corner, and a disc on each of its two upper edges.
    u, v = np.abs(u), v - np.float32(0.12)
    side = np.float32(0.44)
    square = (u + np.abs(v)) * np.float32(np.sqrt(0.5)) - side * np.float32(np.sqrt(2))
    disc = np.sqrt((u - side) ** 2 + (v + side) ** 2) - side * np.float32(np.sqrt(2))
    distance: FloatArray = np.minimum(square, disc)
    return distance


def _moon(u: FloatArray, v: FloatArray) -> FloatArray:
    bite = np.sqrt((u - np.float32(0.55)) ** 2 + v * v)
    distance: FloatArray = np.maximum(np.sqrt(u * u + v * v) - 1, np.float32(0.85) - bite)
    return distance


_DISTANCES: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
}
