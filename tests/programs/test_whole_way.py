"""The command line as a user types it: a checkpoint in, scores of real video files out.

Verbs that would import torch, and those that others ran in a process before, run in this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from actionclip_deploy import Bundle, LabelBank, Recognizer, open_runtime
from actionclip_deploy.bundle import hash_files, write_manifest
from actionclip_deploy.cli import app
from actionclip_deploy.sampling import Views

LABELS = ("abseiling", "air drumming", "archery")


def actionclip(*arguments: object) -> Result:
    """Run a verb in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def in_a_process(
    *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a verb as a shell does."""
    command = [sys.executable, "-m", "actionclip_deploy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def way(
    tiny_checkpoints: dict[str, Path],
    rendered_video: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with an exported bundle, a label bank in it, and a video under two names."""
    folder = tmp_path_factory.mktemp("way")
    exported = actionclip(
        "export", tiny_checkpoints["Transf"], "--output", folder / "bundle", "--licence", "MIT"
    )
    assert exported.exit_code == 0, exported.output
    assert "T = 8 (from the file name)" in exported.stdout
    (folder / "labels.txt").write_text("\n".join(LABELS))
    built = actionclip(
        "labels", "build", folder / "bundle", "--labels", folder / "labels.txt", "--name", "mine"
    )
    assert built.exit_code == 0, built.output
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(rendered_video, folder / name)
    return folder


def test_verify_agrees_and_says_so(way: Path) -> None:
    result = in_a_process("verify", way / "bundle")
    assert result.returncode == 0, result.stderr
    assert "is verified on this machine" in result.stdout
    report = json.loads(actionclip("verify", way / "bundle", "--json").stdout)
    assert report["passed"] is True


def test_verify_with_torch_is_the_reference_itself(
    way: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    verb = ("verify", way / "bundle", "--runtime", "torch", "--json")
    report = json.loads(actionclip(*verb, "--checkpoint", tiny_checkpoints["Transf"]).stdout)
    assert report["passed"] is True
    other = actionclip(*verb, "--checkpoint", tiny_checkpoints["LSTM"])
    assert other.exit_code == 1
    assert "sha256" in other.stderr


def test_predict_gives_what_python_gives(way: Path) -> None:
    words = ["--views", "2x3", "--json", "--runtime", "onnxruntime"]
    result = in_a_process("predict", way / "bundle", way / "a.mp4", way / "b.mp4", *words)
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    bundle = Bundle.open(way / "bundle", check_hashes=True)
    with open_runtime(bundle, "onnxruntime") as runtime:
        recognizer = Recognizer(runtime, LabelBank.load(bundle, "mine"), views=Views(2, 3))
        for line, video in zip(printed, ("a.mp4", "b.mp4"), strict=True):
            prediction = recognizer.predict(way / video)
            assert line["video"] == str(way / video)
            assert [p["label"] for p in line["predictions"]] == [
                best.label for best in prediction.predictions
            ]
            np.testing.assert_allclose(
                [p["score"] for p in line["predictions"]],
                [best.score for best in prediction.predictions],
                atol=1e-5,
            )
            assert line["runtime"]["execution_provider"] == "CPUExecutionProvider"


def test_torch_and_onnxruntime_give_the_same_scores(
    way: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    bundle = Bundle.open(way / "bundle")
    bank = LabelBank.load(bundle, "mine")
    with (
        open_runtime(bundle, "onnxruntime") as ort,
        open_runtime(bundle, "torch", checkpoint=tiny_checkpoints["Transf"]) as torch,
    ):
        ours = Recognizer(ort, bank).predict(way / "a.mp4")
        reference = Recognizer(torch, bank).predict(way / "a.mp4")
    np.testing.assert_allclose(ours.scores, reference.scores, atol=1e-4)


def test_inspect_describes_checkpoint_and_bundle_alike(
    way: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    reports = [
        json.loads(actionclip("inspect", path, "--json").stdout)
        for path in (tiny_checkpoints["Transf"], way / "bundle")
    ]
    for key in ("backbone", "visual_prompt", "num_frames", "input_size", "embedding_dim"):
        assert reports[0]["model"][key] == reports[1]["model"][key]
    assert reports[0]["size"]["macs_per_clip"] == reports[1]["size"]["macs_per_clip"]
    assert reports[0]["source"]["sha256"] == reports[1]["source"]["sha256"]
    assert reports[1]["source"]["licence"] == "MIT"


def test_other_users_can_read_every_file_of_a_bundle(way: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in (way / "bundle").rglob("*")}
    assert all(mode & 0o044 for mode in modes.values()), modes


def test_plot_draws_the_sampled_frames(way: Path) -> None:
    picture = way / "plot.png"
    result = actionclip("predict", way / "bundle", way / "a.mp4", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_existing_bundle_is_kept_without_overwrite(
    way: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    before = (way / "bundle" / "manifest.json").read_bytes()
    result = actionclip("export", tiny_checkpoints["meanP"], "--output", way / "bundle")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert (way / "bundle" / "manifest.json").read_bytes() == before


def test_an_export_that_is_told_to_end_leaves_nothing(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    command = [sys.executable, "-m", "actionclip_deploy.cli", "export"]
    with subprocess.Popen(
        [*command, str(tiny_checkpoints["Transf"]), "--output", str(target)],
        stderr=subprocess.DEVNULL,
    ) as process:
        while not list(tmp_path.iterdir()):  # until its temporary folder is there
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_json_survives_a_terminal_that_knows_ascii_alone(way: Path) -> None:
    (way / "emoji.txt").write_text("caf\u00e9 \U0001f600\narchery\n", encoding="utf-8")
    arguments = ("labels", "build", way / "bundle", "--labels", way / "emoji.txt", "--name", "e")
    assert actionclip(*arguments).exit_code == 0
    verb = ("predict", way / "bundle", way / "a.mp4", "--labels", "e")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    printed = json.loads(in_a_process(*verb, "--json", env=ascii_only).stdout)
    assert "caf\u00e9 \U0001f600" in {best["label"] for best in printed["predictions"]}
    assert in_a_process(*verb, env=ascii_only).returncode == 0


def test_an_altered_bundle_is_refused(way: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(way / "bundle", copy)
    graph = copy / "temporal.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    result = actionclip("verify", copy)
    assert result.exit_code == 1
    assert "temporal.onnx does not have the sha256" in result.stderr


def test_a_runtime_that_computes_something_else_fails_verification(
    way: Path, tmp_path: Path
) -> None:
    """The right files with the right sums, but golden outputs of other weights."""
    copy = tmp_path / "bundle"
    shutil.copytree(way / "bundle", copy)
    golden = load_file(copy / "golden" / "golden.safetensors")
    golden["video_embeddings"] = np.roll(golden["video_embeddings"], 1, axis=1).copy()
    save_file(golden, copy / "golden" / "golden.safetensors")
    manifest = Bundle.open(way / "bundle").manifest
    write_manifest(copy, manifest.model_copy(update={"files": hash_files(copy)}))
    result = actionclip("verify", copy)
    assert result.exit_code == 4
    assert "temporal" in result.stderr


def test_doctor_names_a_provider_that_loads() -> None:
    report = json.loads(in_a_process("doctor", "--json").stdout)
    assert "CPUExecutionProvider" in json.dumps(report["execution_providers"])
    assert report["versions"]["onnxruntime"]
