from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendering import render

from actionclip_deploy.video.packets import PacketIndex, PacketSource, scan_packets
from actionclip_deploy.video.reader import open_video


def index_of(pts: list[int], keys: list[int]) -> PacketIndex:
    times = np.array(pts, dtype=np.int64)
    is_key = np.zeros(len(pts), dtype=np.bool_)
    is_key[keys] = True
    return PacketIndex(
        pts=times,
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
    path = render(tmp_path / "a.mp4", num_frames=len(pts), b_frames=0, group=100)
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
