"""How the object of a clip moves: where it is at each moment, how large and how it is turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.motions.vocabulary import ORDER_PAIRS

if TYPE_CHECKING:
    from collections.abc import Callable

FloatArray: TypeAlias = NDArray[np.float32]

_BACKWARDS = {second: first for first, second in ORDER_PAIRS}
_SPEEDING_POWER = 2.5  # distance grows with this power of time
_UNSEEN_SHARE = 0.04  # of the objects of single moments


@dataclass(frozen=True, eq=False)
class Path:
    """The object at F moments; lengths are parts of the frame's side, y points down.

    Attributes:
        x: Centre, shape (F,).
        y: Centre, shape (F,).
        radius: Shape (F,).
        angle: Clockwise turn of the object, and of the mark on it, in radians, shape (F,).
        visible: 1 where it is seen and 0 where not, shape (F,).
    """

    x: FloatArray
    y: FloatArray
    radius: FloatArray
    angle: FloatArray
    visible: FloatArray


def draw_path(motion: str, times: FloatArray, rng: np.random.Generator) -> Path:
    """Draw one of the ways in which a motion can go.

    Args:
        motion: One of `MOTIONS`.
        times: Shape (F,), 0 at a video's first frame and 1 at its last.
        rng: Where the draw comes from; what is drawn does not depend on `times`.
    """
    if motion in _BACKWARDS:
        motion, times = _BACKWARDS[motion], 1 - times
    radius = np.full_like(times, rng.uniform(0.19, 0.26))
    fixed = {
        "x": np.full_like(times, rng.uniform(0.3, 0.7)),
        "y": np.full_like(times, rng.uniform(0.3, 0.7)),
        "radius": radius,
        "angle": np.full_like(times, rng.uniform(-0.2, 0.2)),
        "visible": np.ones_like(times),
    }
    return Path(**{**fixed, **_MOVES[motion](times, float(radius[0]), rng)})


def draw_still(rng: np.random.Generator) -> Path:
    """Draw one moment of an object that may be anywhere, of any size, at any angle, or unseen.

    It covers what the moments of all motions look like; half of the objects stand upright.
    """
    angle = rng.uniform(-0.2, 0.2) if rng.random() < 0.5 else rng.uniform(0, 2 * np.pi)
    values = {
        "x": rng.uniform(0.22, 0.78),
        "y": rng.uniform(0.22, 0.78),
        "radius": rng.uniform(0.12, 0.31),
        "angle": angle,
        "visible": float(rng.random() >= _UNSEEN_SHARE),
    }
    return Path(**{name: np.array([value], np.float32) for name, value in values.items()})


def _move(
    times: FloatArray, radius: float, rng: np.random.Generator, *, axis: str, sign: int
) -> dict[str, FloatArray]:
    length = rng.uniform(0.4, 0.52)
    middle = 0.5 + rng.uniform(-1, 1) * max(0.5 - radius - length / 2, 0)
    return {axis: middle + sign * length * (times - np.float32(0.5))}


def _grow(times: FloatArray, _: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    first, last = rng.uniform(0.12, 0.14), rng.uniform(0.26, 0.31)
    return {"radius": first + np.float32(last - first) * times}


def _turn(times: FloatArray, _: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    # Through about half a circle and past the upright, as a knob or a needle does: the mark goes
    # over the top, from left to right or back. From anywhere and all around was tried before, and
    # a model of this size stayed at chance; which way then is a product of two angles in time.
    middle, turn = np.radians(rng.uniform(-60, 60)), np.radians(rng.uniform(100, 170))
    return {"angle": np.float32(middle) + np.float32(turn) * (times - np.float32(0.5))}


def _speed_up(times: FloatArray, radius: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    length, heading = rng.uniform(0.44, 0.52), rng.uniform(0, 2 * np.pi)
    gone = np.float32(length) * (times**_SPEEDING_POWER - np.float32(0.5))
    slack = max(0.5 - radius - length / 2, 0)
    x, y = 0.5 + slack * rng.uniform(-1, 1), 0.5 + slack * rng.uniform(-1, 1)
    return {"x": x + np.cos(heading) * gone, "y": y + np.sin(heading) * gone}


def _bounce(times: FloatArray, _: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    floor, height = rng.uniform(0.72, 0.76), rng.uniform(0.35, 0.45)
    phase = rng.uniform(0, 1) + rng.uniform(2, 2.5) * times
    hop = 1 - (2 * (phase % 1) - 1) ** 2  # a parabola from one touch of the floor to the next
    return {"y": floor - height * hop}


def _blink(times: FloatArray, _: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    # At most three periods, so that each light and each dark half is longer than an eighth of
    # the video and holds one of eight sampled frames.
    phase = rng.uniform(0, 1) + rng.uniform(2, 3) * times
    return {"visible": (phase % 1 < 0.5).astype(np.float32)}


def _orbit(times: FloatArray, _: float, rng: np.random.Generator) -> dict[str, FloatArray]:
    distance, sign = rng.uniform(0.16, 0.21), rng.choice((-1, 1))
    angle = rng.uniform(0, 2 * np.pi) + sign * 2 * np.pi * rng.uniform(0.9, 1.3) * times
    x, y = rng.uniform(0.45, 0.55, 2)
    return {"x": x + distance * np.cos(angle), "y": y + distance * np.sin(angle)}


def _moving(axis: str, sign: int) -> _Move:
    return lambda times, radius, rng: _move(times, radius, rng, axis=axis, sign=sign)


_Move: TypeAlias = "Callable[[FloatArray, float, np.random.Generator], dict[str, FloatArray]]"
_MOVES: dict[str, _Move] = {
    "moving left": _moving("x", -1),
    "moving up": _moving("y", -1),
    "growing": _grow,
    "turning clockwise": _turn,
    "speeding up": _speed_up,
    "bouncing": _bounce,
    "blinking": _blink,
    "orbiting": _orbit,
    "standing still": lambda _times, _radius, _rng: {},
}
