"""Label banks with a calibration: stored, read back, refused where it means nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.calibration import Answer, Calibration
from actionclip_deploy.errors import LabelBankError, ShapeError
from actionclip_deploy.labels import LabelBank, list_label_banks
from actionclip_deploy.scoring import score_clips

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("running", "brush hair", "sit")
METHOD = "template-softmax"


def calibration_for(bundle: Bundle, **fields: Any) -> Calibration:
    values: dict[str, Any] = {
        "temperature": 2.0,
        "threshold": 0.6,
        "method": METHOD,
        "views": "1x1",
        "visual_sha256": bundle.visual_sha256,
        "target_kept": 0.95,
        "kept_known": 0.96,
        "rejected_unknown": None,
        "num_known": 25,
        "num_unknown": 0,
        "error_before": 0.2,
        "error_after": 0.1,
    }
    return Calibration(**{**values, **fields})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def plain(bundle: Bundle) -> LabelBank:
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="sports")


@pytest.fixture
def bank(bundle: Bundle, plain: LabelBank) -> LabelBank:
    return dataclasses.replace(plain, calibration=calibration_for(bundle))


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
    return record


@pytest.mark.parametrize("rejected", [None, 0.75])
def test_a_calibration_is_read_back_as_it_was_saved(
    bundle: Bundle, plain: LabelBank, rejected: float | None
) -> None:
    calibration = calibration_for(bundle, rejected_unknown=rejected, threshold=1 / 3)
    dataclasses.replace(plain, calibration=calibration).save(bundle)
    loaded = LabelBank.load(bundle, "sports")
    assert loaded.calibration == calibration
    np.testing.assert_array_equal(loaded.embeddings, plain.embeddings)


def test_a_bank_without_calibration_is_written_as_older_versions_read_it(
    bundle: Bundle, plain: LabelBank, bank: LabelBank
) -> None:
    record = record_of(plain.save(bundle))
    assert record["schema_version"] == 1
    assert "calibration" not in record
    assert LabelBank.load(bundle, "sports").calibration is None
    assert record_of(bank.save(bundle, overwrite=True))["schema_version"] == 2


def test_the_hash_of_a_bank_changes_with_all_that_an_answer_depends_on(
    bundle: Bundle, plain: LabelBank, bank: LabelBank
) -> None:
    others = [
        plain,
        bank,
        dataclasses.replace(bank, calibration=calibration_for(bundle, threshold=0.61)),
        dataclasses.replace(plain, labels=("running", "brush hair", "stand")),
        dataclasses.replace(plain, templates=("{}", "a {}")),
        dataclasses.replace(plain, embeddings=np.roll(plain.embeddings, 1, axis=1)),
    ]
    assert len({other.sha256 for other in others}) == len(others)
    bank.save(bundle)
    assert LabelBank.load(bundle, "sports").sha256 == bank.sha256
    assert LabelBank.load(bundle, "sports", calibrated=False).sha256 == plain.sha256


def test_the_best_label_is_the_answer_unless_its_calibrated_score_is_low(bank: LabelBank) -> None:
    # By hand: at temperature 2 scores become square roots, brought back to a sum of 1.
    sure = np.array([0.04, 0.95, 0.01], np.float32)
    roots = np.sqrt(sure)
    assert bank.answer(sure, method=METHOD) == Answer(
        "brush hair", pytest.approx(roots[1] / roots.sum(), abs=1e-6), 0.6
    )
    unsure = np.array([0.1, 0.2, 0.7], np.float32)
    answer = bank.answer(unsure, method=METHOD)
    assert answer is not None
    assert answer.is_unknown
    assert answer.label is None
    assert answer.score == pytest.approx(0.7**0.5 / (0.1**0.5 + 0.2**0.5 + 0.7**0.5), abs=1e-6)


def test_there_is_no_answer_without_calibration_or_for_another_method(
    plain: LabelBank, bank: LabelBank
) -> None:
    scores = np.array([0.1, 0.2, 0.7], np.float32)
    assert plain.answer(scores, method=METHOD) is None
    assert bank.answer(scores, method="mean-embedding") is None


def test_scores_of_another_bank_have_no_answer(bank: LabelBank) -> None:
    with pytest.raises(ShapeError, match=r"expected \(3,\), one for each label of the bank"):
        bank.answer(np.array([0.5, 0.5], np.float32), method=METHOD)


def test_a_bundle_with_other_visual_weights_refuses_the_calibration_and_not_the_bank(
    bundle: Bundle, bank: LabelBank, tmp_path: Path
) -> None:
    folder = bank.save(bundle)
    other = write_fake_bundle(tmp_path / "other", scale=50.0)
    assert other.textual_sha256 == bundle.textual_sha256
    shutil.copytree(folder, other.path / "labels" / "sports")
    with pytest.raises(LabelBankError, match=r"calibrated for other weights.*calibrate` again"):
        LabelBank.load(other, "sports")
    assert LabelBank.load(other, "sports", calibrated=False).labels == LABELS
    with pytest.raises(LabelBankError, match="calibrated for other weights"):
        bank.save(other, overwrite=True)
    (info,) = list_label_banks(other)
    assert "calibrated for other weights" in str(info.problem)


def test_other_graphs_than_the_textual_make_another_hash(bundle: Bundle, tmp_path: Path) -> None:
    assert write_fake_bundle(tmp_path / "a").visual_sha256 == bundle.visual_sha256
    texts = write_fake_bundle(tmp_path / "b", textual=b"other weights")
    assert texts.visual_sha256 == bundle.visual_sha256
    whole = write_fake_bundle(tmp_path / "c", visual_prompt="joint")
    assert whole.visual_sha256 != bundle.visual_sha256


def test_the_list_says_which_banks_are_calibrated(
    bundle: Bundle, plain: LabelBank, bank: LabelBank
) -> None:
    plain.save(bundle)
    dataclasses.replace(bank, name="with").save(bundle)
    assert [(info.name, info.is_calibrated) for info in list_label_banks(bundle)] == [
        ("sports", False),
        ("with", True),
    ]


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("temperature", 0, "temperature is 0"),
        ("threshold", 1.5, "threshold is 1.5; it must be from 0 to 1"),
        ("method", "independent", "calibration"),
        ("threshold", "high", "calibration.threshold"),
    ],
)
def test_a_calibration_altered_into_nonsense_is_refused(
    bundle: Bundle, bank: LabelBank, field: str, value: object, match: str
) -> None:
    folder = bank.save(bundle)
    record = record_of(folder)
    record["calibration"][field] = value
    (folder / "bank.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(LabelBankError, match=f"(?s)damaged.*{match}"):
        LabelBank.load(bundle, "sports")


def test_the_answer_of_a_bank_follows_the_order_of_its_scores(
    bundle: Bundle, bank: LabelBank
) -> None:
    rng = np.random.default_rng(1)
    videos = rng.normal(size=(20, 16)).astype(np.float32)
    videos /= np.linalg.norm(videos, axis=1, keepdims=True)
    for scores in score_clips(videos, bank.embeddings):
        answer = bank.answer(scores, method=METHOD)
        assert answer is not None
        assert answer.label in (LABELS[int(np.argmax(scores))], None)


def test_the_bundle_format_names_every_field_of_a_calibration() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text("utf-8")
    names = {field.name for field in dataclasses.fields(Calibration)}
    assert {name for name in names if f"`{name}`" not in text} == set()
