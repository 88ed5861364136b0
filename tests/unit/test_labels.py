from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TEMPLATES, FakeRuntime, write_fake_bundle
from safetensors.numpy import load_file, save

from actionclip_deploy import labels
from actionclip_deploy.bundle import Bundle, new_folder
from actionclip_deploy.command_records import LabelBankDiff, LabelBankInfo
from actionclip_deploy.errors import (
    BundleError,
    IntegrityError,
    LabelBankError,
    LabelError,
    LabelWarning,
    ShapeError,
)
from actionclip_deploy.labels import (
    LabelBank,
    diff_label_banks,
    list_label_banks,
    remove_label_bank,
)
from actionclip_deploy.prompts import read_labels, read_templates
from actionclip_deploy.tokenizer import Tokenizer

LABELS = ("running", "brush hair", "sit")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def bank(bundle: Bundle) -> LabelBank:
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="sports")


@pytest.fixture
def saved(bundle: Bundle, bank: LabelBank) -> Path:
    return bank.save(bundle)


def change_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "bank.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def replace_embeddings(folder: Path, **arrays: np.ndarray) -> None:
    """Other embeddings, with a checksum that fits them."""
    data = save(arrays)
    (folder / "bank.safetensors").write_bytes(data)
    spec = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    change_record(folder, lambda record: record.update(embeddings=spec))


def test_each_embedding_is_that_of_its_template_and_label(bundle: Bundle, bank: LabelBank) -> None:
    runtime = FakeRuntime(bundle.manifest)
    tokenizer = Tokenizer.from_file(bundle.path / "tokenizer.json")
    assert bank.embeddings.shape == (2, 3, 16)
    assert bank.embeddings.dtype == np.float32
    for k, template in enumerate(TEMPLATES):
        for c, label in enumerate(LABELS):
            prompt = template.replace("{}", label)
            alone = runtime.encode_text(tokenizer([prompt], context_length=77))
            np.testing.assert_allclose(bank.embeddings[k, c], alone[0], atol=1e-6)


def test_a_bank_says_what_it_was_made_of(bundle: Bundle, bank: LabelBank) -> None:
    assert bank.name == "sports"
    assert bank.labels == LABELS
    assert bank.templates == TEMPLATES
    assert bank.textual_sha256 == bundle.textual_sha256


def test_prompts_go_through_in_batches_of_one_length(bundle: Bundle) -> None:
    runtime, steps = FakeRuntime(bundle.manifest), []
    LabelBank.build(
        bundle,
        runtime,
        LABELS,
        name="a",
        batch_size=4,
        progress=lambda done, total: steps.append((done, total)),
    )
    shapes = [shape for graph, shape in runtime.calls if graph == "textual"]
    assert [rows for rows, _ in shapes] == [4, 2]
    assert len({length for _, length in shapes}) == 1
    assert steps == [(4, 6), (6, 6)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_does_not_change_a_bank(
    bundle: Bundle, bank: LabelBank, batch_size: int
) -> None:
    other = LabelBank.build(
        bundle, FakeRuntime(bundle.manifest), LABELS, name="a", batch_size=batch_size
    )
    np.testing.assert_array_equal(other.embeddings, bank.embeddings)


def test_other_templates_than_the_manifest_s_can_be_given(bundle: Bundle) -> None:
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="a", templates=["{}"])
    assert bank.templates == ("{}",)
    assert bank.embeddings.shape == (1, 3, 16)


def test_a_saved_bank_is_read_back_to_the_last_bit(bundle: Bundle, bank: LabelBank) -> None:
    folder = bank.save(bundle)
    assert folder == bundle.path / "labels" / "sports"
    assert sorted(path.name for path in folder.iterdir()) == ["bank.json", "bank.safetensors"]
    loaded = LabelBank.load(bundle, "sports")
    np.testing.assert_array_equal(loaded.embeddings, bank.embeddings)
    for field in ("name", "labels", "templates", "textual_sha256"):
        assert getattr(loaded, field) == getattr(bank, field)


def test_the_embeddings_can_be_read_by_any_safetensors_library(
    bank: LabelBank, saved: Path
) -> None:
    arrays = load_file(saved / "bank.safetensors")
    assert list(arrays) == ["embeddings"]
    np.testing.assert_array_equal(arrays["embeddings"], bank.embeddings)


def test_a_saved_bank_leaves_the_bundle_whole(bundle: Bundle, saved: Path) -> None:
    reopened = Bundle.open(bundle.path, check_hashes=True)
    assert reopened.label_bank_names() == ("sports",)
    assert LabelBank.load(reopened, "sports").labels == LABELS


def test_a_bank_under_another_folder_name_takes_that_name(bundle: Bundle, saved: Path) -> None:
    shutil.copytree(saved, saved.with_name("copy"))
    assert LabelBank.load(bundle, "copy").name == "copy"


def test_labels_of_any_language_survive(bundle: Bundle) -> None:
    labels = ("跳远", "élan 🏃", 'the "moon", walk')
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), labels, name="a")
    bank.save(bundle)
    assert LabelBank.load(bundle, "a").labels == labels


def test_a_bank_is_replaced_only_when_asked(bundle: Bundle, bank: LabelBank, saved: Path) -> None:
    other = dataclasses.replace(bank, labels=("a", "b", "c"))
    with pytest.raises(BundleError, match=r"exists already.*--overwrite"):
        other.save(bundle)
    assert LabelBank.load(bundle, "sports").labels == LABELS
    other.save(bundle, overwrite=True)
    assert LabelBank.load(bundle, "sports").labels == ("a", "b", "c")
    assert [path.name for path in saved.parent.iterdir()] == ["sports"]


def test_a_bank_that_cannot_be_written_leaves_nothing_behind(
    bundle: Bundle, bank: LabelBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LabelBankError, match=r"cannot be written.*No space left on device"):
        bank.save(bundle)
    assert list((bundle.path / "labels").iterdir()) == []


def test_a_prompt_over_the_context_length_names_the_line_and_the_template(
    tmp_path: Path,
) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle", context_length=30)
    file = tmp_path / "labels.csv"
    file.write_text("id,name\n0,run\n1,a label of many letters\n", encoding="utf-8")
    with pytest.raises(LabelError) as caught:
        LabelBank.build(bundle, FakeRuntime(bundle.manifest), read_labels(file), name="a")
    assert str(caught.value).startswith(
        f"{file} line 3 (label 'a label of many letters') in template 1 ('a photo of action {{}}') "
    )
    assert "takes at most 30; shorten the label or the template" in str(caught.value)


def test_a_template_of_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle", context_length=12)
    file = tmp_path / "templates.txt"
    file.write_text("a {}\nsomebody seen doing {}\n", encoding="utf-8")
    with pytest.raises(LabelError, match=r"label 1 \('run'\) in .*templates\.txt line 2 "):
        LabelBank.build(
            bundle,
            FakeRuntime(bundle.manifest),
            ["run"],
            name="a",
            templates=read_templates(file),
        )


def test_a_label_with_a_control_token_is_refused(bundle: Bundle) -> None:
    with pytest.raises(LabelError, match=r"label 2 .* in template 1 .* control token"):
        LabelBank.build(bundle, FakeRuntime(bundle.manifest), ["run", "<|endoftext|>"], name="a")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"labels": []}, LabelError, "expected a sequence of at least one label"),
        ({"labels": ["run", "run"]}, LabelError, "repeats"),
        ({"templates": ["no place"]}, LabelError, "has {} 0 times"),
        ({"templates": []}, LabelError, "at least one template"),
        ({"name": "../other"}, ValueError, "name '../other' is not allowed"),
        ({"name": ""}, ValueError, "name '' is not allowed"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected 1 or more"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    bundle: Bundle, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    runtime = FakeRuntime(bundle.manifest)
    arguments = {"labels": LABELS, "name": "a", **options}
    with pytest.raises(error, match=match):
        LabelBank.build(bundle, runtime, **arguments)
    assert runtime.calls == []


def test_a_runtime_of_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = write_fake_bundle(tmp_path / "other", textual=b"other weights")
    with pytest.raises(LabelBankError, match="runtime was opened on a bundle with another text"):
        LabelBank.build(bundle, FakeRuntime(other.manifest), LABELS, name="a")


class BrokenRuntime(FakeRuntime):
    def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
        return np.full_like(super()._run(graph, array), np.nan)


def test_embeddings_that_are_not_of_norm_1_are_refused(bundle: Bundle, bank: LabelBank) -> None:
    with pytest.raises(LabelBankError, match="not all of norm 1; check the runtime"):
        LabelBank.build(bundle, BrokenRuntime(bundle.manifest), LABELS, name="a")
    with pytest.raises(LabelBankError, match="not all of norm 1"):
        dataclasses.replace(bank, embeddings=bank.embeddings * np.float32(1.01))


@pytest.mark.parametrize(
    "change", [lambda e: e[:1], lambda e: e[:, :2], lambda e: e[0], lambda e: e.astype(np.float64)]
)
def test_embeddings_that_do_not_fit_labels_and_templates_are_refused(
    bank: LabelBank, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    with pytest.raises(ShapeError, match=r"expected shape \(2, 3, D\) and dtype float32"):
        dataclasses.replace(bank, embeddings=change(bank.embeddings))


def test_a_bank_that_is_not_there_is_refused_with_those_that_are(
    bundle: Bundle, saved: Path
) -> None:
    with pytest.raises(LabelBankError, match=r"no label bank 'none' \(it has: sports\).*build"):
        LabelBank.load(bundle, "none")


def test_a_bundle_without_banks_says_so(bundle: Bundle) -> None:
    with pytest.raises(LabelBankError, match=r"\(it has: none\)"):
        LabelBank.load(bundle, "sports")


@pytest.mark.parametrize("name", ["../sports", "/x/labels.csv", "labels.csv", "a\\b"])
def test_a_path_in_the_place_of_a_name_says_how_a_bank_is_made(bundle: Bundle, name: str) -> None:
    with pytest.raises(LabelBankError, match=r"is not the name of a label bank of .*labels build"):
        LabelBank.load(bundle, name)


def test_a_bank_of_another_text_encoder_is_refused(
    bundle: Bundle, bank: LabelBank, saved: Path, tmp_path: Path
) -> None:
    other = write_fake_bundle(tmp_path / "other", textual=b"other weights")
    shutil.copytree(saved, other.path / "labels" / "sports")
    with pytest.raises(
        LabelBankError, match=r"made by another text encoder or tokenizer.*build it"
    ):
        LabelBank.load(other, "sports")
    with pytest.raises(LabelBankError, match="made by another text encoder or tokenizer"):
        bank.save(other, overwrite=True)


def test_a_bundle_with_other_visual_weights_takes_the_bank(
    bank: LabelBank, saved: Path, tmp_path: Path
) -> None:
    other = write_fake_bundle(tmp_path / "other", num_frames=8)
    shutil.copytree(saved, other.path / "labels" / "sports")
    assert LabelBank.load(other, "sports").labels == LABELS


def test_a_missing_file_is_named(bundle: Bundle, saved: Path) -> None:
    (saved / "bank.safetensors").unlink()
    with pytest.raises(LabelBankError, match=r"damaged: bank\.safetensors is missing"):
        LabelBank.load(bundle, "sports")


def test_a_file_cut_off_is_refused(bundle: Bundle, saved: Path) -> None:
    path = saved / "bank.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LabelBankError, match=r"bank\.safetensors has \d+ bytes instead of \d+"):
        LabelBank.load(bundle, "sports")


def test_one_flipped_bit_is_refused(bundle: Bundle, saved: Path) -> None:
    path = saved / "bank.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LabelBankError, match=r"bank\.safetensors does not have the sha256"):
        LabelBank.load(bundle, "sports")


def test_a_label_corrected_by_hand_is_refused(bundle: Bundle, saved: Path) -> None:
    change_record(saved, lambda record: record["labels"].__setitem__(0, "jogging"))
    with pytest.raises(
        LabelBankError, match="labels or templates are not those that were embedded"
    ):
        LabelBank.load(bundle, "sports")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda record: record.update(schema_version=4),
            "has schema version 4, .* reads 1 and 2 and 3",
        ),
        (lambda record: record.pop("schema_version"), "has schema version None"),
        (lambda record: record.pop("labels"), r"damaged: .*bank\.json: labels: Field required"),
        (lambda record: record.update(labels="run"), r"damaged: .*labels: "),
        (lambda record: record.update(extra=1), r"damaged: .*extra: "),
        (
            lambda record: record["embeddings"].update(size_bytes=-1),
            r"damaged: .*embeddings\.size_bytes is -1 and must be from 0 to 1,000",
        ),
    ],
)
def test_a_record_of_another_schema_is_refused(
    bundle: Bundle, saved: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    change_record(saved, change)
    with pytest.raises(LabelBankError, match=match):
        LabelBank.load(bundle, "sports")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_record_that_is_not_json_is_refused(bundle: Bundle, saved: Path, content: bytes) -> None:
    (saved / "bank.json").write_bytes(content)
    with pytest.raises(LabelBankError, match=r"bank\.json cannot be read as JSON"):
        LabelBank.load(bundle, "sports")


def unit(*shape: int) -> np.ndarray:
    array = np.ones(shape, np.float32)
    return array / np.float32(np.sqrt(shape[-1]))


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"other": unit(2, 3, 16)}, "holds no embeddings"),
        ({"embeddings": unit(2, 2, 16)}, "content is not that of a bank"),
        ({"embeddings": unit(2, 3, 16).astype(np.float64)}, "content is not that of a bank"),
        ({"embeddings": unit(2, 3, 8)}, "its embeddings have width 8"),
        ({"embeddings": unit(2, 3, 16) * np.float32(2)}, "not all of norm 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    bundle: Bundle, saved: Path, arrays: dict[str, np.ndarray], match: str
) -> None:
    replace_embeddings(saved, **arrays)
    with pytest.raises(LabelBankError, match=match):
        LabelBank.load(bundle, "sports")


def test_a_file_that_is_not_safetensors_is_refused(bundle: Bundle, saved: Path) -> None:
    data = b"\x80\x04N."
    (saved / "bank.safetensors").write_bytes(data)
    spec = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    change_record(saved, lambda record: record.update(embeddings=spec))
    with pytest.raises(LabelBankError, match=r"bank\.safetensors holds no embeddings"):
        LabelBank.load(bundle, "sports")


@pytest.mark.parametrize("name", ["bank.json", "bank.safetensors"])
def test_a_link_out_of_the_bundle_is_refused(
    bundle: Bundle, saved: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / name
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(IntegrityError, match="lies outside of it"):
        LabelBank.load(bundle, "sports")


def test_banks_are_listed_by_name_with_what_speaks_against_them(
    bundle: Bundle, bank: LabelBank, saved: Path
) -> None:
    for name in ("altered", "broken", "foreign"):
        shutil.copytree(saved, saved.with_name(name))
    (saved.with_name("altered") / "bank.safetensors").write_bytes(b"")
    (saved.with_name("broken") / "bank.json").write_bytes(b"")
    change_record(saved.with_name("foreign"), lambda record: record.update(textual_sha256="0" * 64))
    altered, broken, foreign, good = list_label_banks(bundle)
    assert good == LabelBankInfo(name="sports", num_labels=3, num_templates=2, problem=None)
    assert (altered.name, altered.num_labels) == ("altered", 3)
    assert "has 0 bytes" in str(altered.problem)
    assert (broken.name, broken.num_labels, broken.num_templates) == ("broken", None, None)
    assert "cannot be read as JSON" in str(broken.problem)
    assert (foreign.name, foreign.num_templates) == ("foreign", 2)
    assert "another text encoder" in str(foreign.problem)


def test_a_bundle_without_banks_lists_none(bundle: Bundle) -> None:
    assert list_label_banks(bundle) == ()


def test_a_diff_names_what_came_went_and_moved(bundle: Bundle, bank: LabelBank) -> None:
    runtime = FakeRuntime(bundle.manifest)
    labels = ("brush hair", "swim", "sit")
    new = LabelBank.build(bundle, runtime, labels, name="new", templates=["{}", "{}, an action"])
    assert diff_label_banks(bank, new) == LabelBankDiff(
        added=("swim",),
        removed=("running",),
        moved=(("brush hair", 1, 0),),
        templates_added=("{}",),
        templates_removed=("a photo of action {}",),
    )


def test_a_bank_does_not_differ_from_itself(bank: LabelBank) -> None:
    assert diff_label_banks(bank, bank) == LabelBankDiff(
        added=(), removed=(), moved=(), templates_added=(), templates_removed=()
    )


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", ["textual.onnx", "tokenizer.json"])
def test_no_bank_is_made_by_an_altered_text_encoder(
    bundle: Bundle, name: str, verify: bool
) -> None:
    path = bundle.path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = Bundle.open(bundle.path, verify=verify)
    with pytest.raises(IntegrityError, match=rf"{name} does not have the sha256"):
        LabelBank.build(opened, FakeRuntime(opened.manifest), ["and"], name="b")
    assert opened.label_bank_names() == ()


def test_a_bank_is_held_against_what_its_text_encoder_was_held_against(
    bundle: Bundle, bank: LabelBank, saved: Path
) -> None:
    spec = {"embeddings": np.asarray(bank.embeddings)}
    data = save(spec, {"textual_sha256": "0" * 64})
    (saved / "bank.safetensors").write_bytes(data)
    told = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    change_record(saved, lambda record: record.update(embeddings=told))
    with pytest.raises(LabelBankError, match="made by another text encoder or tokenizer"):
        LabelBank.load(bundle, "sports")


def test_a_bank_of_an_unchecked_text_encoder_stays_one_until_it_is_built_again(
    bundle: Bundle, bank: LabelBank, saved: Path
) -> None:
    replace_embeddings(saved, embeddings=bank.embeddings)  # as older versions wrote them
    told = rf"'sports' was made by a version .* `actionclip labels build {bundle.path} --labels"
    with pytest.warns(LabelWarning, match=told):
        old = LabelBank.load(bundle, "sports")
    old.save(bundle, overwrite=True)
    with pytest.warns(LabelWarning, match=told):
        LabelBank.load(bundle, "sports")
    bank.save(bundle, overwrite=True)
    assert LabelBank.load(bundle, "sports").encoder_checked


def test_what_another_program_saved_meanwhile_is_not_replaced(
    bundle: Bundle, bank: LabelBank
) -> None:
    assert bundle.label_bank_state("sports") == ""
    before = bundle.label_bank_state("sports")
    other = dataclasses.replace(bank, labels=("run", "comb", "sit"))
    other.save(bundle, overwrite=True, expected=before)
    with pytest.raises(LabelBankError, match=r"'sports' was changed by another program .* saved;"):
        bank.save(bundle, overwrite=True, expected=before)
    assert LabelBank.load(bundle, "sports").labels == other.labels
    bank.save(bundle, overwrite=True, expected=bundle.label_bank_state("sports"))
    other.save(bundle, overwrite=True)  # whatever is there
    assert [path.name for path in (bundle.path / "labels").iterdir()] == ["sports"]


def test_a_bank_that_was_removed_meanwhile_is_not_brought_back(
    bundle: Bundle, bank: LabelBank, saved: Path
) -> None:
    before = bundle.label_bank_state("sports")
    remove_label_bank(bundle, "sports")
    remove_label_bank(bundle, "sports")  # it is gone already
    with pytest.raises(LabelBankError, match="was changed by another program"):
        bank.save(bundle, overwrite=True, expected=before)
    assert not saved.exists()
    assert list(saved.parent.iterdir()) == []


def test_a_damaged_bank_may_be_replaced_by_whoever_saw_it(
    bundle: Bundle, bank: LabelBank, saved: Path
) -> None:
    (saved / "bank.json").write_text("{")
    bank.save(bundle, overwrite=True, expected=bundle.label_bank_state("sports"))
    assert LabelBank.load(bundle, "sports").labels == LABELS


@pytest.mark.parametrize("moment", ["before the write", "in the middle"])
def test_a_bank_is_not_saved_into_another_bundle_that_took_the_place(
    bundle: Bundle, bank: LabelBank, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_again() -> None:
        with new_folder(bundle.path, overwrite=True, marker="manifest.json") as folder:
            write_fake_bundle(folder, textual=b"another text encoder")

    if moment == "before the write":
        export_again()
    else:
        write = labels.write_record

        def write_late(path: Path, record: Any) -> None:
            export_again()
            write(path, record)

        monkeypatch.setattr(labels, "write_record", write_late)
    with pytest.raises(BundleError, match="was replaced by another export since it was opened"):
        bank.save(bundle)
    assert Bundle.open(bundle.path).label_bank_names() == ()


def test_a_diff_compares_texts_as_the_text_encoder_reads_them(bundle: Bundle) -> None:
    runtime = FakeRuntime(bundle.manifest)
    old, new = (
        LabelBank.build(bundle, runtime, labels, name="one", templates=templates)
        for labels, templates in (
            (("caf\u00e9", "Sit", "a & b"), ("{}", "it's {}")),
            (("cafe\u0301", "a &amp; b", "sit"), ("{}", "it\u2019s {}")),
        )
    )
    assert diff_label_banks(old, new) == LabelBankDiff(
        added=(),
        removed=(),
        moved=(("a &amp; b", 2, 1), ("sit", 1, 2)),
        templates_added=(),
        templates_removed=(),
    )


def test_templates_of_a_bank_are_found_in_another_unicode_form(bundle: Bundle) -> None:
    templates = ("{} au caf\u00e9", "{}")
    runtime = FakeRuntime(bundle.manifest)
    bank = LabelBank.build(bundle, runtime, ["sit"], name="mine", templates=templates)

    chosen = bank.with_templates(["{}  au cafe\u0301"])

    assert chosen.templates == templates[:1]
    np.testing.assert_array_equal(chosen.embeddings, bank.embeddings[:1])


@pytest.mark.parametrize("second", ["sit - up", "sit -up"])
def test_labels_of_equal_tokens_are_refused_with_both_lines(
    bundle: Bundle, tmp_path: Path, second: str
) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(f"sit-up\nrun\n{second}\n")

    with pytest.raises(LabelError, match=r"txt line 3 .* same tokens as .*txt line 1"):
        LabelBank.build(bundle, FakeRuntime(bundle.manifest), read_labels(path), name="mine")
