"""Which files of a folder are videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.video.reader import list_videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.MKV", "notes.txt", ".hidden.mp4", "in/c.webm", ".cache/d.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("recursive", "names"),
    [(False, ["a.MKV", "b.mp4"]), (True, ["a.MKV", "b.mp4", "in/c.webm"])],
)
def test_videos_are_known_by_their_suffixes(
    folder: Path, recursive: bool, names: list[str]
) -> None:
    found = list_videos(folder, recursive=recursive)
    assert [path.relative_to(folder).as_posix() for path in found] == names


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    told: list[OSError] = []
    assert list_videos(tmp_path / "missing", recursive=True, on_error=told.append) == []
    assert [type(error) for error in told] == [FileNotFoundError]
