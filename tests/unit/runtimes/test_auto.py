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
from actionclip_deploy.runtimes.auto import Candidate, open_fastest
from actionclip_deploy.runtimes.base import Runtime

CUDA_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


class Openers:
    """A way to open runtimes of which each has a speed, is missing, or is wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **latencies: Any) -> None:
        self.opened: list[str] = []
        self.open_now: list[str] = []
        self.most_open = 0
        self.latencies = latencies
        found = [Candidate(name) for name in latencies]
        monkeypatch.setattr(auto, "_candidates", lambda *_: found)
        monkeypatch.setattr(auto, "_duel", self.duel)
        monkeypatch.setattr(auto, "verify_bundle", self.verify)

    def __call__(self, candidate: Candidate) -> Any:
        name = candidate.runtime
        self.opened.append(name)
        if self.latencies[name] is None:
            raise RuntimeUnavailableError(f"{name} is not there")
        self.open_now.append(name)
        self.most_open = max(self.most_open, len(self.open_now))
        runtime = FakeRuntime(self.manifest)
        runtime.title = name  # type: ignore[attr-defined]
        runtime.close = lambda: self.open_now.remove(name)  # type: ignore[method-assign]
        return runtime

    def duel(self, one: Any, other: Any, prefer: str) -> tuple[float, float | None]:
        rival = None if other is None else self.latencies[other.title]
        return self.latencies[one.title], rival

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
    Openers.manifest = opened.manifest
    return opened


def test_the_fastest_that_passes_is_opened_and_the_others_are_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Openers(monkeypatch, absent=None, wrong=0.5, slow=9.0, quick=2.0)
    with caplog.at_level(logging.WARNING):
        runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "quick"
    assert "auto chose quick: 2.00 ms a clip, verified on this machine" in caplog.text
    for words in ("not usable here: absent;", "wrong disagrees: it disagrees", "slower: slow 9.00"):
        assert words in caplog.text


def test_the_winner_is_opened_once_and_no_more_than_two_are_open_at_a_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Openers(monkeypatch, slow=9.0, wrong=0.5, quick=2.0, absent=None, tie=2.0, medium=3.0)
    runtime: Any = open_fastest(bundle, opener, cache=False)
    assert runtime.title == "quick"
    assert opener.opened == ["slow", "wrong", "quick", "absent", "tie", "medium"]
    assert opener.open_now == ["quick"]
    assert opener.most_open == 2


@pytest.mark.parametrize(
    ("runtime", "mine", "other", "is_worth_it"),
    [
        ("onnxruntime", 96.0, 100.0, True),
        ("onnxruntime", 98.0, 100.0, False),
        ("onnxruntime", 1.0, 1.5, True),
        ("openvino", 96.0, 100.0, True),
        ("openvino", 1.0, 1.5, False),
        ("openvino", 1.0, 2.5, True),
    ],
)
def test_a_later_candidate_has_to_be_faster_by_enough(
    runtime: str, mine: float, other: float, is_worth_it: bool
) -> None:
    assert auto._is_worth_it(Candidate(runtime), mine, other) is is_worth_it


def test_nothing_stays_open_where_a_try_is_interrupted(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Openers(monkeypatch, slow=9.0, quick=2.0)

    def interrupted(one: Any, other: Any, prefer: str) -> tuple[float, None]:
        if other is not None:
            raise KeyboardInterrupt
        return 9.0, None

    monkeypatch.setattr(auto, "_duel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_fastest(bundle, opener)
    assert opener.open_now == []


@pytest.mark.parametrize(
    "asked",
    [
        {"prefer": "throughput"},
        {"precision": "bf16"},
        {"setup": "1 threads"},
        {"device": "cpu"},
    ],
)
def test_what_was_asked_for_is_chosen_by_itself(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    opener = Openers(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    opener.opened.clear()
    open_fastest(bundle, opener, **asked)
    assert opener.opened == ["slow", "quick"]
    opener.opened.clear()
    open_fastest(bundle, opener, **asked)
    assert opener.opened == ["quick"]


def test_a_duel_takes_turns_in_calls_of_the_size_that_matters(bundle: Bundle) -> None:
    calls: list[tuple[str, int]] = []

    class Timed(FakeRuntime):
        def __init__(self, name: str) -> None:
            super().__init__(bundle.manifest)
            self.name = name

        def encode_video(self, frames: Any) -> Any:
            calls.append((self.name, len(frames)))
            return super().encode_video(frames)

    mine, other = auto._duel(Timed("one"), Timed("other"), "latency")
    assert mine > 0
    assert other is not None
    assert [name for name, _ in calls[:6]] == ["one", "other"] * 3
    assert {size for _, size in calls} == {1}
    calls.clear()
    assert auto._duel(Timed("one"), None, "throughput")[1] is None
    assert {size for _, size in calls} == {32 // bundle.manifest.model.num_frames}


def test_bf16_is_tried_where_it_is_allowed_and_the_graphs_are_not_in_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "actionclip_deploy.runtimes.ort.available_providers", lambda: ("CPUExecutionProvider",)
    )
    titles = [each.title for each in auto._candidates("cpu", "bf16", "fp32")]
    assert titles == ["onnxruntime on CPUExecutionProvider", "openvino in bf16", "openvino"]
    assert [each.title for each in auto._candidates("cpu", "fp32", "fp32")] == [
        "onnxruntime on CPUExecutionProvider",
        "openvino",
    ]
    with pytest.raises(ArgumentError, match="precision is 'int4'; it must be fp32, fp16, bf16"):
        open_runtime(bundle, "auto", precision="int4")
    with pytest.raises(ArgumentError, match="prefer is 'speed'; it must be latency or throughput"):
        open_runtime(bundle, "auto", prefer="speed")  # type: ignore[arg-type]


def test_the_second_start_tries_nothing_and_tells_those_who_ask(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opener = Openers(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    opener.opened.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_fastest(bundle, opener)
    assert opener.opened == ["quick"]
    assert "auto takes, as it chose before, quick" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("change", ["engine", "version"])
def test_a_new_engine_or_another_version_is_a_reason_to_choose_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    opener = Openers(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    if change == "engine":
        (tmp_path / "cache" / "engines" / "0123").mkdir(parents=True)
    else:
        monkeypatch.setattr(auto, "installed_versions", lambda: {"onnxruntime": "99"})
    opener.opened.clear()
    open_fastest(bundle, opener)
    assert opener.opened == ["slow", "quick"]


def test_what_does_not_open_any_more_is_chosen_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Openers(monkeypatch, slow=9.0, quick=2.0)
    open_fastest(bundle, opener)
    opener.latencies["quick"] = None
    runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "slow"


def test_a_damaged_record_is_no_obstacle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opener = Openers(monkeypatch, quick=2.0)
    open_fastest(bundle, opener)
    (entry,) = (tmp_path / "cache" / "choices").iterdir()
    (entry / "entry.json").write_text("{")
    runtime: Any = open_fastest(bundle, opener)
    assert runtime.title == "quick"


def test_where_nothing_can_be_used_every_reason_is_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Openers(monkeypatch, absent=None, wrong=1.0)
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

    def opener(candidate: Candidate) -> Runtime:
        tried.append(candidate.title)
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
        assert runtime.describe().name in ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
    assert "not usable here: tensorrt" in caplog.text or "tensorrt" in runtime.describe().name


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("cpu", ["onnxruntime on CPUExecutionProvider", "openvino"]),
        (
            "cuda",
            ["tensorrt", "tensorrt-rtx", *[f"onnxruntime on {name}" for name in CUDA_PROVIDERS]],
        ),
        (
            None,
            ["tensorrt", "tensorrt-rtx"]
            + [f"onnxruntime on {name}" for name in (*CUDA_PROVIDERS, "CPUExecutionProvider")]
            + ["openvino"],
        ),
    ],
)
def test_a_device_is_chosen_by_what_runs_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str | None, found: list[str]
) -> None:
    every = (*CUDA_PROVIDERS, "CPUExecutionProvider")
    monkeypatch.setattr("actionclip_deploy.runtimes.ort.available_providers", lambda: every)
    tried: list[str] = []

    def opener(candidate: Candidate) -> Runtime:
        tried.append(candidate.title)
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
    opener = Openers(monkeypatch, absent=None, slow=9.0, quick=2.0)
    with caplog.at_level(logging.DEBUG):
        open_fastest(bundle, opener)
    assert "not usable here: absent (absent is not there)" in caplog.text
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

    monkeypatch.setattr(auto, "_candidates", lambda *_: [Candidate(name, provider)])
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
