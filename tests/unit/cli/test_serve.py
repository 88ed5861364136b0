"""`actionclip serve`: what it refuses, and a real server from its first line to its end."""

from __future__ import annotations

import json
import re
import shutil
import signal
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

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.cli import app
from actionclip_deploy.runtimes.parity import Golden

READY = re.compile(r"^Serving tiny at (http://127\.0\.0\.1:\d+): (.*)\.$")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-batch", "32", "--queue", "8"), "the queue must hold one full batch or more"),
        (("--api-keys", "no/such/file"), "cannot be read as text"),
        (("--runtime", "nope"), "must be one of"),
        (("--runtime", "torch"), "give it as checkpoint"),
    ],
)
def test_wrong_options_are_told(words: tuple[str, ...], message: str, tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "--port", "0", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


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
        assert found, (line, process.communicate(timeout=30)[1])
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
    with server(bundle, "--runtime", "onnxruntime", *words) as (process, url, told):
        assert told.startswith("onnxruntime (CPUExecutionProvider, fp32) verified; ")
        assert "label banks: mine (2 labels)" in told
        assert "1 keys" in told
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret key"}) as client:
            files = {"video": ("square.mp4", rendered_video.read_bytes())}
            data = {"labels": "mine"}
            answer = client.post("/v1/classify", files=files, data=data, timeout=60)
            assert answer.status_code == 200
            assert answer.json()["bank"]["version"] == 1
            put = client.put("/v1/labels/new", json={"labels": ["sit", "stand"]})
            assert put.status_code == 202
            while client.get("/v1/labels/new").json()["active"] is None:
                pass
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=60)
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
