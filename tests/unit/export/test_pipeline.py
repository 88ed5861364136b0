from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_models import tiny_model_config

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    BundleError,
    CheckpointError,
    ExportError,
    LabelError,
    ParityError,
)
from actionclip_deploy.export import ExportResult, export_checkpoint, pipeline
from actionclip_deploy.export.graphs import GraphPlan
from actionclip_deploy.export.pipeline import open_checkpoint
from actionclip_deploy.known_words import read_vocabulary
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint
from actionclip_deploy.prompts import LABEL_ONLY, TEMPLATES
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden, verify_bundle
from actionclip_deploy.runtimes.pyt import TorchRuntime
from actionclip_deploy.tokenizer import NUM_TOKENS


@pytest.fixture(scope="module")
def tiny_config() -> ModelConfig:
    return tiny_model_config(vision_layers=1)


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-3f.pt"
    save_original_checkpoint(build_model(tiny_config, seed=1), path)
    return path


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportResult, list[str]]:
    """What exporting the tiny checkpoint gave, and the steps that it told."""
    steps: list[str] = []
    output = tmp_path_factory.mktemp("exported") / "tiny"
    return export_checkpoint(tiny_checkpoint, output, on_step=steps.append), steps


@pytest.fixture
def copied(exported: tuple[ExportResult, list[str]], tmp_path: Path) -> Bundle:
    """A copy of the exported bundle, alone in its folder, to be replaced."""
    return Bundle.open(shutil.copytree(exported[0].bundle.path, tmp_path / "new"))


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the checkpoint was loaded")

    monkeypatch.setattr(pipeline, "load_checkpoint", load)


@pytest.mark.parametrize("known", [None, [0, 5, 6, 320, 49406, 49407]])
def test_tokens_whose_rows_are_zero_are_not_known(
    tiny_config: ModelConfig, tmp_path: Path, known: list[int] | None
) -> None:
    model = build_model(replace(tiny_config, vocab_size=NUM_TOKENS), seed=1)
    if known is not None:
        table = model.towers.token_embedding.weight.data
        left_out = np.delete(np.arange(NUM_TOKENS), known)
        table[left_out] = 0
    save_original_checkpoint(model, tmp_path / "small-3f.pt")
    with open_checkpoint(tmp_path / "small-3f.pt") as (bundle, _):
        vocabulary = read_vocabulary(bundle)
        if known is None:
            assert vocabulary is None
        else:
            assert vocabulary is not None
            assert np.flatnonzero(vocabulary.is_known).tolist() == known


def test_a_bundle_holds_what_its_manifest_says(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=True)
    found = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert found == {"manifest.json", *bundle.manifest.files}
    assert found == {
        "manifest.json",
        "visual.onnx",
        "temporal.onnx",
        "textual.onnx",
        "tokenizer.json",
        "golden/golden.safetensors",
        "golden/golden.json",
        "reports/parity.json",
    }


def test_the_manifest_describes_the_model_and_its_source(
    tiny_bundle: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.model.visual_prompt == "transf"
    assert (manifest.model.num_frames, manifest.model.max_frames) == (8, 77)
    assert not manifest.model.fixed_num_frames
    assert (manifest.model.input_size, manifest.model.embedding_dim) == (64, 64)
    # 64 * 256 / 224 pixels, as the original computes it.
    assert manifest.preprocessing.resize_size == 73
    assert manifest.templates == TEMPLATES
    assert manifest.scores.scale == 100
    assert manifest.source.family == "original"
    assert manifest.source.file == tiny_checkpoints["Transf"].name
    assert manifest.source.num_frames_from == "file name"
    assert {"torch", "onnx", "onnxruntime", "actionclip-deploy"} <= manifest.versions.keys()
    assert manifest.licence is None


def test_the_tensor_specs_are_those_of_the_files(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for name, spec in bundle.manifest.graphs.items():
        graph = onnx.load(bundle.graph_path(name)).graph
        for value, wanted in ((graph.input, spec.input), (graph.output, spec.output)):
            (tensor,) = value
            sizes = [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
            assert (tensor.name, tuple(sizes)) == (wanted.name, wanted.shape)


def test_the_parity_report_is_in_the_bundle(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "reports/parity.json").read_text())
    assert report["passed"] is True
    assert {c["what"] for c in report["comparisons"]} >= {"visual", "temporal", "textual", "scores"}
    assert {c["batch_size"] for c in report["comparisons"]} > {1, 2, 3}


def test_the_golden_data_is_of_rendered_clips_unless_videos_are_given(
    tiny_bundle: Path, tiny_checkpoint: Path, rendered_video: Path, tmp_path: Path
) -> None:
    assert "rendered" in Golden.load(Bundle.open(tiny_bundle)).origin
    result = export_checkpoint(tiny_checkpoint, tmp_path / "new", golden_videos=[rendered_video])
    assert "square.mp4" in Golden.load(result.bundle).origin


def test_the_steps_are_told(exported: tuple[ExportResult, list[str]]) -> None:
    result, steps = exported
    assert steps[0] == "Loading the checkpoint"
    assert "Writing the visual graph" in steps
    assert result.report.passed
    assert result.checkpoint.num_frames == 3


def test_the_weights_are_let_go_once_they_are_written(
    exported: tuple[ExportResult, list[str]],
) -> None:
    model = exported[0].checkpoint.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.config.embed_dim == 16


def test_an_fp16_bundle_keeps_text_and_its_outputs_in_fp32(tiny_fp16_bundle: Path) -> None:
    bundle = Bundle.open(tiny_fp16_bundle, check_hashes=True)
    precisions = {name: spec.precision for name, spec in bundle.manifest.graphs.items()}
    assert precisions == {"visual": "fp16", "temporal": "fp16", "textual": "fp32"}
    assert bundle.manifest.precision() == "fp16"
    assert {spec.output.dtype for spec in bundle.manifest.graphs.values()} == {"float32"}
    sizes = [(tiny_fp16_bundle / f"{name}.onnx").stat().st_size for name in ("visual", "temporal")]
    # 505,856 and 304,832 parameters, nearly all of them in two bytes.
    assert sizes[0] < 2.3 * 505_856
    assert sizes[1] < 2.3 * 304_832


def test_text_is_fp16_where_that_is_asked_for(
    exported: tuple[ExportResult, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    single = exported[0].bundle
    half = export_checkpoint(tiny_checkpoint, tmp_path / "new", text_precision="fp16").bundle
    precisions = {name: spec.precision for name, spec in half.manifest.graphs.items()}
    assert precisions == {"visual": "fp32", "temporal": "fp32", "textual": "fp16"}
    sizes = [bundle.graph_path("textual").stat().st_size for bundle in (half, single)]
    assert sizes[0] < 0.6 * sizes[1]
    tokens = Golden.load(single).tokens
    with OrtRuntime(half) as first, OrtRuntime(single) as second:
        np.testing.assert_allclose(first.encode_text(tokens), second.encode_text(tokens), atol=2e-3)


@pytest.mark.parametrize(
    "visual_prompt",
    ["joint", "shift", "shift+transf", "shift+transf_cls", "shift+lstm", "shift+conv1d"],
)
def test_prompts_that_mix_frames_become_one_video_graph(
    visual_prompt: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = tiny_config.with_visual_prompt(visual_prompt, num_frames=3)
    save_original_checkpoint(build_model(config, seed=2), tmp_path / "mixing-3f.pt")
    result = export_checkpoint(tmp_path / "mixing-3f.pt", tmp_path / "new")
    manifest = result.bundle.manifest
    assert set(manifest.graphs) == {"video", "textual"}
    assert manifest.model.fixed_num_frames == (visual_prompt in ("joint", "shift+transf_cls"))
    assert manifest.model.visual_prompt == visual_prompt
    assert Golden.load(result.bundle).frame_features is None
    # Anew, as `actionclip verify` does on another machine, and with other clips than the golden.
    with OrtRuntime(result.bundle) as runtime:
        verify_bundle(result.bundle, runtime).check()
        shape = (2, 3, config.input_size, config.input_size, 3)
        frames = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        found = runtime.encode_video(frames)
    with TorchRuntime.from_bundle(result.bundle, tmp_path / "mixing-3f.pt") as reference:
        np.testing.assert_allclose(found, reference.encode_video(frames), atol=1e-4)


@pytest.mark.usefixtures("traced_anew")
def test_the_same_checkpoint_gives_the_same_bytes(
    exported: tuple[ExportResult, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first, second = exported[0].bundle, export_checkpoint(tiny_checkpoint, tmp_path / "new").bundle
    for name in first.manifest.files:
        # The report tells what a run of threads measured, which may differ in a last digit.
        if not name.startswith("reports/"):
            assert first.file(name).read_bytes() == second.file(name).read_bytes(), name


def test_a_template_without_a_place_for_the_label_is_an_error(
    no_loading: None, tmp_path: Path
) -> None:
    with pytest.raises(LabelError, match="a photo"):
        export_checkpoint("tiny.pt", tmp_path / "new", templates=["a photo"])


def test_a_precision_that_does_not_exist_is_an_error(no_loading: None, tmp_path: Path) -> None:
    message = r"precision is 'int4'; it must be one of fp32, fp16, int8"
    with pytest.raises(ValueError, match=message):
        export_checkpoint("tiny.pt", tmp_path / "new", precision="int4")


def test_text_is_not_quantised(no_loading: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_precision is 'int8'; it must be one of fp32, fp16"):
        export_checkpoint("tiny.pt", tmp_path / "new", text_precision="int8")


def test_an_existing_folder_is_refused_before_any_work(no_loading: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"not replaced even with --overwrite"):
        export_checkpoint("tiny.pt", tmp_path, overwrite=True)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(BundleError, match=r"exists already; .*--overwrite"):
        export_checkpoint("tiny.pt", tmp_path)


def test_an_existing_bundle_is_replaced_if_asked(copied: Bundle, tiny_checkpoint: Path) -> None:
    assert copied.manifest.templates == TEMPLATES
    export_checkpoint(tiny_checkpoint, copied.path, templates=LABEL_ONLY, overwrite=True)
    assert Bundle.open(copied.path, check_hashes=True).manifest.templates == LABEL_ONLY
    assert list(copied.path.parent.iterdir()) == [copied.path]


def test_a_graph_that_disagrees_is_named_and_nothing_is_left(
    exported: tuple[ExportResult, list[str]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = pipeline.write_graph

    def write_wrong(plan: GraphPlan, path: Path) -> None:
        def build() -> Any:
            module: Any = plan.build()
            module.tower.projection.weight.data *= 1.01
            return module

        if plan.name == "visual":
            write(replace(plan, build=build), path)
        else:
            shutil.copy(exported[0].bundle.graph_path(plan.name), path)

    monkeypatch.setattr(pipeline, "write_graph", write_wrong)
    message = r"first in visual at batch size 1: max abs difference .*, allowed"
    with pytest.raises(ParityError, match=message) as caught:
        export_checkpoint(tiny_checkpoint, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    failed = [c for c in caught.value.report.comparisons if not c.passed]
    assert failed
    assert np.isfinite(failed[0].max_abs_difference)


def test_a_failed_export_leaves_the_old_bundle_as_it_was(
    copied: Bundle, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: GraphPlan, path: Path) -> None:
        raise ExportError(f"no {plan.name} graph today")

    monkeypatch.setattr(pipeline, "write_graph", refuse)
    with pytest.raises(ExportError, match="no visual graph today"):
        export_checkpoint(tiny_checkpoint, copied.path, overwrite=True)
    assert list(copied.path.parent.iterdir()) == [copied.path]
    assert Bundle.open(copied.path, check_hashes=True).manifest == copied.manifest


def test_a_checkpoint_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.pt"):
        export_checkpoint(tmp_path / "missing.pt", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_is_not_clips_is_an_error(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, vocab_size=50)
    save_original_checkpoint(build_model(config, seed=1), tmp_path / "small-3f.pt")
    with pytest.raises(ExportError, match=r"has 50 rows, .* 49408 tokens"):
        export_checkpoint(tmp_path / "small-3f.pt", tmp_path / "new")


def test_text4vis_at_336_pixels_has_no_margin_around_its_crop(tiny_checkpoint: Path) -> None:
    loaded = pipeline.load_checkpoint(tiny_checkpoint)
    large = replace(loaded.model.config, input_size=336)
    loaded.model.config = large
    assert pipeline._resize_size(loaded) == 384
    assert pipeline._resize_size(replace(loaded, family="text4vis")) == 336
