"""The videos that a command was given: files as they are, folders by what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from actionclip_deploy.cli.output import usage_error

# By suffix, since opening a hundred thousand files to find out takes longer than saying so.
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)


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
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        found += [Path(parent, name) for name in files if _is_video(name)]
    if found:
        return sorted(found)
    if not recursive and any(_is_video(n) for _, _, files in os.walk(folder) for n in files):
        raise usage_error(
            f"{folder} holds no video files itself, but folders in it do; add --recursive."
        )
    raise usage_error(
        f"{folder} holds no video files, which are known by their suffixes "
        f"({', '.join(sorted(VIDEO_SUFFIXES))}); give another folder, or files by their names."
    )


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")


def _raise_unreadable(error: OSError) -> None:
    raise usage_error(
        f"The folder {error.filename} cannot be read ({error.strerror}); change its permissions "
        "or give the videos by their names."
    )
