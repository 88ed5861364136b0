from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from actionclip_deploy.runtimes import ort
from actionclip_deploy.runtimes.ort import (
    NAMES,
    full_name,
    heavy_ops,
    provider_options,
    what_it_needs,
    why_unavailable,
)

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
    assert "actionclip-deploy[onnxruntime-gpu]" in what_it_needs("CUDAExecutionProvider")
    assert "TensorRT libraries" in what_it_needs("TensorrtExecutionProvider")
    assert "onnxruntime-openvino" in what_it_needs("OpenVINOExecutionProvider")
    for provider in NAMES.values():
        assert what_it_needs(provider)


def test_arithmetic_on_shapes_may_stay_on_the_cpu() -> None:
    assert heavy_ops(["Shape", "Gather", "Concat", "Reshape", "Cast", "Mul"]) == []
    assert heavy_ops(["Shape", "MatMul", "LayerNormalization", "MatMul"]) == [
        "LayerNormalization",
        "MatMul",
    ]


@pytest.mark.parametrize(
    "op", ["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"]
)
def test_int8_that_a_gpu_leaves_to_the_cpu_is_heavy(op: str) -> None:
    assert heavy_ops(["Shape", op]) == [op]


def test_cuda_graphs_are_an_option_of_the_session() -> None:
    assert provider_options("CUDAExecutionProvider") == {"use_tf32": "0"}
    recording = provider_options("CUDAExecutionProvider", cuda_graphs=True)
    assert recording == {"use_tf32": "0", "enable_cuda_graph": "1"}
    assert provider_options("CPUExecutionProvider") == {}


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
        ("import time; time.sleep(30)", "trying it failed .*timed out"),
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
    monkeypatch.setattr(ort, "_TRIAL_TIMEOUT_SECONDS", 2)
    reason = why_unavailable("CUDAExecutionProvider")
    assert reason is not None
    assert re.search(expected, reason)
