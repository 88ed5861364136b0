"""Clips of the user's own videos, on which int8 is calibrated and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ExportError, VideoError
from actionclip_deploy.export.golden import clips_of_video
from actionclip_deploy.video.folders import VIDEO_SUFFIXES, list_videos

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from actionclip_deploy.manifest import Manifest

NUM_CALIBRATION_CLIPS = 32

_LARGEST_FAILED_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class CalibrationClips:
    """Clips, and what they were taken from.

    Attributes:
        clips: RGB, shape (C, T, S, S, 3).
        num_videos: Videos that gave some.
        failed: One sentence for each video that gave none.
    """

    clips: NDArray[np.uint8]
    num_videos: int
    failed: tuple[str, ...] = ()


def find_videos(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Videos among files and below folders, each folder's sorted.

    Raises:
        ExportError: If a path does not exist, or a folder holds no video.
    """
    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = list_videos(path, recursive=True)
            if not found:
                raise ExportError(
                    f"The calibration folder {path} holds no video, neither at its top nor below; "
                    f"give one with files that end in {', '.join(sorted(VIDEO_SUFFIXES))}, or name "
                    "the files themselves."
                )
            videos += found
        elif path.is_file():
            videos.append(path)
        else:
            raise ExportError(
                f"There is no {path} to calibrate with; give video files or a folder of them."
            )
    return tuple(dict.fromkeys(videos))


def read_calibration_clips(
    videos: Sequence[Path],
    manifest: Manifest,
    num_clips: int = NUM_CALIBRATION_CLIPS,
    *,
    on_clip: Callable[[int], None] | None = None,
) -> CalibrationClips:
    """Read clips, from as many of the videos as there are clips.

    With more videos than clips, those that are read are spread evenly over the list, since a
    folder often holds one label after the other; with fewer, a video gives several clips. One that
    cannot be read is passed over and the next of the list takes its place.

    Args:
        videos: At least one.
        manifest: Says T and how frames are preprocessed.
        num_clips: C.
        on_clip: Called with the number of clips that are read.

    Raises:
        ExportError: If more than half of the videos that were tried cannot be read.
    """
    per_video = -(-num_clips // len(videos))
    wanted = -(-num_clips // per_video)
    order = _spread_first(len(videos), wanted)
    parts: list[NDArray[np.uint8]] = []
    failed: list[str] = []
    for place in order:
        try:
            parts.append(clips_of_video(videos[place], manifest, per_video))
        except VideoError as exc:
            failed.append(str(exc))
        if on_clip is not None:
            on_clip(min(len(parts) * per_video, num_clips))
        if len(parts) == wanted:
            break
    if len(failed) > _LARGEST_FAILED_SHARE * (len(parts) + len(failed)):
        raise ExportError(
            f"{len(failed)} of {len(parts) + len(failed)} calibration videos cannot be read, and "
            f"at most half may fail; give others. The first: {failed[0]}"
        )
    return CalibrationClips(np.concatenate(parts)[:num_clips], len(parts), tuple(failed))


def _spread_first(num_videos: int, wanted: int) -> list[int]:
    """All places in a list, those first that are spread evenly over it."""
    spread = np.linspace(0, num_videos - 1, min(wanted, num_videos)).astype(int).tolist()
    return [*spread, *(place for place in range(num_videos) if place not in set(spread))]
