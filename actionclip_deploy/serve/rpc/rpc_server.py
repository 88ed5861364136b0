"""The server of gRPC, in the event loop of HTTP, and what each of its calls passes first.

Each call is taken as a stream, also one of a single request: so it is looked at before its message
is read, and what has no key costs nothing. gRPC has no length in front of a message; the memory of
messages on their way is bounded by how many calls are read at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# gRPC's own lines are no JSON, and would stand among ours on standard error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health_pb2

from actionclip_deploy.errors import (
    ActionClipError,
    RequestRefusedError,
    RuntimeUnavailableError,
)
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.guards import (
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    count_request,
    given_key,
    log_request,
    request_id_of,
)
from actionclip_deploy.serve.oip import Inference
from actionclip_deploy.serve.oip.oip_tensors import VERSION
from actionclip_deploy.serve.rpc.wire import (
    METHODS,
    SERVICE,
    InferMessage,
    answer_message,
    look_through,
    read_message,
    stream_error,
    stream_message,
    write_message,
)
from actionclip_deploy.serve.service import Budget, Service

logger = logging.getLogger(__name__)

_STATUS = grpc.StatusCode
# For each status of HTTP that a refusal has the code of gRPC.
_CODES = {
    400: _STATUS.INVALID_ARGUMENT,
    401: _STATUS.UNAUTHENTICATED,
    404: _STATUS.NOT_FOUND,
    408: _STATUS.DEADLINE_EXCEEDED,
    413: _STATUS.INVALID_ARGUMENT,  # it is no better at the next try
    415: _STATUS.INVALID_ARGUMENT,
    422: _STATUS.INVALID_ARGUMENT,
    429: _STATUS.RESOURCE_EXHAUSTED,
    499: _STATUS.CANCELLED,
    501: _STATUS.UNIMPLEMENTED,
    503: _STATUS.UNAVAILABLE,
    504: _STATUS.DEADLINE_EXCEEDED,
}
_DISCONNECTED = 499
_HEALTH = "/grpc.health.v1.Health/"
_HEALTH_POLL_SECONDS = 0.5
_FREE = frozenset({"ServerLive", "ServerReady", "ServerMetadata"})  # as over HTTP, without a key

# Calls whose message is on its way at a time; each may hold one of the largest size. One more lets
# the oldest go that has been read for longer than this.
_READ_AT_A_TIME = 16
_UNDISTURBED_SECONDS = 1.0
_CALLS = 1024  # of any kind that are there at a time
_REFUSING_SECONDS = 0.5  # at the end, so that clients are told to go elsewhere
_IN_ORDER = 16  # requests of one stream that are worked on at a time
_IDLE_CONNECTION_SECONDS = 300.0
_PING_SECONDS = 30.0  # after which a connection that does nothing is asked whether it is there


def _options(body_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a port that is taken is refused
        ("grpc.max_receive_message_length", body_bytes),
        ("grpc.max_concurrent_streams", _CALLS),  # of a connection; a client waits with more
        # Calls that were not taken up yet; with more, gRPC cuts some off without a word.
        ("grpc.server.max_pending_requests", 4 * _CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 8 * _CALLS),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", round(IDLE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", round(_IDLE_CONNECTION_SECONDS * 1000)),
        ("grpc.keepalive_time_ms", round(_PING_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", round(IDLE_SECONDS * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # A message that no handler has asked for takes no more room than this.
        ("grpc.http2.bdp_probe", 0),
        # None but the identity: what is small on its way may be huge once it is unpacked.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


class RpcServer:
    """Answers the protocol, and the questions of grpc.health.v1, over gRPC.

    Args:
        inference: What does the work, HTTP's too.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._service = inference.service
        self._places = _ReadingPlaces()
        self._num_streams = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_ending = asyncio.Event()
        self._server: Any = None
        self.address = ""

    async def start(self) -> None:
        """Listen where the service's settings say.

        Raises:
            RuntimeUnavailableError: If that address cannot be listened on.
        """
        settings, limits = self._service.settings, self._service.limits
        host = settings.host
        host = f"[{host}]" if ":" in host else host
        self._server = grpc.aio.server(
            handlers=[_Handlers(self._handle)],
            options=_options(limits.body_bytes),
            maximum_concurrent_rpcs=_CALLS,
        )
        try:
            port = self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError as exc:
            raise RuntimeUnavailableError(
                f"Nothing can listen for gRPC on {settings.host} port {settings.grpc_port}; end "
                "what does, or choose another one with --grpc-port."
            ) from exc
        self.address = f"{host}:{port}"
        await self._server.start()

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and finish what has begun; what is not done in time is refused."""
        self._is_ending.set()
        until = asyncio.get_running_loop().time() + seconds
        # A connection that is closed at once cuts off what was just sent on it, without a word.
        await asyncio.sleep(min(seconds, _REFUSING_SECONDS))
        if self._tasks:
            left = until - asyncio.get_running_loop().time()
            await asyncio.wait(set(self._tasks), timeout=max(0.0, left))
        await self.give_up()

    async def give_up(self) -> None:
        """Refuse what has begun, and end."""
        if self._server is None:
            return
        self._is_ending.set()
        for task in set(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._server.stop(_REFUSING_SECONDS)  # so that what was answered is sent

    async def _handle(self, path: str, context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(_Call(path, context, self._service))
        finally:
            self._tasks.discard(task)

    async def _answer(self, call: _Call) -> None:
        """Serve a call, and tell its client, the log and the metrics how it went."""
        metrics = self._service.metrics
        metrics.in_flight.inc()
        with self._service.tracer.request("POST", call.headers, call.request_id) as tell:
            try:
                await self._serve(call)
                call.status = 200
            except asyncio.CancelledError:
                if self._service.is_ready:
                    call.status = _DISCONNECTED
                    raise
                call.refuse(refusals.shutting_down())  # it ends before this was done
            except ActionClipError as exc:
                call.refuse(refusals.of_error(exc))
            except grpc.aio.BaseError:  # its client went away while something was written or read
                call.status = _DISCONNECTED
            except Exception as exc:
                logger.exception("A call failed: %s", exc)
                call.refuse(refusals.failed())
            finally:
                metrics.in_flight.dec()
                call.finish()
                tell(call.route, call.status)

    async def _serve(self, call: _Call) -> None:
        if call.path.startswith(_HEALTH):
            await self._health(call, call.path.removeprefix(_HEALTH))
            return
        service, _, method = call.path.removeprefix("/").partition("/")
        if service != SERVICE or method not in METHODS:
            raise RequestRefusedError(
                f"There is no method {call.path[:100]!r}; there are {', '.join(METHODS)} of "
                f"{SERVICE}.",
                status=501,
                code="not_found",
            )
        call.route = call.path
        if method not in _FREE:
            self._service.check_key(given_key(call.headers))
        if method == "ModelStreamInfer":
            self._service.check_ready()
            await self._stream(call)
        elif method == "ModelInfer":
            self._service.check_ready()
            with self._service.place():
                data = await self._places.read(call, self._service.limits.body_seconds)
                answer = await self._infer(data, self._budget(call))
                await call.write(answer.SerializeToString())
        else:
            data = await self._places.read(call, self._service.limits.body_seconds)
            await call.write(self._tell(method, read_message(method, data)))

    def _tell(self, method: str, request: Any) -> bytes:
        """What a method answers that runs nothing."""
        inference, is_ready = self._inference, self._service.is_ready
        if method == "ServerLive":
            return write_message(method, {"live": True})
        if method == "ServerReady":
            return write_message(method, {"ready": is_ready})
        if method == "ServerMetadata":
            return write_message(method, inference.server())
        if method == "ModelReady":
            is_there = request.name in inference.models and request.version in ("", VERSION)
            return write_message(method, {"ready": is_ready and is_there})
        self._service.check_ready()
        if method == "RepositoryIndex":
            return write_message(method, {"models": [each.to_dict() for each in inference.index()]})
        model = inference.find(request.name, request.version or VERSION)
        if method == "ModelMetadata":
            return write_message(method, inference.metadata(model))
        return write_message(method, {"config": inference.config(model).to_dict()})

    def _budget(self, call: _Call) -> Budget:
        """The time of a request: the server's, or what its client waits for if that is less."""
        left = call.context.time_remaining()
        limit = self._service.limits.request_seconds
        return Budget.of(
            limit if left is None else min(max(left, 0.0), limit), read_seconds=call.read_seconds
        )

    async def _infer(self, data: bytes, budget: Budget) -> Any:
        with self._inference.memory.held(len(data)):
            message = look_through(data, max_bytes=self._service.limits.field_bytes)
            return await self._infer_message(message, budget)

    async def _infer_message(self, message: InferMessage, budget: Budget) -> Any:
        model = self._inference.find(message.model_name, message.model_version or VERSION)
        given, output = await self._inference.infer(
            model, lambda: message.read(model), num_bytes=message.num_bytes, budget=budget
        )
        return answer_message(model, output, given)

    async def _stream(self, call: _Call) -> None:
        """Answer the requests of a stream in their order; several are worked on at a time."""
        with self._open_stream():
            answers: deque[asyncio.Task[bytes]] = deque()
            ending = asyncio.ensure_future(self._is_ending.wait())
            reading: asyncio.Future[Any] | None = None
            is_open = True
            try:
                while is_open or answers:
                    if is_open and reading is None and len(answers) < _IN_ORDER:
                        reading = asyncio.ensure_future(call.context.read())
                    waited_for: set[asyncio.Future[Any]] = {*list(answers)[:1]}
                    waited_for |= {ending} if is_open else set()
                    waited_for |= {reading} if reading is not None else set()
                    await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
                    if reading is not None and reading.done():
                        data, reading = reading.result(), None
                        is_open = data is not grpc.aio.EOF
                        if is_open:
                            answers.append(asyncio.create_task(self._one_of_stream(call, data)))
                        del data  # it may be large
                    elif ending.done():
                        is_open = False
                    while answers and answers[0].done():
                        await call.write(answers.popleft().result())
            finally:
                for each in (ending, *answers, *([reading] if reading is not None else [])):
                    each.cancel()
        if self._is_ending.is_set():
            raise refusals.shutting_down()

    async def _one_of_stream(self, call: _Call, data: bytes) -> bytes:
        """Answer one request; if it is refused, it alone is."""
        started, status, code, request_id = time.perf_counter(), 200, None, ""
        try:
            self._service.check_ready()
            with self._service.place(), self._inference.memory.held(len(data)):
                message = look_through(data, max_bytes=self._service.limits.field_bytes)
                request_id = message.request_id[:1000]
                budget = self._service.budget()
                return stream_message(await self._infer_message(message, budget))
        except asyncio.CancelledError:
            status = _DISCONNECTED
            raise
        except ActionClipError as exc:
            error = refusals.of_error(exc)
            status, code = error.status, error.code
            return stream_error(refusals.message_of(error), request_id)
        except Exception as exc:
            logger.exception("A request of a stream failed: %s", exc)
            error = refusals.failed()
            status, code = error.status, error.code
            return stream_error(refusals.message_of(error), request_id)
        finally:
            seconds = time.perf_counter() - started
            count_request(
                self._service.metrics, f"{call.route}/request", "POST", status, code, seconds
            )

    @contextmanager
    def _open_stream(self) -> Iterator[None]:
        limit = self._service.limits.grpc_streams
        if self._num_streams >= limit:
            raise refusals.too_many_streams(limit)
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    async def _health(self, call: _Call, method: str) -> None:
        """grpc.health.v1, by which Kubernetes and load balancers ask; it needs no key."""
        if method not in ("Check", "Watch"):
            raise RequestRefusedError(
                f"There is no method {call.path[:100]!r}; there are Check and Watch.",
                status=501,
                code="not_found",
            )
        call.route = call.path
        data = await self._places.read(call, self._service.limits.body_seconds)
        try:
            name = health_pb2.HealthCheckRequest.FromString(data).service
        except Exception as exc:  # protobuf's error, which has no name here
            raise refusals.bad_request("The message is no HealthCheckRequest.") from exc
        states = health_pb2.HealthCheckResponse
        is_known = name in ("", SERVICE)
        if method == "Check":
            if not is_known:
                raise RequestRefusedError(
                    f"There is no service {name[:100]!r}; ask for {SERVICE}, or for none.",
                    status=404,
                    code="not_found",
                )
            await call.write(states(status=self._state(states)).SerializeToString())
            return
        with self._open_stream():
            told = None
            while not self._is_ending.is_set():
                state = self._state(states) if is_known else states.SERVICE_UNKNOWN
                if state != told:
                    await call.write(states(status=state).SerializeToString())
                    told = state
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._is_ending.wait(), _HEALTH_POLL_SECONDS)
            if is_known and told != states.NOT_SERVING:
                await call.write(states(status=states.NOT_SERVING).SerializeToString())

    def _state(self, states: Any) -> Any:
        return states.SERVING if self._service.is_ready else states.NOT_SERVING


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Gives every call to one function, as bytes and as a stream."""

    def __init__(self, handle: Callable[[str, Any], Awaitable[None]]) -> None:
        self._handle = handle

    def service(self, details: Any) -> Any:
        async def handle(_: Any, context: Any) -> None:
            await self._handle(details.method, context)

        return grpc.stream_stream_rpc_method_handler(handle)


class _Call:
    """One call and its answer, for its client, log and metrics."""

    def __init__(self, path: str, context: Any, service: Service) -> None:
        self.path = path
        self.context = context
        self.headers = {
            key.encode("latin-1"): value if isinstance(value, bytes) else value.encode("latin-1")
            for key, value in context.invocation_metadata() or ()
        }
        self.request_id = request_id_of(self.headers)
        self.route = "none"
        self.status = 500
        self.read_seconds = 0.0
        self._code: str | None = None
        self._metrics = service.metrics
        self._started = time.perf_counter()
        context.set_trailing_metadata((("x-request-id", self.request_id),))

    async def write(self, data: bytes) -> None:
        """Send a message.

        Raises:
            RequestRefusedError: If the client does not take it (499).
        """
        try:
            await asyncio.wait_for(self.context.write(data), IDLE_SECONDS)
        except asyncio.TimeoutError:
            raise refusals.not_taken(IDLE_SECONDS) from None

    def refuse(self, error: RequestRefusedError) -> None:
        """Let the call end with a refusal, whose code is that of the status of HTTP."""
        self.status, self._code = error.status, error.code
        told = [("x-request-id", self.request_id), ("actionclip-code", error.code)]
        if error.retry_after_seconds is not None:
            milliseconds = round(1000 * max(1.0, error.retry_after_seconds))
            told.append(("grpc-retry-pushback-ms", str(milliseconds)))
        self.context.set_trailing_metadata(tuple(told))
        self.context.set_code(_CODES.get(error.status, _STATUS.INTERNAL))
        self.context.set_details(refusals.message_of(error))

    def finish(self) -> None:
        """Count and log it."""
        seconds = time.perf_counter() - self._started
        count_request(self._metrics, self.route, "POST", self.status, self._code, seconds)
        log_request(
            request_id=self.request_id,
            method="POST",
            path=self.path,
            route=self.route,
            status=self.status,
            code=self._code,
            seconds=seconds,
            client=self.context.peer().partition(":")[2].rpartition(":")[0].strip("[]"),
        )


class _ReadingPlaces:
    """Bounds how many messages are on their way at a time, by letting those go that are slow."""

    def __init__(self) -> None:
        # What ends each, and since when it is read; the oldest comes first.
        self._reading: dict[asyncio.Future[None], float] = {}

    async def read(self, call: _Call, seconds: float) -> bytes:
        """The message of a call.

        Raises:
            RequestRefusedError: If there is none, it is too slow, or too many are on their way.
        """
        loop = asyncio.get_running_loop()
        await self._wait_for_place(loop.time() + seconds)
        leave, started = loop.create_future(), loop.time()
        self._reading[leave] = started
        reading = asyncio.ensure_future(call.context.read())
        try:
            await asyncio.wait(
                {reading, leave}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not reading.done():
                raise refusals.slow_body(round(loop.time() - started, 1))
            data = reading.result()
        finally:
            reading.cancel()
            leave.cancel()
            del self._reading[leave]
        if data is grpc.aio.EOF:
            raise refusals.bad_request("The call has no message; send one.")
        call.read_seconds = loop.time() - started
        assert isinstance(data, bytes)
        return data

    async def _wait_for_place(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        while len(self._reading) >= _READ_AT_A_TIME:
            staying = {each: since for each, since in self._reading.items() if not each.done()}
            if not staying:  # they are told already
                await asyncio.sleep(0)
                continue
            oldest, since = next(iter(staying.items()))
            left = since + _UNDISTURBED_SECONDS - loop.time()
            if left <= 0:
                oldest.set_result(None)
            elif loop.time() >= until:
                raise refusals.queue_full(
                    f"{_READ_AT_A_TIME} messages are on their way, which is the limit; try again "
                    "in a moment.",
                    retry_after_seconds=refusals.RETRY_SECONDS,
                )
            else:
                await asyncio.wait(
                    set(staying),
                    timeout=min(left, until - loop.time()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
