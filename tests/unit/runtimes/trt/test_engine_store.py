"""Where engines are kept, without TensorRT: whole entries, and what becomes of others."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from actionclip_deploy.errors import EngineError
from actionclip_deploy.keyed_store import UNFINISHED
from actionclip_deploy.runtimes.trt.plan import ShapeRange
from actionclip_deploy.runtimes.trt.store import EngineKey, EngineStore, Entry, open_store

PLANS = {"visual": b"a plan", "textual": b"another plan"}


def key(**changes: object) -> EngineKey:
    shape = ShapeRange((1, 4), (2, 4), (8, 4))
    fields: dict[str, object] = {
        "graphs": {name: {f"{name}.onnx": "ab" * 32} for name in PLANS},
        "place": {"runtime": "tensorrt", "version": "10.13.3", "gpu": "Orin"},
        "precision": "fp16",
        "shapes": dict.fromkeys(PLANS, (shape,)),
        "options": {"opt_level": 3},
        **changes,
    }
    return EngineKey(**fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def test_what_was_added_is_found_as_it_was(store: EngineStore) -> None:
    added = store.add(key(), PLANS, {"bundle": "b"})
    found, why = store.find(key())
    assert (found, why) == (added, None)
    assert found is not None
    assert {name: found.plan(name) for name in PLANS} == PLANS
    assert found.shapes("visual") == (ShapeRange((1, 4), (2, 4), (8, 4)),)
    assert found.record["bundle"] == "b"
    assert found.verified_on("card") is None
    assert found.save(verified={"card": {"passed": True}}).verified_on("card") is True
    assert store.entries()[0].verified_on("card") is True
    assert (found.folder.stat().st_mode & 0o077, len(list(store.folder.iterdir()))) == (0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"graphs": {name: {f"{name}.onnx": "cd" * 32} for name in PLANS}},
        {"place": {"runtime": "tensorrt", "version": "10.16.1", "gpu": "Orin"}},
        {"precision": "int8"},
        {"shapes": {name: (ShapeRange((1, 4), (1, 4), (8, 4)),) for name in PLANS}},
        {"options": {"opt_level": 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_an_engine_depends_on_gives_another_entry(
    changes: dict[str, object], store: EngineStore
) -> None:
    store.add(key(), PLANS, {})
    assert store.find(key(**changes)) == (None, None)


def test_the_first_of_two_stays_unless_it_is_to_be_replaced(store: EngineStore) -> None:
    store.add(key(), PLANS, {"bundle": "first"})
    assert store.add(key(), PLANS, {"bundle": "second"}).record["bundle"] == "first"
    assert store.add(key(), PLANS, {"bundle": "third"}, replace=True).record["bundle"] == "third"


def test_an_engine_of_an_earlier_version_is_kept(store: EngineStore) -> None:
    folder = store.add(key(), PLANS, {}).folder
    record = json.loads((folder / "entry.json").read_text())
    del record["files"]
    (folder / "entry.json").write_text(json.dumps(record))
    found, why = store.find(key())
    assert why is None
    assert found is not None
    assert {name: found.plan(name) for name in PLANS} == PLANS
    damage(found, "changed")
    assert "visual.plan does not have the sha256" in str(store.find(key())[1])


def damage(entry: Entry, kind: str) -> None:
    plan, record = entry.folder / "visual.plan", entry.folder / "entry.json"
    if kind == "truncated":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif kind == "changed":
        plan.write_bytes(b"A plan")
    elif kind == "missing":
        plan.unlink()
    elif kind == "no record":
        record.unlink()
    elif kind == "half a record":
        record.write_text(record.read_text()[:50])
    else:
        fields = json.loads(record.read_text())
        fields["key"]["precision"] = "fp32"
        record.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("truncated", r"visual\.plan has 5 bytes instead of 6"),
        ("changed", r"visual\.plan does not have the sha256"),
        ("missing", r"visual\.plan is missing"),
        ("no record", r"The engine .* cannot be used: .*entry\.json cannot be read"),
        ("half a record", r"The engine .* cannot be used: .*entry\.json cannot be read"),
        ("another key", r"is not what was written: its key gives another name"),
    ],
)
def test_a_damaged_entry_is_not_used_says_why_and_is_replaced_or_pruned(
    kind: str, why: str, store: EngineStore
) -> None:
    damage(store.add(key(), PLANS, {}), kind)
    found, told = store.find(key())
    assert found is None
    assert re.search(why, str(told))
    store.add(key(), PLANS, {})
    assert store.find(key())[1] is None
    damage(store.add(key(), PLANS, {}), kind)
    assert [path.name for path in store.prune(lambda _: True)] == [key().name]
    assert not list(store.folder.iterdir())


def test_prune_keeps_what_can_serve_and_what_is_being_written(store: EngineStore) -> None:
    good = store.add(key(), PLANS, {})
    bad = store.add(key(precision="int8"), PLANS, {})
    names = {f"{UNFINISHED}new": 0, f"{UNFINISHED}old": 48}
    for name, hours in names.items():
        (store.folder / name).mkdir()
        then = time.time() - hours * 3600
        os.utime(store.folder / name, (then, then))
    removed = {path.name for path in store.prune(lambda entry: entry.name == good.name)}
    assert {bad.name, f"{UNFINISHED}old"} <= removed
    assert not {good.name, f"{UNFINISHED}new"} & removed


def test_one_entry_is_removed_by_the_beginning_of_its_name(store: EngineStore) -> None:
    names = [store.add(key(), PLANS, {}).name, store.add(key(precision="int8"), PLANS, {}).name]
    for given in ("", "no such"):
        with pytest.raises(EngineError, match=r"^0 engines in .* as `actionclip engines list`"):
            store.remove(given)
    assert store.remove(names[0][:8]).name == names[0]
    assert [entry.name for entry in store.entries()] == [names[1]]


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_cannot_be_written_to_is_told_before_a_build(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(EngineError, match=r"cannot be kept in .*ACTIONCLIP_CACHE"):
        EngineStore(tmp_path / "locked" / "engines").check_writable()


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("not a folder")
    with pytest.raises(EngineError, match=r"cannot be kept in .*ACTIONCLIP_CACHE"):
        EngineStore(tmp_path / "engines").check_writable()


@pytest.mark.skipif(sys.platform == "win32", reason="other permissions")
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines").chmod(0o777)
    with pytest.raises(EngineError, match=r"other users may write to it.*chmod go-w"):
        EngineStore(tmp_path / "engines").check_writable()


def test_without_a_cache_there_is_no_place_for_engines() -> None:
    with pytest.raises(EngineError, match="the cache, which is off; set ACTIONCLIP_CACHE"):
        open_store()  # the tests switch it off
