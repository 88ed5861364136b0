"""Frames of `motions`, rendered with numpy alone: how an object moves, its shape, its scene.

A seed decides everything that a label leaves open. The draws keep their order: another one would
render other videos, and the default model was trained on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.motions.vocabulary import (
    COLOURS,
    ORDER_PAIRS,
    SHAPES,
    MotionLabel,
    all_labels,
    article,
    check_label,
)

FloatArray: TypeAlias = NDArray[np.float32]
_Moved: TypeAlias = dict[str, FloatArray]  # fields of a path

_BACKWARDS = {second: first for first, second in ORDER_PAIRS}
_SPEEDING_POWER = 2.5  # distance grows with this power of time
_UNSEEN_SHARE = 0.04  # of the objects of single moments


@dataclass(frozen=True, eq=False)
class Path:
    """The object at F moments; lengths are parts of the frame's side, y points down."""

    x: FloatArray  # centre, shape (F,)
    y: FloatArray  # centre, shape (F,)
    radius: FloatArray  # shape (F,)
    angle: FloatArray  # clockwise turn of the object, and of the mark on it, in radians, shape (F,)
    visible: FloatArray  # 1 where it is seen and 0 where not, shape (F,)


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


def _moving(axis: str, times: FloatArray, radius: float, rng: np.random.Generator) -> _Moved:
    length = rng.uniform(0.4, 0.52)
    middle = 0.5 + rng.uniform(-1, 1) * max(0.5 - radius - length / 2, 0)
    return {axis: middle - length * (times - np.float32(0.5))}


def _grow(times: FloatArray, _: float, rng: np.random.Generator) -> _Moved:
    first, last = rng.uniform(0.12, 0.14), rng.uniform(0.26, 0.31)
    return {"radius": first + np.float32(last - first) * times}


def _turn(times: FloatArray, _: float, rng: np.random.Generator) -> _Moved:
    # Through about half a circle and past the upright, as a knob or a needle does: the mark goes
    # over the top, from left to right or back. From anywhere and all around was tried before, and
    # a model of this size stayed at chance; which way then is a product of two angles in time.
    middle, turn = np.radians(rng.uniform(-60, 60)), np.radians(rng.uniform(100, 170))
    return {"angle": np.float32(middle) + np.float32(turn) * (times - np.float32(0.5))}


def _speed_up(times: FloatArray, radius: float, rng: np.random.Generator) -> _Moved:
    length, heading = rng.uniform(0.44, 0.52), rng.uniform(0, 2 * np.pi)
    gone = np.float32(length) * (times**_SPEEDING_POWER - np.float32(0.5))
    slack = max(0.5 - radius - length / 2, 0)
    x, y = 0.5 + slack * rng.uniform(-1, 1), 0.5 + slack * rng.uniform(-1, 1)
    return {"x": x + np.cos(heading) * gone, "y": y + np.sin(heading) * gone}


def _bounce(times: FloatArray, _: float, rng: np.random.Generator) -> _Moved:
    floor, height = rng.uniform(0.72, 0.76), rng.uniform(0.35, 0.45)
    phase = rng.uniform(0, 1) + rng.uniform(2, 2.5) * times
    hop = 1 - (2 * (phase % 1) - 1) ** 2  # a parabola from one touch of the floor to the next
    return {"y": floor - height * hop}


def _blink(times: FloatArray, _: float, rng: np.random.Generator) -> _Moved:
    # At most three periods, so that each light and each dark half is longer than an eighth of
    # the video and holds one of eight sampled frames.
    phase = rng.uniform(0, 1) + rng.uniform(2, 3) * times
    return {"visible": (phase % 1 < 0.5).astype(np.float32)}


def _orbit(times: FloatArray, _: float, rng: np.random.Generator) -> _Moved:
    distance, sign = rng.uniform(0.16, 0.21), rng.choice((-1, 1))
    angle = rng.uniform(0, 2 * np.pi) + sign * 2 * np.pi * rng.uniform(0.9, 1.3) * times
    x, y = rng.uniform(0.45, 0.55, 2)
    return {"x": x + distance * np.cos(angle), "y": y + distance * np.sin(angle)}


_MOVES: dict[str, Callable[[FloatArray, float, np.random.Generator], _Moved]] = {
    "moving left": partial(_moving, "x"),
    "moving up": partial(_moving, "y"),
    "growing": _grow,
    "turning clockwise": _turn,
    "speeding up": _speed_up,
    "bouncing": _bounce,
    "blinking": _blink,
    "orbiting": _orbit,
    "standing still": lambda _times, _radius, _rng: {},
}


# Shapes, as the part of each pixel that they cover.


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


_DISTANCES: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "circle": lambda u, v: np.sqrt(u * u + v * v) - 1,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - np.float32(0.77)) - np.float32(0.23),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - np.float32(0.85),
    "triangle": lambda u, v: (
        np.maximum(np.float32(np.sqrt(0.75)) * np.abs(u) - np.float32(0.5) * v, v)
        - np.float32(0.58)
    ),
    "cross": lambda u, v: np.maximum(
        np.maximum(np.abs(u), np.abs(v)) - 1, np.minimum(np.abs(u), np.abs(v)) - np.float32(0.33)
    ),
    "star": _star,
    "heart": _heart,
    "moon": lambda u, v: np.maximum(
        np.sqrt(u * u + v * v) - 1,
        np.float32(0.85) - np.sqrt((u - np.float32(0.55)) ** 2 + v * v),
    ),
}


# A scene: background, distractors, the object, and noise.


# The middles of eight segments of 24 frames lie alike from either end, so two motions that are
# each other backwards show a model the same set of frames. Of most other lengths they do not.
NUM_FRAMES = 24
FRAME_SIZE = 96

# Of RGB, 0 to 255. Backgrounds and distractors are grey and darker than any of them.
_COLOUR_VALUES = {
    "red": (225, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 230, 40),
    "green": (40, 180, 50),
    "cyan": (40, 215, 225),
    "blue": (40, 70, 230),
    "purple": (160, 45, 200),
    "white": (245, 245, 245),
}
_COLOUR_JITTER = 12
_MARK_VALUE = 20
_MAX_DRIFT = 0.05  # of the camera, as a part of the frame's side
_MAX_NOISE = 12  # standard deviation, of 255


def render_clip(
    label: MotionLabel,
    *,
    seed: int,
    num_frames: int = NUM_FRAMES,
    size: int = FRAME_SIZE,
    frame_indices: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Render frames of one video.

    The seed decides everything that the label leaves open: size, place, speed, background,
    distractors, drift of the camera, noise. The same seed gives the same bytes, and a frame is
    the same whichever others are rendered.

    Args:
        label: What is to be seen.
        seed: 0 or more.
        num_frames: Frames of the whole video, 2 or more.
        size: Height and width in pixels.
        frame_indices: The frames to render, 0 to num_frames - 1; None for all.

    Returns:
        RGB frames, uint8, shape (F, size, size, 3).

    Raises:
        ValueError: If the label cannot be shown, or a number is out of range.
    """
    check_label(label)
    indices = np.arange(num_frames) if frame_indices is None else np.asarray(frame_indices)
    if num_frames < 2 or size < 8:
        raise ValueError(
            f"num_frames is {num_frames} and size {size}; expected at least 2 frames of 8 pixels"
        )
    if indices.ndim != 1 or ((indices < 0) | (indices >= num_frames)).any():
        raise ValueError(
            f"frame_indices is {frame_indices!r}; expected a list of 0 to {num_frames - 1}"
        )
    rng = np.random.default_rng(seed)
    times = (indices / (num_frames - 1)).astype(np.float32)
    path = draw_path(label.motion, times, rng)
    frames = _draw_scene(label.shape, label.colour, path, times, size, rng)
    _add_noise(frames, indices, num_frames, rng)
    return _to_bytes(frames)


def render_picture(
    shape: str, colour: str, *, seed: int, size: int = FRAME_SIZE
) -> tuple[NDArray[np.uint8], Path]:
    """Render a single frame of an object that is anywhere and does nothing.

    Returns:
        RGB, uint8, shape (1, size, size, 3), and the moment that it shows.
    """
    rng = np.random.default_rng(seed)
    path = draw_still(rng)
    frames = _draw_scene(shape, colour, path, np.zeros(1, np.float32), size, rng)
    _add_noise(frames, np.zeros(1, np.int64), 1, rng)
    return _to_bytes(frames), path


class EndlessMotions:
    """Motions one after the other without an end, frame by frame, as a camera would show them.

    Args:
        seed: 0 or more; decides all that is shown.
        num_frames: Frames of each motion, 2 or more.
        size: Height and width in pixels.
    """

    def __init__(
        self, *, seed: int = 0, num_frames: int = NUM_FRAMES, size: int = FRAME_SIZE
    ) -> None:
        self._seed = seed
        self._num_frames = num_frames
        self._size = size

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """Render a frame, numbered from 0: RGB, uint8, shape (size, size, 3)."""
        label, seed = self._motion(number)
        frames = render_clip(
            label,
            seed=seed,
            num_frames=self._num_frames,
            size=self._size,
            frame_indices=[number % self._num_frames],
        )
        frame: NDArray[np.uint8] = frames[0]
        return frame

    def label_of(self, number: int) -> MotionLabel:
        """What the motion shows that a frame belongs to."""
        return self._motion(number)[0]

    def _motion(self, number: int) -> tuple[MotionLabel, int]:
        draw = np.random.default_rng((self._seed, number // self._num_frames))
        combinations = all_labels()
        return combinations[draw.integers(len(combinations))], int(draw.integers(2**63))


def _draw_scene(
    shape: str,
    colour: str,
    path: Path,
    times: FloatArray,
    size: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Everything but the noise: shape (F, 3, H, W), 0 to 255."""
    frames, x, y = _draw_setting(times, size, rng)
    _draw_object(frames, x, y, shape, colour, path, rng)
    return frames


def _draw_setting(
    times: FloatArray, size: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Frames without the object, (F, 3, H, W), and the places of their pixels in the scene.

    The camera wanders over these: shapes (F, 1, W) and (F, H, 1).
    """
    ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size
    drift_x, drift_y = _draw_drift(times, rng), _draw_drift(times, rng)
    x = ticks[None, None, :] + drift_x[:, None, None]
    y = ticks[None, :, None] + drift_y[:, None, None]
    frames = _draw_background(x, y, rng)
    for _ in range(rng.integers(0, 3)):
        _draw_distractor(frames, x, y, rng)
    return frames, x, y


def _draw_object(
    frames: FloatArray,
    x: FloatArray,
    y: FloatArray,
    shape: str,
    colour: str,
    path: Path,
    rng: np.random.Generator,
) -> None:
    shade = np.array(_COLOUR_VALUES[colour]) + rng.uniform(-1, 1, 3) * _COLOUR_JITTER
    cover = cover_pixels(shape, x, y, path)
    _paint(frames, cover, shade.astype(np.float32))
    _paint(frames, cover_mark(shape, x, y, path) * cover, np.full(3, _MARK_VALUE, np.float32))


def _to_bytes(frames: FloatArray) -> NDArray[np.uint8]:
    channels_last = np.clip(frames, 0, 255).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(channels_last, dtype=np.uint8)


def _draw_drift(times: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A slow wave, one half of it or less: shape (F,), in parts of the frame's side."""
    reach, phase, swing = rng.uniform(0, _MAX_DRIFT), rng.uniform(0, 2 * np.pi), rng.uniform(-3, 3)
    drift: FloatArray = np.float32(reach) * np.sin(np.float32(phase) + np.float32(swing) * times)
    return drift


def _draw_background(x: FloatArray, y: FloatArray, rng: np.random.Generator) -> FloatArray:
    """One of five backgrounds: shape (F, 3, H, W), 0 to 255."""
    shade = rng.uniform(25, 105)
    first = shade + rng.uniform(-12, 12, 3).astype(np.float32)
    kind, contrast = rng.integers(5), rng.uniform(8, 32)
    heading, wave, phase = rng.uniform(0, 2 * np.pi), rng.uniform(12, 30), rng.uniform(0, 6, 2)
    across = np.float32(np.cos(heading)), np.float32(np.sin(heading))
    along = across[0] * x + across[1] * y  # (F, H, W)
    if kind == 0:
        pattern = np.zeros_like(along)
    elif kind == 1:
        pattern = along * 2 - 1
    elif kind == 2:
        pattern = np.clip(3 * np.sin(wave * along + phase[0]), -1, 1)
    elif kind == 3:
        columns, rows = np.sin(wave * x + phase[0]), np.sin(wave * y + phase[1])
        pattern = np.clip(4 * columns * rows, -1, 1)
    else:
        pattern = np.sin(wave / 2 * along + phase[0]) * np.sin(wave / 3 * (x - y) + phase[1])
    pattern = pattern.astype(np.float32) * np.float32(contrast)
    background: FloatArray = first.astype(np.float32)[None, :, None, None] + pattern[:, None]
    return background


def _draw_distractor(
    frames: FloatArray, x: FloatArray, y: FloatArray, rng: np.random.Generator
) -> None:
    """Draw a small grey thing that stays where it is."""
    one = np.ones(len(frames), np.float32)
    place, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.03, 0.06)
    _draw_grey(frames, x, y, (place[0] * one, place[1] * one), radius, rng)


def _draw_passer_by(
    frames: FloatArray, x: FloatArray, y: FloatArray, times: FloatArray, rng: np.random.Generator
) -> None:
    """Draw a small grey thing that goes through the frame, from time 0 to time 1."""
    heading, off = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
    along, across = (np.cos(heading), np.sin(heading)), (-np.sin(heading), np.cos(heading))
    gone = np.float32(1.6) * (times - np.float32(0.5))  # from outside of the frame to outside
    centre = tuple(
        (np.float32(0.5) + gone * np.float32(a) + np.float32(off * b)).astype(np.float32)
        for a, b in zip(along, across, strict=True)
    )
    _draw_grey(frames, x, y, (centre[0], centre[1]), rng.uniform(0.03, 0.06), rng)


def _draw_grey(
    frames: FloatArray,
    x: FloatArray,
    y: FloatArray,
    centre: tuple[FloatArray, FloatArray],
    radius: float,
    rng: np.random.Generator,
) -> None:
    one = np.ones(len(frames), np.float32)
    shape = ("circle", "square", "triangle")[rng.integers(3)]
    cover = cover_pixels(shape, x, y, Path(*centre, radius * one, 0 * one, one))
    _paint(frames, cover, np.full(3, rng.uniform(110, 170), np.float32))


def _paint(frames: FloatArray, cover: FloatArray, colour: FloatArray) -> None:
    frames += cover[:, None] * (colour[None, :, None, None] - frames)


def _add_noise(
    frames: FloatArray, indices: NDArray[np.int64], num_frames: int, rng: np.random.Generator
) -> None:
    # One draw for all frames, read from another place in each: cheaper than a draw per frame.
    strength = rng.uniform(0, _MAX_NOISE)
    length = frames[0].size
    starts = rng.integers(0, length, num_frames)
    noise = rng.standard_normal(2 * length, dtype=np.float32) * np.float32(strength)
    for frame, start in zip(frames, starts[indices], strict=True):
        frame += noise[start : start + length].reshape(frame.shape)


# Long videos: one scene, in which objects come and go.


_SETTING_SECONDS = 2.0  # of a clip, over which its camera drifts as `_draw_drift` says
_FRAMES_AT_A_TIME = 240


@dataclass(frozen=True)
class Act:
    """An object that is there for a while, and shows its motion all that time.

    Attributes:
        label: What it shows.
        first: The first frame in which it is there.
        num_frames: For how many frames.
        num_rounds: How often it goes through its motion, each time from the beginning.
    """

    label: MotionLabel
    first: int
    num_frames: int
    num_rounds: int = 1

    def times(self, indices: NDArray[np.int64]) -> FloatArray:
        """Where in its motion frames lie, 0 to 1."""
        length = self.num_frames / self.num_rounds
        gone = (indices - self.first) % length
        times: FloatArray = np.minimum(gone / max(length - 1, 1), 1).astype(np.float32)
        return times


def render_acts(
    acts: Sequence[Act], num_frames: int, *, fps: float, seed: int, size: int = FRAME_SIZE
) -> NDArray[np.uint8]:
    """Render a long video: one scene in which objects come, show their motions, and go.

    Between two acts there is the scene alone; through half of these gaps goes a small grey thing,
    which none of the labels is.

    Args:
        acts: In their order; no two at a time.
        num_frames: F, frames of the video.
        fps: Frames per second, by which the camera drifts.
        seed: 0 or more; decides everything that the labels leave open.
        size: Height and width in pixels.

    Returns:
        RGB frames, uint8, shape (F, size, size, 3).

    Raises:
        ValueError: If acts overlap or do not lie in the video.
    """
    bounds = [0, *(bound for act in acts for bound in (act.first, act.first + act.num_frames))]
    bounds.append(num_frames)
    if any(after < before for before, after in pairwise(bounds)):
        raise ValueError(
            f"acts begin and end at the frames {bounds[1:-1]}; expected them one after the other, "
            f"and within {num_frames} frames"
        )
    gaps = [pair for pair in zip(bounds[::2], bounds[1::2], strict=True) if pair[1] > pair[0]]
    with_passer_by = np.random.default_rng((seed, 0)).random(len(gaps)) < 0.5
    rendered = np.empty((num_frames, size, size, 3), np.uint8)
    for first in range(0, num_frames, _FRAMES_AT_A_TIME):
        indices = np.arange(first, min(first + _FRAMES_AT_A_TIME, num_frames))
        # What is drawn does not depend on the frames, so each part of the video draws it again.
        rng = np.random.default_rng((seed, 1))
        seconds = (indices / (fps * _SETTING_SECONDS)).astype(np.float32)
        frames, x, y = _draw_setting(seconds, size, rng)
        for number, (begin, end) in enumerate(gaps):
            part = _part(indices, begin, end)
            if with_passer_by[number] and part is not None:
                times = ((indices[part] - begin) / (end - begin)).astype(np.float32)
                draw = np.random.default_rng((seed, 2, number))
                _draw_passer_by(frames[part], x[part], y[part], times, draw)
        for number, act in enumerate(acts):
            part = _part(indices, act.first, act.first + act.num_frames)
            if part is not None:
                draw = np.random.default_rng((seed, 3, number))
                path = draw_path(act.label.motion, act.times(indices[part]), draw)
                shape, colour, _ = act.label
                _draw_object(frames[part], x[part], y[part], shape, colour, path, draw)
        _add_noise(frames, indices, num_frames, rng)
        rendered[indices] = _to_bytes(frames)
    return rendered


def _part(indices: NDArray[np.int64], begin: int, end: int) -> slice | None:
    """Where frames from `begin` to before `end` stand in consecutive ones; None for nowhere."""
    first, last = (int(np.clip(each - indices[0], 0, len(indices))) for each in (begin, end))
    return slice(first, last) if first < last else None


# Captions of single pictures: what a model learns before it is shown anything that moves.
#
# CLIP knows things and places before ActionCLIP teaches it actions. The default model starts
# without such knowledge, and clips alone teach it slowly: a place has no word in "moving left". So
# it first learns pictures that say what a thing is, where it is, how large, and which way its mark
# points. A picture has one caption for each of these. One caption of everything would teach less:
# colour and place alone nearly always tell the pictures of a batch apart, and shapes would go
# unlearned.


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
        captions += [f"{article(colour)} {colour} {shape}" for colour in COLOURS]
        captions += [f"a {size} {shape}" for size in SIZES]
        captions += [f"a {shape} pointing {direction}" for direction in DIRECTIONS]
        captions += [f"a {shape}, {place}" for place in (*ROWS, *COLUMNS)]
    return tuple(captions)


def describe_moment(shape: str, colour: str, path: Path) -> tuple[str, ...]:
    """Say what the one frame of a path shows: its captions, all of them of `all_captions`."""
    if not path.visible[0]:
        return (NOTHING,)
    # Where the mark of a moon is, is a quarter of a turn away from that of the others.
    quarters = float(path.angle[0]) / (np.pi / 2) - (shape == "moon")
    return (
        f"{article(colour)} {colour} {shape}",
        f"a {SIZES[np.searchsorted(_SIZE_BOUNDS, path.radius[0])]} {shape}",
        f"a {shape} pointing {DIRECTIONS[round(quarters) % 4]}",
        f"a {shape}, {ROWS[np.searchsorted(_PLACE_BOUNDS, path.y[0])]}",
        f"a {shape}, {COLUMNS[np.searchsorted(_PLACE_BOUNDS, path.x[0])]}",
    )
