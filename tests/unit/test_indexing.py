"""Videos into archives: their windows as `predict --timeline` sees them, each video once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from rendering import moving_pictures, render
from typer.testing import CliRunner

from actionclip_deploy import indexing
from actionclip_deploy.archive import ArchivedVideo, ArchiveReader, ArchiveWriter
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.command_records import ArchiveInspectionRecord
from actionclip_deploy.indexing import (
    NO_STATIC_COSINE,
    IndexedVideo,
    archive_model,
    camera_folder,
    index_videos,
    recording_time,
    what_changed,
    what_is_gone,
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
    model = archive_model(bundle, "fake", GRID, static_cosine=static_cosine)
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
            changes = what_changed(reader.videos(), videos, **options)
        num_failed = len(changes.failed_before)
        assert len(changes.todo) + changes.num_same + num_failed == len(videos)
        return [path.name for path in changes.todo]

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
    model = archive_model(bundle, "fake", GRID, static_cosine=NO_STATIC_COSINE)
    videos = [folder / f"{name}.mp4" for name in ("long", "middle", "short")]
    with ArchiveWriter.open(tmp_path / "a", model) as writer:
        run_of_it = index_videos(encoder, writer, videos, GRID, num_workers=2)
        next(run_of_it)
        run_of_it.close()
    assert list(stored(tmp_path / "a")) == ["long.mp4"]
    with ArchiveReader.open(tmp_path / "a") as reader:
        rest = what_changed(reader.videos(), videos).todo
    run(bundle, rest, tmp_path / "a")
    assert list(stored(tmp_path / "a")) == ["long.mp4", "middle.mp4", "short.mp4"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cam1_20261130_181500.mp4", (2026, 11, 30, 18, 15, 0)),
        ("2026-11-30T18-15-07.mkv", (2026, 11, 30, 18, 15, 7)),
        ("20261130181500-main.mp4", (2026, 11, 30, 18, 15, 0)),
        ("door 2026.11.30 18.15.00.avi", (2026, 11, 30, 18, 15, 0)),
        ("VID_20261130_181700123.mp4", (2026, 11, 30, 18, 17, 0.123)),
        ("PXL_20261130_181700123.LS.mp4", (2026, 11, 30, 18, 17, 0.123)),
        ("door_20261130181800456.mp4", (2026, 11, 30, 18, 18, 0.456)),
        ("2026-11-30T18-15-00.250.mkv", (2026, 11, 30, 18, 15, 0.25)),
        ("20261130_181500-0001.mp4", (2026, 11, 30, 18, 15, 0)),  # a part, and no zone
        ("20261130_181500-0100.mp4", (2026, 11, 30, 18, 15, 0)),
        ("20261130_181500_2.mp4", (2026, 11, 30, 18, 15, 0)),
        ("2026-11-30/18-15-00.mp4", (2026, 11, 30, 18, 15, 0)),
        ("20261130/181500.mp4", (2026, 11, 30, 18, 15, 0)),
        ("2026-11-30/18-15-00-main.mp4", (2026, 11, 30, 18, 15, 0)),
        ("2026-11-30/481516.mp4", None),
        ("18-15-00.mp4", None),  # of which day?
        ("20260231_101010.mp4", None),  # no such day
        ("120261130_181500.mp4", None),  # part of a longer number
        ("holiday.mp4", None),
        ("1080p_30.mp4", None),
    ],
)
def test_the_name_says_when_it_was_recorded(name: str, expected: tuple[float, ...] | None) -> None:
    found = recording_time(Path("/cam") / name)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        *minute, second = expected
        assert list(time.localtime(found))[:5] == minute
        assert found % 60 == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("20261130T181500Z.mp4", "2026-11-30T18:15:00+00:00"),
        ("door_20261130_181500Z_hd.mp4", "2026-11-30T18:15:00+00:00"),
        ("20261130T181500.250Z.mp4", "2026-11-30T18:15:00.250+00:00"),
        ("2026-11-30T18-15-00+0000.mp4", "2026-11-30T18:15:00+00:00"),
        ("2026-11-30T18-15-00+05:45.mp4", "2026-11-30T18:15:00+05:45"),
        ("2026-11-30T18-15-00-0530.mp4", "2026-11-30T18:15:00-05:30"),
        ("2026-11-30/18-15-00Z.mp4", "2026-11-30T18:15:00+00:00"),
    ],
)
def test_a_zone_in_the_name_is_honoured(name: str, expected: str) -> None:
    found = recording_time(Path("/cam") / name)
    assert found == pytest.approx(datetime.fromisoformat(expected).timestamp())


@pytest.mark.parametrize("day", ["2026-11-30", "20261130", "2026_11_30"])
def test_the_camera_of_a_video_is_the_folder_above_that_of_a_day(day: str) -> None:
    assert camera_folder(Path("/recordings/yard") / day / "18-15-00.mp4") == "yard"
    assert camera_folder(Path(f"/recordings/yard{day}/18-15-00.mp4")) == f"yard{day}"
    assert camera_folder(Path("/recordings/yard/18-15-00.mp4")) == "yard"


def test_videos_of_a_folder_that_is_gone_or_empty_are_told_apart(tmp_path: Path) -> None:
    names = ("yard/1.mp4", "yard/2.mp4", "door/1.mp4", "hall/1.mp4", "top.mp4")
    known = {str(tmp_path / name): ArchivedVideo(str(tmp_path / name), "", 1, 1) for name in names}
    (tmp_path / "yard").mkdir()
    (tmp_path / "yard/2.mp4").touch()
    (tmp_path / "door").mkdir()  # and nothing in it, as where a disk was mounted

    def told(*, recursive: bool) -> list[list[str]]:
        found = what_is_gone(known, [tmp_path], recursive=recursive)
        return [[str(Path(each).relative_to(tmp_path)) for each in part] for part in found]

    assert told(recursive=True) == [["yard/1.mp4", "top.mp4"], ["door/1.mp4", "hall/1.mp4"]]
    assert told(recursive=False) == [["top.mp4"], []]


def test_videos_on_a_disk_that_is_not_mounted_stay(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("yard", "door"):
        (tmp_path / "all" / name).mkdir(parents=True)
        shutil.copy(folder / "short.mp4", tmp_path / "all" / name)
    command = ["index", str(tiny_bundle), str(tmp_path / "all"), "-o", str(tmp_path / "a")]
    command += ["--recursive", "--runtime", "onnxruntime", "--window", "1"]
    runner = CliRunner()
    assert runner.invoke(app, command).exit_code == 0
    shutil.rmtree(tmp_path / "all/yard")
    result = runner.invoke(app, command)
    assert "0 videos added, 1 unchanged;" in result.stdout
    assert "has 2 windows" in result.stdout
    told = " ".join(result.output.split())
    assert f"gone or empty (1 video of {tmp_path / 'all/yard'})" in told
    assert "add --remove-gone-folders" in told
    assert "The time of recording is unknown of 2 videos" in told
    assert json.loads(runner.invoke(app, [*command, "--json"]).stdout)["num_kept"] == 1
    result = runner.invoke(app, [*command, "--remove-gone-folders"])
    assert "0 videos added, 1 unchanged, 1 removed;" in result.stdout
    assert "has 1 window of" in result.stdout


def test_nothing_is_made_where_no_video_is(tiny_bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a"
    for given in (["nosuch"], ["nosuch", "neither.mp4"]):
        command = ["index", str(tiny_bundle), *given, "-o", str(archive)]
        result = CliRunner().invoke(app, [*command, "--runtime", "onnxruntime"])
        assert result.exit_code == 2
        assert "there; give video files" in " ".join(result.output.replace("│", " ").split())
        assert not archive.exists()


def test_videos_of_lost_vectors_are_done_again(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "a"
    videos = [str(folder / "short.mp4"), str(folder / "middle.mp4")]
    command = ["index", str(tiny_bundle), "-o", str(archive), "--runtime", "onnxruntime"]
    command += ["--window", "1"]
    runner = CliRunner()
    assert runner.invoke(app, [*command, *videos]).exit_code == 0
    before = stored(archive)
    (archive / "vectors/0.f16").unlink()
    result = runner.invoke(app, [*command, videos[0]])
    assert result.exit_code == 0
    assert "1 video added, 0 unchanged;" in result.stdout
    told = " ".join(result.output.split())
    assert "2 videos of" in told
    assert "those that are not given (1) are noted as failed" in told
    result = runner.invoke(app, [*command, *videos])
    assert "1 video added, 1 unchanged;" in result.stdout
    for name, (spans, embeddings) in stored(archive).items():
        np.testing.assert_allclose(spans, before[name][0])
        np.testing.assert_allclose(embeddings, before[name][1], atol=1e-3)


def test_pictures_that_are_not_kept_afterwards_are_told(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    command = ["index", str(tiny_bundle), str(folder / "short.mp4"), "-o", str(tmp_path / "a")]
    command += ["--runtime", "onnxruntime", "--window", "1"]
    runner = CliRunner()
    assert runner.invoke(app, command).exit_code == 0
    told = " ".join(runner.invoke(app, [*command, "--thumbnails"]).output.split())
    assert "Of 1 video that" in told
    assert "has already no pictures were kept" in told


def test_inspect_tells_what_an_archive_holds(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "yard"
    mine.mkdir()
    shutil.copy(folder / "middle.mp4", mine / "20261130_181500.mp4")
    shutil.copy(folder / "short.mp4", mine)
    shutil.copy(folder / "none.mp4", mine)
    archive = str(tmp_path / "archive")
    command = ["index", str(tiny_bundle), str(mine), "-o", archive, "--window", "1"]
    runner = CliRunner()
    assert runner.invoke(app, [*command, "--runtime", "onnxruntime"]).exit_code == 3
    told = json.loads(runner.invoke(app, ["inspect", archive, "--json"]).stdout)
    ArchiveInspectionRecord.model_validate(told)
    begin = datetime(2026, 11, 30, 18, 15).timestamp()
    about, model = told["archive"], told["model"]
    assert (about["num_videos"], about["cameras"][0]["name"]) == (2, "yard")
    assert about["hours"] == pytest.approx(2.2 / 3600, rel=0.02)
    assert about["first_seconds"] == begin
    assert about["last_seconds"] == pytest.approx(begin + 2, abs=0.05)
    assert (told["num_undated"], told["num_failed"]) == (1, 1)
    assert told["failed"][0]["video"] == str(mine / "none.mp4")
    assert (model["bundle"], model["window_seconds"]) == (str(tiny_bundle), 1.0)
    assert model["region"] == "frame"
    shown = runner.invoke(app, ["inspect", archive])
    assert shown.exit_code == 0
    assert "2026-11-30 18:15:00" in shown.stdout
    assert "is not a video" in " ".join(shown.stdout.replace("│", " ").split())
    wrong = runner.invoke(app, ["inspect", archive, "--runtime", "openvino"])
    assert wrong.exit_code == 2


def test_another_way_to_resize_is_refused(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    command = ["index", str(tiny_bundle), str(folder / "short.mp4"), "-o", str(tmp_path / "a")]
    command += ["--runtime", "onnxruntime"]
    runner = CliRunner()
    assert runner.invoke(app, command).exit_code == 0
    result = runner.invoke(app, [*command, "--resize", "crop"])
    assert result.exit_code == 1
    assert "read with --resize frame, and it is crop" in " ".join(result.output.split())


def test_a_name_that_is_not_utf8_goes_all_the_way(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "k\udcfcche"
    mine.mkdir()
    name = mine / "caf\udce9_20261130_181500.mp4"
    shutil.copy(folder / "middle.mp4", name)
    runner, archive = CliRunner(), str(tmp_path / "archive")
    command = ["index", str(tiny_bundle), str(mine), "-o", archive, "--window", "1"]
    result = runner.invoke(app, [*command, "--runtime", "onnxruntime"])
    assert result.exit_code == 0, result.output
    search = ["search", archive, "--like", f"{name}@1", "--top", "1"]
    page = tmp_path / "found.html"
    table = runner.invoke(app, [*search, "--html", str(page)])
    assert table.exit_code == 0, table.output
    assert "1 moment among 3 windows" in table.stdout
    assert "caf%E9_20261130_181500.mp4#t=" in page.read_text()
    (moment,) = json.loads(runner.invoke(app, [*search, "--json"]).stdout_bytes)["moments"]
    assert moment["video"] == str(name)
    assert moment["video_bytes"] == quote(os.fsencode(name))
    _, row = runner.invoke(app, [*search, "--csv"]).stdout_bytes.decode().splitlines()
    assert "caf\\xe9_20261130_181500.mp4,k\\xfcche," in row


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
    assert again.exit_code == 3  # while one of the given videos has no windows
    told = json.loads(again.stdout)
    assert (told["num_added"], told["num_unchanged"], told["num_failed_before"]) == (0, 4, 1)
    assert told["failed_before"][0]["video"] == str(mine / "none.mp4")
    assert "is not a video" in told["failed_before"][0]["error"]
    retried = runner.invoke(app, [*command, "--retry-failed"])
    assert "0 videos added, 4 unchanged, 1 failed;" in retried.stdout
    (mine / "middle.mp4").unlink()
    gone = runner.invoke(app, command)
    assert (
        "0 videos added, 3 unchanged, 1 removed, 1 failed before (`actionclip inspect`"
        in gone.stdout
    )

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
