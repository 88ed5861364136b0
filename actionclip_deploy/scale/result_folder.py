"""The folder that a run over many videos writes: Parquet part files, `run.json`, `summary.json`.

    run.json                 what a result depends on but for its video, and the schema version
    part-000000.parquet ...  a row for each video, in no order; each file whole or not there
    summary.json             counts, rates and times of the last run; whether all videos are done

One program writes it at a time, whichever machines compute. A video is known by its uri and etag,
and has one row: before a run goes on, rows of transient failures and of videos that have changed
are taken out of their files, and only then are the videos done again. So no moment, and no kill,
leaves a video in it twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.command_records import BatchRunRecord, BatchSummaryRecord
from actionclip_deploy.errors import ArgumentError, MissingExtraError, ResultFileError
from actionclip_deploy.files import (
    sha256_of_json,
    staged_file,
    try_lock,
    write_errors,
    write_json,
)
from actionclip_deploy.records import json_text
from actionclip_deploy.scale.storage import TRANSIENT_KINDS
from actionclip_deploy.scale.video_list import LIST_SCHEMA

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet
except ImportError as exc:
    raise MissingExtraError("A table of results", "parquet") from exc

BATCH_SCHEMA_VERSION = 1
STAGES = ("fetch", "decode", "encode", "score")
ROWS_PER_FILE = 10_000

# A killed run loses no more than this; a file holds fewer rows where videos are slow.
FLUSH_SECONDS = 60.0
_RUN, _SUMMARY, _LOCK = "run.json", "summary.json", ".lock"
_PARTS = "part-*.parquet"
_HASH = np.dtype("S16")
_TEXTS_AT_A_TIME = 100_000
Hashes: TypeAlias = NDArray[np.bytes_]


def result_schema(
    run: BatchRunRecord, *, embedding_dim: int, more: Sequence[pa.Field] = ()
) -> pa.Schema:
    """The columns of a result: ours, then those that the list of videos has besides.

    Raises:
        ArgumentError: If the list has a column of one of our names.
    """
    fields = [
        *LIST_SCHEMA,
        pa.field("status", pa.string()),  # ok or failed
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("warnings", pa.list_(pa.string())),
    ]
    if run.kind == "predict":
        fields += [
            pa.field("labels", pa.list_(pa.string())),  # best first
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("is_unknown", pa.bool_()),  # null where the bank is not calibrated
        ]
    if run.embeddings:
        fields.append(pa.field("embeddings", pa.list_(pa.list_(pa.float32(), embedding_dim))))
    fields += [
        pa.field("bundle_sha256", pa.string()),
        pa.field("bank_sha256", pa.string()),
        pa.field("run_sha256", pa.string()),
        pa.field("runtime", pa.string()),
        pa.field("node", pa.string()),
        pa.field("seconds", pa.struct([(stage, pa.float32()) for stage in STAGES])),
    ]
    names = {each.name for each in fields}
    taken = [each.name for each in more if each.name in names]
    if taken:
        raise ArgumentError(
            "videos",
            f"is a list with the columns {', '.join(taken)}, which results have themselves; rename "
            "them in the list.",
        )
    metadata = {"actionclip": json_text({"schema_version": BATCH_SCHEMA_VERSION, **_about(run)})}
    return pa.schema([*fields, *more], metadata=metadata)


def run_sha256(run: BatchRunRecord) -> str:
    """What stands for a run in each of its rows."""
    return sha256_of_json(run.to_dict())


def _about(run: BatchRunRecord) -> dict[str, Any]:
    return {"run": run.to_dict(), "run_sha256": run_sha256(run)}


class ResultFolder:
    """Takes rows and writes part files; made by `open_result_folder`.

    Attributes:
        path: Of the folder.
        schema: Of its rows.
        videos: All that are to be in it.
        todo: Those of them that have no row.
        num_retried: Rows of before that were taken out, so that their videos are done again.
        num_repeated: Rows that came although their video had one; they were dropped.
        counts: Rows of this run, by `ok` or the class of the error.
    """

    def __init__(
        self,
        path: Path,
        run: BatchRunRecord,
        schema: pa.Schema,
        videos: pa.Table,
        rows_per_file: int = ROWS_PER_FILE,
    ) -> None:
        self.path = path
        self.run = run
        self.schema = schema
        self.num_retried = _take_out(path, videos)
        done, keys = _keys_of_parts(path), _keys(videos)
        is_todo = ~np.isin(keys, done)
        self.videos = videos
        self.todo = videos.filter(pa.array(is_todo))
        self.num_repeated = 0
        self.counts: Counter[str] = Counter()
        self._runtimes: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._expected = np.sort(keys[is_todo])
        self._has_come = np.zeros(len(self._expected), np.bool_)
        self._next = 1 + max((int(each.stem[5:]) for each in path.glob(_PARTS)), default=-1)
        self._rows_per_file = rows_per_file
        self._waiting: list[pa.Table] = []
        self._flushed = time.monotonic()

    @property
    def num_before(self) -> int:
        """Videos that had a row and keep it."""
        return len(self.videos) - len(self.todo)

    @property
    def num_now(self) -> int:
        """Videos whose row came now."""
        return int(self._has_come.sum())

    def left(self) -> pa.Table:
        """Those of `todo` whose row has not come."""
        places = np.searchsorted(self._expected, _keys(self.todo))
        return self.todo.filter(pa.array(~self._has_come[places]))

    def add(self, rows: pa.Table) -> int:
        """Take rows; what has one already is dropped. Gives how many were taken.

        Raises:
            FileWriteError: If a part file cannot be written.
        """
        fresh = np.zeros(len(rows), np.bool_)
        for row, place in enumerate(np.searchsorted(self._expected, _keys(rows)).tolist()):
            fresh[row] = not self._has_come[place]
            self._has_come[place] = True
        num_taken = int(fresh.sum())
        self.num_repeated += len(rows) - num_taken
        if num_taken:
            taken = rows.select(self.schema.names).cast(self.schema).filter(pa.array(fresh))
            self._count(taken)
            self._waiting.append(taken)
        is_late = time.monotonic() - self._flushed > FLUSH_SECONDS
        if is_late or sum(map(len, self._waiting)) >= self._rows_per_file:
            self.flush()
        return num_taken

    def flush(self) -> None:
        """Write what waits into a file."""
        self._flushed = time.monotonic()
        if self._waiting:
            _write_part(self.path / f"part-{self._next:06d}.parquet", self._waiting, self.schema)
            self._next += 1
            self._waiting = []

    def summary(self, *, engine: str, seconds: float) -> BatchSummaryRecord:
        """What there is to tell of the files, and of the run so far.

        Args:
            engine: What scheduled the work.
            seconds: What it took.
        """
        self.flush()
        kinds: Counter[str] = Counter()
        for table in _parts(self.path, ["error_class"]):
            kinds.update(kind or "ok" for kind in table["error_class"].to_pylist())
        num_rows, num_ok = sum(kinds.values()), kinds.pop("ok", 0)
        return BatchSummaryRecord(
            **_about(self.run),
            engine=engine,
            is_complete=bool(self._has_come.all()),
            num_videos=len(self.videos),
            num_rows=num_rows,
            num_ok=num_ok,
            num_failed=num_rows - num_ok,
            failed=dict(sorted(kinds.items())),
            num_before=self.num_before,
            num_now=self.num_now,
            num_retried=self.num_retried,
            num_repeated=self.num_repeated,
            seconds=round(seconds, 3),
            videos_per_second=round(self.num_now / seconds, 3) if seconds else 0.0,
            stage_seconds={stage: round(self._seconds[stage], 3) for stage in STAGES},
            runtimes=dict(sorted(self._runtimes.items())),
            num_files=len(list(self.path.glob(_PARTS))),
        )

    def _count(self, rows: pa.Table) -> None:
        self.counts.update(kind or "ok" for kind in rows["error_class"].to_pylist())
        self._runtimes.update(filter(None, rows["runtime"].to_pylist()))
        for stage in STAGES:
            column = pc.struct_field(rows["seconds"], stage)
            self._seconds[stage] += pc.sum(column).as_py() or 0.0  # type: ignore[assignment]


def check_result_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a run may not write, before anything is written or computed.

    Raises:
        ResultFileError: If it has something else in it, or results that are to stay.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ResultFileError(f"{path} is a file; give the name of a folder.")
    others = sorted(each.name for each in path.iterdir() if each.name != _LOCK)
    if others and _RUN not in others:
        raise ResultFileError(
            f"{path} holds {others[0]} and is not a folder of results; give another folder."
        )
    if others and not (resume or overwrite):
        raise ResultFileError(
            f"{path} has the results of a run; add --resume to go on with it, --overwrite to "
            "replace it, or give another folder."
        )


@contextmanager
def open_result_folder(
    path: Path,
    run: BatchRunRecord,
    schema: pa.Schema,
    videos: pa.Table,
    *,
    resume: bool = False,
    overwrite: bool = False,
    engine: str = "local",
    rows_per_file: int = ROWS_PER_FILE,
) -> Iterator[ResultFolder]:
    """Give a folder that takes rows; what has come is in it however the block ends.

    Args:
        path: Of a folder that is empty or is made, or of one to go on with or replace.
        run: What a result depends on but for its video.
        schema: Of the rows, see `result_schema`.
        videos: That are to be in it, see `list_videos_of`.
        resume: Go on with a folder of the same run.
        overwrite: Remove what another run has written there.
        engine: What schedules the work, for the summary.
        rows_per_file: Most rows of a part file.

    Raises:
        ResultFileError: If the folder is not one of results, another run's, or is being written.
        FileWriteError: If it cannot be written.
    """
    started = time.monotonic()
    check_result_folder(path, resume=resume, overwrite=overwrite)
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not try_lock(handle):
            raise ResultFileError(
                f"{path} is being written by another run; wait for it, or give another folder."
            )
        _prepare(path, run, overwrite=overwrite)
        folder = ResultFolder(path, run, schema, videos, rows_per_file)
        try:
            yield folder
        finally:
            summary = folder.summary(engine=engine, seconds=time.monotonic() - started)
            write_json(path / _SUMMARY, summary.to_dict())
    finally:
        os.close(handle)


def _prepare(path: Path, run: BatchRunRecord, *, overwrite: bool) -> None:
    record, parts = path / _RUN, sorted(path.glob(_PARTS))
    if record.exists() and overwrite:
        with write_errors(path):
            # The record last: without it nobody could say whose files these are.
            for each in (*parts, path / _SUMMARY, record):
                each.unlink(missing_ok=True)
    elif record.exists():
        _check_same_run(path, run)
        return
    write_json(record, {"schema_version": BATCH_SCHEMA_VERSION, **_about(run)})


def _check_same_run(path: Path, run: BatchRunRecord) -> None:
    try:
        found = json.loads((path / _RUN).read_text(encoding="utf-8"))
        version, theirs = found["schema_version"], dict(found["run"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ResultFileError(
            f"{path / _RUN} is not what a run writes ({exc}); give another folder."
        ) from exc
    if version != BATCH_SCHEMA_VERSION:
        raise ResultFileError(
            f"{path} was written in version {version} of its format and this program writes "
            f"{BATCH_SCHEMA_VERSION}; finish the run with the program that began it."
        )
    ours = run.to_dict()
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise ResultFileError(
                f"{path} is of another run: it has {key} {theirs.get(key)!r} and this one "
                f"{ours.get(key)!r}; repeat the command as it was, or give another folder."
            )


def _take_out(path: Path, videos: pa.Table) -> int:
    """Take the rows of videos that are to be done again out of their files; gives how many."""
    names, keys = _hashes(videos["uri"]), _keys(videos)
    num_taken = 0
    for part in sorted(path.glob(_PARTS)):
        known = pa.parquet.read_table(part, columns=["uri", "etag", "error_class"])
        failed = pc.is_in(known["error_class"], pa.array(sorted(TRANSIENT_KINDS), pa.string()))
        is_stale = ~np.isin(_keys(known), keys) | failed.to_numpy()
        goes = is_stale & np.isin(_hashes(known["uri"]), names)
        if not goes.any():
            continue
        num_taken += int(goes.sum())
        if goes.all():
            with write_errors(part):
                part.unlink()
            continue
        table = pa.parquet.read_table(part)
        _write_part(part, [table.filter(pa.array(~goes))], table.schema)
    return num_taken


def _write_part(path: Path, tables: Sequence[pa.Table], schema: pa.Schema) -> None:
    with (
        staged_file(path) as staged,
        pa.parquet.ParquetWriter(staged, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table)


def read_results(path: str | Path) -> pa.Table:
    """All rows of a folder of results."""
    return pa.concat_tables([*_parts(Path(path), None)] or [pa.table({})])


def _parts(path: Path, columns: list[str] | None) -> Iterator[pa.Table]:
    for part in sorted(path.glob(_PARTS)):
        yield pa.parquet.read_table(part, columns=columns)


def _keys_of_parts(path: Path) -> Hashes:
    found = [_keys(table) for table in _parts(path, ["uri", "etag"])]
    return np.concatenate([np.empty(0, _HASH), *found])


def _keys(table: pa.Table) -> Hashes:
    """What stands for a video, 16 bytes each, where a hundred million texts would not fit."""
    etags = pc.fill_null(table["etag"], "")
    return _hashes(pc.binary_join_element_wise(table["uri"], etags, "\0"))


def _hashes(texts: pa.ChunkedArray) -> Hashes:
    digests = [
        hashlib.blake2b(text.encode(), digest_size=_HASH.itemsize).digest()
        for chunk in texts.chunks
        for start in range(0, len(chunk), _TEXTS_AT_A_TIME)
        for text in chunk.slice(start, _TEXTS_AT_A_TIME).to_pylist()
    ]
    return np.array(digests, _HASH)
