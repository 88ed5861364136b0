"""`actionclip export` in int8 and fp8, from the command line to a verified bundle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from schemas import check_json
from typer.testing import CliRunner, Result

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.cli.export import TopOne
from actionclip_deploy.command_records import ExportRecord, InspectionRecord
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.video import MAX_PIXELS

LABELS = ("abseiling", "arm wrestling", "yoga")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def videos(tmp_path: Path, rendered_video: Path) -> Path:
    """A folder with three videos, their list and the labels."""
    folder = tmp_path / "videos"
    folder.mkdir()
    lines = []
    for number, label in enumerate(LABELS):
        shutil.copy(rendered_video, folder / f"clip{number}.mp4")
        lines.append(f"clip{number}.mp4 {label}\n")
    (folder / "list.txt").write_text("".join(lines))
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    return folder


@pytest.fixture
def checkpoint(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["Transf"]


def export(checkpoint: Path, output: Path, *arguments: object) -> Result:
    return run("export", checkpoint, "--output", output, "--precision", "int8", *arguments)


def test_an_export_judged_by_accuracy_says_what_it_measured(
    checkpoint: Path, videos: Path, tmp_path: Path
) -> None:
    judged = ("--evaluate", videos / "list.txt", "--labels", videos / "labels.txt")
    result = export(checkpoint, tmp_path / "new", "--calibration", videos, *judged)
    assert result.exit_code == 0, result.output
    assert "Each block alone in int8 (static, reduced weights)" in result.stdout
    # All three videos are the same, so one of the labels is right.
    assert "top-1 33.33% in fp32 and 33.33% in int8, largest drop 0.5 points" in result.stdout
    assert "Blocks that stay fp32: none" in result.stdout
    assert "int8)." in result.stdout


def test_the_json_has_the_quantization_and_inspect_shows_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = export(checkpoint, tmp_path / "new", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    check_json(ExportRecord, printed)
    assert printed["quantization"]["recipe"] == "dynamic"
    assert len(printed["quantization"]["sensitivity"]) >= 2
    assert printed["manifest"]["quantization"]["accepted_by"] == "cosine"
    shown = json.loads(run("inspect", tmp_path / "new", "--json").stdout)
    check_json(InspectionRecord, shown)
    assert shown["quantization"] == printed["manifest"]["quantization"]
    assert "last_block" in run("inspect", tmp_path / "new").stdout
    assert run("verify", tmp_path / "new").exit_code == 0


def test_a_broken_calibration_video_is_a_warning(
    checkpoint: Path, videos: Path, tmp_path: Path
) -> None:
    (videos / "clip1.mp4").write_bytes(b"broken")
    result = export(checkpoint, tmp_path / "new", "--calibration", videos)
    assert result.exit_code == 0, result.output
    assert "warning:" in result.stderr
    assert "clip1.mp4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "1"], "--max-drop needs --evaluate ANNOTATIONS"),
        (["--labels", "labels.txt"], "--labels needs --evaluate"),
        (["--root", "."], "--root needs --evaluate"),
        (["--evaluate", "list.txt"], "--evaluate needs --labels FILE"),
        (["--calibration-clips", "4"], "--calibration-clips needs --calibration"),
        (["--int8-recipe", "static"], "The recipe static needs calibration videos"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = export(tmp_path / "tiny.pt", tmp_path / "new", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "arguments", "wanted"),
    [
        ("fp32", ["--calibration", "videos"], "int8 or fp8"),
        ("fp16", ["--max-drop", "1"], "int8 or fp8"),
        ("fp32", ["--evaluate", "list.txt"], "int8 or fp8"),
        ("fp32", ["--int8-weights", "full"], "int8"),
        ("fp8", ["--int8-recipe", "dynamic"], "int8"),
        ("fp8", ["--int8-rest", "fp16"], "int8"),
    ],
)
def test_options_of_another_precision_are_wrong_usage(
    precision: str, arguments: list[str], wanted: str, tmp_path: Path
) -> None:
    asked = ("--precision", precision)
    result = run("export", tmp_path / "tiny.pt", "--output", tmp_path / "new", *asked, *arguments)
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    expected = f"{arguments[0]} is for --precision {wanted} and the precision is {precision}; leave"
    assert expected in words


def test_fp8_without_calibration_videos_is_wrong_usage(tmp_path: Path) -> None:
    result = run("export", tmp_path / "t.pt", "--output", tmp_path / "new", "--precision", "fp8")
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert "fp8 needs calibration videos, from which it takes its scales; give some" in words


def test_an_export_in_fp8_says_what_it_measured_against_fp16(
    tiny_checkpoints: dict[str, Path], tiny_fp16_bundle: Path, videos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new"
    asked = ("--output", output, "--precision", "fp8", "--calibration", videos)
    result = run("export", tiny_checkpoints["Transf"], *asked)
    assert result.exit_code == 0, result.output
    assert "Each block alone in fp8 (static) against fp16" in result.stdout
    assert "Blocks that stay fp16: none. Accepted: features' cosine to fp16 0.99" in result.stdout
    assert "fp8)." in result.stdout
    assert run("verify", output).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "{}/empty"], "holds no video"),
        (["--calibration", "{}/missing"], "There is no"),
        (["--calibration", "{}/pipe.mp4"], "pipe.mp4 is neither a file nor a folder; give video"),
        (["--calibration", "{}/labels.txt"], "labels.txt is not a video in a format that"),
        (["--evaluate", "{}/list.txt", "--labels", "{}/missing.txt"], "missing.txt"),
        (["--evaluate", "{}/missing.txt", "--labels", "{}/labels.txt"], "missing.txt"),
    ],
)
def test_files_that_cannot_be_used_are_one_sentence_and_nothing_is_left(
    arguments: list[str], message: str, checkpoint: Path, videos: Path, tmp_path: Path
) -> None:
    (videos / "empty").mkdir()
    os.mkfifo(videos / "pipe.mp4")  # who opens it waits for ever
    filled = [argument.format(videos) for argument in arguments]
    result = export(checkpoint, tmp_path / "new", *filled)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert list(tmp_path.iterdir()) == [videos]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--calibration", "{}", "--calibration-clips", "100000000"],
            "--calibration-clips is 100000000; 3 calibration videos and the memory of this machine "
            "allow 3,000 at most",
        ),
        (["--licence", " "], "--licence is empty; name the licence, or leave it out"),
    ],
)
def test_values_that_cannot_be_are_wrong_usage_and_nothing_is_left(
    arguments: list[str], message: str, checkpoint: Path, videos: Path, tmp_path: Path
) -> None:
    result = export(checkpoint, tmp_path / "new", *(text.format(videos) for text in arguments))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == [videos]


def test_top_1_is_the_share_of_videos_whose_label_comes_first(
    tiny_bundle: Path, videos: Path
) -> None:
    samples = read_annotations(videos / "list.txt", LABELS, subset="test")
    (videos / "clip2.mp4").write_bytes(b"broken")
    measure = TopOne(samples, LABELS, Progress(disable=True), MAX_PIXELS)
    shares: list[Any] = [measure(Bundle.open(tiny_bundle)) for _ in range(2)]
    # Of two equal videos with different labels one is right at most; the broken one counts nowhere.
    assert shares[0] in (0.0, 50.0)
    assert shares[0] == shares[1]
