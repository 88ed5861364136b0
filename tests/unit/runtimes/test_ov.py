from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest
import tiny_graphs
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import WEIGHTS, write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    BundleError,
    InferenceError,
    MissingExtraError,
    ParityError,
    RuntimeUnavailableError,
)
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.installation import install_command
from actionclip_deploy.keyed_store import ENTRY_RECORD, file_signature
from actionclip_deploy.manifest import GraphName, QuantizationSpec
from actionclip_deploy.runtimes import graph_cache, open_runtime, ov
from actionclip_deploy.runtimes.graph_cache import BLOB_NAME, GraphCache
from actionclip_deploy.runtimes.machine import cpu_has_bf16, num_cores
from actionclip_deploy.runtimes.ov import OpenVinoRuntime
from actionclip_deploy.runtimes.parity import verify_bundle

# float32 sums of a few thousand pixels against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# bf16 keeps 8 bits; sums of 32 x 32 pixels and of 3 colours.
BF16 = {"rtol": 2e-2, "atol": 2e-2}

needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU does not multiply bf16")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


def some_frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def pretend(monkeypatch: pytest.MonkeyPatch, device: str, **properties: Any) -> None:
    """Let OpenVINO list a device, with what it tells of it."""
    told = {"FULL_DEVICE_NAME": f"Intel's {device}", **properties}

    class Core:
        available_devices = ("CPU", device)

        def get_property(self, name: str, what: str) -> Any:
            assert name == device
            return told[what]

    monkeypatch.setattr(ov, "_core", Core)


def test_what_runs_is_told(bundle: Bundle) -> None:
    info = OpenVinoRuntime(bundle, num_threads=2).describe()
    assert (info.name, info.execution_provider) == ("openvino", "cpu")
    assert (info.precision, info.num_threads) == ("fp32", 2)
    assert info.versions == {"openvino": openvino.__version__.partition("-")[0]}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_openvino_gets_the_threads_and_lets_the_system_place_them(
    bundle: Bundle, num_threads: int
) -> None:
    with OpenVinoRuntime(bundle, num_threads=num_threads) as runtime:
        assert runtime.describe().num_threads == min(num_threads, num_cores())
        for graph in bundle.manifest.graphs:
            compiled = runtime._program(graph)._compiled
            # No more than there are cores.
            assert compiled.get_property("INFERENCE_NUM_THREADS") == min(num_threads, num_cores())
            assert compiled.get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.parametrize("device", ["cuda", "CPU", "gpu:", "npu:1", ""])
def test_a_device_that_openvino_has_no_name_for_is_refused(bundle: Bundle, device: str) -> None:
    with pytest.raises(ValueError, match=rf"device is '{device}'; openvino runs on cpu, gpu"):
        OpenVinoRuntime(bundle, device=device)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("gpu:7", r"finds no GPU\.7 on this machine; it has .*: install Intel's compute runtime"),
        ("npu", r"finds no NPU on this machine; it has .*: install Intel's NPU driver"),
    ],
)
def test_a_device_that_is_not_there_says_what_to_install(
    bundle: Bundle, device: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "GPU")
    with pytest.raises(RuntimeUnavailableError, match=told):
        OpenVinoRuntime(bundle, device=device)


@pytest.mark.parametrize(
    ("device", "name"), [("gpu", "GPU"), ("gpu", "GPU.0"), ("gpu:1", "GPU.1"), ("npu", "NPU")]
)
def test_a_device_of_intel_is_found_by_its_name(
    bundle: Bundle, device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        available_devices = ("CPU", name)

        def get_property(self, name: str, what: str) -> Any:
            return {"FULL_DEVICE_NAME": "Arc", "OPTIMIZATION_CAPABILITIES": ["FP16", "FP32"]}[what]

    monkeypatch.setattr(ov, "_core", Core)
    info = OpenVinoRuntime(bundle, device=device).describe()
    assert (info.execution_provider, info.precision, info.num_threads) == ("Arc", "fp32", None)
    with pytest.raises(ValueError, match=f"num_threads is 2 and device is '{device}'; threads are"):
        OpenVinoRuntime(bundle, device=device, num_threads=2)


# Precision


@pytest.mark.parametrize(
    ("given", "device", "able", "found"),
    [
        (None, "gpu", ["FP32", "FP16"], "fp32"),
        ("fp16", "gpu", ["FP32", "FP16"], "fp16"),
        ("fp16", "npu", ["FP16", "INT8"], "fp16"),
    ],
)
def test_the_graphs_precision_is_computed_in_unless_another_is_asked_for(
    bundle: Bundle,
    given: str | None,
    device: str,
    able: list[str],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, device.upper(), OPTIMIZATION_CAPABILITIES=able)
    runtime = OpenVinoRuntime(bundle, device=device, precision=given)
    assert runtime.describe().precision == runtime.precision_of("visual") == found
    # A token's number is no embedding: rounded, the end of a prompt is another token.
    assert runtime.precision_of("textual") == "fp32"


def test_a_device_without_the_graphs_precision_is_not_given_them_in_another(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "NPU", OPTIMIZATION_CAPABILITIES=["FP16", "INT8"])
    told = "precision is 'fp32', which this NPU does not compute in; ask for fp16"
    with pytest.raises(RuntimeUnavailableError, match=told):
        OpenVinoRuntime(bundle, device="npu")


def test_bf16_is_refused_where_the_cpu_would_emulate_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "cpu_has_bf16", lambda: False)
    told = r"precision is 'bf16', which this CPU does not compute in; ask for fp32"
    with pytest.raises(RuntimeUnavailableError, match=told):
        OpenVinoRuntime(bundle, precision="bf16")


def test_bf16_is_allowed_where_the_cpu_has_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "CPU", OPTIMIZATION_CAPABILITIES=["FP32", "BF16"])
    monkeypatch.setattr(ov, "cpu_has_bf16", lambda: True)
    assert OpenVinoRuntime(bundle, precision="bf16").describe().precision == "bf16"


@pytest.mark.parametrize("precision", ["int8", "half", ""])
def test_a_precision_that_there_is_not_is_refused(bundle: Bundle, precision: str) -> None:
    told = f"precision is '{precision}'; it must be one of fp32, fp16, bf16"
    with pytest.raises(ValueError, match=told):
        OpenVinoRuntime(bundle, precision=precision)


@needs_bf16
def test_bf16_is_computed_in_where_it_is_asked_for_and_nowhere_else(bundle: Bundle) -> None:
    frames = some_frames(3)
    with OpenVinoRuntime(bundle, precision="bf16") as asked, OpenVinoRuntime(bundle) as plain:
        rounded = asked.encode_frames(frames)
        np.testing.assert_allclose(plain.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE)
        np.testing.assert_allclose(rounded, tiny_graphs.visual(frames), **BF16)
        assert np.abs(rounded - tiny_graphs.visual(frames)).max() > 1e-5
        assert [*asked.audit()["visual"].computed()] == ["bf16"]
        assert [*plain.audit()["visual"].computed()] == ["fp32"]


@needs_bf16
def test_texts_stay_in_fp32(tiny_bundle: Path) -> None:
    """In bf16, token 49407 is 49408, and the embedding is that of another place of the prompt."""
    bundle = Bundle.open(tiny_bundle)
    with OpenVinoRuntime(bundle, precision="bf16") as runtime:
        assert [*runtime.audit()["textual"].computed()] == ["fp32"]
        report = verify_bundle(bundle, runtime)
    assert report.passed, report.check()


@pytest.mark.skipif(
    "fp16" in ov.devices()["CPU"].rpartition(", in ")[2],
    reason="this CPU computes in fp16",
)
def test_a_precision_that_openvino_silently_replaces_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVinoRuntime, "_computes_in", lambda *_: True)
    with (
        OpenVinoRuntime(bundle, precision="fp16") as runtime,
        pytest.raises(RuntimeUnavailableError, match=r"asked for f16 and computes the visual gr"),
    ):
        runtime.encode_frames(some_frames(1))


@needs_bf16
def test_verify_finds_a_precision_that_was_not_asked_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    compile_model = openvino.Core.compile_model

    def rounding(core: Any, model: Any, device: str, config: dict[str, Any]) -> Any:
        compiled = compile_model(
            core, model, device, {**config, "INFERENCE_PRECISION_HINT": "bf16"}
        )
        told = SimpleNamespace(to_string=lambda: "f32")

        class Lying:
            def get_property(self, name: str) -> Any:
                wanted = name == "INFERENCE_PRECISION_HINT"
                return told if wanted else compiled.get_property(name)

            def __getattr__(self, name: str) -> Any:
                return getattr(compiled, name)

        return Lying()

    monkeypatch.setattr(openvino.Core, "compile_model", rounding)
    with OpenVinoRuntime(bundle) as runtime:
        report = verify_bundle(bundle, runtime)
    assert not report.passed
    told = r"visual: The visual graph in openvino .* computes 100% of its arithmetic in another"
    with pytest.raises(ParityError, match=told):
        report.check()


# Audit


def quantised_bundle(folder: Path, recipe: str = "static") -> Bundle:
    """A bundle whose visual graph multiplies in int8: pixels and weights are dequantised."""
    scale = np.abs(WEIGHTS).max() / 127

    def change(name: str, model: Any) -> Any:
        if name != "visual":
            return model
        graph = model.graph
        product = graph.node.pop()
        weights = next(tensor for tensor in graph.initializer if tensor.name == "weights")
        graph.initializer.remove(weights)
        values = {
            "whole": np.round(WEIGHTS / scale).astype(np.int8),
            "scale": np.array(scale, np.float32),
            "zero": np.array(0, np.int8),
            "pixel_scale": np.array(2.0, np.float32),
            "bias": np.full(16, 0.5, np.float32),
        }
        graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
        graph.node.extend(
            [
                helper.make_node("QuantizeLinear", ["mean", "pixel_scale", "zero"], ["pixels"]),
                helper.make_node("DequantizeLinear", ["pixels", "pixel_scale", "zero"], ["a"]),
                helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["b"]),
                helper.make_node("MatMul", ["a", "b"], ["c"], name="product"),
                helper.make_node("Add", ["c", "bias"], product.output),
            ]
        )
        return model

    bundle = write_tiny_bundle(folder, change=change)
    spec = QuantizationSpec(
        recipe=recipe,  # type: ignore[arg-type]
        weight_range="full",
        quantized_blocks=("blocks.0",),
        unquantized_blocks=(),
        num_calibration_clips=1,
        accepted_by="cosine",
        bound=0.999,
        unquantized_value=None,
        quantized_value=0.9995,
        golden_min_cosine=0.9995,
        golden_max_difference=0.03,
    )
    manifest = bundle.manifest
    visual = manifest.graphs["visual"].model_copy(update={"precision": "int8"})
    graphs = {**manifest.graphs, "visual": visual}
    changed = manifest.model_copy(update={"graphs": graphs, "quantization": spec})
    (folder / "manifest.json").write_text(changed.model_dump_json())
    return Bundle.open(folder)


def test_what_is_quantised_is_to_be_computed_in_int8(tmp_path: Path) -> None:
    bundle = quantised_bundle(tmp_path)
    frames = some_frames(2)
    with OpenVinoRuntime(bundle) as runtime:
        assert runtime.describe().precision == "int8"
        # Steps of 2 in the pixels, and weights of 7 bits.
        np.testing.assert_allclose(
            runtime.encode_frames(frames), tiny_graphs.visual(frames) + 0.5, rtol=0, atol=0.05
        )
        (audited,) = runtime.audit()["visual"].products
    assert audited.product.node == "product"
    assert audited.product.precision == audited.precision == "int8"
    assert audited.product.num_macs == 4 * 3 * 16  # the frames of a clip


def test_dynamic_int8_would_be_computed_in_fp32_and_is_refused(tmp_path: Path) -> None:
    bundle = quantised_bundle(tmp_path, "dynamic")
    with pytest.raises(RuntimeUnavailableError, match=r"dynamic int8 recipe.*--calibration for"):
        OpenVinoRuntime(bundle)


@pytest.mark.parametrize("visual_prompt", ["joint", "shift"])
def test_graphs_of_whole_clips_are_audited_too(tmp_path: Path, visual_prompt: str) -> None:
    bundle = write_tiny_bundle(tmp_path, visual_prompt=visual_prompt)
    with OpenVinoRuntime(bundle) as runtime:
        audits = runtime.audit()
    assert set(audits) == {"video", "textual"}
    (audited,) = audits["video"].products
    assert audited.product.num_macs == 3 * 16  # of the mean over all frames of a clip
    assert audited.precision == "fp32"


def test_a_bundle_of_a_model_is_verified_and_every_product_is_accounted_for(
    tiny_bundle: Path,
) -> None:
    bundle = Bundle.open(tiny_bundle)
    with OpenVinoRuntime(bundle) as runtime:
        report = verify_bundle(bundle, runtime)
    report.check()
    for graph in bundle.manifest.graphs:
        assert report.audits[graph].computed() == {"fp32": pytest.approx(1.0)}
        assert len(report.audits[graph].products) > 3
    assert set(report.to_dict()["audit"]) == set(bundle.manifest.graphs)


def test_fp16_graphs_are_told_to_be_computed_in_what_they_are(tiny_fp16_bundle: Path) -> None:
    bundle = Bundle.open(tiny_fp16_bundle)
    with OpenVinoRuntime(bundle) as runtime:
        told = runtime.describe().precision
        report = verify_bundle(bundle, runtime)
    report.check()
    assert [*report.audits["visual"].computed()] == [told]


# Reading


def test_a_node_that_openvino_does_not_know_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(name: str, model: Any) -> Any:
        if name == "visual":
            model.graph.node[0].op_type = "Unheard"
        return model

    with (
        OpenVinoRuntime(write_tiny_bundle(tmp_path, change=change)) as runtime,
        pytest.raises(
            BundleError,
            match=r"openvino .* cannot read the visual graph of .*: .+; install a newer",
        ),
    ):
        runtime.encode_frames(some_frames(1))
    assert capfd.readouterr() == ("", "")


def test_what_is_no_onnx_file_is_told_and_no_other_reader_is_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = write_tiny_bundle(tmp_path, change=lambda *_: b"\x08\x07\x3a")
    with OpenVinoRuntime(bundle) as runtime, pytest.raises(BundleError, match="visual"):
        runtime.encode_frames(some_frames(1))
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_no_kernel_is_for_is_no_fault_of_the_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("Exception from src/a.cpp:1:\nno such kernel\n\n")

    monkeypatch.setattr(openvino.Core, "compile_model", fail)
    with (
        OpenVinoRuntime(bundle) as runtime,
        pytest.raises(
            RuntimeUnavailableError, match=r"compile the visual .* for CPU: no such kernel; use an"
        ),
    ):
        runtime.encode_frames(some_frames(1))


def test_without_openvino_the_extra_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ov")
    with pytest.raises(MissingExtraError, match=re.escape(install_command("openvino"))):
        open_runtime(bundle, "openvino")


def test_an_openvino_that_cannot_be_loaded_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libc is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ov")
    with pytest.raises(
        RuntimeUnavailableError, match=r"installed and cannot be loaded \(libc is too old\); reins"
    ):
        importlib.import_module("actionclip_deploy.runtimes.ov")


def test_a_version_that_is_too_old_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "VERSION", "2023.3.0")
    with pytest.raises(
        RuntimeUnavailableError, match=r"openvino 2023\.3\.0 is too old; this needs"
    ):
        OpenVinoRuntime(bundle)


# Requests


def test_a_call_is_divided_among_the_requests(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []
    run = ov._Program.run

    def note(program: Any, parts: list[np.ndarray]) -> Any:
        sizes.append([len(part) for part in parts])
        return run(program, parts)

    monkeypatch.setattr(ov._Program, "run", note)
    monkeypatch.setattr(ov, "_num_streams", lambda *_: 2)
    frames = some_frames(7)
    with OpenVinoRuntime(bundle, num_threads=2) as runtime:
        assert runtime._program("visual").num_requests == 2
        runtime._frames_per_call = 3
        features = runtime.encode_frames(frames)
        runtime._frames_per_call = None
        np.testing.assert_array_equal(runtime.encode_frames(frames), features)
    assert sizes == [[3, 3, 1], [4, 3]]
    np.testing.assert_allclose(features, tiny_graphs.visual(frames), **CLOSE)


@pytest.mark.parametrize(
    ("graph", "num_threads", "num_frames", "expected"),
    [
        ("visual", 1, 8, 1),
        ("visual", 2, 8, 2),
        ("visual", 3, 8, 1),  # two would leave a thread idle
        ("visual", 4, 8, 2),
        ("visual", 16, 8, 2),
        ("visual", 16, 32, 8),
        ("visual", 2, 3, 1),
        ("temporal", 4, 8, 1),
        ("video", 4, 8, 1),
        ("textual", 4, 8, 1),
    ],
)
def test_threads_are_divided_among_requests_that_have_enough_to_do(
    graph: GraphName, num_threads: int, num_frames: int, expected: int
) -> None:
    assert ov._num_streams(graph, num_threads, num_frames) == expected


def test_a_call_that_fails_gives_its_requests_back(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "_num_streams", lambda *_: 2)
    with OpenVinoRuntime(bundle, num_threads=2) as runtime:
        program = runtime._program("visual")
        wrong = np.zeros((2, 31, 32, 3), np.uint8)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                program.run([some_frames(1), wrong, some_frames(2)])
        assert program._free.qsize() == 2
        frames = some_frames(5)
        np.testing.assert_allclose(
            runtime.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE
        )


def test_callers_share_fewer_requests_than_they_are(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ov, "_num_streams", lambda *_: 2)
    start = threading.Barrier(5)

    def encode(runtime: OpenVinoRuntime, seed: int) -> np.ndarray:
        start.wait(60)
        return np.stack([runtime.encode_frames(some_frames(9, seed=seed)) for _ in range(5)])

    with OpenVinoRuntime(bundle, num_threads=2) as runtime, ThreadPoolExecutor(5) as pool:
        runtime._frames_per_call = 2
        results = list(pool.map(lambda seed: encode(runtime, seed), range(5)))
    for seed, result in enumerate(results):
        expected = tiny_graphs.visual(some_frames(9, seed=seed))
        np.testing.assert_allclose(result, np.stack([expected] * 5), **CLOSE)


# Fixed sizes, as an NPU takes them; here they are executed on the CPU


@pytest.fixture
def fixed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> OpenVinoRuntime:
    runtime = OpenVinoRuntime(bundle, num_threads=1)
    runtime._is_fixed = True
    return runtime


def test_calls_are_filled_up_to_fixed_sizes(fixed: OpenVinoRuntime) -> None:
    frames = some_frames(6)  # four frames are a clip of this model
    features = np.random.default_rng(1).normal(size=(3, 4, 16)).astype(np.float32)
    with fixed:
        np.testing.assert_allclose(fixed.encode_frames(frames), tiny_graphs.visual(frames), **CLOSE)
        np.testing.assert_allclose(
            fixed.encode_clips(features), tiny_graphs.temporal(features), **CLOSE
        )
        shapes = {
            graph: list(fixed._program(graph)._compiled.input(0).get_partial_shape().to_shape())
            for graph in ("visual", "temporal")
        }
    assert shapes == {"visual": [4, 32, 32, 3], "temporal": [1, 4, 16]}


def test_prompts_do_not_go_where_sizes_are_fixed(fixed: OpenVinoRuntime) -> None:
    fixed._device = "NPU"
    assert fixed._device_of("visual") == "NPU"
    assert fixed._device_of("textual") == "CPU"
    tokens = np.random.default_rng(2).integers(1, 50, (3, 5), dtype=np.int32)
    with fixed:
        np.testing.assert_allclose(fixed.encode_text(tokens), tiny_graphs.textual(tokens), **CLOSE)


def test_clips_of_another_length_do_not_fit_fixed_sizes(fixed: OpenVinoRuntime) -> None:
    with fixed, pytest.raises(InferenceError, match=r"temporal graph failed in openvino on CPU"):
        fixed.encode_clips(np.ones((1, 3, 16), np.float32))


# What is kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    monkeypatch.setattr(graph_cache, "_MIN_GRAPH_BYTES", 0)
    return GraphCache(tmp_path / "cache" / "graphs")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that graphs are compiled in, in order."""
    hints: list[str] = []
    compile_model = openvino.Core.compile_model

    def note(core: Any, model: Any, device: str, config: dict[str, Any]) -> Any:
        hints.append(config["INFERENCE_PRECISION_HINT"])
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", note)
    return hints


def encode(bundle: Bundle, cache: GraphCache | None, **options: Any) -> np.ndarray:
    with OpenVinoRuntime(bundle, cache=cache, **options) as runtime:
        return runtime.encode_frames(some_frames(3))


def entries(cache: GraphCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if not path.name.startswith("."))


def test_the_second_start_opens_what_the_first_one_compiled(
    bundle: Bundle, cache: GraphCache, compiled: list[str]
) -> None:
    first, second = encode(bundle, cache), encode(bundle, cache)
    assert compiled == ["f32"]
    (entry,) = entries(cache)
    assert {path.name for path in entry.iterdir()} == {BLOB_NAME, ENTRY_RECORD}
    np.testing.assert_array_equal(first, second)


def test_a_cached_graph_gives_the_same_bits(tiny_bundle: Path, cache: GraphCache) -> None:
    bundle = Bundle.open(tiny_bundle)
    size = bundle.manifest.model.input_size
    frames = np.random.default_rng(1).integers(0, 256, (2, 8, size, size, 3), dtype=np.uint8)
    tokens = np.random.default_rng(2).integers(1, 99, (3, 9), dtype=np.int32)

    def run(cache: GraphCache | None) -> list[np.ndarray]:
        with OpenVinoRuntime(bundle, num_threads=1, cache=cache) as runtime:
            return [runtime.encode_video(frames), runtime.encode_text(tokens)]

    plain = run(None)
    for _ in range(2):
        for given, expected in zip(run(cache), plain, strict=True):
            np.testing.assert_array_equal(given, expected)
    assert len(entries(cache)) == 3


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip_a_bit, r"graph\.blob does not have the sha256"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"graph\.blob has \d+ bytes instead",
        ),
        (Path.unlink, r"graph\.blob is missing"),
    ],
    ids=["altered", "cut off", "missing"],
)
def test_a_damaged_entry_is_compiled_anew(
    damage: Any,
    why: str,
    bundle: Bundle,
    cache: GraphCache,
    compiled: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = encode(bundle, cache)
    damage(entries(cache)[0] / BLOB_NAME)
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert len(compiled) == 2
    assert re.search(rf"is made again: .*{why}", caplog.text)
    encode(bundle, cache)
    assert len(compiled) == 2


def test_a_blob_that_openvino_refuses_is_removed(
    bundle: Bundle, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encode(bundle, cache)
    (entry,) = entries(cache)
    (entry / BLOB_NAME).write_bytes(b"no blob of any version")
    record = json.loads((entry / ENTRY_RECORD).read_text())
    record["files"][BLOB_NAME] = {
        "size": (entry / BLOB_NAME).stat().st_size,
        "sha256": sha256_of_file(entry / BLOB_NAME),
        "signature": file_signature(entry / BLOB_NAME),
    }
    (entry / ENTRY_RECORD).write_text(json.dumps(record))
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert "is removed: it cannot be opened" in caplog.text
    assert entries(cache) == []


@pytest.mark.parametrize(("what", "value"), [("_BUILD", "2027.1"), ("cpu_identity", lambda: "x")])
def test_another_version_or_processor_makes_its_own_entry(
    what: str, value: Any, bundle: Bundle, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(bundle, cache)
    monkeypatch.setattr(ov, what, value)
    encode(bundle, cache)
    assert len(entries(cache)) == 2


@needs_bf16
def test_each_precision_has_its_own_entry(
    bundle: Bundle, cache: GraphCache, compiled: list[str]
) -> None:
    plain = encode(bundle, cache)
    rounded = [encode(bundle, cache, precision="bf16") for _ in range(2)]
    assert compiled == ["f32", "bf16"]
    assert len(entries(cache)) == 2
    np.testing.assert_array_equal(*rounded)
    assert np.abs(rounded[0] - plain).max() > 1e-5
    np.testing.assert_array_equal(encode(bundle, cache), plain)


def test_threads_are_those_of_this_start_and_not_of_the_entry(
    bundle: Bundle, cache: GraphCache, compiled: list[str]
) -> None:
    for num_threads in (1, num_cores()):
        with OpenVinoRuntime(bundle, num_threads=num_threads, cache=cache) as runtime:
            found = runtime._program("visual")._compiled.get_property("INFERENCE_NUM_THREADS")
            assert found == num_threads
    assert len(compiled) == 1


def test_the_devices_are_told_with_what_they_compute_in() -> None:
    assert re.search(r", in fp32(, \w+)*$", ov.devices()["CPU"])


def test_the_vocabulary_of_a_cached_graph_is_known(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actionclip_deploy.runtimes.graph_cache._MIN_GRAPH_BYTES", 0)
    for _ in range(2):
        with open_runtime(bundle, "openvino", cache=tmp_path / "cache") as runtime:
            runtime.encode_text(np.full((1, 3), 49, np.int32))
            with pytest.raises(InferenceError, match="vocabulary of 50 tokens, and the input hol"):
                runtime.encode_text(np.full((1, 3), 50, np.int32))


def test_weights_of_another_type_are_a_different_bundle(tmp_path: Path) -> None:
    def change(name: str, model: Any) -> Any:
        if name == "temporal":
            model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
            model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        return model

    with (
        OpenVinoRuntime(write_tiny_bundle(tmp_path, change=change)) as runtime,
        pytest.raises(BundleError, match="where the manifest says"),
    ):
        runtime.encode_clips(np.ones((1, 4, 16), np.float32))


_CLOSED_AND_SIGNALLED = """
import gc, os, signal, sys, threading
import numpy as np
from pathlib import Path
from actionclip_deploy import Bundle, open_runtime

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("heard"))
bundle = Bundle.open(Path(sys.argv[1]))
runtimes = [open_runtime(bundle, "openvino", cache=False) for _ in range(2)]
for runtime in runtimes:
    runtime.encode_text(np.ones((1, bundle.manifest.model.context_length), np.int32))
if sys.argv[2] == "thread":
    closing = threading.Thread(target=lambda: [runtimes.pop(0).close() for _ in range(2)])
    closing.start()
    closing.join()
while runtimes:
    runtimes.pop(0).close()
del runtime
gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
print(*heard)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process is sent signals there")
@pytest.mark.parametrize("closed_in", ["order", "thread"])
def test_signals_are_heard_after_runtimes_were_closed(tiny_bundle: Path, closed_in: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED_AND_SIGNALLED, tiny_bundle, closed_in],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


_TELEMETRY = """
import atexit, pathlib
pathlib.Path({told!r}).touch()
class Telemetry:
    backend = None
    def __init__(self, *_, **__): self.backend = type("Backend", (), {{"app_name": None}})
    def __getattr__(self, name): return lambda *_, **__: None
"""

_IMPORTED = """
import sys, pathlib, subprocess
import actionclip_deploy.runtimes.ov
assert not pathlib.Path(sys.argv[1]).exists()
import openvino
assert openvino.__version__
model = openvino.convert_model(sys.argv[2])
assert [one.get_any_name() for one in model.inputs] == ["frames"]
assert pathlib.Path(sys.argv[1]).exists()  # which the test could not hear otherwise
from openvino.tools.ovc import convert_model
assert openvino.convert_model is convert_model
print("done")
"""


def test_the_import_tells_nobody_of_itself_and_a_program_still_converts_models(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    package = tmp_path / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(_TELEMETRY.format(told=str(told)))
    (package / "backend" / "__init__.py").write_text("")
    (package / "backend" / "backend_ga4.py").write_text("")
    variables = {name: value for name, value in os.environ.items() if name != "CI"}
    variables |= {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, str(told), str(tiny_bundle / "visual.onnx")],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
