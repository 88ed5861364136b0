"""Archives: the windows of many videos, embedded once, for `search`.

    with ArchiveWriter.open("archive", model) as writer:
        writer.put(video, intervals, embeddings)
    with ArchiveReader.open("archive") as reader:
        reader.snapshot().shards

An archive is a folder:

    archive.db          SQLite: what the archive is of, its videos, and where their windows lie
    vectors/N.f16       embeddings of unit norm, float16, one row of D after the other

Rows are appended, reach the disk, and are then named by a transaction of the database: what a
reader sees is whole videos, whenever the writer dies. Rows that no video names any more are left
where they are until `compact` writes the others anew. Several may read while one writes.

Letters: N windows, D the embedding width, V videos.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArchiveError, FileWriteError
from actionclip_deploy.files import is_full_disk, try_lock

logger = logging.getLogger(__name__)

DATABASE_NAME = "archive.db"
VECTORS_NAME = "vectors"
LOCK_NAME = ".writer"
SCHEMA_VERSION = 1

# A file of vectors is closed at this many rows, so that `compact` need not write all of an
# archive at once: half a gigabyte at D = 512.
SHARD_ROWS = 2**19


_SCHEMA = (
    """CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)""",
    """CREATE TABLE shards (
        number INTEGER PRIMARY KEY,  -- of its file
        num_rows INTEGER NOT NULL    -- that are on the disk: what follows in the file is nobody's
    )""",
    """CREATE TABLE videos (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- that no other video gets, nor a changed one
        path TEXT NOT NULL UNIQUE,       -- BLOB where it is not UTF-8, and so the two below
        folder TEXT NOT NULL,            -- camera: `ArchivedVideo.folder`
        size_bytes INTEGER NOT NULL,
        modified_ns INTEGER NOT NULL,
        recorded_seconds REAL,           -- since 1970; NULL where nothing says it
        duration_seconds REAL NOT NULL,
        error TEXT,                      -- why there are no windows; NULL where there are
        shard INTEGER REFERENCES shards (number),
        first_row INTEGER NOT NULL,
        num_windows INTEGER NOT NULL,
        intervals BLOB NOT NULL          -- start and end of each window in seconds, float64
    )""",
    # All that a reader needs to see which videos are new to it, and to count windows.
    """CREATE INDEX videos_by_shard ON videos (shard, first_row, num_windows)""",
    """CREATE TABLE thumbnails (
        video INTEGER NOT NULL REFERENCES videos (id) ON DELETE CASCADE,
        window INTEGER NOT NULL,
        jpeg BLOB NOT NULL,
        PRIMARY KEY (video, window)
    ) WITHOUT ROWID""",
)


@dataclass(frozen=True)
class ArchiveModel:
    """What the windows of an archive were made with; another model's cannot be mixed in.

    Attributes:
        bundle: Folder of the bundle, for the texts of a search; it may have moved since.
        visual_sha256: Of the graphs that make embeddings of frames.
        textual_sha256: Of the text encoder that goes with them.
        embedding_dim: D.
        window_seconds: Length of a window; of a shorter video it is one window of all.
        stride_seconds: From the start of a window to that of the next.
        runtime: What computed the embeddings, and in what precision.
        static_cosine: From which cosine on a window is the last stored one over again; 2 for none.
        region: What of a frame is resized, as `preprocess.Region`.
    """

    bundle: str
    visual_sha256: str
    textual_sha256: str
    embedding_dim: int
    window_seconds: float
    stride_seconds: float
    runtime: str
    static_cosine: float
    region: str = "frame"

    def why_other(self, other: ArchiveModel) -> str | None:
        """What keeps windows of the other out of this archive; None where nothing does."""
        if self.visual_sha256 != other.visual_sha256:
            return "its windows were made by another visual encoder"
        if self.textual_sha256 != other.textual_sha256:
            return "it is searched by another text encoder"
        for name, has, option in (
            ("window_seconds", "it has windows of {:g} s", "--window"),
            ("stride_seconds", "its windows begin {:g} s apart", "--stride"),
            ("static_cosine", "it has windows stored as one from a cosine of {:g} on", "--static"),
        ):
            mine, given = getattr(self, name), getattr(other, name)
            if abs(mine - given) > 1e-9:
                return f"{has.format(mine)}, and {option} is {given:g}"
        if self.region != other.region:
            return f"its videos were read with --resize {self.region}, and it is {other.region}"
        return None


@dataclass(frozen=True)
class ArchivedVideo:
    """What an archive knows of a video.

    Attributes:
        path: As it was given.
        folder: Name of the folder that it lies in, such as that of a camera; above that of a day.
        size_bytes: Of the file, by which a changed one is told.
        modified_ns: When the file was changed, in nanoseconds since 1970.
        recorded_seconds: When the recording began, in seconds since 1970; None where it is not
            known.
        duration_seconds: Of the video.
        error: Why it has no windows; None where it has.
        num_windows: That are stored.
        id: In the archive, from 1; a video that has changed gets another. None of one that was not
            read from there.
    """

    path: str
    folder: str
    size_bytes: int
    modified_ns: int
    recorded_seconds: float | None = None
    duration_seconds: float = 0.0
    error: str | None = None
    num_windows: int = 0
    id: int | None = None


_VIDEO_COLUMNS = (
    *("path", "folder", "size_bytes", "modified_ns", "recorded_seconds", "duration_seconds"),
    *("error", "num_windows"),
)


# Files and the database


def _to_sql(value: Any) -> Any:
    """A value as SQLite keeps it: of a text that is not UTF-8, such as a name of a file, bytes."""
    if not isinstance(value, str):
        return value
    encoded = value.encode("utf-8", "surrogateescape")
    return value if encoded.decode(errors="replace") == value else encoded


def _from_sql(value: Any) -> Any:
    """What `_to_sql` was given."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _connect(path: Path, options: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{options}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


_FileState: TypeAlias = tuple[tuple[int, int, int], ...]


def _connect_reader(path: Path) -> tuple[sqlite3.Connection, _FileState | None]:
    """Open a database for reading, even where nothing may be written.

    Readers of a WAL database keep an index in shared memory, in a file next to it. Where they
    cannot make that and the log holds nothing, the database is all there is.

    Returns:
        The connection; and, where it takes the file for one that does not change, the state of
        that, by which a change is seen.
    """
    connection = _connect(path, "mode=rw")  # of a file that may only be read, SQLite does so
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as exc:
        connection.close()
        if not any(each in str(exc) for each in ("unable to open", "readonly")):
            raise
        with path.open("rb"):  # may it be read at all?
            state = _file_state(path)
        if any(size for size, *_ in state[1:]):
            raise ArchiveError(
                f"The archive {path.parent} may not be written here, and {path.name}-wal holds "
                "what a writer has not finished; let it be finished with `actionclip index` where "
                "it may be written, or copy the folder and search the copy."
            ) from exc
        return _connect(path, "mode=ro&immutable=1"), state
    except BaseException:
        connection.close()
        raise
    return connection, None


def _file_state(path: Path) -> _FileState:
    """Size, time of change and number of a database, and of its log where there is one."""
    states = []
    for each in (path, path.with_name(f"{path.name}-wal")):
        with suppress(FileNotFoundError):
            states.append(each.stat())
    return tuple((state.st_size, state.st_mtime_ns, state.st_ino) for state in states)


@contextmanager
def _database_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors, and those of files that may not be read, into sentences."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorname", "")
        if code == "SQLITE_FULL":
            raise FileWriteError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / DATABASE_NAME)
            ) from exc
        raise ArchiveError(_what_is_wrong(folder, exc)) from exc
    except OSError as exc:
        if isinstance(exc, PermissionError) and not isinstance(exc, FileWriteError):
            raise ArchiveError(_not_readable(folder, exc)) from exc
        if isinstance(exc, FileWriteError) or not is_full_disk(exc):
            raise
        raise FileWriteError(exc.errno or errno.ENOSPC, exc.strerror or "", str(folder)) from exc


def _not_readable(folder: Path, exc: OSError) -> str:
    return (
        f"The archive {folder} cannot be read: {exc.filename}: {exc.strerror}; ask for the "
        "permission to read all of the folder, or change it."
    )


def _what_is_wrong(folder: Path, exc: sqlite3.Error) -> str:
    path = folder / DATABASE_NAME
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        return _not_readable(folder, error)
    if "malformed" in str(exc) or "not a database" in str(exc):
        return (
            f"The archive {folder} is damaged: {path} is cut off or overwritten ({exc}); restore "
            "it from a copy, or delete the folder and make it anew with `actionclip index`."
        )
    if "locked" in str(exc):
        return f"The archive {folder} is in use by another process ({exc}); try again later."
    return (
        f"The database of the archive {folder} cannot be used ({exc}); if the disk is whole, "
        "delete the folder and make it anew with `actionclip index`."
    )


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):  # the disk may be full for that as well
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _read_about(connection: sqlite3.Connection, folder: Path) -> ArchiveModel:
    rows: dict[str, str] = {}
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone():
        rows = dict(connection.execute("SELECT key, value FROM about"))
    elif not (folder / DATABASE_NAME).stat().st_size:
        raise ArchiveError(
            f"The archive {folder} is damaged: {folder / DATABASE_NAME} is empty; restore it from "
            "a copy, or make it anew with `actionclip index`, which then does all videos again."
        )
    try:
        version, model = int(rows["schema_version"]), json.loads(rows["model"])
    except (KeyError, ValueError) as exc:
        raise ArchiveError(
            f"{folder} is no archive: its {DATABASE_NAME} is of something else; give a folder that "
            "`actionclip index` made."
        ) from exc
    if version != SCHEMA_VERSION:
        raise ArchiveError(
            f"The archive {folder} has version {version} of the format and this program reads "
            f"{SCHEMA_VERSION}; use a program of its age, or make the archive anew."
        )
    return ArchiveModel(**model)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / VECTORS_NAME / f"{number}.f16"


def is_archive(folder: str | Path) -> bool:
    """Whether a folder holds an archive, by its files."""
    return (Path(folder) / DATABASE_NAME).is_file()


class ArchiveWriter:
    """Adds videos to an archive; one at a time for each archive. A context manager.

    Use `open`.

    Attributes:
        folder: Where it is.
        model: What its windows were made with.
        damaged: Paths of the videos whose windows were found lost when it was opened. They are
            noted as failed, and count as changed.
    """

    def __init__(
        self, folder: Path, connection: sqlite3.Connection, lock: int, model: ArchiveModel
    ) -> None:
        self.folder = folder
        self.model = model
        self.damaged: tuple[str, ...] = ()
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path, model: ArchiveModel) -> ArchiveWriter:
        """Open an archive for writing; it is made where there is none.

        Args:
            folder: The archive.
            model: What the windows that will be added are made with.

        Raises:
            ArchiveError: If another process writes it, or its windows are of another model, or
                the folder holds something else.
            FileWriteError: If it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not is_archive(folder):
            is_empty = folder.is_dir() and not any(
                each.name not in (LOCK_NAME, VECTORS_NAME) for each in folder.iterdir()
            )
            if not is_empty:
                raise ArchiveError(
                    f"{folder} holds something else than an archive; give a new folder, or one "
                    "that `actionclip index` made."
                )
        try:
            (folder / VECTORS_NAME).mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as exc:
            raise FileWriteError(exc.errno or errno.EIO, exc.strerror or "", str(folder)) from exc
        connection = None
        try:
            if not try_lock(lock):
                raise ArchiveError(
                    f"The archive {folder} is being written by another process; wait until that "
                    "is done. It can be searched meanwhile."
                )
            with _database_errors(folder):
                connection = _connect(folder / DATABASE_NAME, "mode=rwc")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                _make_schema(connection, model)
                found = _read_about(connection, folder)
            why = found.why_other(model)
            if why is not None:
                raise ArchiveError(
                    f"The archive {folder} takes no windows of {model.bundle}: {why}; give what "
                    "it was made with, or a new folder."
                )
            writer = cls(folder, connection, lock, found)
            writer.damaged = writer._note_damage()
            writer._remove_leftovers()
        except BaseException:
            if connection is not None:
                connection.close()
            os.close(lock)
            raise
        return writer

    def videos(self) -> dict[str, ArchivedVideo]:
        """All videos, those that failed among them, by their paths."""
        with _database_errors(self.folder):
            return {video.path: video for video in _read_videos(self._connection)}

    def without_thumbnails(self) -> list[str]:
        """Paths of the videos that have windows, of which no picture was kept."""
        with _database_errors(self.folder):
            rows = self._connection.execute(
                "SELECT path FROM videos WHERE num_windows > 0 "
                "AND NOT EXISTS (SELECT 1 FROM thumbnails WHERE video = videos.id)"
            )
            return [_from_sql(path) for (path,) in rows]

    def put(
        self,
        video: ArchivedVideo,
        intervals: NDArray[np.float64],
        embeddings: NDArray[np.floating[Any]],
        thumbnails: Iterable[tuple[int, bytes]] = (),
    ) -> None:
        """Add a video, or put it in the place of the one of the same path; whole or not at all.

        Args:
            video: What is known of it; the number of its windows is taken from `intervals`.
            intervals: Start and end of each window, in seconds, float64, shape (N, 2).
            embeddings: Of the windows, of unit norm, shape (N, D); kept as float16.
            thumbnails: JPEG pictures by the window that they show.

        Raises:
            FileWriteError: If the disk is full; the archive is as it was.
        """
        rows = np.ascontiguousarray(embeddings, np.float16)
        if rows.shape != (len(intervals), self.model.embedding_dim):
            raise ValueError(
                f"embeddings has shape {rows.shape}; expected ({len(intervals)}, "
                f"{self.model.embedding_dim})."
            )
        with _database_errors(self.folder), _transaction(self._connection):
            shard, first_row = self._append(rows)
            self._remove(video.path)
            given = [getattr(video, name) for name in _VIDEO_COLUMNS[:-1]]
            blob = np.ascontiguousarray(intervals, np.float64).tobytes()
            cursor = self._connection.execute(
                f"INSERT INTO videos ({', '.join(_VIDEO_COLUMNS)}, shard, first_row, intervals) "
                f"VALUES ({', '.join('?' * (len(_VIDEO_COLUMNS) + 3))})",
                (*map(_to_sql, given), len(rows), shard, first_row, blob),
            )
            self._connection.executemany(
                "INSERT INTO thumbnails (video, window, jpeg) VALUES (?, ?, ?)",
                [(cursor.lastrowid, window, jpeg) for window, jpeg in thumbnails],
            )

    def remove(self, paths: Iterable[str]) -> int:
        """Forget videos, all of them or none; gives how many there were."""
        with _database_errors(self.folder), _transaction(self._connection):
            return sum(self._remove(path) for path in paths)

    def num_unused_rows(self) -> int:
        """Rows on the disk that belong to no video."""
        with _database_errors(self.folder):
            (rows,) = self._connection.execute("SELECT total(num_rows) FROM shards").fetchone()
            (used,) = self._connection.execute("SELECT total(num_windows) FROM videos").fetchone()
        return int(rows - used)

    def compact(self) -> int:
        """Write the vectors anew without those that no video names; gives how many were dropped.

        A file at a time: each is replaced in one transaction, and readers that have the old one
        open keep it until they look for what is new.
        """
        num_dropped = 0
        with _database_errors(self.folder):
            shards = self._connection.execute(
                "SELECT number, num_rows, (SELECT total(num_windows) FROM videos "
                "WHERE shard = number) FROM shards ORDER BY number"
            ).fetchall()
            for number, num_rows, num_used in shards:
                if num_used < num_rows:
                    self._rewrite(number)
                    num_dropped += int(num_rows - num_used)
        self._remove_leftovers()
        return num_dropped

    def close(self) -> None:
        """Let the next one write."""
        # Whatever readers there are: then the database can be read where nothing may be written.
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()
        with suppress(OSError):
            os.close(self._lock)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove(self, path: str) -> int:
        return self._connection.execute(
            "DELETE FROM videos WHERE path = ?", (_to_sql(path),)
        ).rowcount

    def _note_damage(self) -> tuple[str, ...]:
        """Note videos as failed whose rows are not on the disk any more; gives their paths."""
        damaged: list[str] = []
        with _database_errors(self.folder), _transaction(self._connection):
            shards = self._connection.execute("SELECT number, num_rows FROM shards").fetchall()
            for number, num_rows in shards:
                path = _shard_path(self.folder, number)
                size = path.stat().st_size if path.exists() else 0
                num_whole = size // (2 * self.model.embedding_dim)
                if num_whole >= num_rows:
                    continue
                lost = self._connection.execute(
                    "SELECT id, path FROM videos WHERE shard = ? AND first_row + num_windows > ?",
                    (number, num_whole),
                ).fetchall()
                for identity, name in lost:
                    damaged.append(_from_sql(name))
                    self._connection.execute("DELETE FROM thumbnails WHERE video = ?", (identity,))
                    # No file has this size, so it counts as changed.
                    self._connection.execute(
                        "UPDATE videos SET error = ?, size_bytes = -1, shard = NULL, "
                        "first_row = 0, num_windows = 0, intervals = x'' WHERE id = ?",
                        (_LOST, identity),
                    )
                if num_whole:
                    self._connection.execute(
                        "UPDATE shards SET num_rows = ? WHERE number = ?", (num_whole, number)
                    )
                else:
                    self._connection.execute("DELETE FROM shards WHERE number = ?", (number,))
        return tuple(damaged)

    def _append(self, rows: NDArray[np.float16]) -> tuple[int | None, int]:
        """Bring rows to the disk; gives their shard and place. Nobody sees them before a commit."""
        if not len(rows):
            return None, 0
        found = self._connection.execute(
            "SELECT number, num_rows FROM shards ORDER BY number DESC LIMIT 1"
        ).fetchone()
        number, num_rows = found or (0, 0)
        if num_rows and num_rows + len(rows) > SHARD_ROWS:
            number, num_rows = number + 1, 0
        _write_rows(_shard_path(self.folder, number), rows, num_rows)
        self._connection.execute(
            "INSERT INTO shards (number, num_rows) VALUES (?, ?) "
            "ON CONFLICT (number) DO UPDATE SET num_rows = excluded.num_rows",
            (number, num_rows + len(rows)),
        )
        return number, num_rows

    def _rewrite(self, number: int) -> None:
        with _transaction(self._connection):
            (newest,) = self._connection.execute("SELECT max(number) FROM shards").fetchone()
            videos = self._connection.execute(
                "SELECT id, first_row, num_windows FROM videos WHERE shard = ? ORDER BY first_row",
                (number,),
            ).fetchall()
            target, num_rows = newest + 1, 0
            if videos:
                old = np.fromfile(_shard_path(self.folder, number), np.float16)
                old = old[: len(old) // self.model.embedding_dim * self.model.embedding_dim]
                table = old.reshape(-1, self.model.embedding_dim)
                kept = np.concatenate([table[first : first + num] for _, first, num in videos])
                _write_rows(_shard_path(self.folder, target), kept, 0)
                self._connection.execute("INSERT INTO shards VALUES (?, ?)", (target, len(kept)))
            for identity, _, num in videos:
                self._connection.execute(
                    "UPDATE videos SET shard = ?, first_row = ? WHERE id = ?",
                    (target, num_rows, identity),
                )
                num_rows += num
            self._connection.execute("DELETE FROM shards WHERE number = ?", (number,))

    def _remove_leftovers(self) -> None:
        """Remove files of vectors that no transaction names: of a writer that died, or replaced."""
        with _database_errors(self.folder):
            numbers = {row[0] for row in self._connection.execute("SELECT number FROM shards")}
            for path in (self.folder / VECTORS_NAME).glob("*.f16"):
                if not path.stem.isdigit() or int(path.stem) not in numbers:
                    with suppress(OSError):
                        path.unlink()


_LOST = "Its windows were lost with a file of vectors; index it again."


def _make_schema(connection: sqlite3.Connection, model: ArchiveModel) -> None:
    with _transaction(connection):
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return
        for statement in _SCHEMA:
            connection.execute(statement)
        about = {"schema_version": str(SCHEMA_VERSION), "model": json.dumps(vars(model))}
        connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())


def _write_rows(path: Path, rows: NDArray[np.float16], first: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        data = memoryview(rows.tobytes())
        place = first * rows.shape[1] * rows.itemsize
        while data:
            written = os.pwrite(handle, data, place)
            data, place = data[written:], place + written
        os.fsync(handle)
    except OSError as exc:
        raise FileWriteError(exc.errno or errno.EIO, exc.strerror or "", str(path)) from exc
    finally:
        os.close(handle)


def _read_videos(
    connection: sqlite3.Connection, where: str = "", *given: Any
) -> list[ArchivedVideo]:
    columns = (*_VIDEO_COLUMNS, "id")
    rows = connection.execute(f"SELECT {', '.join(columns)} FROM videos {where} ORDER BY id", given)
    return [ArchivedVideo(**dict(zip(columns, map(_from_sql, row), strict=True))) for row in rows]


# Reading


@dataclass(eq=False)
class Snapshot:
    """What a reader sees: the videos of one moment of the database, and maps of their vectors.

    `ids`, `paths`, `folders`, `recorded`, `durations`, `first` and `count` are of the V videos that
    have windows, in the order of their rows; rows are counted through `shards`, one after the
    other. `places` are id, shard, row in it and number of windows of each, shape (V, 4).
    """

    version: int
    places: NDArray[np.int64]
    paths: list[str]
    folders: list[str]
    recorded: NDArray[np.float64]  # NaN where it is not known
    durations: NDArray[np.float64]
    first: NDArray[np.int64]
    shards: Sequence[NDArray[np.float16]]
    intervals: NDArray[np.float64]  # start and end of the window of each row, shape (N, 2)
    video_of_row: NDArray[np.int32] = field(init=False)  # -1 for rows of no video

    def __post_init__(self) -> None:
        # Of the rows of no video and those of a video, in turns.
        owners = np.full(2 * len(self.paths) + 1, -1, np.int32)
        owners[1::2] = np.arange(len(self.paths))
        lengths = np.empty(len(owners), np.int64)
        ends = np.append(0, self.first + self.count)
        lengths[::2] = np.append(self.first, sum(map(len, self.shards))) - ends
        lengths[1::2] = self.count
        self.video_of_row = np.repeat(owners, lengths)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Of the videos in the archive."""
        return self.places[:, 0]

    @property
    def count(self) -> NDArray[np.int64]:
        """Windows of each video."""
        return self.places[:, 3]

    @property
    def num_windows(self) -> int:
        """Windows that belong to a video."""
        return int(self.count.sum())


def read_rows(
    shards: Sequence[NDArray[np.float16]], rows: NDArray[np.int64]
) -> NDArray[np.float16]:
    """Some rows of an archive, in their order, float16, shape (n, D)."""
    found = np.empty((len(rows), shards[0].shape[1] if shards else 0), np.float16)
    begin = 0
    for shard in shards:
        is_here = (rows >= begin) & (rows < begin + len(shard))
        found[is_here] = shard[rows[is_here] - begin]
        begin += len(shard)
    return found


def _rows_of(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of some videos, one video after the other."""
    begins = np.cumsum(count) - count
    rows: NDArray[np.int64] = np.repeat(first - begins, count) + np.arange(int(count.sum()))
    return rows


def _find_places(known: NDArray[np.int64] | None, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where places, shape (V, 4), are among those that are known; -1 for those that are not."""
    if known is None or not len(known):
        return np.full(len(wanted), -1, np.int64)
    by_id = np.argsort(known[:, 0])
    found = np.searchsorted(known[:, 0], wanted[:, 0], sorter=by_id)
    candidates: NDArray[np.int64] = by_id[np.minimum(found, len(known) - 1)]
    return np.where((known[candidates] == wanted).all(axis=1), candidates, -1)


class ArchiveReader:
    """Reads an archive while others may write it; a context manager.

    Calls may come from several threads at a time. Use `open`.
    """

    def __init__(
        self,
        folder: Path,
        connection: sqlite3.Connection,
        model: ArchiveModel,
        state: _FileState | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self._connection = connection
        self._state = state  # of a file that is taken for one that does not change
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._is_new = True  # the connection, whose versions say nothing of those of another
        self._is_closed = False

    @classmethod
    def open(cls, folder: str | Path) -> ArchiveReader:
        """Open an archive for reading.

        Raises:
            ArchiveError: If it is none, or of another version of the format.
        """
        folder = Path(folder)
        with _database_errors(folder):
            if not is_archive(folder):
                what = "does not exist" if not folder.exists() else f"has no {DATABASE_NAME}"
                raise ArchiveError(
                    f"{folder} is no archive: it {what}; make one with `actionclip index`."
                )
            connection, state = _connect_reader(folder / DATABASE_NAME)
            try:
                return cls(folder, connection, _read_about(connection, folder), state)
            except BaseException:
                connection.close()
                raise

    def videos(self) -> dict[str, ArchivedVideo]:
        """All videos, those that failed among them, by their paths."""
        with self._reading():
            return {video.path: video for video in _read_videos(self._connection)}

    def video(self, video_id: int) -> ArchivedVideo | None:
        """The video of an id; None where it is gone, or was replaced by a changed one."""
        with self._reading():
            found = _read_videos(self._connection, "WHERE id = ?", video_id)
        return found[0] if found else None

    def snapshot(self) -> Snapshot:
        """The newest state of the archive; of what was seen before nothing is read again."""
        with self._reading():
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if self._snapshot is None or self._is_new or self._snapshot.version != version:
                self._snapshot = self._read_snapshot(version)
                self._is_new = False
            return self._snapshot

    def thumbnail(self, video: str | int, window: int) -> bytes | None:
        """The picture of a window, or of the nearest before it, as JPEG; None without one.

        Args:
            video: Its path or its id.
            window: Number of the window in the video.
        """
        column = "path" if isinstance(video, str) else "id"
        with self._reading():
            found = self._connection.execute(
                "SELECT jpeg FROM thumbnails JOIN videos ON videos.id = video "
                f"WHERE videos.{column} = ? AND window <= ? AND ? < num_windows "
                "ORDER BY window DESC LIMIT 1",
                (_to_sql(video), window, window),
            ).fetchone()
        return None if found is None else found[0]

    def close(self) -> None:
        """Close it; it cannot be read afterwards."""
        with self._lock:
            self._is_closed = True
            self._snapshot = None
            self._connection.close()

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One at a time, of the newest state."""
        with self._lock, _database_errors(self.folder):
            if self._is_closed:
                raise ArchiveError(f"The archive {self.folder} was closed; open it again.")
            path = self.folder / DATABASE_NAME
            if self._state is not None and self._state != _file_state(path):
                connection, state = _connect_reader(path)
                self._connection.close()
                self._connection, self._state, self._is_new = connection, state, True
            yield

    def _read_snapshot(self, version: int) -> Snapshot:
        for _ in range(_TRIES):
            try:
                return self._try_snapshot(version)
            except FileNotFoundError:
                continue  # compacted between the look into the database and that for the file
        raise ArchiveError(
            f"Vectors of the archive {self.folder} are missing; restore the folder {VECTORS_NAME}, "
            "or run the `actionclip index` that made the archive, which does their videos again."
        )

    def _try_snapshot(self, version: int) -> Snapshot:
        old = self._snapshot
        self._connection.execute("BEGIN")
        try:
            shards = self._connection.execute(
                "SELECT number, num_rows FROM shards ORDER BY number"
            ).fetchall()
            rows = self._connection.execute(
                "SELECT id, shard, first_row, num_windows FROM videos WHERE num_windows > 0 "
                "ORDER BY shard, first_row"
            ).fetchall()
            places = np.array(rows, np.int64).reshape(-1, 4)
            seen = _find_places(None if old is None else old.places, places)
            new = self._read_new(places[seen < 0, 0].tolist())
        finally:
            self._connection.execute("COMMIT")
        width, maps, begins, begin = self.model.embedding_dim, [], {}, 0
        for number, num_rows in shards:
            path = _shard_path(self.folder, number)
            if path.stat().st_size < num_rows * width * 2:
                raise ArchiveError(
                    f"{path} is shorter than its {num_rows} rows; restore it, or run the "
                    "`actionclip index` that made the archive, which does their videos again."
                )
            maps.append(np.memmap(path, np.float16, "r", shape=(num_rows, width)))
            begins[number] = begin
            begin += num_rows
        first = np.array([begins[shard] for _, shard, _, _ in rows], np.int64) + places[:, 2]
        paths, folders = [""] * len(rows), [""] * len(rows)
        recorded, durations = np.empty(len(rows)), np.empty(len(rows))
        intervals = np.zeros((begin, 2))
        if old is not None:
            kept = np.flatnonzero(seen >= 0)
            before = seen[kept]
            for n, m in zip(kept.tolist(), before.tolist(), strict=True):
                paths[n], folders[n] = old.paths[m], old.folders[m]
            recorded[kept], durations[kept] = old.recorded[before], old.durations[before]
            if np.array_equal(first[kept], old.first[before]):  # as after anything but `compact`
                intervals[: len(old.intervals)] = old.intervals[:begin]
            else:
                from_rows = _rows_of(old.first[before], old.count[before])
                intervals[_rows_of(first[kept], places[kept, 3])] = old.intervals[from_rows]
        for n in np.flatnonzero(seen < 0).tolist():
            paths[n], folders[n], recorded[n], durations[n], blob = new[rows[n][0]]
            spans = np.frombuffer(blob, np.float64).reshape(-1, 2)
            intervals[first[n] : first[n] + len(spans)] = spans
        return Snapshot(
            version=version,
            places=places,
            paths=paths,
            folders=folders,
            recorded=recorded,
            durations=durations,
            first=first,
            shards=maps,
            intervals=intervals,
        )

    def _read_new(self, wanted: Sequence[int]) -> dict[int, tuple[str, str, float, float, bytes]]:
        """Path, folder, time of recording (NaN where unknown), length and intervals of videos."""
        found: dict[int, tuple[str, str, float, float, bytes]] = {}
        for begin in range(0, len(wanted), _IDS_AT_ONCE):
            part = wanted[begin : begin + _IDS_AT_ONCE]
            marks = ", ".join("?" * len(part))
            rows = self._connection.execute(
                "SELECT id, path, folder, recorded_seconds, duration_seconds, intervals "
                f"FROM videos WHERE id IN ({marks})",
                part,
            )
            for number, path, folder, recorded, duration, intervals in rows:
                seconds = np.nan if recorded is None else recorded
                found[number] = (_from_sql(path), _from_sql(folder), seconds, duration, intervals)
        return found


_TRIES = 10
_IDS_AT_ONCE = 500  # SQLite of before 2020 takes 999 values in a statement
