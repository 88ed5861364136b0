"""`actionclip evaluate` with real graphs of the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes import open_runtime

LABELS = ("abseiling", "arm wrestling", "yoga")
# Two runtimes in fp32: what a softmax at scale 100 makes of differences of 1e-6.
TOLERANCE = 1e-4


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})


def run_json(*arguments: object, exit_code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def videos(tmp_path: Path, rendered_video: Path) -> Path:
    """A list of three good videos, and the label file beside it."""
    lines = []
    for number in range(3):
        shutil.copy(rendered_video, tmp_path / f"clip {number}.mp4")
        lines.append(f"clip {number}.mp4 {LABELS[number]}\n")
    path = tmp_path / "list.txt"
    path.write_text("".join(lines))
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    return path


@pytest.fixture
def labels(videos: Path) -> Path:
    return videos.with_name("labels.txt")


def test_a_bundle_and_its_checkpoint_give_the_same_accuracy(
    tiny_bundle: Path, tiny_checkpoints: dict[str, Path], videos: Path, labels: Path
) -> None:
    output = videos.with_name("results.json")

    reports = {}
    for model in (tiny_bundle, tiny_checkpoints["Transf"]):
        printed = run_json(model, videos, "--labels", labels, "--output", output)
        reports[model] = json.loads(output.read_text())
        assert printed.items() <= reports[model].items()

    exported, original = reports.values()
    assert exported["runtime"]["name"] == "onnxruntime"
    assert original["runtime"]["name"] == "torch"
    for key in ("top1", "top5", "mean_class_accuracy", "num_videos", "confusion", "views"):
        assert exported[key] == original[key]
    scores = [[video["score"] for video in r["videos"]] for r in (exported, original)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)
    # All three videos are the same, so one of the labels is right.
    assert exported["top1"] == pytest.approx(1 / 3)
    assert exported["top5"] == 1.0


def test_tables_show_the_measurements(tiny_bundle: Path, videos: Path, labels: Path) -> None:
    result = run(tiny_bundle, videos, "--labels", labels, "--views", "2x3")

    assert result.exit_code == 0, result.output
    assert "top-1" in result.stdout
    assert "33.33%" in result.stdout
    assert "2x3 views, template-softmax" in result.stdout
    assert "arm wrestling" in result.stdout


def test_videos_that_fail_are_reported_with_exit_code_3(
    tiny_bundle: Path, videos: Path, labels: Path
) -> None:
    with videos.open("a") as file:
        file.write("gone.mp4 yoga\n")

    report = run_json(tiny_bundle, videos, "--labels", labels, exit_code=3)

    assert report["num_failed"] == 1
    assert report["failed"][0]["video"].endswith("gone.mp4")
    assert report["num_videos"] == 3


def test_videos_with_several_labels_are_scored_independently(
    tiny_bundle: Path, videos: Path, labels: Path
) -> None:
    table = videos.with_name("table.csv")
    table.write_text("id,actions\nclip 0,c000 0 1;c002 1 2\nclip 1,yoga 0 1\n")

    report = run_json(tiny_bundle, table, "--labels", labels)
    refused = run(tiny_bundle, table, "--labels", labels, "--plot", table.with_suffix(".png"))

    assert report["scores"] == "independent"
    assert 0 < report["mean_average_precision"] <= 1
    assert refused.exit_code == 2
    assert "--plot needs videos of one label each" in refused.stderr


def test_the_confusion_matrix_is_drawn(tiny_bundle: Path, videos: Path, labels: Path) -> None:
    picture = videos.with_name("confusion.png")

    result = run(tiny_bundle, videos, "--labels", labels, "--plot", picture)

    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_label_bank_of_the_bundle_can_stand_for_a_label_file(
    tiny_bundle: Path, videos: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with open_runtime(bundle) as runtime:
        LabelBank.build(bundle, runtime, LABELS, name="mine").save(bundle)

    report = run_json(bundle.path, videos, "--labels", "mine")
    refused = run(bundle.path, videos, "--labels", "mine", "--label-only")

    assert report["num_labels"] == 3
    assert refused.exit_code == 2
    assert "mine has its own templates" in refused.stderr


def test_templates_can_be_chosen(tiny_bundle: Path, videos: Path, labels: Path) -> None:
    assert run_json(tiny_bundle, videos, "--labels", labels)["num_templates"] == 16
    bare = run_json(tiny_bundle, videos, "--labels", labels, "--label-only")
    assert bare["num_templates"] == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--views", "10x2"), "num_crops is 2"),
        (("--format", "csv"), "format is 'csv'; it must be one of auto"),
        (("--label-only", "--templates", "t.txt"), "exclude each other"),
        (("--output", "."), "is ., which is a folder; give a file in it"),
        (("--output", "no/such/folder/a.json"), "is not a folder; make it first"),
        (("--plot", "picture.txt"), "give a file that ends in .png"),
        (("--runtime", "tensorflow"), "it must be one of auto, onnxruntime, tensorrt"),
    ],
)
def test_wrong_options_are_usage_errors(
    tiny_bundle: Path, videos: Path, labels: Path, options: tuple[str, ...], problem: str
) -> None:
    result = run(tiny_bundle, videos, "--labels", labels, *options)

    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--runtime", "onnxruntime"), "a checkpoint runs in torch alone"),
        (("--checkpoint", "other.pt"), "a checkpoint was given already"),
    ],
)
def test_options_of_bundles_do_not_go_with_a_checkpoint(
    tiny_checkpoints: dict[str, Path],
    videos: Path,
    labels: Path,
    options: tuple[str, ...],
    problem: str,
) -> None:
    result = run(tiny_checkpoints["Transf"], videos, "--labels", labels, *options)

    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


def test_a_wrong_list_is_an_error_that_names_its_line(
    tiny_bundle: Path, videos: Path, labels: Path
) -> None:
    videos.write_text("clip 0.mp4 juggling\n")

    result = run(tiny_bundle, videos, "--labels", labels)

    assert result.exit_code == 1
    assert "list.txt line 1 has the label 'juggling'" in result.stderr


@pytest.mark.parametrize("option", [("--family", "openai"), ("--num-frames", "4")])
def test_options_of_checkpoints_do_not_go_with_a_bundle(
    videos: Path, labels: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    (tmp_path / "bundle").mkdir()
    result = run(tmp_path / "bundle", videos, "--labels", labels, *option)
    assert result.exit_code == 2
    assert "say how a checkpoint is read" in result.output
