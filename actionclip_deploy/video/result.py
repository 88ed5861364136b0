"""What reading a video gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames sampled from one video.

    Attributes:
        frames: RGB, uint8, shape (T, H, W, 3), as displayed.
        indices: Place of each frame in the video, 0-based, int64, shape (T,).
        pts_seconds: When each frame is shown, by the container's clock, float64, shape (T,).

    Raises:
        ShapeError: If the three do not fit together.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise ShapeError(
                f"frames are {frames.dtype} of shape {frames.shape}; expected uint8 RGB of shape "
                "(T, H, W, 3) with T, H and W of 1 or more."
            )
        for name, dtype in (("indices", np.int64), ("pts_seconds", np.float64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != frames.shape[:1]:
                raise ShapeError(
                    f"{name} is {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} "
                    f"of shape ({len(frames)},), one for each frame."
                )

    @property
    def num_frames(self) -> int:
        """T."""
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        """H, in pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """W, in pixels."""
        return int(self.frames.shape[2])
