"""What is said where TensorRT, its libraries, cuda-python or a driver is not there."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cudart import FakeCudart, cudaError_t

from actionclip_deploy.errors import MissingExtraError, RuntimeUnavailableError
from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes.trt import api, driver
from actionclip_deploy.runtimes.trt.api import Api, EngineRuntime, load_api, require_gpu
from actionclip_deploy.runtimes.trt.driver import open_cuda

BOTH: tuple[EngineRuntime, ...] = ("tensorrt", "tensorrt-rtx")


def install(patch: pytest.MonkeyPatch, name: str, version: str) -> None:
    module = SimpleNamespace(__version__=version)
    patch.setitem(sys.modules, name.replace("-", "_"), module)  # type: ignore[arg-type]


def fail_to_import(patch: pytest.MonkeyPatch, problem: Exception) -> None:
    def import_module(name: str) -> Any:
        raise problem

    patch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("tensorrt", "10.3.0"),
        ("tensorrt", "10.16.1.11"),
        ("tensorrt", "11.4.1"),
        ("tensorrt-rtx", "1.5.0.114"),
        ("tensorrt-rtx", "1.9.0"),
    ],
)
def test_versions_that_are_known_are_taken(
    name: EngineRuntime, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, name, version)
    loaded = load_api(name)
    assert (loaded.name, loaded.version) == (name, version)
    assert loaded.title.endswith(version)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("tensorrt", "8.6.2", r"^TensorRT 8\.6\.2 is too old: 10\.3 to 11\.x are known .*one of"),
        ("tensorrt", "10.2.0", r"^TensorRT 10\.2\.0 is too old"),
        ("tensorrt", "12.0.0", r"^TensorRT 12\.0\.0 is too new: .*or a newer actionclip-deploy\.$"),
        ("tensorrt", "unknown", r"^TensorRT unknown is too old"),
        ("tensorrt-rtx", "1.4.0", r"^TensorRT for RTX 1\.4\.0 is too old: 1\.5 to 1\.x are known"),
        ("tensorrt-rtx", "2.0.0", r"^TensorRT for RTX 2\.0\.0 is too new"),
    ],
)
def test_another_version_is_refused_in_a_sentence(
    name: EngineRuntime, version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, name, version)
    with pytest.raises(RuntimeUnavailableError, match=message):
        load_api(name)


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_without_the_package_the_extra_is_named(
    name: EngineRuntime, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = name.replace("-", "_")
    fail_to_import(monkeypatch, ModuleNotFoundError(f"No module named {module!r}", name=module))
    with pytest.raises(MissingExtraError, match=re.escape(install_command(extra))):
        load_api(name, root=tmp_path)


def test_on_a_jetson_the_system_supplies_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").touch()
    fail_to_import(monkeypatch, ModuleNotFoundError("No module", name="tensorrt"))
    with pytest.raises(RuntimeUnavailableError, match="apt install python3-libnvinfer"):
        load_api("tensorrt", root=tmp_path)


@pytest.mark.parametrize(
    "problem",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        OSError("libnvinfer.so.10: cannot open shared object file"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
    ],
)
def test_libraries_that_are_missing_are_named(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_import(monkeypatch, problem)
    with pytest.raises(
        RuntimeUnavailableError, match=r"cannot be loaded \(.*(libnvinfer|tensorrt_libs)"
    ):
        load_api("tensorrt")


@pytest.mark.parametrize("name", BOTH)
def test_without_a_driver_the_reason_and_the_place_are_told(
    name: EngineRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "cuda_devices", lambda: ([], "there is no libcuda.so.1"))
    with pytest.raises(
        RuntimeUnavailableError, match=r"needs an NVIDIA GPU .*no libcuda\.so\.1; run this on"
    ):
        require_gpu(Api(name, None, "10.3.0"))


def test_with_a_gpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "cuda_devices", lambda: (["Orin"], None))
    require_gpu(Api("tensorrt", None, "10.3.0"))


def without_cuda(patch: pytest.MonkeyPatch, problem: Exception) -> None:
    real = builtins.__import__

    def imported(name: str, *arguments: Any) -> Any:
        if name == "cuda.bindings":
            raise problem
        return real(name, *arguments)

    patch.setattr(builtins, "__import__", imported)


def test_without_cuda_python_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch, ModuleNotFoundError("No module named 'cuda'", name="cuda"))
    with pytest.raises(MissingExtraError, match=re.escape(install_command("cuda"))):
        open_cuda()


def test_a_cuda_python_of_another_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch, ImportError("undefined symbol: cudaGetDeviceProperties_v2"))
    with pytest.raises(RuntimeUnavailableError, match=r"undefined symbol.*cuda-python<13"):
        open_cuda()


def test_a_driver_that_fails_is_told_with_its_call_and_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(FakeCudart):
        def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
            return cudaError_t.cudaErrorInvalidValue, None

    bindings = SimpleNamespace(runtime=Broken())
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=bindings))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeUnavailableError, match="cudaGetDeviceProperties failed with cudaErrorInvalidValue"
    ):
        open_cuda()


def test_memory_is_freed_once() -> None:
    fake = FakeCudart()
    cuda = driver.Cuda(fake)
    assert (cuda.device.driver, cuda.device.compute_capability) == ("12.6", "8.7")
    memory = [driver.HostMemory(cuda, 16), driver.DeviceMemory(cuda, 16)]
    assert len(fake.memory) == 2
    for one in memory * 2:
        one.close()
    assert not fake.memory
