"""The picture of many predictions: how much work it is, and what is in it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actionclip_deploy import plot
from actionclip_deploy.motions import write_video
from actionclip_deploy.plot import plot_predictions
from actionclip_deploy.recognizer import Prediction
from actionclip_deploy.records import LabelScore


@pytest.fixture
def prediction(tmp_path: Path) -> Prediction:
    frames = np.full((8, 48, 64, 3), (200, 30, 30), np.uint8)
    path = write_video(tmp_path / "red.mp4", frames, codec="mpeg4")
    best = (LabelScore("running", 0.7), LabelScore("sitting down on " * 9, 0.2))
    indices = np.arange(8)[np.newaxis]
    return Prediction(path, best, indices, indices / 10, np.ones(2, np.float32), {})


def drawn(predictions: list[Prediction], path: Path) -> np.ndarray:
    plot_predictions(predictions, path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_four_times_the_videos_take_at_most_six_times_the_work(
    prediction: Prediction, tmp_path: Path
) -> None:
    drawn([prediction], tmp_path / "warm.png")
    calls = []
    for count in (5, 20):
        num_calls = 0

        def tally(frame: object, event: str, argument: object) -> None:
            nonlocal num_calls
            num_calls += event == "call"

        sys.setprofile(tally)
        try:
            drawn([prediction] * count, tmp_path / "a.png")
        finally:
            sys.setprofile(None)
        calls.append(num_calls)
    assert calls[1] < 6 * calls[0]


def test_each_video_has_a_row_with_its_frames_and_bars(
    prediction: Prediction, tmp_path: Path
) -> None:
    pixels = drawn([prediction] * 3, tmp_path / "a.png").astype(int)
    assert pixels.shape == (3 * 210, 1650, 3)
    is_red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(axis=-1) < 90)
    is_bar = (pixels[..., 2] > pixels[..., 0] + 50) & (pixels[..., 2] < 200)
    for row in range(3):
        rows = slice(row * 210, (row + 1) * 210)
        columns = is_red[rows].any(axis=0).astype(int)
        assert (np.diff(columns) == 1).sum() + columns[0] == 8  # frames beside each other
        assert is_red[rows].any(axis=1).sum() > 80
        assert is_bar[rows, 1340:].sum() > 1000
        assert not is_red[rows, 1130:].any()  # labels and bars have room of their own
        assert not is_bar[rows, :1130].any()


def test_a_picture_of_many_videos_has_an_end(
    prediction: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "MAX_VIDEOS", 2)
    pixels = drawn([prediction] * 5, tmp_path / "a.png")
    assert pixels.shape == (2 * 210 + 30, 1650, 3)
    assert (pixels[-30:] < 100).any()  # it says how many more there are


def test_a_name_that_is_not_utf_8_is_drawn_escaped(prediction: Prediction, tmp_path: Path) -> None:
    strange = prediction.video.rename(tmp_path / "caf\udce9 $5 \x1b.mp4")
    moved = Prediction(**{**vars(prediction), "video": strange})
    assert drawn([moved], tmp_path / "a.png").shape == (210, 1650, 3)
