"""`actionclip classify` against a server that listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from fakes import TEMPLATES, FakeRuntime, fake_manifest, write_fake_bundle
from threaded_server import ThreadedServer
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.scoring import score_clips
from actionclip_deploy.serve.app import listen

LABELS = ["run", "walk", "sit"]


def make_bank(folder: Path, name: str = "mine") -> LabelBank:
    bundle = write_fake_bundle(folder / "for_banks")
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name=name)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    limits = {"body_bytes": 100_000}
    with ThreadedServer(folder, banks=[make_bank(folder)], limits=limits) as server:
        yield server.url


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("b.mp4", "a.mp4", "c.mp4")]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def run(*words: object, **env: str) -> Result:
    return CliRunner().invoke(app, ["classify", *map(str, words)], env={"COLUMNS": "100", **env})


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code in (0, 3), result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def expected_scores(folder: Path, video: bytes) -> np.ndarray:
    """What the stand-ins for decoder and runtime make of a file with these bytes."""
    pixels = np.random.default_rng(list(video)).integers(0, 256, (4, 32, 32, 3), np.uint8)
    embedding = FakeRuntime(fake_manifest()).encode_video(pixels[np.newaxis])
    return score_clips(embedding, make_bank(folder).embeddings)[0]


def test_videos_are_scored_in_their_order(url: str, videos: list[Path], tmp_path: Path) -> None:
    told = lines(run(*videos, "--url", url, "--json"))
    assert [line["video"] for line in told] == [str(video) for video in videos]
    for line, video in zip(told, videos, strict=True):
        given = {each["label"]: each["score"] for each in line["predictions"]}
        expected = expected_scores(tmp_path, video.name.encode())
        np.testing.assert_allclose([given[label] for label in LABELS], expected, atol=1e-5)
        assert line["bank"]["name"] == "mine"
        assert line["runtime"]["name"] == "fake"
        assert line["frames"]["indices"] == [[2, 7, 12, 17]]
        assert line["request_id"]


def test_a_table_shows_the_best_labels(url: str, videos: list[Path]) -> None:
    best = lines(run(videos[0], "--url", url, "--json"))[0]["predictions"]
    result = run(*videos, "--url", url, "--labels", "mine", "--top-k", 2)
    assert result.exit_code == 0, result.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in result.stdout.splitlines()
        if line.startswith("│")
    ]
    assert len(rows) == 6
    assert rows[0] == ["b.mp4", best[0]["label"], f"{best[0]['score']:.4f}"]
    assert rows[1] == ["", best[1]["label"], f"{best[1]['score']:.4f}"]
    assert result.stderr == ""


def test_labels_come_from_a_bank_a_file_or_the_command(
    url: str, videos: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("run\nwalk\nsit\n")
    one_by_one = [word for label in LABELS for word in ("--label", label)]
    choices: list[list[object]] = [["--labels", "mine"], ["--labels", file], one_by_one]
    told = [lines(run(videos[0], "--url", url, "--json", *words))[0] for words in choices]
    assert [line["bank"]["name"] for line in told] == ["mine", None, None]
    for line in told:
        assert [each["label"] for each in line["predictions"]] == [
            each["label"] for each in told[0]["predictions"]
        ]


def test_templates_views_and_independent_scores_are_passed_on(url: str, videos: list[Path]) -> None:
    words = ("--views", "2x1", "--template", TEMPLATES[1], "--multi-label")
    (line,) = lines(run(videos[0], "--url", url, "--json", *words))
    assert line["frames"]["num_clips"] == 2
    assert line["bank"]["num_templates"] == 1
    assert line["method"] == "independent"


def test_frames_and_embeddings_are_sent_as_arrays(url: str, tmp_path: Path) -> None:
    np.save(tmp_path / "embedded.npy", np.eye(2, 16, dtype=np.float32))
    np.save(tmp_path / "frames.npy", np.zeros((4, 8, 8, 3), np.uint8))
    files = (tmp_path / "embedded.npy", tmp_path / "frames.npy")
    embedded, frames = lines(run(*files, "--url", url, "--json"))
    assert embedded["frames"] is None
    assert frames["frames"] is not None


def test_a_video_that_fails_is_told_in_its_place_and_the_others_go_on(
    url: str, videos: list[Path], tmp_path: Path
) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(200_000))
    files = (videos[0], large, tmp_path / "missing.mp4", videos[1])
    result = run(*files, "--url", url, "--json")
    assert result.exit_code == 3
    first, refused, missing, last = lines(result)
    assert first["predictions"]
    assert last["predictions"]
    assert (refused["error"]["status"], refused["error"]["code"]) == (413, "body_too_large")
    assert refused["request_id"]
    assert "missing.mp4 cannot be read" in missing["error"]["message"]
    assert missing["error"]["status"] is None
    assert "large.mp4: The body has more than 100,000 bytes" in sentence(result)
    table = run(*files, "--url", url)
    assert table.exit_code == 3
    assert table.stdout.count("failed") == 2


def test_what_concerns_every_video_ends_the_run(url: str, videos: list[Path]) -> None:
    result = run(*videos, "--url", url, "--labels", "other")
    assert result.exit_code == 2
    assert "--labels is 'other', which is neither a label bank of the server (it has: mine)" in (
        sentence(result)
    )
    assert result.stdout == ""


def test_a_server_that_is_not_there_is_one_sentence(videos: list[Path]) -> None:
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    listening.close()
    words = ("--url", f"http://127.0.0.1:{port}", "--labels", "mine", "--timeout", 0.5)
    result = run(videos[0], *words)
    assert result.exit_code == 1
    assert "cannot be reached" in sentence(result)
    assert "actionclip serve" in sentence(result)


def test_a_key_comes_from_a_file_or_the_environment(videos: list[Path], tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text("secret\n")
    banks = [make_bank(tmp_path), make_bank(tmp_path, "second")]
    with ThreadedServer(tmp_path, banks=banks, api_keys=("secret",)) as server:
        words = (videos[0], "--url", server.url, "--labels", "mine")
        assert run(*words, "--api-keys", key).exit_code == 0
        assert run(*words, ACTIONCLIP_API_KEY="secret").exit_code == 0
        without = run(*words)
        assert without.exit_code == 1
        assert "The request has no key of this server" in sentence(without)
        several = run(videos[0], "--url", server.url, "--api-keys", key)
        assert several.exit_code == 2
        assert (
            "--labels is missing, and the server has the label banks mine, second; choose"
            in sentence(several)
        )


def test_neither_pytorch_nor_a_runtime_is_needed(url: str, videos: list[Path]) -> None:
    blocked = "import sys; sys.modules.update(torch=None, onnxruntime=None, fastapi=None)"
    program = f"{blocked}; from actionclip_deploy.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "classify", videos[0], "--url", url, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "localhost:8000"), "give one such as http://127.0.0.1:8000"),
        (("--url", "http://x", "--labels", "a", "--label", "b"), "give one of them"),
        (("--url", "http://x", "--labels", "none.csv"), "which is not a file"),
        (("--url", "http://x", "--labels", "none/bank"), "which is not a file"),
        (("--url", "http://x", "--views", "2x2"), "2x2"),
        (("--url", "http://x", "--api-keys", "EMPTY"), "holds no key; write one on each line"),
        (
            ("--url", "http://x", "--api-keys", "none"),
            "cannot be read (No such file or directory)",
        ),
        (("--url", "http://x", "--api-keys", "WIDE"), "is UTF-16LE, and not UTF-8"),
        (("--url", "http://x", "--label", "caf\u00e9", "--label", "cafe\u0301"), "label 2"),
        ((), "--url"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(
    videos: list[Path], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "wide").write_bytes("secret\r\n".encode("utf-16"))
    files = {"EMPTY": str(tmp_path / "empty"), "WIDE": str(tmp_path / "wide")}
    result = run(videos[0], *(files.get(word, word) for word in words))
    assert result.exit_code == 2
    assert message in sentence(result)


@pytest.mark.parametrize("name", ["a.mp4", "a.npy"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    words = (tmp_path / name, "--url", "http://127.0.0.1:9", "--label", "a", "--json")
    result = run(*words)
    assert result.exit_code == 3
    assert "is a pipe, a socket or a device; give a file" in sentence(result)


def test_a_server_without_banks_asks_for_labels(videos: list[Path], tmp_path: Path) -> None:
    with ThreadedServer(tmp_path) as server:
        result = run(videos[0], "--url", server.url)
        assert result.exit_code == 2
        assert "has no label bank; give labels" in sentence(result)
        assert run(videos[0], "--url", server.url, "--label", "run").exit_code == 0


def test_a_bank_comes_before_a_file_of_its_name_and_the_file_by_its_path(
    url: str, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("jump\nswim\n")
    by_name = lines(run(videos[0], "--url", url, "--labels", "mine", "--json"))[0]
    by_path = lines(run(videos[0], "--url", url, "--labels", "./mine", "--json"))[0]
    assert by_name["bank"]["name"] == "mine"
    assert by_path["bank"]["name"] is None
    assert {each["label"] for each in by_path["predictions"]} == {"jump", "swim"}


def test_templates_come_from_a_file_or_the_command(
    url: str, videos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "templates.txt").write_text("a video of {}\n{} in a park\n")
    words = (videos[0], "--url", url, "--label", "run", "--label", "sit", "--json")
    told = [
        lines(run(*words, *more))[0]["bank"]["num_templates"]
        for more in (
            ("--templates", tmp_path / "templates.txt"),
            ("--template", "a video of {}"),
            ("--label-only",),
        )
    ]
    assert told == [2, 1, 1]
    both = run(*words, "--label-only", "--template", "a {}")
    assert both.exit_code == 2
    assert "--template and --label-only exclude each other" in sentence(both)


def test_the_first_key_of_a_file_is_sent(videos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("first\nsecond\n")
    with ThreadedServer(tmp_path, banks=[make_bank(tmp_path)], api_keys=("first",)) as server:
        words = (videos[0], "--url", server.url, "--api-keys", tmp_path / "keys.txt")
        assert run(*words).exit_code == 0
