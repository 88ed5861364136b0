"""Connections of clients that send no request, half of one, or do not read their answer.

uvicorn waits for these as long as they like; each takes a descriptor, perhaps memory, and one that
sends requests without reading the answers takes the places of others. A body that is slow is a
matter of the guards, which answer it.
"""

from __future__ import annotations

import asyncio
import math
import resource
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 30.0


def _max_connections() -> int:
    """Half of the files that this process may have open; uploads and processes need the others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 2)


MAX_CONNECTIONS = _max_connections()


class Connection(H11Protocol):
    """A connection that is closed once nothing has come of it for some time.

    That time runs until the head of a request is there as a whole, and while an answer is not read
    by its client.
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
        if self._is_working():
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

    def _is_working(self) -> bool:
        cycle = vars(self).get("cycle")  # None before the first request
        return cycle is not None and not cycle.response_complete

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
    """How uvicorn serves the application.

    Args:
        app: The application.
        drain_seconds: How long it finishes what has begun, when it is told to end.
    """
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
