"""Frames of `motions`, rendered with numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actionclip_deploy.motions.paths import FloatArray, Path, draw_path, draw_still
from actionclip_deploy.motions.shapes import cover_mark, cover_pixels
from actionclip_deploy.motions.vocabulary import MotionLabel, check_label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        seed: 0 or more; decides everything else.
        size: Height and width in pixels.

    Returns:
        RGB, uint8, shape (1, size, size, 3), and the moment that it shows.
    """
    rng = np.random.default_rng(seed)
    path = draw_still(rng)
    frames = _draw_scene(shape, colour, path, np.zeros(1, np.float32), size, rng)
    _add_noise(frames, np.zeros(1, np.int64), 1, rng)
    return _to_bytes(frames), path


def _draw_scene(
    shape: str,
    colour: str,
    path: Path,
    times: FloatArray,
    size: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Everything but the noise: shape (F, 3, H, W), 0 to 255."""
    # A pixel's place in the scene, which the camera wanders over: shapes (F, 1, W) and (F, H, 1).
    ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size
    drift_x, drift_y = _draw_drift(times, rng), _draw_drift(times, rng)
    x = ticks[None, None, :] + drift_x[:, None, None]
    y = ticks[None, :, None] + drift_y[:, None, None]
    frames = _draw_background(x, y, rng)
    for _ in range(rng.integers(0, 3)):
        _draw_distractor(frames, x, y, rng)
    shade = np.array(_COLOUR_VALUES[colour]) + rng.uniform(-1, 1, 3) * _COLOUR_JITTER
    cover = cover_pixels(shape, x, y, path)
    _paint(frames, cover, shade.astype(np.float32))
    _paint(frames, cover_mark(shape, x, y, path) * cover, np.full(3, _MARK_VALUE, np.float32))
    return frames


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
    shape = ("circle", "square", "triangle")[rng.integers(3)]
    still = Path(place[0] * one, place[1] * one, radius * one, 0 * one, one)
    cover = cover_pixels(shape, x, y, still)
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
