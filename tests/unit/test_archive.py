"""The store of archives: whole videos, whatever happens to the writer, and several readers."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from full_disk import small_files

from actionclip_deploy.archive import (
    ArchivedVideo,
    ArchiveModel,
    ArchiveReader,
    ArchiveWriter,
    Snapshot,
)
from actionclip_deploy.errors import ArchiveError, FileWriteError

DIM = 16
MODEL = ArchiveModel("bundle", "v" * 64, "t" * 64, DIM, 4.0, 0.5, "onnxruntime", 2.0)


def video(name: str, **changes: object) -> ArchivedVideo:
    return replace(ArchivedVideo(name, Path(name).parent.name, 10, 20, None, 9.0), **changes)


def rows(seed: int, count: int) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def spans(count: int) -> np.ndarray:
    starts = 0.5 * np.arange(count)
    return np.stack([starts, starts + 4], axis=1)


def put(writer: ArchiveWriter, name: str, seed: int, count: int) -> None:
    writer.put(video(name), spans(count), rows(seed, count))


def stored(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """The embeddings of each video, as a reader sees them."""
    table = np.concatenate([*snapshot.shards, np.empty((0, DIM), np.float16)])
    return {
        path: table[first : first + count]
        for path, first, count in zip(snapshot.paths, snapshot.first, snapshot.count, strict=True)
    }


def test_what_is_put_is_read_again(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "/cam/one.mp4", 1, 5)
        writer.put(video("/cam/broken.mp4", error="It is empty."), spans(0), rows(0, 0))
        put(writer, "/cam/two.mp4", 2, 3)
    with ArchiveReader.open(tmp_path / "a") as reader:
        assert reader.model == MODEL
        assert [each.num_windows for each in reader.videos().values()] == [5, 0, 3]
        assert reader.videos()["/cam/broken.mp4"].error == "It is empty."
        snapshot = reader.snapshot()
    assert snapshot.paths == ["/cam/one.mp4", "/cam/two.mp4"]
    assert snapshot.folders == ["cam", "cam"]
    for (_, found), (seed, count) in zip(stored(snapshot).items(), ((1, 5), (2, 3)), strict=True):
        np.testing.assert_array_equal(found, rows(seed, count).astype(np.float16))
    np.testing.assert_array_equal(snapshot.intervals, [*spans(5), *spans(3)])
    assert snapshot.video_of_row.tolist() == [0] * 5 + [1] * 3


def test_a_reader_sees_whole_videos_that_come_go_and_change(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        with ArchiveReader.open(tmp_path / "a") as reader:
            before = reader.snapshot()
            assert reader.snapshot() is before  # nothing is read again
            put(writer, "two", 2, 3)
            assert list(stored(reader.snapshot())) == ["one", "two"]
            put(writer, "one", 9, 4)
            assert writer.remove(["two", "nobody"]) == 1
            after = reader.snapshot()
            assert after.num_windows == 4
            assert after.video_of_row.tolist() == [-1] * 8 + [0] * 4
            put(writer, "three", 3, 2)
            assert reader.snapshot().video_of_row.tolist() == [-1] * 8 + [0] * 4 + [1] * 2
            np.testing.assert_array_equal(stored(after)["one"], rows(9, 4).astype(np.float16))
            # What was opened before stays as it was.
            np.testing.assert_array_equal(stored(before)["one"], rows(1, 5).astype(np.float16))


def test_a_reader_that_goes_on_sees_what_a_new_one_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actionclip_deploy.archive.SHARD_ROWS", 16)
    generator = np.random.default_rng(0)
    with (
        ArchiveWriter.open(tmp_path / "a", MODEL) as writer,
        ArchiveReader.open(tmp_path / "a") as reader,
    ):
        for step in range(120):
            name = f"cam/{generator.integers(12)}"
            if generator.random() < 0.6:
                count = int(generator.integers(0, 7))
                spans = generator.random((count, 2))
                recorded = float(step) if step % 2 else None
                writer.put(video(name, recorded_seconds=recorded), spans, rows(step, count))
            elif generator.random() < 0.7:
                writer.remove([name])
            else:
                writer.compact()
            if generator.random() < 0.3:
                continue  # several changes at a time
            found = reader.snapshot()
            with ArchiveReader.open(tmp_path / "a") as other:
                expected = other.snapshot()
            assert found.paths == expected.paths
            assert found.folders == expected.folders
            for name in ("places", "recorded", "durations", "first", "video_of_row"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            is_live = found.video_of_row >= 0
            np.testing.assert_array_equal(found.intervals[is_live], expected.intervals[is_live])
            tables = stored(expected)
            for path, table in stored(found).items():
                np.testing.assert_array_equal(table, tables[path])


def test_what_a_reader_has_seen_is_not_read_again(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        with ArchiveReader.open(tmp_path / "a") as reader:
            before = reader.snapshot()
            with sqlite3.connect(tmp_path / "a/archive.db") as connection:  # nobody else does this
                connection.execute("UPDATE videos SET intervals = zeroblob(80), folder = 'x'")
            connection.close()
            put(writer, "two", 2, 3)
            after = reader.snapshot()
    assert after.paths == ["one", "two"]
    assert after.folders[0] == before.folders[0]
    np.testing.assert_array_equal(after.intervals[:5], spans(5))


def test_no_video_gets_the_id_of_another(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        seen = set()
        for seed in range(3):
            put(writer, "one", seed, 5)
            with ArchiveReader.open(tmp_path / "a") as reader:
                (number,) = reader.snapshot().ids.tolist()
                found = reader.video(number)
                assert found is not None
                assert (found.path, found.id, found.num_windows) == ("one", number, 5)
                assert all(reader.video(other) is None for other in seen)
            seen.add(number)
            writer.remove(["one"])
            writer.compact()
    assert len(seen) == 3


def test_compaction_drops_what_nobody_has_and_readers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actionclip_deploy.archive.SHARD_ROWS", 8)
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for number in range(8):
            put(writer, f"video {number}", number, 3)
        with ArchiveReader.open(tmp_path / "a") as reader:
            before = reader.snapshot()
            writer.remove([f"video {number}" for number in (0, 1, 4)])
            assert writer.num_unused_rows() == 9
            assert writer.compact() == 9
            assert writer.num_unused_rows() == 0
            size = sum(path.stat().st_size for path in (tmp_path / "a/vectors").iterdir())
            assert size == 15 * DIM * 2
            found = stored(reader.snapshot())
            assert sorted(found) == [f"video {number}" for number in (2, 3, 5, 6, 7)]
            for name, table in found.items():
                expected = rows(int(name[-1]), 3).astype(np.float16)
                np.testing.assert_array_equal(table, expected)
            np.testing.assert_array_equal(stored(before)["video 0"], rows(0, 3).astype(np.float16))


def test_a_file_that_goes_between_the_database_and_its_map_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        put(writer, "two", 2, 5)
        writer.remove(["one"])
        reader = ArchiveReader.open(tmp_path / "a")
        real, calls = np.memmap, []

        def late(path: Path, *args: object, **options: object) -> np.ndarray:
            calls.append(path)
            if len(calls) == 1:
                writer.compact()
                raise FileNotFoundError(path)
            return real(path, *args, **options)

        monkeypatch.setattr(np, "memmap", late)
        with reader:
            assert list(stored(reader.snapshot())) == ["two"]
        assert calls[0] != calls[1]


def test_one_writes_and_the_second_is_told(tmp_path: Path) -> None:
    with (
        ArchiveWriter.open(tmp_path / "a", MODEL),
        pytest.raises(ArchiveError, match="being written by another process; wait"),
    ):
        ArchiveWriter.open(tmp_path / "a", MODEL)
    ArchiveWriter.open(tmp_path / "a", MODEL).close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"visual_sha256": "x"}, "another visual encoder"),
        ({"textual_sha256": "x"}, "another text encoder"),
        ({"window_seconds": 2.0}, "has windows of 4 s, and --window is 2"),
        ({"stride_seconds": 1.0}, "begin 0.5 s apart, and --stride is 1"),
        ({"static_cosine": 0.9}, "from a cosine of 2 on, and --static is 0.9"),
        ({"region": "crop"}, "were read with --resize frame, and it is crop"),
    ],
)
def test_windows_of_another_model_are_refused(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    ArchiveWriter.open(tmp_path / "a", MODEL).close()
    with pytest.raises(ArchiveError, match=why):
        ArchiveWriter.open(tmp_path / "a", replace(MODEL, **changes))


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist; make one with `actionclip index`"):
        ArchiveReader.open(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(ArchiveError, match=r"has no archive\.db"):
        ArchiveReader.open(tmp_path / "other")
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ArchiveError, match="holds something else than an archive"):
        ArchiveWriter.open(tmp_path / "other", MODEL)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    (tmp_path / "file").mkdir()
    (tmp_path / "file/archive.db").write_bytes(b"no database, whatever its name says" * 99)
    for open_it in (ArchiveReader.open, lambda path: ArchiveWriter.open(path, MODEL)):
        with pytest.raises(ArchiveError, match="is cut off or overwritten"):
            open_it(tmp_path / "file")


def test_another_version_and_missing_vectors_are_told(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    (vectors,) = (tmp_path / "cut/vectors").iterdir()
    os.truncate(vectors, 100)
    with (
        ArchiveReader.open(tmp_path / "cut") as reader,
        pytest.raises(ArchiveError, match="is shorter than its 5 rows"),
    ):
        reader.snapshot()
    vectors.unlink()
    with (
        ArchiveReader.open(tmp_path / "cut") as reader,
        pytest.raises(ArchiveError, match=r"Vectors of the archive .* are missing"),
    ):
        reader.snapshot()
    with sqlite3.connect(tmp_path / "a/archive.db") as connection:
        connection.execute("UPDATE about SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(ArchiveError, match="has version 99 of the format"):
        ArchiveReader.open(tmp_path / "a")


def test_a_path_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    name = "/k\udcfcche/caf\udce9_20261130_181500.mp4"
    broken = "/k\udcfcche/leer.mp4"
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for seed in (1, 2):
            put(writer, "/cam/caf\u00e9.mp4", seed, 2)
            writer.put(video(name), spans(3), rows(seed, 3), [(0, b"a picture")])
            writer.put(video(broken, error=f"{broken} is empty."), spans(0), rows(0, 0))
        assert list(writer.videos()) == ["/cam/caf\u00e9.mp4", name, broken]
    with ArchiveReader.open(tmp_path / "a") as reader:
        snapshot = reader.snapshot()
        assert snapshot.paths == ["/cam/caf\u00e9.mp4", name]
        assert snapshot.folders == ["cam", "k\udcfcche"]
        assert reader.thumbnail(name, 0) == b"a picture"
        assert reader.videos()[broken].error == f"{broken} is empty."
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        assert writer.remove([name, broken]) == 2


@contextmanager
def reading_alone(folder: Path) -> Iterator[None]:
    """Nobody may write a folder; not even root, who becomes somebody else."""
    before = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in before.items():
        path.chmod(mode & 0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in before.items():
            if path.exists():
                path.chmod(mode)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users may look into, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_an_archive_that_may_only_be_read_is_searched(open_folder: Path) -> None:
    archive = open_folder / "a"
    with ArchiveWriter.open(archive, MODEL) as writer:
        put(writer, "one", 1, 5)
    with reading_alone(archive):
        reader = ArchiveReader.open(archive)
        assert list(stored(reader.snapshot())) == ["one"]
        assert reader.snapshot() is reader.snapshot()
    with reader:
        # Who may write adds a video, which is seen.
        with ArchiveWriter.open(archive, MODEL) as writer:
            put(writer, "two", 2, 3)
            assert list(stored(reader.snapshot())) == ["one", "two"]
            put(writer, "three", 3, 3)
        with reading_alone(archive):
            assert list(stored(reader.snapshot())) == ["one", "two", "three"]


def test_what_a_dead_writer_left_is_told_where_nothing_may_be_written(open_folder: Path) -> None:
    with ArchiveWriter.open(open_folder / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        shutil.copytree(open_folder / "a", open_folder / "left")  # as of a writer that is killed
    (open_folder / "left/archive.db-shm").unlink()
    with (
        reading_alone(open_folder / "left"),
        pytest.raises(ArchiveError, match=r"may not be written here, and .*-wal holds"),
    ):
        ArchiveReader.open(open_folder / "left")
    with ArchiveReader.open(open_folder / "left") as reader:
        assert reader.snapshot().paths == ["one"]


@pytest.mark.parametrize("name", ["archive.db", "vectors/0.f16"])
def test_a_file_that_may_not_be_read_is_told(open_folder: Path, name: str) -> None:
    archive = open_folder / "a"
    with ArchiveWriter.open(archive, MODEL) as writer:
        put(writer, "one", 1, 5)
    (archive / name).chmod(0)
    with (
        reading_alone(archive),
        pytest.raises(ArchiveError, match=rf"cannot be read: .*{name}: Permission denied"),
        ArchiveReader.open(archive) as reader,
    ):
        reader.snapshot()


@pytest.mark.parametrize(
    ("size", "why"), [(0, "is empty; restore it"), (50, "is cut off"), (9000, "is cut off")]
)
def test_a_database_that_is_cut_off_is_told_as_damage(tmp_path: Path, size: int, why: str) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for number in range(40):
            put(writer, f"video {number}", number, 50)
    os.truncate(tmp_path / "a/archive.db", size)
    with (
        pytest.raises(ArchiveError, match=rf"The archive .* is damaged: .*archive\.db {why}"),
        ArchiveReader.open(tmp_path / "a") as reader,
    ):
        reader.snapshot()


def test_a_database_of_something_else_is_no_archive(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "archive.db") as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    with pytest.raises(ArchiveError, match=r"is no archive: its archive\.db is of something else"):
        ArchiveReader.open(tmp_path)


def test_an_archive_that_was_closed_says_so(tmp_path: Path) -> None:
    ArchiveWriter.open(tmp_path / "a", MODEL).close()
    reader = ArchiveReader.open(tmp_path / "a")
    reader.close()
    for call in (reader.snapshot, reader.videos, lambda: reader.video(1)):
        with pytest.raises(ArchiveError, match="was closed; open it again"):
            call()


@pytest.mark.parametrize("size", [None, 0, 8 * DIM * 2 - 1, 5 * DIM * 2])
def test_videos_whose_vectors_are_lost_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    monkeypatch.setattr("actionclip_deploy.archive.SHARD_ROWS", 12)
    sizes = {"one": 5, "two": 3, "three": 4, "four": 6}  # four has a file of its own
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for seed, (name, count) in enumerate(sizes.items()):
            put(writer, name, seed, count)
        assert writer.damaged == ()
    path = tmp_path / "a/vectors/0.f16"
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    lost = {"two", "three"} if size and size >= 5 * DIM * 2 else {"one", "two", "three"}
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        assert set(writer.damaged) == lost
        for name, each in writer.videos().items():
            is_lost = name in lost
            assert (each.num_windows == 0) == is_lost
            assert ((each.error or "").startswith("Its windows were lost")) == is_lost
            assert (each.size_bytes == 10) == (not is_lost)
    with ArchiveReader.open(tmp_path / "a") as reader:
        assert set(stored(reader.snapshot())) == set(sizes) - lost
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        assert writer.damaged == ()
        for seed, (name, count) in enumerate(sizes.items()):
            if name in lost:
                put(writer, name, seed, count)
    with ArchiveReader.open(tmp_path / "a") as reader:
        found = stored(reader.snapshot())
    for seed, (name, count) in enumerate(sizes.items()):
        np.testing.assert_array_equal(found[name], rows(seed, count).astype(np.float16))


def test_a_full_disk_leaves_the_archive_as_it_was(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        with small_files(1000), pytest.raises(FileWriteError, match="make room there"):
            put(writer, "two", 2, 500)
        put(writer, "three", 3, 4)
    with ArchiveReader.open(tmp_path / "a") as reader:
        found = stored(reader.snapshot())
    assert list(found) == ["one", "three"]
    np.testing.assert_array_equal(found["one"], rows(1, 5).astype(np.float16))
    np.testing.assert_array_equal(found["three"], rows(3, 4).astype(np.float16))


def test_a_database_that_finds_no_room_leaves_the_archive_as_it_was(tmp_path: Path) -> None:
    """As on a file system that is full: tried on one at each of 30 fillings, and so here."""
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        put(writer, "one", 1, 5)
        (pages,) = writer._connection.execute("PRAGMA page_count").fetchone()
        writer._connection.execute(f"PRAGMA max_page_count = {pages}")
        written = ["one"]

        def fill() -> None:
            for number in range(1000):
                put(writer, f"more {number}", number, 50)
                written.append(f"more {number}")

        with pytest.raises(FileWriteError, match=r"archive\.db cannot .*make room there"):
            fill()
        with ArchiveReader.open(tmp_path / "a") as reader:
            assert list(stored(reader.snapshot())) == written
        writer._connection.execute(f"PRAGMA max_page_count = {10 * pages}")
        put(writer, "last", 3, 4)
    with ArchiveReader.open(tmp_path / "a") as reader:
        found = stored(reader.snapshot())
    assert list(found) == [*written, "last"]
    np.testing.assert_array_equal(found["last"], rows(3, 4).astype(np.float16))


# Writes videos of which each row says whose it is, takes some away and compacts, and tells what is
# committed; it is killed at any moment.
WRITER = textwrap.dedent(
    """
    import sys
    import numpy as np
    from actionclip_deploy import archive

    archive.SHARD_ROWS = 64
    number = int(sys.argv[2])
    model = archive.ArchiveModel("bundle", "v", "t", 16, 4.0, 0.5, "onnxruntime", 2.0)
    with archive.ArchiveWriter.open(sys.argv[1], model) as writer:
        while True:
            number += 1
            table = np.full((1 + number % 7, 16), number % 2000, np.float16)
            video = archive.ArchivedVideo(f"video {number}", "", 10, 20)
            writer.put(video, np.zeros((len(table), 2)), table)
            print(f"put {number}", flush=True)
            if number % 3 == 0:
                writer.remove([f"video {number - 1}"])
                print(f"removed {number - 1}", flush=True)
            if number % 8 == 0:
                writer.compact()
                print("compacted", flush=True)
    """
)


def test_a_writer_that_is_killed_at_any_moment_leaves_whole_videos(tmp_path: Path) -> None:
    folder, generator = tmp_path / "a", np.random.default_rng(0)
    committed: set[int] = set()
    gone: set[int] = set()
    number = 0
    for _ in range(50):
        command = [sys.executable, "-c", WRITER, str(folder), str(number)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()  # it has begun
            time.sleep(float(generator.uniform(0, 0.1)))
            process.send_signal(signal.SIGKILL)
            told = [first, *process.stdout.read().splitlines()]
        for line in told:
            what, _, name = line.strip().partition(" ")
            if what == "put":
                number = int(name)
                committed.add(number)
            elif what == "removed":
                gone.add(int(name))
        with ArchiveReader.open(folder) as reader:
            found = stored(reader.snapshot())
        numbers = {int(name.split()[1]) for name in found}
        # What it did last it may not have told any more: a video more, or one less.
        assert committed - gone - {number - 1} <= numbers <= committed - gone | {number + 1}
        for name, table in found.items():
            own = int(name.split()[1])
            assert table.shape == (1 + own % 7, DIM)
            assert (table == own % 2000).all()
        number = max([number, *numbers])
        committed, gone = numbers, set()
    model = replace(MODEL, visual_sha256="v", textual_sha256="t")
    with ArchiveWriter.open(folder, model) as writer:
        writer.compact()
        kept = {path.name for path in (folder / "vectors").iterdir()}
        connection = sqlite3.connect(folder / "archive.db")
        named = {f"{row[0]}.f16" for row in connection.execute("SELECT number FROM shards")}
        connection.close()
    assert kept == named
