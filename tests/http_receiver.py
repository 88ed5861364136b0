"""A server that takes webhooks, and answers as a test wants.

Tests import it by name: `from http_receiver import receiving`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_SECONDS = 60.0  # of a busy machine; nothing waits so long where all is right


@dataclass(frozen=True)
class Post:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came, and what is answered: statuses in order, the last one for ever.

    A status "hang" is no answer until the test is over, and "drop" closes the connection.
    """

    statuses: list[Any] = field(default_factory=lambda: [204])
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    posts: list[Post] = field(default_factory=list)
    url: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_over: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, num_posts: int) -> None:
        """Wait until so many requests came."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.posts) >= num_posts, WAIT_SECONDS)


@contextmanager
def receiving(
    statuses: Sequence[Any] = (204,), headers: Mapping[str, str] | None = None
) -> Iterator[Receiver]:
    """Run it for the time of a block."""
    receiver = Receiver(list(statuses), headers or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with receiver.changed:
                receiver.posts.append(Post(self.path, dict(self.headers.items()), body))
                status = receiver.statuses[0]
                if len(receiver.statuses) > 1:
                    receiver.statuses.pop(0)
                receiver.changed.notify_all()
            if status == "hang":
                receiver.is_over.wait()
            if status in ("hang", "drop"):
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in receiver.answer_headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
