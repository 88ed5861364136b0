"""Downloads from a server on this machine that behaves in every bad way."""

from __future__ import annotations

import errno
import hashlib
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from actionclip_deploy.errors import CheckpointError, FileWriteError
from actionclip_deploy.published import download as module
from actionclip_deploy.published.download import Download, why_refused


def archive(seed: int) -> bytes:
    """A zip file, as torch.save writes one, of about 600 kB."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("data.pkl", bytes([seed]) * 600_000)
    return written.getvalue()


class FileServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = archive(1), '"one"'
        self.honours_range = True
        self.cut_after: list[int] = []  # bytes of each of the next answers
        self.status, self.headers = 200, {}
        self.extra_length = 0
        self.requests: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        content, start = server.content, 0
        if server.honours_range and self.headers.get("If-Range") == server.tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        status = 206 if start else server.status
        self.send_response(status)
        if server.tag:
            self.send_header("ETag", server.tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in server.headers.items():
            self.send_header(name, value)
        body = content[start:]
        self.send_header("Content-Length", str(len(body) + server.extra_length))
        self.end_headers()
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def wanted(server: FileServer, tmp_path: Path) -> Download:
    return Download(f"{server.url}/weights/small-8f.pth", tmp_path / "cache")


def fetch(download: Download, on_bytes=lambda *_: None) -> Path:
    return download.fetch(lambda _: nullcontext(on_bytes))


def test_a_file_is_fetched_once_and_its_hash_is_kept(server: FileServer, wanted: Download) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(wanted, lambda *given: seen.append(given))
    assert path.read_bytes() == server.content
    assert wanted.hash_path.read_text().split()[0] == hashlib.sha256(server.content).hexdigest()
    assert seen[-1] == (len(server.content), len(server.content))
    assert fetch(wanted) == path
    assert len(server.requests) == 1
    assert {each.name for each in path.parent.iterdir()} == {path.name, wanted.hash_path.name}


def test_a_connection_that_is_cut_goes_on_where_it_was(
    server: FileServer, wanted: Download
) -> None:
    server.cut_after = [200_000, 100_000]
    assert fetch(wanted).read_bytes() == server.content
    assert [each.get("Range") for each in server.requests] == [
        None,
        "bytes=200000-",
        "bytes=300000-",
    ]
    assert server.requests[1]["If-Range"] == '"one"'


def test_a_server_that_ignores_ranges_sends_all_again(server: FileServer, wanted: Download) -> None:
    server.cut_after, server.honours_range = [200_000], False
    assert fetch(wanted).read_bytes() == server.content


def test_a_file_that_changed_in_between_is_taken_from_its_start(
    server: FileServer, wanted: Download
) -> None:
    interrupt_after(wanted, 200_000)
    server.content, server.tag = archive(2), '"two"'
    assert fetch(wanted).read_bytes() == server.content


def interrupt_after(wanted: Download, num_bytes: int) -> None:
    def on_bytes(done: int, _: int | None) -> None:
        if done >= num_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(wanted, on_bytes)


def test_what_came_before_ctrl_c_is_kept_and_not_taken_for_all(
    server: FileServer, wanted: Download
) -> None:
    interrupt_after(wanted, 200_000)
    assert not wanted.path.exists()
    assert 200_000 <= wanted.partial_bytes < len(server.content)
    kept = wanted.partial_bytes
    assert fetch(wanted).read_bytes() == server.content
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_a_server_that_always_cuts_is_given_up(server: FileServer, wanted: Download) -> None:
    server.cut_after = [100, *([0] * 10)]
    with pytest.raises(CheckpointError, match=r"was cut off after 100 bytes .* put the file at"):
        fetch(wanted)
    assert not wanted.path.exists()


def test_a_length_that_lies_is_told(server: FileServer, wanted: Download) -> None:
    server.extra_length = 10
    server.honours_range = False
    with pytest.raises(CheckpointError, match="cut off"):
        fetch(wanted)
    assert not wanted.path.exists()


def test_another_hash_than_the_stated_one_is_refused(server: FileServer, wanted: Download) -> None:
    pinned = Download(wanted.address, wanted.folder, "8535b794")
    with pytest.raises(CheckpointError, match=r"has the sha256 .* 8535b794 was expected to begin"):
        fetch(pinned)
    assert (pinned.path.exists(), pinned.partial_bytes) == (False, 0)


def test_a_later_download_that_differs_is_refused(server: FileServer, wanted: Download) -> None:
    fetch(wanted)
    assert wanted.remove() == len(server.content)
    server.content = archive(2)
    with pytest.raises(CheckpointError, match="at its first download it had"):
        fetch(wanted)
    assert not wanted.path.exists()


def test_a_copy_that_was_altered_is_refused(server: FileServer, wanted: Download) -> None:
    fetch(wanted).write_bytes(archive(3))
    with pytest.raises(CheckpointError, match=r"the copy of .* at its first download it had"):
        fetch(wanted)


def test_a_file_put_there_by_hand_is_used_without_a_network(tmp_path: Path) -> None:
    content = archive(4)
    prefix = hashlib.sha256(content).hexdigest()[:8]
    wanted = Download("https://weights.invalid/small-8f.pth", tmp_path, prefix)
    wanted.path.write_bytes(content)
    assert fetch(wanted) == wanted.path
    assert wanted.hash_path.is_file()
    wrong = Download(wanted.address, tmp_path, "00000000")
    with pytest.raises(CheckpointError, match="00000000 was expected"):
        fetch(wrong)
    assert wanted.path.read_bytes() == content  # somebody's own file is not removed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><form>Log in</form>", "web page .* log in"),
        (b"hello, this is nothing", "is not a checkpoint"),
        (archive(1)[:-50], "is cut off"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    server: FileServer, wanted: Download, content: bytes, said: str
) -> None:
    server.content = content
    with pytest.raises(CheckpointError, match=said):
        fetch(wanted)
    assert list(wanted.folder.iterdir()) == []


def test_a_missing_file_is_told_with_the_place_to_put_it(
    server: FileServer, wanted: Download
) -> None:
    server.status = 404
    with pytest.raises(CheckpointError, match=r"status 404, Not Found.* put the file at .*small"):
        fetch(wanted)


def test_endless_redirects_end(server: FileServer, wanted: Download) -> None:
    server.status, server.headers = 302, {"Location": wanted.address}
    with pytest.raises(CheckpointError, match="redirect error that would lead to an infinite loop"):
        fetch(wanted)


def test_a_redirect_to_plain_http_elsewhere_is_refused(
    server: FileServer, wanted: Download
) -> None:
    server.status, server.headers = 302, {"Location": "http://weights.invalid/small-8f.pth"}
    with pytest.raises(CheckpointError, match=r"redirects to http://weights.invalid.* refused"):
        fetch(wanted)


@pytest.mark.parametrize(
    ("address", "came_from", "is_refused"),
    [
        ("https://a.example/x", None, False),
        ("http://a.example/x", None, True),
        ("http://127.0.0.1:80/x", None, False),
        ("http://localhost/x", "https://a.example/x", True),
        ("ftp://a.example/x", None, True),
        ("http://localhost.a.example/x", None, True),
    ],
)
def test_only_https_is_trusted(address: str, came_from: str | None, is_refused: bool) -> None:
    assert (why_refused(address, came_from=came_from) is not None) is is_refused


def test_a_network_without_an_answer_is_told_within_five_seconds(
    wanted: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, looked_up = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> list:
        ended.wait(300)
        looked_up.set()
        raise socket.gaierror(errno.EHOSTUNREACH, "no name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(CheckpointError, match=r"no connection within 4 seconds.* put the file at"):
        fetch(wanted)
    assert not looked_up.is_set(), "it was waited for"
    ended.set()


def test_nobody_listening_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not be fetched \(Connection refused\)"):
        fetch(Download("http://127.0.0.1:9/small-8f.pth", tmp_path))


def test_a_full_disk_is_told(
    server: FileServer, wanted: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self: Path, mode: str = "r", *args, **options):
        return Full() if self.suffix == ".part" and "a" in mode else real(self, mode, *args)

    monkeypatch.setattr(module.Path, "open", opened)
    with pytest.raises(FileWriteError, match=r"No space left.*make room"):
        fetch(wanted)
    assert not wanted.path.exists()


def test_two_at_a_time_fetch_it_once(server: FileServer, wanted: Download) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: fetch(wanted), range(4)))
    assert paths == {wanted.path}
    assert len(server.requests) == 1
