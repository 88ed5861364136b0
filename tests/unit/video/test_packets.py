"""What packets tell before anything is decoded."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import video_kinds
from hypothesis import given
from hypothesis import strategies as st
from rendering import render
from video_kinds import NotMade

from actionclip_deploy.video.bitstream import SEQUENCE, PacketInspector
from actionclip_deploy.video.packets import PacketIndex, PacketSource, scan_packets
from actionclip_deploy.video.reader import open_video


def index_of(pts: list[int], keys: list[int]) -> PacketIndex:
    times = np.array(pts, dtype=np.int64)
    is_key = np.zeros(len(pts), dtype=np.bool_)
    is_key[keys] = True
    return PacketIndex(
        pts=times,
        has_times=True,
        clock=np.zeros(len(pts), dtype=np.int64),
        is_key=is_key,
        is_unreferenced=np.zeros(len(pts), dtype=np.bool_),
        frames=np.argsort(times),
        kept=None,
        damage=None,
        distrust=None,
        count_is_known=True,
    )


def spans(index: PacketIndex, packets: list[int]) -> list[tuple[int, int, list[int]]]:
    return [(run.first, run.stop, sorted(run.wanted)) for run in index.runs(packets)]


def test_a_run_goes_from_the_keyframe_to_the_wanted_frame() -> None:
    index = index_of(list(range(12)), keys=[0, 4, 8])
    assert spans(index, [6]) == [(4, 7, [6])]
    assert spans(index, [1, 2, 9]) == [(0, 3, [1, 2]), (8, 10, [9])]
    assert spans(index, [4, 8]) == [(4, 5, [4]), (8, 9, [8])]


def test_a_frame_shown_before_its_keyframe_needs_the_one_before() -> None:
    # Decoding order of open groups: the keyframe at 4, then two frames that are shown before it.
    index = index_of([0, 1, 4, 2, 3, 5], keys=[0, 2])
    assert spans(index, [3]) == [(0, 4, [3])]
    assert spans(index, [2]) == [(2, 3, [2])]
    assert spans(index, [5]) == [(2, 6, [5])]


def test_runs_that_overlap_become_one() -> None:
    # Keyframes alternate with frames that are shown before them.
    index = index_of([0, 2, 1, 4, 3, 6, 5], keys=[0, 1, 3, 5])
    assert spans(index, [3, 4, 5, 6]) == [(1, 7, [3, 4, 5, 6])]
    assert spans(index, [1, 3]) == [(1, 2, [1]), (3, 4, [3])]


@given(st.data())
def test_runs_hold_every_wanted_packet_once_and_do_not_overlap(data: st.DataObject) -> None:
    num_packets = data.draw(st.integers(1, 40))
    pts = data.draw(st.permutations(range(num_packets)))
    keys = data.draw(st.sets(st.integers(0, num_packets - 1))) | {0}
    wanted = data.draw(st.lists(st.integers(0, num_packets - 1), min_size=1, unique=True))
    runs = index_of(pts, sorted(keys)).runs(wanted)
    assert sorted(packet for run in runs for packet in run.wanted) == sorted(wanted)
    for run in runs:
        assert run.first in keys
        assert all(run.first <= packet < run.stop for packet in run.wanted)
    assert all(a.stop <= b.first for a, b in pairwise(runs))


def test_packets_are_handed_out_by_their_places() -> None:
    source = PacketSource("abcdefgh")
    assert list(source.take(1, 3)) == [(1, "b"), (2, "c")]
    assert list(source.take(6, 8)) == [(6, "g"), (7, "h")]


@pytest.mark.parametrize(
    ("pts", "keys", "reason"),
    [
        ([0, 512, 512, 1024], [0], "frames with the same presentation time"),
        ([512, 0, 1024], [0], "frames before the first keyframe"),
        ([0, 512, 1024], [1], "does not start with a keyframe"),
        ([0, None, 1024], [0], "packets without a presentation time"),
    ],
)
def test_times_that_cannot_be_believed_are_told(
    tmp_path: Path, pts: list[int | None], keys: list[int], reason: str
) -> None:
    # What is a keyframe, headers of H.264 tell and those of FLV1 do not.
    name, codec = ("a.mp4", "libx264") if keys == [0] else ("a.flv", "flv")
    path = render(tmp_path / name, num_frames=len(pts), b_frames=0, group=100, codec=codec)
    container, stream = open_video(path, None)
    with container:
        packets = [packet for packet in container.demux(stream) if packet.size]
        for place, packet in enumerate(packets):
            packet.pts = pts[place]
            packet.is_keyframe = place in keys

        # The same file with other times.
        altered = SimpleNamespace(
            format=container.format,
            streams=container.streams,
            duration=container.duration,
            demux=lambda _: packets,
        )
        assert reason in str(scan_packets(altered, stream).distrust)


def packed(*bits: str) -> bytes:
    """Bits as bytes, with what ends a unit: a one, and zeros up to the next byte."""
    text = "".join(bits) + "1"
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def golomb(number: int) -> str:
    binary = f"{number + 1:b}"
    return "0" * (len(binary) - 1) + binary


def with_lengths(*units: bytes, length_bytes: int = 4) -> bytes:
    return b"".join(len(unit).to_bytes(length_bytes, "big") + unit for unit in units)


def with_start_codes(*units: bytes) -> bytes:
    return b"".join(b"\0\0\0\1" + unit for unit in units)


# Baseline, set 0, frame_num of 4 bits, order type 2, one reference, no gaps, 6 x 4 macroblocks.
AVC_SPS = (
    b"\x67"
    + bytes([66, 0, 30])
    + packed(*map(golomb, (0, 0, 2, 1)), "0", golomb(5), golomb(3), "1")
)
AVC_PPS = b"\x68" + packed(golomb(0), golomb(0), "00")
AVC_RECORD = (
    bytes([1, 66, 0, 30, 0xFF, 0xE1])
    + with_lengths(AVC_SPS, length_bytes=2)
    + b"\1"
    + with_lengths(AVC_PPS, length_bytes=2)
)


def avc_slice(header: int, frame_num: int) -> bytes:
    numbers = (golomb(0), golomb(5), golomb(0), f"{frame_num:04b}")
    return bytes([header]) + packed(*numbers) + b"x" * 20


def hevc_record(num_layers: int, references: str = "") -> bytes:
    layers = "00" * (num_layers - 1) + "00" * (9 - num_layers) * (num_layers > 1)
    sps = bytes([33 << 1, 1]) + packed(
        "0000", f"{num_layers - 1:03b}", "1", "0" * 96, layers, golomb(0), golomb(1),
        golomb(96), golomb(64), "0", golomb(0), golomb(0), golomb(4), references,
    )  # fmt: skip
    pps = bytes([34 << 1, 1]) + packed(golomb(0), golomb(0), "00000")
    sets = b"".join(
        bytes([unit[0] >> 1, 0, 1]) + with_lengths(unit, length_bytes=2) for unit in (sps, pps)
    )
    return bytes([1]) + bytes(20) + bytes([0b111, 2]) + sets


def hevc_slice(kind: int, order: int, references: str = "") -> bytes:
    is_key = kind >= 16
    header = bytes([kind << 1, 1])
    low = f"{order:08b}" if kind not in (19, 20) else ""
    return header + packed("1", "0" * is_key, golomb(0), golomb(1), low, references) + b"x" * 20


@pytest.mark.parametrize(
    ("record", "pack"),
    [(AVC_RECORD, with_lengths), (with_start_codes(AVC_SPS, AVC_PPS), with_start_codes)],
    ids=["avc1", "annexb"],
)
def test_h264_pictures_with_a_reference_count_of_zero_are_unreferenced(record, pack) -> None:
    inspector = PacketInspector("h264", record)
    information, reference, plain = b"\x06abc", avc_slice(0x41, 1), avc_slice(0x01, 1)
    looks = [
        inspector.look(pack(*units))
        for units in ((information, plain), (plain, plain), (information, reference))
    ]
    assert [look.is_unreferenced for look in looks] == [True, True, False]
    assert {look.doubt for look in looks} == {look.rupture for look in looks} == {None}
    assert inspector.look(pack(information)).doubt == "holds no picture"


def test_a_picture_that_is_missing_is_told() -> None:
    inspector = PacketInspector("h264", AVC_RECORD)
    for header, frame_num in ((0x65, 0), (0x41, 1), (0x01, 2), (0x41, 2), (0x41, 3)):
        assert inspector.look(with_lengths(avc_slice(header, frame_num))).rupture is None
    assert inspector.look(with_lengths(avc_slice(0x41, 5))).rupture == "pictures are missing"


def test_other_parameters_of_the_same_number_are_told() -> None:
    inspector = PacketInspector("h264", AVC_RECORD)
    first = avc_slice(0x65, 0)
    assert inspector.look(with_lengths(AVC_SPS, AVC_PPS, first)).rupture is None
    other = AVC_PPS[:1] + packed(golomb(0), golomb(0), "10")
    changed = inspector.look(with_lengths(AVC_SPS, other, first))
    assert changed.rupture == "the pictures' parameters change"


def test_numbers_of_pictures_are_read_by_the_parameters_as_they_are_now() -> None:
    def parameters(num_frame_bits: int) -> tuple[bytes, bytes]:
        numbers = (0, num_frame_bits - 4, 0, 0, 1)  # order type 0, of 4 bits
        sps = packed(*map(golomb, numbers), "0", golomb(5), golomb(3), "1")
        return b"\x67" + bytes([66, 0, 30]) + sps, AVC_PPS

    def picture(header: int, frame_num: int, num_frame_bits: int, order: int) -> bytes:
        number = golomb(0) * (header == 0x65)  # of the sequence
        fields = (f"{frame_num:0{num_frame_bits}b}", number, f"{order % 16:04b}")
        return bytes([header]) + packed(golomb(0), golomb(5), golomb(0), *fields) + b"x" * 20

    inspector = PacketInspector("h264", with_start_codes(*parameters(4)))
    for num_bits in (4, 10):
        first = with_start_codes(*parameters(num_bits), picture(0x65, 0, num_bits, 0))
        key = inspector.look(first)
        for frame in range(1, 40):
            frame_num = frame % 2**num_bits
            look = inspector.look(with_start_codes(picture(0x41, frame_num, num_bits, 2 * frame)))
            assert look.doubt is None
            assert look.rupture is None
            assert look.order == key.order + 2 * frame
        assert inspector.look(with_start_codes(picture(0x41, 0, num_bits, 80))).rupture is not None


def test_hevc_pictures_are_unreferenced_in_one_layer_alone() -> None:
    trail_n, trail_r = (with_lengths(hevc_slice(kind, 1)) for kind in (0, 1))
    one, three = (PacketInspector("hevc", hevc_record(n)) for n in (1, 3))
    assert one.look(trail_n).is_unreferenced
    assert not one.look(trail_r).is_unreferenced
    assert three.look(trail_n).doubt is None
    assert not three.look(trail_n).is_unreferenced
    # Without its parameters, nothing is known of a picture.
    unknown = PacketInspector("hevc", b"").look(with_start_codes(hevc_slice(0, 1)))
    assert unknown.doubt == "has a header that cannot be read"
    assert not unknown.is_unreferenced


def test_pictures_of_hevc_are_ordered_by_their_numbers() -> None:
    inspector = PacketInspector("hevc", hevc_record(1))
    pictures = ((19, 0), (1, 4), (0, 2), (1, 254), (21, 2), (8, 1), (20, 0), (1, 1))
    looks = [inspector.look(with_lengths(hevc_slice(*picture))) for picture in pictures]
    orders = [look.order + SEQUENCE // 2 for look in looks]  # numbers may be below 0
    assert [(o // SEQUENCE, o % SEQUENCE - SEQUENCE // 2) for o in orders] == [
        (1, 0), (1, 4), (1, 2), (1, -2), (1, 2), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [look.is_start for look in looks] == [True, *[False] * 3, True, False, True, False]


# Up to the sets of references: one layer's buffers, sizes of blocks, no lists, tools nor PCM.
HEVC_SIZES = "1" + golomb(0) * 9 + "0000"
# Two sets: the picture before; and that moved by one more, with the one before: the last two.
HEVC_SETS = (
    HEVC_SIZES
    + golomb(2)
    + (golomb(1) + golomb(0) + golomb(0) + "1")
    + ("1" + "1" + golomb(0) + "1" + "1")
    + "0"
)


@pytest.mark.parametrize(
    ("lost", "is_damage"), [({2}, True), ({4}, True), ({3, 4}, True), ({0}, None), ({5}, None)]
)
def test_a_reference_of_hevc_that_is_missing_is_told(lost: set[int], is_damage: bool) -> None:
    inspector = PacketInspector("hevc", hevc_record(1, HEVC_SETS))
    one, two = "10", "11"  # a set of the sequence by its number
    own = "00" + golomb(1) + golomb(0) + golomb(1) + "1"  # a set of its own: two pictures before
    pictures = [(19, 0, "")]
    pictures += [(1, 1, one), (1, 2, two), (1, 3, two), (1, 4, one), (1, 5, one), (19, 0, "")]
    pictures += [(1, 1, one), (1, 2, two), (0, 3, own)]
    looks = [
        inspector.look(with_lengths(hevc_slice(*picture)))
        for place, picture in enumerate(pictures)
        if place not in lost
    ]
    assert {look.doubt for look in looks} == {None}
    found = [look for look in looks if look.rupture is not None]
    if is_damage is None:  # before anything is known, and what nothing refers to
        assert found == []
    else:
        assert found[0].rupture == "pictures are missing"
        assert found[0] is looks[min(lost)]
        assert found[0].is_damage


def test_sets_that_begin_with_the_same_bits_are_told_apart() -> None:
    inspector = PacketInspector("hevc", hevc_record(1, HEVC_SIZES + golomb(0) + "0"))
    near, far = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7)
    held, expected, found = {0}, [], []
    inspector.look(with_lengths(hevc_slice(19, 0)))
    for number, letter in enumerate("abcdefNNNNFNNFFNNNNNNFNFF", start=1):
        distances = {"N": near, "F": far}.get(letter, range(1, min(number, 6) + 1))
        steps = np.diff([0, *distances])
        own = "0" + golomb(len(steps)) + golomb(0) + "".join(golomb(s - 1) + "1" for s in steps)
        look = inspector.look(with_lengths(hevc_slice(1, number, own)))
        needed = {number - distance for distance in distances}
        expected.append(not needed <= held)
        found.append(look.rupture == "pictures are missing" and look.is_damage)
        held = {number} | (held & needed)
    assert found == expected
    assert any(expected)
    assert not all(expected)


def test_what_is_kept_for_later_pictures_may_be_missing() -> None:
    inspector = PacketInspector("hevc", hevc_record(1, HEVC_SETS))
    unused = "00" + golomb(1) + golomb(0) + golomb(2) + "0"
    looks = [
        inspector.look(with_lengths(hevc_slice(*picture)))
        for picture in ((19, 0, ""), (1, 1, unused))
    ]
    assert looks[1].rupture == "pictures are missing"
    assert not looks[1].is_damage


@pytest.mark.parametrize("stream", ["av1", "av1-low-delay"])
def test_a_picture_of_av1_that_is_missing_is_told(stream: str) -> None:
    try:
        data = video_kinds.encoded(video_kinds.BY_NAME[stream])
    except NotMade:
        pytest.skip("SVT-AV1 is not in this build of PyAV")
    with av.open(io.BytesIO(data), format="nut") as source:
        extradata = source.streams.video[0].codec_context.extradata
        packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    for lost in (None, 7, 14, 22):
        inspector = PacketInspector("libdav1d", extradata)
        looks = [inspector.look(data) for place, data in enumerate(packets) if place != lost]
        ruptures = [place for place, look in enumerate(looks) if look.rupture is not None]
        assert ruptures == ([] if lost is None else [lost])
        assert not any(look.is_damage for look in looks)


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
