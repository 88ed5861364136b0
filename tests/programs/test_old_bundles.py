"""Bundles of earlier versions open, agree with their golden data, and score."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from typer.testing import CliRunner

from actionclip_deploy import Bundle, LabelBank, Recognizer, open_runtime, verify_bundle
from actionclip_deploy.cli import app
from actionclip_deploy.errors import LabelWarning


@pytest.fixture
def old_bundle(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "bundles" / "schema-1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "bundle"


def test_a_bundle_of_before_verifies_and_its_label_bank_scores(
    old_bundle: Path, rendered_video: Path
) -> None:
    bundle = Bundle.open(old_bundle)
    with open_runtime(bundle, "onnxruntime") as runtime:
        verify_bundle(bundle, runtime).check()
        with pytest.warns(LabelWarning, match="'old' was made by a version that did not look"):
            bank = LabelBank.load(bundle, "old")
        prediction = Recognizer(runtime, bank).predict(rendered_video)
        again = LabelBank.build(bundle, runtime, bank.labels, name="again")
    assert sorted(each.label for each in prediction.predictions) == [
        "a dance",
        "archery",
        "bowling",
    ]
    assert prediction.scores.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(again.embeddings, bank.embeddings, atol=1e-5)


def test_the_command_line_takes_a_bundle_of_before(old_bundle: Path, rendered_video: Path) -> None:
    def run(*words: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
        return result

    predict = ("predict", old_bundle, rendered_video, "--labels", "old", "--json")
    result = run(*predict)
    assert json.loads(result.stdout)["bank"]["name"] == "old"
    # What an altered text encoder of before has made is not to be told from what it should be.
    (told,) = result.stderr.strip().splitlines()
    assert told.startswith("warning: The label bank 'old' was made by a version that did not look")
    (command,) = re.findall("`actionclip (.*)`", told)
    labels = old_bundle.with_name("labels.txt")
    labels.write_text("archery\nbowling\na dance\n")
    run(*command.replace("FILE", str(labels)).split())
    assert run(*predict).stderr == ""
