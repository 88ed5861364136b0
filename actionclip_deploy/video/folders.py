"""Which files of a folder are videos."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# By suffix, since opening a hundred thousand files to find out takes longer than saying so.
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)


def list_videos(
    folder: Path, *, recursive: bool, on_error: Callable[[OSError], None] | None = None
) -> list[Path]:
    """The files of a folder that have the suffix of a video, sorted.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        folder: The folder.
        recursive: Whether folders in the folder are looked through as well.
        on_error: Called where a folder cannot be read; None passes over it.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(parent, name) for name in files if _is_video(name)]
    return sorted(found)


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
