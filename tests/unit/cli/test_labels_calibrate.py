"""`actionclip labels calibrate` with a runtime in numpy and videos of one colour."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.command_records import CalibratedBankRecord, LabelBankDescription
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.motions import write_video

LABELS = ("an", "in", "and")
ALL_LABELS = ("an", "in", "and", "an and", "in an")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    for name in ("options", "labels"):
        module = import_module(f"actionclip_deploy.cli.{name}")
        monkeypatch.setattr(
            module, "open_runtime", lambda bundle, *_, **__: FakeRuntime(bundle.manifest)
        )
    opened = write_fake_bundle(tmp_path / "bundle", scale=5.0)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    arguments = ("labels", "build", opened.path, "--labels", labels, "--name", "mine")
    assert run(*arguments).exit_code == 0
    return opened


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A list of 15 videos, three of each of five labels; the bank has three of the five."""
    (tmp_path / "all.txt").write_text("\n".join(ALL_LABELS))
    lines = []
    for number in range(15):
        path = tmp_path / "videos" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        frames = np.full((6, 48, 48, 3), 16 * number + 9, np.uint8)
        write_video(path, frames, codec="mpeg4")
        lines.append(f"videos/{path.name} {number % 5}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path / "list.txt"


def calibrate(bundle: Bundle, videos: Path, *options: object) -> Result:
    verb = ("labels", "calibrate", bundle.path, "--name", "mine", "--annotations", videos)
    return run(*verb, "--labels", videos.with_name("all.txt"), *options)


def test_the_fit_is_printed_and_stored_with_the_bank(bundle: Bundle, videos: Path) -> None:
    before = LabelBank.load(bundle, "mine")
    result = calibrate(bundle, videos, "--keep", "0.8", "--json")
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    check_json(CalibratedBankRecord, printed)
    bank = LabelBank.load(bundle, "mine")
    assert bank.calibration is not None
    shown = json.loads(run("labels", "show", bundle.path, "mine", "--json").stdout)
    check_json(LabelBankDescription, shown)
    assert shown["calibration"] == dataclasses.asdict(bank.calibration)
    assert "unknown below" in run("labels", "show", bundle.path, "mine").stdout
    assert dataclasses.asdict(bank.calibration).items() <= printed.items()
    assert (printed["num_known"], printed["num_unknown"]) == (9, 6)
    assert printed["kept_known"] >= 0.8
    assert printed["bank_sha256"] == bank.sha256 != before.sha256
    np.testing.assert_array_equal(bank.embeddings, before.embeddings)
    assert "9 known videos are few" in sentence(result)


def test_predict_answers_by_the_fit(bundle: Bundle, videos: Path) -> None:
    files = sorted((videos.parent / "videos").iterdir(), key=lambda path: int(path.stem))
    plain = run("predict", bundle.path, *files, "--json")
    assert json.loads(plain.stdout.splitlines()[0])["answer"] is None
    report = json.loads(calibrate(bundle, videos, "--keep", "0.6", "--json").stdout)
    result = run("predict", bundle.path, *files, "--json")
    kept = {True: 0, False: 0}
    for line in map(json.loads, result.stdout.splitlines()):
        answer = line["answer"]
        assert answer["is_unknown"] == (answer["score"] < answer["threshold"])
        assert answer["threshold"] == report["threshold"]
        expected = None if answer["is_unknown"] else line["predictions"][0]["label"]
        assert answer["label"] == expected
        is_known = int(Path(line["video"]).stem) % 5 < 3
        kept[is_known] += not answer["is_unknown"]
    assert kept[True] / 9 == pytest.approx(report["kept_known"])
    assert 1 - kept[False] / 6 == pytest.approx(report["rejected_unknown"])
    assert 0 < kept[True] < 9
    table = run("predict", bundle.path, *files)
    assert table.stdout.count("unknown, none of these") == 15 - sum(kept.values())


def test_no_answer_is_given_for_other_scores(bundle: Bundle, videos: Path) -> None:
    assert calibrate(bundle, videos).exit_code == 0
    verb = ("predict", bundle.path, videos.parent / "videos" / "0.mp4", "--json")
    assert json.loads(run(*verb).stdout)["answer"] is not None
    assert json.loads(run(*verb, "--scores", "independent").stdout)["answer"] is None


def test_a_table_says_what_is_kept_and_rejected(bundle: Bundle, videos: Path) -> None:
    result = calibrate(bundle, videos)
    assert result.exit_code == 0, result.output
    assert "known videos kept" in result.stdout
    assert "100.0% of 9" in result.stdout  # 0.95 of 9 are all of them
    assert "of 6" in result.stdout
    assert "calibration error after" in result.stdout
    listed = run("labels", "list", bundle.path)
    assert "calibrated" in listed.stdout


def test_a_bank_may_be_calibrated_again_and_built_again_without(
    bundle: Bundle, videos: Path
) -> None:
    assert calibrate(bundle, videos).exit_code == 0
    first = LabelBank.load(bundle, "mine").sha256
    assert calibrate(bundle, videos, "--keep", "0.5").exit_code == 0
    assert LabelBank.load(bundle, "mine").sha256 != first
    labels = videos.with_name("labels.txt")
    verb = ("labels", "build", bundle.path, "--labels", labels, "--name", "mine", "--overwrite")
    assert run(*verb).exit_code == 0
    assert LabelBank.load(bundle, "mine").calibration is None


def test_known_videos_alone_are_enough(bundle: Bundle, videos: Path) -> None:
    lines = videos.read_text().splitlines(keepends=True)
    videos.write_text("".join(line for line in lines if int(line.split()[1]) < 3))
    verb = ("labels", "calibrate", bundle.path, "--name", "mine", "--annotations", videos)
    report = json.loads(run(*verb, "--json").stdout)
    assert report["rejected_unknown"] is None
    assert "no such videos" in run(*verb).stdout


def test_a_video_that_fails_is_left_out_with_exit_code_3(bundle: Bundle, videos: Path) -> None:
    (videos.parent / "videos" / "4.mp4").write_bytes(b"")
    result = calibrate(bundle, videos, "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert report["num_unknown"] == 5
    assert "is empty" in report["failed"][0]["error"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--keep", "0"), "--keep is 0.0; it must be above 0 and at most 1"),
        (("--keep", "2"), "--keep is 2.0; it must be above 0 and at most 1"),
        (("--scores", "independent"), "choose --scores template-softmax or mean-embedding"),
        (("--views", "10x2"), "num_crops is 2"),
    ],
)
def test_wrong_options_are_usage_errors(
    bundle: Bundle, videos: Path, options: tuple[str, ...], problem: str
) -> None:
    result = calibrate(bundle, videos, *options)
    assert result.exit_code == 2
    assert problem in sentence(result)
    assert LabelBank.load(bundle, "mine").calibration is None


def test_a_list_without_known_videos_is_refused_before_any_is_decoded(
    bundle: Bundle, videos: Path
) -> None:
    videos.write_text("nowhere.mp4 3\nnowhere.mp4 4\n")
    result = calibrate(bundle, videos)
    assert result.exit_code == 2
    assert "None of the videos shows a label of the bank 'mine'" in sentence(result)


def test_videos_of_several_labels_are_refused(bundle: Bundle, videos: Path) -> None:
    videos.write_text("id,actions\n0,0 0.0 1.0;1 0.0 1.0\n")
    result = calibrate(bundle, videos, "--format", "multi-label")
    assert result.exit_code == 2
    assert "give videos of one label each" in sentence(result)


def test_a_label_that_the_list_numbers_and_nobody_has_is_named(
    bundle: Bundle, videos: Path
) -> None:
    videos.write_text("videos/0.mp4 7\n")
    result = calibrate(bundle, videos)
    assert result.exit_code == 1
    assert "give the label file that belongs to this list" in sentence(result)


def test_a_bank_that_is_built_again_meanwhile_keeps_its_new_labels(
    bundle: Bundle, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("actionclip_deploy.cli.labels")
    evaluate = module.evaluate_with_progress
    more = videos.with_name("more.txt")
    more.write_text("an\nin\nand\nan in\n")
    verb = ("labels", "build", bundle.path, "--labels", more, "--name", "mine", "--overwrite")

    def evaluate_late(*arguments: Any, **options: Any) -> Any:
        assert run(*verb).exit_code == 0
        return evaluate(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_with_progress", evaluate_late)
    result = calibrate(bundle, videos)
    assert result.exit_code == 1
    assert "The label bank 'mine' was changed by another program" in sentence(result)
    bank = LabelBank.load(bundle, "mine")
    assert (bank.labels, bank.calibration) == (("an", "in", "and", "an in"), None)


def test_a_bank_that_is_calibrated_while_it_is_built_keeps_the_calibration(
    bundle: Bundle, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = LabelBank.build.__func__  # type: ignore[attr-defined]

    def build_late(*arguments: Any, **options: Any) -> Any:
        assert calibrate(bundle, videos).exit_code == 0
        return build(LabelBank, *arguments, **options)

    monkeypatch.setattr(LabelBank, "build", build_late)
    given = ("--labels", videos.with_name("labels.txt"), "--name", "mine", "--overwrite")
    result = run("labels", "build", bundle.path, *given)
    assert result.exit_code == 1
    assert "was changed by another program" in sentence(result)
    assert LabelBank.load(bundle, "mine").calibration is not None


def test_labels_of_the_list_may_be_in_another_unicode_form(bundle: Bundle, videos: Path) -> None:
    videos.with_name("all.txt").write_text("An\n&#105;n\nAND\nan and\nin an\n")
    result = calibrate(bundle, videos, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num_known"] == 9
