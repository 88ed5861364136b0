from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_graphs
from fakes import FakeRuntime, fake_manifest
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.runtimes.call_sizes import (
    CallSizes,
    frames_in_caches,
    measure_best_call,
)
from actionclip_deploy.runtimes.ort import OrtRuntime

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("backbone", "size", "expected"),
    [
        ("ViT-B-32", 224, 16),  # 50 tokens a frame
        ("ViT-B-16", 224, 4),  # 197
        ("ViT-L-14-336", 336, 1),  # 577
        ("ViT-B-16-quickgelu", 224, 4),
        ("ViT-B-2", 1024, 1),
        ("RN50", 224, None),
        ("fake", 32, None),
    ],
)
def test_a_call_has_so_many_frames_as_stay_in_the_caches(
    backbone: str, size: int, expected: int | None
) -> None:
    assert frames_in_caches(fake_manifest(backbone=backbone, input_size=size)) == expected


class CountingSession:
    def __init__(self, session: Any) -> None:
        self.session = session
        self.batches: list[int] = []

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (array,) = inputs.values()
        self.batches.append(len(array))
        outputs: list[np.ndarray] = self.session.run(names, inputs)
        return outputs


@pytest.mark.parametrize("num_frames", [1, 11, 12, 13, 25])
def test_a_large_batch_is_cut_and_the_answers_stay(tmp_path: Path, num_frames: int) -> None:
    # Patches of 4 pixels make 65 tokens, of which 12 frames fit.
    bundle = write_tiny_bundle(tmp_path, backbone="ViT-Z-4")
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 32, 32, 3), dtype=np.uint8)
    with OrtRuntime(bundle, num_threads=1) as runtime:
        runtime.encode_frames(frames[:1])
        counting = CountingSession(runtime._sessions["visual"])  # type: ignore[attr-defined]
        runtime._sessions["visual"] = counting  # type: ignore[attr-defined]
        features = runtime.encode_frames(frames)
    assert max(counting.batches) <= 12
    assert sum(counting.batches) == num_frames
    assert len(counting.batches) == -(-num_frames // 12)
    np.testing.assert_allclose(features, tiny_graphs.visual(frames), **CLOSE)


def test_clips_and_prompts_are_not_cut(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path, backbone="ViT-Z-4")
    clips = np.random.default_rng(1).normal(size=(40, 3, 16)).astype(np.float32)
    with OrtRuntime(bundle, num_threads=1) as runtime:
        runtime.encode_clips(clips)
        counting = CountingSession(runtime._sessions["temporal"])  # type: ignore[attr-defined]
        runtime._sessions["temporal"] = counting  # type: ignore[attr-defined]
        runtime.encode_clips(clips)
    assert counting.batches == [40]


def test_the_best_batch_is_the_smallest_that_is_as_good() -> None:
    manifest = fake_manifest()
    seconds = {1: 0.004, 2: 0.005, 4: 0.006, 8: 0.012}
    clock = [0.0]

    class Timed(FakeRuntime):
        def encode_video(self, frames: np.ndarray) -> np.ndarray:
            clock[0] += seconds[len(frames)]
            return np.zeros((len(frames), 16), np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "actionclip_deploy.runtimes.call_sizes.time",
            type("Clock", (), {"perf_counter": lambda: clock[0]}),
        )
        facts = measure_best_call(Timed(manifest), max_clips=8, budget_seconds=10)
        short = measure_best_call(Timed(manifest), max_clips=8, budget_seconds=0.01)
    assert facts.num_clips == 4
    assert facts.ms_per_clip == {1: 4.0, 2: 2.5, 4: 1.5, 8: 1.5}
    assert set(short.ms_per_clip) == {1}


@pytest.mark.parametrize(
    ("num_frames", "temporal"), [(1, 32), (8, 4), (16, 2), (24, 1), (32, 1), (64, 1)]
)
def test_as_many_clips_are_fused_as_one_call_of_frames_gives(
    num_frames: int, temporal: int
) -> None:
    sizes = CallSizes.of_videos(fake_manifest(num_frames=num_frames).model)
    assert (sizes.visual, sizes.temporal, sizes.video) == (32, temporal, 8)


def test_a_call_of_the_server_holds_so_many_clips() -> None:
    sizes = CallSizes.of_server(fake_manifest(num_frames=8).model, 16)
    assert (sizes.visual, sizes.temporal, sizes.video) == (128, 16, 16)
    # A clip waits no longer than for these, however large a call of clips may be.
    assert CallSizes.of_server(fake_manifest().model, 500).textual == 16
