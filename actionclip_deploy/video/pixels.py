"""From decoded frames to RGB arrays: colour matrix, range, cropping, size and orientation.

Also times that are written into pixels, to tell the age of a frame wherever it turns up.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Of libswscale/swscale.h. Bilinear, exact rounding, chroma interpolated for every pixel, and the
# same result on every kind of CPU; the faster default repeats chroma values and rounds by SIMD.
_SWS_FILTERS = {"bilinear": 0x2, "bicubic": 0x4}
_SWS_FULL_CHR_H_INT, _SWS_ACCURATE_RND, _SWS_BITEXACT = 0x2000, 0x40000, 0x80000
_SWS_EXACT = _SWS_FULL_CHR_H_INT | _SWS_ACCURATE_RND | _SWS_BITEXACT
_SWS_FLAGS = _SWS_FILTERS["bilinear"] | _SWS_EXACT

# AVColorSpace of a frame -> SWS_CS of the conversion.
_BT709, _FCC, _BT601, _SMPTE240M, _BT2020 = 1, 4, 5, 7, 9
_MATRICES = {1: _BT709, 4: _FCC, 5: _BT601, 6: _BT601, 7: _SMPTE240M, 9: _BT2020, 10: _BT2020}
_LIMITED_RANGE, _FULL_RANGE = 1, 2

# Of these, by way of planar RGB, the conversion gives the same values in half of the time:
# libswscale has SIMD for it that rounds exactly, and plain C for packed RGB. It holds for even
# sides and no scaling alone: other sides take another filter, which is off by one in places.
_FORMATS_BY_WAY_OF_PLANES = frozenset(
    {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12"}
    | {"yuv420p10le", "yuv422p10le", "yuv444p10le", "yuva420p"}
)


def resized_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the shorter one at `short_side`; the longer one is cut, not rounded."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


@dataclass(frozen=True)
class Scaling:
    """To what frames are scaled while their colours are converted.

    libswscale widens its filter when it shrinks a frame, as Pillow does; its bicubic curve is
    another one (B = 0, C = 0.6), and chroma is scaled once and not twice.

    Attributes:
        short_side: Of a scaled frame, in pixels.
        interpolation: `"bicubic"` or `"bilinear"`.
    """

    short_side: int
    interpolation: Literal["bicubic", "bilinear"]


# A longer side than this is not made in one step: that of a frame of 128 to 1, with 256 asked for.
_MAX_SCALED_SIDE = 2**15


@dataclass(frozen=True)
class Orientation:
    """How the stored frame is turned for display: transposed first, then mirrored."""

    is_transposed: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False

    @classmethod
    def of_frame(cls, frame: VideoFrame) -> Orientation:
        """Read the display matrix of a frame; an angle in between goes to the nearest quarter."""
        matrix = _display_matrix(frame)
        if matrix is None:
            # A matrix after an entry without a name tells its turn, and whether it mirrors is lost.
            quarters = round(-frame.rotation / 90) % 4
            return cls(quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3))
        # A pixel at (x, y) is shown at (a x + c y, b x + d y) plus a shift.
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5]
        is_transposed = abs(int(b)) > abs(int(a))
        x_sign, y_sign = (c, b) if is_transposed else (a, d)
        return cls(is_transposed, bool(x_sign < 0), bool(y_sign < 0))

    @property
    def rotation_degrees(self) -> int:
        """Clockwise turn, after mirroring left and right where the matrix mirrors."""
        if self.is_transposed:
            return 90 if self.mirrors_x else 270
        return 180 if self.mirrors_y else 0

    def turn(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn (H, W, 3) as stored into (H, W, 3) as displayed."""
        if self.is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if self.mirrors_y else 1, :: -1 if self.mirrors_x else 1]


def _display_matrix(frame: VideoFrame) -> bytes | None:
    """The nine numbers of the display matrix, int32, where a frame has one.

    `frame.side_data` is not asked: it stays on the frame and refers back to it, so that only the
    garbage collector would free the frame, and it raises a `ValueError` where one of the entries
    is of a kind that PyAV has no name for, as EXIF is (PyAV 18.1, PyAV-Org/PyAV#2392). Made here,
    it refers to the frame alone, and has the entries up to the first without a name. FFmpeg puts
    the matrix of EXIF before the EXIF itself. None as well where it comes after one without.
    """
    from av.sidedata.sidedata import SideDataContainer, Type

    make: Any = SideDataContainer
    entries = make.__new__(make)
    with suppress(ValueError):
        make.__init__(entries, frame)
    for entry in entries:
        try:
            if entry.type is Type.DISPLAYMATRIX:
                return bytes(entry)
        except ValueError:
            break
    return None


@dataclass(frozen=True)
class Cropping:
    """Stored pixels that the container asks to cut off at each side, before any turning."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @classmethod
    def of_stream(cls, container: InputContainer, stream: VideoStream) -> Cropping:
        """Ask FFmpeg what Matroska's PixelCrop elements or the `clap` box of MP4 come to.

        PyAV does not tell, but hands it on where a stream is written. So the header of a Matroska
        file with this stream is written, to memory, and read: some 70 microseconds.
        """
        import av

        if not {"matroska", "mov"} & set(container.format.name.split(",")):
            return cls()
        buffer = io.BytesIO()
        try:
            with av.open(buffer, "w", format="matroska", options={"live": "1"}) as output:
                output.add_stream_from_template(stream, opaque=True)
                output.start_encoding()
                header = buffer.getvalue()
        except (av.FFmpegError, ValueError):
            return cls()  # a codec that Matroska has no name for
        return cls(**dict(_cropping_elements(header)))


# Of Matroska (RFC 9559): masters on the way to the elements, and these.
_MASTERS = (0x18538067, 0x1654AE6B, 0xAE, 0xE0)  # Segment, Tracks, TrackEntry, Video
_CROPPING = {0x54AA: "bottom", 0x54BB: "top", 0x54CC: "left", 0x54DD: "right"}


def _cropping_elements(header: bytes) -> Iterator[tuple[str, int]]:
    place = 0
    while place < len(header):
        id_bytes = 9 - header[place].bit_length()
        kind = int.from_bytes(header[place : place + id_bytes], "big")
        place += id_bytes
        size_bytes = 9 - header[place].bit_length()
        mask = (1 << 7 * size_bytes) - 1
        size = int.from_bytes(header[place : place + size_bytes], "big") & mask
        place += size_bytes
        if kind in _MASTERS:
            continue  # its elements follow
        if kind in _CROPPING:
            yield _CROPPING[kind], int.from_bytes(header[place : place + size], "big")
        place += size


class FrameConverter:
    """Converts the frames of one video to RGB of one size and orientation.

    A frame without a colour matrix is taken for BT.601 and one without a range for limited range,
    whatever its size, as FFmpeg does. Matrices that libswscale lacks (YCgCo, ICtCp) are taken for
    BT.601 too. Transfer functions stay as they are: HDR is not mapped to SDR. Alpha is dropped,
    and pixels are taken for square. Frames of another size than the first are scaled to it.

    Args:
        first_frame: The first frame of the video, which sets size and orientation.
        cropping: What the container asks to cut off. As FFmpeg does, whole chroma samples stay.
    """

    def __init__(self, first_frame: VideoFrame, cropping: Cropping = Cropping()) -> None:
        from av.video.reformatter import VideoReformatter

        self._stored_width = first_frame.width
        self._stored_height = first_frame.height
        self._window = _window(first_frame, cropping)
        self.orientation = Orientation.of_frame(first_frame)
        self._reformatter = VideoReformatter()
        self._packer = VideoReformatter()
        self._scaler = VideoReformatter()
        self._lock = Lock()  # whoever gets a frame may convert it, in any thread

    @property
    def width(self) -> int:
        """Width as displayed, in pixels."""
        return self._shown_sides[0]

    @property
    def height(self) -> int:
        """Height as displayed, in pixels."""
        return self._shown_sides[1]

    @property
    def _shown_sides(self) -> tuple[int, int]:
        rows, columns = self._window
        width, height = columns.stop - columns.start, rows.stop - rows.start
        return (height, width) if self.orientation.is_transposed else (width, height)

    def size_for(self, scaling: Scaling | None) -> tuple[int, int]:
        """Width and height of what `convert` gives, in pixels.

        They are those as displayed where nothing is to be scaled, or the frame has a part that
        is cut off, or is far longer than it is wide.
        """
        rows, columns = self._window
        is_whole = rows.stop - rows.start == self._stored_height
        is_whole = is_whole and columns.stop - columns.start == self._stored_width
        if scaling is None or not is_whole:
            return self._shown_sides
        scaled = resized_size(*self._shown_sides, scaling.short_side)
        return self._shown_sides if max(scaled) > _MAX_SCALED_SIDE else scaled

    def convert(self, frame: VideoFrame, scaling: Scaling | None = None) -> NDArray[np.uint8]:
        """Give a frame as RGB, uint8, shape (H, W, 3), not contiguous.

        Args:
            frame: A frame of the video.
            scaling: What to scale it to on the way; see `size_for`. None for nothing.

        Raises:
            VideoError: If libswscale has no conversion from the frame's pixel format.
        """
        from av import FFmpegError

        sides = self.size_for(scaling)
        is_scaled = scaling is not None and sides != self._shown_sides
        width, height = self._stored_width, self._stored_height
        with self._lock:
            try:
                if is_scaled:
                    assert scaling is not None
                    width, height = sides[::-1] if self.orientation.is_transposed else sides
                    converted = self._scale(frame, width, height, scaling.interpolation)
                else:
                    converted = self._reformat(frame)
            except MemoryError:
                raise
            except FFmpegError as exc:
                raise VideoError(
                    f"Frames of the pixel format {frame.format.name} cannot be converted to RGB "
                    f"({exc.strerror}); convert the video, to H.264 for instance."
                ) from exc
        # Not `to_ndarray`, which copies; whoever gets this puts it into a clip, which is a copy.
        plane = converted.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        pixels = rows[:height, : 3 * width].reshape(-1, width, 3)
        if _is_limited_gray(frame):
            pixels = _FULL_OF_LIMITED[pixels]
        return self.orientation.turn(pixels if is_scaled else pixels[self._window])

    def _scale(self, frame: VideoFrame, width: int, height: int, interpolation: str) -> VideoFrame:
        return self._scaler.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=_SWS_FILTERS[interpolation] | _SWS_EXACT,
            threads=1,
            **_color_arguments(frame),
        )

    def _reformat(self, frame: VideoFrame) -> VideoFrame:
        goes_by_planes = self._goes_by_planes(frame)
        converted = self._reformatter.reformat(
            frame,
            width=self._stored_width,
            height=self._stored_height,
            format="gbrp" if goes_by_planes else "rgb24",
            interpolation=_SWS_FLAGS,
            threads=1,
            **_color_arguments(frame),
        )
        if goes_by_planes:
            converted = self._packer.reformat(converted, format="rgb24", threads=1)
        return converted

    def _goes_by_planes(self, frame: VideoFrame) -> bool:
        width, height = frame.width, frame.height
        return (
            (width, height) == (self._stored_width, self._stored_height)
            and width % 2 == height % 2 == 0
            and frame.format.name in _FORMATS_BY_WAY_OF_PLANES
        )


def _window(frame: VideoFrame, cropping: Cropping) -> tuple[slice, slice]:
    """Rows and columns that are shown, of a frame as it is stored."""
    if cropping == Cropping():
        return slice(0, frame.height), slice(0, frame.width)
    sides = []
    for stored, before, after, component in (
        (frame.height, cropping.top, cropping.bottom, [c.height for c in frame.format.components]),
        (frame.width, cropping.left, cropping.right, [c.width for c in frame.format.components]),
    ):
        # Pixels to a chroma sample, which are not parted.
        step = round(stored / min(component, default=stored))
        size = (stored - before - after) // step * step
        start = before // step * step
        # A container that leaves nothing is not believed.
        sides.append(slice(start, start + size) if size > 0 else slice(0, stored))
    return sides[0], sides[1]


# libswscale takes gray for full range whatever it is told; this makes it so.
_FULL_OF_LIMITED = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


def _is_limited_gray(frame: VideoFrame) -> bool:
    return frame.color_range == _LIMITED_RANGE and frame.format.name.startswith(("gray", "ya"))


def _color_arguments(frame: VideoFrame) -> dict[str, Any]:
    name = frame.format.name
    if frame.format.is_rgb or name.startswith(("gray", "ya", "mono", "pal")):
        return {}
    is_full = frame.color_range == _FULL_RANGE or name.startswith("yuvj")
    return {
        "src_colorspace": _MATRICES.get(frame.colorspace, _BT601),
        "src_color_range": _FULL_RANGE if is_full else _LIMITED_RANGE,
        "dst_color_range": _FULL_RANGE,
    }


_CLOCK_BITS = 32
_CLOCK_ROWS = 2


def stamp_clock(pixels: NDArray[np.uint8], wall_seconds: float) -> NDArray[np.uint8]:
    """Write a time into the top of a frame, so that its age can be told wherever it turns up.

    The milliseconds modulo 2^32 (49 days), as 32 black and white blocks in two rows; they
    survive encoding and scaling.

    Args:
        pixels: RGB, uint8, shape (H, W, 3), of 64 x 16 or more. Not changed.
        wall_seconds: Seconds since 1970.

    Raises:
        ValueError: If the frame is smaller.
    """
    height, width = pixels.shape[:2]
    side, columns = _clock_block(height, width)
    number = int(wall_seconds * 1000) % 2**_CLOCK_BITS
    bits = (number >> np.arange(_CLOCK_BITS, dtype=np.uint64).astype(np.int64)) & 1
    blocks = (bits * 255).astype(np.uint8).reshape(_CLOCK_ROWS, columns)
    stamped: NDArray[np.uint8] = pixels.copy()
    stamped[: side * _CLOCK_ROWS, : side * columns] = blocks.repeat(side, 0).repeat(side, 1)[
        ..., None
    ]
    return stamped


def read_clock(pixels: NDArray[np.uint8], *, now: float) -> float:
    """Read what `stamp_clock` wrote: seconds since 1970, of the 49 days before and after `now`.

    Args:
        pixels: RGB, uint8, shape (H, W, 3), in the size that it was stamped in.
        now: Seconds since 1970.
    """
    side, columns = _clock_block(*pixels.shape[:2])
    area = pixels[: side * _CLOCK_ROWS, : side * columns].mean(axis=2)
    blocks = area.reshape(_CLOCK_ROWS, side, columns, side).mean(axis=(1, 3))
    number = sum(int(bit) << place for place, bit in enumerate((blocks > 127).ravel()))
    turn = 2**_CLOCK_BITS
    behind = (int(now * 1000) - number + turn // 2) % turn - turn // 2
    return float(int(now * 1000) - behind) / 1000


def _clock_block(height: int, width: int) -> tuple[int, int]:
    columns = _CLOCK_BITS // _CLOCK_ROWS
    side = min(width // columns, height // (2 * _CLOCK_ROWS))
    if side < 4:
        raise ValueError(
            f"A frame of {width} x {height} is too small for a clock; it takes 64 x 16 or more."
        )
    return side, columns
