"""The default model, fine-tuned on real clips by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actionclip_deploy.cli import app

LABELS = ("fight", "no fight")
CONFIG = """
model:
  checkpoint: motions
  num_frames: 8
data:
  annotations: {folder}/train.txt
  validation: {folder}/test.txt
  labels: {folder}/labels.txt
  cache: {folder}/frames
  workers: 0
optimiser:
  lr: 3.0e-4
  prompt_ratio: 1
schedule:
  length: 6
  warmup: 1
run:
  output: {folder}/run
  batch_size: 10
  clip_norm: 1
"""
# PyTorch scores the validation clips in training, ONNX Runtime in evaluation: the same videos, and
# one that lies between two labels may tip.
ONE_VIDEO = 1


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """Lists of real clips, every other one for training."""
    lines = [
        (path, number)
        for number, name in enumerate(("fight", "no_fight"))
        for path in sorted((shared / "videos" / "labelled" / name).iterdir())
    ]
    for name, part in (("train", lines[::2]), ("test", lines[1::2])):
        text = "".join(f"{path} {number}\n" for path, number in part)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    return tmp_path


def actionclip(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (words, result.output)
    return result.stdout


def test_the_default_model_is_fine_tuned_exported_and_evaluated_on_real_clips(
    folder: Path,
) -> None:
    trained = json.loads(actionclip("train", folder / "mine.yaml", "--json"))
    assert trained["steps"] == 18
    actionclip(
        *("export", folder / "run" / "model.pt", "--num-frames", 8),
        *("--output", folder / "bundle"),
    )
    # It knows what it has learnt, besides what it knew.
    built = ("labels", "build", folder / "bundle", "--json", "--labels")
    words = json.loads(actionclip(*built, folder / "labels.txt", "--name", "mine"))
    assert words["unknown_words"] == []
    (folder / "other.txt").write_text("fight\na red star fighting a dragon\n", encoding="utf-8")
    words = json.loads(actionclip(*built, folder / "other.txt", "--name", "other"))
    assert words["unknown_words"] == ["fighting", "dragon"]
    measured = json.loads(
        actionclip(
            *("evaluate", folder / "bundle", folder / "test.txt"),
            *("--labels", folder / "labels.txt", "--json"),
        )
    )
    videos = measured["num_videos"]
    assert videos == trained["validation"]["num_videos"] == 30
    assert abs(measured["top1"] - trained["validation"]["top1"]) <= ONE_VIDEO / videos + 1e-9
    print(f"top-1 on {videos} clips of fight and no fight: {measured['top1']:.3f}")
