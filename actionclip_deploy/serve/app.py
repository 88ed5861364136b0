"""The ASGI application, and uvicorn around it.

    app = create_app(Service(bundle, runtime, ServerSettings()))

The application is the routes, the guards in front of them, and errors as statuses with one
sentence. `serve` runs it: it listens at once, so that /readyz can say that the service is not ready
yet, and ends without losing requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from actionclip_deploy import __version__
from actionclip_deploy.errors import (
    ActionClipError,
    MissingExtraError,
    RequestRefusedError,
    RuntimeUnavailableError,
)
from actionclip_deploy.serve import oip, page, refusals, v1
from actionclip_deploy.serve.guards import Guards, make_config, refusal_headers
from actionclip_deploy.serve.observability import ServerMetrics
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.uploads import Spool

_CODES = {404: "not_found", 405: "method_not_allowed", 416: "no_such_range"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 1024
_POLL_SECONDS = 0.1

if TYPE_CHECKING:
    from actionclip_deploy.serve.rpc.rpc_server import RpcServer


def create_app(
    service: Service, *, manages_service: bool = True, inference: oip.Inference | None = None
) -> FastAPI:
    """Make the application.

    Args:
        service: What does the work.
        manages_service: Whether the application starts the service before it takes requests, and
            stops it in the end, as is right under another server than `serve`.
        inference: The inference protocol of this service, where gRPC speaks it as well.
    """
    spool = Spool(service.settings.spool_folder, max_bytes=service.limits.spool_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with spool:
            if not manages_service:
                yield
                return
            await service.start()
            try:
                yield
            finally:
                await service.stop()

    app = FastAPI(
        title="ActionCLIP",
        version=__version__,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere; `page` has one at /docs that does not.
        docs_url=None,
        redoc_url=None,
    )
    # Guards ask for the key; this is for the document, where a page can then be given one.
    key = [Security(HTTPBearer(auto_error=False))] if service.settings.api_keys else []
    app.include_router(
        v1.make_router(service, spool), tags=["Videos and label banks"], dependencies=key
    )
    inference = inference or oip.Inference(service)
    app.include_router(oip.make_router(inference), tags=["Inference protocol"], dependencies=key)
    app.include_router(_make_router(service), tags=["The server"])
    source = service.manifest.source.file
    app.include_router(page.make_router(spool.folder, source, service.texts.vocabulary))
    _add_error_handlers(app)
    app.add_middleware(Guards, service=service)
    return app


def _make_router(service: Service) -> APIRouter:
    """Routes about the server itself: is it alive, is it ready, its metrics. They need no key."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @router.get("/readyz", responses={503: {"description": "Not ready, or ending."}})
    async def readyz() -> Response:
        """Whether it is verified, warm, and takes requests."""
        status = 200 if service.is_ready else 503
        return JSONResponse({"status": service.state}, status_code=status)

    content = {ServerMetrics.content_type: {"schema": {"type": "string"}}}

    @router.get("/metrics", responses={200: {"content": content}}, response_class=Response)
    async def metrics() -> Response:
        """What Prometheus reads."""
        await service.update_metrics()
        return Response(service.metrics.render(), media_type=ServerMetrics.content_type)

    return router


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ActionClipError)
    async def refused(request: Request, exc: ActionClipError) -> Response:
        return _answer(request, refusals.of_error(exc))

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, exc: RequestValidationError) -> Response:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _answer(request, refusals.bad_value(f"{where}: {first['msg']}; see /openapi.json."))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, exc: HTTPException) -> Response:
        status = exc.status_code
        error = RequestRefusedError(
            f"{HTTPStatus(status).phrase}: {request.method} {request.url.path}; "
            "see /openapi.json for what there is.",
            status=status,
            code=_CODES.get(status, "bad_request"),
        )
        headers = dict(exc.headers or {})
        allowed = {each.strip() for each in headers.get("Allow", "").split(",")}
        if "GET" in allowed:  # the guards answer HEAD wherever there is GET
            headers["Allow"] = ", ".join(sorted(allowed | {"HEAD"}))
        return _answer(request, error, headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, exc: Exception) -> Response:  # noqa: ARG001
        # Outside of the guards, which have logged it; who serves the application logs the reason.
        return _answer(request, refusals.failed(), {"x-request-id": request.state.request_id})


def _answer(
    request: Request, error: RequestRefusedError, headers: dict[str, str] | None = None
) -> Response:
    request.state.code = error.code
    return Response(
        refusals.error_body(request.url.path, error, request.state.request_id),
        error.status,
        headers={**dict(refusal_headers(error)), **(headers or {})},
        media_type="application/json",
    )


class _Server(uvicorn.Server):
    """Ends with an ordinary return when it is told to end, and tells the service at once."""

    def __init__(
        self, config: uvicorn.Config, service: Service, rpc_server: RpcServer | None
    ) -> None:
        super().__init__(config)
        self._service = service
        self._rpc_server = rpc_server
        self.ended_by: int | None = None  # the signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.force_exit = self.should_exit  # at the second signal
        self.ended_by = sig
        self.should_exit = True
        self._service.begin_stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what has begun over HTTP and, at the same time, over gRPC."""
        if self._rpc_server is None:
            await super().shutdown(sockets)
            return
        draining = asyncio.ensure_future(
            self._rpc_server.drain(self._service.settings.drain_seconds)
        )
        await super().shutdown(sockets)
        while not (draining.done() or self.force_exit):
            await asyncio.wait({draining}, timeout=_POLL_SECONDS)
        if not draining.done():
            await self._rpc_server.give_up()
        await draining

    async def give_up(self) -> None:
        """Refuse what has begun, and end the application as an ordinary end does."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.lifespan.shutdown()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        RuntimeUnavailableError: If the address cannot be listened on.
    """
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as exc:
        if listening is not None:
            listening.close()
        raise RuntimeUnavailableError(
            f"Nothing can listen on {host} port {port} ({exc.strerror}); "
            "end what does, or choose others with --host and --port."
        ) from exc
    listening.listen(_BACKLOG)
    return listening


def serve(
    service: Service,
    listening: socket.socket,
    *,
    on_ready: Callable[[str | None], None] | None = None,
) -> int | None:
    """Start the service and serve until SIGTERM or SIGINT, then finish what has begun.

    Args:
        service: Not started yet.
        listening: The socket, see `listen`.
        on_ready: Called once requests are taken, with the address of gRPC, if it is served.

    Returns:
        The signal that ended it.

    Raises:
        MissingExtraError: If gRPC is asked for and not installed.
        ActionClipError: If the service does not start.
        Exception: If something failed at the start that nobody foresaw.
    """
    return asyncio.run(_serve(service, listening, on_ready))


def _rpc_server(inference: oip.Inference) -> RpcServer | None:
    """The server of gRPC, if the settings ask for it."""
    if inference.service.settings.grpc_port is None:
        return None
    try:
        from actionclip_deploy.serve.rpc.rpc_server import RpcServer
    except ImportError as exc:
        raise MissingExtraError("--grpc-port", "grpc") from exc
    return RpcServer(inference)


async def _serve(
    service: Service, listening: socket.socket, on_ready: Callable[[str | None], None] | None
) -> int | None:
    inference = oip.Inference(service)
    app = create_app(service, manages_service=False, inference=inference)
    config = make_config(app, drain_seconds=math.ceil(service.settings.drain_seconds))
    rpc_server = _rpc_server(inference)
    if rpc_server is not None:
        await rpc_server.start()
    server = _Server(config, service, rpc_server)
    failure: list[Exception] = []

    async def start() -> None:
        try:
            await service.start()
            if service.is_ready and on_ready is not None:
                on_ready(None if rpc_server is None else rpc_server.address)
        # Whatever it is, nobody else would see it, and the server would be starting for ever.
        except Exception as exc:  # noqa: BLE001  # raised below
            failure.append(exc)
            server.should_exit = True

    starting = asyncio.ensure_future(start())
    try:
        await server.serve(sockets=[listening])
        if server.force_exit:
            await server.give_up()
        # Told to end while it was starting: verification ends by itself, in its thread.
        await starting
    finally:
        if rpc_server is not None:  # where HTTP did not begin, or failed
            await rpc_server.give_up()
        await service.stop()
    if failure:
        raise failure[0]
    if not server.started and not server.should_exit:
        raise RuntimeUnavailableError(
            "The server did not begin to take requests; its log has the reason."
        )
    return server.ended_by
