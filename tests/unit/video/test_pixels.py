"""Colours and orientation, against bars of known colours and the arithmetic of the standards."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from rendering import moving_pictures, render, to_rgb

from actionclip_deploy.errors import VideoError
from actionclip_deploy.preprocess import resize_frames
from actionclip_deploy.video import VideoReader, read_clip
from actionclip_deploy.video.pixels import (
    _FORMATS_BY_WAY_OF_PLANES,
    Cropping,
    FrameConverter,
    Scaling,
)

COLORS = np.array(
    [
        (255, 255, 255),
        (255, 255, 0),
        (0, 255, 255),
        (0, 255, 0),
        (255, 0, 255),
        (255, 0, 0),
        (0, 0, 255),
        (0, 0, 0),
        (128, 128, 128),
        (200, 100, 50),
    ]
)
BAR_WIDTH = 16
# Two roundings, to YUV and back, of which one step is up to 1.9 levels in 8 bits.
TOLERANCE_LEVELS = 2

# AVColorSpace and the weights of red and blue in luma (ITU-T H.273, table 4).
BT709, BT470BG, SMPTE170M, SMPTE240M, BT2020, UNSPECIFIED = 1, 5, 6, 7, 9, 2
WEIGHTS = {
    BT709: (0.2126, 0.0722),
    BT470BG: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
    UNSPECIFIED: (0.299, 0.114),
}
LIMITED, FULL = 1, 2


def bars_in_yuv(matrix: int, color_range: int, bits: int) -> np.ndarray:
    """The colours as Y, Cb, Cr, shape (num_colors, 3), by the equations of H.273."""
    red_weight, blue_weight = WEIGHTS[matrix]
    red, green, blue = (COLORS / 255).T
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    chroma_blue = (blue - luma) / (2 * (1 - blue_weight))
    chroma_red = (red - luma) / (2 * (1 - red_weight))
    half, largest = 2 ** (bits - 1), 2**bits - 1
    if color_range == FULL:
        values = [luma * largest, chroma_blue * largest + half, chroma_red * largest + half]
    else:
        step = 2 ** (bits - 8)
        values = [(219 * luma + 16) * step]
        values += [(224 * chroma + 128) * step for chroma in (chroma_blue, chroma_red)]
    return np.rint(np.stack(values, axis=1)).clip(0, largest).astype(np.uint16)


def bars(matrix: int, color_range: int, pix_fmt: str) -> av.VideoFrame:
    width, height = BAR_WIDTH * len(COLORS), 32
    frame = av.VideoFrame(width, height, pix_fmt)
    bits = frame.format.components[0].bits
    colors = bars_in_yuv(matrix, color_range, bits)
    for plane, values in zip(frame.planes, colors.T, strict=True):
        row = values.repeat(BAR_WIDTH * plane.width // width)
        content = np.zeros((plane.height, plane.line_size), np.uint8)
        pixels = np.tile(row.astype(np.uint8 if bits == 8 else "<u2"), (plane.height, 1))
        content[:, : pixels.shape[1] * pixels.itemsize] = pixels.view(np.uint8)
        plane.update(content.tobytes())
    frame.colorspace, frame.color_range = matrix, color_range
    return frame


def check_bars(path: Path) -> None:
    frame = read_clip(path, num_frames=1).frames[0].astype(int)
    for number, color in enumerate(COLORS):
        # Chroma of neighbouring bars runs together at their borders.
        inside = frame[:, BAR_WIDTH * number + 5 : BAR_WIDTH * (number + 1) - 5]
        assert np.abs(inside - color).max() <= TOLERANCE_LEVELS, color


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p12le"])
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("matrix", [BT709, BT470BG, SMPTE170M, SMPTE240M, BT2020])
def test_colours_follow_matrix_range_and_depth(
    tmp_path: Path, matrix: int, color_range: int, pix_fmt: str
) -> None:
    picture = bars(matrix, color_range, pix_fmt)
    path = render(
        tmp_path / "bars.mkv",
        pictures=[picture],
        codec="ffv1",
        pix_fmt=pix_fmt,
        b_frames=0,
        color=(matrix, color_range),
    )
    check_bars(path)


@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("matrix", [BT709, SMPTE170M, BT2020])
@pytest.mark.parametrize(
    ("codec", "options", "name"),
    [
        ("libx264", {"qp": "0"}, "bars.mp4"),
        # A transport stream, because FFmpeg writes an MP4 of so short a stream in some runs only.
        ("libx265", {"x265-params": "lossless=1:log-level=none"}, "bars.ts"),
    ],
)
def test_colours_follow_what_the_coded_stream_says(
    tmp_path: Path, codec: str, options: dict[str, str], name: str, matrix: int, color_range: int
) -> None:
    path = render(
        tmp_path / name,
        pictures=[bars(matrix, color_range, "yuv420p") for _ in range(2)],
        codec=codec,
        b_frames=0,  # with some, the muxer refused x265's times in a run of many
        options=options,
        color=(matrix, color_range),
    )
    check_bars(path)


@pytest.mark.parametrize("height", [32, 1080])
def test_a_matrix_that_is_not_named_is_bt601_at_any_size(tmp_path: Path, height: int) -> None:
    picture = bars(UNSPECIFIED, LIMITED, "yuv444p")
    tall = picture.reformat(width=picture.width, height=height, interpolation="POINT")
    path = render(
        tmp_path / "bars.mkv", pictures=[tall], codec="ffv1", pix_fmt="yuv444p", b_frames=0
    )
    check_bars(path)


def test_motion_jpeg_has_full_range(tmp_path: Path) -> None:
    picture = bars(SMPTE170M, FULL, "yuvj444p")
    path = render(
        tmp_path / "bars.mov",
        pictures=[picture],
        codec="mjpeg",
        pix_fmt="yuvj444p",
        b_frames=0,
        options={"qmin": "1", "qmax": "1", "q": "1"},
        color=(SMPTE170M, FULL),
    )
    check_bars(path)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name"),
    [("ffv1", "bgr0", "rgb.mkv"), ("png", "rgb24", "rgb.mov"), ("rawvideo", "bgr24", "rgb.avi")],
)
def test_rgb_stays_as_it_is(tmp_path: Path, codec: str, pix_fmt: str, name: str) -> None:
    pictures = moving_pictures(3, 40, 24)
    path = render(tmp_path / name, pictures=pictures, codec=codec, pix_fmt=pix_fmt, b_frames=0)
    with VideoReader(path) as reader:
        assert np.array_equal(reader.read([2, 0]).frames, np.stack([pictures[2], pictures[0]]))


@pytest.mark.parametrize("size", [(97, 65), (96, 65), (97, 64), (33, 17)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p"])
def test_odd_sizes_keep_their_last_row_and_column(
    tmp_path: Path, size: tuple[int, int], pix_fmt: str
) -> None:
    color = np.array((200, 90, 40), np.uint8)
    picture = np.broadcast_to(color, (size[1], size[0], 3)).copy()
    path = render(
        tmp_path / "odd.mkv", pictures=[picture], codec="ffv1", pix_fmt=pix_fmt, b_frames=0
    )
    clip = read_clip(path, num_frames=1)
    assert (clip.width, clip.height) == size
    assert np.abs(clip.frames.astype(int) - color).max() <= TOLERANCE_LEVELS


def with_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a, b, c, d of the display matrix into the track header of an MP4 file."""
    content = bytearray(path.read_bytes())
    # After the type: version and flags, 2 times, track, 12 bytes, 8 reserved, 8 of other fields.
    start = content.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 8
    a, b, c, d = (value * 65536 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("matrix", "degrees", "turn"),
    [
        ((1, 0, 0, 1), 0, lambda frames: frames),
        ((0, 1, -1, 0), 90, lambda frames: np.rot90(frames, -1, axes=(1, 2))),
        ((-1, 0, 0, -1), 180, lambda frames: np.rot90(frames, 2, axes=(1, 2))),
        ((0, -1, 1, 0), 270, lambda frames: np.rot90(frames, 1, axes=(1, 2))),
        ((-1, 0, 0, 1), 0, lambda frames: frames[:, :, ::-1]),
        ((1, 0, 0, -1), 180, lambda frames: frames[:, ::-1]),
        ((0, 1, 1, 0), 270, lambda frames: frames.transpose(0, 2, 1, 3)),
    ],
)
def test_frames_are_turned_as_the_display_matrix_says(
    tmp_path: Path, matrix: tuple[int, int, int, int], degrees: int, turn
) -> None:
    path = render(tmp_path / "turned.mp4", num_frames=8)
    with VideoReader(path) as reader:
        stored = reader.read([7, 2]).frames
    with VideoReader(with_display_matrix(path, matrix)) as reader:
        expected = turn(stored)
        assert reader.rotation_degrees == degrees
        assert (reader.height, reader.width) == expected.shape[1:3]
        assert np.array_equal(reader.read([7, 2]).frames, expected)


# Of smooth pictures; two ways to a smaller frame differ most at sharp edges.
MAX_MEAN_OF_SCALED = 1.0


def smooth_pictures(num_frames: int, width: int, height: int) -> list[np.ndarray]:
    y, x = np.mgrid[:height, :width]
    return [
        np.stack(
            [
                127 + 120 * np.sin(x / 23 + step),
                127 + 120 * np.cos(y / 17),
                255 * x / width,
            ],
            axis=-1,
        ).astype(np.uint8)
        for step in range(num_frames)
    ]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1), (0, -1, 1, 0)])
@pytest.mark.parametrize("size", [(320, 180), (183, 241)])
@pytest.mark.parametrize("short_side", [64, 300])
def test_scaled_frames_are_nearly_those_that_are_resized_afterwards(
    tmp_path: Path,
    matrix: tuple[int, int, int, int],
    size: tuple[int, int],
    short_side: int,
    interpolation,
) -> None:
    path = tmp_path / "turned.mp4"
    render(path, pictures=smooth_pictures(4, *size), pix_fmt="yuv444p", options={"qp": "4"})
    with_display_matrix(path, matrix)
    scaling = Scaling(short_side, interpolation)
    with VideoReader(path) as reader:
        frames = reader.read([0, 3]).frames
        expected = resize_frames(frames, short_side=short_side, interpolation=interpolation)
        reader.scale_to(scaling)
        assert (reader.width, reader.height) == frames.shape[2:0:-1]
        scaled = reader.read([0, 3]).frames
        assert scaled.shape == expected.shape
        assert np.abs(scaled.astype(int) - expected).mean() < MAX_MEAN_OF_SCALED
        in_order = [pixels.copy() for _, pixels in reader.read_in_order([0, 3])]
        assert np.array_equal(in_order, scaled)
        live = [convert(scaling).copy() for _, convert in reader.read_all()]
        assert np.array_equal([live[0], live[3]], scaled)
        reader.scale_to(None)
        assert np.array_equal(reader.read([0, 3]).frames, frames)


def test_frames_that_have_the_size_already_are_converted_exactly(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=3, size=(96, 64))
    with VideoReader(path) as reader:
        frames = reader.read([0, 2]).frames
        reader.scale_to(Scaling(64, "bicubic"))
        assert np.array_equal(reader.read([0, 2]).frames, frames)


def test_what_is_cut_off_or_far_too_long_is_not_scaled() -> None:
    frame = av.VideoFrame.from_ndarray(moving_pictures(1)[0], format="rgb24")
    scaling = Scaling(32, "bicubic")
    assert FrameConverter(frame).convert(frame, scaling).shape == (32, 48, 3)
    converter = FrameConverter(frame, Cropping(left=10))
    assert np.array_equal(converter.convert(frame, scaling), converter.convert(frame))
    strip = av.VideoFrame.from_ndarray(np.zeros((2, 8000, 3), np.uint8), format="rgb24")
    assert FrameConverter(strip).convert(strip, scaling).shape == (2, 8000, 3)


def test_transparent_pixels_show_the_colour_beneath(tmp_path: Path) -> None:
    picture = np.zeros((24, 40, 4), np.uint8)
    picture[..., :3] = (10, 200, 60)
    picture[:, 20:, 3] = 255
    frame = av.VideoFrame.from_ndarray(picture, format="rgba")
    path = render(tmp_path / "alpha.mov", pictures=[frame], codec="png", pix_fmt="rgba", b_frames=0)
    assert (read_clip(path, num_frames=1).frames == (10, 200, 60)).all()


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    first = render(tmp_path / "first.h264", num_frames=5, size=(96, 64))
    second = render(tmp_path / "second.h264", num_frames=5, size=(64, 96))
    path = tmp_path / "both.h264"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with VideoReader(path) as reader:
        assert reader.num_frames == 10
        clip = reader.read([0, 9])
    assert clip.frames.shape == (2, 64, 96, 3)


def test_a_pixel_format_without_a_conversion_is_named() -> None:
    frame = av.VideoFrame(16, 16, "rgbaf32le")
    with pytest.raises(VideoError, match="pixel format rgbaf32le cannot be converted to RGB"):
        FrameConverter(frame).convert(frame)


@pytest.mark.parametrize("size", [(64, 48), (46, 34), (454, 254), (63, 48), (64, 47)])
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("pix_fmt", sorted({*_FORMATS_BY_WAY_OF_PLANES, "yuv410p", "yuv440p"}))
def test_the_quick_way_gives_what_one_conversion_to_packed_rgb_gives(
    pix_fmt: str, color_range: int, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(11)
    noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=pix_fmt)
    frame.color_range = color_range
    np.testing.assert_array_equal(FrameConverter(frame).convert(frame), to_rgb(frame))


@pytest.mark.parametrize(("software", "hardware"), [("yuv420p", "nv12"), ("yuv420p10le", "p010le")])
def test_what_a_gpu_decodes_to_has_the_same_colours(software: str, hardware: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    planes = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=software)
    pairs = planes.reformat(format=hardware)  # the same values, the two of chroma side by side
    np.testing.assert_array_equal(
        FrameConverter(planes).convert(planes), FrameConverter(pairs).convert(pairs)
    )
