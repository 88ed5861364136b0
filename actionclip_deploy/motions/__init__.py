"""`motions`, the rendered dataset that the default model learns: coloured shapes in motion."""

from __future__ import annotations

from actionclip_deploy.motions.dataset import (
    CODECS,
    LONG_SPLITS,
    draw_labels,
    write_dataset,
    write_long_videos,
    write_pictures,
    write_video,
)
from actionclip_deploy.motions.rendering import (
    FRAME_SIZE,
    NUM_FRAMES,
    Act,
    EndlessMotions,
    render_acts,
    render_clip,
)
from actionclip_deploy.motions.vocabulary import (
    COLOURS,
    MOTIONS,
    ORDER_PAIRS,
    SHAPES,
    SPLITS,
    MotionLabel,
    all_labels,
    labels,
)

__all__ = [
    "CODECS",
    "COLOURS",
    "FRAME_SIZE",
    "LONG_SPLITS",
    "MOTIONS",
    "NUM_FRAMES",
    "ORDER_PAIRS",
    "SHAPES",
    "SPLITS",
    "Act",
    "EndlessMotions",
    "MotionLabel",
    "all_labels",
    "draw_labels",
    "labels",
    "render_acts",
    "render_clip",
    "write_dataset",
    "write_long_videos",
    "write_pictures",
    "write_video",
]
