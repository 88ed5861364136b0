"""A server that listens on a real port, in a thread of the test's own process.

Tests import it by name: `from threaded_server import ThreadedServer`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import uvicorn
from serving import make_service

from actionclip_deploy import Client
from actionclip_deploy.serve.app import create_app, listen
from actionclip_deploy.serve.service import Service

DEADLINE_SECONDS = 120.0


class ThreadedServer:
    """A server in a thread, on a port that was free.

    Args:
        folder: Of its bundle, see `serving.make_service`; or a service that is not started yet.
        port: By default one that is free.
        options: Of `make_service`.
    """

    def __init__(self, folder: Path | Service, *, port: int = 0, **options: Any) -> None:
        self.service = make_service(folder, **options) if isinstance(folder, Path) else folder
        self._listening = listen("127.0.0.1", port)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(create_app(self.service), log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],))

    def __enter__(self) -> ThreadedServer:
        self._thread.start()
        with Client(self.url) as client:
            client.wait_until_ready(DEADLINE_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.service.begin_stop()  # as at a signal; those who listen for events would stay
        self._server.should_exit = True
        self._thread.join(DEADLINE_SECONDS)
        self._listening.close()
        assert not self._thread.is_alive()
