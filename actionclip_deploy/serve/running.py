"""uvicorn around the application: listens at once, is ready later, ends without losing requests."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from actionclip_deploy.errors import ActionClipError, RuntimeUnavailableError
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.serve.connections import make_config
from actionclip_deploy.serve.service import Service

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 1024


class _Server(uvicorn.Server):
    """Ends with an ordinary return when it is told to end, and tells the service at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

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
        self.should_exit = True
        self._service.begin_stop()

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
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what has begun.

    Args:
        service: Not started yet.
        listening: The socket, see `listen`.
        on_ready: Called once requests are taken.

    Raises:
        ActionClipError: If the service does not start.
    """
    asyncio.run(_serve(service, listening, on_ready))


async def _serve(
    service: Service, listening: socket.socket, on_ready: Callable[[], None] | None
) -> None:
    app = create_app(service, manages_service=False)
    config = make_config(app, drain_seconds=math.ceil(service.settings.drain_seconds))
    server = _Server(config, service)
    failure: list[ActionClipError] = []

    async def start() -> None:
        try:
            await service.start()
        except ActionClipError as exc:
            failure.append(exc)
            server.should_exit = True
            return
        if service.is_ready and on_ready is not None:
            on_ready()

    starting = asyncio.ensure_future(start())
    try:
        await server.serve(sockets=[listening])
        if server.force_exit:
            await server.give_up()
        # Told to end while it was starting: verification ends by itself, in its thread.
        await starting
    finally:
        await service.stop()
    if failure:
        raise failure[0]
