"""Every file of the reference material predicts, or gives its documented error."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy import (
    Bundle,
    LabelBank,
    Prediction,
    Recognizer,
    VideoWarning,
    open_runtime,
)

# The one file that is damaged; all others must read without a word.
DAMAGED = "broken/decord_corrupted.mp4"
# The manifest counts the frames of its first video stream; the reader takes the default one.
NUM_FRAMES_OF_THE_DEFAULT_STREAM = {"codecs/torchcodec_nasa_13013.mp4": 390}


@pytest.fixture(scope="module")
def recognizer(tiny_bundle: Path) -> Recognizer:
    bundle = Bundle.open(tiny_bundle)
    runtime = open_runtime(bundle, "onnxruntime")
    bank = LabelBank.build(
        bundle, runtime, ["archery", "yoga", "juggling balls"], name="walk", batch_size=16
    )
    return Recognizer(runtime, bank)


def test_every_video_predicts_or_gives_its_documented_error(
    shared: Path, recognizer: Recognizer
) -> None:
    with (shared / "videos" / "manifest.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    found = {
        path.relative_to(shared / "videos").as_posix()
        for folder in ("broken", "codecs", "labelled")
        for path in (shared / "videos" / folder).rglob("*")
        if path.is_file()
    }
    assert found == set(rows), "the walk must meet every file that the manifest names"
    for name, row in rows.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (outcome,) = recognizer.predict_all([shared / "videos" / name])
        if name == DAMAGED:
            assert [warning.category for warning in caught] == [VideoWarning]
            assert "is damaged" in str(caught[0].message)
            assert isinstance(outcome, Prediction)
            continue
        assert isinstance(outcome, Prediction), f"{name}: {outcome.error}"
        assert not caught, f"{name}: {caught[0].message}"
        assert outcome.scores.sum() == pytest.approx(1.0, abs=1e-5), name
        num_frames = NUM_FRAMES_OF_THE_DEFAULT_STREAM.get(name, int(row["frames"]))
        assert outcome.frame_indices.max() < num_frames, name
        assert np.all(np.diff(outcome.pts_seconds[0]) >= 0), name
