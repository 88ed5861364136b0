from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_models import tiny_model_config

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ExportError
from actionclip_deploy.export import (
    ExportResult,
    Fp8Options,
    Int8Options,
    export_checkpoint,
)
from actionclip_deploy.export.quantization import feature_error
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden, verify_bundle

BLOCKS = ("blocks.0", "blocks.1", "last_block")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return tiny_model_config(vision_layers=3)


@pytest.fixture(scope="module")
def checkpoint(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-3f.pt"
    save_original_checkpoint(build_model(config, seed=1), path)
    return path


@pytest.fixture(scope="module")
def dynamic(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    output = tmp_path_factory.mktemp("bundles") / "dynamic"
    return export_checkpoint(checkpoint, output, precision="int8")


@pytest.fixture(scope="module")
def static(
    checkpoint: Path, rendered_video: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportResult, list[tuple[str, int, int]]]:
    """A bundle of the static recipe, and the progress that was told."""
    told: list[tuple[str, int, int]] = []
    options = Int8Options(
        calibration=(rendered_video,), num_clips=5, on_progress=lambda *task: told.append(task)
    )
    output = tmp_path_factory.mktemp("bundles") / "static"
    return export_checkpoint(checkpoint, output, precision="int8", int8=options), told


def export_between_fp16(
    precision: str,
    checkpoint: Path,
    video: Path,
    output: Path,
    **options: Any,
) -> ExportResult:
    """An export in a quantised precision whose other products are fp16."""
    given: dict[str, Any] = {"calibration": (video,), "num_clips": 3, **options}
    chosen: dict[str, Any] = {
        "fp8": {"fp8": Fp8Options},
        "int8": {"int8": lambda **fields: Int8Options(rest="fp16", **fields)},
    }[precision]
    made = {name: make(**given) for name, make in chosen.items()}
    return export_checkpoint(checkpoint, output, precision=precision, **made)


def export_measured(
    checkpoint: Path, output: Path, top1: Callable[[Bundle], float], **options: Any
) -> ExportResult:
    int8 = Int8Options(measure_top1=top1, **options)
    return export_checkpoint(checkpoint, output, precision="int8", int8=int8)


def int8_blocks(bundle: Bundle) -> set[str]:
    return quantised_blocks(bundle, "int8")


def quantised_blocks(bundle: Bundle, precision: str) -> set[str]:
    """Blocks whose weights are in the file in a precision."""
    graph = onnx.load(bundle.graph_path("visual")).graph
    found = {t.name for t in graph.initializer if t.name.endswith(f".{precision}")}
    return {block for block in BLOCKS if any(f"tower.{block}." in name for name in found)}


def test_only_the_visual_graph_is_int8(dynamic: ExportResult) -> None:
    bundle = Bundle.open(dynamic.bundle.path, check_hashes=True)
    precisions = {name: spec.precision for name, spec in bundle.manifest.graphs.items()}
    assert precisions == {"visual": "int8", "temporal": "fp32", "textual": "fp32"}
    assert bundle.manifest.precision() == "int8"
    assert int8_blocks(bundle) == set(BLOCKS)


def test_the_manifest_says_how_and_what_was_measured(dynamic: ExportResult) -> None:
    spec = dynamic.bundle.manifest.quantization
    assert spec is not None
    assert (spec.recipe, spec.weight_range) == ("dynamic", "reduced")
    assert (spec.quantized_blocks, spec.unquantized_blocks) == (BLOCKS, ())
    assert (spec.accepted_by, spec.bound, spec.unquantized_value) == ("cosine", 0.999, None)
    assert 0.999 <= spec.quantized_value < 1
    assert spec.num_calibration_clips == 0
    golden = Golden.load(dynamic.bundle)
    with OrtRuntime(dynamic.bundle) as runtime:
        features = runtime.encode_frames(golden.frames.reshape(-1, *golden.frames.shape[2:]))
    assert golden.frame_features is not None
    error = feature_error(features, golden.frame_features.reshape(len(features), -1))
    assert spec.golden_min_cosine <= error.min_cosine + 1e-6
    assert spec.golden_max_difference >= error.max_difference - 1e-4


def test_the_report_has_every_block_and_every_trial(dynamic: ExportResult) -> None:
    report = json.loads((dynamic.bundle.path / "reports/quantization.json").read_text())
    assert [row["block"] for row in report["sensitivity"]] == list(BLOCKS)
    assert all(20 < row["sqnr_db"] < 80 for row in report["sensitivity"])
    # One block alone hurts less than all of them together.
    assert min(row["min_cosine"] for row in report["sensitivity"]) > report["quantized_value"]
    assert report["trials"] == [
        {"unquantized_blocks": [], "value": report["quantized_value"], "accepted": True}
    ]
    assert dynamic.quantization is not None
    assert report == dynamic.quantization.to_dict()
    assert "reports/quantization.json" in dynamic.bundle.manifest.files


def test_the_static_recipe_is_taken_with_calibration_videos(static: Any) -> None:
    result, told = static
    spec = result.bundle.manifest.quantization
    assert (spec.recipe, spec.num_calibration_clips) == ("static", 5)
    ops = {node.op_type for node in onnx.load(result.bundle.graph_path("visual")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= ops
    assert "MatMulInteger" not in ops
    last = {task: (done, total) for task, done, total in told}
    assert last == {
        "Reading calibration clips": (5, 5),
        "Calibrating": (5, 5),
        "Measuring blocks": (3, 3),
    }


def test_a_bundle_in_int8_passes_verify_and_recognises_like_fp32(
    static: Any, dynamic: ExportResult
) -> None:
    for bundle in (static[0].bundle, dynamic.bundle):
        with open_runtime(bundle) as runtime:
            assert runtime.describe().precision == "int8"
            verify_bundle(bundle, runtime).check()


def test_torch_passes_verify_on_an_int8_bundle(dynamic: ExportResult, checkpoint: Path) -> None:
    with open_runtime(dynamic.bundle, "torch", checkpoint=checkpoint) as runtime:
        verify_bundle(dynamic.bundle, runtime).check()


def test_nothing_but_the_bundle_is_left(
    dynamic: ExportResult, static: Any, tiny_bundle: Path
) -> None:
    for bundle in (dynamic.bundle, static[0].bundle):
        assert list(bundle.path.parent.glob(".*")) == []
        found = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*")}
        usual = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*")}
        assert found == {*usual, "reports/quantization.json"}


def test_the_same_export_gives_the_same_graph(
    static: Any, checkpoint: Path, rendered_video: Path, tmp_path: Path
) -> None:
    options = Int8Options(calibration=(rendered_video,), num_clips=5)
    again = export_checkpoint(checkpoint, tmp_path / "new", precision="int8", int8=options)
    first = static[0].bundle.graph_path("visual")
    assert again.bundle.graph_path("visual").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_bundle_quantised_between_fp16_says_so_and_passes_verify(
    precision: str,
    checkpoint: Path,
    rendered_video: Path,
    tmp_path: Path,
) -> None:
    result = export_between_fp16(precision, checkpoint, rendered_video, tmp_path / "new")
    manifest = Bundle.open(result.bundle.path, check_hashes=True).manifest
    assert manifest.precision() == precision
    assert manifest.graphs["visual"].opset == 19
    assert {manifest.graphs[name].opset for name in ("temporal", "textual")} == {18}
    spec = manifest.quantization
    assert spec is not None
    assert (spec.recipe, spec.rest_precision) == ("static", "fp16")
    assert spec.weight_range == {"fp8": None, "int8": "reduced"}[precision]
    assert (spec.quantized_blocks, spec.unquantized_blocks) == (BLOCKS, ())
    assert spec.bound == {"fp8": 0.99, "int8": 0.999}[precision]
    assert spec.bound <= spec.quantized_value < 1
    with open_runtime(result.bundle) as runtime:
        assert runtime.describe().precision == precision
        verify_bundle(result.bundle, runtime).check()


def test_blocks_that_fp8_hurts_too_much_go_back_to_fp16(
    checkpoint: Path,
    rendered_video: Path,
    tmp_path: Path,
) -> None:
    def top1(bundle: Bundle) -> float:
        return 90.0 - 5 * len(quantised_blocks(bundle, "fp8"))

    result = export_between_fp16(
        "fp8",
        checkpoint,
        rendered_video,
        tmp_path / "new",
        measure_top1=top1,
        max_drop=5.0,
    )
    spec = result.bundle.manifest.quantization
    assert spec is not None
    assert (spec.unquantized_value, spec.quantized_value) == (90.0, 85.0)
    assert len(spec.unquantized_blocks) == 2
    graph = onnx.load(result.bundle.graph_path("visual")).graph
    kept = {t.name: t.data_type for t in graph.initializer}
    for block in spec.unquantized_blocks:
        assert kept[f"tower.{block}.mlp.up.weight"] == onnx.TensorProto.FLOAT16


def test_a_fp8_bound_that_cannot_be_kept_points_to_fp16(
    checkpoint: Path,
    rendered_video: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ExportError, match=r"No choice of fp8 .* cosine to fp16 .*--precision fp16"):
        export_between_fp16(
            "fp8",
            checkpoint,
            rendered_video,
            tmp_path / "new",
            min_cosine=1 - 1e-9,
        )
    assert list(tmp_path.iterdir()) == []


def test_fp8_without_calibration_videos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp8 needs calibration videos, .*the precision fp16"):
        export_checkpoint("x.pt", tmp_path / "new", precision="fp8")


def test_a_fp32_manifest_says_nothing_about_quantization(tiny_bundle: Path) -> None:
    assert "quantization" not in json.loads((tiny_bundle / "manifest.json").read_text())


@pytest.mark.parametrize("prompt", ["joint", "shift"])
def test_prompts_that_mix_frames_have_their_video_graph_in_int8(
    prompt: str, config: ModelConfig, rendered_video: Path, tmp_path: Path
) -> None:
    mixing = config.with_visual_prompt(prompt, num_frames=3)
    save_original_checkpoint(build_model(mixing, seed=2), tmp_path / "mixing-3f.pt")
    options = Int8Options(calibration=(rendered_video,), num_clips=2)
    result = export_checkpoint(
        tmp_path / "mixing-3f.pt", tmp_path / "new", precision="int8", int8=options
    )
    precisions = {name: spec.precision for name, spec in result.bundle.manifest.graphs.items()}
    assert precisions == {"video": "int8", "textual": "fp32"}
    with OrtRuntime(result.bundle) as runtime:
        verify_bundle(result.bundle, runtime).check()


def test_a_drop_within_the_bound_leaves_all_blocks_in_int8(
    checkpoint: Path, tmp_path: Path
) -> None:
    measured: list[str] = []

    def top1(bundle: Bundle) -> float:
        measured.append("fp32" if not int8_blocks(bundle) else "int8")
        return 90.0 if measured[-1] == "fp32" else 89.5

    result = export_measured(checkpoint, tmp_path / "new", top1, max_drop=0.5)
    assert measured == ["fp32", "int8"]
    spec = result.bundle.manifest.quantization
    assert spec is not None
    assert (spec.accepted_by, spec.bound) == ("top1", 0.5)
    assert (spec.unquantized_value, spec.quantized_value, spec.unquantized_blocks) == (
        90.0,
        89.5,
        (),
    )


def test_blocks_go_back_to_fp32_in_the_order_of_their_harm_until_the_bound_is_kept(
    checkpoint: Path, tmp_path: Path
) -> None:
    tried: list[set[str]] = []

    def top1(bundle: Bundle) -> float:
        tried.append(int8_blocks(bundle))
        return {3: 80.0, 2: 85.0, 1: 89.9, 0: 90.0}[len(tried[-1])]

    result = export_measured(checkpoint, tmp_path / "new", top1)
    assert [len(blocks) for blocks in tried] == [0, 3, 2, 1]
    assert result.quantization is not None
    by_harm = sorted(result.quantization.sensitivities, key=lambda row: row.error.sqnr_db)
    assert tried[2] == {row.block for row in by_harm[1:]}
    assert tried[3] == {by_harm[2].block} == int8_blocks(result.bundle)
    spec = result.quantization.spec
    assert set(spec.unquantized_blocks) == {row.block for row in by_harm[:2]}
    assert spec.quantized_blocks == (by_harm[2].block,)
    assert [trial.value for trial in result.quantization.trials] == [80.0, 85.0, 89.9]


def test_a_bound_that_cannot_be_kept_is_an_error_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path
) -> None:
    def top1(bundle: Bundle) -> float:
        return 70.0 - 10 * len(int8_blocks(bundle))

    message = (
        r"No choice of int8 blocks keeps the bound: top-1 falls from 70\.00% to 60\.00% at best, "
        r".*a drop of at most 2\.5 points was asked for; give .*--precision fp32"
    )
    with pytest.raises(ExportError, match=message):
        export_measured(checkpoint, tmp_path / "new", top1, max_drop=2.5)
    assert list(tmp_path.iterdir()) == []


def test_a_cosine_that_cannot_be_kept_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    options = Int8Options(min_cosine=1 - 1e-9)
    with pytest.raises(ExportError, match=r"cosine to fp32 is 0\.99.* at best.*--evaluate"):
        export_checkpoint(checkpoint, tmp_path / "new", precision="int8", int8=options)
    assert list(tmp_path.iterdir()) == []


def test_an_accuracy_that_cannot_be_measured_leaves_the_old_bundle(
    dynamic: ExportResult, checkpoint: Path, tmp_path: Path
) -> None:
    def top1(bundle: Bundle) -> float:
        raise ExportError("no video today")

    old = Bundle.open(shutil.copytree(dynamic.bundle.path, tmp_path / "new"))
    options = Int8Options(measure_top1=top1)
    with pytest.raises(ExportError, match="no video today"):
        export_checkpoint(checkpoint, old.path, precision="int8", int8=options, overwrite=True)
    assert list(tmp_path.iterdir()) == [old.path]
    assert Bundle.open(old.path, check_hashes=True).manifest == old.manifest


def test_int8_options_without_int8_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 options were given and precision is fp16"):
        export_checkpoint("x.pt", tmp_path / "new", precision="fp16", int8=Int8Options())


def test_the_error_of_features_is_what_a_loop_gives() -> None:
    generator = np.random.default_rng(1)
    reference = generator.normal(size=(5, 7)).astype(np.float32)
    features = reference + generator.normal(size=(5, 7)).astype(np.float32) * 0.01
    error = feature_error(features, reference)
    signal = sum(float(v) ** 2 for v in reference.ravel())
    noise = sum(
        (float(a) - float(b)) ** 2 for a, b in zip(features.flat, reference.flat, strict=True)
    )
    assert error.sqnr_db == pytest.approx(10 * np.log10(signal / noise), rel=1e-6)
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(features, reference, strict=True)
    ]
    assert error.min_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert feature_error(reference, reference).sqnr_db == float("inf")
