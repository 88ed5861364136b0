"""Each stage on the way of a clip, with pytest-benchmark; every one checks its answer first.

python -m pytest benchmarks/bench_stages.py                       measures
python -m pytest benchmarks/bench_stages.py --benchmark-disable   checks the answers alone
python -m pytest benchmarks/bench_stages.py --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actionclip_deploy import Bundle, LabelBank, Recognizer, Runtime, VideoReader, score_clips
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.sampling import sample_segments

# Of embeddings and features in fp32 on a CPU, as runtimes.comparison has them.
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def video(dataset: Path) -> Path:
    return sorted(dataset.rglob("*.mp4"))[0]


@pytest.fixture(scope="session")
def golden(bundle: Bundle) -> Golden:
    return Golden.load(bundle)


@pytest.fixture(scope="session")
def bank(bundle: Bundle, runtime: Runtime, dataset: Path) -> LabelBank:
    return LabelBank.build(bundle, runtime, read_labels(dataset / "labels.csv"), name="motions")


def test_open_a_bundle(benchmark: Any, bundle: Bundle) -> None:
    opened = benchmark(Bundle.open, bundle.path)
    assert opened.manifest == bundle.manifest


def test_open_a_video(benchmark: Any, video: Path) -> None:
    def open_and_close() -> int:
        with VideoReader(video) as reader:
            return reader.num_frames

    with VideoReader(video) as reader:
        everything = reader.read(np.arange(reader.num_frames))
    assert benchmark(open_and_close) == len(everything.frames)


def test_read_eight_frames(benchmark: Any, video: Path) -> None:
    with VideoReader(video) as reader:
        indices = sample_segments(reader.num_frames, 8)
        everything = reader.read(np.arange(reader.num_frames))
        np.testing.assert_array_equal(reader.read(indices).frames, everything.frames[indices])
        benchmark(reader.read, indices)


@pytest.mark.parametrize("region", ["frame", "crop"])
def test_resize_eight_frames_of_720p(benchmark: Any, region: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, 720, 1280, 3), dtype=np.uint8)
    resized = preprocess_frames(frames, region=region)[0]
    # Pillow alone: the shorter side to 256, then the middle 224 x 224.
    whole = Image.fromarray(frames[0]).resize((455, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((116, 16, 116 + 224, 16 + 224)), np.int16)
    assert np.abs(resized[0].astype(np.int16) - expected).max() <= (0 if region == "frame" else 2)
    benchmark(preprocess_frames, frames, region=region)


@pytest.mark.parametrize("num_frames", [1, 8, 32])
def test_encode_frames(benchmark: Any, runtime: Runtime, golden: Golden, num_frames: int) -> None:
    assert golden.frame_features is not None
    rows = np.arange(num_frames) % (golden.frames.shape[0] * golden.frames.shape[1])
    frames = golden.frames.reshape(-1, *golden.frames.shape[2:])[rows]
    expected = golden.frame_features.reshape(-1, golden.frame_features.shape[-1])[rows]
    limit = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(runtime.encode_frames(frames), expected, rtol=0, atol=limit)
    benchmark(runtime.encode_frames, frames)


@pytest.mark.parametrize("num_clips", [1, 8])
def test_encode_clips(benchmark: Any, runtime: Runtime, golden: Golden, num_clips: int) -> None:
    assert golden.frame_features is not None
    rows = np.arange(num_clips) % len(golden.frames)
    expected = golden.video_embeddings[rows]
    features = golden.frame_features[rows]
    np.testing.assert_allclose(runtime.encode_clips(features), expected, rtol=0, atol=TOLERANCE)
    benchmark(runtime.encode_clips, features)


def test_encode_prompts(benchmark: Any, runtime: Runtime, golden: Golden) -> None:
    expected = golden.text_embeddings
    np.testing.assert_allclose(runtime.encode_text(golden.tokens), expected, rtol=0, atol=TOLERANCE)
    benchmark(runtime.encode_text, golden.tokens)


@pytest.mark.parametrize("num_labels", [400, 10_000])
def test_score_a_clip(benchmark: Any, num_labels: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.standard_normal((16, num_labels, 512), dtype=np.float32)
    labels /= np.linalg.norm(labels, axis=-1, keepdims=True)
    clip = labels[3, 7][np.newaxis]
    scores = score_clips(clip, labels)
    logits = 100.0 * (labels.astype(np.float64) @ clip[0])
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(scores[0], expected, atol=1e-5)
    benchmark(score_clips, clip, labels)


def test_from_a_file_to_scores(
    benchmark: Any, runtime: Runtime, bank: LabelBank, dataset: Path
) -> None:
    recognizer = Recognizer(runtime, bank)
    samples = read_annotations(dataset / "test.txt", bank.labels, format="videos")
    right = [
        recognizer.predict(sample.path).predictions[0].label == bank.labels[sample.label_ids[0]]
        for sample in samples
    ]
    assert sum(right) >= len(right) - 1  # 98 % of 2,000 such videos are recognised
    benchmark(recognizer.predict, samples[0].path)
