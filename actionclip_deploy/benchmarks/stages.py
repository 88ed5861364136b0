"""Each stage on the way from a video file to scores, timed apart and together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import FailedVideo, Recognizer
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import score
from actionclip_deploy.video import MAX_PIXELS, VideoReader
from actionclip_deploy.views import Stopwatch, ViewFrames, ViewReader, encode_views

# In the order in which a clip passes them.
STAGES = ("demux", "decode", "resize", "transfer", "visual", "temporal", "video", "score")

_REPEATS = 5


def time_frames(
    runtime: Runtime, frames: NDArray[np.uint8], label_embeddings: Float32Array
) -> dict[str, float]:
    """Time the stages of one clip from its frames on.

    Args:
        runtime: What executes the graphs.
        frames: RGB, uint8, shape (T, S, S, 3).
        label_embeddings: Unit norm, shape (K, C, D).

    Returns:
        Median milliseconds by stage. `transfer` is the copy to the device by itself; `visual`
        holds one too, because that is how a graph is called. `video` stands for `visual` and
        `temporal` where the model mixes the frames of a clip.
    """
    clip = ViewFrames.of_clips(frames[np.newaxis])
    rounds = [_time_clip(runtime, clip, label_embeddings) for _ in range(1 + _REPEATS)][1:]
    return {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}


def time_video(
    runtime: Runtime,
    path: Path,
    num_frames: int,
    label_embeddings: Float32Array,
    *,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, float]:
    """Time the stages of the clip of one video file.

    Args:
        runtime: What executes the graphs.
        path: The file; it should have been read once before, so that the disk is not measured.
        num_frames: T.
        label_embeddings: Unit norm, shape (K, C, D).
        max_pixels: Most pixels of a frame.

    Returns:
        Milliseconds by stage. `demux` is opening the file: the one pass over its packets, and the
        decoding of the first frame; `decode` gives the wanted frames as RGB.

    Raises:
        VideoError: If no frame can be had from the file.
    """
    stopwatch = Stopwatch()
    with stopwatch.stage("open"):
        reader = VideoReader(path, max_pixels=max_pixels)
    with reader:
        views = ViewReader(runtime.manifest, Views(), "frame", num_frames)
        frames = views.read(reader, path, stopwatch)
    timed = stopwatch.timings_ms()
    names = {"demux": "open", "decode": "read", "resize": "preprocess"}
    return {
        **{name: timed[stage] for name, stage in names.items()},
        **_time_clip(runtime, frames, label_embeddings),
    }


def score_directory(
    runtime: Runtime,
    paths: Sequence[Path],
    label_embeddings: Float32Array,
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[float, int]:
    """Score videos as `actionclip predict` does; gives the seconds and how many failed."""
    templates, num_labels, _ = label_embeddings.shape
    bank = LabelBank(
        name="benchmark",
        labels=tuple(f"label {i}" for i in range(num_labels)),
        templates=tuple(f"template {i}: {{}}" for i in range(templates)),
        embeddings=np.ascontiguousarray(label_embeddings),
        textual_sha256="",
    )
    recognizer = Recognizer(runtime, bank, max_pixels=max_pixels)
    start = time.perf_counter()
    outcomes = list(recognizer.predict_all(paths))
    seconds = time.perf_counter() - start
    return seconds, sum(isinstance(outcome, FailedVideo) for outcome in outcomes)


def _time_clip(
    runtime: Runtime, frames: ViewFrames, label_embeddings: Float32Array
) -> dict[str, float]:
    manifest = runtime.manifest
    stopwatch = Stopwatch()
    if runtime.has_device:
        with stopwatch.stage("transfer"):
            runtime.copy_to_device(frames.pixels)
    sizes = CallSizes.of_videos(manifest.model)
    (encoded,) = encode_views(runtime, [frames], sizes=sizes)
    for graph, seconds in encoded.seconds.items():
        stopwatch.add(graph, seconds)
    with stopwatch.stage("score"):
        method, scale = manifest.scores.method, manifest.scores.scale
        score(method, encoded.embeddings, label_embeddings, scale=scale)
    timed = stopwatch.timings_ms()
    del timed["total"]
    return timed
