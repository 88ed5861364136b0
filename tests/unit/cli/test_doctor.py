from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.command_records import DoctorRecord
from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes import machine, ort
from actionclip_deploy.runtimes.machine import Gpu, Gpus, Jetson, TensorRT

ORIN = Gpus((Gpu("Orin", "8.7", 8 * 2**30),), "12.6")
BOARD = Jetson("NVIDIA Jetson Orin Nano", "36.4.4", "6.2.1", "MAXN_SUPER (2)")
V10_3 = TensorRT("10.3.0", None, {"libnvinfer.so.10": "10.3.0"})
V11 = TensorRT("11.4.0.106", None, {"libnvinfer.so.11": "11.4.0"})
NO_RTX = TensorRT(None, "it is not installed")


def pretend(monkeypatch: pytest.MonkeyPatch, tensorrt: TensorRT, **others: Any) -> None:
    found = {"tensorrt": tensorrt, "tensorrt_rtx": NO_RTX}
    monkeypatch.setattr(machine, "find_tensorrt", found.__getitem__)
    monkeypatch.setattr(machine, "find_gpus", lambda: others.get("gpus", ORIN))
    monkeypatch.setattr(machine, "read_jetson", lambda *_: others.get("board"))
    providers = others.get("providers", {"CPUExecutionProvider": "works"})
    reasons = {name: None if word == "works" else word for name, word in providers.items()}
    monkeypatch.setattr(ort, "available_providers", lambda: tuple(reasons))
    monkeypatch.setattr(ort, "why_unavailable", reasons.__getitem__)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_jetson_is_examined_and_gets_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, V10_3, board=BOARD)
    report = json.loads(run("--json"))
    check_json(DoctorRecord, report)
    nvidia = report["nvidia"]
    assert nvidia["found"] == [
        {"name": "Orin", "compute_capability": "8.7", "memory_bytes": 8 * 2**30}
    ]
    assert nvidia["cuda"] == "12.6"
    assert nvidia["jetson"]["jetpack"] == "6.2.1"
    assert nvidia["tensorrt"]["libraries"] == {"libnvinfer.so.10": "10.3.0"}
    assert (
        "https://github.com/NVIDIA/TensorRT/issues/4723"
        in report["known_problems"]["10.3-fp16-vit"]
    )
    assert report["recommended"]["runtime"] == "tensorrt"
    text = run()
    for words in ("Jetson power mode", "MAXN_SUPER (2)", "known problems", "recommended"):
        assert words in text
    assert "Orin, compute capability 8.7, 8.0 GiB" in text


def test_a_provider_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    providers = {"TensorrtExecutionProvider": "libcudart.so.13: cannot open", "CPU": "works"}
    pretend(monkeypatch, V10_3, providers=providers)
    report = json.loads(run("--json"))
    assert report["execution_providers"] == providers


def test_a_machine_without_gpu_says_why_and_gets_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Gpus(missing_because="the CUDA driver shows no device")
    pretend(monkeypatch, NO_RTX, gpus=none)
    report = json.loads(run("--json"))
    assert report["nvidia"]["missing_because"] == "the CUDA driver shows no device"
    assert report["known_problems"] == {}
    assert report["recommended"]["runtime"] == "onnxruntime"
    assert "verify all the same" in run()


def test_this_machine_is_examined_for_real() -> None:
    report = json.loads(run("--json"))
    assert report["execution_providers"] == {"CPUExecutionProvider": "works"}
    assert "in fp32" in report["openvino"]["CPU"]
    assert report["recommended"]["why"]


def test_a_machine_without_openvino_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ov", raising=False)
    assert install_command("openvino") in json.loads(run("--json"))["openvino"]["none"]


def test_a_machine_without_onnxruntime_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort", raising=False)
    (reason,) = json.loads(run("--json"))["execution_providers"].values()
    assert install_command("onnxruntime") in reason
