"""The folder of results: whole files, each video once, and what a run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from schemas import check_json

from actionclip_deploy.command_records import BatchRunRecord, BatchSummaryRecord
from actionclip_deploy.errors import ArgumentError, FileWriteError, ResultFileError
from actionclip_deploy.files import try_lock
from actionclip_deploy.scale.result_folder import (
    BATCH_SCHEMA_VERSION,
    open_result_folder,
    read_results,
    result_schema,
)
from actionclip_deploy.scale.storage import ListedVideo
from actionclip_deploy.scale.video_list import table_of

RUN = BatchRunRecord(
    kind="predict",
    bundle_sha256="b",
    bank=None,
    bank_sha256="l",
    views="1x1",
    scores="template-softmax",
    resize="frame",
    top_k=5,
    embeddings=False,
    max_pixels=100,
)
SCHEMA = result_schema(RUN, embedding_dim=4)


def listed(*names: str, tag: str = "1") -> pa.Table:
    return table_of([ListedVideo(name, tag, 10) for name in names])


def rows(names: Sequence[str], kind: str | None = None, tag: str = "1") -> pa.Table:
    made: list[dict[str, Any]] = [
        {
            "uri": name,
            "etag": tag,
            "size": 10,
            "status": "failed" if kind else "ok",
            "error_class": kind,
            "runtime": "fake",
            "seconds": {"decode": 0.5},
        }
        for name in names
    ]
    return pa.Table.from_pylist(made, schema=SCHEMA)


def write(path: Path, videos: pa.Table, *tables: pa.Table, **how: Any) -> dict[str, Any]:
    with open_result_folder(path, how.pop("run", RUN), SCHEMA, videos, **how) as folder:
        for table in tables:
            folder.add(table)
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    check_json(BatchSummaryRecord, summary)
    return summary


def found(path: Path) -> list[tuple[str, str | None]]:
    table = read_results(path)
    return sorted(zip(table["uri"].to_pylist(), table["error_class"].to_pylist(), strict=True))


def test_rows_are_in_whole_files_with_the_version_of_their_schema(tmp_path: Path) -> None:
    summary = write(tmp_path / "out", listed("a", "b"), rows("a"), rows("b", "not_found"))
    assert found(tmp_path / "out") == [("a", None), ("b", "not_found")]
    assert summary["is_complete"]
    assert (summary["num_ok"], summary["failed"]) == (1, {"not_found": 1})
    assert summary["stage_seconds"]["decode"] == 1.0
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    told = json.loads(pq.read_schema(part).metadata[b"actionclip"])
    assert told["schema_version"] == BATCH_SCHEMA_VERSION
    assert told["run"] == RUN.to_dict()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".lock", "part-000000.parquet", "run.json", "summary.json"]


def test_a_row_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    summary = write(tmp_path / "out", listed("a", "b"), rows("a"), rows("ab"), rows("b"))
    assert found(tmp_path / "out") == [("a", None), ("b", None)]
    assert summary["num_repeated"] == 2


def test_what_has_come_is_kept_however_the_run_ends(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def interrupted() -> None:
        with open_result_folder(path, RUN, SCHEMA, listed("a", "b")) as folder:
            folder.add(rows("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert found(path) == [("a", None)]
    assert not json.loads((path / "summary.json").read_text())["is_complete"]


def test_a_resumed_run_has_only_what_is_missing_to_do(tmp_path: Path) -> None:
    path, videos = tmp_path / "out", listed(*"abcd")
    write(path, videos, rows("a"), rows("b", "fetch_failed"), rows("c", "video_unreadable"))
    with open_result_folder(path, RUN, SCHEMA, videos, resume=True) as folder:
        assert folder.todo["uri"].to_pylist() == ["b", "d"]
        assert folder.num_retried == 1
        # Should the run be killed now, no video is there twice.
        assert found(path) == [("a", None), ("c", "video_unreadable")]
        folder.add(rows("b"))
        assert folder.left()["uri"].to_pylist() == ["d"]
        folder.add(rows("d"))
    assert found(path) == [("a", None), ("b", None), ("c", "video_unreadable"), ("d", None)]
    assert write(path, videos, resume=True)["num_now"] == 0


def test_a_video_that_has_changed_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, listed("a", "b"), rows("ab"))
    with open_result_folder(path, RUN, SCHEMA, listed("a", tag="2"), resume=True) as folder:
        assert len(folder.todo) == 1
        folder.add(rows("a", tag="2"))
    table = read_results(path)
    tags = dict(zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True))
    assert tags == {"a": "2", "b": "1"}
    assert len(table) == 2


@pytest.mark.parametrize("how", [{}, {"overwrite": True}])
def test_a_folder_of_results_is_replaced_only_on_request(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    path = tmp_path / "out"
    write(path, listed("a"), rows("a"))
    if how:
        write(path, listed("b"), rows("b"), **how)
        assert found(path) == [("b", None)]
    else:
        with pytest.raises(ResultFileError, match="add --resume to go on"):
            write(path, listed("b"), rows("b"))


def test_another_run_does_not_go_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, listed("a"), rows("a"))
    other = RUN.model_copy(update={"views": "3x1"})
    with pytest.raises(ResultFileError, match="it has views '1x1' and this one '3x1'"):
        write(path, listed("a"), resume=True, run=other)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultFileError, match=r"holds notes.txt and is not a folder of results"):
        write(tmp_path, listed("a"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ResultFileError, match=r"notes.txt is a file; give the name of a folder"):
        write(tmp_path / "notes.txt", listed("a"))


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(handle)
    with pytest.raises(ResultFileError, match="is being written by another run"):
        write(tmp_path, listed("a"))
    os.close(handle)


def test_a_file_that_cannot_be_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    write(path, listed("a", "b"), rows("a"))

    def fail(self: Any, table: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(FileWriteError, match="make room there"):
        write(path, listed("a", "b"), rows("b"), resume=True)
    assert found(path) == [("a", None)]
    assert len(list(path.glob("*part*"))) == 1


def test_many_rows_are_in_several_files(tmp_path: Path) -> None:
    parts = [rows(name) for name in "abcde"]
    summary = write(tmp_path / "out", listed(*"abcde"), *parts, rows_per_file=2)
    assert summary["num_files"] == 3


def test_columns_of_a_list_that_results_have_themselves_are_refused() -> None:
    with pytest.raises(ArgumentError, match="columns labels, which results have themselves"):
        result_schema(RUN, embedding_dim=4, more=[pa.field("labels", pa.string())])
