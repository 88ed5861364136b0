"""Labels as one gives them: the name of a bank, a file, a list, a bank, or nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import LabelBankError, LabelError
from actionclip_deploy.labels import LabelBank, bank_for
from actionclip_deploy.runtimes import RuntimeInfo

LABELS = ("opening a door", "closing a door", "running")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def runtime(bundle: Bundle) -> FakeRuntime:
    return FakeRuntime(bundle.manifest)


def saved_bank(bundle: Bundle, name: str, labels: tuple[str, ...] = LABELS) -> LabelBank:
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), labels, name=name)
    bank.save(bundle)
    return bank


def label_file(folder: Path) -> Path:
    path = folder / "labels.txt"
    path.write_text("\n".join(LABELS), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["list", "tuple", "iterator", "array", "path", "name of a file"])
def test_labels_in_any_form_give_the_bank_that_build_gives(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path, kind: str
) -> None:
    path = label_file(tmp_path)
    given: dict[str, Any] = {
        "list": list(LABELS),
        "tuple": LABELS,
        "iterator": iter(LABELS),
        "array": np.array(LABELS),
        "path": path,
        "name of a file": str(path),
    }
    built = LabelBank.build(bundle, runtime, LABELS, name="a")
    bank = bank_for(bundle, runtime, given[kind], cache=False)
    assert bank.labels == LABELS
    assert bank.embeddings.tobytes() == built.embeddings.tobytes()
    assert bank.sha256 == built.sha256
    assert bank.is_adhoc
    assert not built.is_adhoc


def test_a_name_is_that_of_a_bank_before_that_of_a_file(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_bank(bundle, "labels.txt", ("jumping", "sitting"))
    label_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert bank_for(bundle, runtime, "labels.txt").labels == ("jumping", "sitting")
    assert bank_for(bundle, runtime, "./labels.txt", cache=False).labels == LABELS
    assert bank_for(bundle, runtime, Path("labels.txt"), cache=False).labels == LABELS


def test_without_labels_the_only_bank_is_taken(bundle: Bundle, runtime: FakeRuntime) -> None:
    with pytest.raises(
        LabelBankError, match=r"labels is missing, and .* has no label bank; give labels"
    ):
        bank_for(bundle, runtime)
    saved_bank(bundle, "mine")
    assert bank_for(bundle, runtime).name == "mine"
    saved_bank(bundle, "yours")
    with pytest.raises(
        LabelBankError, match=r"labels is missing, .* has the label banks mine, yours; choose"
    ):
        bank_for(bundle, runtime)


def test_a_bank_is_taken_as_it_is_unless_another_encoder_made_it(
    bundle: Bundle, runtime: FakeRuntime
) -> None:
    bank = saved_bank(bundle, "mine")
    assert bank_for(bundle, runtime, bank) is bank
    with pytest.raises(LabelBankError, match="made by another text encoder"):
        bank_for(bundle, runtime, dataclasses.replace(bank, textual_sha256="1" * 64))


def test_templates_are_those_of_labels_and_a_choice_of_a_bank(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path
) -> None:
    bank = saved_bank(bundle, "mine")
    file = tmp_path / "templates.txt"
    file.write_text("{} again\n", encoding="utf-8")
    assert bank_for(bundle, runtime, LABELS, templates=file, cache=False).templates == ("{} again",)
    chosen = bank_for(bundle, runtime, "mine", templates=bank.templates[1:])
    assert chosen.embeddings.tobytes() == bank.embeddings[1:].tobytes()
    with pytest.raises(LabelBankError, match=r"has no template '{} again'"):
        bank_for(bundle, runtime, "mine", templates=["{} again"])
    with pytest.raises(LabelError, match=r"give templates as a list, such as \['{} again'\]"):
        bank_for(bundle, runtime, LABELS, templates="{} again")


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (5, r"labels are 5 \(int\); expected a sequence of at least one label"),
        (b"run", r"labels are b'run' \(bytes\)"),
        ({"run", "walk"}, r"\(set\); expected a sequence"),
        ({0: "run"}, r"\(dict\); expected a sequence"),
        (np.array(3), r"\(ndarray\); expected a sequence"),
        ([], "expected a sequence of at least one label"),
        (["run", 3], r"label 2 \('3'\) is not a string"),
    ],
)
def test_what_is_no_label_is_told_in_a_sentence(
    bundle: Bundle, runtime: FakeRuntime, labels: Any, match: str
) -> None:
    with pytest.raises(LabelError, match=match):
        bank_for(bundle, runtime, labels)
    with pytest.raises(LabelError, match=match):
        LabelBank.build(bundle, runtime, labels, name="a")
    assert runtime.calls == []


def test_a_name_of_nothing_is_told_with_the_banks_that_there_are(
    bundle: Bundle, runtime: FakeRuntime
) -> None:
    saved_bank(bundle, "mine")
    with pytest.raises(LabelBankError, match=r"'archery', .* neither a label bank .*\(it has: m"):
        bank_for(bundle, runtime, "archery")
    with pytest.raises(LabelError, match=r"label file archery\.csv cannot be read"):
        bank_for(bundle, runtime, "archery.csv")


# What is kept


def test_labels_are_embedded_once_for_each_encoder_texts_and_runtime(
    bundle: Bundle, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def num_calls(labels: Any, *, of: Bundle = bundle, **options: Any) -> int:
        runtime = FakeRuntime(of.manifest)
        bank = bank_for(of, runtime, labels, cache=cache, **options)
        fresh = bank_for(of, FakeRuntime(of.manifest), labels, cache=False, **options)
        assert bank.labels == tuple(labels)  # as they were written this time
        assert bank.sha256 == fresh.sha256
        return len(runtime.calls)

    assert num_calls(LABELS) > 0
    assert num_calls(LABELS) == 0
    assert num_calls([label.upper() for label in LABELS]) == 0  # the encoder reads the same
    assert num_calls(LABELS[::-1]) > 0
    assert num_calls(LABELS, templates=["{}"]) > 0
    assert num_calls(LABELS, of=write_fake_bundle(tmp_path / "other", textual=b"others")) > 0


def test_embeddings_of_one_runtime_are_not_taken_for_those_of_another(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path
) -> None:
    class OtherRuntime(FakeRuntime):
        def describe(self) -> RuntimeInfo:
            return dataclasses.replace(super().describe(), execution_provider="cuda")

    bank_for(bundle, runtime, LABELS, cache=tmp_path / "cache")
    other = OtherRuntime(bundle.manifest)
    bank_for(bundle, other, LABELS, cache=tmp_path / "cache")
    assert other.calls


def test_a_damaged_entry_is_made_again(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = bank_for(bundle, runtime, LABELS, cache=cache)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    again = bank_for(bundle, runtime, LABELS, cache=cache)
    assert again.sha256 == first.sha256
    runtime.calls.clear()
    assert bank_for(bundle, runtime, LABELS, cache=cache).sha256 == first.sha256
    assert runtime.calls == []


def test_an_entry_says_what_it_is_of(bundle: Bundle, runtime: FakeRuntime, tmp_path: Path) -> None:
    bank_for(bundle, runtime, LABELS, cache=tmp_path / "cache")
    (record,) = tmp_path.joinpath("cache").rglob("entry.json")
    key = json.loads(record.read_text())["key"]
    assert key["labels"] == list(LABELS)
    assert key["textual"] == bundle.textual_sha256


def test_a_cache_that_cannot_be_written_only_costs_time(
    bundle: Bundle, runtime: FakeRuntime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    bank = bank_for(bundle, runtime, LABELS, cache=tmp_path / "cache")
    assert bank.labels == LABELS
    assert "are not kept" in caplog.text


def test_labels_of_one_checkpoint_are_not_taken_for_those_of_another(
    bundle: Bundle, tmp_path: Path
) -> None:
    # As PyTorch runs a checkpoint: the tokenizer is the only file, and the same for all.
    files = {"tokenizer.json": bundle.manifest.files["tokenizer.json"]}
    num_calls = []
    for sha256 in ("1" * 64, "2" * 64, "2" * 64):
        source = bundle.manifest.source.model_copy(update={"sha256": sha256})
        manifest = bundle.manifest.model_copy(update={"files": files, "source": source})
        runtime = FakeRuntime(manifest)
        bank_for(Bundle(bundle.path, manifest), runtime, LABELS, cache=tmp_path / "cache")
        num_calls.append(len(runtime.calls))
    assert num_calls[0] > 0
    assert num_calls[1] > 0
    assert num_calls[2] == 0
