"""Approximate search: the moments of an exact one, and z as an exact one tells it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from actionclip_deploy import search as module
from actionclip_deploy.archive import (
    ArchivedVideo,
    ArchiveModel,
    ArchiveReader,
    ArchiveWriter,
    read_rows,
)
from actionclip_deploy.cli import app
from actionclip_deploy.errors import ArchiveError
from actionclip_deploy.search import Archive

if importlib.util.find_spec("faiss") is None:
    pytest.skip("needs the extra `faiss`", allow_module_level=True)

from actionclip_deploy.nearest import FOLDER_NAME, NearestWindows

DIM, PER_VIDEO, SCENES = 32, 250, 40
# Of the moments of an exact search, so many at least: these scenes run into one another.
SHARE = 0.7
MODEL = ArchiveModel("gone", "v" * 64, "t" * 64, DIM, 4.0, 1.0, "onnxruntime", 2.0)

pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # SWIG's


def windows(seed: int, count: int = PER_VIDEO) -> np.ndarray:
    """Windows near to one of the scenes for some time, and then to another."""
    generator = np.random.default_rng(seed)
    scenes = np.random.default_rng(99).standard_normal((SCENES, DIM))
    made = scenes[generator.integers(0, SCENES, -(-count // 25)).repeat(25)[:count]]
    made = made + 0.6 * generator.standard_normal((count, DIM))
    found: np.ndarray = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return found


def put(writer: ArchiveWriter, number: int, seed: int | None = None) -> None:
    starts = np.arange(PER_VIDEO, dtype=np.float64)
    video = ArchivedVideo(f"/cam/{number}.mp4", "cam", 1, 1, None, 254.0)
    spans = np.stack([starts, starts + 4], axis=1)
    writer.put(video, spans, windows(number if seed is None else seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5000 windows, with an index of them."""
    folder = tmp_path_factory.mktemp("archives") / "archive"
    with ArchiveWriter.open(folder, MODEL) as writer:
        for number in range(20):
            put(writer, number)
    with Archive.open(folder) as archive:
        archive.prepare_approximate()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "archive")
    return tmp_path / "archive"


def builds(folder: Path) -> int:
    """How often the index had to be built to be up to date: 0 or 1."""
    counts: list[int] = []
    with Archive.open(folder) as archive:
        archive.prepare_approximate(counts.append)
    return len(counts)


def assert_same(folder: Path, seed: int, *, share: float = SHARE, **options: Any) -> None:
    """z, mean and std are those of an exact search, and so are the moments, or most of them."""
    query = windows(seed)[0]
    with Archive.open(folder) as archive:
        exact = archive.search(like=query, approximate=False, **options)
        near = archive.search(like=query, approximate=True, **options)
    assert near.is_approximate
    assert not exact.is_approximate
    assert near.mean == pytest.approx(exact.mean, abs=1e-6)
    assert near.std == pytest.approx(exact.std, abs=1e-6)
    assert near.num_windows == near.num_searched == exact.num_searched
    others = {(each.video, each.window): each for each in exact}
    common = [each for each in near if (each.video, each.window) in others]
    assert len(common) >= share * len(exact)
    for each in common:
        other = others[each.video, each.window]
        assert each.z == pytest.approx(other.z, abs=1e-4)
        assert (each.start_seconds, each.end_seconds) == (other.start_seconds, other.end_seconds)


@pytest.mark.parametrize("seed", range(1000, 1005))
def test_moments_and_z_are_those_of_an_exact_search(made: Path, seed: int) -> None:
    assert_same(made, seed, top=10)


def test_rows_are_found_over_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("actionclip_deploy.archive.SHARD_ROWS", 600)
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for number in range(10):
            put(writer, number)
    assert builds(tmp_path / "a") == 1
    assert_same(tmp_path / "a", 1000, top=5)
    with ArchiveReader.open(tmp_path / "a") as reader:
        snapshot = reader.snapshot()
    assert len(snapshot.shards) > 3
    table = np.concatenate([np.asarray(each) for each in snapshot.shards])
    rows = np.array([0, 2499, 600, 599, 1200, 3])
    np.testing.assert_array_equal(read_rows(snapshot.shards, rows), table[rows])


def test_what_came_and_went_since_is_searched_without_a_new_index(folder: Path) -> None:
    with ArchiveWriter.open(folder, MODEL) as writer:
        put(writer, 20, seed=1002)  # holds the very window that is looked for
        writer.remove(["/cam/3.mp4"])
    assert builds(folder) == 0
    assert_same(folder, 1002, top=10)
    with Archive.open(folder) as archive:
        best = archive.search(like=windows(1002)[0], top=1, approximate=True)[0]
    assert best.video == "/cam/20.mp4"


def test_the_index_is_built_anew_when_much_has_changed(folder: Path) -> None:
    assert builds(folder) == 0
    with ArchiveWriter.open(folder, MODEL) as writer:
        for number in range(20, 23):
            put(writer, number)
    assert builds(folder) == 1
    assert builds(folder) == 0
    with ArchiveWriter.open(folder, MODEL) as writer:
        writer.remove(["/cam/0.mp4"])
        writer.compact()  # rows are elsewhere now
    assert builds(folder) == 1
    assert_same(folder, 1003, top=10)


def test_an_index_of_other_windows_is_not_taken_for_that_of_the_archive(
    folder: Path, tmp_path: Path
) -> None:
    with ArchiveWriter.open(tmp_path / "other", MODEL) as writer:
        for number in range(20):
            put(writer, number, seed=500 + number)
    shutil.copytree(folder / FOLDER_NAME, tmp_path / "other" / FOLDER_NAME)
    assert builds(tmp_path / "other") == 1


@pytest.mark.parametrize("name", ["windows.faiss", "about.safetensors"])
def test_a_damaged_index_is_built_anew(folder: Path, name: str) -> None:
    path = folder / FOLDER_NAME / name
    path.write_bytes(path.read_bytes()[:100])
    assert builds(folder) == 1
    assert_same(folder, 1000, top=10)


def test_all_windows_are_scored_where_few_or_some_alone_are_wanted(made: Path) -> None:
    query = windows(1000)[0]
    with Archive.open(made) as archive:
        for where in ({"cameras": ["cam"]}, {"videos": ["3.mp4"]}, {"from_seconds": 0.0}):
            assert not archive.search(like=query, approximate=True, **where).is_approximate
        assert not archive.search(like=query, approximate=True, top=10_000).is_approximate


def test_what_must_not_be_shown_is_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, other = windows(1000)[0], windows(1001)[0]
    with Archive.open(made) as archive:
        monkeypatch.setattr(archive, "_embed", lambda *_: other[np.newaxis])
        exact = archive.search(like=query, without="a dog", top=5, approximate=False)
        near = archive.search(like=query, without="a dog", top=5, approximate=True)
    assert near.is_approximate
    assert {(m.video, m.window) for m in near} == {(m.video, m.window) for m in exact}


def test_large_archives_are_searched_by_an_index_that_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = windows(1000)[0]
    with Archive.open(folder) as archive:
        assert not archive.search(like=query, top=5).is_approximate
        monkeypatch.setattr(module, "APPROXIMATE_WINDOWS", 5000)
        assert archive.search(like=query, top=5).is_approximate
    shutil.rmtree(folder / FOLDER_NAME)
    with Archive.open(folder) as archive:
        assert not archive.search(like=query, top=5).is_approximate
    assert not (folder / FOLDER_NAME).exists()


def test_the_verb_builds_the_index_and_says_so(folder: Path) -> None:
    shutil.rmtree(folder / FOLDER_NAME)
    words = ["search", str(folder), "--like", "3.mp4@100", "--top", "5", "--approximate"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "Building the index of 5,000 windows" in first.output
    assert "among 5,000 windows (approximate)" in first.stdout
    again = CliRunner().invoke(app, [*words, "--json"])
    assert "Building" not in again.output
    assert '"is_approximate": true' in again.stdout


def test_an_empty_archive_has_no_index(tmp_path: Path) -> None:
    ArchiveWriter.open(tmp_path / "a", MODEL).close()
    with Archive.open(tmp_path / "a") as archive:
        with pytest.raises(ArchiveError, match="has no windows yet"):
            archive.prepare_approximate()
        assert not archive.search(like=windows(0)[0], approximate=True).is_approximate


def test_a_reader_goes_on_while_the_index_is_replaced(folder: Path) -> None:
    with ArchiveReader.open(folder) as reader:
        opened = NearestWindows.open(folder, reader.snapshot())
    assert opened is not None
    before = opened.find(windows(1000)[0], 50)
    with ArchiveWriter.open(folder, MODEL) as writer:
        for number in range(20, 23):
            put(writer, number)
    assert builds(folder) == 1
    np.testing.assert_array_equal(opened.find(windows(1000)[0], 50), before)
