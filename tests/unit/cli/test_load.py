"""`actionclip load` against a server that listens; what it measured is not looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from full_disk import NO_ROOM, small_files
from threaded_server import ThreadedServer
from typer.testing import CliRunner

from actionclip_deploy.benchmarks.load import LoadReport, poisson_arrivals
from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank

LABELS = ["run", "walk", "sit"]
QUICK = ("--rates", "20,40", "--duration", "0.3")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    bundle = write_fake_bundle(folder / "for_banks")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="mine")
    with ThreadedServer(folder, banks=[bank], api_keys=("secret",)) as server:
        yield server.url


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "actionclip_deploy.benchmarks.load"
    monkeypatch.setattr(f"{module}._REST_SECONDS", 0.0)
    # The server's stand-in for a decoder takes long for large files.
    monkeypatch.setattr(f"{module}._FRAME_SHAPE", (8, 8, 3))


def run(*words: object, key: str = "secret") -> Result:
    env = {"COLUMNS": "160", "ACTIONCLIP_API_KEY": key}
    return CliRunner().invoke(app, ["load", *map(str, words)], env=env)


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("mode", ["video", "frames", "tensors", "embeddings"])
def test_every_mode_is_answered_and_counted(url: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"one")
    (tmp_path / "b.mp4").write_bytes(b"two")
    words: list[object] = ["--video", tmp_path] if mode == "video" else []
    result = run(url, "--mode", mode, *QUICK, "--seed", 3, "--json", *words)
    assert result.exit_code == 0, result.output
    report = LoadReport.model_validate(json.loads(result.stdout))
    for rate, measured in zip((20.0, 40.0), report.open_loop, strict=True):
        assert measured.offered_per_second == rate
        assert measured.num_sent == len(poisson_arrivals(rate, 0.3, (3, int(rate * 1000))))
        assert measured.num_answered == measured.num_sent
        assert measured.errors == {}
        assert measured.num_wrong == 0
        assert measured.latency_ms is not None
        tells_batches = mode in ("video", "frames")
        assert (measured.mean_batch_size is not None) == tells_batches
    assert report.closed_loop is None
    assert report.settings.num_bodies == (2 if mode == "video" else 8)
    assert report.settings.labels == ("none" if mode == "tensors" else "mine")
    assert report.server["runtime"]["name"] == "fake"
    assert report.is_local


def test_a_table_a_report_and_a_picture_come_of_it(url: str, tmp_path: Path) -> None:
    words = (url, "--mode", "embeddings", *QUICK, "--clients", 2)
    files = ("--output", tmp_path / "l.json", "--plot", tmp_path / "l.png")
    result = run(*words, *files)
    assert result.exit_code == 0, result.output
    report = LoadReport.model_validate_json((tmp_path / "l.json").read_text(encoding="utf-8"))
    assert report.closed_loop is not None
    assert report.closed_loop.num_clients == 2
    rows = {line.split("  ")[0].strip(): line.split() for line in result.stdout.splitlines()}
    assert rows["20 /s"][2] == str(report.open_loop[0].num_sent)
    assert rows["2 clients"][2] == str(report.closed_loop.num_sent)
    assert "The server ran on this machine" in sentence(result)
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("option", "name"), [("--output", "l.json"), ("--plot", "l.png")])
def test_a_report_that_finds_no_room_leaves_nothing(
    url: str, option: str, name: str, tmp_path: Path
) -> None:
    words = (url, "--mode", "embeddings", "--rates", 20, "--duration", 0.3)
    with small_files(500):
        result = run(*words, option, tmp_path / name)
    assert result.exit_code == 1, result.output
    expected = f"error: {tmp_path / name} cannot be written (File too large); {NO_ROOM}"
    assert expected in sentence(result)
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_is_a_pipe_is_not_waited_for(url: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    result = run(url, "--video", tmp_path / "a.mp4", *QUICK)
    assert result.exit_code == 1
    assert "a.mp4 is a pipe, a socket or a device; give a video's file" in sentence(result)


def test_without_a_video_some_are_rendered(url: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("run\nwalk\n")
    words = (url, "--labels", labels, "--clients", 1, "--duration", 0.1, "--json")
    report = LoadReport.model_validate(json.loads(run(*words).stdout))
    assert report.settings.num_bodies == 4
    assert report.settings.labels == "2 labels"
    assert report.open_loop == ()
    assert report.closed_loop is not None
    assert report.closed_loop.num_answered == report.closed_loop.num_sent >= 1


def test_errors_are_counted_by_what_the_server_says(tmp_path: Path) -> None:
    with ThreadedServer(tmp_path, limits={"requests": 1}) as server:
        labels = tmp_path / "labels.txt"
        labels.write_text("run\nwalk\n")
        # Each takes so long that others arrive meanwhile, which the server refuses.
        server.service.pool.delay_seconds = 0.5
        video = tmp_path / "a.mp4"
        video.write_bytes(b"one")
        words = (server.url, "--video", video, "--labels", labels, "--rates", 100)
        result = run(*words, "--duration", 0.3)
    assert result.exit_code == 0, result.output
    assert " x 429 queue_full" in result.stdout


def test_the_schema_names_every_part_of_a_report() -> None:
    schema = json.loads(run("--schema").stdout)
    assert set(schema["properties"]) == set(LoadReport.model_fields)
    assert "p99" in schema["$defs"]["LatencyMs"]["properties"]


def test_what_the_server_refuses_is_told_before_the_measurement(url: str) -> None:
    result = run(url, "--labels", "other", "--mode", "embeddings", *QUICK)
    assert result.exit_code == 2
    assert "--labels is 'other', which is neither a label bank of the server" in sentence(result)
    result = run(url, *QUICK, key="wrong")
    assert result.exit_code == 1
    assert "The request has no key of this server" in sentence(result)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("server",), "give one such as http://"),
        (("http://x", "--mode", "text"), "choose from video, frames, tensors, embedd"),
        (("http://x", "--rates", "1,fast"), "give numbers, as in 5,10,20"),
        (("http://x", "--rates", "0"), "each must be above 0"),
        (("http://x", "--duration", "0"), "--duration is 0.0"),
        (("http://x", "--duration", "1e12"), "must be positive, and 86,400 at most"),
        (("http://x", "--output", "nowhere/l.json"), "in a folder that exists"),
        (("http://x", "--plot", "l.txt"), "give a file that ends in"),
        (("http://x", "--html", "l.html"), "No such option: --html"),
        (("bundle", "http://x"), "unexpected extra argument"),
        (("http://x", "--batch", "1", "--rounds", "9"), "No such option: --batch"),
        ((), "Missing argument 'URL'"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(words: tuple[Any, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in sentence(result)
