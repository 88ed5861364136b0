"""Videos of `motions` as files, with the list of their labels that training reads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.motions.rendering import FRAME_SIZE, render_clip
from actionclip_deploy.motions.vocabulary import SPLITS, MotionLabel, all_labels, labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

CODECS = ("libx264", "mpeg4")

_FPS = range(8, 16)
_CRF = range(18, 31)  # x264's constant rate factor, from nearly lossless to visibly blurred
_MPEG4_BITS_PER_PIXEL = 0.4


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8],
    *,
    fps: int = 12,
    codec: str = "libx264",
    crf: int = 23,
) -> Path:
    """Encode frames as a video file.

    Args:
        path: Where to; the ending says which container.
        frames: RGB, uint8, shape (F, H, W, 3), H and W even.
        fps: Frames per second.
        codec: One of `CODECS`; mpeg4 is in every build of FFmpeg and looks worse.
        crf: Constant rate factor of libx264, 0 to 51, lower is better; unused by mpeg4.

    Returns:
        The path.

    Raises:
        ShapeError: If the frames are not such an array.
        ValueError: If the codec is another.
    """
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; it has to be one of {list(CODECS)}")
    shape = frames.shape
    if (
        frames.dtype != np.uint8
        or len(shape) != 4
        or shape[-1] != 3
        or any(n % 2 for n in shape[1:3])
    ):
        raise ShapeError(
            f"frames are {frames.dtype} of shape {shape}; give uint8 (F, H, W, 3) of even H and W"
        )
    path = Path(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes whatever the number of cores
        if codec == "libx264":
            stream.options = {"crf": str(crf), "preset": "veryfast"}
        else:
            stream.bit_rate = int(shape[1] * shape[2] * fps * _MPEG4_BITS_PER_PIXEL)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


def write_dataset(
    folder: str | Path,
    split: str,
    num_videos: int,
    seed: int,
    *,
    size: int = FRAME_SIZE,
    codec: str = "libx264",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write videos of a split, the list that says what each shows, and the labels.

    XX

    Args:
        folder: Made if missing. It gets SPLIT/NUMBER.mp4; SPLIT.txt, a line `path label` for
            each video, paths relative to the folder; and labels.csv, the labels of all splits.
        split: One of `SPLITS`.
        num_videos: How many.
        seed: 0 or more; the same seed gives the same videos.
        size: Height and width of the videos in pixels.
        codec: One of `CODECS`.
        progress: Called with the number of videos written and `num_videos`.

    Returns:
        The path of the list.

    Raises:
        ValueError: If there is no such split or codec.
    """
    folder = Path(folder)
    numbers = {label: number for number, label in enumerate(all_labels())}
    shown = draw_labels(split, num_videos, seed)
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, label in enumerate(shown):
        name = f"{split}/{index:06d}.mp4"
        draw = np.random.default_rng((seed, SPLITS.index(split), index))
        fps, crf = (int(draw.choice(values)) for values in (_FPS, _CRF))
        frames = render_clip(label, seed=int(draw.integers(2**63)), size=size)
        write_video(folder / name, frames, fps=fps, codec=codec, crf=crf)
        lines.append(f"{name} {numbers[label]}\n")
        if progress:
            progress(index + 1, num_videos)
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [("id", "name"), *((number, label) for label, number in numbers.items())]
        )
    annotations = folder / f"{split}.txt"
    annotations.write_text("".join(lines), encoding="utf-8")
    return annotations


def draw_labels(split: str, num_videos: int, seed: int) -> list[MotionLabel]:
    """Draw which label each video of a split shows, every label as often as any other up to one.

    Raises:
        ValueError: If there is no such split.
    """
    pool = labels(split)
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    rounds = -(-num_videos // len(pool))
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(rounds)] or [np.arange(0)])
    return [pool[index] for index in order[:num_videos]]
