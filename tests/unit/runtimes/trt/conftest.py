"""TensorRT as a fake that runs on ONNX Runtime, on a GPU that is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.runtimes.trt import building, runtime
from actionclip_deploy.runtimes.trt.driver import Cuda


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The fake module under both of the real names; change its `state` to make it fail."""
    state = fake_tensorrt._State()
    monkeypatch.setattr(fake_tensorrt, "state", state)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    for module in (building, runtime):
        monkeypatch.setattr(module, "open_cuda", lambda: Cuda(state.cudart))
        monkeypatch.setattr(module, "require_gpu", lambda _: None)
    monkeypatch.setattr(building, "cuda_devices", lambda: (["Orin"], None))
    yield fake_tensorrt
    assert not state.cudart.memory, "memory was not freed"
    assert not state.cudart.streams, "streams were not destroyed"
    assert not state.cudart.graphs, "recordings were not destroyed"


@pytest.fixture
def bundle(tiny_fp16_bundle: Path) -> Bundle:
    return Bundle.open(tiny_fp16_bundle)
