"""A row in its process: its clocks, what it answers, and what becomes of it when it fails."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle

from actionclip_deploy.benchmarks import candidates
from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.runner import RowProcess
from actionclip_deploy.benchmarks.worker import (
    CandidateWorker,
    CudaEventTimer,
    measure,
    serve,
    warm_up,
)
from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import BenchmarkError, FrameSizeError
from actionclip_deploy.runtimes.base import RuntimeInfo
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.video import MAX_PIXELS


class TurnedClock:
    """A clock that stands still but for the calls, which take the given seconds."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now = 0.0
        self.num_calls = 0
        self._durations = durations

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.num_calls += 1
        self.now += next(self._durations)


def _falling(first: float, last: float) -> Iterator[float]:
    seconds = first
    while True:
        yield max(seconds, last)
        seconds *= 0.8


def test_warm_up_goes_on_until_latency_is_stable() -> None:
    clock = TurnedClock(_falling(0.4, 0.05))
    done = warm_up(clock.call, max_seconds=60.0, clock=clock)
    assert done.is_stable
    # 0.4 x 0.8 ** n reaches 0.05 at n = 10; two windows of five have to lie behind that, but that
    # the median of a window does not mind two that are larger.
    assert 10 + 10 - 2 <= done.num_calls <= 10 + 10
    assert done.seconds == pytest.approx(clock.now)


def test_a_warm_up_that_never_settles_says_so() -> None:
    clock = TurnedClock(iter([0.1 * 1.3**i for i in range(100)]))
    done = warm_up(clock.call, max_seconds=5.0, clock=clock)
    assert not done.is_stable
    assert done.seconds >= 5.0


def test_slow_calls_are_stable_after_fewer_of_them() -> None:
    clock = TurnedClock(iter([2.0] * 100))
    assert warm_up(clock.call, max_seconds=60.0, clock=clock).num_calls == 4


def test_a_warm_up_is_not_over_at_once_where_calls_are_quick() -> None:
    clock = TurnedClock(iter([0.001] * 1000))
    assert warm_up(clock.call, max_seconds=60.0, clock=clock).num_calls >= 200


def test_each_call_is_timed_until_the_time_is_up() -> None:
    clock = TurnedClock(iter([0.3, 0.4, 0.5, 0.6]))
    assert measure(clock.call, seconds=1.0, clock=clock).wall == pytest.approx([0.3, 0.4, 0.5])


def test_a_call_longer_than_the_round_is_timed_once() -> None:
    clock = TurnedClock(iter([7.0, 7.0]))
    assert measure(clock.call, seconds=0.5, clock=clock).wall == [7.0]


class FakeCuda:
    """`torch.cuda` with a device that goes on working after a call has returned."""

    def __init__(self, clock: TurnedClock) -> None:
        self.clock = clock
        self.busy_until = 0.0

    def launch(self, seconds: float) -> None:
        self.busy_until = self.clock.now + seconds

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.busy_until)

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802 - torch's name
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.at: float | None = None

    def record(self) -> None:
        self.at = self._cuda.clock.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return (other.at - self.at) * 1e3


def test_work_that_goes_on_after_the_call_returned_is_counted() -> None:
    clock = TurnedClock(iter([0.001] * 10))
    cuda = FakeCuda(clock)

    def call() -> None:
        clock.call()
        cuda.launch(0.25)

    timings = measure(call, seconds=0.5, device_timer=CudaEventTimer(cuda), clock=clock)
    assert timings.wall == pytest.approx([0.251, 0.251])
    assert timings.device == pytest.approx([0.251, 0.251])


def test_what_the_device_did_before_is_not_counted() -> None:
    clock = TurnedClock(iter([0.001] * 10))
    cuda = FakeCuda(clock)
    cuda.launch(3.0)
    timings = measure(clock.call, seconds=0.0, device_timer=CudaEventTimer(cuda), clock=clock)
    assert timings.device == pytest.approx([0.001])


class WrongForLargeBatches(FakeRuntime):
    """Correct for one clip; for more, each row gets a little of the next one's."""

    def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
        output = super()._run(graph, array)
        if graph != "temporal" or len(array) == 1:
            return output
        mixed = output + 0.2 * np.roll(output, 1, axis=0)
        return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose golden data comes from the fake runtime."""
    opened = write_fake_bundle(tmp_path / "bundle")
    manifest = opened.manifest
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    tokens = rng.integers(1, 400, (2 * 5, 8), dtype=np.int32)
    labels = [f"label {i}" for i in range(5)]
    golden = Golden.from_reference(
        FakeRuntime(manifest), frames, tokens, labels, origin="random numbers"
    )
    golden.save(opened.path)
    (opened.path / "manifest.json").unlink()
    files = hash_files(opened.path)
    write_manifest(opened.path, manifest.model_copy(update={"files": files}))
    return Bundle.open(opened.path)


def _spec(bundle: Bundle, runtime: str = "onnxruntime") -> RowSpec:
    return RowSpec("ours", runtime, bundle.path, None, None, "cpu", 1, num_frames=4)


def _worker(bundle: Bundle, runtime: type[FakeRuntime] = FakeRuntime) -> CandidateWorker:
    return CandidateWorker(_spec(bundle), runtime(bundle.manifest))


def test_calls_have_the_batch_and_the_frames_that_were_asked_for(bundle: Bundle) -> None:
    runtime = FakeRuntime(bundle.manifest)
    worker = CandidateWorker(_spec(bundle), runtime)
    runtime.calls.clear()
    timings = worker.measure(6, seconds=0.0)
    assert runtime.calls == [("visual", (24, 32, 32, 3)), ("temporal", (6, 4, 16))]
    assert len(timings["wall"]) == 1
    assert timings["device"] == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_a_runtime_that_computes_the_same_passes_at_every_batch_size(
    bundle: Bundle, batch_size: int
) -> None:
    parity = _worker(bundle).parity(batch_size)
    assert parity["passed"]
    assert parity["max_abs_difference"] < 1e-6
    assert parity["top1_agreement"] == parity["top5_agreement"] == 1.0


def test_a_runtime_that_is_wrong_for_larger_batches_is_found_there(bundle: Bundle) -> None:
    worker = _worker(bundle, WrongForLargeBatches)
    assert worker.parity(1)["passed"]
    parity = worker.parity(2)
    assert not parity["passed"]
    assert "embeddings: max abs difference" in parity["problem"]


def test_stages_are_timed_from_frames_and_from_a_file(bundle: Bundle, rendered_video: Path) -> None:
    worker = _worker(bundle)
    assert list(worker.stages()["stages_ms"]) == ["visual", "temporal", "score"]
    timed = worker.video(str(rendered_video), MAX_PIXELS)["stages_ms"]
    assert list(timed) == ["demux", "decode", "resize", "visual", "temporal", "score"]
    assert all(ms > 0 for ms in timed.values())


def test_a_directory_is_scored_and_its_failures_counted(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    done = _worker(bundle).directory([str(rendered_video), str(broken)], MAX_PIXELS)
    assert done["seconds"] > 0
    assert done["num_failed"] == 1


def test_frames_of_more_pixels_than_are_allowed_fail(bundle: Bundle, rendered_video: Path) -> None:
    worker = _worker(bundle)
    with pytest.raises(FrameSizeError):
        worker.video(str(rendered_video), 100)
    assert worker.directory([str(rendered_video)], 100)["num_failed"] == 1


def test_the_peak_of_memory_is_this_process_s_own(bundle: Bundle) -> None:
    worker = _worker(bundle)
    before = worker.memory()["peak_resident_bytes"]
    large = np.ones(32 * 2**20)  # 256 MiB
    after = worker.memory()["peak_resident_bytes"]
    assert after >= max(before, large.nbytes)


def test_requests_and_answers_are_lines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowSpec, "open", lambda _: FakeRuntime(bundle.manifest))
    requests = [
        {"do": "open", **_spec(bundle).to_dict()},
        {"do": "measure", "batch_size": 2, "seconds": 0},
        {"do": "video", "path": "missing.mp4", "max_pixels": 1},
        {"do": "memory"},
    ]
    answers = io.StringIO()
    serve([json.dumps(request) for request in requests], answers)
    start, timings, video, memory = map(json.loads, answers.getvalue().splitlines())
    assert start["info"]["name"] == "fake"
    assert start["import_seconds"] > 0
    assert len(timings["wall"]) == 1
    assert "There is no file missing.mp4" in video["error"]
    assert memory["peak_resident_bytes"] > 0


def test_a_row_in_a_process_says_why_it_cannot_be_opened(bundle: Bundle) -> None:
    spec = _spec(bundle, "torch")
    row = RowProcess(spec)
    try:
        with pytest.raises(BenchmarkError, match=r"torch runs the checkpoint.*--checkpoint"):
            row.ask("open", **spec.to_dict())
        with pytest.raises(BenchmarkError, match="process of the row ours ended with code 1"):
            row.ask("measure", batch_size=1, seconds=0)  # nothing was opened
    finally:
        row.close()


def test_a_process_that_is_killed_is_said_to_be(bundle: Bundle) -> None:
    row = RowProcess(_spec(bundle))
    row._process.kill()
    try:
        with pytest.raises(BenchmarkError, match="ended with signal 9, as where memory runs out"):
            row.ask("memory")
    finally:
        row.close()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_row_of_engines_opens_those_that_were_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened: list[tuple[Path, tuple[Any, ...], dict[str, Any]]] = []

    def open_runtime(given: Bundle, *arguments: Any, **options: Any) -> FakeRuntime:
        opened.append((given.path, arguments, options))
        return FakeRuntime(given.manifest)

    monkeypatch.setattr(candidates, "open_runtime", open_runtime)
    spec = _spec(bundle, name).prepare(tmp_path / "row")
    assert spec.cache is None
    spec.open()
    assert opened == [(bundle.path, (name,), {})]


def test_a_row_has_the_cores_for_itself(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []

    def open_runtime(given: Bundle, *_: Any, is_alone: bool, **__: Any) -> FakeRuntime:
        opened.append(is_alone)
        return FakeRuntime(given.manifest)

    monkeypatch.setattr(candidates, "open_runtime", open_runtime)
    _spec(bundle, "onnxruntime").open()
    assert opened == [True]


class Bf16(FakeRuntime):
    """An engine that was repaired into another precision than its bundle's."""

    def describe(self) -> RuntimeInfo:
        return RuntimeInfo("tensorrt", "gpu", "bf16", num_threads=None)

    def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
        output = super()._run(graph, array)
        if graph != "temporal":
            return output
        # A cosine of about 0.99997: fine for fp16, too far for fp32.
        turned = output + 8e-3 * np.roll(output, 1, axis=1)
        return (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("precision", "passed"), [("fp16", True), ("fp32", False)])
def test_an_engine_is_held_to_what_its_bundle_has_to_keep(
    bundle: Bundle, precision: str, passed: bool
) -> None:
    manifest = bundle.manifest
    graphs = {
        name: graph.model_copy(update={"precision": precision})
        for name, graph in manifest.graphs.items()
    }
    spec = _spec(bundle, "tensorrt")
    worker = CandidateWorker(spec, Bf16(manifest.model_copy(update={"graphs": graphs})))
    assert worker.parity(2)["passed"] is passed


def test_the_row_says_whether_it_runs_on_a_device(bundle: Bundle) -> None:
    class OnDevice(FakeRuntime):
        has_device = True

    assert _worker(bundle).start()["has_device"] is False
    assert _worker(bundle, OnDevice).start()["has_device"] is True
