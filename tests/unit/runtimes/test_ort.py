from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from tiny_graphs import WEIGHTS, write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    BundleError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes import ort
from actionclip_deploy.runtimes.ort import (
    NAMES,
    OrtRuntime,
    full_name,
    what_it_needs,
    why_unavailable,
)

# float32 sums of a few thousand pixels against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


def some_frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def some_features(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*shape, 16)).astype(np.float32)


def test_what_runs_is_told(bundle: Bundle) -> None:
    info = OrtRuntime(bundle, execution_provider="CPU", num_threads=2).describe()
    assert (info.name, info.execution_provider) == ("onnxruntime", "CPUExecutionProvider")
    assert (info.precision, info.num_threads) == ("fp32", 2)
    assert info.versions == {"onnxruntime": onnxruntime.__version__}


def test_the_session_gets_the_threads(bundle: Bundle) -> None:
    with OrtRuntime(bundle, num_threads=3) as runtime:
        runtime.encode_frames(some_frames(1))
        session = runtime._sessions["visual"]  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 3


def test_an_unknown_execution_provider_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"is 'gpu'; it must be one of cpu, cuda, .*or a name of"):
        OrtRuntime(bundle, execution_provider="gpu")


def test_an_execution_provider_that_is_not_built_in_says_how_to_get_it(bundle: Bundle) -> None:
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"built without CUDAExecutionProvider; it has .*CPUExecutionProvi.*onnxruntime-gpu",
    ):
        OrtRuntime(bundle, execution_provider="cuda")


@pytest.mark.usefixtures("node_placement")
def test_an_execution_provider_that_executes_nothing_is_refused_at_once(bundle: Bundle) -> None:
    # Azure's is built into every wheel for CPUs on Linux, and its sessions run on the CPU.
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"lists AzureExecutionProvider, which does not work .*leaves every node .*ask for",
    ):
        OrtRuntime(bundle, execution_provider="AzureExecutionProvider")


class FakeSession:
    """A session as the GPU build makes it; `runs_on` says where it really runs."""

    runs_on = "CUDAExecutionProvider"
    placement: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fails: Exception | None = None

    def __init__(self, *_: Any, providers: Any, **others: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.providers = providers
        assert others == {"enable_fallback": 0}
        self.fallback = True

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_providers(self) -> list[str]:
        return [self.runs_on, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops]
            )
            for name, ops in self.placement
        ]

    def run(self, *_: Any) -> list[np.ndarray]:
        return [np.zeros(1, np.float32)]


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """The GPU build of ONNX Runtime, which lists CUDA whatever the machine has."""

    class Session(FakeSession):
        placement = (("CUDAExecutionProvider", ("Add",)),)

    monkeypatch.setattr(
        ort.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", ort.CPU]
    )
    monkeypatch.setattr(ort.ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "why_unavailable", lambda _: "libcublasLt.so.13: cannot open")
    return Session


def test_cuda_is_opened_without_second_tries_and_in_full_precision(
    bundle: Bundle, gpu_build: type[FakeSession]
) -> None:
    runtime = OrtRuntime(bundle, execution_provider="cuda")
    assert runtime.describe().execution_provider == "CUDAExecutionProvider"
    assert runtime.describe().num_threads is None
    session = ort.open_session(Path("a.onnx"), provider="CUDAExecutionProvider")
    assert session.providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    assert not session.fallback


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    bundle: Bundle, gpu_build: type[FakeSession]
) -> None:
    gpu_build.runs_on = "CPUExecutionProvider"
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"lists CUDAExecutionProvider, which does not work on this machine: libcublasLt\.so",
    ) as caught:
        OrtRuntime(bundle, execution_provider="cuda")
    assert "was asked for and ONNX Runtime runs a graph of one node on CPU" in str(
        caught.value.__cause__
    )


def test_an_execution_provider_that_raises_is_refused(
    bundle: Bundle, gpu_build: type[FakeSession]
) -> None:
    gpu_build.fails = RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
    with pytest.raises(RuntimeUnavailableError, match="which does not work on this machine"):
        OrtRuntime(bundle, execution_provider="cuda")


def test_heavy_nodes_on_the_cpu_are_refused(gpu_build: type[FakeSession]) -> None:
    gpu_build.placement = (
        ("CUDAExecutionProvider", ("MatMul",)),
        ("CPUExecutionProvider", ("Shape", "MatMul", "LayerNormalization", "Conv", "MatMul")),
    )
    session = gpu_build("a.onnx", None, providers=[], enable_fallback=0)
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"leaves Conv, LayerNormalization, MatMul of the visual graph to the CPU; ask for",
    ):
        ort.check_placement(session, "CUDAExecutionProvider", "the visual graph")


def test_arithmetic_on_shapes_may_stay_on_the_cpu(gpu_build: type[FakeSession]) -> None:
    gpu_build.placement = (
        ("CUDAExecutionProvider", ("MatMul",)),
        ("CPUExecutionProvider", ("Shape", "Gather", "Concat", "Reshape", "Cast", "Mul")),
    )
    session = gpu_build("a.onnx", None, providers=[], enable_fallback=0)
    ort.check_placement(session, "CUDAExecutionProvider", "the visual graph")


def test_an_old_version_that_cannot_tell_placement_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])
    ort.check_placement(session, "CUDAExecutionProvider", "the visual graph")
    assert "cannot tell which nodes of the visual graph run on CUDA" in caplog.text


def test_a_graph_that_fails_on_a_good_execution_provider_is_told(
    bundle: Bundle, gpu_build: type[FakeSession]
) -> None:
    runtime = OrtRuntime(bundle, execution_provider="cuda")
    gpu_build.fails = ort.ort_native.Fail("CUDA out of memory\nmany\nlines")
    with pytest.raises(
        RuntimeUnavailableError,
        match=r"cannot open the visual graph .* on CUDAExecutionProvider: CUDA out of memory; use",
    ):
        runtime.encode_frames(some_frames(1))


def test_a_graph_of_a_later_format_is_refused(tmp_path: Path) -> None:
    def change(name: str, model: Any) -> Any:
        model.ir_version = 99
        return model

    with (
        OrtRuntime(write_tiny_bundle(tmp_path, change=change)) as runtime,
        pytest.raises(
            BundleError, match=r"cannot open the visual graph .*IR version.*install a ne"
        ),
    ):
        runtime.encode_frames(some_frames(1))


def test_an_operator_without_kernel_is_no_fault_of_the_bundle(tmp_path: Path) -> None:
    def change(name: str, model: Any) -> Any:
        if name == "visual":
            # ONNX Runtime has no bfloat16 matrix product on CPUs.
            model.graph.node[0].attribute[0].i = TensorProto.BFLOAT16
            model.graph.node[2].output[0] = "product"
            weights = next(t for t in model.graph.initializer if t.name == "weights")
            model.graph.initializer.remove(weights)
            halved = numpy_helper.from_array(WEIGHTS, "weights")
            halved.data_type = TensorProto.BFLOAT16
            halved.raw_data = (WEIGHTS.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            model.graph.initializer.append(halved)
            node = onnx.helper.make_node(
                "Cast", ["product"], [model.graph.output[0].name], to=TensorProto.FLOAT
            )
            model.graph.node.append(node)
        return model

    with (
        OrtRuntime(write_tiny_bundle(tmp_path, change=change)) as runtime,
        pytest.raises(RuntimeUnavailableError, match=r"implementation for .*another precision"),
    ):
        runtime.encode_frames(some_frames(1))


def test_the_trial_model_is_an_onnx_model() -> None:
    model = onnx.load_model_from_string(ort.TRIAL_MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort")
    with pytest.raises(MissingExtraError, match=re.escape(install_command("onnxruntime"))):
        importlib.import_module("actionclip_deploy.runtimes.ort")


def test_an_onnxruntime_that_cannot_be_loaded_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libc is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort")
    with pytest.raises(
        RuntimeUnavailableError, match=r"installed and cannot be loaded \(libc is too old\); reins"
    ):
        importlib.import_module("actionclip_deploy.runtimes.ort")


# Execution providers

KNOWN = {"CPUExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", "CPUExecutionProvider"),
        ("CUDA", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("directml", "DmlExecutionProvider"),
        ("AzureExecutionProvider", "AzureExecutionProvider"),
    ],
)
def test_execution_providers_have_short_names(name: str, expected: str) -> None:
    assert full_name(name, KNOWN) == expected


@pytest.mark.parametrize("name", ["gpu", "", "CPUexecutionprovider"])
def test_an_unknown_execution_provider_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"is '{name}'; it must be one of cpu, cuda, tensorrt"):
        full_name(name, KNOWN)


def test_each_execution_provider_that_is_no_part_of_the_package_says_how_to_get_it() -> None:
    assert install_command("onnxruntime-gpu") in what_it_needs("CUDAExecutionProvider")
    assert "TensorRT libraries" in what_it_needs("TensorrtExecutionProvider")
    assert "onnxruntime-openvino" in what_it_needs("OpenVINOExecutionProvider")
    for provider in NAMES.values():
        assert what_it_needs(provider)


@pytest.mark.parametrize(
    "op", ["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"]
)
def test_int8_that_a_gpu_leaves_to_the_cpu_is_heavy(gpu_build: type[FakeSession], op: str) -> None:
    gpu_build.placement = (("CUDAExecutionProvider", ("MatMul",)), (ort.CPU, ("Shape", op)))
    session = gpu_build("a.onnx", None, providers=[], enable_fallback=0)
    with pytest.raises(RuntimeUnavailableError, match=f"leaves {op} of the visual graph to"):
        ort.check_placement(session, "CUDAExecutionProvider", "the visual graph")


def test_cuda_graphs_are_an_option_of_the_session(gpu_build: type[FakeSession]) -> None:
    def options(provider: str, **given: bool) -> dict[str, str]:
        ((_, options),) = ort.open_session(b"", provider=provider, **given).providers
        return dict(options)

    assert options("CUDAExecutionProvider") == {"use_tf32": "0"}
    recording = options("CUDAExecutionProvider", cuda_graphs=True)
    assert recording == {"use_tf32": "0", "enable_cuda_graph": "1"}
    assert options("CPUExecutionProvider") == {}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tensorrt_has_its_own_defaults_and_no_cuda_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    class Session(FakeSession):
        runs_on = "TensorrtExecutionProvider"
        placement = (("TensorrtExecutionProvider", ("Add",)),)

    monkeypatch.setattr(ort.ort, "get_available_providers", lambda: [Session.runs_on, ort.CPU])
    monkeypatch.setattr(ort.ort, "InferenceSession", Session)
    if cuda_graphs:
        with pytest.raises(ValueError, match=r"is 'tensorrt'; only cuda has them"):
            OrtRuntime(bundle, execution_provider="tensorrt", cuda_graphs=True)
        return
    runtime = OrtRuntime(bundle, execution_provider="tensorrt")
    assert runtime.describe().execution_provider == "TensorrtExecutionProvider"
    assert not runtime.has_device
    session = ort.open_session(b"", provider="TensorrtExecutionProvider")
    assert session.providers == [("TensorrtExecutionProvider", {})]


def test_libraries_of_cuda_are_loaded_without_printing(
    gpu_build: type[FakeSession],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = []

    def preload() -> None:
        loaded.append("CUDA")
        print("Failed to load libcublasLt")

    monkeypatch.setattr(ort.ort, "preload_dlls", preload, raising=False)
    ort.probe("CUDAExecutionProvider")
    gpu_build.runs_on = ort.CPU
    ort.probe(ort.CPU)
    assert loaded == ["CUDA"]
    monkeypatch.delattr(ort.ort, "preload_dlls")  # of an old version
    gpu_build.runs_on = "CUDAExecutionProvider"
    ort.probe("CUDAExecutionProvider")
    assert capsys.readouterr().out == ""


def test_the_cpu_works() -> None:
    assert why_unavailable("CPUExecutionProvider") is None


@pytest.mark.usefixtures("node_placement")
def test_an_execution_provider_that_executes_nothing_does_not_work() -> None:
    # Azure's calls a web service; every build for CPUs on Linux lists it.
    reason = why_unavailable("AzureExecutionProvider")
    assert reason is not None
    assert "leaves every node of a graph of one node to the CPU" in reason


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os; os.abort()", "trying it ended Python with signal 6"),
        ("import time; time.sleep(600)", "trying it failed .*timed out"),
        ("raise SystemExit(1)", "no reason given"),
        (
            "import sys; sys.exit('[E] Failed to load library /a/b.so with error: c.so.13: "
            "cannot open shared object file')",
            r"^c\.so\.13: cannot open shared object file$",
        ),
        ("raise ValueError('no such device')", "^no such device$"),
    ],
    ids=["crash", "hangs", "silent", "library", "raises"],
)
def test_the_reason_is_told_whatever_happens_to_the_trial(
    monkeypatch: pytest.MonkeyPatch, program: str, expected: str
) -> None:
    run = subprocess.run

    def run_instead(command: list[str], **options: Any) -> Any:
        assert command[0] == sys.executable
        return run([sys.executable, "-S", "-c", program], **options)

    monkeypatch.setattr(subprocess, "run", run_instead)
    if "sleep" in program:
        monkeypatch.setattr(ort, "_TRIAL_TIMEOUT_SECONDS", 0.5)
    reason = why_unavailable("CUDAExecutionProvider")
    assert reason is not None
    assert re.search(expected, reason)


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_onnxruntime_sends_and_keeps_nothing_about_its_use(
    given: str | None, expected: str, tmp_path: Path
) -> None:
    variables = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables.pop("ORT_DISABLE_TELEMETRY", None)
    if given is not None:
        variables["ORT_DISABLE_TELEMETRY"] = given
    program = (
        "import os, actionclip_deploy.runtimes.ort; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    if given is not None:  # what the variable says is looked at, and the library is not loaded
        program = "import sys; sys.modules['onnxruntime'] = None; import os\n" + (
            "try:\n    import actionclip_deploy.runtimes.ort\nexcept ImportError:\n    pass\n"
            "print(os.environ['ORT_DISABLE_TELEMETRY'])"
        )
    found = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{expected}\n"
    assert list(tmp_path.rglob("*")) == []
