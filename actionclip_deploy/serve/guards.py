"""What every request passes before it reaches a route, and what each connection is held to.

The guards of requests (id, key, limits, log) are plain ASGI, so that a body is counted as it
arrives, and a client that goes away ends its work. Those of connections are a protocol of uvicorn,
which by itself waits as long as a client likes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import resource
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from ipaddress import ip_address
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.records import printable
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.observability import ServerMetrics
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.settings import ServerSettings, normal_host

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

# A connection that is closed with bytes unread is reset, and a reset may overtake the answer: what
# a client still sends is read for so long, and no further than this.
_LINGER_SECONDS = 2.0
_LONGEST_LINGER_SECONDS = 10.0  # while a client does send
_IGNORED_BYTES = 1024 * 1024
_TINY_PIECES = "tiny_pieces"  # what a connection tells its request, in the request's state
# Pieces of bodies that one connection gives before others have their turn: about 3 ms.
_PIECES_AT_ONCE = 64
# Pieces that a body may have, and how long the others have to be on average: each takes as long as
# 64 KiB do, and a body of single bytes takes a hundred thousand times what it is worth.
_FREE_PIECES = 4096
_PIECE_BYTES = 16

IDLE_SECONDS = 30.0
# Half of the files that this process may have open; uploads and processes need the others.
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_CONNECTIONS = sys.maxsize if _FILES == resource.RLIM_INFINITY else max(1, _FILES // 2)


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::"})  # compared with, not bound to
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{0,5}))?")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class KnownHosts:
    """The names by which a server may be asked, and the pages that may change something in it.

    A web page can give its own name the address of the visitor's machine (DNS rebinding), and its
    scripts then read and write a server there as if it were the page's own. Such requests carry the
    page's name in Host. An address in numbers cannot be given to anyone like that, so a server that
    listens on every address takes all of them: those of its machine, of its container or pod, and
    of what forwards to it. Beside them it takes the machine's name; no name is looked up, because
    what answers may be the attacker's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        allowed = settings.allowed_hosts
        self._takes_all = "*" in allowed
        # Of other sites, the pages of these may ask for changes too.
        self._allowed = {normal_host(each) for each in allowed if not each.startswith("*")}
        self._domains = tuple(f".{normal_host(each[2:])}" for each in allowed if each[:2] == "*.")
        self._takes_addresses = settings.host in _EVERY_ADDRESS
        bound = socket.gethostname() if self._takes_addresses else settings.host
        self._names = _LOOPBACK | {normal_host(bound)} | self._allowed

    def check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse a request for another host, or for a change from a page of another site.

        Raises:
            RequestRefusedError: 421 for the host, 403 for the page.
        """
        given = headers.get(b"host")
        # Without the header it is HTTP/1.0, which browsers do not speak and simple probes do.
        if self._takes_all or given is None:
            return
        asked = given.decode("latin-1").strip()
        host, port = _host_and_port(asked)
        if host is None or not self._is_own(host, scope):
            raise refusals.unknown_host(asked)
        if scope["method"] in _READING or b"origin" not in headers:
            return
        origin = headers[b"origin"].decode("latin-1").strip()
        page_host, page_port = _host_and_port(origin.partition("://")[2])
        if (page_host, page_port) != (host, port) and not self._is_allowed(page_host):
            raise refusals.foreign_origin(origin)

    def _is_own(self, host: str, scope: Scope) -> bool:
        if host in self._names or self._is_allowed(host):
            return True
        try:
            ip_address(host)
        except ValueError:
            return False
        # `--host` may be a name: then the address is the one that the connection came to.
        return self._takes_addresses or host == normal_host((scope.get("server") or ("",))[0])

    def _is_allowed(self, host: str | None) -> bool:
        return host is not None and (host in self._allowed or host.endswith(self._domains))


def _host_and_port(authority: str) -> tuple[str | None, str]:
    found = _AUTHORITY.fullmatch(authority)
    return (None, "") if found is None else (normal_host(found[1]), found[2] or "")


class Guards:
    """Wraps the application of a service, which says whether requests are taken, and the limits."""

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service
        self._hosts = KnownHosts(service.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if (
            method == "HEAD"
        ):  # every route that has GET answers, and the exchange leaves the body out
            scope = {**scope, "method": "GET"}
        state = scope.setdefault("state", {})
        state["is_head"] = method == "HEAD"  # for a route whose body has no end
        body = _Body(receive, self._service, state)
        exchange = _Exchange(scope, method, send, body, self._service)
        metrics = self._service.metrics
        metrics.in_flight.inc()
        with exchange.traced() as tell, ExitStack() as places:
            try:
                exchange.check_framing()
                # One that is refused, perhaps for want of a key, takes nobody's place.
                self._admit(scope, exchange.headers, places)
                await self._run(scope, body, exchange)
            except RequestRefusedError as exc:
                await exchange.refuse(exc)
            except asyncio.CancelledError:
                if self._service.is_ready:
                    raise
                body.give_up()
                await exchange.refuse(refusals.shutting_down())  # it ends before this was done
            finally:
                places.close()
                metrics.in_flight.dec()
                exchange.finish()
                tell(exchange.route, exchange.status)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes], places: ExitStack) -> None:
        limits = self._service.limits
        self._hosts.check(scope, headers)
        if is_api(scope["path"]):
            key = given_key(headers)
            if key or not self._service.has_ticket(scope["path"], scope.get("query_string", b"")):
                self._service.check_key(key)
            self._service.check_ready()
            places.enter_context(self._service.place())
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise refusals.body_too_large(limits.body_bytes)

    async def _run(self, scope: Scope, body: _Body, exchange: _Exchange) -> None:
        if scope["method"] == "GET":
            await self._app(scope, body.receive, exchange.send)
            return
        scope["state"]["body"] = body
        work = asyncio.ensure_future(self._app(scope, body.receive, exchange.send))
        watch = asyncio.ensure_future(body.wait_for_disconnect())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_gone = watch.done()
            watch.cancel()
            if not work.done():
                work.cancel()
            try:
                await work
            except (asyncio.CancelledError, ClientDisconnect) as exc:
                if isinstance(exc, asyncio.CancelledError) and not (
                    is_gone or exchange.has_started
                ):
                    raise  # the server ends, and the client, who is there, is told
                if not exchange.has_started:
                    exchange.status = _DISCONNECTED


class _Body:
    """Counts a body and its time, and tells when the client goes away after it."""

    def __init__(self, receive: Receive, service: Service, state: dict[str, Any]) -> None:
        self._receive = receive
        self._state = state
        self._limits = service.limits
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._num_bytes = 0
        self._is_over = asyncio.Event()
        self._is_gone = asyncio.Event()
        self._is_given_up = False
        self._is_watched = False
        self.read_seconds = 0.0

    async def receive(self) -> Message:
        """The next part of the body.

        Raises:
            RequestRefusedError: If there is more than allowed, or it is too slow.
        """
        if self._is_over.is_set():
            if self._is_watched:
                await self._is_gone.wait()
            else:  # of a GET nobody else asks, and its answer may be one without an end
                await self.wait_for_disconnect()
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
        if _TINY_PIECES in self._state:
            raise refusals.tiny_pieces(_PIECE_BYTES)
        return message

    async def wait_for_disconnect(self) -> None:
        """Return once the client is gone; what it sends before is the route's."""
        self._is_watched = True
        try:
            await self._is_over.wait()
            while not self._is_gone.is_set():
                if (await self._receive())["type"] == "http.disconnect":
                    self._is_gone.set()
        finally:
            self._is_watched = False

    def give_up(self) -> None:
        """Read no more of it."""
        self._is_given_up = True

    async def drain(self, headers: dict[bytes, bytes]) -> bool:
        """Read what a request still sends, within bounds; gives whether that was all."""
        if b"expect" in headers:  # it waits for the word to send its body, which it does not get
            return self._is_over.is_set()
        return await self._read_on(self._started + self._limits.body_seconds, math.inf)

    async def linger(self) -> None:
        """After an answer, read on until the client has seen it and goes away, within bounds."""
        await self._read_on(self._loop.time() + _LONGEST_LINGER_SECONDS, _LINGER_SECONDS)

    async def _read_on(self, until: float, patience_seconds: float) -> bool:
        """Throw away what comes, and give whether that was all.

        Args:
            until: When to stop, in the loop's time.
            patience_seconds: How long to wait for each part.
        """
        while not self._is_over.is_set():
            seconds = min(until - self._loop.time(), patience_seconds)
            is_given_up = self._is_given_up or _TINY_PIECES in self._state
            # All that was read of this body counts, whoever has read it.
            is_enough = self._num_bytes >= _DRAINED_BODIES * self._limits.body_bytes
            if is_given_up or is_enough or seconds <= 0:
                return False
            try:
                message = await asyncio.wait_for(self._receive(), seconds)
            except asyncio.TimeoutError:
                return False
            self._num_bytes += len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                self._is_gone.set()
            if not message.get("more_body", False):
                self._is_over.set()
        return True


class _Exchange:
    """One request and its answer, for headers, log and metrics."""

    def __init__(
        self, scope: Scope, method: str, send: Send, body: _Body, service: Service
    ) -> None:
        self._scope = scope
        self._given_method = method
        self._closes = False
        self._send = send
        self._body = body
        self._service = service
        self._started = time.perf_counter()
        self.has_started = False
        self.status = 500
        self.headers = dict(scope["headers"])
        self.request_id = request_id_of(self.headers)
        scope["state"]["request_id"] = self.request_id

    def check_framing(self) -> None:
        """Refuse a body whose end a proxy may see elsewhere: what follows could be anyone's.

        Raises:
            RequestRefusedError: If it is one (400); the connection is closed after the answer.
        """
        if b"transfer-encoding" not in self.headers:
            return
        if b"content-length" in self.headers or self._scope.get("http_version") == "1.0":
            self._closes = True
            raise refusals.bad_request(
                "The request has Transfer-Encoding together with Content-Length or HTTP/1.0, so "
                "its end is not certain; send one of the two lengths."
            )

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            extra = [(name, value) for name, value in _HEADERS if name not in names]
            extra.append((b"x-request-id", self.request_id.encode()))
            # A client that is still sending would not see an answer to a closed connection.
            if not await self._body.drain(self.headers):
                self._closes = True
            if self._closes:
                extra.append((b"connection", b"close"))
            message["headers"] = [*message["headers"], *extra]
            self.has_started = True
            self.status = message["status"]
        elif self._given_method == "HEAD":
            message = {**message, "body": b""}
        if self._closes and self.has_started and _is_last(message):
            # Its end closes the connection, so that comes once the client has seen the rest.
            await self._send({**message, "more_body": True})
            await self._body.linger()
            message = {"type": message["type"], "body": b""}
        await self._send(message)

    async def refuse(self, error: RequestRefusedError) -> None:
        if self.has_started:
            return
        self._scope["state"]["code"] = error.code
        body = refusals.error_body(self._scope["path"], error, self.request_id)
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
        given = self._given_method
        return given if given in _METHODS else "other"

    def traced(self) -> AbstractContextManager[Callable[[str, int], None]]:
        return self._service.tracer.request(self.method, self.headers, self.request_id)

    def finish(self) -> None:
        seconds = time.perf_counter() - self._started
        code = self._scope["state"].get("code")
        count_request(self._service.metrics, self.route, self.method, self.status, code, seconds)
        log_request(
            request_id=self.request_id,
            method=self._given_method,
            path=self._scope["path"],
            route=self.route,
            status=self.status,
            code=code,
            seconds=seconds,
            client=(self._scope.get("client") or ("", 0))[0],
        )


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def is_api(path: str) -> bool:
    """Whether a path is one that a key and a server that is ready are asked for."""
    return path.startswith(("/v1/", "/v2/")) and not path.startswith("/v2/health/")


def given_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a request brings; empty where it brings none."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The id that a request brings, or a new one where it brings none that can be used."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def count_request(
    metrics: ServerMetrics, route: str, method: str, status: int, code: str | None, seconds: float
) -> None:
    """Count a request that was answered."""
    metrics.requests.labels(route, method, status).inc()
    metrics.request_seconds.labels(route).observe(seconds)
    if code is not None:
        metrics.rejections.labels(code).inc()


def log_request(
    *,
    request_id: str,
    method: str,
    path: str,
    route: str,
    status: int,
    code: str | None,
    seconds: float,
    client: str,
) -> None:
    """Write a request that was answered into the log."""
    access_logger.info(
        "%s %s %s",
        *(method, printable(path, kept=""), status),
        extra={
            "request_id": request_id,
            "method": method,
            "path": path,
            "route": route,
            "status": status,
            "code": code,
            "duration_ms": round(seconds * 1000, 3),
            "client": client,
        },
    )


def refusal_headers(error: RequestRefusedError) -> list[tuple[str, str]]:
    """Headers that go with a refusal, besides those of its body."""
    headers = []
    if error.retry_after_seconds is not None:
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after_seconds)))))
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return headers


class _Flow(FlowControl):
    """Lets nobody resume reading while the pieces that were read are still being given out."""

    _is_held = False

    def hold(self) -> None:
        self._is_held = True
        self.pause_reading()

    def release(self) -> None:
        self._is_held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        if not self._is_held:
            super().resume_reading()


class _Parser(h11.Connection):
    """Gives the pieces of bodies a few at a time, and counts them.

    uvicorn takes all that h11 finds in what was read at once: of a body in chunks of single bytes,
    forty thousand, which takes seconds in which nobody else is answered.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self.num_left = 0
        self._num_pieces = self._num_bytes = 0

    def next_event(self) -> Any:
        if self.num_left <= 0:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_left -= 1
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self.has_tiny_pieces:
                self.num_left = 0
        return event

    @property
    def has_tiny_pieces(self) -> bool:
        return self._num_pieces > _FREE_PIECES + self._num_bytes // _PIECE_BYTES


class Connection(H11Protocol):
    """A connection that is closed once nothing has come of it for some time.

    That time runs until the head of a request is there as a whole, and while an answer is not read
    by its client: each takes a descriptor and perhaps memory, and one that sends requests without
    reading the answers takes the places of others. A slow body is the guards' matter, which answer.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a request
    _writing: asyncio.TimerHandle | None = None  # for the client to read
    _num_unsent_bytes = 0
    _going_on: asyncio.Handle | None = None  # with pieces that were read and not given out yet
    _is_deaf = False  # what still comes is of no interest
    _num_ignored_bytes = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn: _Parser = _Parser()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; one too many is closed at once."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait no longer if a request has begun."""
        if self._is_deaf:
            self._num_ignored_bytes += len(data)
            if self._num_ignored_bytes > _IGNORED_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        self._wait()

    def handle_events(self) -> None:
        """Give out what was read, of a body a few pieces and the others in the next round."""
        self.conn.num_left = _PIECES_AT_ONCE
        super().handle_events()
        if self._is_deaf or self.transport.is_closing():
            return
        if self.conn.has_tiny_pieces:
            self._is_deaf = True
            self.cycle.scope["state"][_TINY_PIECES] = True
            self.cycle.message_event.set()
        elif self.conn.num_left <= 0 and self._going_on is None:
            self.flow.hold()
            self._going_on = self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._going_on = None
        self.flow.release()
        if not self.transport.is_closing():
            self.handle_events()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with a sentence, and close once that may have been read."""
        self._is_deaf = True
        if self.cycle is not None:  # what it was a body of
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = refusals.bad_request(
            f"{msg.removesuffix('.')}: it is not as HTTP/1.1 has it; send it by an HTTP client."
        )
        body = refusals.error_body("", error, uuid.uuid4().hex)
        headers = [
            *(*_HEADERS, (b"content-type", b"application/json"), (b"connection", b"close")),
            (b"content-length", str(len(body)).encode()),
        ]
        response = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

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
        if self._going_on is not None:
            self._going_on.cancel()

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
