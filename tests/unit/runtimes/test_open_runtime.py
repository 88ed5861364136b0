from __future__ import annotations

from pathlib import Path

import pytest
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import RuntimeUnavailableError
from actionclip_deploy.runtimes import RUNTIMES, open_runtime
from actionclip_deploy.runtimes.ort import OrtRuntime


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


@pytest.mark.parametrize("name", ["", "ort", "tensorflow"])
def test_an_unknown_runtime_is_refused_with_the_known_ones(bundle: Bundle, name: str) -> None:
    known = "auto, onnxruntime, tensorrt, tensorrt-rtx, torch"
    with pytest.raises(ValueError, match=rf"name is '{name}'; it must be one of {known}"):
        open_runtime(bundle, name)
    assert list(RUNTIMES) == ["auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]


def test_onnxruntime_has_no_use_for_a_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(
        ValueError, match=r"checkpoint is a\.pt .*leave both out, or ask for the tor"
    ):
        open_runtime(bundle, "onnxruntime", checkpoint=Path("a.pt"))


def test_torch_needs_the_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"checkpoint is missing, .* exported from; give fake\.pt"):
        open_runtime(bundle, "torch")


@pytest.mark.parametrize("name", ["auto", "tensorrt-rtx"])
def test_cuda_graphs_are_not_left_out_in_silence(bundle: Bundle, name: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graphs is True and name is '{name}'; only onnx"):
        open_runtime(bundle, name, cuda_graphs=True)
