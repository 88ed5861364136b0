"""Packets that are lost: what a reader gives, and tells, against decoding all of what is left."""

from __future__ import annotations

import functools
import io
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import video_kinds
from av.video.frame import PictureType
from video_kinds import BY_NAME, Decoded, Kind, NotMade

from actionclip_deploy.errors import VideoError, VideoWarning
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video import VideoReader, read_clip

os.environ.setdefault("SVT_LOG", "0")  # SVT-AV1 writes what it does to the terminal

# Streams, and the containers that each is written into.
STREAMS = {
    "h264-b2": "mkv mp4 ts flv h264",
    "h264-pyramid": "mkv mp4 ts",
    "h264-open": "mkv mp4 ts",
    "hevc-plain": "mkv mp4 ts hevc",
    "hevc-b3": "mkv mp4 ts hevc",
    "hevc-open": "mkv mp4 ts",
    "hevc-layers": "mkv",
    "hevc-10bit": "mkv mp4",
    "av1": "mkv mp4 ivf obu",
    "av1-low-delay": "mkv mp4",
    "vp9": "mkv ivf",
    "vp9-altref": "mkv mp4 ivf",
    "vp8-altref": "mkv ivf",
    "mpeg4-plain": "mkv avi",
    "mpeg4-b2": "mkv mp4 ts avi",
    "mpeg2-b2": "mkv ts mpg m2v",
}
NUM_SINGLE = 6
# As many pictures as a group has are lost, so that the next numbers follow on the last.
UNSEEN = "av1-low-delay.run-of-12"


@functools.cache
def kinds_of_packets(stream: str) -> list[str]:
    """Of each packet, whether it is a key, a reference or disposable, as FFmpeg encoded it."""
    kinds = []
    with av.open(io.BytesIO(video_kinds.encoded(BY_NAME[stream])), format="nut") as source:
        frames: dict[int | None, int] = {}
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets:
            for frame in packet.decode():
                frames[frame.pts] = frame.pict_type
        for frame in source.streams.video[0].codec_context.decode(None):
            frames[frame.pts] = frame.pict_type
    has_pyramid = stream.startswith(("h264-pyr", "hevc-layers"))
    for packet in packets:
        is_free = frames.get(packet.pts) == PictureType.B and not has_pyramid
        is_free |= packet.is_disposable
        kinds.append("key" if packet.is_keyframe else "free" if is_free else "reference")
    return kinds


def losses(stream: str) -> Iterator[tuple[str, set[int]]]:
    """What is lost, by name: places of packets."""
    kinds = kinds_of_packets(stream)
    num_packets = len(kinds)
    for kind in ("key", "reference", "free"):
        places = [place for place, each in enumerate(kinds) if each == kind]
        for name, nth in (("first", 0), ("second", 1), ("middle", len(places) // 2), ("last", -1)):
            if len(places) > 2:
                yield f"{name}-{kind}", {places[nth]}
    for step in (3, 5, 7, 11):
        yield f"every-{step}", set(range(step - 1, num_packets, step))
    yield "run-of-3", set(range(num_packets // 2, num_packets // 2 + 3))
    yield "run-of-12", set(range(num_packets // 2, num_packets // 2 + 12))
    yield "later-keys", {i for i, kind in enumerate(kinds) if kind == "key" and i}
    yield "end", {num_packets - 1}


def lossy_kinds() -> Iterator[Kind]:
    for stream, containers in STREAMS.items():
        try:
            all_losses = list(losses(stream))
        except NotMade:
            continue
        for container in containers.split():
            for name, lost in all_losses:

                def drop(
                    packets: list[av.Packet], step: Fraction, lost: set[int] = lost
                ) -> list[av.Packet]:
                    del step
                    return [each for place, each in enumerate(packets) if place not in lost]

                yield video_kinds.written(BY_NAME[stream], container, name, drop)


def problems_of(
    path: Path, whole: Decoded, chooser: random.Random, change: str
) -> tuple[list[str], int]:
    """Read a file in several ways; gives what differs, and how many frames were compared."""
    found: list[str] = []
    num_frames, num_compared = len(whole.frames), 0
    # A recording that begins between two keyframes is whole; the times that FFmpeg makes for AVI
    # look the same where the first reference is missing.
    is_start = change == "first-key" or (change, path.suffix) == ("first-reference", ".avi")
    is_short = num_frames < whole.num_packets and not is_start
    must_tell = whole.is_damaged or is_short

    def compare(what: str, indices: list[int], frames: np.ndarray) -> None:
        nonlocal num_compared
        num_compared += len(indices)
        pairs = zip(indices, frames, strict=True)
        wrong = [i for i, frame in pairs if not np.array_equal(frame, whole.frames[i])]
        if wrong:
            found.append(f"{what}: frames {wrong}")

    told: list[VideoWarning] = []
    with VideoReader(path, on_warning=told.append) as reader:
        if reader.num_frames != num_frames:
            found.append(f"{reader.num_frames} frames instead of {num_frames}")
        clip = reader.read(list(range(reader.num_frames)))
        compare("all", clip.indices.tolist(), clip.frames)
    if must_tell and not told:
        found.append("damage is not told")
    for index in chooser.sample(range(num_frames), min(NUM_SINGLE, num_frames)):
        with VideoReader(path, on_warning=lambda _: None) as reader:
            if index < reader.num_frames:
                clip = reader.read([index])
                compare("alone", clip.indices.tolist(), clip.frames)
    with warnings.catch_warnings(record=True) as told_of_clip:
        warnings.simplefilter("always")
        clip = read_clip(path)
    if clip.indices.tolist() != sample_segments(num_frames, 8).tolist():
        found.append(f"clip of {clip.indices.tolist()}")
    compare("clip", clip.indices.tolist(), clip.frames)
    if bool(told_of_clip) != bool(told):
        found.append("told of the clip alone" if told_of_clip else "not told of the clip")
    return found, num_compared


def walk(kinds: list[Kind], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chooser = random.Random(7)
    counts: Counter[str] = Counter()
    found = {}
    for kind in kinds:
        try:
            path = kind.make(folder)
        except NotMade:
            counts["not made"] += 1
            continue
        try:
            whole = Decoded(path)
        except av.FFmpegError:  # raw streams of which nothing is known any more
            whole = None
        if whole is None or not whole.frames:
            counts["without a frame"] += 1
            with pytest.raises(VideoError):
                VideoReader(path)
        else:
            if kind.name.startswith(UNSEEN):
                counts["not found before decoding"] += 1
                path.unlink()
                continue
            problems, num_compared = problems_of(path, whole, chooser, kind.change)
            counts["files"] += 1
            counts["frames"] += num_compared
            if problems:
                found[kind.name] = problems
        path.unlink()
    with capsys.disabled():
        print(f"\n{dict(counts)}, {len(found)} differ", *found.items(), sep="\n")
    assert found == {}
    assert counts["files"] >= 0.7 * len(kinds)


def test_a_sample_of_losses_reads_as_decoding_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk(random.Random(13).sample(list(lossy_kinds()), 60), tmp_path, capsys)


@pytest.mark.slow
def test_every_loss_reads_as_decoding_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk(list(lossy_kinds()), tmp_path, capsys)
