"""What every runtime does that executes the graphs of a bundle on the CPU by itself."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import tiny_graphs
from onnx import TensorProto
from tiny_graphs import VOCABULARY, WEIGHTS, write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, InferenceError, IntegrityError, ShapeError
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.ov import OpenVinoRuntime

# float32 sums of a few thousand pixels against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

Open: TypeAlias = Callable[..., OrtRuntime | OpenVinoRuntime]


@pytest.fixture(params=[OrtRuntime, OpenVinoRuntime], ids=["onnxruntime", "openvino"])
def opened(request: pytest.FixtureRequest) -> Open:
    """What opens a bundle in a runtime."""
    return request.param


def held(runtime: Any) -> dict[str, Any]:
    """The graphs that a runtime has opened."""
    return runtime._sessions if isinstance(runtime, OrtRuntime) else runtime._programs


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


def some_frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def some_features(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*shape, 16)).astype(np.float32)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_frames_are_encoded(bundle: Bundle, num_frames: int, opened: Open) -> None:
    frames = some_frames(num_frames)
    with opened(bundle) as runtime:
        features = runtime.encode_frames(frames)
    np.testing.assert_allclose(features, tiny_graphs.visual(frames), **CLOSE)
    assert features.dtype == np.float32
    assert features.flags.c_contiguous


@pytest.mark.parametrize(("num_clips", "num_frames"), [(1, 1), (3, 4), (2, 9)])
def test_clips_are_encoded(bundle: Bundle, num_clips: int, num_frames: int, opened: Open) -> None:
    features = some_features(num_clips, num_frames)
    with opened(bundle) as runtime:
        embeddings = runtime.encode_clips(features)
    np.testing.assert_allclose(embeddings, tiny_graphs.temporal(features), **CLOSE)


@pytest.mark.parametrize(("num_prompts", "length"), [(1, 1), (4, 7), (2, 77)])
def test_prompts_are_encoded(bundle: Bundle, num_prompts: int, length: int, opened: Open) -> None:
    tokens = np.random.default_rng(2).integers(1, 50, (num_prompts, length), dtype=np.int32)
    with opened(bundle) as runtime:
        embeddings = runtime.encode_text(tokens)
    np.testing.assert_allclose(embeddings, tiny_graphs.textual(tokens), **CLOSE)


def test_a_model_that_mixes_frames_is_run_as_one_graph(tmp_path: Path, opened: Open) -> None:
    clips = some_frames(2, 4)
    with opened(write_tiny_bundle(tmp_path, visual_prompt="joint")) as runtime:
        embeddings = runtime.encode_video(clips)
    means = clips.astype(np.float64).mean(axis=(1, 2, 3)) @ WEIGHTS.astype(np.float64)
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, **CLOSE)


def test_arrays_that_are_not_contiguous_are_taken(bundle: Bundle, opened: Open) -> None:
    frames = some_frames(6)[::-2, :, ::-1]
    with opened(bundle) as runtime:
        features = runtime.encode_frames(frames)
    np.testing.assert_allclose(features, tiny_graphs.visual(frames), **CLOSE)


def test_wrong_shapes_are_refused_before_the_graph_is_read(bundle: Bundle, opened: Open) -> None:
    with opened(bundle) as runtime:
        with pytest.raises(ShapeError, match=r"expected shape \(N, 32, 32, 3\) and dtype uint8"):
            runtime.encode_frames(some_frames(2).astype(np.float32))
        assert held(runtime) == {}


def test_weights_beside_the_graph_are_found(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())

    def change(name: str, model: Any) -> Any:
        if name == "visual":
            weights = next(t for t in model.graph.initializer if t.name == "weights")
            weights.ClearField("raw_data")
            weights.data_location = TensorProto.EXTERNAL
            weights.external_data.add(key="location", value="visual.onnx.data")
        return model

    frames = some_frames(2)
    with opened(write_tiny_bundle(tmp_path, change=change)) as runtime:
        np.testing.assert_allclose(
            runtime.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE
        )


def test_weights_from_outside_of_the_bundle_are_refused(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHTS.tobytes())

    def change(name: str, model: Any) -> Any:
        if name == "visual":
            weights = next(t for t in model.graph.initializer if t.name == "weights")
            weights.ClearField("raw_data")
            weights.data_location = TensorProto.EXTERNAL
            weights.external_data.add(key="location", value="../secret.bin")
        return model

    with (
        opened(write_tiny_bundle(tmp_path / "bundle", change=change)) as runtime,
        pytest.raises(IntegrityError, match=r"keeps weights in '\.\./secret\.bin', which is no"),
    ):
        runtime.encode_frames(some_frames(1))


def test_a_bundle_of_links_with_weights_in_a_file_of_their_own_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Open
) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())

    def change(name: str, model: Any) -> Any:
        if name == "visual":
            (weights,) = (t for t in model.graph.initializer if t.name == "weights")
            weights.ClearField("raw_data")
            weights.data_location = TensorProto.EXTERNAL
            weights.external_data.add(key="location", value="visual.onnx.data")
        return model

    bundle = write_tiny_bundle(tmp_path / "plain", change=change)
    # As a hub's cache has it: snapshots/REVISION/NAME links to blobs/HASH.
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in bundle.path.iterdir():
        (blobs / sha256_of_file(path)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256_of_file(path)}")
    frames = some_frames(2)
    with opened(Bundle.open(snapshot)) as runtime:
        np.testing.assert_allclose(
            runtime.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE
        )
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_graphs_are_read_when_they_are_used(bundle: Bundle, opened: Open) -> None:
    (bundle.path / "textual.onnx").write_bytes(b"broken")
    with opened(bundle) as runtime:
        runtime.encode_frames(some_frames(1))
        with pytest.raises(BundleError, match=r"textual\.onnx has 6 bytes instead of"):
            runtime.encode_text(np.ones((1, 3), np.int32))


def test_threads_are_the_cores_there_are(bundle: Bundle, opened: Open) -> None:
    assert opened(bundle).describe().num_threads == num_available_cores()


@pytest.mark.parametrize("num_threads", [0, -1])
def test_a_number_of_threads_below_1_is_refused(
    bundle: Bundle, num_threads: int, opened: Open
) -> None:
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}; it must be 1 or more"):
        opened(bundle, num_threads=num_threads)


@pytest.mark.parametrize("what", ["name", "dtype", "size", "free", "rank"])
def test_a_graph_that_is_not_the_manifest_s_is_refused(
    tmp_path: Path, what: str, opened: Open
) -> None:
    def change(name: str, model: Any) -> Any:
        if name != "temporal":
            return model
        given = model.graph.input[0]
        tensor = given.type.tensor_type
        if what == "name":
            given.name = model.graph.node[0].input[0] = "features"
        elif what == "dtype":
            tensor.elem_type = TensorProto.DOUBLE
            model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        elif what == "size":
            tensor.shape.dim[2].dim_value = 8
            model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
        elif what == "free":
            tensor.shape.dim[0].dim_value = 1
        else:
            tensor.shape.dim.add().dim_value = 1
            model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
        return model

    with (
        opened(write_tiny_bundle(tmp_path, change=change)) as runtime,
        pytest.raises(
            BundleError, match=r"The temporal graph has .* where the manifest says frame"
        ),
    ):
        runtime.encode_clips(some_features(1, 4))


def test_a_token_outside_of_the_vocabulary_is_told(bundle: Bundle, opened: Open) -> None:
    tokens = np.full((2, 3), len(VOCABULARY), np.int32)
    with (
        opened(bundle) as runtime,
        pytest.raises(
            InferenceError,
            match=r"textual graph (failed on CPUExec.* of shape \(2, 3|has a vocabulary of 50 to)",
        ),
    ):
        runtime.encode_text(tokens)


def test_a_failing_graph_prints_nothing(
    bundle: Bundle, capfd: pytest.CaptureFixture[str], opened: Open
) -> None:
    with opened(bundle) as runtime, pytest.raises(InferenceError):
        runtime.encode_text(np.full((2, 3), len(VOCABULARY), np.int32))
    assert capfd.readouterr() == ("", "")


def test_a_closed_runtime_says_so(bundle: Bundle, opened: Open) -> None:
    with opened(bundle) as runtime:
        runtime.encode_frames(some_frames(1))
        session = weakref.ref(held(runtime)["visual"])
    gc.collect()
    assert session() is None
    with pytest.raises(
        InferenceError, match=r"was closed before its visual graph was run; open it"
    ):
        runtime.encode_frames(some_frames(1))
    runtime.close()


def test_threads_share_a_runtime(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, opened: Open
) -> None:
    graphs = []
    open_graph = opened._open  # type: ignore[attr-defined]

    def count(*given: Any, **options: Any) -> Any:
        graphs.append(given)
        return open_graph(*given, **options)

    monkeypatch.setattr(opened, "_open", count)
    start = threading.Barrier(4)

    def encode(runtime: OrtRuntime, seed: int) -> np.ndarray:
        start.wait()
        return np.stack([runtime.encode_frames(some_frames(3, seed=seed)) for _ in range(5)])

    with opened(bundle, num_threads=1) as runtime, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: encode(runtime, seed), range(4)))  # type: ignore[arg-type]
    assert len(graphs) == 1
    for seed, result in enumerate(results):
        expected = tiny_graphs.visual(some_frames(3, seed=seed))
        np.testing.assert_allclose(result, np.stack([expected] * 5), **CLOSE)
