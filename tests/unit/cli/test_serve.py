"""`actionclip serve`: what it refuses, and a real server from its first line to its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from actionclip_deploy.archive import ArchiveModel, ArchiveWriter
from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.cli import app
from actionclip_deploy.cli import serve as serve_module
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.parity import Golden

READY = re.compile(r"^Serving tiny at (http://127\.0\.0\.1:\d+): (.*)\.$")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)], env={"COLUMNS": "200"})


def test_the_bound_on_pixels_is_a_limit_of_the_server(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**given: Any) -> None:
        raise ValueError(f"frames of {given['limits'].pixels} pixels")

    # What a server is given cannot be seen from outside without a video of such a size.
    monkeypatch.setattr(serve_module, "ServerSettings", settings)
    assert "frames of 9437184 pixels" in run(tiny_bundle).stderr  # 4096 x 2304
    assert "frames of 12345 pixels" in run(tiny_bundle, "--max-pixels", 12345).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-batch", "32", "--queue", "8"), "the queue must hold one full batch or more"),
        (("--queue", "99999999999"), "queue is 99999999999, which takes"),
        (("--max-body-mib", "1e308"), "--max-body-mib"),
        (("--timeout", "1e308"), "request_seconds is 1e+308; it must be a positive number, 10,0"),
        (("--max-delay-ms", "1e308"), "--max-delay-ms is 1e+308; it must be 0 or more, and 60,000"),
        (("--drain-seconds", "1e308"), "--drain-seconds is 1e+308; it must be a positive number"),
        (("--api-keys", "no/such/file"), "cannot be read (No such file or directory)"),
        (("--runtime", "nope"), "must be one of"),
        (("--runtime", "torch"), "--checkpoint is missing, and the torch runtime needs the one"),
        (("--labels", "../x"), "--labels is '../x', which is neither a label bank of"),
        (("--labels", ""), "--labels is '', which is neither a label bank of"),
        (("--labels", "none"), "(it has: none) nor a file; give one of them"),
        (("--allowed-host", "http://a.example"), "without http:// and port"),
        (("--host", "192.0.2.1"), "Nothing can listen on 192.0.2.1"),
        (("--host", "no.such.name.invalid"), "choose others with --host and --port"),
        (("--spool", "no/such/folder"), "no/such/folder"),
    ],
)
def test_wrong_options_are_told(words: tuple[str, ...], message: str, tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "--port", "0", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('labels = "other"', "is to be watched with the label bank 'other'"),
        ("window = -1", "camera.0.window"),
        ("window = 4\nstride = 0.3", "stride is 0.3"),
        ("thresholds = { dancing = 0.5 }", "There is a threshold for 'dancing'"),
        ("thresholds = -1", "-1"),
        ('source = "nope://x"', "'door'"),
    ],
)
def test_what_is_wrong_with_cameras_is_told_before_it_serves(
    key: str, message: str, bundle: Path, tmp_path: Path
) -> None:
    source = "" if key.startswith("source") else 'source = "test:"\n'
    (tmp_path / "cameras.toml").write_text(f'[[camera]]\nname = "door"\n{source}{key}\n')
    words = ("--runtime", "onnxruntime", "--watch", f"@{tmp_path / 'cameras.toml'}")
    result = run(bundle, "--port", "0", *words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_an_archive_that_cannot_be_searched_is_told_before_it_serves(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    words = (tiny_bundle, "--runtime", "onnxruntime", "--port", "0", "--archive")
    ours = Bundle.open(tiny_bundle)
    model = ArchiveModel("", "v", ours.textual_sha256, 1, 4.0, 0.5, "onnxruntime", 2.0)
    for name, made in {"narrow": model, "other": replace(model, textual_sha256="t")}.items():
        ArchiveWriter.open(tmp_path / name, made).close()
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none": "none is no archive: it does not exist",
        "folder": "folder is no archive: it has no archive.db",
        "other": "has another text encoder than the one that goes with the windows of",
        "narrow": "values, where 1 have those of the windows of",
    }.items():
        result = run(*words, tmp_path / name)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
        assert result.stdout == ""


def test_sinks_are_for_what_is_watched(tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "--port", "0", "--sink", "events.jsonl")
    assert result.exit_code == 2
    assert "give sources to watch" in " ".join(result.stderr.split())


def test_keys_in_another_encoding_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    # As a shell of Windows writes them with >; read as UTF-8 no client could ever send one.
    (tmp_path / "keys").write_bytes("secret\r\n".encode("utf-16"))
    result = run(tiny_bundle, "--port", "0", "--api-keys", tmp_path / "keys")
    assert result.exit_code == 2
    assert "keys is UTF-16LE, and not UTF-8; save it as UTF-8" in " ".join(result.stderr.split())
    (tmp_path / "keys").write_bytes(b"secret\r\nsec\0ret\r\n")
    result = run(tiny_bundle, "--port", "0", "--api-keys", tmp_path / "keys")
    assert result.exit_code == 2
    assert "keys line 2 holds a zero byte" in " ".join(result.stderr.split())


def test_a_port_that_is_taken_is_told_before_anything_is_opened(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(tiny_bundle, "--port", taken.getsockname()[1], "--runtime", "nope")
    assert result.exit_code == 2
    assert "Nothing can listen on 127.0.0.1 port" in " ".join(result.stderr.split())


@pytest.mark.parametrize("saves", [True, False])
def test_banks_are_not_promised_to_a_folder_that_takes_none(
    saves: bool, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so permissions alone would show nothing.
    monkeypatch.setattr(serve_module.os, "access", lambda _, mode: mode != os.W_OK)
    result = run(tiny_bundle, "--runtime", "nope", *(["--save-labels"] if saves else []))
    assert result.exit_code == 2
    told = "writable" in result.stderr
    assert told == saves


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "numbers": b'{"schema_version": 1e999, "labels": 5}',
    "a folder": b"",
}


@pytest.mark.parametrize("file", ["manifest.json", "labels/mine/bank.json"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_whatever_is_damaged_ends_it_with_a_sentence(
    damage: str, file: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / file
    path.unlink()
    if damage == "a folder":
        path.mkdir()
        (bundle / "labels/mine/bank.safetensors").rename(path / "bank.json")
    else:
        path.write_bytes(DAMAGED[damage])
    words = ("--port", "0", "--labels", "mine", "--runtime", "onnxruntime", "--no-verify")
    result = run(bundle, *words)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr


def test_what_nobody_foresaw_ends_it_with_a_sentence(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a key")

    monkeypatch.setattr(LabelBank, "load", fail)
    result = run(bundle, "--port", "0", "--runtime", "onnxruntime", "--no-verify")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "The server failed (KeyError: 'a key', in fail of test_serve.py, line" in " ".join(
        result.stderr.split()
    )


def test_a_file_without_keys_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n\n")
    result = run(tiny_bundle, "--api-keys", tmp_path / "keys")
    assert result.exit_code == 2
    assert "holds no key; write one on each line" in " ".join(result.stderr.split())


def test_a_folder_that_is_no_bundle_is_told(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "manifest.json" in result.stderr


def command(bundle: Path, *words: str) -> list[str]:
    python = (sys.executable, "-m", "actionclip_deploy.cli")
    return [*python, "serve", str(bundle), "--port", "0", *words]


@contextmanager
def server(bundle: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running server, its address and what it says about itself."""
    process = subprocess.Popen(
        command(bundle, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        found = READY.match(line)
        assert found, (line, process.communicate(timeout=120)[1])
        yield process, found[1], found[2]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    (tmp_path / "labels.txt").write_text("run\nwalk\n")
    words = ("build", tmp_path / "tiny", "--labels", tmp_path / "labels.txt", "--name", "mine")
    built = CliRunner().invoke(app, ["labels", *map(str, words)])
    assert built.exit_code == 0, built.output
    return tmp_path / "tiny"


def test_a_server_says_where_it_is_answers_and_ends_with_0(
    bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("secret key\n")
    words = ("--api-keys", str(tmp_path / "keys"), "--workers", "1", "--save-labels")
    words += ("--watch", "test:?fps=40", "--sink", str(tmp_path / "events.jsonl"))
    indexed = CliRunner().invoke(
        app, ["index", str(bundle), str(rendered_video), "-o", str(tmp_path / "archive")]
    )
    assert indexed.exit_code == 0, indexed.output
    words += ("--archive", str(tmp_path / "archive"))
    with server(bundle, "--runtime", "onnxruntime", *words) as (process, url, told):
        assert told.startswith("onnxruntime (CPUExecutionProvider, fp32) verified; ")
        assert "label banks: mine (2 labels)" in told
        assert told.endswith(", 1 key")
        assert f"watching 1 camera ({url}/live)" in told
        assert re.search(rf"searching 1 window of archive \({url}/search\)", told)
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret key"}) as client:
            files = {"video": ("square.mp4", rendered_video.read_bytes())}
            data = {"labels": "mine"}
            answer = client.post("/v1/classify", files=files, data=data, timeout=120)
            assert answer.status_code == 200
            assert answer.json()["bank"]["version"] == 1
            (stream,) = client.get("/v1/streams").json()["streams"]
            assert (stream["name"], stream["bank"]["version"]) == ("test", 1)
            found = client.post("/v1/search", json={"text": "run"}, timeout=120).json()
            video = client.get(found["moments"][0]["video_url"], headers={"range": "bytes=4-7"})
            assert (video.status_code, video.content) == (206, b"ftyp")
            put = client.put("/v1/labels/new", json={"labels": ["sit", "stand"]})
            assert put.status_code == 202
            while client.get("/v1/labels/new").json()["active"] is None:
                pass
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output == ""
    lines = [json.loads(line) for line in log.splitlines()]
    (classified,) = [line for line in lines if line.get("path") == "/v1/classify"]
    assert (classified["status"], classified["request_id"]) == (200, answer.json()["request_id"])
    assert "secret key" not in log
    assert (bundle / "labels" / "new" / "bank.json").exists()


def test_what_disagrees_with_pytorch_never_serves(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    golden = Golden.load(opened)
    replace(golden, text_embeddings=golden.text_embeddings[::-1].copy()).save(bundle)
    (bundle / "manifest.json").unlink()
    files = {name: spec for name, spec in hash_files(bundle).items() if "labels" not in name}
    write_manifest(bundle, opened.manifest.model_copy(update={"files": files}))
    done = subprocess.run(
        command(bundle, "--runtime", "onnxruntime"),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4, done.stderr
    assert "textual" in done.stderr
    assert done.stdout == ""


def test_labels_of_files_are_served_under_the_files_names_and_ctrl_c_ends_it(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "doors.txt").write_text("a red star blinking\na blue cross moving left\n")
    words = ("--labels", "mine", "--labels", str(tmp_path / "doors.txt"), "--label-only")
    with server(bundle, "--runtime", "onnxruntime", "--workers", "1", *words) as found:
        process, url, told = found
        assert "label banks: doors (2 labels), mine (2 labels)" in told
        banks = httpx.get(f"{url}/v1/labels").json()["banks"]
        assert {bank["name"]: bank["active"]["num_templates"] for bank in banks} == {
            "doors": 1,
            "mine": 1,
        }
        process.send_signal(signal.SIGINT)
        log = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert log.splitlines()[-1] == (
        "error: Interrupted: no more requests are taken, and those that had begun were finished; "
        "the same command serves again."
    )


def test_labels_one_by_one_are_served_too(bundle: Path) -> None:
    words = ("--label", "a red star blinking", "--label", "a blue cross moving left")
    with server(bundle, "--runtime", "onnxruntime", "--workers", "1", *words) as (_, __, told):
        assert "label banks: labels (2 labels);" in told


def test_two_files_of_one_name_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "doors.txt").write_text("run\nwalk\n")
    words = [w for f in ("a", "b") for w in ("--labels", tmp_path / f / "doors.txt")]
    result = run(tiny_bundle, *words)
    assert result.exit_code == 2
    assert "two banks of the name doors; rename one file" in " ".join(result.stderr.split())
