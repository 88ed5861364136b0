"""One row of a benchmark, in a process of its own.

Runtimes in one process share thread pools, allocators and settings, and the idle threads of one
spin on the cores of the next. So each row lives in its own process, and the processes take turns:
a request is one line of JSON on standard input, its answer one line on standard output.

    python -m actionclip_deploy.benchmarks.worker

What it measures with is here too: warm-up and timing, memory, the rate of matrix products.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.benchmarks.candidates import FROM_CHECKPOINT, RowSpec
from actionclip_deploy.benchmarks.report import Parity, WarmUp
from actionclip_deploy.benchmarks.stages import score_directory, time_frames, time_video
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError, MissingExtraError
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.parity import (
    TOLERANCES,
    Golden,
    Tolerance,
    compare,
    golden_scores,
    tolerance_of,
)

try:
    import psutil
    from threadpoolctl import threadpool_limits
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc

# Stable: the median of the last calls is that of those before them, but for this share. Slow calls
# vary less, and ten of them would take longer than what is to be measured.
_STABLE_SHARE = 0.05
_WINDOW, _WINDOW_OF_SLOW_CALLS, _SLOW_SECONDS = 5, 2, 0.5
_MIN_WARM_UP_SECONDS = 0.2

_CPU_SIZE, _GPU_SIZE = 1536, 8192  # of the matrices whose product is timed
_REPEATS = 5
_SEED = 0

Clock = Callable[[], float]


class CudaEventTimer:
    """Measures on the device's own clock what the host asks it to do, by two CUDA events.

    The device is waited for before the first event and after the second one, so work that a
    runtime leaves running when it returns is counted and not overlooked.

    Args:
        cuda: The module `torch.cuda`.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._first = cuda.Event(enable_timing=True)
        self._last = cuda.Event(enable_timing=True)

    def start(self) -> None:
        """Mark the start, once the device has finished what it was doing."""
        self._cuda.synchronize()
        self._first.record()

    def stop(self) -> float:
        """Seconds since the start, after everything on the device has ended."""
        self._cuda.synchronize()
        self._last.record()
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1e3


@dataclass
class Timings:
    """Seconds of calls, one entry per call."""

    # From before the call until its result was on the host and the device idle.
    wall: list[float] = field(default_factory=list)
    # Between CUDA events around the call; empty without a device timer.
    device: list[float] = field(default_factory=list)


def warm_up(
    call: Callable[[], Any], *, max_seconds: float, clock: Clock = time.perf_counter
) -> WarmUp:
    """Call until the latency is stable: two windows of five calls have medians within 5 %.

    Calls of more than half a second are taken in windows of two. After `max_seconds` it gives up,
    and says that it was not stable.
    """
    start, seconds = clock(), []
    while True:
        before = clock()
        call()
        now = clock()
        seconds.append(now - before)
        is_stable = _is_stable(seconds) and now - start >= _MIN_WARM_UP_SECONDS
        if is_stable or now - start >= max_seconds:
            return WarmUp(num_calls=len(seconds), seconds=now - start, is_stable=is_stable)


def measure(
    call: Callable[[], Any],
    *,
    seconds: float,
    device_timer: CudaEventTimer | None = None,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time calls one by one for so many seconds, at least one of them."""
    timings = Timings()
    start = clock()
    while not timings.wall or clock() - start < seconds:
        if device_timer is not None:
            device_timer.start()
        before = clock()
        call()
        if device_timer is not None:
            timings.device.append(device_timer.stop())
        timings.wall.append(clock() - before)
    return timings


def _is_stable(seconds: Sequence[float]) -> bool:
    window = _WINDOW if seconds[-1] < _SLOW_SECONDS else _WINDOW_OF_SLOW_CALLS
    if len(seconds) < 2 * window:
        return False
    last = float(np.median(seconds[-window:]))
    before = float(np.median(seconds[-2 * window : -window]))
    return abs(last - before) <= _STABLE_SHARE * before


def seconds_since_start() -> float:
    """Seconds since the operating system started this process, to about 10 ms."""
    return time.time() - float(psutil.Process().create_time())


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory that this process has held."""
    system = platform.system()
    if system == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    if system == "Linux":
        # Not getrusage: its largest is inherited from the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else resident_bytes()
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def device_bytes() -> int | None:
    """Memory that this process holds on the GPU, by the driver's count; None where unknown."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        own = psutil.Process().pid
        held = [
            process.usedGpuMemory
            for index in range(pynvml.nvmlDeviceGetCount())
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(
                pynvml.nvmlDeviceGetHandleByIndex(index)
            )
            if process.pid == own and process.usedGpuMemory is not None
        ]
    except pynvml.NVMLError:
        return None
    return sum(held) if held else None


@dataclass(frozen=True)
class MatmulSample:
    """The rate of the fastest of some products of square matrices: fp32 on a CPU, bf16 on a GPU."""

    flops_per_second: float
    precision: str
    library: str


def matmul_rate(num_threads: int, *, torch: Any = None) -> MatmulSample:
    """Multiply large square matrices: what a runtime could reach here at best.

    Args:
        num_threads: Threads on the CPU.
        torch: The module, where it is loaded already; it is used then, on its GPU if it has one,
            and otherwise numpy.
    """
    if torch is None:
        given = np.random.default_rng(0).standard_normal((_CPU_SIZE, _CPU_SIZE), dtype=np.float32)
        product = np.empty_like(given)
        with threadpool_limits(num_threads):
            rate = _best_rate(lambda: np.matmul(given, given, out=product), _CPU_SIZE)
        return MatmulSample(rate, "fp32", f"numpy {np.__version__}")
    library = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        matrix = torch.randn(_GPU_SIZE, _GPU_SIZE, device="cuda", dtype=torch.bfloat16)

        def multiply() -> None:
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()

        return MatmulSample(_best_rate(multiply, _GPU_SIZE), "bf16", library)
    matrix = torch.randn(_CPU_SIZE, _CPU_SIZE)
    result = torch.empty_like(matrix)
    rate = _best_rate(lambda: torch.mm(matrix, matrix, out=result), _CPU_SIZE)
    return MatmulSample(rate, "fp32", library)


def _best_rate(multiply: Callable[[], Any], size: int) -> float:
    multiply()  # the first one allocates and picks a kernel
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


class CandidateWorker:
    """Opens one row, unless its runtime is given, and measures what it is asked to."""

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
        if self._spec.runtime in FROM_CHECKPOINT:
            return TOLERANCES["fp32"]
        return tolerance_of(runtime.manifest, graph, computed=runtime.precision_of(graph))

    def stages(self) -> dict[str, Any]:
        """Time the stages of one clip of random frames, from the device copy to the scores."""
        label_embeddings = self._label_embeddings()
        return {"stages_ms": time_frames(self._runtime, self._clips(1)[0], label_embeddings)}

    def video(self, path: str, max_pixels: int) -> dict[str, Any]:
        """Time the stages of one clip of a video file, from opening it to the scores."""
        num_frames = self._spec.num_frames
        embeddings = self._label_embeddings()
        timed = time_video(self._runtime, Path(path), num_frames, embeddings, max_pixels=max_pixels)
        return {"stages_ms": timed}

    def directory(self, paths: list[str], max_pixels: int) -> dict[str, Any]:
        """Score videos one after the other as `actionclip predict` does; gives the seconds."""
        seconds, failed = score_directory(
            self._runtime,
            [Path(path) for path in paths],
            self._label_embeddings(),
            max_pixels=max_pixels,
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
    worker: CandidateWorker | None = None
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            if name == "open":
                worker = CandidateWorker(RowSpec.from_dict(request))
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
