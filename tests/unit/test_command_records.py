"""The JSON of verbs about bundles, banks and this machine is that of their records.

`train`, `export`, `build`, `engines`, `models`, `doctor` and `labels calibrate` are held against
theirs where they are run anyhow: see `check_json` in their own tests.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.command_records import (
    AuditedParityRecord,
    BuiltBankRecord,
    ComparisonRecord,
    InspectionRecord,
    LabelBankDescription,
    LabelBankDiff,
    LabelBankInfo,
    ParityRecord,
)
from actionclip_deploy.records import (
    RECORD_SCHEMA_VERSION,
    EmbeddedVideoRecord,
    EvaluationRecord,
    VersionedRecord,
)
from actionclip_deploy.runtimes.parity import failed

pytestmark = pytest.mark.usefixtures("cache_of_the_run")


def printed(*words: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    bundle = shutil.copytree(tiny_bundle, folder / "tiny")
    for name, labels in {"old": "running\njumping\n", "new": "jumping\nyoga\n"}.items():
        (folder / f"{name}.txt").write_text(labels)
        words = ("labels", "build", bundle, "--labels", folder / f"{name}.txt", "--name", name)
        check_json(BuiltBankRecord, printed(*words))
    return bundle


@pytest.mark.parametrize(
    ("words", "record"),
    [
        (("inspect", "{bundle}"), InspectionRecord),
        (("inspect", "{checkpoint}"), InspectionRecord),
        (("inspect", "{bundle}", "--runtime", "openvino"), InspectionRecord),
        (("verify", "{bundle}"), ParityRecord),
        (("verify", "{bundle}", "--runtime", "openvino"), AuditedParityRecord),
        (("labels", "show", "{bundle}", "old"), LabelBankDescription),
        (("labels", "diff", "{bundle}", "old", "new"), LabelBankDiff),
        (("embed", "{bundle}", "{video}"), EmbeddedVideoRecord),
        (("evaluate", "{bundle}", "{annotations}", "--labels", "new"), EvaluationRecord),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_a_verb_prints_is_its_record(
    bundle: Path,
    tiny_checkpoints: dict[str, Path],
    rendered_video: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    record: type[VersionedRecord],
) -> None:
    annotations = tmp_path / "list.txt"
    annotations.write_text(f"{rendered_video} 0\n")
    given = {
        "bundle": bundle,
        "checkpoint": tiny_checkpoints["Transf"],
        "video": rendered_video,
        "annotations": annotations,
    }
    data = printed(*(word.format(**given) for word in words))
    check_json(record, data)
    assert record.model_validate(data).to_dict() == data
    if issubclass(record, VersionedRecord):
        assert data["schema_version"] == RECORD_SCHEMA_VERSION


def test_each_bank_of_the_list_is_a_record(bundle: Path) -> None:
    data = printed("labels", "list", bundle)
    assert [each["name"] for each in data] == ["new", "old"]
    for each in data:
        check_json(LabelBankInfo, each)
    TypeAdapter(list[LabelBankInfo]).validate_python(data)


def test_a_difference_that_is_not_a_number_is_null() -> None:
    nothing = failed("visual", 3, "the run failed")
    assert math.isnan(nothing.max_abs_difference)
    data = ComparisonRecord.model_validate(nothing).to_dict()
    assert (data["max_abs_difference"], data["min_cosine"], data["tolerance"]) == (None,) * 3
    assert data["error"] == "the run failed"
