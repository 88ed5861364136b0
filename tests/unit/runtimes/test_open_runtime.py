from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ArgumentError, RuntimeUnavailableError
from actionclip_deploy.runtimes import RUNTIMES, open_runtime
from actionclip_deploy.runtimes.machine import SPIN_VARIABLE
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.ov import OpenVinoRuntime


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path)


def test_onnxruntime_is_opened_unless_another_is_asked_for(bundle: Bundle) -> None:
    with open_runtime(bundle, num_threads=1) as runtime:
        assert isinstance(runtime, OrtRuntime)
        assert runtime.describe().num_threads == 1


def test_options_reach_the_runtime(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider"):
        open_runtime(bundle, "onnxruntime", execution_provider="cuda")
    with pytest.raises(ValueError, match="num_threads is 0"):
        open_runtime(bundle, "onnxruntime", num_threads=0)


@pytest.mark.parametrize(
    ("variable", "is_alone", "spin_us", "spins", "duration"),
    [
        ("", False, 0, "0", ""),
        ("-1", False, None, "", ""),
        ("250", True, 250, "", "250"),
        ("0", True, 0, "0", ""),
    ],
)
def test_how_threads_wait_is_what_the_sessions_have_and_what_is_told(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    is_alone: bool,
    spin_us: int | None,
    spins: str,
    duration: str,
) -> None:
    monkeypatch.setenv(SPIN_VARIABLE, variable)
    with open_runtime(bundle, is_alone=is_alone, cache=False) as runtime:
        assert runtime.describe().spin_us == spin_us
        runtime.encode_frames(np.zeros((1, 32, 32, 3), np.uint8))
        (session,) = runtime._sessions.values()  # type: ignore[attr-defined]
    options = session.get_session_options()

    def entry(name: str) -> str:
        try:
            return str(options.get_session_config_entry(f"session.intra_op.{name}"))
        except RuntimeError:  # it is not set
            return ""

    assert (entry("allow_spinning"), entry("spin_duration_us")) == (spins, duration)


@pytest.mark.parametrize("name", ["", "ort", "tensorflow"])
def test_an_unknown_runtime_is_refused_with_the_known_ones(bundle: Bundle, name: str) -> None:
    known = "auto, onnxruntime, openvino, tensorrt, tensorrt-rtx, torch"
    with pytest.raises(ValueError, match=rf"name is '{name}'; it must be one of {known}"):
        open_runtime(bundle, name)
    assert list(RUNTIMES) == known.split(", ")


def test_openvino_is_opened_with_what_was_asked_for(bundle: Bundle) -> None:
    with open_runtime(bundle, "openvino", device="cpu", precision="fp32", num_threads=1) as runtime:
        assert isinstance(runtime, OpenVinoRuntime)
        info = runtime.describe()
    assert (info.execution_provider, info.precision, info.num_threads) == ("cpu", "fp32", 1)


@pytest.mark.parametrize("device", ["gpu", "gpu:1", "npu"])
@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt", "torch"])
def test_devices_of_intel_are_openvino_s(bundle: Bundle, name: str, device: str) -> None:
    told = f"device is '{device}', of Intel's, and {name} runs on .*; ask for the openvino runtime"
    with pytest.raises(ArgumentError, match=told):
        open_runtime(
            bundle, name, device=device, checkpoint=Path("a.pt") if name == "torch" else None
        )


def test_openvino_does_not_run_on_cuda(bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match=r"device is 'cuda'; openvino runs on cpu, gpu \(of"):
        open_runtime(bundle, "openvino", device="cuda")


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt", "torch"])
def test_a_precision_is_chosen_for_openvino_alone(bundle: Bundle, name: str) -> None:
    told = f"precision is 'bf16' and the runtime is {name}, which computes in the precision of the"
    with pytest.raises(ArgumentError, match=told):
        open_runtime(bundle, name, precision="bf16")


def test_onnxruntime_has_no_use_for_a_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(
        ValueError, match=r"checkpoint is a\.pt .*leave both out, or ask for the tor"
    ):
        open_runtime(bundle, "onnxruntime", checkpoint=Path("a.pt"))


def test_torch_needs_the_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"checkpoint is missing, .* exported from; give fake\.pt"):
        open_runtime(bundle, "torch")


@pytest.mark.parametrize("name", ["auto", "openvino", "tensorrt-rtx"])
def test_cuda_graphs_are_not_left_out_in_silence(bundle: Bundle, name: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graphs is True and name is '{name}'; only onnx"):
        open_runtime(bundle, name, cuda_graphs=True)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"num_threads": 2}, "num_threads is 2 and the runtime is {}, whose engines are executed"),
        (
            {"execution_provider": "cuda"},
            "execution_provider is 'cuda' and the runtime is {}; it chooses",
        ),
    ],
)
def test_what_engines_have_no_use_for_is_not_left_out_in_silence(
    bundle: Bundle, name: str, option: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told.format(name)):
        open_runtime(bundle, name, **option)


def test_threads_are_of_the_cpu_alone(bundle: Bundle) -> None:
    told = "num_threads is 2 and execution_provider is 'cuda'; threads are of use to cpu alone"
    with pytest.raises(ValueError, match=told):
        open_runtime(bundle, "onnxruntime", execution_provider="cuda", num_threads=2)
    with open_runtime(bundle, execution_provider="CPUExecutionProvider", num_threads=1) as runtime:
        assert runtime.describe().num_threads == 1
