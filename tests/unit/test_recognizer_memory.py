"""Memory stays where it is, however many videos are scored."""

from __future__ import annotations

import os
from itertools import repeat
from pathlib import Path

import numpy as np
from fakes import FakeRuntime, fake_manifest

from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import Prediction, Recognizer

# Decoded frames of one of the videos take 0.8 MB, its packets and its decoder more than 1 MB: a
# leak of either over 200 videos would be beyond this by far.
MAX_GROWTH_BYTES = 24 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_hundreds_of_videos(rendered_video: Path) -> None:
    embeddings = np.full((1, 3, 16), 0.25, np.float32)
    bank = LabelBank("mine", ("a", "b", "c"), ("{}",), embeddings, "0" * 64)
    recognizer = Recognizer(FakeRuntime(fake_manifest()), bank)
    start = 0
    for number, outcome in enumerate(
        recognizer.predict_all(repeat(rendered_video, 250), num_workers=2)
    ):
        assert isinstance(outcome, Prediction)
        if number == 50:  # buffers and pools have their size by then
            start = resident_bytes()
    assert resident_bytes() - start < MAX_GROWTH_BYTES
