"""Every verb that runs a bundle runs it on OpenVINO, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank

SCORE_TOLERANCE = 1e-4  # of fp32, as in parity
OPENVINO = ("--runtime", "openvino", "--threads", "1")
ONNXRUNTIME = ("--runtime", "onnxruntime", "--threads", "1")
LABELS = ("--label", "opening a door", "--label", "closing a door")


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_predict_gives_what_it_gives_on_onnxruntime(
    tiny_bundle: Path, rendered_video: Path
) -> None:
    def scores(runtime: tuple[str, ...]) -> dict[str, float]:
        data = json.loads(run("predict", tiny_bundle, rendered_video, *LABELS, *runtime, "--json"))
        assert data["runtime"]["name"] == runtime[1]
        return {each["label"]: each["score"] for each in data["predictions"]}

    assert scores(OPENVINO) == pytest.approx(scores(ONNXRUNTIME), abs=SCORE_TOLERANCE)


def test_embed_writes_what_it_writes_on_onnxruntime(
    tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    arrays: list[Any] = []
    for name, runtime in (("a.npz", OPENVINO), ("b.npz", ONNXRUNTIME)):
        run("embed", tiny_bundle, rendered_video, "--output", tmp_path / name, *runtime)
        with np.load(tmp_path / name) as file:
            arrays.append(file["embeddings"])
    np.testing.assert_allclose(*arrays, atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("verb", ["timeline", "evaluate", "watch"])
def test_a_verb_runs(verb: str, tiny_bundle: Path, rendered_video: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("opening a door\nclosing a door\n")
    annotations = tmp_path / "list.txt"
    annotations.write_text(f"{rendered_video} 0\n")
    words: dict[str, tuple[str | Path, ...]] = {
        "timeline": ("predict", tiny_bundle, rendered_video, *LABELS, "--timeline", "--json"),
        "evaluate": ("evaluate", tiny_bundle, annotations, "--labels", labels, "--json"),
        "watch": ("watch", tiny_bundle, rendered_video, *LABELS),
    }
    printed = run(*words[verb], *OPENVINO)
    if verb != "watch":
        assert json.loads(printed)["runtime"]["name"] == "openvino"


def test_a_bank_that_openvino_made_is_that_of_onnxruntime(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    labels = tmp_path / "labels.txt"
    labels.write_text("opening a door\nclosing a door\n")
    for name, runtime in (("one", OPENVINO), ("other", ONNXRUNTIME)):
        run("labels", "build", bundle, "--labels", labels, "--name", name, *runtime)
    one, other = (LabelBank.load(Bundle.open(bundle), name) for name in ("one", "other"))
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=SCORE_TOLERANCE)


def test_a_bank_is_made_by_those_two_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ("labels", "build", str(tiny_bundle), "--label", "a", "--name", "b")
    result = CliRunner().invoke(app, [*words, "--runtime", "torch"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "banks are made by onnxruntime or openvino" in " ".join(result.output.split())
