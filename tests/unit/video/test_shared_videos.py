"""Every file of the reference material, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import av
import numpy as np
from rendering import decode_everything, to_rgb

from actionclip_deploy.errors import VideoWarning
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video import VideoReader

# Files that are decoded from their start, and why.
FALLBACKS = {
    "broken/decord_corrupted.mp4": "packet 30 is not made of whole units",
    "labelled/other/mmaction2_S001C001P001R001A001_rgb.avi": "stores no presentation times",
    "labelled/other/mmaction2_test.avi": "is too small to hold a frame",
    "labelled/wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi": "is too small to hold a frame",
    "labelled/wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": "is too small to hold",
    "labelled/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi": "is too small to hold a frame",
}
DAMAGED = "broken/decord_corrupted.mp4"
ROTATIONS = {"codecs/decord_video_90.mov": 90, "codecs/decord_video_180.mov": 180}


def index_sets(num_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(num_frames)
    last = num_frames - 1
    return [
        sample_segments(num_frames, 8),
        np.array([0]),
        np.array([last]),
        np.array([last, 0, last // 2, last // 2, last]),
        np.sort(rng.integers(0, num_frames, 5)),
    ]


def differences(path: Path, frames: list[av.VideoFrame], degrees: int) -> list[str]:
    """Read one file in several ways; gives what differs from decoding everything."""
    found = []
    with VideoReader(path) as reader:
        if (reader.num_frames, reader.rotation_degrees) != (len(frames), degrees):
            found.append(f"{reader.num_frames} frames turned by {reader.rotation_degrees}")
        for indices in index_sets(len(frames)):
            clip = reader.read(indices)
            for row, index in zip(clip.frames, indices, strict=True):
                expected = np.rot90(to_rgb(frames[index]), -degrees // 90)
                if not np.array_equal(row, expected):
                    found.append(f"frame {index} of {indices}")
        if FALLBACKS.get(_name(path), "") not in str(reader.fallback_reason):
            found.append(f"decoded from its start: {reader.fallback_reason}")
        if (reader.fallback_reason is not None) != (_name(path) in FALLBACKS):
            found.append(f"decoded from its start: {reader.fallback_reason}")
    return found


def _name(path: Path) -> str:
    return path.as_posix().rpartition("/videos/")[2]


def test_every_file_reads_as_decoding_everything_does(shared: Path) -> None:
    folders = [shared / "videos" / name for name in ("broken", "codecs", "labelled")]
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    assert len(paths) > 100
    found = {}
    for path in paths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            degrees = ROTATIONS.get(_name(path), 0)
            problems = differences(path, decode_everything(path), degrees)
        expected = [VideoWarning] if _name(path) == DAMAGED else []
        if problems or [warning.category for warning in caught] != expected:
            found[_name(path)] = [*problems, *(str(warning.message) for warning in caught)]
    assert found == {}
