"""Writing video and pictures: clips out of the last minutes of a camera, and annotated copies."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.files import staged_file, write_bytes, write_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from PIL.ImageFont import FreeTypeFont, ImageFont

    _Pixels: TypeAlias = NDArray[np.uint8]

_TICKS = 90_000  # of a second
_TIME_BASE = Fraction(1, _TICKS)
_CRF = "26"  # of x264; blocks show in none of its frames of 640 pixels
_KEY_SECONDS = 1.0  # a clip starts so much early at most
_JPEG_QUALITY = 85
_CAPTION_SHARE = 1 / 22  # of the height of a frame, for a line of text


def shrink(frame: NDArray[np.uint8], max_width: int) -> NDArray[np.uint8]:
    """A frame (H, W, 3) of at most this width, of the same shape and with even sides for x264."""
    height, width = frame.shape[:2]
    scale = min(1.0, max_width / width)
    size = tuple(max(2, int(side * scale) // 2 * 2) for side in (width, height))
    return resized(frame, size[0], size[1])


def resized(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """A frame (H, W, 3) of another size."""
    from PIL import Image

    if frame.shape[:2] == (height, width):
        return frame
    resampling = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(frame).resize((width, height), resampling, reducing_gap=2.0))


def jpeg_bytes(frame: NDArray[np.uint8]) -> bytes:
    """A frame (H, W, 3) as the file of a picture."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(frame).save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()


def write_jpeg(path: Path, frame: NDArray[np.uint8]) -> None:
    """Write a frame (H, W, 3) as a picture, or leave what was there.

    Raises:
        FileWriteError: If it cannot be written.
    """
    write_bytes(path, jpeg_bytes(frame))


def draw_caption(frame: NDArray[np.uint8], lines: Sequence[str]) -> NDArray[np.uint8]:
    """A copy of a frame (H, W, 3) with lines of text at its lower left, white on black."""
    if not lines:
        return frame
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    size = max(10, round(picture.height * _CAPTION_SHARE))
    font, step, margin = _font(size), round(size * 1.3), round(size * 0.4)
    top = picture.height - margin - step * len(lines)
    for line in lines:
        right = draw.textlength(line, font=font)
        box = (margin, top, min(margin + right + 2 * margin, picture.width), top + step)
        draw.rectangle(box, fill=(0, 0, 0))
        draw.text((2 * margin, top + step / 2), line, font=font, fill=(255, 255, 255), anchor="lm")
        top += step
    return np.asarray(picture)


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    try:  # it has letters of more scripts than the font that Pillow brings along
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


class VideoWriter:
    """Writes frames as an MP4 file (H.264) that appears when it is closed, or not at all.

        with VideoWriter(path, width=640, height=360) as writer:
            writer.write(frame, seconds)

    Args:
        path: Of the file; one that is there is replaced.
        width: Of the frames, even; those of another size are resized.
        height: Likewise.

    Raises:
        FileWriteError: If it cannot be written; of any method.
        ValueError: If a side is odd.
    """

    def __init__(self, path: str | Path, *, width: int, height: int) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"The video is of {width}x{height} pixels; both have to be even.")
        self.path = Path(path)
        self._size = width, height
        self._last_ticks = -1
        self._start: float | None = None
        self._stack = ExitStack()
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staged = self._stack.enter_context(staged_file(self.path, durable=False))
            try:
                self._container = av.open(str(staged), "w", format="mp4")
                self._stream = self._container.add_stream("libx264", rate=30)
                self._stream.width, self._stream.height = width, height
                self._stream.pix_fmt = "yuv420p"
                self._stream.time_base = self._stream.codec_context.time_base = _TIME_BASE
                self._stream.options = {"crf": _CRF, "preset": "veryfast"}
            except BaseException as exc:
                self._stack.__exit__(type(exc), exc, exc.__traceback__)
                raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, exc: BaseException | None, trace: Any) -> None:
        if exc is None:
            self.close()
        else:
            self.discard()

    def write(self, frame: NDArray[np.uint8], seconds: float) -> None:
        """Add a frame (H, W, 3), shown at a time later than the last one's; the first is at 0."""
        self._start = seconds if self._start is None else self._start
        ticks = max(round((seconds - self._start) * _TICKS), self._last_ticks + 1)
        self._last_ticks = ticks
        picture = av.VideoFrame.from_ndarray(resized(frame, *self._size), "rgb24")
        picture.pts, picture.time_base = ticks, _TIME_BASE
        with write_errors(self.path):
            self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Complete the file; a second call does nothing."""
        with write_errors(self.path):
            try:
                self._container.mux(self._stream.encode(None))
                self._container.close()
            except BaseException as exc:
                self._stack.__exit__(type(exc), exc, exc.__traceback__)
                raise
            self._stack.close()

    def discard(self) -> None:
        """Leave no file."""
        with suppress(OSError, ValueError):  # a container without a frame, or a full disk
            self._container.close()
        self._stack.__exit__(_DiscardedError, _DiscardedError(), None)


class _DiscardedError(Exception):
    """Makes a staged file go."""


@dataclass(frozen=True)
class _Packet:
    seconds: float
    is_key: bool
    data: bytes


class FootageRing:
    """The last frames of a camera, encoded, within bounds of memory and time.

    Frames are encoded as they come (H.264 without frames that wait for later ones, a keyframe each
    second), so that a clip of any part is a matter of copying packets.

    Args:
        width: Of the frames, even.
        height: Likewise.
        max_seconds: Frames this much older than the newest are forgotten.
        max_bytes: The oldest are forgotten beyond it.
        frames_per_second: At most.
    """

    def __init__(
        self,
        *,
        width: int,
        height: int,
        max_seconds: float,
        max_bytes: int,
        frames_per_second: float,
    ) -> None:
        self.size = width, height
        self._max_seconds, self._max_bytes = max_seconds, max_bytes
        self._packets: deque[_Packet] = deque()
        self._num_bytes = 0
        self._key_seconds = -np.inf
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height = width, height
        encoder.pix_fmt = "yuv420p"
        encoder.time_base = _TIME_BASE
        encoder.framerate = Fraction(round(frames_per_second * 1000), 1000)
        encoder.thread_count = 1  # each camera has an encoder
        encoder.options = {
            "crf": _CRF,
            "preset": "veryfast",
            "tune": "zerolatency",
            "forced-idr": "1",
            "x264-params": "keyint=infinite:scenecut=0",
        }
        self._encoder = encoder
        self._start = 0.0
        self._last_ticks = -1

    def __len__(self) -> int:
        return len(self._packets)

    @property
    def num_bytes(self) -> int:
        """What its packets take."""
        return self._num_bytes

    @property
    def start_seconds(self) -> float:
        """Of its oldest frame; infinite while there is none."""
        return self._packets[0].seconds if self._packets else np.inf

    @property
    def end_seconds(self) -> float:
        """Of its newest frame; minus infinite while there is none."""
        return self._packets[-1].seconds if self._packets else -np.inf

    def add(self, frame: NDArray[np.uint8], seconds: float) -> None:
        """Add a frame (H, W, 3) of this size; times do not descend."""
        if self._last_ticks < 0:
            self._start = seconds
        ticks = max(round((seconds - self._start) * _TICKS), self._last_ticks + 1)
        self._last_ticks = ticks
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        picture.pts, picture.time_base = ticks, _TIME_BASE
        is_key = seconds - self._key_seconds >= _KEY_SECONDS
        if is_key:
            self._key_seconds = seconds
            picture.pict_type = av.video.frame.PictureType.I
        (packet,) = self._encoder.encode(picture)  # one for each frame, by `zerolatency`
        data = bytes(packet)
        self._packets.append(_Packet(seconds, packet.is_keyframe, data))
        self._num_bytes += len(data)
        self._forget(seconds)

    def _forget(self, now: float) -> None:
        """Drop whole groups from the old end, since frames without their keyframe are useless."""
        while self._packets and (
            self._num_bytes > self._max_bytes
            or self._packets[0].seconds < now - self._max_seconds
            or not self._packets[0].is_key
        ):
            self._num_bytes -= len(self._packets.popleft().data)

    def _between(self, start: float, end: float) -> list[_Packet]:
        """Packets from the keyframe before `start` to `end`, both included."""
        packets = list(self._packets)
        times = [packet.seconds for packet in packets]
        first = max(bisect_right(times, start) - 1, 0)
        while first > 0 and not packets[first].is_key:
            first -= 1
        return packets[first : bisect_right(times, end)]

    def write_clip(self, path: Path, start: float, end: float) -> bool:
        """Write the frames from a time to another as MP4; False where there are none.

        The clip begins up to a second early, with a keyframe.

        Raises:
            FileWriteError: If it cannot be written.
        """
        chosen = self._between(start, end)
        if not chosen:
            return False
        source = io.BytesIO(b"".join(packet.data for packet in chosen))
        with (
            write_errors(path),
            staged_file(path, durable=False) as staged,
            av.open(source, format="h264") as given,
            av.open(str(staged), "w", format="mp4") as made,
        ):
            stream = made.add_stream_from_template(given.streams.video[0])
            times = [packet.seconds - chosen[0].seconds for packet in chosen]
            ticks = [round(seconds * _TICKS) for seconds in times]
            ends = [*ticks[1:], ticks[-1] + _TICKS // 10]
            packets = (packet for packet in given.demux(video=0) if packet.size)
            for packet, at, until in zip(packets, ticks, ends, strict=True):
                packet.stream = stream
                packet.time_base = _TIME_BASE
                packet.pts = packet.dts = at
                packet.duration = until - at
                made.mux(packet)
        return True

    def frame_at(self, seconds: float) -> NDArray[np.uint8] | None:
        """The frame (H, W, 3) nearest to a time, within the ring; None where it is empty."""
        if not self._packets:
            return None
        times = [packet.seconds for packet in self._packets]
        place = min(bisect_left(times, seconds), len(times) - 1)
        if place and seconds - times[place - 1] < times[place] - seconds:
            place -= 1
        chosen = self._between(times[place], times[place])
        source = io.BytesIO(b"".join(packet.data for packet in chosen))
        with av.open(source, format="h264") as given:
            *_, frame = given.decode(video=0)
        return np.asarray(frame.to_ndarray(format="rgb24"))
