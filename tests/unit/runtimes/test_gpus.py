from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from actionclip_deploy.runtimes import machine
from actionclip_deploy.runtimes.machine import Gpu, find_gpus


def fake_cuda(*, num_devices: int = 1, init: int = 0) -> SimpleNamespace:
    """The CUDA driver's library; a call gives 0 and writes its answer through a reference."""

    def answer(place: int, value: object) -> Callable[..., int]:
        def call(*given: Any) -> int:
            target = getattr(given[place], "_obj", given[place])  # byref hides it
            target.value = value
            return 0

        return call

    def attribute(value: Any, which: int, device: object) -> int:
        value._obj.value = {75: 8, 76: 7}[which]
        return 0

    return SimpleNamespace(
        cuInit=lambda _: init,
        cuGetErrorName=answer(1, b"CUDA_ERROR_NO_DEVICE"),
        cuDriverGetVersion=answer(0, 13020),
        cuDeviceGetCount=answer(0, num_devices),
        cuDeviceGet=answer(0, 0),
        cuDeviceGetName=answer(0, b"Orin"),
        cuDeviceTotalMem_v2=answer(0, 8 * 2**30),
        cuDeviceGetAttribute=attribute,
    )


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    library: list[object] = []

    def load(name: str) -> object:
        if not library:
            raise OSError(f"{name}: cannot open shared object file")
        return library[0]

    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    return library


def test_gpus_are_described_by_the_driver(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(num_devices=2))
    found = find_gpus()
    assert found.found == (Gpu("Orin", "8.7", 8 * 2**30),) * 2
    assert found.cuda == "13.2"
    assert found.missing_because is None
    assert found.in_words() == ["Orin, compute capability 8.7, 8.0 GiB, CUDA 13.2"] * 2
    assert json.loads(json.dumps(found.to_dict()))["found"][1]["name"] == "Orin"


def test_a_machine_without_driver_says_so(cuda_library: list[object]) -> None:
    found = find_gpus()
    assert found.found == ()
    assert found.missing_because == (
        "the CUDA driver is not installed (libcuda.so.1: cannot open shared object file)"
    )


def test_a_driver_that_fails_says_why(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(init=100))
    assert find_gpus().missing_because == "the CUDA driver fails with CUDA_ERROR_NO_DEVICE"


def test_a_driver_without_device_says_so(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(num_devices=0))
    found = find_gpus()
    assert (found.found, found.missing_because) == ((), "the CUDA driver shows no device")
