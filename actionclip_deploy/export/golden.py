"""Golden inputs: the clips and prompts that every runtime is compared on."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.sampling import Views
from actionclip_deploy.video import MAX_PIXELS, VideoReader
from actionclip_deploy.views import Stopwatch, ViewReader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from actionclip_deploy.manifest import Manifest

GOLDEN_LABELS = (
    "archery",
    "brushing teeth",
    "climbing a rope",
    "juggling balls",
    "playing guitar",
    "riding a bike",
    "swimming backstroke",
    "washing dishes",
)
NUM_CLIPS = 4

_SEED = 20210917
_TEXTURE_GRID = 12  # cells on a side
_NUM_DISCS = 3

_Clips: TypeAlias = NDArray[np.uint8]
_Picture: TypeAlias = NDArray[np.float64]


def golden_clips(
    manifest: Manifest, videos: Sequence[Path], *, max_pixels: int = MAX_PIXELS
) -> tuple[_Clips, str]:
    """Give the clips of the golden data: from real videos if there are any, else rendered.

    Args:
        videos: Each gives one clip; fewer than four give several each.

    Returns:
        Clips, shape (B, T, S, S, 3), B at least 4; and where they came from, in words.
    """
    if not videos:
        clips = render_clips(NUM_CLIPS, manifest.model.num_frames, manifest.model.input_size)
        return clips, "rendered by the exporter, as no video was given"
    clips_per_video = -(-NUM_CLIPS // len(videos))
    clips = np.concatenate(
        [clips_of_video(path, manifest, clips_per_video, max_pixels=max_pixels) for path in videos]
    )
    return clips, "frames of " + ", ".join(path.name for path in videos)


def clips_of_video(
    path: Path, manifest: Manifest, num_clips: int, *, max_pixels: int = MAX_PIXELS
) -> _Clips:
    """Read clips of a video as the bundle's user would.

    Args:
        num_clips: B, spread over the video.
        max_pixels: Most pixels of a frame.

    Returns:
        RGB, shape (B, T, S, S, 3).
    """
    with VideoReader(path, max_pixels=max_pixels) as reader:
        frames = ViewReader(manifest, Views(num_clips), "frame").read(reader, path, Stopwatch())
    clips: _Clips = frames.pixels[frames.views]
    return clips


def render_clips(num_clips: int, num_frames: int, size: int) -> _Clips:
    """Render clips that look more like pictures than noise does, always the same.

    Over a shaded, textured background that drifts, discs move; each clip has its own colours,
    texture and motion. Uniform noise would be a poor test: after normalisation it drives a tower
    to the same features whatever the frame.

    Returns:
        RGB, shape (B, T, S, S, 3).
    """
    rng = np.random.default_rng(_SEED)
    return np.stack([_render_clip(rng, num_frames, size) for _ in range(num_clips)])


def _render_clip(rng: np.random.Generator, num_frames: int, size: int) -> _Clips:
    rows, columns = np.meshgrid(*[np.linspace(0, 1, size)] * 2, indexing="ij")
    from_colour, to_colour = rng.uniform(20, 235, (2, 3))
    shade = (rows * rng.uniform() + columns * rng.uniform())[..., None] / 2
    background = from_colour + (to_colour - from_colour) * shade + _texture(rng, size)
    drift = rng.uniform(-0.02, 0.02, 2) * size  # pixels in a frame
    start, motion = rng.uniform(0.2, 0.8, (_NUM_DISCS, 2)), rng.uniform(-0.5, 0.5, (_NUM_DISCS, 2))
    radii, colours = rng.uniform(0.06, 0.2, _NUM_DISCS), rng.uniform(0, 255, (_NUM_DISCS, 3))
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for t in range(num_frames):
        picture = np.roll(background, np.rint(drift * t).astype(int), axis=(0, 1))
        for disc in range(_NUM_DISCS):
            row, column = start[disc] + motion[disc] * t / num_frames
            inside = np.hypot(rows - row, columns - column) < radii[disc]
            picture[inside] = colours[disc]
        frames[t] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return frames


def _texture(rng: np.random.Generator, size: int) -> _Picture:
    """Smooth noise between cells of a coarse grid, and a little grain; shape (S, S, 3)."""
    grid = rng.normal(0, 25, (_TEXTURE_GRID, _TEXTURE_GRID, 3))
    places = np.linspace(0, _TEXTURE_GRID - 1, size)
    low = np.minimum(places.astype(int), _TEXTURE_GRID - 2)
    part = (places - low)[:, None, None]
    grid = grid[low] * (1 - part) + grid[low + 1] * part  # (S, grid, 3)
    part = (places - low)[None, :, None]
    smooth: _Picture = grid[:, low] * (1 - part) + grid[:, low + 1] * part
    return smooth + rng.normal(0, 3, smooth.shape)
