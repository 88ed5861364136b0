"""Which samples can be used: missing, unreadable and too short videos are told once, together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from actionclip_deploy.errors import VideoError
from actionclip_deploy.evaluate.frames import open_frames
from actionclip_deploy.train.annotation_files import Sample

logger = logging.getLogger(__name__)

Problem = Literal["missing", "unreadable", "too short"]

_LISTED = 10


@dataclass(frozen=True)
class BadVideo:
    """A video that cannot be used."""

    path: Path
    problem: Problem
    reason: str


@dataclass(frozen=True)
class Screening:
    """What is left of some samples.

    Attributes:
        samples: Those that can be used, in their order.
        bad: The videos of the others, each once.
    """

    samples: tuple[Sample, ...]
    bad: tuple[BadVideo, ...]

    def describe(self) -> str:
        """How many cannot be used, why, and which; all in one sentence."""
        counts = Counter(video.problem for video in self.bad)
        counted = ", ".join(f"{count} {problem}" for problem, count in counts.items())
        listed = ", ".join(f"{video.path} ({video.problem})" for video in self.bad[:_LISTED])
        more = f" and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
        return f"{len(self.bad)} videos cannot be used ({counted}): {listed}{more}"


def screen_samples(
    samples: Sequence[Sample],
    *,
    bad_videos: Literal["skip", "fail"] = "skip",
    min_frames: int = 1,
    open_videos: bool = False,
    threads: int = 8,
) -> Screening:
    """Sort out samples whose videos cannot be used.

    Args:
        samples: The samples.
        bad_videos: "skip" leaves them out and logs one warning; "fail" raises.
        min_frames: A video with fewer frames is too short.
        open_videos: Whether each video is opened, which reads it once. Without that only
            missing ones are found, and those that the annotation says to be too short.
        threads: Videos that are looked at at a time.

    Raises:
        VideoError: If a video cannot be used and that is to fail, or none can.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda s: _find_problem(s, min_frames, open_videos), samples))
    bad = {video.path: video for video in found if video is not None}
    kept = tuple(s for s, video in zip(samples, found, strict=True) if video is None)
    screening = Screening(kept, tuple(bad.values()))
    if bad and (bad_videos == "fail" or not kept):
        raise VideoError(f"{screening.describe()}; correct the list or the folder it starts from.")
    if bad:
        logger.warning("%s; they are left out", screening.describe())
    return screening


def _find_problem(sample: Sample, min_frames: int, open_videos: bool) -> BadVideo | None:
    path = sample.path
    if not path.exists():
        return BadVideo(path, "missing", f"there is no {path}")
    if sample.num_frames is not None and sample.num_frames < min_frames:
        return BadVideo(path, "too short", f"it is said to have {sample.num_frames} frames")
    if not open_videos:
        return None
    try:
        with open_frames(sample, min_frames=0) as frames:
            if frames.num_frames < min_frames:
                return BadVideo(path, "too short", f"it has {frames.num_frames} frames")
            frames.read(np.zeros(1, np.int64))
    except VideoError as exc:
        return BadVideo(path, "unreadable", str(exc))
    return None
