from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_manifest

from actionclip_deploy.errors import ExportError, FrameSizeError, VideoError
from actionclip_deploy.export.golden import GOLDEN_LABELS, golden_clips, render_clips
from actionclip_deploy.export.quantization import read_calibration_clips
from actionclip_deploy.video import VideoReader


def test_rendered_clips_are_always_the_same() -> None:
    np.testing.assert_array_equal(render_clips(2, 3, 48), render_clips(2, 3, 48))


@pytest.mark.parametrize(("num_frames", "size"), [(1, 32), (8, 64), (3, 224)])
def test_rendered_clips_have_the_shape_asked_for(num_frames: int, size: int) -> None:
    clips = render_clips(4, num_frames, size)
    assert clips.shape == (4, num_frames, size, size, 3)
    assert clips.dtype == np.uint8


def test_rendered_clips_differ_from_each_other_and_move() -> None:
    clips = render_clips(4, 8, 64).astype(np.float64)
    for first in range(4):
        for second in range(first):
            assert np.abs(clips[first] - clips[second]).mean() > 10
        assert np.abs(clips[first, 0] - clips[first, -1]).mean() > 1


def test_rendered_clips_look_like_pictures_and_not_like_noise() -> None:
    clips = render_clips(4, 2, 64).astype(np.float64)
    for clip in clips:
        neighbours = np.corrcoef(clip[:, :, 1:].ravel(), clip[:, :, :-1].ravel())[0, 1]
        assert neighbours > 0.9
        assert 20 < clip.mean() < 235
        assert clip.std() > 10


def test_without_videos_the_origin_says_that_clips_were_rendered() -> None:
    clips, origin = golden_clips(fake_manifest(), [])
    assert clips.shape == (4, 4, 32, 32, 3)
    assert "rendered" in origin


@pytest.mark.parametrize(("num_videos", "num_clips"), [(1, 4), (3, 6), (5, 5)])
def test_videos_give_four_clips_or_one_each(
    num_videos: int, num_clips: int, rendered_video: Path
) -> None:
    clips, origin = golden_clips(fake_manifest(), [rendered_video] * num_videos)
    assert clips.shape == (num_clips, 4, 32, 32, 3)
    assert origin.count("square.mp4") == num_videos
    assert len({clip.tobytes() for clip in clips}) == num_clips // num_videos


def test_a_video_that_gives_no_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"missing\.mp4"):
        golden_clips(fake_manifest(), [tmp_path / "missing.mp4"])


def test_labels_are_distinct() -> None:
    assert len(set(GOLDEN_LABELS)) == 8


def test_videos_of_more_pixels_than_are_allowed_are_refused(rendered_video: Path) -> None:
    manifest = fake_manifest()
    with VideoReader(rendered_video) as reader:
        num_pixels = reader.width * reader.height
    for read in (golden_clips, read_calibration_clips):
        given: tuple[Any, ...] = (manifest, [rendered_video])
        if read is read_calibration_clips:
            given = ([rendered_video], manifest)
        read(*given, max_pixels=num_pixels)
        with pytest.raises((FrameSizeError, ExportError), match="allow more"):
            read(*given, max_pixels=num_pixels - 1)
