"""What a shared call computes, and how many clips a runtime computes best at a time."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime

# Nearer to the best time of a clip than this, a smaller call is as good.
_AS_GOOD = 1.05

GraphOrClip = Literal["visual", "temporal", "textual", "video", "clip"]


@dataclass(frozen=True, eq=False)
class ClipWork:
    """The preprocessed frames of one video.

    Attributes:
        pixels: Distinct frames, uint8, shape (F, S, S, 3).
        views: Rows of `pixels` that each view is made of, shape (V, T).
    """

    pixels: NDArray[np.uint8]
    views: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What came out.

    Attributes:
        output: Embeddings of the views, shape (V, D), or the rows of a graph.
        stages: Its share of the seconds of each graph.
    """

    output: Float32Array
    stages: dict[str, float] = field(default_factory=dict)


class SharedCalls:
    """Computes the work of several requests in one call.

    A group is `("views", T)` with `ClipWork`, or `(graph, shape of a row)` with arrays of rows,
    where `clip` stands for whole clips, whatever the visual prompt.

    Args:
        runtime: What executes the graphs.
        max_batch: Clips in a call; larger work is cut, which bounds memory.
    """

    def __init__(self, runtime: Runtime, *, max_batch: int) -> None:
        self._runtime = runtime
        self._max_batch = max_batch

    def __call__(self, group: Hashable, payloads: Sequence[Any]) -> list[Encoded]:
        """Compute payloads of one group; gives their outputs in order."""
        assert isinstance(group, tuple)
        if group[0] == "views":
            return self._encode_views(payloads)
        rows = [len(payload) for payload in payloads]
        started = time.perf_counter()
        output = self._run_graph(group[0], _joined(payloads))
        seconds = time.perf_counter() - started
        return [
            Encoded(part, {group[0]: seconds * len(part) / sum(rows)})
            for part in np.split(output, np.cumsum(rows)[:-1])
        ]

    def _run_graph(self, graph: GraphOrClip, array: Array) -> Float32Array:
        runtime = self._runtime
        if graph == "visual":
            num_frames = self._max_batch * runtime.manifest.model.num_frames
            return _in_parts(runtime.encode_frames, array, num_frames)
        run = {
            "temporal": runtime.encode_clips,
            "textual": runtime.encode_text,
            "video": runtime.encode_video,
            "clip": runtime.encode_video,
        }[graph]
        return _in_parts(run, array, self._max_batch)

    def _encode_views(self, works: Sequence[ClipWork]) -> list[Encoded]:
        if not self._runtime.frames_are_independent:
            clips = _joined([work.pixels[work.views] for work in works])
            started = time.perf_counter()
            embeddings = self._run_graph("video", clips)
            return _shares(works, embeddings, {"video": time.perf_counter() - started})
        started = time.perf_counter()
        features = self._run_graph("visual", _joined([work.pixels for work in works]))
        visual = time.perf_counter()
        starts = np.cumsum([0, *(len(work.pixels) for work in works)])
        rows = np.concatenate(
            [work.views + start for work, start in zip(works, starts, strict=False)]
        )
        embeddings = self._run_graph("temporal", features[rows])
        stages = {"visual": visual - started, "temporal": time.perf_counter() - visual}
        return _shares(works, embeddings, stages)


@dataclass(frozen=True)
class BatchFacts:
    """What the warm-up measured.

    Attributes:
        best: Clips of the smallest call that is about as good per clip as any.
        ms_per_clip: By the clips of a call.
    """

    best: int
    ms_per_clip: dict[int, float]


def measure_batches(runtime: Runtime, *, max_batch: int, budget_seconds: float) -> BatchFacts:
    """Run calls of growing size, which warms the runtime up, and find the best.

    Sizes double up to `max_batch`; those that the budget has no time for are left out.
    """
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    start = time.perf_counter()
    found: dict[int, float] = {}
    for size in sizes:
        spent = time.perf_counter() - start
        if found and 2 * size * min(found.values()) / 1000 > budget_seconds - spent:
            break
        found[size] = min(_seconds(runtime, size) for _ in range(3)) * 1000 / size
    best = min(found.values())
    smallest = min(size for size, ms in found.items() if ms <= best * _AS_GOOD)
    return BatchFacts(smallest, {size: round(ms, 3) for size, ms in found.items()})


def _seconds(runtime: Runtime, size: int) -> float:
    model = runtime.manifest.model
    shape = (size, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    started = time.perf_counter()
    runtime.encode_video(frames)
    return time.perf_counter() - started


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _in_parts(run: Any, array: Array, num_rows: int) -> Float32Array:
    starts = range(0, len(array), num_rows)
    parts: list[Float32Array] = [run(array[start : start + num_rows]) for start in starts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shares(
    works: Sequence[ClipWork], embeddings: Float32Array, stages: dict[str, float]
) -> list[Encoded]:
    num_views = [len(work.views) for work in works]
    parts = np.split(embeddings, np.cumsum(num_views)[:-1])
    return [
        Encoded(part, {name: s * len(part) / len(embeddings) for name, s in stages.items()})
        for part in parts
    ]
