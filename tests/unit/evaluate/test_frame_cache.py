"""Frames that are decoded once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy.errors import TrainingError, VideoError
from actionclip_deploy.evaluate import frames as frames_module
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.frames import FrameCache, open_frames
from actionclip_deploy.train.data import SampleKey, VideoClips
from actionclip_deploy.video import Clip

SIZE, SHORT_SIDE = 32, 36


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache", short_side=SHORT_SIDE)


def clip(video: Path, cache: FrameCache | None) -> np.ndarray:
    clips = VideoClips([Sample(video, (0,))], num_frames=4, input_size=SIZE, cache=cache)
    return clips[SampleKey(0, 0)].frames.numpy()


def test_a_clip_from_the_cache_is_the_clip_from_the_video(
    rendered_video: Path, cache: FrameCache
) -> None:
    wanted = clip(rendered_video, None)
    for _ in range(2):  # decoded, then read
        np.testing.assert_array_equal(clip(rendered_video, cache), wanted)


def test_a_video_is_decoded_once(
    rendered_video: Path, cache: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = clip(rendered_video, cache)

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is opened again")

    monkeypatch.setattr(frames_module, "VideoReader", refuse)
    np.testing.assert_array_equal(clip(rendered_video, cache), first)


def test_a_video_that_was_replaced_is_decoded_anew(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    video = shutil.copy(rendered_video, tmp_path / "a.mp4")
    for time_ns in (10**18, 2 * 10**18):
        os.utime(video, ns=(time_ns, time_ns))
        clip(video, cache)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_a_damaged_file_of_the_cache_is_written_anew(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    wanted = clip(rendered_video, cache)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(clip(rendered_video, cache), wanted)
    assert file.stat().st_size > 1000


class Shrinking:
    """Says that it has 70 frames until the 40th turns out to be damaged."""

    num_frames = 70

    @property
    def pts_seconds(self) -> np.ndarray:
        return np.arange(self.num_frames) / 10

    def read(self, indices: np.ndarray) -> Clip:
        if indices.max() >= 40:
            self.num_frames = 40
            indices = np.minimum(indices, 39)
        elif indices.max() >= self.num_frames:
            raise ValueError(f"index {indices.max()} is not a frame")
        frames = np.broadcast_to(indices[:, None, None, None], (len(indices), 9, 9, 3))
        return Clip(frames.astype(np.uint8), indices, self.pts_seconds[indices])


def test_a_video_with_damage_keeps_the_frames_before_it(tmp_path: Path, cache: FrameCache) -> None:
    frames = cache.open(tmp_path / "damaged.mp4", Shrinking)
    assert (frames.num_frames, len(frames.pts_seconds)) == (40, 40)
    assert frames.read(np.arange(40)).frames[:, 0, 0, 0].tolist() == list(range(40))


def test_others_may_read_the_cache(rendered_video: Path, tmp_path: Path, cache: FrameCache) -> None:
    clip(rendered_video, cache)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_part_of_a_video_has_the_frames_of_its_seconds(
    rendered_video: Path, cache: FrameCache
) -> None:
    part = Sample(rendered_video, (0,), start_seconds=0.5, end_seconds=1.0)
    with open_frames(part) as plain, open_frames(part, cache=cache) as cached:
        assert 0 < cached.num_frames == plain.num_frames
        wanted = plain.read(np.array([0, 1]))
        found = cached.read(np.array([0, 1]))
    np.testing.assert_array_equal(found.indices, wanted.indices)
    np.testing.assert_array_equal(found.pts_seconds, wanted.pts_seconds)


def test_a_video_that_cannot_be_read_leaves_nothing(tmp_path: Path, cache: FrameCache) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for path in (tmp_path / "a.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(VideoError), open_frames(Sample(path, (0,)), cache=cache):
            pass
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/cache cannot be made .*another data.cache"):
        FrameCache(tmp_path / "file" / "cache", short_side=8)


def test_frames_that_cannot_be_written_are_told(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder any more")
    with pytest.raises(TrainingError, match=r"cannot be written .*free some space"):
        clip(rendered_video, cache)
