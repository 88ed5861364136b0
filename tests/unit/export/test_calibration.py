from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_manifest

from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.golden import clips_of_video
from actionclip_deploy.export.quantization import find_videos, read_calibration_clips

MANIFEST = fake_manifest()


@pytest.fixture
def folder(tmp_path: Path, rendered_video: Path) -> Path:
    """Six videos, two of them deeper; a text file among them."""
    (tmp_path / "b").mkdir()
    for name in ("c.mp4", "a.MP4", "b/d.mkv", "b/e.mp4", "f.mp4", "g.mp4"):
        shutil.copy(rendered_video, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def test_videos_are_found_below_folders_in_a_fixed_order(folder: Path) -> None:
    names = [p.relative_to(folder).as_posix() for p in find_videos([folder])]
    assert names == ["a.MP4", "b/d.mkv", "b/e.mp4", "c.mp4", "f.mp4", "g.mp4"]


def test_a_video_that_is_named_twice_counts_once(folder: Path) -> None:
    assert find_videos([folder / "c.mp4", folder]).count(folder / "c.mp4") == 1


def test_a_folder_without_videos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"holds no video, .*\.mp4.*name the files"):
        find_videos([tmp_path])


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"There is no .*nothing to calibrate with; give video"):
        find_videos([tmp_path / "nothing"])


def test_a_clip_is_what_a_user_of_the_bundle_would_get(folder: Path) -> None:
    read = read_calibration_clips([folder / "c.mp4"], MANIFEST, 1)
    np.testing.assert_array_equal(read.clips, clips_of_video(folder / "c.mp4", MANIFEST, 1))
    assert read.clips.shape == (1, 4, 32, 32, 3)
    assert (read.num_videos, read.failed) == (1, ())


@pytest.mark.parametrize(("num_clips", "num_videos"), [(2, 2), (6, 6), (7, 4), (15, 5)])
def test_there_are_as_many_clips_as_asked_for(
    num_clips: int, num_videos: int, folder: Path
) -> None:
    told: list[int] = []
    read = read_calibration_clips(find_videos([folder]), MANIFEST, num_clips, on_clip=told.append)
    assert len(read.clips) == num_clips
    assert read.num_videos == num_videos
    assert told[-1] == num_clips


def test_few_clips_come_from_all_over_the_list(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actionclip_deploy.export import quantization

    asked: list[str] = []

    def note(path: Path, manifest: object, num_clips: int) -> np.ndarray:
        asked.append(path.name)
        return np.zeros((num_clips, 4, 32, 32, 3), np.uint8)

    monkeypatch.setattr(quantization, "clips_of_video", note)
    read_calibration_clips([Path(f"{n}.mp4") for n in range(101)], MANIFEST, 3)
    assert asked == ["0.mp4", "50.mp4", "100.mp4"]


def test_a_broken_video_is_told_and_another_takes_its_place(folder: Path) -> None:
    (folder / "a.MP4").write_bytes(b"broken")
    read = read_calibration_clips(find_videos([folder]), MANIFEST, 3)
    assert (len(read.clips), read.num_videos) == (3, 3)
    (sentence,) = read.failed
    assert "a.MP4" in sentence


def test_more_broken_videos_than_good_ones_are_an_error(folder: Path) -> None:
    for name in ("a.MP4", "c.mp4", "b/d.mkv", "f.mp4"):
        (folder / name).write_bytes(b"broken")
    message = r"4 of 6 calibration videos cannot be read, and at most half may fail; .*a\.MP4"
    with pytest.raises(ExportError, match=message):
        read_calibration_clips(find_videos([folder]), MANIFEST, 6)
