from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import write_fake_bundle

from actionclip_deploy import files
from actionclip_deploy.bundle import (
    Bundle,
    check_replaceable,
    hash_files,
    new_folder,
    write_manifest,
)
from actionclip_deploy.errors import BundleError, IntegrityError
from actionclip_deploy.files import finish_replacements, sha256_of_file


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


def change_manifest(bundle: Bundle, change: Callable[[Any], Any]) -> None:
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data)))


def test_a_bundle_gives_its_manifest_and_paths(bundle: Bundle) -> None:
    opened = Bundle.open(str(bundle.path), check_hashes=True)
    assert opened.manifest == bundle.manifest
    assert opened.graph_path("visual") == bundle.path / "visual.onnx"
    assert opened.file("tokenizer.json").is_file()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing does not exist; expected the folder"):
        Bundle.open(tmp_path / "nothing")


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    with pytest.raises(BundleError, match=r"model\.pt is a file; expected the folder of a bundle"):
        Bundle.open(path)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json.*actionclip export CHECKPOINT"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"\x80\x04pickle", b"[" * 100_000],
    ids=["empty", "cut off", "not utf-8", "pickle", "deep"],
)
def test_a_manifest_that_is_not_json_is_refused(bundle: Bundle, content: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON .*export the bundle again"):
        Bundle.open(bundle.path)


def test_a_manifest_that_cannot_be_read_is_refused(bundle: Bundle) -> None:
    (bundle.path / "manifest.json").unlink()
    (bundle.path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(Is a directory\)"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_a_manifest_that_is_no_object_is_refused(bundle: Bundle, content: str, kind: str) -> None:
    (bundle.path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=f"holds a {kind}; expected a JSON object"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_version_is_refused(bundle: Bundle, version: object) -> None:
    change_manifest(bundle, lambda data: {**data, "schema_version": version})
    with pytest.raises(BundleError, match=f"has schema version {version!r}, and this .* reads 1"):
        Bundle.open(bundle.path)


def test_a_manifest_without_schema_version_is_refused(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: {k: v for k, v in data.items() if k != "schema_version"})
    with pytest.raises(BundleError, match="has schema version None"):
        Bundle.open(bundle.path)


def test_an_unknown_field_is_refused_by_its_name(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: {**data, "model": {**data["model"], "colour": "red"}})
    with pytest.raises(BundleError, match=r"does not describe a bundle: model\.colour: Extra inp"):
        Bundle.open(bundle.path)


def test_a_missing_field_is_refused_by_its_name(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: {k: v for k, v in data.items() if k != "templates"})
    with pytest.raises(BundleError, match="does not describe a bundle: templates: Field required"):
        Bundle.open(bundle.path)


def test_a_missing_file_is_refused(bundle: Bundle) -> None:
    (bundle.path / "temporal.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"temporal\.onnx is missing .*copy the bundle again"):
        Bundle.open(bundle.path)


def test_a_folder_in_the_place_of_a_file_is_refused(bundle: Bundle) -> None:
    (bundle.path / "temporal.onnx").unlink()
    (bundle.path / "temporal.onnx").mkdir()
    with pytest.raises(IntegrityError, match=r"temporal\.onnx is missing"):
        Bundle.open(bundle.path)


def test_a_truncated_file_is_refused_without_reading_it(bundle: Bundle) -> None:
    path = bundle.path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"tokenizer\.json has \d+ bytes instead of \d+"):
        Bundle.open(bundle.path)


def test_an_altered_file_is_found_when_hashes_are_checked(bundle: Bundle) -> None:
    (bundle.path / "visual.onnx").write_bytes(b"VISUAL")
    Bundle.open(bundle.path)  # as long as the original
    with pytest.raises(IntegrityError, match=r"visual\.onnx does not have the sha256"):
        Bundle.open(bundle.path, check_hashes=True)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.onnx",
        "golden/../../outside.onnx",
        "/etc/passwd",
        "..\\outside.onnx",
        "bad\0name",
        "..",
    ],
)
def test_a_name_that_leads_out_of_the_bundle_is_refused(bundle: Bundle, name: str) -> None:
    (bundle.path.parent / "outside.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"which lies outside of it; do not use this bundle"):
        bundle.file(name)
    spec = {"sha256": "0" * 64, "size_bytes": 1}
    change_manifest(bundle, lambda data: {**data, "files": {**data["files"], name: spec}})
    with pytest.raises(IntegrityError, match=r"which lies outside of it"):
        Bundle.open(bundle.path)


def test_a_link_that_leads_out_is_followed_to_the_file_of_the_right_hash(bundle: Bundle) -> None:
    outside = bundle.path.parent / "elsewhere.onnx"
    (bundle.path / "visual.onnx").rename(outside)
    (bundle.path / "visual.onnx").symlink_to(outside)
    assert Bundle.open(bundle.path).graph_path("visual").read_bytes() == b"visual"


@pytest.mark.parametrize("content", [b"VISUAL", b"another size", None])
def test_a_link_that_leads_out_to_another_file_is_named_and_refused(
    bundle: Bundle, content: bytes | None
) -> None:
    outside = bundle.path.parent / "elsewhere.onnx"
    if content is not None:
        outside.write_bytes(content)
    (bundle.path / "visual.onnx").unlink()
    (bundle.path / "visual.onnx").symlink_to(outside)
    match = r"visual\.onnx is a link to .*elsewhere\.onnx, which lies outside .* Put the file"
    with pytest.raises(IntegrityError, match=match):
        Bundle.open(bundle.path)


def as_hub_cache(bundle: Bundle) -> Path:
    """Move a bundle to a hub's cache: links in snapshots/REVISION, the files in blobs."""
    blobs = bundle.path.parent / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for path in sorted(bundle.path.rglob("*")):
        if path.is_file():
            blob = blobs / sha256_of_file(path)
            path.rename(blob)
            link = snapshot / path.relative_to(bundle.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_of_links_as_a_hub_keeps_them_opens(bundle: Bundle) -> None:
    snapshot = as_hub_cache(bundle)
    opened = Bundle.open(snapshot, check_hashes=True)
    assert opened.manifest == bundle.manifest
    assert opened.graph_path("visual").read_bytes() == b"visual"


def test_a_label_bank_of_links_as_a_hub_keeps_them_is_read(bundle: Bundle) -> None:
    bank = bundle.path / "labels" / "small"
    bank.mkdir(parents=True)
    (bank / "bank.json").write_text("{}")
    opened = Bundle.open(as_hub_cache(bundle))
    assert opened.label_bank_names() == ("small",)
    assert opened.file("labels/small/bank.json").read_text() == "{}"


def test_a_blob_that_was_altered_is_refused(bundle: Bundle) -> None:
    snapshot = as_hub_cache(bundle)
    (snapshot / "visual.onnx").resolve().write_bytes(b"VISUAL")
    with pytest.raises(IntegrityError, match=r"visual\.onnx is a link .* not have the sha256"):
        Bundle.open(snapshot)


def test_weights_in_files_of_their_own_come_to_lie_next_to_their_graph(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle.path / "visual.onnx.data").write_bytes(b"weights")
    write_manifest(
        bundle.path, bundle.manifest.model_copy(update={"files": hash_files(bundle.path)})
    )
    opened = Bundle.open(as_hub_cache(bundle))
    with pytest.raises(BundleError, match=r"the cache, which is off: .*cp -rL"):
        opened.graph_path("visual")
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    path = opened.graph_path("visual")
    assert not path.is_symlink()
    assert path.with_name("visual.onnx.data").read_bytes() == b"weights"
    assert opened.graph_path("visual") == path
    path.write_bytes(b"VISUAL")
    assert opened.graph_path("visual").read_bytes() == b"visual"


def test_a_linked_folder_that_leads_out_of_the_bundle_is_refused(bundle: Bundle) -> None:
    outside = bundle.path.parent / "banks"
    (outside / "stolen").mkdir(parents=True)
    (bundle.path / "labels").symlink_to(outside)
    with pytest.raises(IntegrityError, match=r"'labels/stolen', which lies outside"):
        bundle.label_bank_path("stolen")


def test_a_manifest_linked_from_outside_is_refused(bundle: Bundle) -> None:
    manifest = bundle.path / "manifest.json"
    manifest.rename(bundle.path.parent / "other.json")
    manifest.symlink_to("../other.json")
    with pytest.raises(IntegrityError, match=r"'manifest\.json', which lies outside"):
        Bundle.open(bundle.path)


def test_a_loop_of_links_is_refused(bundle: Bundle) -> None:
    graph = bundle.path / "visual.onnx"
    graph.unlink()
    graph.symlink_to("visual.onnx")
    with pytest.raises(IntegrityError, match=r"visual\.onnx"):
        Bundle.open(bundle.path)


def test_a_link_inside_of_the_bundle_is_followed(bundle: Bundle) -> None:
    graph = bundle.path / "visual.onnx"
    graph.rename(bundle.path / "weights.bin")
    graph.symlink_to("weights.bin")
    assert Bundle.open(bundle.path, check_hashes=True).manifest == bundle.manifest


def test_a_bundle_that_is_itself_a_link_opens(bundle: Bundle) -> None:
    link = bundle.path.parent / "current"
    link.symlink_to(bundle.path)
    assert Bundle.open(link, check_hashes=True).manifest == bundle.manifest


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000], ids=["long", "deep"])
def test_a_name_that_no_file_can_have_is_refused(bundle: Bundle, name: str) -> None:
    spec = {"sha256": "0" * 64, "size_bytes": 1}
    change_manifest(bundle, lambda data: {**data, "files": {**data["files"], name: spec}})
    with pytest.raises(IntegrityError, match=r"cannot be read \(File name too long\)"):
        Bundle.open(bundle.path)


def test_a_graph_without_checksum_is_refused(bundle: Bundle) -> None:
    def forget(data: Any) -> Any:
        del data["files"]["temporal.onnx"]
        return data

    change_manifest(bundle, forget)
    with pytest.raises(IntegrityError, match=r"temporal\.onnx as its temporal graph but gives no"):
        Bundle.open(bundle.path)


def test_a_graph_that_the_bundle_has_not_is_named_with_those_it_has(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no video graph; it has temporal, textual, visual"):
        bundle.graph_path("video")


def test_the_textual_hash_covers_graph_data_and_tokenizer_alone(bundle: Bundle) -> None:
    def changed(name: str) -> Bundle:
        (bundle.path / name).write_bytes(b"other")
        manifest = bundle.manifest.model_copy(update={"files": hash_files(bundle.path)})
        write_manifest(bundle.path, manifest)
        return Bundle.open(bundle.path)

    before = bundle.textual_sha256
    assert changed("visual.onnx").textual_sha256 == before
    covered = ("textual.onnx", "textual.onnx.data", "tokenizer.json")
    assert len({before, *(changed(name).textual_sha256 for name in covered)}) == 4


def test_hashes_leave_out_the_manifest_and_label_banks(bundle: Bundle) -> None:
    bank = bundle.label_bank_path("mine")
    bank.mkdir(parents=True)
    (bank / "bank.json").write_text("{}")
    hashes = hash_files(bundle.path)
    assert sorted(hashes) == ["temporal.onnx", "textual.onnx", "tokenizer.json", "visual.onnx"]
    assert hashes["visual.onnx"].size_bytes == len(b"visual")
    # printf visual | sha256sum
    expected = "a5961f3f5ac8a594d1c084d5948a7fa0b44d181b67ede0973c6641216ec06920"
    assert hashes["visual.onnx"].sha256 == expected
    assert sha256_of_file(bundle.path / "visual.onnx") == expected


def test_label_banks_are_listed_by_name_without_unfinished_ones(bundle: Bundle) -> None:
    assert bundle.label_bank_names() == ()
    for name in ("ucf", "hmdb", ".ucf-x1"):
        folder = bundle.path / "labels" / name
        folder.mkdir(parents=True)
        (folder / "bank.json").write_text("{}")
    (bundle.path / "labels" / "empty").mkdir()
    assert bundle.label_bank_names() == ("hmdb", "ucf")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "x" * 129, "é"])
def test_label_bank_names_that_no_folder_should_have_are_refused(bundle: Bundle, name: str) -> None:
    with pytest.raises(ValueError, match=r"is not allowed; use letters, digits"):
        bundle.label_bank_path(name)


def write(folder: Path, content: str = "new") -> None:
    (folder / "manifest.json").write_text(content)


def read(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def test_a_staged_folder_appears_under_its_name_when_the_block_succeeds(
    tmp_path: Path,
) -> None:
    target = tmp_path / "deep" / "bundle"
    with new_folder(target, overwrite=False, marker="manifest.json") as staging:
        write(staging)
        assert not target.exists()
        assert staging.parent.parent == target.parent  # on the same disk
    assert read(target) == "new"
    assert list(target.parent.iterdir()) == [target]


def stage(target: Path, *, overwrite: bool, then: Callable[[], object] = lambda: None) -> None:
    """Write a new folder, and do something else before it takes its place."""
    with new_folder(target, overwrite=overwrite, marker="manifest.json") as staging:
        write(staging)
        then()


def stop(error: BaseException) -> Callable[[], object]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_a_block_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        stage(tmp_path / "bundle", overwrite=False, then=stop(RuntimeError("stop")))
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_is_interrupted_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write(target, "old")
    with pytest.raises(KeyboardInterrupt):
        stage(target, overwrite=True, then=stop(KeyboardInterrupt()))
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_exists_is_refused_before_the_work(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write(target, "old")
    with (
        pytest.raises(BundleError, match=r"exists already; choose another name or .*--overwrite"),
        new_folder(target, overwrite=False, marker="manifest.json"),
    ):
        pytest.fail("the block ran")
    assert read(target) == "old"


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write(target, "old")
    (target / "stale.onnx").write_text("old")
    with new_folder(target, overwrite=True, marker="manifest.json") as staging:
        write(staging)
        assert read(target) == "old"
    assert [path.name for path in target.iterdir()] == ["manifest.json"]
    assert read(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "home"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("years of work")
    for overwrite in (True, False):
        with pytest.raises(BundleError, match=r"has no manifest\.json, so it is not replaced even"):
            check_replaceable(target, overwrite=overwrite, marker="manifest.json")
    assert target.exists()


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with new_folder(target, overwrite=False, marker="manifest.json") as staging:
        write(staging)
    assert read(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_what_another_program_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def other_program() -> None:
        target.mkdir()
        write(target, "other")

    with pytest.raises(BundleError, match="exists already"):
        stage(target, overwrite=False, then=other_program)
    assert read(target) == "other"
    assert list(tmp_path.iterdir()) == [target]


def test_with_overwrite_the_last_of_two_programs_wins(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with new_folder(target, overwrite=True, marker="manifest.json") as slow:
        write(slow, "slow")
        with new_folder(target, overwrite=True, marker="manifest.json") as fast:
            write(fast, "fast")
    assert read(target) == "slow"
    assert list(tmp_path.iterdir()) == [target]


def test_a_rename_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write(target, "old")
    rename = Path.rename
    monkeypatch.setattr(files, "swap_folders", lambda *_: False)

    def fail_for_the_new_one(self: Path, goal: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device\)"):
        stage(target, overwrite=True)
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write(target, "old")
    rename = Path.rename
    monkeypatch.setattr(files, "swap_folders", lambda *_: False)

    def fail_after_the_first(self: Path, goal: Path) -> Path:
        if self != target:
            raise OSError(5, "Input/output error")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fail_after_the_first)
    with pytest.raises(BundleError, match="Input/output error"):
        stage(target, overwrite=True)
    (kept,) = tmp_path.glob(".bundle-*/old/bundle")
    assert read(kept) == "old"
    monkeypatch.undo()
    finish_replacements(tmp_path)  # as whoever opens the bundle next
    assert read(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_nowhere_is_told_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.symlink_to(tmp_path / "gone")
    with pytest.raises(BundleError, match="cannot be written"):
        stage(target, overwrite=False)
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(BundleError, match=r"cannot be written .*choose another place"),
        new_folder(tmp_path / "file" / "bundle", overwrite=False, marker="manifest.json"),
    ):
        pytest.fail("the block ran")


def test_a_new_folder_has_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "bundle", overwrite=False, marker="manifest.json") as staging:
            write(staging)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o750


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["visual.onnx", "temporal.onnx", "textual.onnx", "tokenizer.json"])
def test_a_file_with_a_flipped_bit_is_refused_when_it_is_used(bundle: Bundle, name: str) -> None:
    flip_a_bit(bundle.file(name))
    opened = Bundle.open(bundle.path)
    with pytest.raises(IntegrityError, match=rf"file {name} does not have the sha256 .*copy the b"):
        opened.file(name)
    assert Bundle.open(bundle.path, verify=False).file(name) == bundle.path / name


def test_a_size_is_compared_even_where_hashes_are_not(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path, verify=False)
    (bundle.path / "visual.onnx").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"visual\.onnx has 0 bytes instead of 6"):
        opened.file("visual.onnx")


@pytest.mark.parametrize("verify", [False, True])
def test_a_file_without_a_checksum_is_not_used(bundle: Bundle, verify: bool) -> None:
    (bundle.path / "more.json").write_text("{}")
    opened = Bundle.open(bundle.path, verify=verify)
    with pytest.raises(IntegrityError, match=r"gives no checksum for more\.json"):
        opened.file("more.json")


@pytest.mark.parametrize("name", ["textual.onnx", "tokenizer.json"])
def test_an_altered_text_encoder_is_refused_whatever_verify_says(bundle: Bundle, name: str) -> None:
    flip_a_bit(bundle.path / name)
    with pytest.raises(IntegrityError, match=name):
        Bundle.open(bundle.path, verify=False).check_text_encoder()


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest.json is a pipe, a socket or a device"):
        Bundle.open(tmp_path)
