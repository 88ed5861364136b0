"""One row of a benchmark, in a process of its own.

Runtimes in one process share thread pools, allocators and settings, and the idle threads of one
spin on the cores of the next. So each row lives in its own process, and the processes take turns:
a request is one line of JSON on standard input, its answer one line on standard output.

    python -m actionclip_deploy.benchmarks.worker
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.matmul import matmul_rate
from actionclip_deploy.benchmarks.memory import (
    device_bytes,
    peak_resident_bytes,
    resident_bytes,
    seconds_since_start,
)
from actionclip_deploy.benchmarks.report import Parity
from actionclip_deploy.benchmarks.stages import score_directory, time_frames, time_video
from actionclip_deploy.benchmarks.timing import CudaEventTimer, measure, warm_up
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.comparison import (
    TOLERANCES,
    Tolerance,
    compare,
    tolerance_of,
)
from actionclip_deploy.runtimes.golden import Golden, golden_scores
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES

_SEED = 0


class Worker:
    """Opens one row and measures what it is asked to.

    Args:
        spec: The row.
        runtime: Open already; None opens the row's.
    """

    def __init__(self, spec: RowSpec, runtime: Runtime | None = None) -> None:
        self._spec = spec
        self._import_seconds = seconds_since_start()
        before = time.perf_counter()
        self._runtime = runtime or spec.open()
        self._load_seconds = time.perf_counter() - before
        before = time.perf_counter()
        self._runtime.encode_video(self._clips(1))
        self._first_result_seconds = time.perf_counter() - before
        self._golden = Golden.load(Bundle.open(spec.bundle))
        self._timer = _cuda_timer()

    def start(self) -> dict[str, Any]:
        """What ran, and how long it took from the start of the process to the first result."""
        return {
            "info": asdict(self._runtime.describe()),
            "has_device": self._runtime.has_device,
            "golden_origin": self._golden.origin,
            "import_seconds": self._import_seconds,
            "load_seconds": self._load_seconds,
            "first_result_seconds": self._first_result_seconds,
            "resident_bytes": resident_bytes(),
        }

    def memory(self) -> dict[str, Any]:
        """The largest memory of the process so far, and what it holds on the device."""
        return {"peak_resident_bytes": peak_resident_bytes(), "device_bytes": device_bytes()}

    def warm_up(self, batch_size: int, max_seconds: float) -> dict[str, Any]:
        """Call until the latency is stable."""
        clips = self._clips(batch_size)
        done = warm_up(lambda: self._runtime.encode_video(clips), max_seconds=max_seconds)
        return done.model_dump()

    def measure(self, batch_size: int, seconds: float) -> dict[str, Any]:
        """Time calls of so many clips for so many seconds."""
        clips = self._clips(batch_size)
        timings = measure(
            lambda: self._runtime.encode_video(clips), seconds=seconds, device_timer=self._timer
        )
        return asdict(timings)

    def parity(self, batch_size: int) -> dict[str, Any]:
        """Compare the golden clips, in calls of so many of them, with what PyTorch gave."""
        rows = np.arange(batch_size) % len(self._golden.frames)
        embeddings = self._runtime.encode_video(self._golden.frames[rows])
        manifest, golden = self._runtime.manifest, self._golden
        tolerance = self._tolerance()
        reference = golden.video_embeddings[rows]
        vectors = compare(
            "embeddings", embeddings, reference, tolerance.difference, tolerance.min_cosine
        )
        scores = golden_scores(manifest, embeddings, golden.text_embeddings)
        labels = compare("scores", scores, golden.scores[rows], tolerance.score, labels=True)
        problem = next((c for c in (vectors, labels) if not c.passed), None)
        return Parity(
            max_abs_difference=_finite(vectors.max_abs_difference),
            min_cosine=_finite(vectors.min_cosine),
            top1_agreement=labels.top1_agreement,
            top5_agreement=labels.top5_agreement,
            passed=problem is None,
            problem=None if problem is None else f"{problem.what}: {problem.in_words()}",
        ).model_dump()

    def _tolerance(self) -> Tolerance:
        """That of the bundle's graph; that of fp32 for rows that run the checkpoint instead."""
        runtime = self._runtime
        graph: GraphName = "visual" if runtime.frames_are_independent else "video"
        # An engine may have been repaired into another precision; it has to agree as before.
        is_engine = self._spec.runtime in ENGINE_RUNTIMES
        if is_engine or runtime.describe().precision == runtime.manifest.graphs[graph].precision:
            return tolerance_of(runtime.manifest, graph)
        return TOLERANCES["fp32"]

    def stages(self) -> dict[str, Any]:
        """Time the stages of one clip of random frames, from the device copy to the scores."""
        label_embeddings = self._label_embeddings()
        return {"stages_ms": time_frames(self._runtime, self._clips(1)[0], label_embeddings)}

    def video(self, path: str) -> dict[str, Any]:
        """Time the stages of one clip of a video file, from opening it to the scores."""
        num_frames = self._spec.num_frames
        timed = time_video(self._runtime, Path(path), num_frames, self._label_embeddings())
        return {"stages_ms": timed}

    def directory(self, paths: list[str]) -> dict[str, Any]:
        """Score videos one after the other as `actionclip predict` does; gives the seconds."""
        seconds, failed = score_directory(
            self._runtime, [Path(path) for path in paths], self._label_embeddings()
        )
        return {"seconds": seconds, "num_failed": failed}

    def matmul_rate(self) -> dict[str, Any]:
        """Matrix-product rate with this row's library and threads."""
        return asdict(matmul_rate(self._spec.num_threads, torch=sys.modules.get("torch")))

    def _clips(self, batch_size: int) -> NDArray[np.uint8]:
        model = self._runtime.manifest.model
        shape = (batch_size, self._spec.num_frames, model.input_size, model.input_size, 3)
        return np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)

    def _label_embeddings(self) -> NDArray[np.float32]:
        """Of the golden labels, (K, C, D)."""
        text = self._golden.text_embeddings
        return text.reshape(len(self._runtime.manifest.templates), -1, text.shape[-1])


def serve(requests: Any, answers: Any) -> None:
    """Answer requests until there are no more; the first one opens the row."""
    worker: Worker | None = None
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            if name == "open":
                worker = Worker(RowSpec.from_dict(request))
                answer = worker.start()
            else:
                answer = getattr(worker, name)(**request)
        except (ActionClipError, ValueError, MemoryError) as exc:
            answer = {"error": str(exc) or type(exc).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _cuda_timer() -> CudaEventTimer | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return CudaEventTimer(torch.cuda)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def main() -> None:
    """Serve on standard input and output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
