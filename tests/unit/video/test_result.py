from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.video import Clip

FRAMES = np.zeros((2, 4, 6, 3), np.uint8)
INDICES = np.array([0, 5], np.int64)
PTS = np.array([0.0, 0.2])


def test_a_clip_knows_its_size() -> None:
    clip = Clip(FRAMES, INDICES, PTS)
    assert (clip.num_frames, clip.height, clip.width) == (2, 4, 6)


@pytest.mark.parametrize(
    ("frames", "indices", "pts_seconds", "message"),
    [
        (FRAMES.astype(np.float32), INDICES, PTS, "frames are float32.*expected uint8 RGB"),
        (FRAMES[0], INDICES, PTS, r"shape \(4, 6, 3\); expected uint8 RGB of shape \(T, H, W, 3\)"),
        (FRAMES[..., :1], INDICES, PTS, r"shape \(2, 4, 6, 1\)"),
        (FRAMES[:0], INDICES[:0], PTS[:0], "T, H and W of 1 or more"),
        (
            FRAMES,
            INDICES[:1],
            PTS,
            r"indices is int64 of shape \(1,\); expected int64 of shape \(2,\)",
        ),
        (FRAMES, INDICES.astype(np.int32), PTS, "indices is int32"),
        (FRAMES, INDICES, PTS.astype(np.float32), "pts_seconds is float32.*expected float64"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(frames, indices, pts_seconds, message) -> None:
    with pytest.raises(ShapeError, match=message):
        Clip(frames, indices, pts_seconds)
