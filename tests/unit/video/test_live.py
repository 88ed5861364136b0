"""Frames of sources, one after the other: files, pipes, what is rendered, and clocks."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from rendering import render

from actionclip_deploy.video import LiveReader, VideoReader, parse_source


def test_a_file_gives_the_frames_of_a_video_reader(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=30)
    frames = list(LiveReader(parse_source(str(path))).frames(threading.Event()))
    with VideoReader(path) as reader:
        clip = reader.read(list(range(reader.num_frames)))
    np.testing.assert_array_equal([frame.to_rgb() for frame in frames], clip.frames)
    np.testing.assert_array_equal([frame.pts_seconds for frame in frames], clip.pts_seconds)
