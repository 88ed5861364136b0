"""Clips out of the last frames, and videos that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from full_disk import small_files
from numpy.typing import NDArray
from PIL import Image

from actionclip_deploy.errors import FileWriteError
from actionclip_deploy.video import VideoReader
from actionclip_deploy.video.recording import (
    FootageRing,
    VideoWriter,
    draw_caption,
    shrink,
    write_jpeg,
)

FPS = 8
# H.264 at the writer's quality moves a flat gray by a step or two.
GRAY_TOLERANCE = 4
WIDTH, HEIGHT = 64, 48


def gray(level: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


def level_of(number: int) -> int:
    """A gray that tells which frame it is."""
    return 20 + number * 5 % 200


def ring_of(num_frames: int, *, start: float = 1000.0, **options: float) -> FootageRing:
    bounds = {"max_seconds": 60.0, "max_bytes": 1 << 20, **options}
    ring = FootageRing(
        width=WIDTH,
        height=HEIGHT,
        max_seconds=bounds["max_seconds"],
        max_bytes=int(bounds["max_bytes"]),
        frames_per_second=FPS,
    )
    for number in range(num_frames):
        ring.add(gray(level_of(number)), start + number / FPS)
    return ring


def levels_in(path: Path) -> tuple[list[int], list[float]]:
    """The gray of each frame of a video, and its time."""
    with VideoReader(path) as reader:
        indices = np.arange(reader.num_frames)
        clip = reader.read(indices)
        return [int(frame.mean()) for frame in clip.frames], [float(t) for t in clip.pts_seconds]


@pytest.mark.parametrize(("start", "end"), [(1002.0, 1005.0), (1002.4, 1005.3), (990.0, 1100.0)])
def test_a_clip_has_the_frames_of_its_time_and_at_most_a_second_before(
    tmp_path: Path, start: float, end: float
) -> None:
    ring = ring_of(80)  # ten seconds
    assert ring.write_clip(tmp_path / "clip.mp4", start, end)
    levels, times = levels_in(tmp_path / "clip.mp4")
    last = min(int((end - 1000) * FPS), 79)
    first = last - len(levels) + 1
    assert max(0.0, start - 1000 - 1.0) <= first / FPS <= max(0.0, start - 1000)
    wanted = [level_of(number) for number in range(first, last + 1)]
    assert np.abs(np.subtract(levels, wanted)).max() <= GRAY_TOLERANCE
    assert times == pytest.approx([number / FPS for number in range(len(levels))], abs=1e-3)


def test_a_clip_of_a_time_without_frames_is_none(tmp_path: Path) -> None:
    assert not ring_of(0).write_clip(tmp_path / "clip.mp4", 0, 1)
    assert not ring_of(8).write_clip(tmp_path / "clip.mp4", 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_frame_nearest_to_a_time_is_given() -> None:
    ring = ring_of(80)
    for seconds, number in ((1000.0, 0), (1003.126, 25), (1003.05, 24), (0.0, 0), (2000.0, 79)):
        frame = ring.frame_at(seconds)
        assert frame is not None
        assert abs(int(frame.mean()) - level_of(number)) <= GRAY_TOLERANCE
    assert ring_of(0).frame_at(1.0) is None


def test_old_frames_are_forgotten_by_time_and_by_bytes() -> None:
    ring = ring_of(200, max_seconds=5.0)
    assert ring.end_seconds - ring.start_seconds <= 5.0
    assert ring.end_seconds - ring.start_seconds >= 4.0
    rng = np.random.default_rng(0)
    noise = FootageRing(
        width=WIDTH, height=HEIGHT, max_seconds=60, max_bytes=40_000, frames_per_second=FPS
    )
    for number in range(100):
        noise.add(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), number / FPS)
        assert noise.num_bytes <= 40_000
    assert 0 < len(noise) < 100
    first = noise.frame_at(noise.start_seconds)  # what is left begins with a keyframe
    assert first is not None


def test_a_video_is_there_when_it_is_closed_and_has_its_times(tmp_path: Path) -> None:
    path = tmp_path / "new" / "copy.mp4"
    with VideoWriter(path, width=WIDTH, height=HEIGHT) as writer:
        for number in range(30):
            writer.write(gray(level_of(number)), 500 + number / 12)
        assert not path.exists()
    levels, times = levels_in(path)
    assert np.abs(np.subtract(levels, list(map(level_of, range(30))))).max() <= GRAY_TOLERANCE
    assert times == pytest.approx([number / 12 for number in range(30)], abs=1e-3)
    assert [each.name for each in path.parent.iterdir()] == ["copy.mp4"]


def test_a_video_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "copy.mp4"
    path.write_bytes(b"what was there")

    def fail() -> None:
        with VideoWriter(path, width=WIDTH, height=HEIGHT) as writer:
            writer.write(gray(0), 0.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    VideoWriter(path, width=WIDTH, height=HEIGHT).discard()
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def write_noise(path: Path, num_frames: int) -> None:
    rng = np.random.default_rng(0)
    with VideoWriter(path, width=WIDTH, height=HEIGHT) as writer:
        for number in range(num_frames):
            writer.write(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), number / 12)


def test_a_full_disk_leaves_no_video_and_no_clip(tmp_path: Path) -> None:
    ring = ring_of(80)
    with small_files(1000):
        with pytest.raises(FileWriteError, match="make room there"):
            ring.write_clip(tmp_path / "clip.mp4", 1000.0, 1010.0)
        with pytest.raises(FileWriteError, match="make room there"):
            write_noise(tmp_path / "copy.mp4", num_frames=200)
    assert list(tmp_path.iterdir()) == []


def test_a_caption_is_written_on_a_copy_at_the_lower_left() -> None:
    frame = gray(128, 320, 240)
    drawn = draw_caption(frame, ["running 0.87", "läuft"])
    assert (frame == 128).all()
    changed = (drawn != 128).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert rows.min() > 120
    assert columns.max() < 200
    assert drawn[changed].max() > 200  # white
    assert drawn[changed].min() == 0  # on black
    assert (draw_caption(frame, []) == frame).all()


def test_frames_are_made_smaller_with_even_sides() -> None:
    assert shrink(gray(7, 1921, 1081), 640).shape == (360, 640, 3)
    assert shrink(gray(7, 101, 51), 640).shape == (50, 100, 3)
    assert shrink(gray(7, 64, 48), 640).shape == (48, 64, 3)


def test_a_picture_is_a_jpeg_of_the_frame(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "a.jpg", gray(100))
    with Image.open(tmp_path / "a.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (WIDTH, HEIGHT))
        assert abs(np.asarray(picture).mean() - 100) <= 1


def test_a_video_of_odd_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="63x48 pixels; both have to be even"):
        VideoWriter(tmp_path / "a.mp4", width=63, height=48)
