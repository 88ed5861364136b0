from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_graphs
from fake_cuda import (
    FakeApi,
    FakeDriver,
    FakeOrtValue,
    FakeRunOptions,
    FakeSession,
    ReleasingSession,
)
from fakes import fake_manifest
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.errors import InferenceError
from actionclip_deploy.runtimes import open_runtime, ort, ort_cuda
from actionclip_deploy.runtimes import ort_cuda as pinned_memory
from actionclip_deploy.runtimes.call_sizes import RECORDED_SIZES
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.ort_cuda import DeviceSession, DeviceThread

SPEC = fake_manifest().graphs["temporal"]  # (B, T, 16) -> (B, 16)

# float32 sums of a few thousand pixels against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def mean(features: np.ndarray) -> np.ndarray:
    return features.mean(axis=1)


def features(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(pinned_memory, "_load_driver", lambda: fake)
    return fake


@pytest.fixture
def thread() -> Iterator[DeviceThread]:
    opened = DeviceThread()
    yield opened
    opened.close()


def open_device(session: Any, thread: DeviceThread, *, capture: bool = True) -> DeviceSession:
    return DeviceSession(session, SPEC, thread, FakeApi, capture=capture)


@pytest.mark.parametrize("capture", [True, False])
def test_each_input_gives_its_own_result(thread: DeviceThread, capture: bool) -> None:
    device = open_device(FakeSession(mean, records=capture), thread, capture=capture)
    for seed in range(4):
        given = features(3, 5, seed=seed)
        np.testing.assert_array_equal(device.run(given), mean(given))


def test_a_recording_would_give_the_first_result_for_an_input_elsewhere() -> None:
    # What the test above would miss if the fake were kinder than the real one.
    session = FakeSession(mean)
    options = FakeRunOptions()
    options.add_run_config_entry("gpu_graph_id", "1")
    results = []
    for seed in range(2):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", FakeOrtValue(features(1, 2, seed=seed)))
        binding.bind_ortvalue_output("y", FakeOrtValue(np.zeros((1, 16), np.float32)))
        session.run_with_iobinding(binding, options)
        results.append(session.recorded["1"][1].numpy())
    np.testing.assert_array_equal(*results)


def test_a_copy_that_is_under_way_is_waited_for(thread: DeviceThread) -> None:
    waited: list[Any] = []

    class Binding(type(FakeSession(mean).io_binding())):  # type: ignore[misc]
        def synchronize_inputs(self) -> None:
            assert self.given.pending is not None
            waited.append(self)
            super().synchronize_inputs()

    class Session(FakeSession):
        def io_binding(self) -> Any:
            return Binding()

    device = open_device(Session(mean), thread)
    for seed in range(2):
        given = features(2, 3, seed=seed)
        np.testing.assert_array_equal(device.run(given), mean(given))
    assert len(waited) == 2


def test_each_shape_has_a_number_of_its_own(thread: DeviceThread) -> None:
    session = FakeSession(mean)
    device = open_device(session, thread)
    for num_clips, num_frames in ((2, 3), (4, 3), (2, 5), (2, 3), (4, 3)):
        given = features(num_clips, num_frames)
        np.testing.assert_array_equal(device.run(given), mean(given))
    numbers: dict[str, set[tuple[int, ...]]] = {}
    for number, shape, _ in session.runs:
        numbers.setdefault(number, set()).add(shape)
    assert len(numbers) == 3
    assert all(len(shapes) == 1 for shapes in numbers.values())
    assert "0" not in numbers


@pytest.mark.parametrize("rows", [1, 5, 7, 13, 33, 255, 256])
def test_a_batch_is_filled_up_and_the_filling_dropped(thread: DeviceThread, rows: int) -> None:
    session = FakeSession(mean)
    device = open_device(session, thread)
    given = features(rows, 2)
    np.testing.assert_array_equal(device.run(given), mean(given))
    ((_, shape, _),) = session.runs
    assert shape[0] == min(size for size in RECORDED_SIZES if size >= rows)
    assert shape[0] - rows <= shape[0] / 3


def test_a_batch_beyond_the_largest_size_is_cut(thread: DeviceThread) -> None:
    session = FakeSession(mean)
    device = open_device(session, thread)
    given = features(2 * 256 + 3, 2)
    np.testing.assert_array_equal(device.run(given), mean(given))
    assert [shape[0] for _, shape, _ in session.runs] == [256, 256, 3]


def test_without_graphs_a_batch_is_run_as_it_is(thread: DeviceThread) -> None:
    session = FakeSession(mean, records=False)
    given = features(5, 2)
    open_device(session, thread, capture=False).run(given)
    assert [run[:2] for run in session.runs] == [("-1", (5, 2, 16))]


def test_buffers_are_made_once_per_shape(thread: DeviceThread, driver: FakeDriver) -> None:
    device = open_device(FakeSession(mean), thread)
    device.run(features(3, 5))
    made, locked = FakeOrtValue.num_made, dict(driver.locked)
    for seed in range(5):
        device.run(features(3, 5, seed=seed))
    assert FakeOrtValue.num_made == made
    assert driver.locked == locked
    assert list(locked.values()) == [3 * 5 * 16 * 4]


def test_the_shapes_used_longest_ago_are_let_go(
    thread: DeviceThread, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cuda, "MAX_SHAPES", 2)
    session = ReleasingSession(mean)
    device = open_device(session, thread)
    for num_frames in (1, 2, 1, 3, 1, 2):
        given = features(2, num_frames, seed=num_frames)
        np.testing.assert_array_equal(device.run(given), mean(given))
    assert session.released == [2, 3]
    assert [number for number, _, _ in session.runs] == ["1", "2", "1", "3", "1", "4"]
    assert len(driver.locked) == 2


def test_a_version_that_cannot_forget_records_so_many_and_no_more(
    thread: DeviceThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort_cuda, "MAX_SHAPES", 2)
    monkeypatch.setattr(ort_cuda, "MAX_GRAPHS", 3)
    session = FakeSession(mean)
    device = open_device(session, thread)
    for num_frames in (1, 2, 3, 4, 4, 1):
        given = features(2, num_frames, seed=num_frames)
        np.testing.assert_array_equal(device.run(given), mean(given))
    assert [number for number, _, _ in session.runs] == ["1", "2", "3", "-1", "-1", "-1"]
    assert "3 CUDA graphs were recorded, which is the limit; shape (2, 4, 16) runs" in caplog.text


def test_threads_share_the_one_that_recorded(thread: DeviceThread) -> None:
    session = FakeSession(mean, seconds=0.001)
    device = open_device(session, thread)

    def run(seed: int) -> None:
        given = features(2, 3, seed=seed)
        for _ in range(5):
            np.testing.assert_array_equal(device.run(given), mean(given))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len({thread for _, _, thread in session.runs}) == 1
    assert session.runs[0][2] != threading.get_ident()


def test_two_runtimes_do_not_disturb_each_other() -> None:
    threads = [DeviceThread(), DeviceThread()]
    devices = [open_device(FakeSession(mean, seconds=0.002), thread) for thread in threads]

    def run(device: DeviceSession) -> None:
        for seed in range(10):
            given = features(2, 3, seed=seed)
            np.testing.assert_array_equal(device.run(given), mean(given))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, devices))
    for thread in threads:
        thread.close()


def test_closing_frees_graphs_and_memory(thread: DeviceThread, driver: FakeDriver) -> None:
    session = ReleasingSession(mean)
    device = open_device(session, thread)
    device.run(features(2, 3))
    device.run(features(1, 3))
    device.close()
    assert session.recorded == {}
    assert driver.locked == {}


def test_results_stay_when_the_next_run_overwrites_the_buffer(thread: DeviceThread) -> None:
    device = open_device(FakeSession(mean), thread)
    first = device.run(features(2, 3))
    before = first.copy()
    device.run(features(2, 3, seed=9))
    np.testing.assert_array_equal(first, before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A GPU build of ONNX Runtime; gives the options of the sessions that are opened."""
    opened: list[dict[str, str]] = []
    computes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "visual": tiny_graphs.visual,
        "temporal": tiny_graphs.temporal,
        "textual": tiny_graphs.textual,
    }

    def open_session(model: Any, *_: Any, providers: Any, **__: Any) -> Any:
        ((_, options),) = providers
        opened.append(options)
        name = "visual" if isinstance(model, bytes) else Path(model).stem
        session: Any = ReleasingSession(computes[name], records="enable_cuda_graph" in options)
        session.disable_fallback = lambda: None
        session.run = lambda *_: None
        session.get_inputs = lambda: [_node(name, "input")]
        session.get_outputs = lambda: [_node(name, "output")]
        return session

    monkeypatch.setattr(
        ort.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", ort.CPU]
    )
    monkeypatch.setattr(ort.ort, "InferenceSession", open_session)
    monkeypatch.setattr(ort.ort, "OrtValue", FakeOrtValue)
    monkeypatch.setattr(ort.ort, "RunOptions", FakeRunOptions)
    return opened


def _node(graph: str, which: str) -> Any:
    spec = getattr(fake_manifest().graphs[graph], which)  # type: ignore[index]
    types = {"uint8": "tensor(uint8)", "int32": "tensor(int32)", "float32": "tensor(float)"}

    class Node:
        name, type, shape = spec.name, types[spec.dtype], list(spec.shape)

    return Node()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_bundle_runs_on_cuda(
    cuda: list[dict[str, str]], cuda_graphs: bool, tmp_path: Path
) -> None:
    bundle = write_tiny_bundle(tmp_path)
    with open_runtime(bundle, execution_provider="cuda", cuda_graphs=cuda_graphs) as runtime:
        assert runtime.has_device
        for seed in range(3):
            frames = np.random.default_rng(seed).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
            np.testing.assert_allclose(
                runtime.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE
            )
            clips = features(2, 4, seed=seed)
            np.testing.assert_allclose(
                runtime.encode_clips(clips), tiny_graphs.temporal(clips), **CLOSE
            )
        tokens = np.ones((2, 7), np.int32)
        np.testing.assert_allclose(
            runtime.encode_text(tokens), tiny_graphs.textual(tokens), **CLOSE
        )
    plain, recording = {"use_tf32": "0"}, {"use_tf32": "0", "enable_cuda_graph": "1"}
    # The first session is the trial of the execution provider.
    assert cuda == [plain, *[recording if cuda_graphs else plain] * 3]


def test_a_copy_to_the_gpu_can_be_timed(cuda: list[dict[str, str]], tmp_path: Path) -> None:
    with OrtRuntime(write_tiny_bundle(tmp_path), execution_provider="cuda") as runtime:
        before = FakeOrtValue.num_made
        runtime.copy_to_device(np.zeros((2, 3), np.uint8)[:, ::-1])
        assert FakeOrtValue.num_made == before + 1
    with OrtRuntime(write_tiny_bundle(tmp_path / "cpu")) as runtime:
        assert not runtime.has_device
        runtime.copy_to_device(np.zeros(3))


def test_a_failure_on_cuda_is_told(
    cuda: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OrtRuntime(write_tiny_bundle(tmp_path), execution_provider="cuda") as runtime:
        runtime.encode_clips(features(2, 4))

        def fail(*_: Any) -> None:
            raise ort.ort_native.Fail("CUDA out of memory")

        monkeypatch.setattr(FakeSession, "run_with_iobinding", fail)
        with pytest.raises(
            InferenceError, match=r"temporal graph failed on CUDAExecutionProvider .*out of memory"
        ):
            runtime.encode_clips(features(2, 4))


def test_a_runtime_on_cuda_that_was_closed_says_so(
    cuda: list[dict[str, str]], tmp_path: Path
) -> None:
    runtime = OrtRuntime(write_tiny_bundle(tmp_path), execution_provider="cuda")
    runtime.encode_clips(features(2, 4))
    runtime.close()
    with pytest.raises(InferenceError, match=r"was closed before its temporal graph was run"):
        runtime.encode_clips(features(2, 4))
    runtime.close()


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_cuda_graphs_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = Path("a.pt") if name == "torch" else None
    with pytest.raises(ValueError, match=r"cuda_graphs is True and .*; only "):
        open_runtime(write_tiny_bundle(tmp_path), name, checkpoint=checkpoint, cuda_graphs=True)


def test_the_real_onnxruntime_takes_the_same_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU, where nothing is recorded, with its own buffers, bindings and run options.
    monkeypatch.setattr(ort_cuda, "_DEVICE", "cpu")
    bundle = write_tiny_bundle(tmp_path)
    session = onnxruntime.InferenceSession(
        str(bundle.graph_path("temporal")), providers=["CPUExecutionProvider"]
    )
    thread = DeviceThread()
    for capture in (True, False):
        device = DeviceSession(
            session, bundle.manifest.graphs["temporal"], thread, onnxruntime, capture=capture
        )
        for rows in (1, 5, 5, 300):
            given = features(rows, 4, seed=rows)
            np.testing.assert_allclose(device.run(given), tiny_graphs.temporal(given), **CLOSE)
        device.close()
    thread.copy(np.zeros(3, np.uint8), onnxruntime)
    thread.close()
