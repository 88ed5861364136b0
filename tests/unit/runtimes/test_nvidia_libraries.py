from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from elf_files import shared_library

from actionclip_deploy.runtimes import machine
from actionclip_deploy.runtimes.machine import (
    TensorRT,
    find_tensorrt,
    linked_by_onnxruntime,
    preload_libraries,
    why_provider_lacks_tensorrt,
)

V10 = TensorRT("10.16.1.11", None, {"libnvinfer.so.10": "10.16.1"})
V11 = TensorRT("11.4.0.106", None, {"libnvinfer.so.11": "11.4.0"})
NONE = TensorRT(None, "it is not installed")


def answer(monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> None:
    """Let the process that looks for TensorRT print these lines and end with a code."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[0] == sys.executable
        return SimpleNamespace(stdout="\n".join(lines) + "\n", returncode=code)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_module_and_its_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "module 10.3.0", "library libnvinfer.so.10 100300")
    found = find_tensorrt()
    assert found == TensorRT("10.3.0", None, {"libnvinfer.so.10": "10.3.0"})
    assert found.version == "10.3.0"


@pytest.mark.parametrize(
    ("module", "number", "expected"),
    [
        ("tensorrt", 8601, "8.6.1"),
        ("tensorrt", 100300, "10.3.0"),
        ("tensorrt", 101303, "10.13.3"),
        ("tensorrt", 110400, "11.4.0"),
        # As libtensorrt_rtx 1.7.1 answers.
        ("tensorrt_rtx", 10701, "1.7.1"),
    ],
)
def test_a_library_tells_its_version_as_one_number(
    monkeypatch: pytest.MonkeyPatch, module: str, number: int, expected: str
) -> None:
    answer(monkeypatch, "because ImportError no", f"library some.so {number}")
    found = find_tensorrt(module)
    assert found.libraries == {"some.so": expected}
    assert found.version == expected


def test_libraries_without_a_module_say_why_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(
        monkeypatch,
        "because ModuleNotFoundError No module named 'tensorrt'",
        "library libnvinfer.so.11 110400",
        "library libnvinfer.so.10 101601",
    )
    found = find_tensorrt()
    assert found.missing_because == "it is not installed"
    assert found.libraries == {"libnvinfer.so.11": "11.4.0", "libnvinfer.so.10": "10.16.1"}


def test_a_module_without_its_libraries_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "because ImportError libnvinfer.so.11: cannot open shared object file")
    found = find_tensorrt()
    assert found.module is None
    assert found.missing_because == "libnvinfer.so.11: cannot open shared object file"


def test_a_module_that_brings_python_down_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, code=-11)
    assert find_tensorrt().missing_because == "importing it ended Python with code -11"


def test_a_process_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(machine, "_PROGRAM", "import time; time.sleep(20)")
    assert "timed out" in (find_tensorrt().missing_because or "")


def test_a_folder_of_that_name_where_one_stands_is_no_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_tensorrt("tensorrt").module is None


def test_the_search_runs_for_real_and_tells_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '10.13.3.9'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert find_tensorrt().module == "10.13.3.9"


def onnxruntime_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *needed: str) -> None:
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    if needed:
        provider = capi / "libonnxruntime_providers_tensorrt.so"
        provider.write_bytes(shared_library(*needed))
    spec = SimpleNamespace(submodule_search_locations=[str(capi.parent)])
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: spec)


def test_the_provider_s_library_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime_with(tmp_path, monkeypatch, "libnvonnxparser.so.10", "libnvinfer.so.10")
    assert linked_by_onnxruntime() == "libnvinfer.so.10"


def test_an_onnxruntime_without_the_provider_is_linked_to_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime_with(tmp_path, monkeypatch)
    assert linked_by_onnxruntime() is None
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: None)
    assert linked_by_onnxruntime() is None


def test_libraries_of_cuda_are_loaded_without_printing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = []

    def preload() -> None:
        loaded.append("CUDA")
        print("Failed to load libcublasLt")

    api = SimpleNamespace(preload_dlls=preload)
    preload_libraries("CUDAExecutionProvider", api)
    preload_libraries("CPUExecutionProvider", api)
    preload_libraries("CUDAExecutionProvider", SimpleNamespace())  # of an old version
    assert loaded == ["CUDA"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("installed", "expected"), [("10", ["nvinfer", "nvonnxparser"]), ("11", [])]
)
def test_pip_s_tensorrt_is_loaded_if_it_is_the_provider_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, expected: list[str]
) -> None:
    for name in ("nvinfer", "nvonnxparser"):
        (tmp_path / f"lib{name}.so.{installed}").touch()
    loaded: list[str] = []
    monkeypatch.setattr(machine.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(machine, "linked_by_onnxruntime", lambda: "libnvinfer.so.10")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: spec)
    preload_libraries("TensorrtExecutionProvider", SimpleNamespace())
    assert loaded == [str(tmp_path / f"lib{name}.so.10") for name in expected]


def test_the_provider_of_tensorrt_10_cannot_load_tensorrt_11() -> None:
    reason = why_provider_lacks_tensorrt("libnvinfer.so.10", V11)
    assert reason == (
        "this onnxruntime is linked to libnvinfer.so.10, of TensorRT 10, and TensorRT 11.4.0 is "
        'installed, which it cannot load; install "tensorrt-cu13>=10.16,<11" in an environment of '
        "its own, or use --runtime tensorrt, which takes TensorRT 10 and 11"
    )


def test_the_provider_without_any_tensorrt_says_which_to_install() -> None:
    reason = why_provider_lacks_tensorrt("libnvinfer.so.10", NONE)
    assert reason is not None
    assert 'there is none; install "tensorrt-cu13>=10.16,<11"' in reason


def test_the_provider_and_its_tensorrt_go_together() -> None:
    assert why_provider_lacks_tensorrt("libnvinfer.so.10", V10) is None


def test_the_wheel_for_arm_has_no_such_provider() -> None:
    reason = why_provider_lacks_tensorrt(None, V10, "aarch64")
    assert reason is not None
    assert "none of the wheels for aarch64 on PyPI has" in reason
    assert why_provider_lacks_tensorrt(None, V10, "x86_64") is None
