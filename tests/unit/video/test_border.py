"""What is no video, what is too large, and what the libraries raise: one `VideoError` each."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rendering import moving_pictures, render

from actionclip_deploy.cli.output import find_videos
from actionclip_deploy.errors import FrameSizeError, VideoError, VideoMemoryError
from actionclip_deploy.video import VideoReader
from actionclip_deploy.video import reader as opening
from actionclip_deploy.video.border import foreign_errors
from actionclip_deploy.video.pixels import Orientation

# Of the EXIF tag Orientation.
_ORIENTATION = 0x0112


def picture_with_exif(path: Path, orientation: int) -> np.ndarray:
    """A picture of 96 x 64 with EXIF, of which PyAV 18.1 does not know the type; its pixels."""
    pixels = moving_pictures(1)[0]
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, orientation: int) -> None:
    pixels = picture_with_exif(tmp_path / "picture.png", orientation)
    # By the standard: where the stored first row and first column are shown.
    turned = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: p.transpose(1, 0, 2)[::-1],
    }[orientation](pixels)
    with VideoReader(tmp_path / "picture.png") as reader:
        np.testing.assert_array_equal(reader.read([0]).frames[0], turned)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("O1_exif.jpg", (1, 96, 64)),
        ("O2_exif.avi", (12, 64, 96)),
        ("O2_exif.mov", (12, 64, 96)),
        ("O4_exif.png", (1, 96, 64)),
    ],
)
def test_frames_with_exif_are_read(shared: Path, name: str, shape: tuple[int, ...]) -> None:
    with VideoReader(shared / "cases" / name) as reader:
        assert (reader.num_frames, reader.height, reader.width) == shape
        assert reader.read(list(range(shape[0]))).frames.shape == (*shape, 3)


def test_a_frame_is_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    picture_with_exif(tmp_path / "picture.png", 6)

    class Held:
        """PyAV's frames cannot be referred to weakly: this hangs on one, as its `opaque`."""

    with av.open(str(tmp_path / "picture.png")) as container:
        frame = next(container.decode(video=0))
    held = Held()
    gone = weakref.ref(held)
    frame.opaque = held
    del held
    gc.disable()
    try:
        assert Orientation.of_frame(frame).rotation_degrees == 90
        del frame
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_no_file_is_told_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"pipe\.mp4 is a pipe, and only files can be read"):
        VideoReader(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="is a device, and only files can be read"):
        VideoReader("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        # The name of a socket has at most 107 bytes.
        place = os.path.relpath(tmp_path / "s.mp4")
        bound.bind(place)
        with pytest.raises(VideoError, match=r"s\.mp4 is a socket or a device"):
            VideoReader(tmp_path / "s.mp4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n" * 300 + ".mp4", "is a name longer than a file may have"),
        ("a\0b.mp4", "cannot be opened"),
        ("none.mp4/video.mp4", "There is no file"),
        ("caf\udce9.mp4", "There is no file"),
    ],
)
def test_odd_names_are_one_error_each(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(VideoError, match=text):
        VideoReader(tmp_path / name)


@pytest.mark.parametrize(
    "address", ["rtsp://user:secret@camera/1", "https://example.org/a.mp4", "udp://239.0.0.1:1"]
)
def test_an_address_is_called_one_and_keeps_its_password(address: str) -> None:
    with pytest.raises(VideoError, match="is an address, and files are read here") as caught:
        VideoReader(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("hls", "#EXTM3U\n#EXT-X-VERSION:3\nhttp://example.org/a.ts\n"),
        ("dash", '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>\n'),
        ("concat", "ffconcat version 1.0\nfile part.mp4\n"),
        ("pls", "[playlist]\nFile1=a.mp4\n"),
    ],
)
def test_playlists_say_what_to_give(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "list.mp4").write_text(content)
    with pytest.raises(VideoError, match=rf"is a playlist \({kind}\).*give the files it names"):
        VideoReader(tmp_path / "list.mp4")


def test_a_name_with_a_pattern_is_the_file_of_that_name(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / f"other{number:03d}.png")
    Image.new("RGB", (40, 30), (0, 200, 0)).save(tmp_path / "other%03d.png")
    with VideoReader(tmp_path / "other%03d.png") as reader:
        assert reader.num_frames == 1
        assert (reader.read([0]).frames == (0, 200, 0)).all()


@pytest.mark.parametrize(
    "suffix", ["txt", "nfo", "ans", "cdg", "idf", "bin", "yuv", "rgb", "xface", "tga", "vt", "mp4"]
)
@pytest.mark.parametrize("kind", ["text", "escapes", "random"])
def test_texts_and_random_bytes_are_no_videos(tmp_path: Path, suffix: str, kind: str) -> None:
    content = {
        "text": b"a line of notes about a day\n" * 200,
        "escapes": b"\x1b[1;31mred\x1b[0m and plain\r\n" * 200,
        "random": np.random.default_rng(1).bytes(48 * 48 * 30),
    }[kind]
    path = tmp_path / f"notes.{suffix}"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="is not a video in a format"):
        VideoReader(path)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("h264", "libx264"),
        ("hevc", "libx265"),
        ("m2v", "mpeg2video"),
        ("mjpeg", "mjpeg"),
        ("gif", "gif"),
        ("y4m", "rawvideo"),
        ("ivf", "libvpx"),
    ],
)
@pytest.mark.parametrize("has_suffix", [True, False])
def test_streams_without_a_container_are_videos(
    tmp_path: Path, suffix: str, codec: str, has_suffix: bool
) -> None:
    pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(suffix, "yuv420p")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = render(
        tmp_path / f"raw.{suffix}",
        num_frames=12,
        codec=codec,
        pix_fmt=pix_fmt,
        b_frames=0,
        options=options,
    )
    path = path if has_suffix else path.rename(tmp_path / "raw")
    with VideoReader(path) as reader:
        assert reader.num_frames == 12


def test_frames_of_too_many_pixels_are_refused_before_one_is_decoded(shared: Path) -> None:
    path = shared / "cases" / "g16000.gif"
    with pytest.raises(FrameSizeError, match="16000 x 16000 and they may have 35,389,440 pixels"):
        VideoReader(path)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "h264", "gif"])
def test_the_bound_on_pixels_can_be_set(tmp_path: Path, suffix: str) -> None:
    codec, pix_fmt = ("gif", "rgb8") if suffix == "gif" else ("libx264", "yuv420p")
    path = render(tmp_path / f"a.{suffix}", num_frames=3, codec=codec, pix_fmt=pix_fmt, b_frames=0)
    with VideoReader(path, max_pixels=96 * 64) as reader:
        assert reader.num_frames == 3
    with pytest.raises(VideoError, match="6,143 pixels"):
        VideoReader(path, max_pixels=96 * 64 - 1)
    for number in (0, 2**31):  # FFmpeg itself refuses the second, over whatever video comes
        with pytest.raises(
            ValueError, match=f"max_pixels is {number}; it must be 1 or more, and 2"
        ):
            VideoReader(path, max_pixels=number)


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (ValueError("31 is not a valid Type"), VideoError, "ValueError: 31 is not a valid Type"),
        (IndexError(), VideoError, "IndexError: no reason given"),
        (av.error.InvalidDataError(1, "broken"), VideoError, "InvalidDataError"),
        (MemoryError(), VideoMemoryError, "which says nothing about the file"),
        (av.error.MemoryError(12, "Cannot allocate memory"), VideoMemoryError, "Memory ran out"),
        (FileNotFoundError(2, "No such file"), VideoError, "There is no file a.mp4 any more"),
        (FrameSizeError("as it is"), FrameSizeError, "as it is"),
    ],
)
def test_what_a_library_raises_becomes_ours(
    raised: Exception, expected: type[Exception], text: str
) -> None:
    with pytest.raises(expected, match=text), foreign_errors(Path("a.mp4")):
        raise raised


def test_memory_that_runs_out_is_not_called_damage(
    rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    # Memory that runs out at one place cannot be had at will.
    monkeypatch.setattr(opening, "scan_packets", refuse)
    with pytest.raises(VideoMemoryError, match="says nothing about the file"):
        VideoReader(rendered_video)


@pytest.mark.parametrize("name", ["n" * 300 + ".mp4", "a\0b.mp4", "caf\udce9.mp4", "pipe"])
def test_an_odd_name_among_others_is_left_to_the_reader(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    given = [tmp_path / name, tmp_path / "good.mp4"]
    assert find_videos(given, recursive=False) == given
