"""A real server with an archive, while another program adds to it, and clients that misbehave."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_programs import Server, running_server, until
from typer.testing import CliRunner

from actionclip_deploy.cli import app

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

MIB = 1024 * 1024
PADDING = 32 * MIB  # more than both ends of a connection hold in between


def index(bundle: Path, folder: Path) -> None:
    words = ["index", str(bundle), str(folder / "recordings"), "--recursive", "--thumbnails"]
    done = CliRunner().invoke(app, [*words, "--window", "0.4", "-o", str(folder / "archive")])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def folder(
    tiny_bundle: Path, rendered_video: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    (folder / "recordings" / "yard").mkdir(parents=True)
    video = folder / "recordings" / "yard" / "20261130_181500.mp4"
    # Boxes of MP4 that nobody knows are passed over, so this is a long file of a short video.
    padding = (PADDING + 8).to_bytes(4, "big") + b"free" + bytes(PADDING)
    video.write_bytes(rendered_video.read_bytes() + padding)
    index(tiny_bundle, folder)
    return folder


@pytest.fixture(scope="module")
def server(
    folder: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = ("--runtime", "onnxruntime", "--workers", "1", "--archive", str(folder / "archive"))
    with running_server(tiny_bundle, tmp_path_factory.mktemp("server"), *options) as server:
        yield server
        assert [line for line in server.logs() if line["level"] in ("error", "critical")] == []


def best(server: Server, **asked: Any) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post("/v1/search", json={"text": "a person runs", **asked})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["moments"][0]
    return found


def raw(server: Server, target: str, *headers: str) -> bytes:
    """The answer to a request whose target no client tidies up; its first 64 KiB."""
    lines = [f"GET {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]
    with server.connect() as connection:
        connection.sendall("\r\n".join(lines).encode())
        answer = b""
        while len(answer) < 65536 and (part := connection.recv(65536)):
            answer += part
    return answer


def test_what_another_program_indexes_is_found_and_played(
    server: Server, folder: Path, tiny_bundle: Path, rendered_video: Path
) -> None:
    assert best(server)["folder"] == "yard"
    (folder / "recordings" / "door").mkdir()
    shutil.copy(rendered_video, folder / "recordings" / "door" / "new.mp4")
    index(tiny_bundle, folder)
    found = best(server, cameras=["door"])
    assert server.metric("actionclip_archive_videos") == 2
    with server.client() as client:
        assert client.get(found["video_url"]).content == rendered_video.read_bytes()
        assert client.get(found["thumbnail_url"]).content.startswith(b"\xff\xd8")
        part = client.get(found["video_url"], headers={"range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        head = client.head(found["video_url"])
        assert head.headers["content-length"] == str(rendered_video.stat().st_size)
        assert head.content == b""


def test_a_client_that_leaves_in_the_middle_of_a_video_gives_its_place_back(
    server: Server,
) -> None:
    url = best(server, cameras=["yard"])["video_url"]
    for _ in range(70):  # more than may be sent at a time
        with server.connect() as connection:
            connection.sendall(f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        until(lambda: server.metric("actionclip_requests_in_flight") == 1)  # which asks


def test_those_who_take_no_bytes_hold_a_bounded_number_of_places(server: Server) -> None:
    url = best(server, cameras=["yard"])["video_url"]
    asked = f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    held: list[socket.socket] = []
    try:
        for _ in range(64):
            held.append(server.connect())
            held[-1].sendall(asked)
            assert held[-1].recv(1000).startswith(b"HTTP/1.1 200 ")
        refused = raw(server, url)
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after" in refused.lower()
        assert best(server)["rank"] == 1  # others are answered
    finally:
        for connection in held:
            connection.close()
    until(lambda: server.metric("actionclip_requests_in_flight") == 1)
    assert raw(server, url, "Range: bytes=0-3").startswith(b"HTTP/1.1 206 ")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/archive/videos/../../../../../../etc/passwd",
        "/v1/archive/videos/1/../../../../etc/passwd",
        "/v1/archive/videos//etc/passwd",
        "/v1/archive/videos/%2e%2e/%2e%2e/etc/passwd",
        "/v1/archive/videos/..%5c..%5cetc%5cpasswd",
        "/v1/archive/videos/1%2f..%2f..%2farchive.db",
        "/v1/archive/videos/file:///etc/passwd",
        "/v1/archive/videos/1;/etc/passwd",
        "/v1/archive/videos/" + "9" * 20_000,
        "/v1/archive/thumbnails/1/..%2f..%2farchive.db",
    ],
)
def test_no_target_is_a_path(server: Server, target: str) -> None:
    answer = raw(server, target)
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 422 ")), answer[:200]
    assert b"root:" not in answer
    assert b"SQLite" not in answer
