"""`labels show`, `diff`, `remove` and `rename`, as one types them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from typer.testing import CliRunner

from actionclip_deploy import labels
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank

LABELS = ("an and", "in [an]", "and")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    opened = write_fake_bundle(tmp_path / "bundle")
    runtime = FakeRuntime(opened.manifest)
    LabelBank.build(opened, runtime, LABELS, name="mine").save(opened)
    LabelBank.build(opened, runtime, LABELS[1:], name="other", templates=["{}"]).save(opened)
    return opened


def names(bundle: Bundle) -> list[str]:
    return sorted(path.name for path in (bundle.path / "labels").iterdir())


def test_a_bank_is_shown_with_labels_templates_counts_and_hash(bundle: Bundle) -> None:
    result = run("labels", "show", bundle.path, "mine")
    assert result.exit_code == 0, result.output
    bank = LabelBank.load(bundle, "mine")
    for text in (*bank.labels, *bank.templates, "never unknown"):
        assert text in result.stdout
    data = json.loads(run("labels", "show", bundle.path, "mine", "--json").stdout)
    assert (data["labels"], data["templates"]) == (list(bank.labels), list(bank.templates))
    assert (data["num_labels"], data["num_templates"]) == (3, 2)
    assert (data["sha256"], data["textual_sha256"]) == (bank.sha256, bundle.textual_sha256)
    assert (data["calibration"], data["warnings"]) == (None, [])
    assert data["path"] == str(bundle.path / "labels" / "mine")


def test_a_bank_that_is_refused_is_shown_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    other = write_fake_bundle(tmp_path / "another", textual=b"another text encoder")
    (other.path / "labels").mkdir()
    (bundle.path / "labels" / "mine").rename(other.path / "labels" / "mine")
    result = run("labels", "show", other.path, "mine")
    assert result.exit_code == 0
    assert "was made by another text encoder" in sentence(result)
    assert "in [an]" in result.stdout
    data = json.loads(run("labels", "show", other.path, "mine", "--json").stdout)
    assert data["sha256"] is None
    (warning,) = data["warnings"]
    assert "was made by another text encoder" in warning


def test_what_changed_is_counted_before_it_is_listed(bundle: Bundle) -> None:
    told = run("labels", "diff", bundle.path, "mine", "other").stdout.splitlines()
    assert told[0] == ("Labels: 0 added, 1 removed, 2 moved. Templates: 1 added, 2 removed.")
    assert told[1:4] == [
        "removed: an and",
        "moved: in [an], from 1 to 0",
        "moved: and, from 2 to 1",
    ]
    assert "templates added: {}" in told


def test_a_bank_is_removed(bundle: Bundle) -> None:
    result = run("labels", "remove", bundle.path, "mine")
    assert result.exit_code == 0
    assert f"Removed the label bank mine from {bundle.path}." in result.stdout.replace("\n", "")
    assert names(bundle) == ["other"]
    again = run("labels", "remove", bundle.path, "mine")
    assert again.exit_code == 1
    assert "has no label bank 'mine' (it has: other), so nothing was removed" in sentence(again)
    assert run("labels", "remove", bundle.path, "..").exit_code == 1
    assert names(bundle) == ["other"]


def test_a_bank_is_renamed_and_is_the_same(bundle: Bundle) -> None:
    before = LabelBank.load(bundle, "mine")
    result = run("labels", "rename", bundle.path, "mine", "new")
    assert result.exit_code == 0
    assert "Renamed the label bank mine" in result.stdout
    assert names(bundle) == ["new", "other"]
    assert LabelBank.load(bundle, "new").sha256 == before.sha256
    record = json.loads((bundle.path / "labels" / "new" / "bank.json").read_text())
    assert record["name"] == "new"


def test_a_bank_of_the_new_name_is_replaced_only_when_asked(bundle: Bundle) -> None:
    before = LabelBank.load(bundle, "mine")
    refused = run("labels", "rename", bundle.path, "mine", "other")
    assert refused.exit_code == 1
    assert "exists already; choose another name or replace it with --overwrite" in sentence(refused)
    assert names(bundle) == ["mine", "other"]
    result = run("labels", "rename", bundle.path, "mine", "other", "--overwrite")
    assert result.exit_code == 0
    assert "and replaced the one that was other" in " ".join(result.stdout.split())
    assert names(bundle) == ["other"]
    assert LabelBank.load(bundle, "other").sha256 == before.sha256


@pytest.mark.parametrize(
    ("old", "new", "code", "text"),
    [
        ("mine", "../x", 2, "'../x' is not allowed; use letters"),
        ("mine", "", 2, "'' is not allowed; use letters"),
        ("mine", "mine", 2, "'mine' is the name of the label bank already"),
        ("nobody", "new", 1, "no label bank 'nobody' (it has: mine, other)"),
    ],
)
def test_names_that_cannot_be_are_refused(
    bundle: Bundle, old: str, new: str, code: int, text: str
) -> None:
    result = run("labels", "rename", bundle.path, old, new)
    assert result.exit_code == code
    assert text in sentence(result)
    assert names(bundle) == ["mine", "other"]


@pytest.mark.parametrize("moment", ["write", "remove"])
def test_a_rename_that_is_killed_leaves_a_whole_bank(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    expected = LabelBank.load(bundle, "mine").sha256

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    step = "write_record" if moment == "write" else "remove_label_bank"
    # The steps have no public name, and it is between them that a kill would hurt.
    monkeypatch.setattr(labels, step, fail)
    assert run("labels", "rename", bundle.path, "mine", "new").exit_code == 130
    whole = ["mine", "new"] if moment == "remove" else ["mine"]
    assert names(bundle) == [*whole, "other"]
    assert {LabelBank.load(bundle, name).sha256 for name in whole} == {expected}


@pytest.mark.parametrize("verb", [("remove", "mine"), ("rename", "mine", "new")])
def test_a_bundle_that_is_read_only_is_told_in_a_sentence(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    from actionclip_deploy import files

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "_make_workspace", refuse)  # whoever is root may write anywhere
    result = run("labels", verb[0], bundle.path, *verb[1:])
    assert result.exit_code == 1
    assert sentence(result) == (
        f"error: {bundle.path} cannot be changed (Read-only file system), so nothing was done; "
        "change its permissions, or work on a copy of the bundle."
    )
    assert names(bundle) == ["mine", "other"]
