"""The verbs with a runtime in numpy; tests/programs/test_whole_way.py runs them for real."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from typer.testing import CliRunner, Result

from actionclip_deploy import recognizer as recognizer_module
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.errors import (
    ArgumentError,
    InferenceError,
    RuntimeUnavailableError,
    VideoError,
)
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.video import Clip

Run = Callable[..., Result]


class FakeReader:
    num_frames = 8

    def __init__(self, path: str | Path, **options: object) -> None:
        if "bad" in str(path):
            raise VideoError(f"{path} is empty; give a video file.")
        self.pts_seconds = np.arange(8) / 4

    def read(self, indices: np.ndarray) -> Clip:
        frames = np.full((len(indices), 40, 40, 3), 7, dtype=np.uint8)
        return Clip(frames, indices, self.pts_seconds[indices])

    def __enter__(self) -> FakeReader:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def label_file(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("id,name\n0,an and\n1,in an\n2,and [b]in[/b] $_$\n")
    return path


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_fake(bundle: Bundle, name: str, **options: Any) -> Runtime:
        if name == "tensorrt":
            raise ArgumentError("name", "is 'tensorrt'; it must be one of onnxruntime, torch.")
        if "cuda" in (options["device"], options["execution_provider"]):
            raise RuntimeUnavailableError("cuda was asked for and this build has only the CPU.")
        return FakeRuntime(bundle.manifest)

    # By import_module, since the names in the package `cli` are the functions, not the modules.
    for name in ("options", "labels"):
        module = import_module(f"actionclip_deploy.cli.{name}")
        monkeypatch.setattr(module, "open_runtime", open_fake)
    monkeypatch.setattr(recognizer_module, "VideoReader", FakeReader)


@pytest.fixture
def run() -> Iterator[Run]:
    def run_app(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run_app


def build_bank(run: Run, bundle: Bundle, label_file: Path, name: str = "mine") -> None:
    result = run("labels", "build", bundle.path, "--labels", label_file, "--name", name)
    assert result.exit_code == 0, result.output


def test_version_is_printed(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("actionclip-deploy 0.")


VERBS = ("export", "inspect", "verify", "predict", "train", "doctor")
LABEL_VERBS = ("labels build", "labels list", "labels diff")


@pytest.mark.parametrize("verb", VERBS + LABEL_VERBS)
def test_every_verb_has_help_and_json(run: Run, verb: str) -> None:
    result = run(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_labels_are_built_listed_and_compared(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("an\nin\n")
    new.write_text("an\nand\n")
    build_bank(run, bundle, old, "old")
    build_bank(run, bundle, new, "new")
    listed = json.loads(run("labels", "list", bundle.path, "--json").stdout)
    assert [(bank["name"], bank["num_labels"]) for bank in listed] == [("new", 2), ("old", 2)]
    difference = json.loads(run("labels", "diff", bundle.path, "old", "new", "--json").stdout)
    assert difference["added"] == ["and"]
    assert difference["removed"] == ["in"]
    assert "added: and" in run("labels", "diff", bundle.path, "old", "new").stdout
    assert "the same" in run("labels", "diff", bundle.path, "old", "old").stdout


def test_a_bank_is_replaced_only_when_asked(run: Run, bundle: Bundle, label_file: Path) -> None:
    build_bank(run, bundle, label_file)
    arguments = ("labels", "build", bundle.path, "--labels", label_file, "--name", "mine")
    again = run(*arguments)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert run(*arguments, "--overwrite", "--label-only").exit_code == 0
    listed = json.loads(run("labels", "list", bundle.path, "--json").stdout)
    assert listed[0]["num_templates"] == 1


def test_a_name_that_leaves_the_bundle_is_wrong_usage(
    run: Run, bundle: Bundle, label_file: Path
) -> None:
    result = run("labels", "build", bundle.path, "--labels", label_file, "--name", "../mine")
    assert result.exit_code == 2
    assert "'../mine' is not allowed" in " ".join(result.stderr.split())


def test_json_has_one_object_per_video(run: Run, bundle: Bundle, label_file: Path) -> None:
    build_bank(run, bundle, label_file)
    result = run("predict", bundle.path, "a.mp4", "b.mp4", "--labels", "mine", "--json")
    assert result.exit_code == 0
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["video"], second["video"]) == ("a.mp4", "b.mp4")
    assert list(first) == [
        *("video", "schema_version", "name", "predictions", "answer", "frames", "method", "bank"),
        *("runtime", "num_frames_encoded", "num_frames_reused", "warnings", "timings_ms"),
    ]
    assert {"label", "score"} == set(first["predictions"][0])
    assert sum(p["score"] for p in first["predictions"]) == pytest.approx(1.0, abs=1e-4)
    assert first["frames"]["indices"] == [[0, 2, 4, 6]]  # 8 frames, T = 4: trunc(2 i + 0.5)
    assert first["frames"]["pts_seconds"] == [[0.0, 0.5, 1.0, 1.5]]
    assert first["runtime"]["name"] == "fake"
    assert first["bank"]["name"] == "mine"
    assert first["timings_ms"]["total"] > 0


def test_a_failed_video_stands_in_its_place_and_the_exit_code_says_so(
    run: Run, bundle: Bundle, label_file: Path
) -> None:
    build_bank(run, bundle, label_file)
    result = run("predict", bundle.path, "a.mp4", "bad.mp4", "c.mp4", "--json")
    assert result.exit_code == 3
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["video"] for line in lines] == ["a.mp4", "bad.mp4", "c.mp4"]
    assert lines[1]["error"] == {
        "status": None,
        "code": "video_unreadable",
        "message": "bad.mp4 is empty; give a video file.",
    }
    table = run("predict", bundle.path, "bad.mp4", "c.mp4")
    assert table.exit_code == 3
    assert "failed" in table.stdout
    assert "bad.mp4 is empty" in table.stderr


def test_labels_in_brackets_are_printed_as_they_are(
    run: Run, bundle: Bundle, label_file: Path
) -> None:
    build_bank(run, bundle, label_file)
    assert "and [b]in[/b]" in run("predict", bundle.path, "a.mp4").stdout


def test_without_a_name_the_only_bank_is_taken(run: Run, bundle: Bundle, label_file: Path) -> None:
    none = run("predict", bundle.path, "a.mp4")
    assert none.exit_code == 2
    assert "actionclip labels build" in " ".join(none.stderr.replace("│", " ").split())
    build_bank(run, bundle, label_file, "one")
    assert run("predict", bundle.path, "a.mp4").exit_code == 0
    build_bank(run, bundle, label_file, "two")
    both = run("predict", bundle.path, "a.mp4")
    assert both.exit_code == 2
    assert "one, two" in both.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (("--views", "10by3"), 2, "10by3"),
        (("--scores", "max"), 2, "template-softmax"),
        (("--resize", "none"), 2, "give frame, crop or swscale"),
        (("--runtime", "tensorrt"), 2, "--runtime is 'tensorrt'; it must be one of onnxruntime"),
        (("--device", "tpu"), 2, "--device is 'tpu'; give cpu, cuda"),
        (("--device", "cuda"), 1, "this build has only the CPU"),
        (("--execution-provider", "cuda"), 1, "this build has only the CPU"),
        (("--labels", "nobody"), 2, "--labels is 'nobody', which is neither a label bank of"),
        (("--top-k", "0"), 2, "--top-k"),
        (("--plot", "plot.txt"), 2, "plot.txt"),
        (("--plot", "no/folder/plot.png"), 2, "is not a folder; make it first"),
        (("--plot", "/"), 2, "--plot is /"),
    ],
)
def test_bad_input_gets_a_sentence_and_its_exit_code(
    run: Run,
    bundle: Bundle,
    label_file: Path,
    arguments: tuple[str, ...],
    exit_code: int,
    text: str,
) -> None:
    build_bank(run, bundle, label_file)
    result = run("predict", bundle.path, "a.mp4", *arguments)
    assert result.exit_code == exit_code
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_no_bundle_is_one_sentence(run: Run, tmp_path: Path) -> None:
    for path, text in ((tmp_path / "nothing", "does not exist"), (tmp_path, "no manifest.json")):
        for verb in (("inspect", path), ("labels", "list", path), ("predict", path, "a.mp4")):
            result = run(*verb)
            assert result.exit_code == 1, verb
            assert len(result.stderr.splitlines()) == 1
            if verb[0] != "inspect" or path.exists():
                assert text in result.stderr


def test_an_error_while_it_runs_is_one_sentence(
    run: Run, bundle: Bundle, label_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bank(run, bundle, label_file)

    def fail(*arguments: object) -> np.ndarray:
        raise InferenceError("The visual graph failed: out of memory; give fewer frames.")

    monkeypatch.setattr(FakeRuntime, "_run", fail)
    result = run("predict", bundle.path, "a.mp4")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: The visual graph failed: out of memory; give fewer frames."
    ]


def test_inspect_describes_a_bundle(run: Run, bundle: Bundle) -> None:
    report = json.loads(run("inspect", bundle.path, "--json").stdout)
    assert report["model"]["num_frames"] == 4
    assert report["size"]["macs_per_clip"] == 1000
    assert report["size"]["flops_per_clip"] == 1990
    assert "frames uint8 (N, 32, 32, 3) -> frame_features" in report["graphs"]["visual"]
    assert "macs per clip" in run("inspect", bundle.path).stdout


def test_the_plot_is_a_picture(run: Run, bundle: Bundle, label_file: Path, tmp_path: Path) -> None:
    build_bank(run, bundle, label_file)
    picture = tmp_path / "plot.png"
    result = run("predict", bundle.path, "a.mp4", "bad.mp4", "c.mp4", "--plot", picture)
    assert result.exit_code == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "verb",
    ["predict", "embed", "evaluate", "watch", "export", "benchmark", "serve", "labels calibrate"],
)
def test_whatever_reads_videos_bounds_their_pixels(verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--max-pixels", "0"])
    assert result.exit_code == 2
    assert "--max-pixels" in result.stderr
    assert "No such option" not in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "a", "b", "--top", "0"], "--top is 0; give 1 or more."),
        (["predict", "a", "b", "--workers", "0"], "--workers is 0; give 1 or more."),
        (["predict", "a", "b", "--top-k", "x"], "--top-k is x; give a whole number."),
        (["predict", "a", "b", "--resize", "bilinear"], "give frame, crop or swscale."),
        (["index", "a", "b", "-o", "c", "--static", "-3"], "--static is -3; give 0.5 or more."),
        (["search", "a", "b", "--threshold", "high"], "--threshold is high; give a number."),
        (["serve", "a", "--port", "70000"], "--port is 70000; give 65535 or less."),
    ],
)
def test_a_value_that_is_not_taken_is_told_with_what_is(
    run: Run, words: list[str], message: str
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert message in told
    assert "Input should" not in told
    assert "Value error" not in told
