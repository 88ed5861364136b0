"""What the first bytes of packets say, against what FFmpeg's decoders say of the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest
from rendering import render

from actionclip_deploy.video.packets import Look, PacketInspector

AVC_RECORD = bytes([1, 100, 0, 31, 0xFF, 0xE1]) + bytes(20)


def hevc_record(num_layers: int) -> bytes:
    return bytes([1]) + bytes(20) + bytes([num_layers << 3 | 0b111]) + bytes(5)


def with_lengths(*units: bytes) -> bytes:
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def with_start_codes(*units: bytes) -> bytes:
    return b"".join(b"\0\0\0\1" + unit for unit in units)


@pytest.mark.parametrize(
    ("record", "pack"),
    [(AVC_RECORD, with_lengths), (b"", with_start_codes)],
    ids=["avc1", "annexb"],
)
def test_h264_pictures_with_a_reference_count_of_zero_are_unreferenced(record, pack) -> None:
    inspector = PacketInspector("h264", record)
    information, reference, plain = b"\x06abc", b"\x41" + b"x" * 20, b"\x01" + b"x" * 20
    assert inspector.look(pack(information, plain)) == Look(is_unreferenced=True)
    assert inspector.look(pack(plain, plain)) == Look(is_unreferenced=True)
    assert inspector.look(pack(information, reference)) == Look()
    assert inspector.look(pack(information)).doubt == "holds no picture"


def test_hevc_pictures_are_unreferenced_in_one_layer_alone() -> None:
    trail_n, trail_r = (bytes([kind << 1, 1]) + b"x" * 20 for kind in (0, 1))
    one, three, unknown = (PacketInspector("hevc", hevc_record(n)) for n in (1, 3, 0))
    assert one.look(with_lengths(trail_n)).is_unreferenced
    assert not one.look(with_lengths(trail_r)).is_unreferenced
    assert not three.look(with_lengths(trail_n)).is_unreferenced
    assert not unknown.look(with_lengths(trail_n)).is_unreferenced
    assert not PacketInspector("hevc", b"").look(with_start_codes(trail_n)).is_unreferenced


@pytest.mark.parametrize(
    "data",
    [
        with_lengths(b"\x41" + b"x" * 20)[:-1],
        with_lengths(b"\x41" + b"x" * 20) + b"y",
        with_lengths(b"\x41" + b"x" * 20) + bytes(4),
        b"\xff\xff\xff\xff" + b"\x41" * 30,
    ],
)
def test_lengths_that_do_not_lead_to_the_end_are_doubted(data: bytes) -> None:
    look = PacketInspector("h264", AVC_RECORD).look(data)
    assert look.doubt == "is not made of whole units"


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1", "mjpeg"])
def test_a_packet_of_zeros_is_doubted(codec: str) -> None:
    assert PacketInspector(codec, b"").look(bytes(500)).doubt == "is blank"


def test_a_packet_of_a_header_alone_is_doubted() -> None:
    placeholder = b"\0\0\1\xb6\x50\x00\x01"
    assert PacketInspector("mpeg4", b"").look(placeholder).doubt == "is too small to hold a frame"
    assert PacketInspector("mpeg4", b"").look(placeholder + b"x" * 20).doubt is None


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.avi"])
@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video", "mpeg1video"])
def test_b_frames_of_mpeg_are_unreferenced(tmp_path: Path, codec: str, name: str) -> None:
    path = render(tmp_path / name, codec=codec, b_frames=2)
    kinds = are_b_frames(path)
    assert sum(kinds) > 10
    assert look_at_all(path) == kinds


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"x264-params": "b-pyramid=none"}, "b_frames": 3},
        {"options": {"x264-params": "slices=4:b-pyramid=none"}, "b_frames": 3},
    ],
)
def test_b_frames_of_h264_without_a_pyramid_are_unreferenced(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    path = render(tmp_path / name, **arguments)
    kinds = are_b_frames(path)
    assert sum(kinds) > 5
    assert look_at_all(path) == kinds


def are_b_frames(path: Path) -> list[bool]:
    """Whether the frame of each packet is a B-frame, as FFmpeg decodes it."""
    kinds, times = {}, []
    with av.open(str(path)) as file:
        for packet in file.demux(video=0):
            if packet.size:
                times.append(packet.pts)
            for frame in packet.decode():
                kinds[frame.pts] = frame.pict_type == av.video.frame.PictureType.B
    return [kinds[time] for time in times]


def look_at_all(path: Path) -> list[bool]:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        inspector = PacketInspector(context.name, context.extradata or b"")
        looks = [inspector.look(bytes(p)) for p in file.demux(stream) if p.size]
    return [look.is_unreferenced for look in looks]
