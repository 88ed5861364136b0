"""The videos that a command was given: files as they are, folders by what is in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from actionclip_deploy.cli.output import usage_error
from actionclip_deploy.video.folders import VIDEO_SUFFIXES, list_videos


def find_videos(paths: Iterable[Path], *, recursive: bool) -> list[Path]:
    """List the videos of files and folders: in the given order, those of a folder sorted.

    A file is taken whatever its suffix. Of a folder, files with the suffix of a video are taken
    and hidden ones are not; links to folders are not followed.

    Args:
        paths: Files and folders; what does not exist is passed on, for the reader to say so.
        recursive: Whether folders in the folders are looked through as well.

    Raises:
        typer.BadParameter: If a folder holds no video, or cannot be read.
    """
    videos: dict[Path, None] = {}  # each once, where a folder and a file of it are given
    for path in paths:
        found = _videos_in(path, recursive=recursive) if path.is_dir() else [path]
        videos.update(dict.fromkeys(found))
    return list(videos)


def _videos_in(folder: Path, *, recursive: bool) -> list[Path]:
    found = list_videos(folder, recursive=recursive, on_error=_raise_unreadable)
    if found:
        return found
    if not recursive and list_videos(folder, recursive=True):
        raise usage_error(
            f"{folder} holds no video files itself, but folders in it do; add --recursive."
        )
    raise usage_error(
        f"{folder} holds no video files, which are known by their suffixes "
        f"({', '.join(sorted(VIDEO_SUFFIXES))}); give another folder, or files by their names."
    )


def _raise_unreadable(error: OSError) -> None:
    raise usage_error(
        f"The folder {error.filename} cannot be read ({error.strerror}); change its permissions "
        "or give the videos by their names."
    )
