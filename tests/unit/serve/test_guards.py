"""What every request passes: ids, keys, limits of bodies and of requests, logs and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving import error_of, make_service, running_app
from starlette.testclient import TestClient

from actionclip_deploy.serve.app import create_app, listen
from actionclip_deploy.serve.guards import make_config
from actionclip_deploy.serve.settings import ServerSettings

KEY = "a key of 32 characters, or so ..."


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path, limits={"body_bytes": 1000}) as client:
        yield client


def test_a_request_keeps_its_id_and_gets_one_otherwise(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = [client.get("/healthz").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    odd = client.get("/healthz", headers={"x-request-id": 'x" onload="'}).headers["x-request-id"]
    assert '"' not in odd


def test_answers_are_not_sniffed_or_kept(client: TestClient) -> None:
    headers = client.get("/v1/info").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/v1/info", "/v1/labels", "/v2/models/clip"])
def test_with_keys_the_api_needs_one(path: str, tmp_path: Path) -> None:
    with running_app(tmp_path, api_keys=("another", KEY)) as client:
        refused = client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
            assert client.get(path, headers={"authorization": wrong}).status_code == 401
        for right in ({"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.get(path, headers=right).status_code != 401
        for free in ("/healthz", "/readyz", "/metrics"):
            assert client.get(free).status_code == 200


def test_a_body_that_says_it_is_too_large_is_not_read(client: TestClient) -> None:
    response = client.post("/v1/classify", content=b"x" * 1001)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert "1,000 bytes" in error_of(response)["message"]


def test_a_body_that_does_not_say_is_counted(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    headers = {"content-type": "application/json"}
    response = client.post("/v1/classify", content=chunks(), headers=headers)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def request_scope(**changes: Any) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    scope |= {"method": "POST", "path": "/v1/classify", "raw_path": b"/v1/classify"}
    return {**scope, "query_string": b"", "headers": headers, **changes}


async def call(app: Any, receive: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(request_scope(), receive, send)
    return sent


def test_of_a_body_without_end_two_bodies_are_read_before_and_after_the_answer_together(
    tmp_path: Path,
) -> None:
    async def run() -> list[dict[str, Any]]:
        service = make_service(tmp_path, limits={"body_bytes": 1000})
        await service.start()

        async def more() -> dict[str, Any]:
            nonlocal num_read
            num_read += 100
            return {"type": "http.request", "body": b"x" * 100, "more_body": True}

        try:
            return await call(create_app(service, manages_service=False), more)
        finally:
            await service.stop()

    num_read = 0
    start, *_ = asyncio.run(run())
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    assert num_read <= 2 * 1000


def test_a_body_that_is_too_slow_is_refused(tmp_path: Path) -> None:
    async def run() -> list[dict[str, Any]]:
        service = make_service(tmp_path, limits={"body_seconds": 0.05})
        await service.start()

        async def never() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        try:
            return await call(create_app(service, manages_service=False), never)
        finally:
            await service.stop()

    start, body, *_ = asyncio.run(run())
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "slow_body"


def test_others_have_their_turn_between_a_few_pieces_of_a_body() -> None:
    """The application is one of them: it is given what has been taken out of a body since."""
    num_bytes: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan here"
        is_over = False
        while not is_over:
            message = await receive()
            is_over = not message["more_body"]
            num_bytes.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run(listening: socket.socket) -> bytes:
        server = uvicorn.Server(make_config(app, drain_seconds=10))  # type: ignore[arg-type]
        serving = asyncio.ensure_future(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\n \r\n" * 4000 + b"0\r\n\r\n")
        line = await reader.readline()
        writer.close()
        server.should_exit = True
        await serving
        return line

    with listen("127.0.0.1", 0) as listening:
        assert asyncio.run(run(listening)).startswith(b"HTTP/1.1 204")
    assert sum(num_bytes) == 4000
    assert max(num_bytes) <= 100


def test_a_client_that_goes_away_ends_its_work(tmp_path: Path) -> None:
    async def run() -> tuple[list[dict[str, Any]], Any]:
        service = make_service(tmp_path)
        await service.start()
        given = iter(
            [
                {"type": "http.request", "body": b'{"texts": ["run"]}', "more_body": False},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> dict[str, Any]:
            return next(given)

        async def never(*arguments: object) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        service.embed_texts = never  # type: ignore[assignment, method-assign]
        app = create_app(service, manages_service=False)
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = request_scope(path="/v1/embed", raw_path=b"/v1/embed")
        try:
            await app(scope, receive, send)
        finally:
            await service.stop()
        return sent, service.metrics.render()

    cancelled: list[bool] = []
    sent, numbers = asyncio.run(run())
    assert cancelled == [True]
    assert sent == []
    assert b'status="499"' in numbers


def test_more_requests_than_may_be_worked_on_are_refused(tmp_path: Path) -> None:
    async def run() -> list[int]:
        import httpx

        service = make_service(tmp_path, limits={"requests": 2})
        await service.start()
        free = asyncio.Event()

        async def wait(*arguments: object) -> None:
            await free.wait()

        service.embed_texts = wait  # type: ignore[assignment, method-assign]
        transport = httpx.ASGITransport(create_app(service, manages_service=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            held = [
                asyncio.ensure_future(client.post("/v1/embed", json={"texts": ["run"]}))
                for _ in range(2)
            ]
            await asyncio.sleep(0.1)
            refused = await client.post("/v1/embed", json={"texts": ["run"]})
            alive = await client.get("/healthz")
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
        await service.stop()
        assert int(refused.headers["retry-after"]) >= 1
        return [refused.status_code, alive.status_code]

    assert asyncio.run(run()) == [429, 200]


def test_each_request_is_logged_and_counted(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "actionclip_deploy.serve.access"):
        client.get("/v1/labels/none", headers={"x-request-id": "a-2"})
    (record,) = [each for each in caplog.records if each.name.endswith(".access")]
    fields = {"request_id": "a-2", "status": 404, "code": "unknown_bank", "method": "GET"}
    assert fields.items() <= vars(record).items()
    assert vars(record)["route"].endswith("/labels/{name}")
    numbers = client.get("/metrics").text
    assert 'actionclip_rejections_total{code="unknown_bank"} 1.0' in numbers


def test_methods_and_paths_of_strangers_make_no_metrics_of_their_own(client: TestClient) -> None:
    for n in range(3):
        client.request(f"ODD{n}", f"/odd/{n}")
    numbers = client.get("/metrics").text
    assert "odd" not in numbers.lower().replace('route="none"', "")
    assert 'method="other",route="none"' in numbers


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/healthz", "/v1/labels", "/v2", "/v2/health/live"]
)
@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1.attacker.example", "8.8.8.8", ""])
def test_a_request_for_another_host_is_refused(host: str, path: str, tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        answer = client.get(path, headers={"host": host})
    assert answer.status_code == 421
    assert "--allowed-host" in answer.text


def test_a_name_that_was_rebound_deletes_nothing(client: TestClient) -> None:
    headers = {"host": "attacker.example:8000", "origin": "http://attacker.example:8000"}
    refused = client.put("/v1/labels/new", json={"labels": ["a", "b"]}, headers=headers)
    assert refused.status_code == 421
    assert error_of(refused)["code"] == "unknown_host"
    assert client.get("/v1/labels/new").status_code == 404


KNOWN = {
    "127.0.0.1": ["localhost", "LocalHost:80", "127.0.0.1:8000", "[::1]:8000", "localhost."],
    "192.0.2.7": ["192.0.2.7:8000", "localhost:8000"],
    "gpu.example.org": ["gpu.example.org", "gpu.example.org:8000"],
    # What asks a pod or a container gives an address of its own, which nobody can rebind.
    "0.0.0.0": ["10.1.2.3:8000", "[fd00::2]:8000", f"{socket.gethostname()}:8000"],
    "::": ["10.1.2.3", "[fd00::2]"],
}


@pytest.mark.parametrize(("bound", "host"), [(b, h) for b, hosts in KNOWN.items() for h in hosts])
def test_a_server_answers_to_its_own_names(bound: str, host: str, tmp_path: Path) -> None:
    with running_app(tmp_path, host=bound) as client:
        assert client.get("/healthz", headers={"host": host}).status_code == 200
        other = client.get("/healthz", headers={"host": "attacker.example"})
        assert other.status_code == 421


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ("videos.example.org", "Videos.Example.org:8443", 200),
        ("videos.example.org", "other.example.org", 421),
        ("*.example.org", "a.b.example.org", 200),
        ("*.example.org", "badexample.org", 421),
        ("192.0.2.1", "192.0.2.1", 200),
        ("*", "attacker.example", 200),
    ],
)
def test_other_names_can_be_allowed(allowed: str, host: str, status: int, tmp_path: Path) -> None:
    with running_app(tmp_path, allowed_hosts=(allowed,)) as client:
        assert client.get("/v1/info", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://testserver", 202),
        ("https://testserver", 202),
        ("http://testserver:3000", 202),  # it was allowed by its name
        ("http://localhost", 403),
        ("https://attacker.example", 403),
        ("null", 403),
        ("", 403),
        (None, 202),
    ],
)
def test_pages_of_other_sites_change_nothing(
    origin: str | None, status: int, client: TestClient
) -> None:
    headers = {} if origin is None else {"origin": origin}
    answer = client.put("/v1/labels/new", json={"labels": ["a", "b"]}, headers=headers)
    assert answer.status_code == status
    for method in ("post", "delete"):
        answer = getattr(client, method)("/v1/labels/new", headers=headers)
        assert (answer.status_code == 403) == (status == 403)
    # Reading is left to the browser, which shows nothing of it to that page.
    assert client.get("/v1/labels", headers=headers).status_code == 200


def test_its_own_page_under_a_bound_name_changes_things(tmp_path: Path) -> None:
    headers = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}
    with running_app(tmp_path) as client:
        answer = client.put("/v1/labels/new", json={"labels": ["a", "b"]}, headers=headers)
        assert answer.status_code == 202
        headers["origin"] = "http://127.0.0.1:3000"
        assert client.post("/v2/repository/index", headers=headers).status_code == 403


@pytest.mark.parametrize("host", ["http://a.example", "a.example:80", "", "*.", "a b"])
def test_a_host_that_is_no_name_is_told(host: str) -> None:
    with pytest.raises(ValueError, match="without http:// and port"):
        ServerSettings(allowed_hosts=(host,))
