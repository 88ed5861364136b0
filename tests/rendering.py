"""Small videos for the tests, and a reader of videos that decodes everything."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np

# libswscale's flags bilinear, full chroma interpolation, accurate rounding, bit-exact, which
# `video.pixels` documents.
SWS_FLAGS = 0x2 | 0x2000 | 0x40000 | 0x80000
# AVColorSpace -> SWS_CS.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}


@contextmanager
def usual_priority() -> Iterator[None]:
    """Give this thread back, at the end of the block, the priority that it had.

    Run as root, SVT-AV1 makes whoever opens it a thread of real time, and all that it starts from
    then on: two of these leave two cores to nobody else.
    """
    if sys.platform != "linux":
        yield
        return
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def moving_pictures(num_frames: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """Coloured tiles that move, with a bar that tells the frames apart."""
    rng = np.random.default_rng(width * 1000 + height)
    tiles = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pattern = tiles.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    pictures = []
    for step in range(num_frames):
        picture = np.roll(pattern, (3 * step, 2 * step), axis=(0, 1)).copy()
        left = 5 * step % max(1, width - 10)
        picture[height // 4 : height // 2, left : left + 10] = (255, step % 256, 0)
        pictures.append(picture)
    return pictures


def render(
    path: Path,
    *,
    pictures: Sequence[np.ndarray | av.VideoFrame] = (),
    num_frames: int = 30,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    group: int = 12,
    b_frames: int = 2,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    color: tuple[int, int] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Encode a video. `color` is (AVColorSpace, AVColorRange); `pts` are in units of a frame."""
    pictures = pictures or moving_pictures(num_frames, *size)
    first = pictures[0]
    height, width = (
        first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
    )
    container_options = container_options or {}
    with usual_priority(), av.open(str(path), "w", container_options=container_options) as file:
        file.metadata.update(metadata or {})
        stream = add_stream(file, codec, (width, height), pix_fmt=pix_fmt, rate=rate)
        stream.gop_size, stream.max_b_frames = group, b_frames
        stream.options = dict(options or {})
        if color is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = color
        encode(file, stream, pictures, pts)
    return path


def add_stream(
    file: av.container.OutputContainer,
    codec: str,
    size: tuple[int, int],
    *,
    pix_fmt: str = "yuv420p",
    rate: int = 25,
) -> av.VideoStream:
    stream = file.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    return stream


def encode(
    file: av.container.OutputContainer,
    stream: av.VideoStream,
    pictures: Sequence[np.ndarray | av.VideoFrame],
    pts: Sequence[int] | None = None,
) -> None:
    for number, picture in enumerate(pictures):
        if isinstance(picture, np.ndarray):
            picture = av.VideoFrame.from_ndarray(picture, format="rgb24")
        picture.pts = number if pts is None else pts[number]
        file.mux(stream.encode(picture))
    file.mux(stream.encode(None))


def decode_everything(path: Path, stream_index: int | None = None) -> list[av.VideoFrame]:
    """Decode all packets of a video in their order, passing over those that cannot be decoded."""
    frames: list[av.VideoFrame] = []
    with av.open(str(path), metadata_errors="replace") as file:
        stream = file.streams.best("video") if stream_index is None else file.streams[stream_index]
        stream.codec_context.thread_count = 1
        for packet in file.demux(stream):
            try:
                frames.extend(packet.decode())
            except av.FFmpegError:
                continue
    return frames


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Convert a frame as `video.pixels` says that it does, by a converter of its own."""
    arguments: dict[str, Any] = {}
    if not frame.format.is_rgb:
        is_full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        arguments = {
            "src_colorspace": MATRICES.get(frame.colorspace, 5),
            "src_color_range": 2 if is_full else 1,
            "dst_color_range": 2,
        }
    return frame.reformat(format="rgb24", interpolation=SWS_FLAGS, **arguments).to_ndarray()
