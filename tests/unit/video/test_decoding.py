"""How much is decoded; that it is decoded rightly is shown in test_reader.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import video_kinds
from rendering import render
from video_kinds import Decoded, NotMade

from actionclip_deploy.video.decoding import FullDecoder, chosen_frames, start_first_run
from actionclip_deploy.video.packets import PacketIndex, demux, scan_packets
from actionclip_deploy.video.pixels import FrameConverter
from actionclip_deploy.video.reader import open_video


def decode_chosen(codec, index, packets, chosen, put, started=None, gaps=None):  # type: ignore[no-untyped-def]
    """Decode all of the chosen frames; says why they cannot be relied on, or None."""
    frames = chosen_frames(codec, index, packets, chosen, started, gaps)
    while True:
        try:
            place, frame = next(frames)
        except StopIteration as end:
            return end.value
        put(place, frame)


class CountingCodec:
    """A decoder that counts what it is given and what it gives."""

    def __init__(self, codec: av.VideoCodecContext) -> None:
        self._codec = codec
        self.name = codec.name
        self.num_packets = 0
        self.num_frames = 0

    def __setattr__(self, name: str, value: object) -> None:
        if name == "skip_frame":
            self._codec.skip_frame = value
        super().__setattr__(name, value)

    def flush_buffers(self) -> None:
        self._codec.flush_buffers()

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        frames = self._codec.decode(packet)
        self.num_packets += packet is not None
        self.num_frames += len(frames)
        return frames


@pytest.fixture
def video(tmp_path: Path) -> Iterator[tuple[CountingCodec, PacketIndex]]:
    """Three groups of 10 frames; most of the frames are B-frames that nothing refers to."""
    path = render(
        tmp_path / "a.mp4",
        num_frames=30,
        group=10,
        b_frames=3,
        options={"x264-params": "b-pyramid=none:b-adapt=0:scenecut=0:open-gop=0"},
    )
    container, stream = open_video(path, None)
    with container:
        index = scan_packets(container, stream)
        assert index.is_key.nonzero()[0].tolist() == [0, 10, 20]
        yield CountingCodec(stream.codec_context), index


def read(video: tuple[CountingCodec, PacketIndex], frames: list[int]) -> int:
    """Decode some frames; gives how many packets were drawn from the file."""
    codec, index = video
    drawn, got = 0, []

    def packets() -> Iterator[av.Packet]:
        nonlocal drawn
        for packet in index.kept:
            drawn += 1
            yield packet

    wanted = {int(index.frames[frame]): frame for frame in frames}
    problem = decode_chosen(codec, index, packets(), wanted, lambda place, _: got.append(place))
    assert problem is None
    assert sorted(got) == sorted(wanted)
    return drawn


def test_nothing_after_the_last_wanted_frame_is_read(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    # Frame 4 is the first to refer backwards: the second packet of the file.
    assert read(video, [4]) == 2
    assert video[0].num_packets == 2


def test_groups_without_a_wanted_frame_are_not_decoded(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    assert read(video, [0, 20]) == 21
    assert video[0].num_packets == 2


def test_the_rest_of_a_group_is_not_decoded(video: tuple[CountingCodec, PacketIndex]) -> None:
    read(video, [4, 14, 24])
    assert video[0].num_packets == 6


def test_frames_that_nothing_refers_to_are_left_out(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    codec, index = video
    assert index.is_unreferenced.sum() >= 18
    read(video, [9])
    unreferenced = int(index.is_unreferenced[: codec.num_packets].sum())
    assert unreferenced >= 4
    assert codec.num_frames == codec.num_packets - unreferenced


def test_a_wanted_frame_that_nothing_refers_to_is_decoded(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    codec, index = video
    assert index.is_unreferenced[index.frames[2]]
    read(video, [2])
    assert codec.num_frames == 3


@pytest.mark.parametrize("stream", ["av1", "av1-low-delay", "av1-10bit"])
def test_pictures_of_av1_that_nothing_refers_to_are_not_given_to_the_decoder(
    tmp_path: Path, stream: str
) -> None:
    try:
        path = video_kinds.write(tmp_path / "a.mkv", video_kinds.BY_NAME[stream])
    except NotMade:
        pytest.skip("SVT-AV1 is not in this build of PyAV")
    whole = Decoded(path)
    container, opened = open_video(path, None)
    with container:
        index = scan_packets(container, opened)
        assert index.kept is not None
        assert index.is_unreferenced.sum() >= 18
        for wanted in (7, 8, 23, 35):
            codec = CountingCodec(opened.codec_context)
            taken: dict[int, av.VideoFrame] = {}
            place = int(index.frames[wanted])
            assert decode_chosen(codec, index, index.kept, [place], taken.__setitem__) is None
            converted = FrameConverter(taken[place]).convert(taken[place])
            np.testing.assert_array_equal(converted, whole.frames[wanted])
            (run,) = index.runs([place])
            left_out = int(index.is_unreferenced[run.first : place].sum())
            assert left_out >= 2
            assert codec.num_packets == place + 1 - run.first - left_out


def test_wanting_everything_decodes_everything_once(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    assert read(video, list(range(30))) == 30
    assert video[0].num_packets == video[0].num_frames == 30


def test_a_frame_of_another_packet_is_told(video: tuple[CountingCodec, PacketIndex]) -> None:
    codec, index = video
    ninth = int(index.frames[9])
    others = [packet for packet in index.kept if packet is not index.kept[ninth]]
    problem = decode_chosen(codec, index, others, [ninth], put=_ignore)
    assert problem == "a frame came out that no packet gives"


def test_a_packet_that_gives_no_frame_is_told(video: tuple[CountingCodec, PacketIndex]) -> None:
    codec, index = video
    ninth = int(index.frames[9])
    problem = decode_chosen(codec, index, index.kept[:ninth], [ninth], put=_ignore)
    assert problem == f"packet {ninth} gave no frame"


def test_times_in_another_order_than_the_frames_are_told(
    video: tuple[CountingCodec, PacketIndex],
) -> None:
    codec, index = video
    pts, (third, fifth) = index.pts.copy(), index.frames[[3, 5]]
    pts[third], pts[fifth] = pts[fifth], pts[third]
    frames = np.argsort(pts)
    false_index = PacketIndex(**{**vars(index), "pts": pts, "frames": frames})
    problem = decode_chosen(codec, false_index, index.kept, frames[:10].tolist(), put=_ignore)
    assert problem is not None
    assert "has a time that its frame is not shown at" in problem


def test_a_keyframe_that_is_none_is_told(video: tuple[CountingCodec, PacketIndex]) -> None:
    codec, index = video
    place = int(index.frames[14])
    is_key = index.is_key.copy()
    is_key[place] = True
    false_index = PacketIndex(**{**vars(index), "is_key": is_key})
    problem = decode_chosen(codec, false_index, index.kept, [place], put=_ignore)
    assert problem is not None
    assert f"packet {place} " in problem


def _ignore(place: int, frame: av.VideoFrame) -> None:
    del place, frame


@pytest.mark.parametrize("chosen", [[0], [1], [5], [9], [3, 4, 25], [0, 29]])
def test_a_run_that_was_begun_goes_on_to_the_same_frames(
    video: tuple[CountingCodec, PacketIndex], chosen: list[int]
) -> None:
    codec, index = video
    packets = [int(index.frames[frame]) for frame in chosen]
    afresh: dict[int, np.ndarray] = {}
    begun: dict[int, np.ndarray] = {}
    assert index.kept is not None
    for out, goes_on in ((afresh, False), (begun, True)):
        started = start_first_run(codec, index, index.kept) if goes_on else None
        num_packets = codec.num_packets
        problem = decode_chosen(
            codec,
            index,
            index.kept,
            packets,
            lambda place, frame, out=out: out.update({place: frame.to_ndarray()}),
            started,
        )
        assert problem is None
        num_packets = codec.num_packets - num_packets
    assert started is not None
    assert started.frames[0].pts == index.frames[0]  # the place of its packet
    # Of the first group, what was decoded before is not decoded again, where it is of use.
    is_used = index.runs(packets)[0].stop >= started.next_place
    total = sum(run.stop - run.first for run in index.runs(packets))
    assert num_packets == total - started.next_place * is_used
    assert list(begun) == list(afresh)
    assert sorted(begun) == sorted(packets)
    for place, pixels in afresh.items():
        np.testing.assert_array_equal(begun[place], pixels)


def test_frames_on_the_way_are_let_go_of(tmp_path: Path) -> None:
    # GIF's decoder draws on the frame before, in the same memory, unless somebody has it.
    path = render(tmp_path / "a.gif", num_frames=12, codec="gif", pix_fmt="rgb8", b_frames=0)
    container, stream = open_video(path, None)
    with container:
        decoder = FullDecoder(stream.codec_context, demux(container, stream))
        addresses = list(map(lambda frame: frame.planes[0].buffer_ptr, decoder))  # noqa: C417
    assert len(addresses) == 12
    assert len(set(addresses)) == 1
