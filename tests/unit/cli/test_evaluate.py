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
from actionclip_deploy.records import TimelineEvaluationRecord
from actionclip_deploy.runtimes import open_runtime

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

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
    bare = run_json(bundle.path, videos, "--labels", "mine", "--label-only")
    refused = run(bundle.path, videos, "--labels", "mine", "--template", "no such {}")

    assert report["num_labels"] == 3
    assert (report["num_templates"], bare["num_templates"]) == (16, 1)
    assert refused.exit_code == 1
    assert "The label bank 'mine' has no template 'no such {}'; choose" in refused.stderr


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
        (("--runtime", "tensorflow"), "it must be one of auto, onnxruntime, openvino"),
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


@pytest.fixture
def class_folder(tmp_path: Path, rendered_video: Path) -> Path:
    folder = tmp_path / "classes"
    for name in ("abseiling", "arm_wrestling"):
        (folder / name).mkdir(parents=True)
        shutil.copy(rendered_video, folder / name / "clip.mp4")
    (folder / "arm_wrestling" / "notes.txt").touch()
    return folder


def test_a_folder_of_videos_for_each_label_gives_what_a_list_gives(
    tiny_bundle: Path, class_folder: Path, labels: Path
) -> None:
    listed = class_folder / "list.txt"
    listed.write_text("abseiling/clip.mp4 0\narm_wrestling/clip.mp4 1\n")
    same = ("--labels", labels, "--runtime", "onnxruntime")
    of_list = run_json(tiny_bundle, listed, *same)
    of_folder = run_json(tiny_bundle, class_folder, *same)
    for report in (of_list, of_folder):
        del report["annotations"], report["seconds"]
    assert of_folder == of_list
    told = run(tiny_bundle, class_folder, "--labels", labels)
    assert "warning: " in told.stderr
    assert "left out: 'arm_wrestling/notes.txt'." in told.stderr


def test_without_a_bank_the_labels_are_the_names_of_the_folders(
    tiny_bundle: Path, class_folder: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle", dirs_exist_ok=True)
    shutil.rmtree(bundle / "labels", ignore_errors=True)
    output = tmp_path / "out.json"
    report = run_json(bundle, class_folder, "--output", output)
    assert (report["num_labels"], report["labels"]) == (2, str(class_folder))
    per_class = json.loads(output.read_text())["per_class"]
    assert [row["label"] for row in per_class] == ["abseiling", "arm wrestling"]
    with open_runtime(Bundle.open(bundle)) as runtime:
        opened = Bundle.open(bundle)
        LabelBank.build(opened, runtime, LABELS, name="mine").save(opened)
    report = run_json(bundle, class_folder)
    assert (report["num_labels"], report["labels"]) == (3, "mine")


def test_a_folder_of_no_label_is_named(tiny_bundle: Path, class_folder: Path, labels: Path) -> None:
    (class_folder / "abseiling").rename(class_folder / "skiing")
    result = run(tiny_bundle, class_folder, "--labels", labels)
    assert result.exit_code == 1
    assert "has videos in 'skiing', which is not among the 3 labels" in result.stderr


def test_videos_of_more_pixels_than_are_allowed_fail(
    tiny_bundle: Path, videos: Path, labels: Path
) -> None:
    result = run(tiny_bundle, videos, "--labels", labels, "--max-pixels", 100)
    assert result.exit_code == 1
    assert "they may have 100 pixels" in result.stderr
    assert "--max-pixels" in result.stderr


# Long videos.


@pytest.fixture
def long_videos(tmp_path: Path, rendered_video: Path) -> Path:
    """Annotated intervals of two videos of four seconds, and the label file beside it."""
    for name in ("first.mp4", "second.mp4"):
        shutil.copy(rendered_video, tmp_path / name)
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    path = tmp_path / "intervals.csv"
    path.write_text("first.mp4,abseiling,0,2\nfirst.mp4,Arm_Wrestling,1,3.5\nsecond.mp4,,,\n")
    return path


def test_events_of_long_videos_are_measured(tiny_bundle: Path, long_videos: Path) -> None:
    labels, output = long_videos.with_name("labels.txt"), long_videos.with_name("all.json")
    words = (tiny_bundle, long_videos, "--labels", labels, "--timeline")
    # Three labels share a score of 1, so one of them is always above 0.33.
    words = (*words, "--window", "2", "--threshold", "0.33")

    printed = run_json(*words, "--output", output)

    written = json.loads(output.read_text())
    assert printed.items() <= written.items()
    TimelineEvaluationRecord.model_validate(written)
    assert (printed["num_videos"], printed["num_intervals"]) == (2, 2)
    assert (printed["num_labels"], printed["num_shown_labels"]) == (3, 2)
    assert printed["hours"] == pytest.approx(8 / 3600)
    assert (printed["window_seconds"], printed["stride_seconds"]) == (2.0, 2.0 / 8)
    assert printed["threshold"] == 0.33
    first, second = written["videos"]
    # The same pictures give the same events, whatever is annotated.
    assert first["events"] == second["events"] != []
    assert first["live_events"] == second["live_events"] != []
    assert [each["label"] for each in first["intervals"]] == ["abseiling", "arm wrestling"]
    assert second["intervals"] == []
    shown = {each["label"] for each in first["intervals"]}
    of_shown = [each for each in first["live_events"] if each["label"] in shown]
    num_events = len(first["live_events"]) + len(second["live_events"])
    assert printed["num_events"] == num_events
    assert printed["num_false"] >= num_events - len(of_shown)
    assert [each["label"] for each in written["per_label"]] == list(LABELS)


def test_the_table_of_long_videos_fits_a_terminal(tiny_bundle: Path, long_videos: Path) -> None:
    labels = long_videos.with_name("labels.txt")
    words = ["evaluate", tiny_bundle, long_videos, "--labels", labels, "--timeline"]
    result = CliRunner().invoke(
        app, [*map(str, words), "--window", "2", "--threshold", "0.33"], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("mAP, tIoU 0.3 to 0.7" in line for line in lines)
    assert any("windows" in line and "2 s, every 0.25 s" in line for line in lines)
    assert any("Labels by AP, lowest first, of 2" in line for line in lines)


def test_a_guessed_threshold_is_told(tiny_bundle: Path, long_videos: Path) -> None:
    result = run(
        tiny_bundle, long_videos, "--labels", long_videos.with_name("labels.txt"), "--timeline"
    )
    assert result.exit_code == 0, result.output
    assert "is a guess" in " ".join(result.stderr.split())


def test_a_long_video_that_fails_is_reported_with_exit_code_3(
    tiny_bundle: Path, long_videos: Path
) -> None:
    with long_videos.open("a") as file:
        file.write("gone.mp4,yoga,0,1\n")
    labels = long_videos.with_name("labels.txt")
    words = (tiny_bundle, long_videos, "--labels", labels, "--timeline", "--threshold", "0.5")

    report = run_json(*words, exit_code=3)

    assert (report["num_videos"], report["num_failed"]) == (2, 1)
    assert report["failed"][0]["video"].endswith("gone.mp4")
    assert report["num_shown_labels"] == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--timeline", "--views", "2x1"), "--views does not go with --timeline"),
        (("--timeline", "--plot", "a.png"), "--plot does not go with --timeline"),
        (("--window", "2"), "--window goes with --timeline alone"),
        (("--threshold", "0.5"), "--threshold goes with --timeline alone"),
        (("--timeline", "--threshold", "0"), "it must be above 0"),
        (("--timeline", "--window", "0"), "--window is 0; it must be above 0"),
        (("--timeline", "--stride", "0.3"), "--stride is 0.3"),
        (("--timeline", "--format", "videos"), "one of auto, activitynet, thumos, csv"),
    ],
)
def test_options_of_clips_and_of_long_videos_do_not_mix(
    tiny_bundle: Path, long_videos: Path, options: tuple[str, ...], problem: str
) -> None:
    result = run(
        tiny_bundle, long_videos, "--labels", long_videos.with_name("labels.txt"), *options
    )
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


def test_a_wrong_interval_is_an_error_that_names_its_line(
    tiny_bundle: Path, long_videos: Path
) -> None:
    long_videos.write_text("first.mp4,yoga,2,1\n")
    result = run(
        tiny_bundle, long_videos, "--labels", long_videos.with_name("labels.txt"), "--timeline"
    )
    assert result.exit_code == 1
    assert "intervals.csv line 1 has an interval from 2 to 1 seconds" in result.stderr
