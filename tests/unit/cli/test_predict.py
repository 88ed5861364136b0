"""`actionclip predict` over folders, into a file, interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app

FILES = ("b.mp4", "a.MKV", "deep/c.avi", ".hidden.mp4", "notes.txt", "deep/.cache/d.mp4")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path: Path, rendered_video: Path) -> Path:
    for name in FILES:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if name.endswith(".txt") else rendered_video.read_bytes())
    return tmp_path / "videos"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    for name in ("options", "labels"):
        module = import_module(f"actionclip_deploy.cli.{name}")
        monkeypatch.setattr(
            module, "open_runtime", lambda bundle, *_, **__: FakeRuntime(bundle.manifest)
        )
    opened = write_fake_bundle(tmp_path / "bundle")
    labels = tmp_path / "labels.txt"
    labels.write_text("an and\nin an\nand\n")
    arguments = ("labels", "build", opened.path, "--labels", labels, "--name", "mine")
    assert run(*arguments).exit_code == 0
    return opened


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What depends on the videos before it in the run.
_OF_THE_RUN = ("timings_ms", "num_frames_encoded", "num_frames_reused")


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in result.items() if k not in _OF_THE_RUN} for result in results]


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_frames_that_were_reused_are_counted(
    bundle: Bundle, folder: Path, tmp_path: Path, verb: str
) -> None:
    def encode(*options: object) -> tuple[str, list[dict[str, Any]]]:
        given = (*(verb, bundle.path, folder), *options)
        told = run(*given, "--output", tmp_path / "new.npz", "--overwrite")
        if verb == "predict":
            told = run(*given)
        printed = run(*given, "--json")
        assert told.exit_code == printed.exit_code == 0, told.output + printed.output
        return " ".join(told.stdout.split()), [json.loads(x) for x in printed.stdout.splitlines()]

    text, (first, second) = encode()
    assert first["num_frames_encoded"] > 0
    assert (second["num_frames_encoded"], second["num_frames_reused"]) == (0, 4)  # it is a copy
    num_reused = first["num_frames_reused"] + 4
    assert f"{first['num_frames_encoded']} frames encoded, {num_reused} reused" in text
    text, (first, second) = encode("--no-reuse")
    assert (second["num_frames_encoded"], second["num_frames_reused"]) == (4, 0)
    assert "reused from" not in text


@pytest.mark.parametrize(
    ("options", "names"),
    [((), ["a.MKV", "b.mp4"]), (("--recursive",), ["a.MKV", "b.mp4", "deep/c.avi"])],
)
def test_a_folder_stands_for_its_videos_sorted(
    bundle: Bundle, folder: Path, options: tuple[str, ...], names: list[str]
) -> None:
    result = run("predict", bundle.path, folder, folder / "b.mp4", "--json", *options)
    assert result.exit_code == 0, result.output
    videos = [json.loads(line)["video"] for line in result.stdout.splitlines()]
    assert videos == [str(folder / name) for name in names]


def test_a_folder_without_videos_says_what_a_video_is(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").touch()
    result = run("predict", bundle.path, folder)
    assert result.exit_code == 2
    assert "holds no video files, which are known by their suffixes (.3gp, .avi" in sentence(result)
    (folder / "deep" / "a.mp4").touch()
    assert "folders in it do; add --recursive" in sentence(run("predict", bundle.path, folder))


def test_each_video_is_a_line_of_the_file(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    bad = folder / "bad.mp4"
    bad.write_bytes(b"")
    result = run("predict", bundle.path, folder, "--output", output)
    assert result.exit_code == 3
    assert "2 of 3 videos scored, 1 failed" in " ".join(result.stdout.split())
    first, second, third = lines(output)
    assert [line["video"] for line in (first, second, third)] == [
        str(folder / name) for name in ("a.MKV", "b.mp4", "bad.mp4")
    ]
    assert first["predictions"] == second["predictions"]  # they are copies
    assert "is empty" in third["error"]["message"]
    assert first["run"]["views"] == "1x1"
    printed = run("predict", bundle.path, folder / "b.mp4", "--json").stdout
    (alone,) = without_times([json.loads(printed)])
    assert alone == {k: v for k, v in without_times([second])[0].items() if k != "run"}


def test_a_file_that_is_there_is_neither_replaced_nor_extended_unasked(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    output.write_text("mine\n")
    result = run("predict", bundle.path, folder, "--output", output)
    assert result.exit_code == 2
    assert "exists; add --resume to go on with it, or --overwrite to replace" in sentence(result)
    assert output.read_text() == "mine\n"
    resumed = run("predict", bundle.path, folder, "--output", output, "--resume")
    assert resumed.exit_code == 1
    assert "Line 1 of" in sentence(resumed)
    assert output.read_text() == "mine\n"
    replaced = run("predict", bundle.path, folder, "--output", output, "--overwrite")
    assert replaced.exit_code == 0
    assert len(lines(output)) == 2


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
@pytest.mark.parametrize("cut", [0, 1, 9, 40])
def test_a_run_goes_on_where_it_was_cut_off(
    bundle: Bundle, folder: Path, tmp_path: Path, keep: int, cut: int
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    command = ("predict", bundle.path, folder, "--recursive", "--output")
    assert run(*command, whole, "--resume").exit_code == 0  # nothing to resume is no error
    complete = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(complete[:keep]) + b"".join(complete[keep:])[:cut])
    result = run(*command, part, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert part.read_bytes().splitlines(keepends=True)[:keep] == complete[:keep]
    assert without_times(lines(part)) == without_times(lines(whole))
    assert len(result.stdout.splitlines()) == 3 - keep  # no work was done twice


def test_a_video_that_failed_is_not_tried_again_and_still_shows_in_the_exit_code(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    (folder / "bad.mp4").write_bytes(b"")
    command = ("predict", bundle.path, folder, "--output", output, "--resume", "--json")
    assert run(*command).exit_code == 3
    again = run(*command)
    assert (again.exit_code, again.stdout) == (3, "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--views", "2x1"), "views '1x1' and this run has '2x1'"),
        (("--top-k", "2"), "top_k 5 and this run has 2"),
        (("--scores", "independent"), "scores 'template-softmax' and this run has 'independent'"),
        (("--resize", "crop"), "resize 'frame' and this run has 'crop'"),
        (("--resize", "swscale"), "resize 'frame' and this run has 'swscale'"),
        (("--labels", "other"), "bank 'mine' and this run has 'other'"),
    ],
)
def test_a_run_with_other_options_is_not_mixed_in(
    bundle: Bundle, folder: Path, tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    output = tmp_path / "results.jsonl"
    labels = ("--labels", tmp_path / "labels.txt", "--name", "other")
    command = ("predict", bundle.path, folder, "--output", output)
    assert run(*command).exit_code == 0
    assert run("labels", "build", bundle.path, *labels).exit_code == 0
    before = output.read_bytes()
    result = run(*command, "--resume", "--labels", "mine", *options)
    assert result.exit_code == 1
    assert text in sentence(result)
    assert output.read_bytes() == before


def test_labels_that_were_built_again_are_another_run(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    command = ("predict", bundle.path, folder, "--output", output, "--resume")
    assert run(*command).exit_code == 0
    labels = tmp_path / "labels.txt"
    labels.write_text("in an\nan and\nand\n")
    words = ("labels", "build", bundle.path, "--labels", labels, "--name", "mine", "--overwrite")
    assert run(*words).exit_code == 0
    result = run(*command)
    assert result.exit_code == 1
    assert "line 1 has bank_sha256" in sentence(result)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--resume",), "--resume and --overwrite are about --output"),
        (("--output", "x.jsonl", "--resume", "--overwrite"), "choose one"),
        (("--output", "no/folder/x.jsonl"), "no/folder is not a folder; make it first"),
        (("--output", "x", "--resume", "--overwrite"), "choose one"),
        (("--decoder", "gpu"), "--decoder is gpu; give software or nvdec"),
        (("--workers", "0"), "--workers"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    bundle: Bundle, folder: Path, options: tuple[str, ...], text: str
) -> None:
    result = run("predict", bundle.path, folder, *options)
    assert result.exit_code == 2
    assert text in sentence(result)
    assert not Path("x.jsonl").exists()


def test_a_file_of_an_earlier_version_is_not_mixed_with_records_of_another_form(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    command = ("predict", bundle.path, folder, "--output", output)
    assert run(*command).exit_code == 0
    results = lines(output)
    for result in results:
        del result["schema_version"]
        result["frames"]["indices"] = result["frames"]["indices"][0]
    before = "".join(json.dumps(result) + "\n" for result in results)
    output.write_text(before)
    result = run(*command, "--resume")
    assert result.exit_code == 1
    assert "was written by another version of actionclip-deploy: the record in line 1" in sentence(
        result
    )
    assert output.read_text() == before


def test_a_name_that_is_not_text_is_written_and_found_again(
    bundle: Bundle, folder: Path, tmp_path: Path, rendered_video: Path
) -> None:
    output = tmp_path / "results.jsonl"
    odd = folder / os.fsdecode(b"\xff.mp4")
    odd.write_bytes(rendered_video.read_bytes())
    command = ("predict", bundle.path, folder, "--output", output, "--json")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert str(odd) in [line["video"] for line in lines(output)]  # in UTF-8, and JSON
    assert run(*command, "--resume").stdout == ""


def test_a_run_that_gave_nothing_leaves_no_file(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRuntime, "_run", fail)
    output = tmp_path / "results.jsonl"
    assert run("predict", bundle.path, folder, "--output", output).exit_code == 130
    assert not output.exists()


def test_a_file_that_another_run_writes_is_left_alone(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    import fcntl

    output = tmp_path / "results.jsonl"
    command = ("predict", bundle.path, folder, "--output", output)
    assert run(*command).exit_code == 0
    before = output.read_bytes()
    with output.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for option in ("--resume", "--overwrite"):
            result = run(*command, option)
            assert result.exit_code == 1
            assert "is being written by another run" in sentence(result)
    assert output.read_bytes() == before


def test_a_killed_run_is_resumed_without_doing_work_twice(
    tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    num_videos = 300
    folder, output = tmp_path / "videos", tmp_path / "results.jsonl"
    folder.mkdir()
    for number in range(num_videos):
        (folder / f"{number:03}.mp4").symlink_to(rendered_video)
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    labels = tmp_path / "labels.txt"
    labels.write_text("running\njumping\n")
    assert run("labels", "build", copy, "--labels", labels, "--name", "resumed").exit_code == 0
    predict = ["predict", copy, folder, "--labels", "resumed", "--output", output]
    predict += ["--runtime", "onnxruntime"]  # without a cache, `auto` chooses anew each time

    program = [sys.executable, "-m", "actionclip_deploy.cli", *predict]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (output.exists() and output.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = output.read_bytes()
    done = first[: first.rfind(b"\n") + 1]
    assert 5 <= done.count(b"\n") < num_videos

    resumed = run(*predict, "--resume", "--json")
    assert resumed.exit_code == 0
    assert output.read_bytes().startswith(done)
    results = lines(output)
    assert [Path(line["video"]).name for line in results] == [
        f"{number:03}.mp4" for number in range(num_videos)
    ]
    assert resumed.stdout.count("\n") == num_videos - done.count(b"\n")
    # Copies of one video: whatever call a frame was in, and whichever run, it scores the same but
    # for the last bits, which in a temporal call depend on how many views are in it.
    for line in results:
        assert [each["label"] for each in line["predictions"]] == ["jumping", "running"]
        scores = [each["score"] for each in line["predictions"]]
        expected = [each["score"] for each in results[0]["predictions"]]
        assert scores == pytest.approx(expected, abs=1e-6)


def test_a_name_that_is_not_utf_8_is_found_again(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(folder / "deep")
    strange = [folder / os.fsdecode(b"caf%c.mp4" % byte) for byte in (0xE9, 0xEA)]
    (folder / "a.MKV").rename(strange[0])
    (folder / "b.mp4").rename(strange[1])
    output, picture = tmp_path / "results.jsonl", tmp_path / "p.png"
    verb = ("predict", bundle.path, folder, "--output", output)
    result = run(*verb, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = output.read_bytes().decode()  # it is UTF-8, or this raises
    printed = run("predict", bundle.path, folder, "--json").stdout_bytes.decode()
    for text in (written, printed):
        found = [json.loads(line) for line in text.splitlines()]
        assert [Path(line["video"]) for line in found] == strange
        named = [urllib.parse.unquote_to_bytes(line["video_bytes"]) for line in found]
        assert named == [os.fsencode(path) for path in strange]
    again = run(*verb, "--resume")
    assert again.exit_code == 0, again.output
    assert "(2 were done before)" in " ".join(again.stdout.split())
    assert output.read_bytes().decode() == written


def test_a_file_of_an_older_version_with_raw_bytes_is_gone_on_with(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    strange = folder / "caf\udce9.mp4"
    (folder / "b.mp4").rename(strange)
    output = tmp_path / "results.jsonl"
    assert run("predict", bundle.path, strange, "--output", output).exit_code == 0
    line = output.read_bytes()
    output.write_bytes(line.replace(rb"\udce9", b"\xe9"))
    again = run("predict", bundle.path, strange, "--output", output, "--resume")
    assert "(1 were done before)" in " ".join(again.stdout.split())


# Labels: a bank's, a file's, or given one by one


def best_labels(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.stderr
    (record,) = [json.loads(line) for line in result.stdout.splitlines()]
    return {each["label"]: each["score"] for each in record["predictions"]}


def test_labels_are_taken_from_a_bank_a_file_or_the_command_line_alike(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    given = ("predict", bundle.path, rendered_video, "--json")
    of_bank = best_labels(run(*given, "--labels", "mine"))
    assert set(of_bank) == {"an and", "in an", "and"}
    assert best_labels(run(*given, "--labels", tmp_path / "labels.txt")) == of_bank
    by_one = ("--label", "an and", "--label", "in an", "--label", "and")
    assert best_labels(run(*given, *by_one)) == of_bank
    assert bundle.label_bank_names() == ("mine",)


def test_labels_without_a_bank_have_no_bank_name_in_the_record(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    options = ("--label", "and", "--label", "in an", "--output", output)
    assert run("predict", bundle.path, rendered_video, *options).exit_code == 0
    (line,) = lines(output)
    assert (line["bank"]["name"], line["run"]["bank"]) == (None, None)
    assert run("predict", bundle.path, rendered_video, *options, "--resume").exit_code == 0
    others = ("--label", "and", "--label", "an and", "--output", output, "--resume")
    refused = run("predict", bundle.path, rendered_video, *others)
    assert refused.exit_code == 1
    assert "was written by another run: line 1 has bank_sha256" in sentence(refused)


def test_the_name_of_a_bank_comes_before_a_file_of_that_name(
    bundle: Bundle, rendered_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("and\nin an\n")
    given = ("predict", bundle.path, rendered_video, "--json")
    assert len(best_labels(run(*given, "--labels", "mine"))) == 3
    assert len(best_labels(run(*given, "--labels", "./mine"))) == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--labels", "mine", "--label", "and"), "--labels and --label were given; give one"),
        (("--label", "and", "--label", " AND "), "--label: "),
        (("--label", ""), "--label: "),
    ],
)
def test_labels_that_contradict_each_other_are_refused_before_the_work(
    options: tuple[str, ...], part: str, bundle: Bundle, rendered_video: Path
) -> None:
    refused = run("predict", bundle.path, rendered_video, *options)
    assert refused.exit_code == 2
    assert part in sentence(refused)


def test_a_bundle_without_banks_says_which_ways_there_are(
    bundle: Bundle, rendered_video: Path
) -> None:
    assert run("labels", "list", bundle.path).exit_code == 0
    shutil.rmtree(bundle.path / "labels")
    refused = run("predict", bundle.path, rendered_video)
    assert refused.exit_code == 2
    assert "--labels is missing, and" in sentence(refused)
