"""One engine over the fake TensorRT: shapes, batches, recordings, threads and failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cudart import FakeCudart

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError, InferenceError
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.engine import MAX_RECORDED, Engine
from actionclip_deploy.runtimes.trt.plan import (
    BuildOptions,
    ShapeRange,
    build_plan,
    parse_profiles,
    shape_ranges,
)

OpenEngine = Callable[..., Engine]


@pytest.fixture
def shapes(bundle: Bundle) -> tuple[ShapeRange, ...]:
    """Of the temporal graph: clips 1 to 4, and 2 to 16."""
    return shape_ranges(bundle.manifest, "temporal", parse_profiles(["1,1,4", "2,8,16"]), 8)


@pytest.fixture
def plan(tensorrt: Any, bundle: Bundle, shapes: tuple[ShapeRange, ...]) -> bytes:
    api = Api("tensorrt", tensorrt, tensorrt.__version__)
    path = bundle.graph_path("temporal")
    return build_plan(api, path, {"frame_features": shapes}, BuildOptions())


@pytest.fixture
def open_engine(
    tensorrt: Any, bundle: Bundle, plan: bytes, shapes: tuple[ShapeRange, ...]
) -> Iterator[OpenEngine]:
    """Opens the engine of the temporal graph and closes it after the test."""
    opened = []

    def make(*, rtx: bool = False, **options: Any) -> Engine:
        api = Api("tensorrt-rtx" if rtx else "tensorrt", tensorrt, tensorrt.__version__)
        spec = bundle.manifest.graphs["temporal"]
        given = {"plan": plan, "shapes": shapes, "spec": spec, **options}
        opened.append(Engine(api, Cuda(tensorrt.state.cudart), **given))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def features(clips: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clips, 8, 64)).astype(np.float32)


@pytest.fixture
def wanted(bundle: Bundle) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    with open_runtime(bundle, cache=False) as runtime:
        yield runtime.encode_clips


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("clips", [1, 2, 4, 5, 16, 17, 40])
def test_any_number_of_rows_gives_what_the_graph_gives(
    clips: int, record: bool, open_engine: OpenEngine, wanted: Any
) -> None:
    engine = open_engine(record=record)
    for seed in (0, 1):  # the second time, what was recorded is replayed
        given = features(clips, seed)
        np.testing.assert_allclose(engine.run(given), wanted(given), atol=1e-6)


def test_no_rows_give_no_rows(open_engine: OpenEngine) -> None:
    assert open_engine().run(features(0)).shape == (0, 64)


def test_results_are_the_callers_own(open_engine: OpenEngine) -> None:
    engine = open_engine(record=True)
    first = engine.run(features(2))
    kept = first.copy()
    engine.run(features(2, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_recordings_are_few_and_the_oldest_is_dropped(
    tensorrt: Any, open_engine: OpenEngine, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actionclip_deploy.runtimes.trt import engine as lanes

    assert MAX_RECORDED >= 5  # the sizes of a batch that a profile of 16 is filled up to
    monkeypatch.setattr(lanes, "MAX_RECORDED", 2)
    engine = open_engine(record=True)
    for clips in (1, 2, 4, 1, 2, 4):
        given = features(clips)
        np.testing.assert_allclose(engine.run(given), wanted(given), atol=1e-6)
        assert len(tensorrt.state.cudart.graphs) <= 2


def test_threads_get_their_own_results(open_engine: OpenEngine, wanted: Any) -> None:
    engine = open_engine(record=True)
    inputs = {seed: features(seed % 5 + 1, seed) for seed in range(16)}
    results: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        results[seed] = engine.run(inputs[seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, given in inputs.items():
        np.testing.assert_allclose(results[seed], wanted(given), atol=1e-6)


def test_a_closed_engine_says_so_and_can_be_closed_again(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.run(features(1))
    engine.close()
    engine.close()
    with pytest.raises(InferenceError, match=r"closed; open the runtime again"):
        engine.run(features(1))


@pytest.mark.parametrize(("frames", "side"), [(9, "at most"), (7, "at least")])
def test_another_number_of_frames_names_the_option(
    frames: int, side: str, open_engine: OpenEngine
) -> None:
    given = np.zeros((1, frames, 64), np.float32)
    with pytest.raises(InferenceError, match=rf"takes {side} \(8, 64\).*--num-frames"):
        open_engine().run(given)


def test_an_engine_with_other_profiles_than_the_record_says_is_refused(
    open_engine: OpenEngine, shapes: tuple[ShapeRange, ...]
) -> None:
    with pytest.raises(EngineError, match=r"it is of another graph: build it again"):
        open_engine(shapes=shapes[::-1])


def test_an_engine_of_another_graph_is_refused(bundle: Bundle, open_engine: OpenEngine) -> None:
    with pytest.raises(EngineError, match=r"expected .*'frames'.*it is of another graph"):
        open_engine(spec=bundle.manifest.graphs["visual"])


@pytest.mark.parametrize("plan", [b"", b"{}\n", b"not a plan"])
def test_a_plan_that_cannot_be_loaded_is_told_with_tensorrts_reason(
    plan: bytes, open_engine: OpenEngine
) -> None:
    with pytest.raises(EngineError, match=r"cannot load the engine \(.*Serialization.*build it ag"):
        open_engine(plan=plan)


def test_no_memory_on_the_gpu_is_told_and_leaves_nothing(
    tensorrt: Any, open_engine: OpenEngine
) -> None:
    tensorrt.state.cudart.max_bytes = 1000
    with pytest.raises(InferenceError, match="cudaErrorMemoryAllocation; give smaller batches"):
        open_engine().run(features(1))
    assert not tensorrt.state.cudart.memory


def test_no_context_is_told(
    tensorrt: Any, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt.ICudaEngine, "create_execution_context", lambda *_: None)
    with pytest.raises(InferenceError, match=r"no execution context .*smaller --profile"):
        open_engine().run(features(1))


def test_an_execution_that_fails_is_told(
    tensorrt: Any, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(InferenceError, match=r"failed on an input of shape \(1, 8, 64\)"):
        open_engine().run(features(1))


def test_a_recording_that_fails_ends_it(
    tensorrt: Any, open_engine: OpenEngine, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(record=True)
    executions = []
    execute = tensorrt.IExecutionContext.execute_async_v3

    def second_fails(context: Any, stream: int) -> Any:
        executions.append(stream)
        return len(executions) != 2 and execute(context, stream)

    monkeypatch.setattr(tensorrt.IExecutionContext, "execute_async_v3", second_fails)
    with pytest.raises(InferenceError):
        engine.run(features(1))
    assert tensorrt.state.cudart.recording is None
    np.testing.assert_allclose(engine.run(features(1)), wanted(features(1)), atol=1e-6)


def test_compiled_kernels_are_kept_from_one_start_to_the_next(
    open_engine: OpenEngine, tmp_path: Path, wanted: Any
) -> None:
    path = tmp_path / "temporal.runtime-cache"
    engine = open_engine(rtx=True, runtime_cache=path)
    np.testing.assert_allclose(engine.run(features(3)), wanted(features(3)), atol=1e-6)
    engine.close()
    assert path.read_bytes() == b"compiled kernels"
    changed = path.stat().st_mtime_ns
    open_engine(rtx=True, runtime_cache=path).close()
    assert path.stat().st_mtime_ns == changed


def test_kernels_of_another_gpu_are_made_anew(
    tensorrt: Any,
    open_engine: OpenEngine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "temporal.runtime-cache"
    path.write_bytes(b"of another GPU")
    monkeypatch.setattr(tensorrt.IRuntimeCache, "deserialize", lambda *_: False)
    open_engine(rtx=True, runtime_cache=path).close()
    assert "is of another GPU or version and is made anew" in caplog.text
    assert path.read_bytes() == b"compiled kernels"


def test_a_device_with_little_memory_is_described() -> None:
    device = Cuda(FakeCudart(name="Orin Nano", max_bytes=7 * 2**30)).device
    assert (device.name, device.total_bytes, device.integrated) == ("Orin Nano", 7 * 2**30, True)
