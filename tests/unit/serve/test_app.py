"""The server's life: not ready, ready, ending; and what it says where it cannot begin."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import make_service, running_app

from actionclip_deploy.errors import ParityError, RuntimeUnavailableError
from actionclip_deploy.serve.app import listen, serve
from actionclip_deploy.serve.service import Service


def test_a_port_that_is_taken_is_told_with_the_options() -> None:
    with (
        listen("127.0.0.1", 0) as first,
        pytest.raises(RuntimeUnavailableError, match=r"Nothing can listen on .*--host and --port"),
    ):
        listen("127.0.0.1", first.getsockname()[1])


def test_an_address_that_is_not_of_this_machine_is_told() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"Nothing can listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def address_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_it_is_alive_before_it_is_ready_and_ends_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path)
    may_start, seen = threading.Event(), {}
    start = service.start

    async def slow_start() -> None:
        service.state = "starting"
        while not may_start.is_set():
            import asyncio

            await asyncio.sleep(0.01)
        await start()

    monkeypatch.setattr(service, "start", slow_start)
    listening = listen("127.0.0.1", 0)
    url = address_of(listening)
    ready = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            seen["early"] = [client.get(p).status_code for p in ("/healthz", "/readyz", "/v1/info")]
            may_start.set()
            assert ready.wait(120)
            seen["ready"] = [client.get(p).status_code for p in ("/healthz", "/readyz", "/v1/info")]
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watcher = threading.Thread(target=look)
    watcher.start()
    serve(service, listening, on_ready=lambda _: ready.set())
    watcher.join()
    assert seen == {"early": [200, 503, 503], "ready": [200, 200, 200]}
    assert service.state == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_fails_verification_never_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path)

    async def fail() -> None:
        raise ParityError("first in visual")

    monkeypatch.setattr(service, "start", fail)
    with pytest.raises(ParityError, match="first in visual"):
        serve(service, listen("127.0.0.1", 0), on_ready=lambda: pytest.fail("was ready"))
    assert service.state == "stopped"


def test_what_has_begun_is_finished_and_what_comes_is_refused(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    listening = listen("127.0.0.1", 0)
    url = address_of(listening)
    ready = threading.Event()
    answers: dict[str, Any] = {}

    def use() -> None:
        assert ready.wait(120)
        service.pool.delay_seconds = 1.0  # type: ignore[attr-defined]
        with httpx.Client(base_url=url, timeout=120) as client:
            client.put("/v1/labels/mine", json={"labels": ["run", "walk"]})
            while client.get("/v1/labels/mine").json()["active"] is None:
                time.sleep(0.01)
            late = httpx.Client(base_url=url, timeout=120)
            late.get("/healthz")  # a connection that is there already

            def in_flight() -> float | None:
                return service.metrics.registry.get_sample_value("actionclip_requests_in_flight")

            while in_flight():  # the request before counts until its answer has left
                time.sleep(0.01)

            def end() -> None:
                while not in_flight():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
                while service.is_ready:
                    time.sleep(0.01)
                try:
                    answers["late"] = late.get("/v1/info").status_code
                except httpx.TransportError:
                    answers["late"] = 503  # the connection was idle and is closed already
                late.close()

            ending = threading.Thread(target=end)
            ending.start()
            files = {"video": ("a.mp4", b"some pixels")}
            answers["begun"] = client.post("/v1/classify", files=files, data={"labels": "mine"})
            ending.join()

    user = threading.Thread(target=use)
    user.start()
    serve(service, listening, on_ready=lambda _: ready.set())
    user.join()
    assert answers["begun"].status_code == 200
    assert answers["late"] == 503


def test_a_service_that_was_stopped_can_be_stopped_again(tmp_path: Path) -> None:
    import asyncio

    async def run(service: Service) -> None:
        await service.start()
        await service.stop()
        await service.stop()

    asyncio.run(run(make_service(tmp_path)))


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("a name"), OSError(5, "I/O"), TypeError()]
)
def test_whatever_fails_before_serving_ends_the_server(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path)

    async def fail() -> None:
        service.state = "starting"
        raise error

    monkeypatch.setattr(service, "start", fail)
    with pytest.raises(type(error)):
        serve(service, listen("127.0.0.1", 0), on_ready=lambda: pytest.fail("was ready"))
    assert service.state == "stopped"


def test_a_bank_that_cannot_exist_never_leaves_it_starting(tmp_path: Path) -> None:
    service = make_service(tmp_path, labels=("../x",))
    with pytest.raises(ValueError, match="is not allowed"):
        serve(service, listen("127.0.0.1", 0))
    assert service.state == "stopped"


PATHS = [
    *("/", "/page/page.js", "/samples", "/healthz", "/readyz", "/metrics", "/openapi.json"),
    *("/v1/info", "/v1/labels", "/v1/labels/none", "/v2", "/v2/health/live", "/v2/health/ready"),
    *("/v2/models/clip", "/v2/models/clip/ready", "/v2/models/clip/versions/1/config"),
    *("/v2/models/none", "/nothing", "/v1/classify", "/v2/models/clip/infer"),
]


@pytest.mark.parametrize("path", PATHS)
def test_head_answers_as_get_without_the_body(path: str, tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.get(path)  # metrics count it
        got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert got.content
    differing = {"x-request-id"} | ({"content-length"} if path == "/metrics" else set())
    assert {k: v for k, v in head.headers.items() if k not in differing} == {
        k: v for k, v in got.headers.items() if k not in differing
    }


def test_every_route_that_has_get_has_head(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        paths = [
            path
            for path, item in client.get("/openapi.json").json()["paths"].items()
            if "get" in item
        ]
        assert len(paths) > 10
        for path in paths:
            path = path.replace("{name}", "clip").replace("{version}", "1")
            assert client.head(path).status_code == client.get(path).status_code != 405


def test_nothing_that_moves_a_terminal_is_in_an_answer_or_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_app(tmp_path) as client, caplog.at_level("INFO"):
        answers = [client.get("/%1b]0;x%07/%c2%9b31m"), client.get("/v2/models/%1b%5b2J")]
    for text in [*(answer.text for answer in answers), caplog.text]:
        assert text.replace("\n", "").isprintable()
        assert "\\u001b" not in text
        assert "x1b" in text
