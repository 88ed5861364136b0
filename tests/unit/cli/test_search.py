"""`actionclip search`: the best moment in the player that is there."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from actionclip_deploy.archive import ArchivedVideo, ArchiveModel, ArchiveWriter
from actionclip_deploy.cli import app
from actionclip_deploy.search import Archive

DIM = 16


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two videos whose windows of 4 s differ; the files are there, and hold nothing."""
    model = ArchiveModel("gone", "v" * 64, "t" * 64, DIM, 4.0, 4.0, "onnxruntime", 2.0)
    rows = np.random.default_rng(0).standard_normal((20, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    starts = 4.0 * np.arange(10)
    with ArchiveWriter.open(tmp_path / "archive", model) as writer:
        for number, name in enumerate(("yard.mp4", "-odd name.mp4")):
            path = tmp_path / "cam" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
            video = ArchivedVideo(str(path), "cam", 0, 1, None, 40.0)
            spans = np.stack([starts, starts + 4], axis=1)
            writer.put(video, spans, rows[10 * number : 10 * number + 10])
    return tmp_path / "archive"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH; there is a display."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def add_program(folder: Path, name: str, code: int = 0) -> Path:
    """A program that writes what it was called with, a line for each, and talks meanwhile."""
    said = folder / f"{name}.txt"
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"pathlib.Path({str(said)!r}).write_text('\\n'.join(sys.argv[1:]))\n"
        f"print('playing')\nsys.exit({code})\n"
    )
    program.chmod(0o755)
    return said


def search(archive: Path, *words: object) -> Result:
    command = ["search", archive, "--like", "yard.mp4@10", "--top", 2, *words]
    return CliRunner().invoke(app, [str(word) for word in command])


def said_in(result: Result) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mpv", ["--start=8.00", "--", "{video}"]),
        ("vlc", ["--start-time=8.00", "--play-and-exit", "{video}"]),
        ("ffplay", ["-loglevel", "error", "-ss", "8.00", "-autoexit", "{video}"]),
    ],
)
def test_the_best_moment_is_played_from_its_start(
    archive: Path, programs: Path, name: str, expected: list[str]
) -> None:
    said = add_program(programs, name)
    result = search(archive, "--play", 1)
    assert result.exit_code == 0, result.output
    video = str(archive.parent / "cam" / "yard.mp4")
    assert said.read_text().splitlines() == [each.format(video=video) for each in expected]
    assert "2 moments among 20 windows" in result.stdout


def test_the_moment_of_a_rank_is_played_by_the_first_player_there_is(
    archive: Path, programs: Path
) -> None:
    add_program(programs, "ffplay")
    said = add_program(programs, "mpv")
    result = search(archive, "--play", 2, "--video", "-odd name.mp4", "--json")
    assert result.exit_code == 0, result.output
    assert said.read_text().endswith("\n--\n" + str(archive.parent / "cam" / "-odd name.mp4"))
    assert not (programs / "ffplay.txt").exists()


def test_without_a_player_a_page_of_the_moment_is_opened(archive: Path, programs: Path) -> None:
    said = add_program(programs, "xdg-open")
    result = search(archive, "--play", 1)
    assert result.exit_code == 0, result.output
    page = Path(said.read_text()).read_text()
    assert page.count("<video") == 1
    assert "yard.mp4#t=8.00" in page
    mine = archive.parent / "mine.html"
    search(archive, "--play", 1, "--html", mine)
    assert said.read_text() == str(mine)


def test_that_nothing_plays_is_told_before_the_search(
    archive: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = search(archive, "--play", 1)
    assert result.exit_code == 1
    assert "none of mpv, vlc and ffplay is on the PATH" in said_in(result)
    assert "moments among" not in result.output
    if sys.platform != "darwin":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        add_program(programs, "mpv")
        result = search(archive, "--play", 1)
        assert "There is no display to play on" in said_in(result)
        assert "--html" in said_in(result)


def test_what_keeps_a_moment_from_being_played_is_told(archive: Path, programs: Path) -> None:
    add_program(programs, "mpv", code=2)
    assert "mpv could not show" in said_in(search(archive, "--play", 1))
    beyond = search(archive, "--play", 99, "--top", 100)
    assert re.search(r"--play is 99, and \d+ moments were found; give a rank", said_in(beyond))
    (archive.parent / "cam" / "yard.mp4").unlink()
    result = search(archive, "--play", 1)
    assert result.exit_code == 1
    assert "yard.mp4 is not there any more" in said_in(result)


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """A video of 40 s that was recorded at the end of a day of local time, another next day."""
    model = ArchiveModel("gone", "v" * 64, "t" * 64, DIM, 4.0, 4.0, "onnxruntime", 2.0)
    rows = np.random.default_rng(0).standard_normal((20, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    starts = 4.0 * np.arange(10)
    spans = np.stack([starts, starts + 4], axis=1)
    with ArchiveWriter.open(tmp_path / "dated", model) as writer:
        for number, when in enumerate((datetime(2026, 11, 30, 23), datetime(2026, 12, 1, 1))):
            video = ArchivedVideo(f"/cam/{number}.mp4", "cam", 0, 1, when.timestamp(), 40.0)
            writer.put(video, spans, rows[10 * number : 10 * number + 10])
    return tmp_path / "dated"


def found_in(archive: Path, *words: object) -> set[str]:
    command = ["search", archive, "--like", "0.mp4@10", "--json", *words]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return {Path(each["video"]).name for each in json.loads(result.stdout)["moments"]}


@pytest.mark.parametrize(
    ("words", "videos"),
    [
        (["--from", "2026-11-30", "--to", "2026-11-30"], {"0.mp4"}),
        (["--to", "2026-11-30"], {"0.mp4"}),
        (["--to", "2026-11-30T00:00"], set()),
        (["--to", "2026-12-01T00:30"], {"0.mp4"}),
        (["--from", "2026-12-01"], {"1.mp4"}),
        (["--from", "2026-11-30", "--to", "2026-12-01"], {"0.mp4", "1.mp4"}),
    ],
)
def test_a_date_alone_is_a_whole_day(dated: Path, words: list[str], videos: set[str]) -> None:
    assert found_in(dated, *words) == videos


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--camera", "nosuch"], "--camera names 'nosuch', which is no camera of"),
        (["--camera", "nosuch"], "(it has: cam)"),
        (["--video", "nosuch.mp4"], "--video names 'nosuch.mp4', and the archive"),
        (["--like", "0.mp4@9999"], "has no window at 9999 s; give a time within 0 and 40 s"),
        (["--like", "0.mp4@-1"], "has no window at -1 s"),
        (["--like", "nosuch.mp4@1"], "has no video with windows called nosuch.mp4"),
        (
            ["--from", "2026-12-01", "--to", "2026-11-30"],
            "--from is 2026-12-01, which is later than --to, 2026-11-30",
        ),
        (["--to", "9999-12-31"], "--to is 9999-12-31; give a date such as"),
    ],
)
def test_what_cannot_be_found_is_wrong_usage(dated: Path, words: list[str], message: str) -> None:
    like = [] if "--like" in words else ["--like", "0.mp4@10"]
    result = CliRunner().invoke(app, ["search", str(dated), *like, *words])
    assert result.exit_code == 2, result.output
    assert message in said_in(result)


def test_no_index_is_built_that_is_not_used(dated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr(Archive, "prepare_approximate", lambda *_: built.append(1))
    result = CliRunner().invoke(
        app, ["search", str(dated), "--like", "0.mp4@10", "--approximate", "--camera", "cam"]
    )
    assert result.exit_code == 0, result.output
    assert "All windows are scored, and no index is used" in said_in(result)
    assert built == []


def test_a_rank_beyond_what_is_looked_for_is_told_before_the_display(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    result = search(archive, "--play", 99)
    assert result.exit_code == 2
    assert "--play is 99, and --top lets 2 moments be found" in said_in(result)


@pytest.mark.parametrize("columns", ["80", "300"])
def test_a_path_is_never_broken(
    archive: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    folder = archive.parent / ("a long name of a folder " * 4).strip()
    folder.mkdir()
    model = ArchiveModel("gone", "v" * 64, "t" * 64, DIM, 4.0, 4.0, "onnxruntime", 2.0)
    with ArchiveWriter.open(archive.parent / "long", model) as writer:
        video = ArchivedVideo(str(folder / "a.mp4"), folder.name, 0, 1, None, 4.0)
        row = np.eye(1, DIM, dtype=np.float32)
        writer.put(video, np.array([[0.0, 4.0], [4.0, 8.0]]), np.concatenate([row, -row]))
    command = ["search", str(archive.parent / "long"), "--like", "a.mp4@1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert str(folder / "a.mp4") in result.stdout
    assert ("│" in result.stdout) == (columns == "300")
