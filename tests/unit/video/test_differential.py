"""Files of all kinds of `video_kinds`: what a reader gives against decoding all of it."""

from __future__ import annotations

import os
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import video_kinds
from video_kinds import Decoded, Kind, NotMade

from actionclip_deploy.errors import VideoError, VideoWarning
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video import VideoReader, read_clip

os.environ.setdefault("SVT_LOG", "0")  # SVT-AV1 writes what it does to the terminal
NUM_SINGLE = 4
# Bits of pictures that are damaged show only where a decoder comes by: a group that is not decoded
# is counted as if it were whole, and its frames are.
UNSEEN = ("damaged-",)
# All others are whole, however they were written, and are not to be called damaged.
NOT_WHOLE = (*UNSEEN, "one-lost", "key-lost", "first-lost")
# What is known to differ: cropping of a codec that Matroska has no name for; and MPEG-4 without its
# times (ASF) or with a damaged intra picture, which its decoder mends from the one before.
KNOWN = (
    *(f"png{kind}.cropped.mp4" for kind in ("", "-gray16", "-alpha")),
    *(f"mpeg4-{kind}.key-lost.asf" for kind in ("b2", "qpel")),
    *(f"mpeg4-intra.damaged-5.{container}" for container in ("avi", "m4v", "3gp")),
)
# FFV1's decoder goes on without a word where packets are lost, and what it makes of the next ones
# is what the memory held.
UNDEFINED = "ffv1"


def differences(
    path: Path,
    whole: Decoded,
    chooser: random.Random,
    counts: Counter[str],
    *,
    may_be_unseen: bool,
) -> list[str]:
    """Read a file in several ways; gives what differs."""
    found, num_frames = [], len(whole.frames)

    def compare(what: str, indices: list[int], frames: Sequence[np.ndarray] | np.ndarray) -> None:
        counts["frames"] += len(indices)
        if len(frames) != len(indices):
            found.append(f"{what}: {len(frames)} frames instead of {len(indices)}")
            return
        wrong = [
            index
            for index, frame in zip(indices, frames, strict=True)
            if frame.shape != whole.frames[index].shape
            or not np.array_equal(frame, whole.frames[index])
        ]
        if wrong:
            found.append(f"{what}: frames {wrong}")

    with VideoReader(path) as reader:
        num_promised = reader.num_frames
        clip = reader.read(list(range(num_promised)))
        if reader.num_frames != num_frames or (num_promised != num_frames and not may_be_unseen):
            found.append(f"{num_promised}, then {reader.num_frames} frames instead of {num_frames}")
            return found
        if num_promised != num_frames:
            clip = reader.read(list(range(num_frames)))
        compare("all", list(range(num_frames)), clip.frames)
        found += differences_of_times(reader, whole)
        for index in sorted(chooser.sample(range(num_frames), min(3, num_frames)), reverse=True):
            compare("backwards", [index], reader.read([index]).frames)
    with VideoReader(path) as reader:
        in_order = [(pts_seconds, convert()) for pts_seconds, convert in reader.read_all()]
        compare("in order", list(range(num_frames)), [frame for _, frame in in_order])
        times = [pts_seconds for pts_seconds, _ in in_order]
        if num_promised == num_frames and not np.allclose(times, reader.pts_seconds, atol=1e-9):
            found.append("other times in order")
    if num_promised != num_frames:
        return found  # a frame has no number in common
    for index in chooser.sample(range(num_frames), min(NUM_SINGLE, num_frames)):
        with VideoReader(path) as reader:
            compare("alone", [index], reader.read([index]).frames)
    indices = sample_segments(num_frames, 8).tolist()
    clip = read_clip(path)
    if clip.indices.tolist() != indices:
        found.append(f"clip of {clip.indices.tolist()}")
    else:
        compare("clip", indices, clip.frames)
    return found


def differences_of_times(reader: VideoReader, whole: Decoded) -> list[str]:
    """Each frame has its own time, but where packets have none or that of their decoding."""
    if None in whole.pts:
        return []
    times = np.array(whole.pts) * whole.time_base
    if sorted(times) != times.tolist() and reader.fallback_reason is None:
        return ["times go back, and nothing is said"]
    if np.allclose(np.sort(reader.pts_seconds), np.sort(times), atol=1e-6):
        return []
    return ["other times"]


def walk(kinds: list[Kind], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chooser = random.Random(2026)
    counts: Counter[str] = Counter()
    found = {}
    for kind in kinds:
        if kind.stream.startswith(UNDEFINED) and kind.change.endswith("-lost"):
            counts["undefined"] += 1
            continue
        if kind.name in KNOWN:
            counts["known"] += 1
            continue
        try:
            path = kind.make(folder)
        except NotMade:
            counts["not made"] += 1
            continue
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", VideoWarning)
            try:
                whole = Decoded(path)
            except (av.FFmpegError, ValueError):
                whole = None
            if whole is None or not whole.frames:
                counts["without a frame"] += 1
                with pytest.raises(VideoError):
                    VideoReader(path)
            else:
                if kind.window is not None:
                    whole.frames = [frame[kind.window] for frame in whole.frames]
                counts["compared"] += 1
                may_be_unseen = kind.change.startswith(UNSEEN)
                problems = differences(path, whole, chooser, counts, may_be_unseen=may_be_unseen)
                if told and not whole.is_damaged and not kind.change.startswith(NOT_WHOLE):
                    problems.append(f"called damaged: {told[0].message}")
                if problems:
                    found[kind.name] = problems
        path.unlink()
    kinds_of = {
        name: len({getattr(k, name) for k in kinds}) for name in ("stream", "container", "change")
    }
    with capsys.disabled():
        print(f"\n{dict(counts)}, {len(found)} differ; {kinds_of}", *found.items(), sep="\n")
    assert found == {}
    assert counts["compared"] >= 0.8 * len(kinds)


def test_a_sample_of_all_kinds_reads_as_decoding_everything_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = list(video_kinds.kinds())
    walk(random.Random(13).sample(kinds, 300), tmp_path, capsys)


@pytest.mark.slow
def test_every_kind_reads_as_decoding_everything_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk(list(video_kinds.kinds(num_damaged=6)), tmp_path, capsys)
