"""Clients that are slow, or do nothing at all, on real connections; the times are lowered."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serving import make_service

from actionclip_deploy.serve import guards
from actionclip_deploy.serve.app import create_app, listen
from actionclip_deploy.serve.guards import make_config
from actionclip_deploy.serve.service import Service

IDLE_SECONDS = 0.5
BODY_SECONDS = 0.5
# Until something that has been waited for has to have happened, on a busy machine.
PATIENCE_SECONDS = 120.0
KEY = "a-key"
HEAD = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[tuple[Service, tuple[str, int]]]:
    """A server in a thread, with the connections that `actionclip serve` has."""
    with running_with_connections(folder, **options) as (service, address, _):
        yield service, address


@contextmanager
def running_with_connections(
    folder: Path, **options: Any
) -> Iterator[tuple[Service, tuple[str, int], Collection[object]]]:
    """As `running`, and the connections that are open."""
    service = make_service(folder, **options)
    server = uvicorn.Server(make_config(create_app(service), drain_seconds=10))
    with listen("127.0.0.1", 0) as listening:
        # The system holds little of an answer, so that the server notices who does not read.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            while not service.is_ready:
                time.sleep(0.01)
            yield service, listening.getsockname(), server.server_state.connections
        finally:
            server.should_exit = True
            thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "IDLE_SECONDS", IDLE_SECONDS)


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=PATIENCE_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection, which it has to."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET /v1/info HT", HEAD])
def test_a_connection_without_a_request_is_closed(sent: bytes, tmp_path: Path) -> None:
    with running(tmp_path) as (_, address), connect(address) as connection:
        started = time.monotonic()
        connection.sendall(sent)
        assert read_all(connection) == b""
        assert time.monotonic() - started > IDLE_SECONDS / 2


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(tmp_path: Path) -> None:
    def drip(connection: socket.socket) -> None:
        for byte in HEAD * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    with (
        running(tmp_path) as (_, address),
        connect(address) as connection,
        pytest.raises(ConnectionError),
    ):
        drip(connection)


class Pace:
    """Acts in pauses, and knows whether a busy machine made one of them too long."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.is_lost = False

    def pause(self, seconds: float) -> None:
        """Sleep; from the last pause to the next act has to be less than a server waits."""
        time.sleep(seconds)
        self.act()

    def act(self) -> None:
        """Note that something was done now."""
        now = time.monotonic()
        self.is_lost |= now - self._last > IDLE_SECONDS / 2
        self._last = now


def test_a_connection_is_kept_for_a_while_and_then_closed(tmp_path: Path) -> None:
    def is_kept(address: tuple[str, int]) -> bool:
        pace = Pace()
        with connect(address) as connection, suppress(ConnectionError):
            for _ in range(4):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    data = connection.recv(65536)
                    pace.act()
                    assert data or pace.is_lost, "it was closed"
                    if not data:
                        return False
                    answer += data
                pace.pause(IDLE_SECONDS / 3)
            return read_all(connection) == b""
        assert pace.is_lost, "it was reset"
        return False

    with running(tmp_path) as (_, address):
        while not is_kept(address):  # the test itself was held up for too long
            pass


def test_a_body_that_comes_byte_by_byte_is_answered_by_408(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "_LONGEST_LINGER_SECONDS", 1.0)
    with (
        running(tmp_path, limits={"body_seconds": BODY_SECONDS}) as (service, address),
        connect(address) as connection,
    ):
        started = time.monotonic()
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        sending = threading.Event()

        def drip() -> None:
            while not sending.wait(0.02):
                try:
                    connection.sendall(b" ")
                except ConnectionError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = b""
        with suppress(ConnectionError):  # it is closed while more is sent
            while data := connection.recv(65536):
                answer += data
        sending.set()
        thread.join()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"slow_body"' in answer
        assert b"connection: close" in answer.lower()
        assert time.monotonic() - started > BODY_SECONDS / 2
        until(lambda: b"in_flight 0.0" in service.metrics.render())


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_request_that_takes_long_is_not_closed(tmp_path: Path) -> None:
    with running(tmp_path) as (service, address):
        service.pool.delay_seconds = 3 * IDLE_SECONDS  # type: ignore[attr-defined]
        url = f"http://127.0.0.1:{address[1]}"
        with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            answer = client.post("/v1/embed", files={"video": b"a"})
        assert answer.status_code == 200


def large_answers(count: int) -> bytes:
    """Requests with answers of 200 kB each, one after the other without reading any."""
    body = b'{"texts": [' + b",".join(b'"t%d"' % n for n in range(1000)) + b"]}"
    return (HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * count


@pytest.mark.parametrize("num_requests", [1, 40])
def test_an_answer_that_nobody_reads_is_dropped(num_requests: int, tmp_path: Path) -> None:
    with (
        running_with_connections(tmp_path) as (service, address, connections),
        small_window(address) as connection,
    ):
        connection.sendall(large_answers(num_requests))
        until(lambda: b'route="/v1/embed",status="200"' in service.metrics.render())
        until(lambda: not connections)
        answer = read_all(connection)
        head, _, _ = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert len(answer) < length
        # What had begun has ended, so it takes no place any more.
        until(lambda: b"in_flight 0.0" in service.metrics.render())


def test_an_answer_that_is_read_slowly_is_given_as_a_whole(tmp_path: Path) -> None:
    def is_whole(address: tuple[str, int]) -> bool:
        answer, started, pace = b"", time.monotonic(), Pace()
        with small_window(address) as connection, suppress(ConnectionError):
            connection.sendall(large_answers(1))
            while data := connection.recv(8192):
                answer += data
                pace.pause(0.05)
        assert time.monotonic() - started > 2 * IDLE_SECONDS or pace.is_lost
        head, _, body = answer.partition(b"\r\n\r\n")
        is_whole = f"content-length: {len(body)}".encode() in head.lower()
        assert is_whole or pace.is_lost
        return is_whole

    with running(tmp_path) as (_, address):
        while not is_whole(address):  # the test itself was held up for too long
            pass


@contextmanager
def small_window(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection that takes little without being read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(address)
        yield connection


def test_connections_without_number_leave_room_for_what_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MAX_CONNECTIONS", 4)
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with running(tmp_path) as (_, address):
        first = connect(address)
        others = [connect(address) for _ in range(20)]
        outcomes = []
        for each in others:
            try:
                each.sendall(request)
                outcomes.append(read_all(each)[:15])
            except ConnectionError:
                outcomes.append(b"")
            each.close()
        assert outcomes == [b"HTTP/1.1 200 OK"] * 3 + [b""] * 17
        first.sendall(request)
        assert read_all(first).startswith(b"HTTP/1.1 200 OK")
        first.close()
        with connect(address) as later:
            later.sendall(request)
            assert read_all(later).startswith(b"HTTP/1.1 200 OK")


def test_clients_without_a_key_take_nobodys_place(tmp_path: Path) -> None:
    with running(tmp_path, limits={"requests": 2}, api_keys=(KEY,)) as (_, address):
        strangers = [connect(address) for _ in range(8)]
        for each in strangers:
            each.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        url = f"http://127.0.0.1:{address[1]}"
        headers = {"authorization": f"Bearer {KEY}"}

        def embed(_: int) -> int:
            with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
                json = {"texts": ["run"]}
                return client.post("/v1/embed", json=json, headers=headers).status_code

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(embed, range(20))) == [200] * 20
        for each in strangers:
            each.sendall(b" " * 100)
            assert each.recv(65536).startswith(b"HTTP/1.1 401 ")
            each.close()
