"""Which frames of a video make a clip.

All indices are 0-based, int64 and ascending within a clip. N is the number of frames of the
video here, T the number of frames of a clip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError

CROP_COUNTS = (1, 3)
MAX_CLIPS = 1000  # of a video; the paper takes 10


@dataclass(frozen=True)
class Views:
    """How many views of a video are scored: clips in time, crops in space.

    Attributes:
        num_clips: Clips per video, 1 to `MAX_CLIPS`.
        num_crops: Crops per clip: 1 (the centre) or 3 (along the longer side).

    Raises:
        ValueError: If one of the two is not allowed.
    """

    num_clips: int = 1
    num_crops: int = 1

    def __post_init__(self) -> None:
        _check_positive(num_clips=self.num_clips)
        if self.num_clips > MAX_CLIPS:
            raise ArgumentError("num_clips", f"is {self.num_clips}; it may be {MAX_CLIPS} at most.")
        if self.num_crops not in CROP_COUNTS:
            raise ArgumentError("num_crops", f"is {self.num_crops}; it must be 1 or 3.")

    @classmethod
    def parse(cls, text: str) -> Views:
        """Read `"10x3"`: 10 clips x 3 crops.

        Raises:
            ValueError: If the text has another form, or names a number that is not allowed.
        """
        match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip())
        if match is None:
            raise ArgumentError(
                "views",
                f"is {text!r}; it must be CLIPSxCROPS, such as 1x1 or 10x3, "
                "with 1 clip or more and 1 or 3 crops.",
            )
        try:
            return cls(num_clips=int(match[1]), num_crops=int(match[2]))
        except ValueError as exc:
            raise ArgumentError("views", f"is {text!r} (CLIPSxCROPS): {exc}") from exc

    @property
    def num_views(self) -> int:
        """Clips times crops."""
        return self.num_clips * self.num_crops

    def __str__(self) -> str:
        return f"{self.num_clips}x{self.num_crops}"


def sample_segments(num_video_frames: int, num_frames: int) -> NDArray[np.int64]:
    """Pick the middle frame of each of T equal segments of a video.

    A video of no more than T frames gives all of its frames, some of them several times.

    Args:
        num_video_frames: Frames of the video, N.
        num_frames: Frames of the clip, T.

    Returns:
        Indices, shape (T,), in [0, N).

    Raises:
        ValueError: If one of the two is not positive.

    Source:
        sallymmx/ActionCLIP@31c34df datasets/datasets.py, the sampler of validation and test. Its
        places are floating point numbers cut to integers, and so are these.
    """
    _check_positive(num_video_frames=num_video_frames, num_frames=num_frames)
    if num_frames == 1:
        return np.array([num_video_frames // 2], dtype=np.int64)
    steps = np.arange(num_frames, dtype=np.int64)
    if num_video_frames <= num_frames:
        return steps * num_video_frames // num_frames
    middle = (num_video_frames / num_frames - 1) / 2
    return (steps * num_video_frames / num_frames + middle).astype(np.int64)


def sample_random_segments(
    num_video_frames: int, num_frames: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Pick one frame at random from each of T equal segments, as training does.

    A video of no more than T frames gives all of its frames, and random ones of them again.

    Args:
        num_video_frames: Frames of the video, N.
        num_frames: Frames of the clip, T.
        rng: The source of randomness.

    Returns:
        Indices, shape (T,), in [0, N).

    Raises:
        ValueError: If one of the two numbers is not positive.

    Source:
        sallymmx/ActionCLIP@31c34df datasets/datasets.py, the sampler of training: segment i
        starts at i * N // T.
    """
    _check_positive(num_video_frames=num_video_frames, num_frames=num_frames)
    if num_video_frames <= num_frames:
        repeats = rng.integers(num_video_frames, size=num_frames - num_video_frames)
        return np.sort(np.concatenate([np.arange(num_video_frames), repeats])).astype(np.int64)
    starts = np.arange(num_frames + 1, dtype=np.int64) * num_video_frames // num_frames
    return rng.integers(starts[:-1], starts[1:], dtype=np.int64)


def sample_views(num_video_frames: int, num_frames: int, num_clips: int) -> NDArray[np.int64]:
    """Pick the frames of several clips that together cover a video.

    One clip is that of `sample_segments`. Of several, each takes one frame per segment, all at the
    same place in their segments, and the places go in equal steps from the segment's first frame
    to its last. A video of no more than T frames gives the same clip each time.

    The paper reports 10 clips, and its authors released no code for them; this is the sampler of
    the code base nearest to theirs.

    Args:
        num_video_frames: Frames of the video, N.
        num_frames: Frames of a clip, T.
        num_clips: Clips.

    Returns:
        Indices, shape (num_clips, T), in [0, N).

    Raises:
        ValueError: If one of the three is not positive.

    Source:
        Places: whwu95/Text4Vis@d61b34d datasets/datasets.py, uniform sampling of several clips.
    """
    _check_positive(num_clips=num_clips)
    center = sample_segments(num_video_frames, num_frames)
    if num_clips == 1 or num_video_frames <= num_frames:
        return np.tile(center, (num_clips, 1))
    segment = num_video_frames / num_frames
    places = np.linspace(0, segment - 1, num_clips).astype(np.int64)
    return (places[:, np.newaxis] + segment * np.arange(num_frames)).astype(np.int64)


def sample_windows(
    num_video_frames: int, num_frames: int, *, window_frames: int, stride_frames: int
) -> NDArray[np.int64]:
    """Pick the frames of windows that slide over a stream.

    Windows start every `stride_frames` frames. One that would go past the end is left out, unless
    it is the only one; then it covers what there is.

    Args:
        num_video_frames: Frames of the stream so far, N.
        num_frames: Frames of a clip, T; the middle ones of the window's segments.
        window_frames: Length of a window in frames.
        stride_frames: Distance between the starts of two windows in frames.

    Returns:
        Indices, shape (W, T), in [0, N), with W = 1 or more.

    Raises:
        ValueError: If one of the four is not positive.
    """
    _check_positive(
        num_video_frames=num_video_frames,
        num_frames=num_frames,
        window_frames=window_frames,
        stride_frames=stride_frames,
    )
    within = sample_segments(min(window_frames, num_video_frames), num_frames)
    last_start = max(0, num_video_frames - window_frames)
    starts = np.arange(0, last_start + 1, stride_frames, dtype=np.int64)
    return starts[:, np.newaxis] + within


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ArgumentError(name, f"is {number}; it must be 1 or more.")
