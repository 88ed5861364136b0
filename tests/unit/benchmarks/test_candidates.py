"""Other ways to run the same weights."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy.benchmarks.candidates import RUNTIMES, RowSpec
from actionclip_deploy.errors import (
    ArgumentError,
    BenchmarkError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.parity import Golden

FP32 = 1e-4  # runtimes.comparison


def _spec(bundle: Path, runtime: str, checkpoint: Path | None = None) -> RowSpec:
    return RowSpec(runtime, runtime, bundle, checkpoint, None, "cpu", 1, num_frames=8)


def _check_against_golden(spec: RowSpec, bundle: Path) -> None:
    from actionclip_deploy.bundle import Bundle

    golden = Golden.load(Bundle.open(bundle))
    with spec.open() as runtime:
        assert runtime.describe().name == spec.runtime
        for rows in (np.arange(1), np.arange(3) % len(golden.frames)):
            embeddings = runtime.encode_video(golden.frames[rows])
            difference = np.abs(embeddings - golden.video_embeddings[rows]).max()
            assert difference <= FP32


def test_the_plain_export_computes_what_the_model_computes(
    tiny_bundle: Path, tiny_checkpoints: dict[str, Path], plain_graphs: Path
) -> None:
    assert {path.name for path in plain_graphs.iterdir()} == {"visual.onnx", "temporal.onnx"}
    spec = _spec(tiny_bundle, "onnxruntime-plain", tiny_checkpoints["Transf"])
    prepared = replace(spec, graphs=plain_graphs)
    _check_against_golden(prepared, tiny_bundle)
    with prepared.open() as runtime, pytest.raises(InferenceError, match="has no textual graph"):
        runtime.encode_text(np.ones((1, 8), np.int32))


def test_a_plain_export_that_fails_is_one_sentence(tiny_bundle: Path, tmp_path: Path) -> None:
    spec = _spec(tiny_bundle, "onnxruntime-plain", tmp_path / "missing.pt")
    with pytest.raises(RuntimeUnavailableError, match=r"as it is failed \(.*missing\.pt"):
        spec.prepare(tmp_path / "plain")


@pytest.mark.slow
def test_torch_compile_computes_what_the_model_computes(
    tiny_bundle: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    spec = _spec(tiny_bundle, "torch-compile", tiny_checkpoints["Transf"])
    _check_against_golden(spec, tiny_bundle)


def test_openvino_computes_what_the_model_computes(tiny_bundle: Path) -> None:
    _check_against_golden(_spec(tiny_bundle, "openvino"), tiny_bundle)


def test_openvino_asks_for_its_extra(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ov", raising=False)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("openvino"))):
        _spec(tiny_bundle, "openvino").open()


def test_a_row_of_openvino_computes_in_what_it_is_asked_for(tiny_bundle: Path) -> None:
    spec = replace(_spec(tiny_bundle, "openvino"), precision="int7")
    with pytest.raises(ArgumentError, match="precision is 'int7'; it must be one of fp32, fp16"):
        spec.open()


@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
def test_rows_of_the_checkpoint_ask_for_it(tiny_bundle: Path, runtime: str) -> None:
    with pytest.raises(BenchmarkError, match="give it with --checkpoint"):
        _spec(tiny_bundle, runtime).open()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_row_goes_to_its_process_and_back(tiny_bundle: Path, runtime: str) -> None:
    spec = _spec(tiny_bundle, runtime, Path("some.pt"))
    assert RowSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_only_ours_reads_a_cache_and_it_is_the_run_s_own(
    runtime: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    spec = _spec(tiny_bundle, runtime).prepare(tmp_path / "own")
    with spec.open() as runtime:
        runtime.encode_video(np.zeros((1, 8, *_frame_shape(tiny_bundle)), np.uint8))
    assert any((tmp_path / "own").iterdir())
    assert _spec(tiny_bundle, "torch").prepare(tmp_path / "other").cache is None


def _frame_shape(bundle: Path) -> tuple[int, int, int]:
    from actionclip_deploy.bundle import Bundle

    with open_runtime(Bundle.open(bundle), cache=False) as runtime:
        size = runtime.manifest.model.input_size
    return size, size, 3
