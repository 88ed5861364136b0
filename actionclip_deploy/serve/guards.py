"""What every request passes before it reaches a route, and what each connection is held to.

The guards of requests (id, key, limits, log) are plain ASGI, so that a body is counted as it
arrives, and a client that goes away ends its work. Those of connections are a protocol of uvicorn,
which by itself waits as long as a client likes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import resource
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.refusals import v2_refusals_error_body as error_body
from actionclip_deploy.serve.service import Service

access_logger = logging.getLogger("actionclip_deploy.serve.access")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_DISCONNECTED = 499
# Of a body that no route has read this much is read, so that the client gets to see the answer.
_DRAINED_BODIES = 2
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))

IDLE_SECONDS = 30.0
# Half of the files that this process may have open; uploads and processes need the others.
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_CONNECTIONS = sys.maxsize if _FILES == resource.RLIM_INFINITY else max(1, _FILES // 2)


class Guards:
    """Wraps the application of a service, which says whether requests are taken, and the limits."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._service)
        exchange = _Exchange(scope, send, body, self._service)
        metrics = self._service.metrics
        metrics.in_flight.inc()
        # One that is refused, and perhaps has no key, takes nobody's place while it is read.
        counts = 0
        with exchange.traced() as tell:
            try:
                self._admit(scope, exchange.headers)
                counts = int(is_api(scope["path"]))
                self._num_requests += counts
                await self._run(scope, body, exchange)
            except RequestRefusedError as exc:
                await exchange.refuse(exc)
            except asyncio.CancelledError:
                if self._service.is_ready:
                    raise
                body.give_up()
                await exchange.refuse(refusals.shutting_down())  # it ends before this was done
            finally:
                self._num_requests -= counts
                metrics.in_flight.dec()
                exchange.finish()
                tell(exchange.route, exchange.status)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        limits = self._service.limits
        if is_api(scope["path"]):
            self._check_key(headers)
            self._service.check_ready()
            if self._num_requests >= limits.requests:
                raise refusals.queue_full(
                    f"{limits.requests} requests are worked on, which is the limit; try again "
                    "after the time in Retry-After.",
                    retry_after_seconds=max(1.0, self._service.batcher.retry_after_seconds),
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise refusals.body_too_large(limits.body_bytes)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        keys = self._service.settings.api_keys
        if not keys:
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All keys are compared, whichever fits, so that time tells nothing.
        if not sum(hmac.compare_digest(given, key.encode()) for key in keys):
            raise RequestRefusedError(
                "The request has no key of this server; send one as `Authorization: Bearer KEY`.",
                status=401,
                code="no_key",
            )

    async def _run(self, scope: Scope, body: _Body, exchange: _Exchange) -> None:
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, body.receive, exchange.send)
            return
        scope["state"]["body"] = body
        work = asyncio.ensure_future(self._app(scope, body.receive, exchange.send))
        watch = asyncio.ensure_future(body.wait_for_disconnect())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            try:
                await work
            except (asyncio.CancelledError, ClientDisconnect):
                if not exchange.has_started:
                    exchange.status = _DISCONNECTED


class _Body:
    """Counts a body and its time, and tells when the client goes away after it."""

    def __init__(self, receive: Receive, service: Service) -> None:
        self._receive = receive
        self._limits = service.limits
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._num_bytes = 0
        self._is_over = asyncio.Event()
        self._is_gone = asyncio.Event()
        self._is_given_up = False
        self.read_seconds = 0.0

    async def receive(self) -> Message:
        """The next part of the body.

        Raises:
            RequestRefusedError: If there is more than allowed, or it is too slow.
        """
        if self._is_over.is_set():
            await self._is_gone.wait()
            return {"type": "http.disconnect"}
        limit = self._limits.body_seconds
        left = self._started + limit - self._loop.time()
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            raise refusals.slow_body(limit) from None
        if message["type"] == "http.disconnect":
            self._is_over.set()
            self._is_gone.set()
            return message
        self._num_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            self.read_seconds = self._loop.time() - self._started
            self._is_over.set()
        if self._num_bytes > self._limits.body_bytes:
            raise refusals.body_too_large(self._limits.body_bytes)
        return message

    async def wait_for_disconnect(self) -> None:
        """Return once the client is gone; what it sends before is the route's."""
        await self._is_over.wait()
        while not self._is_gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._is_gone.set()

    def give_up(self) -> None:
        """Read no more of it."""
        self._is_given_up = True

    async def drain(self, headers: dict[bytes, bytes]) -> bool:
        """Read what a request still sends, within bounds; gives whether that was all."""
        left = _DRAINED_BODIES * self._limits.body_bytes - self._num_bytes
        until = self._started + self._limits.body_seconds
        waits = b"expect" in headers  # for the word to send its body, which it does not get
        while not self._is_over.is_set():
            seconds = until - self._loop.time()
            if waits or self._is_given_up or left <= 0 or seconds <= 0:
                return False
            try:
                message = await asyncio.wait_for(self._receive(), seconds)
            except asyncio.TimeoutError:
                return False
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                self._is_gone.set()
            if not message.get("more_body", False):
                self._is_over.set()
        return True


class _Exchange:
    """One request and its answer, for headers, log and metrics."""

    def __init__(self, scope: Scope, send: Send, body: _Body, service: Service) -> None:
        self._scope = scope
        self._send = send
        self._body = body
        self._service = service
        self._started = time.perf_counter()
        self.has_started = False
        self.status = 500
        self.headers = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            extra = [(name, value) for name, value in _HEADERS if name not in names]
            extra.append((b"x-request-id", self.request_id.encode()))
            # A client that is still sending would not see an answer to a closed connection.
            if not await self._body.drain(self.headers):
                extra.append((b"connection", b"close"))
            message["headers"] = [*message["headers"], *extra]
            self.has_started = True
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, error: RequestRefusedError) -> None:
        if self.has_started:
            return
        self._scope["state"]["code"] = error.code
        body = json.dumps(error_body(self._scope["path"], error, self.request_id)).encode()
        headers = [(name.encode(), value.encode()) for name, value in refusal_headers(error)]
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", str(len(body)).encode()))
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})

    @property
    def route(self) -> str:
        return getattr(self._scope.get("route"), "path", None) or "none"

    @property
    def method(self) -> str:
        given = self._scope["method"]
        return given if given in _METHODS else "other"

    def traced(self) -> AbstractContextManager[Callable[[str, int], None]]:
        return self._service.tracer.request(self.method, self.headers, self.request_id)

    def finish(self) -> None:
        seconds = time.perf_counter() - self._started
        route, method = self.route, self.method
        code = self._scope["state"].get("code")
        metrics = self._service.metrics
        metrics.requests.labels(route, method, self.status).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if code is not None:
            metrics.rejections.labels(code).inc()
        access_logger.info(
            "%s %s %s",
            *(self._scope["method"], self._scope["path"], self.status),
            extra={
                "request_id": self.request_id,
                "method": self._scope["method"],
                "path": self._scope["path"],
                "route": route,
                "status": self.status,
                "code": code,
                "duration_ms": round(seconds * 1000, 3),
                "client": (self._scope.get("client") or ("", 0))[0],
            },
        )


def is_api(path: str) -> bool:
    """Whether a path is one that a key and a server that is ready are asked for."""
    return path.startswith(("/v1/", "/v2/")) and not path.startswith("/v2/health/")


def refusal_headers(error: RequestRefusedError) -> list[tuple[str, str]]:
    """Headers that go with a refusal, besides those of its body."""
    headers = []
    if error.retry_after_seconds is not None:
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after_seconds)))))
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return headers


class Connection(H11Protocol):
    """A connection that is closed once nothing has come of it for some time.

    That time runs until the head of a request is there as a whole, and while an answer is not read
    by its client: each takes a descriptor and perhaps memory, and one that sends requests without
    reading the answers takes the places of others. A slow body is the guards' matter, which answer.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a request
    _writing: asyncio.TimerHandle | None = None  # for the client to read
    _num_unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; one too many is closed at once."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait no longer if a request has begun."""
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read; nothing is written until it has."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """Wait for the client no longer."""
        super().resume_writing()
        self._stop_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        super().connection_lost(exc)
        self._stop_waiting()
        self._stop_writing()

    def _wait(self) -> None:
        cycle = vars(self).get("cycle")  # None before the first request
        if cycle is not None and not cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(IDLE_SECONDS, self._end_waiting)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _end_waiting(self) -> None:
        self._waiting = None
        self.timeout_keep_alive_handler()  # closes once what was written is read
        if self.transport.get_write_buffer_size() and self._writing is None:
            self._watch_writing()

    def _watch_writing(self) -> None:
        self._num_unsent_bytes = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(IDLE_SECONDS, self._end_writing)

    def _end_writing(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unsent_bytes:
            self._watch_writing()  # it reads, slowly
        else:
            self.transport.abort()


def make_config(app: FastAPI, *, drain_seconds: int) -> uvicorn.Config:
    """How uvicorn serves the application; told to end, it finishes for so long what has begun."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(IDLE_SECONDS),
        timeout_graceful_shutdown=drain_seconds,
    )
