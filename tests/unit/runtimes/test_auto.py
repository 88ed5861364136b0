from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeRuntime

import actionclip_deploy.runtimes.auto as auto
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ArgumentError,
    IntegrityError,
    ParityError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes import RUNTIMES, RuntimeInfo, open_runtime
from actionclip_deploy.runtimes.auto import open_fastest
from actionclip_deploy.runtimes.base import Runtime

CUDA_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


class Candidate:
    """A way to open runtimes of which each has a speed, is missing, or is wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **latencies: Any) -> None:
        self.opened: list[str] = []
        self.latencies = latencies
        monkeypatch.setattr(auto, "_candidates", lambda _: [(name, "") for name in latencies])
        monkeypatch.setattr(auto, "median_latency_ms", lambda runtime: latencies[runtime.title])
        monkeypatch.setattr(auto, "verify_bundle", self.verify)

    def __call__(self, name: str, provider: str) -> Any:
        self.opened.append(name)
        if self.latencies[name] is None:
            raise RuntimeUnavailableError(f"{name} is not there")
        runtime = FakeRuntime(self.manifest)
        runtime.title = name  # type: ignore[attr-defined]
        return runtime

    def verify(self, bundle: Bundle, runtime: Any) -> Any:
        class Report:
            def check(self) -> None:
                if runtime.title.startswith("wrong"):
                    raise ParityError("it disagrees")

        return Report()

    manifest: Any = None


@pytest.fixture
def bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    opened = Bundle.open(tiny_bundle)
    Candidate.manifest = opened.manifest
    return opened


def test_the_fastest_that_passes_is_opened_and_the_others_are_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Candidate(monkeypatch, absent=None, wrong=0.5, slow=9.0, quick=2.0)
    with caplog.at_level(logging.WARNING):
        runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "quick"
    assert "auto chose quick: 2.00 ms a clip, verified on this machine" in caplog.text
    for words in ("absent (absent is not there)", "wrong (it disagrees)", "slow (9.00 ms)"):
        assert words in caplog.text


def test_the_second_start_tries_nothing_and_tells_those_who_ask(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Candidate(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    opener.opened.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_fastest(bundle, opener)
    assert opener.opened == ["quick"]
    assert "auto chose quick" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("change", ["engine", "version"])
def test_a_new_engine_or_another_version_is_a_reason_to_choose_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    opener = Candidate(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    if change == "engine":
        (tmp_path / "cache" / "engines" / "0123").mkdir(parents=True)
    else:
        monkeypatch.setattr(auto, "installed_versions", lambda: {"onnxruntime": "99"})
    opener.opened.clear()
    open_fastest(bundle, opener)
    assert opener.opened == ["slow", "quick", "quick"]


def test_what_does_not_open_any_more_is_chosen_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Candidate(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    opener.latencies["quick"] = None
    runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "slow"


def test_a_damaged_record_is_no_obstacle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opener = Candidate(monkeypatch, quick=2.0)
    open_fastest(bundle, opener)
    (entry,) = (tmp_path / "cache" / "choices").iterdir()
    (entry / "entry.json").write_text("{")
    runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "quick"


def test_where_nothing_can_be_used_every_reason_is_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Candidate(monkeypatch, absent=None, wrong=1.0)
    with pytest.raises(
        RuntimeUnavailableError, match=r"absent: absent is not there; wrong: it disagrees.*Install"
    ):
        open_fastest(bundle, opener)


@pytest.mark.parametrize("name", ["golden/golden.safetensors", "golden/golden.json"])
def test_an_altered_golden_file_is_no_fault_of_the_runtimes(
    name: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"^The bundle's file {name} does not have the sha256"):
        open_runtime(Bundle.open(copy), "auto", device="cpu")


def test_without_onnxruntime_it_is_told_how_to_get_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ov", raising=False)
    with pytest.raises(RuntimeUnavailableError, match="onnxruntime on cpu: ") as raised:
        open_runtime(bundle, "auto")
    assert install_command("onnxruntime") in str(raised.value)


def test_without_onnxruntime_openvino_is_chosen(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort", raising=False)
    with open_runtime(bundle, "auto", device="cpu", num_threads=1) as runtime:
        info = runtime.describe()
    assert (info.name, info.execution_provider, info.num_threads) == ("openvino", "cpu", 1)


@pytest.mark.parametrize("device", ["gpu", "gpu:1", "npu"])
def test_on_a_device_of_intel_openvino_alone_is_tried(bundle: Bundle, device: str) -> None:
    tried: list[str] = []

    def opener(name: str, provider: str) -> Runtime:
        tried.append(f"{name} on {provider}" if provider else name)
        raise RuntimeUnavailableError("not here")

    with pytest.raises(
        RuntimeUnavailableError, match=f"doctor` says what this machine has of {device}"
    ):
        open_fastest(bundle, opener, device=device)
    assert tried == ["openvino"]


def test_on_this_machine_the_cpu_is_chosen(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), open_runtime(bundle, "auto") as runtime:
        assert runtime.describe().name in ("onnxruntime", "tensorrt", "tensorrt-rtx")
    assert "Not chosen: tensorrt" in caplog.text or "tensorrt" in runtime.describe().name


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("cpu", ["onnxruntime on CPUExecutionProvider"]),
        (
            "cuda",
            ["tensorrt", "tensorrt-rtx", *[f"onnxruntime on {name}" for name in CUDA_PROVIDERS]],
        ),
        (
            None,
            ["tensorrt", "tensorrt-rtx"]
            + [f"onnxruntime on {name}" for name in (*CUDA_PROVIDERS, "CPUExecutionProvider")],
        ),
    ],
)
def test_a_device_is_chosen_by_what_runs_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str | None, found: list[str]
) -> None:
    every = (*CUDA_PROVIDERS, "CPUExecutionProvider")
    monkeypatch.setattr("actionclip_deploy.runtimes.ort.available_providers", lambda: every)
    tried: list[str] = []

    def opener(name: str, provider: str) -> Runtime:
        tried.append(f"{name} on {provider}" if provider else name)
        raise RuntimeUnavailableError("not here")

    with pytest.raises(RuntimeUnavailableError):
        open_fastest(bundle, opener, device=device)
    assert tried == found


def test_engines_do_not_run_on_the_cpu_and_other_devices_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match="device is 'cpu' and tensorrt runs on NVIDIA's GPUs"):
        open_runtime(bundle, "tensorrt", device="cpu")
    with pytest.raises(ArgumentError, match="device is 'tpu'; it must be cpu, cuda, gpu "):
        open_runtime(bundle, device="tpu")


def test_only_a_runtime_that_disagrees_is_worth_a_warning(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Candidate(monkeypatch, absent=None, slow=9.0, quick=2.0)
    with caplog.at_level(logging.INFO):
        open_fastest(bundle, opener)
    assert "absent is not there" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_execution_provider_and_auto_do_not_go_together(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"is 'cuda' and the runtime is auto; .*: leave it out"):
        open_runtime(bundle, "auto", execution_provider="cuda")


@pytest.mark.parametrize(
    ("name", "provider", "given"),
    [("tensorrt", "", None), ("onnxruntime", "CUDAExecutionProvider", None)],
)
def test_threads_that_the_chosen_runtime_has_no_use_for_are_told(
    name: str,
    provider: str,
    given: int | None,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    class OnTheGpu(FakeRuntime):
        def describe(self) -> RuntimeInfo:
            return dataclasses.replace(super().describe(), num_threads=None, name=name)

    def open_it(bundle: Bundle, options: Any) -> FakeRuntime:
        asked.append(options.num_threads)
        return OnTheGpu(bundle.manifest)

    monkeypatch.setattr(auto, "_candidates", lambda _: [(name, provider)])
    monkeypatch.setattr(
        auto, "verify_bundle", lambda *_: type("Passed", (), {"check": lambda _: None})()
    )
    monkeypatch.setitem(RUNTIMES, name, open_it)
    with caplog.at_level(logging.WARNING):
        open_runtime(bundle, "auto", num_threads=2)
    assert set(asked) == {given}
    assert f"num_threads is 2, and auto chose {name} on " in caplog.text


def test_threads_reach_what_auto_tries_on_the_cpu(bundle: Bundle) -> None:
    with open_runtime(bundle, "auto", num_threads=1, cache=False) as runtime:
        assert runtime.describe().num_threads == 1
