"""Files that `predict` and `embed` write: lines that a run goes on from, tables and arrays.

Lines (.jsonl) grow with each video. All other formats are whole or not there: until a run has
ended, its lines are in a file next to it, `NAME.partial`, from which `--resume` goes on.

Libraries that were tried: pandas writes CSV and Parquet as well, but needs pyarrow for the second
all the same, and all rows in memory.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from safetensors.numpy import save_file as save_safetensors

from actionclip_deploy.cli.output import check_suffix, usage_error
from actionclip_deploy.errors import MissingExtraError, ResultFileError
from actionclip_deploy.files import staged_file, try_lock
from actionclip_deploy.records import (
    EVENT_COLUMNS,
    LABEL_COLUMNS,
    RECORD_SCHEMA_VERSION,
    EmbeddedVideoRecord,
    EmbeddingsRecord,
    Record,
    TimelineRecord,
    UnreadVideo,
    VideoRecord,
    event_rows,
    file_text,
    json_text,
    label_rows,
)

if TYPE_CHECKING:
    from actionclip_deploy.timeline import Timeline

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*LINE_SUFFIXES, ".csv", ".parquet")
ARRAY_SUFFIXES = (".npz", ".parquet", ".safetensors")

# What every line starts with; a last line without its end that does not is not ours.
_START = b'{"video": '
_ROWS_PER_GROUP = 20_000  # of a Parquet file; what is in memory at a time

MATRIX_SUFFIXES = (".npz", ".parquet")

RecordT = TypeVar("RecordT", VideoRecord, EmbeddedVideoRecord, TimelineRecord)
Finish: TypeAlias = Callable[["ResultFile", Path], None]


def is_result_folder(output: Path | None) -> bool:
    """Whether --output is a folder of results, and not a file."""
    if output is None:
        return False
    return output.is_dir() or (not output.suffix and not output.exists())


def check_result_path(
    path: Path | None, suffixes: tuple[str, ...], option: str = "--output"
) -> None:
    """Before the work: refuse a file of another format, or one whose package is missing.

    Raises:
        typer.BadParameter: If the suffix is not one of these.
        MissingExtraError: If the format needs a package that is not installed.
    """
    check_suffix(option, path, *suffixes)
    if path is not None and not path.parent.is_dir():
        raise usage_error(f"{option} is {path}, but {path.parent} is not a folder; make it first.")
    if path is not None and path.suffix.lower() == ".parquet":
        _pyarrow(path)


@contextmanager
def open_result_file(
    path: Path, run: Record, *, resume: bool, overwrite: bool, finish: Finish | None = None
) -> Iterator[ResultFile]:
    """Give the lines that a run appends to; if the block succeeds, the file is made of them.

    Args:
        path: The file.
        run: What a result depends on but for its video.
        resume: Go on with a run that was interrupted.
        overwrite: Replace a file that is there.
        finish: Makes the file of the lines; None where they are the file.

    Raises:
        typer.BadParameter: As `ResultFile`; or if the file is whole and there is nothing to go on
            with.
        ResultFileError: As `ResultFile`.
        FileWriteError: If the file cannot be written; its lines stay.
    """
    if finish is None:
        with ResultFile(path, run, resume=resume, overwrite=overwrite) as file:
            yield file
        return
    partial = path.with_name(f"{path.name}.partial")
    if path.is_dir():
        raise usage_error(f"{path} is a folder; give the name of a file in it.")
    if path.exists() and not overwrite and not (resume and partial.exists()):
        advice = (
            f"is whole, and only an interrupted run or a file of lines ({LINE_SUFFIXES[0]}) can "
            "be gone on with; give another name, or replace it with --overwrite"
            if resume
            else "exists; give another name, or replace it with --overwrite"
        )
        raise usage_error(f"{path} {advice}.")
    with ResultFile(partial, run, resume=resume, overwrite=overwrite) as file:
        yield file
        finish(file, path)
        partial.unlink(missing_ok=True)


class ResultFile:
    """Appends results to a file, one JSON object a line; a context manager.

    Each line is written by one call and names the run that it belongs to: the bundle, the labels
    and every option that changes a result. A run that was killed leaves at most one line without
    its end.

    Args:
        path: The file.
        run: What a result depends on but for its video.
        resume: Go on with a file that is there.
        overwrite: Replace one.

    Attributes:
        path: As given.
        run: As given.
        done: Results that the file already had, by video, each with whether it failed.

    Raises:
        typer.BadParameter: If the file is there and neither was asked for, or both were; or
            if it cannot be made.
        ResultFileError: If it is not a file of results, is another run's, or is being written.
    """

    def __init__(
        self, path: Path, run: Record, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        if resume and overwrite:
            raise usage_error("--resume and --overwrite were both given; choose one.")
        if path.is_dir():
            raise usage_error(f"{path} is a folder; give the name of a file in it.")
        self.path = path
        self.done: dict[str, bool] = {}
        self.run = run
        self._is_locked = False
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        if not (resume or overwrite):
            flags |= os.O_EXCL
        try:
            self._file = os.open(path, flags, 0o666)
        except FileExistsError as exc:
            raise usage_error(
                f"{path} exists; add --resume to go on with it, or --overwrite to replace it."
            ) from exc
        except OSError as exc:
            raise usage_error(
                f"{path} cannot be written ({exc.strerror}); give another name."
            ) from exc
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self._file, 0)
            self._read_done()
        except BaseException:
            self.close()
            raise

    def add(self, record: RecordT) -> RecordT:
        """Append a record, all of it or nothing, and give it back.

        Raises:
            ResultFileError: If it cannot be written.
        """
        result = record.model_copy(update={"run": self.run}).to_dict()
        content = json_text(result).encode() + b"\n"
        size = os.fstat(self._file).st_size
        has_failed = record.error is not None
        try:
            written = os.write(self._file, content)
            if written < len(content):
                os.write(self._file, content[written:])  # says why it stopped
            self.done[record.video] = has_failed
        except OSError as exc:
            os.ftruncate(self._file, size)
            raise ResultFileError(
                f"{self.path} cannot be written any more ({exc.strerror}); make room, then repeat "
                "the command with --resume."
            ) from exc
        except BaseException:  # told to end: what is in the file counts, and what is not does not
            if os.fstat(self._file).st_size == size + len(content):
                self.done[record.video] = has_failed
            else:
                os.ftruncate(self._file, size)
            raise
        return record

    def records(self, kind: type[RecordT]) -> Iterator[RecordT]:
        """What the file holds, in the order in which it was added."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                yield kind.model_validate(_parse(line))

    def num_failed(self, videos: Iterable[Path]) -> int:
        """How many of some videos are in the file as failed."""
        return sum(self.done.get(str(video), False) for video in videos)

    def tell(self, videos: Sequence[Path], output: Path, *, overwrite: bool) -> str:
        """What an interrupted run has kept of some videos, and how to go on.

        Args:
            videos: The videos.
            output: The file that was asked for.
            overwrite: Whether it was to replace one.
        """
        num_kept = sum(str(video) in self.done for video in videos)
        if not num_kept:
            return "no video was done yet; repeat the command."
        how = "--resume in the place of --overwrite" if overwrite else "--resume"
        where = f"with their results in {self.path}" if self.path == output else "and kept"
        return (
            f"{num_kept} of {len(videos)} videos are done, {where}; the same command with {how} "
            "goes on."
        )

    def close(self) -> None:
        """Let go of the file, and remove an empty one; a second call does nothing."""
        if self._file >= 0:
            if self._is_locked and not os.fstat(self._file).st_size:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        self._is_locked = try_lock(self._file)
        if not self._is_locked:
            raise ResultFileError(
                f"{self.path} is being written by another run; wait for it, or give another file."
            )

    def _read_done(self) -> None:
        """Read what is there; drops a last line that was never finished."""
        size = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not line.startswith(_START) and not _START.startswith(line):
                        raise self._not_results(number)
                    break
                self._read_line(number, line)
                size += len(line)
        os.ftruncate(self._file, size)

    def _read_line(self, number: int, line: bytes) -> None:
        try:
            result = _parse(line)
            video, run = result["video"], result["run"]
        except (ValueError, KeyError, TypeError) as exc:
            raise self._not_results(number) from exc
        if not isinstance(video, str) or not isinstance(run, dict):
            raise self._not_results(number)
        if result.get("schema_version") != RECORD_SCHEMA_VERSION:
            raise ResultFileError(
                f"{self.path} was written by another version of actionclip-deploy: the record in "
                f"line {number} has another form. Finish the run with that version, or give "
                "another file."
            )
        if run != self.run.to_dict():
            raise ResultFileError(
                f"{self.path} was written by another run: line {number} has "
                f"{_first_difference(run, self.run.to_dict())}; repeat the command as it was, or "
                "give another file."
            )
        self.done[video] = result.get("error") is not None

    def _not_results(self, number: int) -> ResultFileError:
        return ResultFileError(
            f"Line {number} of {self.path} is not a result that `--output` of this command "
            "writes; give the file of an interrupted run, or another name."
        )


def _parse(line: bytes) -> Any:
    # Older versions wrote the bytes of a name as they are.
    return json.loads(line.decode("utf-8", errors="surrogateescape"))


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            return f"{key} {theirs.get(key)!r} and this run has {ours.get(key)!r}"
    return "other options"


# Tables of labels: the rows of `Predictions.to_dataframe`.


def label_table(path: Path) -> Finish | None:
    """What makes a table of the lines of `predict`; None for a file of lines."""
    return _table(path, LABEL_COLUMNS, _label_rows)


def event_table(path: Path) -> Finish | None:
    """What makes a table of the lines of `predict --timeline`; None for a file of lines."""
    return _table(path, EVENT_COLUMNS, _event_rows)


def _table(
    path: Path,
    columns: tuple[str, ...],
    rows_of: Callable[[ResultFile], Iterator[tuple[Any, ...]]],
) -> Finish | None:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return lambda file, path: _write_csv(columns, rows_of(file), path)
    if suffix == ".parquet":
        return lambda file, path: _write_table(columns, rows_of(file), file.run, path)
    return None


def _event_rows(file: ResultFile) -> Iterator[tuple[Any, ...]]:
    for record in file.records(TimelineRecord):
        yield from event_rows(file_text(record.video), record)


def _label_rows(file: ResultFile) -> Iterator[tuple[Any, ...]]:
    for record in file.records(VideoRecord):
        error = None if record.error is None else record.error.message
        yield from label_rows(file_text(record.video), record.predictions, error)


def _write_csv(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]], path: Path) -> None:
    with (
        staged_file(path) as staged,
        staged.open("w", encoding="utf-8", newline="") as opened,
    ):
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _write_table(
    columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]], run: Record, path: Path
) -> None:
    pa = _pyarrow(path)
    texts, whole = {"video", "label", "error"}, {"rank"}
    types = [
        pa.string() if name in texts else pa.int64() if name in whole else pa.float64()
        for name in columns
    ]
    schema = pa.schema(list(zip(columns, types, strict=True)))
    _write_parquet(rows, schema, path, metadata={"run": run.to_dict()})


def write_score_matrix(path: Path, timeline: Timeline) -> None:
    """Write what labels scored in each window, as arrays (.npz) or a table (.parquet).

    Arrays: `starts_seconds` (S,), `window_seconds`, `scores` (S, C), `labels` (C,). A table has
    `start_seconds`, `end_seconds` and a column for each label.

    Raises:
        FileWriteError: If the file cannot be written.
    """
    if path.suffix.lower() == ".npz":
        with staged_file(path) as staged, staged.open("wb") as opened:
            np.savez(
                opened,
                starts_seconds=timeline.starts_seconds,
                window_seconds=timeline.grid.window_seconds,
                scores=timeline.scores,
                labels=np.array(timeline.labels, dtype=np.str_),
            )
        return
    pa = _pyarrow(path)
    names = ["start_seconds", "end_seconds", *timeline.labels]
    kinds = [pa.float64(), pa.float64(), *(pa.float32() for _ in timeline.labels)]
    rows = (
        (window.start_seconds, window.end_seconds, *row)
        for window, row in zip(timeline.windows, timeline.scores.tolist(), strict=True)
    )
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    _write_parquet(rows, schema, path, metadata=timeline.record().to_dict())


def _write_parquet(
    rows: Iterable[tuple[Any, ...]], schema: Any, path: Path, *, metadata: dict[str, Any]
) -> None:
    pa = _pyarrow(path)
    schema = schema.with_metadata({"actionclip": json_text(metadata)})
    rows = iter(rows)
    with (
        staged_file(path) as staged,
        pa.parquet.ParquetWriter(staged, schema) as writer,
    ):
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*group, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as exc:
        raise MissingExtraError(f"--output {path}", "parquet") from exc
    return pa


# Embeddings


def embeddings_file(path: Path, about: EmbeddingsRecord) -> Finish:
    """What makes a file of embeddings of the lines of `embed`.

    Args:
        path: Its suffix says which format.
        about: What the embeddings have in common.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return lambda file, path: _write_embedding_parquet(file, path, about)
    write = _write_npz if suffix == ".npz" else _write_safetensors
    return lambda file, path: write(path, *_read_embeddings(file, about))


def _read_embeddings(
    file: ResultFile, about: EmbeddingsRecord
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], EmbeddingsRecord]:
    """The embeddings of the videos that were read, shape (B, V, D), and what they are of."""
    num_read = sum(not failed for failed in file.done.values())
    shape = (num_read, about.num_views, about.embedding_dim)
    embeddings = np.empty(shape, np.float32)  # one after the other, since all of them are many
    videos: list[str] = []
    failed: list[UnreadVideo] = []
    for record in file.records(EmbeddedVideoRecord):
        if record.error is not None:
            failed.append(_unread(record))
            continue
        embeddings[len(videos)] = record.embeddings
        videos.append(file_text(record.video))
    told = {"num_videos": len(videos), "videos": tuple(videos), "failed": tuple(failed)}
    return embeddings, about.model_copy(update=told)


def _unread(record: EmbeddedVideoRecord) -> UnreadVideo:
    assert record.error is not None
    return UnreadVideo(video=file_text(record.video), error=record.error.message)


def _write_npz(path: Path, embeddings: Any, about: EmbeddingsRecord) -> None:
    metadata = about.model_dump(mode="json", exclude_unset=True, exclude={"videos"})
    names = np.array(about.videos, dtype=np.str_)
    with staged_file(path) as staged, staged.open("wb") as opened:
        np.savez(opened, embeddings=embeddings, videos=names, metadata=json_text(metadata))


def _write_safetensors(path: Path, embeddings: Any, about: EmbeddingsRecord) -> None:
    with staged_file(path) as staged:
        save_safetensors(
            {"embeddings": embeddings}, staged, {"metadata": json_text(about.to_dict())}
        )


def _write_embedding_parquet(file: ResultFile, path: Path, about: EmbeddingsRecord) -> None:
    """A row for each view of each video; one that could not be read has a row with the error."""
    pa = _pyarrow(path)
    failed = tuple(map(_unread, (r for r in file.records(EmbeddedVideoRecord) if r.error)))
    told = {"num_videos": len(file.done) - len(failed), "failed": failed}
    schema = pa.schema(
        [
            ("video", pa.string()),
            ("view", pa.int64()),
            ("embedding", pa.list_(pa.float32(), about.embedding_dim)),
            ("error", pa.string()),
        ]
    )
    _write_parquet(_view_rows(file), schema, path, metadata=about.model_copy(update=told).to_dict())


def _view_rows(file: ResultFile) -> Iterator[tuple[Any, ...]]:
    for record in file.records(EmbeddedVideoRecord):
        video = file_text(record.video)
        if record.error is not None:
            yield video, None, None, record.error.message
            continue
        assert record.embeddings is not None
        for view, embedding in enumerate(record.embeddings):
            yield video, view, embedding, None
