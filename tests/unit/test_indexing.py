"""Videos into archives: their windows as `predict --timeline` sees them, each video once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from rendering import moving_pictures, render
from typer.testing import CliRunner

from actionclip_deploy import indexing
from actionclip_deploy.archive import ArchiveReader, ArchiveWriter
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.indexing import (
    NO_STATIC_COSINE,
    IndexedVideo,
    archive_model,
    index_videos,
    recording_time,
    what_changed,
)
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.stream import WindowBuilder, WindowGrid
from actionclip_deploy.timeline import FileGrid, encode_file
from actionclip_deploy.video import VideoReader

GRID = WindowGrid(window_seconds=1.0, num_frames=4)  # at 25 frames a second: 4 s are 13 windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 4, 2 and 1/5 seconds, one of a still picture, and one that is none."""
    made = tmp_path_factory.mktemp("videos")
    for name, num_frames in (("long", 100), ("middle", 50), ("short", 5)):
        render(made / f"{name}.mp4", num_frames=num_frames, size=(96, 64))
    render(made / "still.mkv", pictures=moving_pictures(1) * 100, codec="ffv1")
    (made / "none.mp4").write_bytes(b"no video at all")
    return made


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


def run(
    bundle: Bundle,
    videos: list[Path],
    archive: Path,
    *,
    static_cosine: float = NO_STATIC_COSINE,
    thumbnails: bool = False,
    num_workers: int = 2,
) -> list[IndexedVideo]:
    encoder = VideoEncoder(FakeRuntime(bundle.manifest))
    model = archive_model(bundle, encoder, GRID, static_cosine=static_cosine)
    with ArchiveWriter.open(archive, model) as writer:
        return list(
            index_videos(
                encoder, writer, videos, GRID, thumbnails=thumbnails, num_workers=num_workers
            )
        )


def stored(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Intervals and embeddings by the name of the video."""
    with ArchiveReader.open(archive) as reader:
        snapshot = reader.snapshot()
    table = np.concatenate([np.asarray(each) for each in snapshot.shards])
    return {
        Path(path).name: (snapshot.intervals[a : a + n], table[a : a + n])
        for path, a, n in zip(snapshot.paths, snapshot.first, snapshot.count, strict=True)
    }


def by_timeline(bundle: Bundle, video: Path) -> tuple[np.ndarray, np.ndarray]:
    """The windows of one video alone, as a timeline makes them."""
    runtime = FakeRuntime(bundle.manifest)
    with VideoReader(video) as reader:
        grid = FileGrid.of(reader, GRID)
        parts = list(encode_file(runtime, reader, video, grid, WindowBuilder(grid.grid)))
    windows = [window for part in parts for window in part.work.windows]
    spans = np.array([(window.start_seconds, window.end_seconds) for window in windows])
    return spans, np.concatenate([part.embeddings for part in parts])


@pytest.mark.parametrize("frames_ahead", [0, 256])  # each video in parts, and as a whole
def test_windows_are_those_of_a_timeline(
    bundle: Bundle,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    frames_ahead: int,
) -> None:
    monkeypatch.setattr(indexing, "_FRAMES_AHEAD", frames_ahead)
    videos = [folder / f"{name}.mp4" for name in ("long", "none", "middle", "short")]
    outcomes = run(bundle, videos, tmp_path / "a")
    assert [Path(each.video.path).name for each in outcomes] == [path.name for path in videos]
    assert [each.video.num_windows for each in outcomes] == [13, 0, 5, 1]
    assert "is not a video" in (outcomes[1].video.error or "")
    found = stored(tmp_path / "a")
    assert list(found) == ["long.mp4", "middle.mp4", "short.mp4"]
    for name, (spans, embeddings) in found.items():
        expected_spans, expected = by_timeline(bundle, folder / name)
        np.testing.assert_allclose(spans, expected_spans)
        np.testing.assert_allclose(embeddings, expected, atol=6e-4)  # float16


def test_what_does_not_change_is_stored_once(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    videos = [folder / "still.mkv", folder / "long.mp4"]
    outcomes = run(bundle, videos, tmp_path / "a", static_cosine=0.9999)
    assert [each.num_windows for each in outcomes] == [13, 13]
    spans, _ = stored(tmp_path / "a")["still.mkv"]
    np.testing.assert_allclose(spans, [[0, 4]])
    assert len(stored(tmp_path / "a")["long.mp4"][0]) == 13


def test_thumbnails_show_the_middle_of_their_windows(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    run(bundle, [folder / "middle.mp4"], tmp_path / "a", thumbnails=True)
    with ArchiveReader.open(tmp_path / "a") as reader:
        pictures = [reader.thumbnail(str(folder / "middle.mp4"), window) for window in range(5)]
    assert all(picture is not None and picture[:2] == b"\xff\xd8" for picture in pictures)
    assert len(set(pictures)) == 5


def test_what_changed_is_done_again_and_the_rest_is_not(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    videos = sorted(mine.iterdir())
    run(bundle, videos, tmp_path / "a")

    def todo(**options: bool) -> list[str]:
        with ArchiveReader.open(tmp_path / "a") as reader:
            changed, num_same = what_changed(reader.videos(), videos, **options)
        assert len(changed) + num_same == len(videos)
        return [path.name for path in changed]

    assert todo() == []
    assert todo(retry_failed=True) == ["none.mp4"]
    os.utime(mine / "short.mp4", (1, 1))
    (mine / "new.mp4").write_bytes((mine / "middle.mp4").read_bytes())
    videos.append(mine / "new.mp4")
    assert todo() == ["short.mp4", "new.mp4"]
    (mine / "long.mp4").unlink()
    assert todo() == ["long.mp4", "short.mp4", "new.mp4"]


def test_a_run_that_was_stopped_leaves_whole_videos_and_goes_on(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    encoder = VideoEncoder(FakeRuntime(bundle.manifest))
    model = archive_model(bundle, encoder, GRID, static_cosine=NO_STATIC_COSINE)
    videos = [folder / f"{name}.mp4" for name in ("long", "middle", "short")]
    with ArchiveWriter.open(tmp_path / "a", model) as writer:
        run_of_it = index_videos(encoder, writer, videos, GRID, num_workers=2)
        next(run_of_it)
        run_of_it.close()
    assert list(stored(tmp_path / "a")) == ["long.mp4"]
    with ArchiveReader.open(tmp_path / "a") as reader:
        rest, _ = what_changed(reader.videos(), videos)
    run(bundle, rest, tmp_path / "a")
    assert list(stored(tmp_path / "a")) == ["long.mp4", "middle.mp4", "short.mp4"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cam1_20261130_181500.mp4", (2026, 11, 30, 18, 15, 0)),
        ("2026-11-30T18-15-07.mkv", (2026, 11, 30, 18, 15, 7)),
        ("20261130181500-main.mp4", (2026, 11, 30, 18, 15, 0)),
        ("door 2026.11.30 18.15.00.avi", (2026, 11, 30, 18, 15, 0)),
        ("20260231_101010.mp4", None),  # no such day
        ("120261130_181500.mp4", None),  # part of a longer number
        ("holiday.mp4", None),
        ("1080p_30.mp4", None),
    ],
)
def test_the_name_says_when_it_was_recorded(name: str, expected: tuple[int, ...] | None) -> None:
    found = recording_time(Path("/cam") / name)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert tuple(time.localtime(found))[:6] == expected


def test_the_verbs_go_from_videos_to_moments(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "cam1"
    shutil.copytree(folder, mine)
    runner, archive = CliRunner(), str(tmp_path / "archive")
    command = ["index", str(tiny_bundle), str(mine), "-o", archive, "--window", "1"]
    command += ["--runtime", "onnxruntime", "--thumbnails"]
    first = runner.invoke(app, command)
    assert first.exit_code == 3, first.output
    assert "4 videos added, 0 unchanged, 1 failed" in first.stdout
    again = runner.invoke(app, [*command, "--json"])
    assert again.exit_code == 0
    assert '"num_unchanged": 5' in again.stdout
    (mine / "middle.mp4").unlink()
    gone = runner.invoke(app, command)
    assert "0 videos added, 4 unchanged, 1 removed" in gone.stdout

    found = runner.invoke(app, ["search", archive, "a dog", "--top", "3", "--not", "a cat"])
    assert found.exit_code == 0, found.output
    assert "moments among" in found.stdout
    like = f"{mine / 'long.mp4'}@2"
    table = runner.invoke(app, ["search", archive, "--like", like, "--csv", "--top", "1"])
    header, row = table.stdout.splitlines()
    assert header.startswith("rank,video,folder,start_seconds,end_seconds")
    assert row.startswith(f"1,{mine / 'long.mp4'},cam1,")
    page = tmp_path / "found.html"
    runner.invoke(app, ["search", archive, "--like", like, "--html", str(page)])
    assert "data:image/jpeg" in page.read_text()


@pytest.mark.parametrize("has_faiss", [True, False])
def test_a_large_archive_gets_an_index_for_approximate_search(
    tiny_bundle: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_faiss: bool,
) -> None:
    if has_faiss and importlib.util.find_spec("faiss") is None:
        pytest.skip("needs the extra `faiss`")
    if not has_faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)
        monkeypatch.delitem(sys.modules, "actionclip_deploy.nearest", raising=False)
    monkeypatch.setattr("actionclip_deploy.cli.index.APPROXIMATE_WINDOWS", 5)
    command = ["index", str(tiny_bundle), str(folder / "long.mp4"), "--window", "1"]
    command += ["-o", str(tmp_path / "a"), "--runtime", "onnxruntime"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = "Building the index of" if has_faiss else "score all windows. Approximate search needs"
    assert told in " ".join(result.output.split())
    assert (tmp_path / "a" / "nearest").is_dir() == has_faiss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a TEXT to look for, or --like"),
        (["a", "--like", "b@1"], "Give a TEXT to look for, or --like"),
        (["--like", "b"], "--like is b; give VIDEO@SECONDS"),
        (["--like", "b@soon"], "--like is b@soon; give VIDEO@SECONDS"),
        (["--like", "b@1", "--from", "yesterday"], "--from is yesterday; give a date such as"),
        (["a", "--json", "--csv"], "--json and --csv were given"),
        (["a", "--html", "page.pdf"], "--html is page.pdf; give a file that ends in .html"),
    ],
)
def test_wrong_usage_of_search_is_told(
    bundle: Bundle, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    run(bundle, [folder / "short.mp4"], tmp_path / "a")
    result = CliRunner().invoke(app, ["search", str(tmp_path / "a"), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
