from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_graphs
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import InferenceError, RuntimeUnavailableError
from actionclip_deploy.runtimes import ort, ort_tensorrt
from actionclip_deploy.runtimes.graph_cache import GraphCache
from actionclip_deploy.runtimes.machine import Gpu, Gpus, TensorRT
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.ort_tensorrt import OrtEngines, engine_shapes, explain_tensorrt

PROVIDER = "TensorrtExecutionProvider"
V11 = TensorRT("11.4.0.106", None, {"libnvinfer.so.11": "11.4.0"})


class FakeSession:
    """A session on TensorRT that computes the tiny visual graph, and notes what it was given."""

    opened: ClassVar[list[FakeSession]]
    placement: tuple[tuple[str, tuple[str, ...]], ...] = ((PROVIDER, ("MatMul", "Cast")),)

    def __init__(self, model: str | bytes, _: Any, *, providers: Any, enable_fallback: int) -> None:
        self.model = model
        ((self.provider, self.options),) = providers
        self.fallback = bool(enable_fallback)
        self.batches: list[int] = []
        self.opened.append(self)

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops]
            )
            for name, ops in self.placement
        ]

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="frames", type="tensor(uint8)", shape=["N", 32, 32, 3])]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="frame_features", type="tensor(float)", shape=["N", 16])]

    def run(self, _: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (array,) = inputs.values()
        self.batches.append(len(array))
        return [tiny_graphs.visual(array).astype(np.float32) if array.ndim == 4 else array]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[FakeSession]:
    """The sessions that are opened by a build of ONNX Runtime with TensorRT."""

    class Session(FakeSession):
        opened: ClassVar[list[FakeSession]] = []

    monkeypatch.setattr(ort.ort, "get_available_providers", lambda: [PROVIDER, ort.CPU])
    monkeypatch.setattr(ort.ort, "InferenceSession", Session)
    orin = Gpus((Gpu("Orin", "8.7", 8 * 2**30),), "12.6")
    monkeypatch.setattr(ort_tensorrt, "find_gpus", lambda: orin)
    monkeypatch.setattr(ort_tensorrt, "_loaded_tensorrt", lambda: "10.16.1")
    return Session.opened


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache(tmp_path / "cache" / "graphs")


def open_tensorrt(bundle: Bundle, **options: Any) -> OrtRuntime:
    return OrtRuntime(bundle, execution_provider="tensorrt", **options)


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def folder_of(bundle: Bundle, cache: GraphCache, graph: str = "visual") -> Path:
    options = OrtEngines(bundle, cache, "1.31.1").options(graph)  # type: ignore[arg-type]
    return Path(options["trt_engine_cache_path"])


def test_a_session_gets_shapes_and_a_cache_and_no_precision(
    bundle: Bundle, cache: GraphCache, sessions: list[FakeSession]
) -> None:
    with open_tensorrt(bundle, cache=cache) as runtime:
        runtime.encode_frames(frames(2))
    session = sessions[-1]
    assert session.model == str(bundle.graph_path("visual"))
    assert not session.fallback
    num_frames = bundle.manifest.model.num_frames
    folder = session.options["trt_engine_cache_path"]
    assert session.options == {
        "trt_layer_norm_fp32_fallback": "0",
        "trt_profile_min_shapes": "frames:1x32x32x3",
        "trt_profile_opt_shapes": f"frames:{8 * num_frames}x32x32x3",
        "trt_profile_max_shapes": f"frames:{8 * num_frames}x32x32x3",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    assert Path(folder).is_dir()
    assert Path(folder).parent == cache.folder.parent / "onnxruntime-tensorrt"
    assert Path(folder).parent.stat().st_mode & 0o077 == 0


def test_two_fine_tunes_never_share_an_engine(
    tmp_path: Path, cache: GraphCache, sessions: list[FakeSession]
) -> None:
    # The provider names its engine after the graph's file and tensors, which are the same here.
    def other_weights(name: str, model: Any) -> Any:
        if name == "visual":
            weights = next(t for t in model.graph.initializer if t.name == "weights")
            weights.raw_data = bytes(reversed(weights.raw_data))
        return model

    one = write_tiny_bundle(tmp_path / "one")
    two = write_tiny_bundle(tmp_path / "two", change=other_weights)
    again = write_tiny_bundle(tmp_path / "again")
    assert folder_of(one, cache) != folder_of(two, cache)
    assert folder_of(one, cache) == folder_of(again, cache)
    assert folder_of(one, cache, "textual") == folder_of(two, cache, "textual")
    assert folder_of(one, cache, "textual") != folder_of(one, cache)


@pytest.mark.parametrize("what", ["tensorrt", "gpu", "onnxruntime"])
def test_an_engine_of_another_version_or_gpu_is_not_found(
    bundle: Bundle,
    cache: GraphCache,
    sessions: list[FakeSession],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = folder_of(bundle, cache)
    if what == "tensorrt":
        monkeypatch.setattr(ort_tensorrt, "_loaded_tensorrt", lambda: "10.16.2")
    elif what == "gpu":
        thor = Gpus((Gpu("Thor", "11.0", 2**37),), "13.0")
        monkeypatch.setattr(ort_tensorrt, "find_gpus", lambda: thor)
    version = "1.32.0" if what == "onnxruntime" else "1.31.1"
    after = OrtEngines(bundle, cache, version).options("visual")["trt_engine_cache_path"]
    assert Path(after) != before


def test_an_altered_graph_lays_no_engine_where_another_belongs(
    bundle: Bundle, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    path = bundle.graph_path("visual")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with caplog.at_level(logging.WARNING):
        options = OrtEngines(bundle, cache, "1.31.1").options("visual")
    assert "trt_engine_cache_path" not in options
    assert "does not have the sha256 of the manifest" in caplog.text


def test_a_folder_that_others_may_write_to_is_not_used(
    bundle: Bundle, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache.folder.parent / "onnxruntime-tensorrt"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "trt_engine_cache_path" not in OrtEngines(bundle, cache, "1.31.1").options("visual")
    assert "other users may write to it" in caplog.text


def test_without_a_cache_nothing_is_kept(bundle: Bundle, sessions: list[FakeSession]) -> None:
    with open_tensorrt(bundle) as runtime:
        runtime.encode_frames(frames(1))
    assert not [name for name in sessions[-1].options if "cache" in name]


def test_larger_batches_are_cut_and_the_engine_is_not_built_anew(
    bundle: Bundle, sessions: list[FakeSession]
) -> None:
    most = 8 * bundle.manifest.model.num_frames
    given = frames(2 * most + 3)
    with open_tensorrt(bundle) as runtime:
        features = runtime.encode_frames(given)
    assert sessions[-1].batches == [most, most, 3]
    np.testing.assert_allclose(features, tiny_graphs.visual(given), rtol=1e-5, atol=1e-6)


def test_clips_of_another_length_are_refused_before_they_build_an_engine(
    bundle: Bundle, sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_frames = bundle.manifest.model.num_frames
    monkeypatch.setattr(ort, "check_tensor", lambda *_: None)
    with (
        open_tensorrt(bundle) as runtime,
        pytest.raises(
            InferenceError, match=rf"built for rows from \({num_frames}, 16\) .*; sample as many fr"
        ),
    ):
        runtime.encode_clips(np.zeros((1, num_frames + 1, 16), np.float32))
    assert sessions[-1].batches in ([], [1])


@pytest.mark.parametrize(
    ("visual_prompt", "graph", "expected"),
    [
        ("transf", "temporal", ((1, 4, 16), (8, 4, 16), (8, 4, 16))),
        ("transf", "textual", ((1, 2), (16, 16), (64, 77))),
        ("joint", "video", ((1, 4, 32, 32, 3), (8, 4, 32, 32, 3), (8, 4, 32, 32, 3))),
    ],
)
def test_every_graph_has_one_range_of_shapes(
    tmp_path: Path, visual_prompt: str, graph: Any, expected: tuple[tuple[int, ...], ...]
) -> None:
    bundle = write_tiny_bundle(tmp_path, visual_prompt=visual_prompt, num_frames=4)
    shapes = engine_shapes(bundle.manifest, graph)
    assert (shapes.min, shapes.opt, shapes.max) == expected


def test_cuda_graphs_are_refused_since_they_repeat_the_first_answer(
    bundle: Bundle, sessions: list[FakeSession]
) -> None:
    with pytest.raises(ValueError, match=r"execution_provider is 'tensorrt'; only cuda has them"):
        open_tensorrt(bundle, cuda_graphs=True)


def test_inputs_are_given_as_arrays_and_waited_for(
    bundle: Bundle, sessions: list[FakeSession]
) -> None:
    # Bound buffers that are filled while the provider reads gave wrong results: there are none.
    with open_tensorrt(bundle) as runtime:
        assert not runtime.has_device
        runtime.encode_frames(frames(1))
    assert sessions[-1].batches == [1]


def test_products_that_are_left_to_the_cpu_are_refused(
    bundle: Bundle, sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_tensorrt(bundle)
    placement = ((PROVIDER, ("Cast",)), ("CPUExecutionProvider", ("DequantizeLinear", "MatMul")))
    monkeypatch.setattr(FakeSession, "placement", placement)
    with pytest.raises(RuntimeUnavailableError, match="leaves DequantizeLinear, MatMul of the vis"):
        runtime.encode_frames(frames(1))


def test_tensorrt_11_alone_is_explained(
    bundle: Bundle, sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("EP_FAIL: see the log")

    monkeypatch.setattr(ort.ort, "InferenceSession", fail)
    monkeypatch.setattr(ort_tensorrt, "linked_by_onnxruntime", lambda: "libnvinfer.so.10")
    monkeypatch.setattr(ort_tensorrt, "find_tensorrt", lambda: V11)
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"not work on this machine: this onnxruntime is linked to libnvinfer\.so\.10, .*"
        r"TensorRT 11\.4\.0 is installed, which it cannot load; .*--runtime tensorrt",
    ):
        open_tensorrt(bundle)


def test_a_wheel_without_the_provider_is_explained(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "this onnxruntime has no TensorRT provider, as none of the wheels for aarch64 has"
    monkeypatch.setattr(ort_tensorrt, "linked_by_onnxruntime", lambda: None)
    monkeypatch.setattr(ort_tensorrt, "find_tensorrt", lambda: V11)
    monkeypatch.setattr(ort_tensorrt, "why_provider_lacks_tensorrt", lambda *_: reason)
    with pytest.raises(
        RuntimeUnavailableError, match=r"built without Tensorrt.*: this onnxruntime has no Tensor"
    ):
        open_tensorrt(bundle)


@pytest.mark.parametrize("number", [101601, None])
def test_the_version_is_that_of_the_library_that_is_loaded(
    monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def load(name: str) -> SimpleNamespace:
        assert name == "libnvinfer.so.10"
        if number is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(getInferLibVersion=lambda: number)

    monkeypatch.setattr(ort_tensorrt, "linked_by_onnxruntime", lambda: "libnvinfer.so.10")
    monkeypatch.setattr(ort_tensorrt.ctypes, "CDLL", load)
    assert ort_tensorrt._loaded_tensorrt() == ("10.16.1" if number else "unknown")


def test_other_providers_are_not_asked_about_tensorrt() -> None:
    assert explain_tensorrt("CUDAExecutionProvider") is None
