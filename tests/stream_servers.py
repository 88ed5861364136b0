"""Servers of streams on this machine, and what can go wrong between them and a reader.

Tests import it by name: `from stream_servers import RtspServer`.
"""

from __future__ import annotations

import contextlib
import io
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
from PIL import Image

from actionclip_deploy.video import LiveFrame, LiveReader

HOST = "127.0.0.1"
DEADLINE_SECONDS = 120.0  # of a busy machine; nothing waits so long where all is right

_RTSP_PROGRAM = """
import asyncio, sys
from aio_rtsp_toolkit import server
asyncio.run(server.serve(sys.argv[1], "127.0.0.1", int(sys.argv[2])))
"""


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


class RtspServer:
    """Serves the files of a folder by RTSP, in a process of its own.

    aio-rtsp-toolkit, which needs nothing but Python; it gives a file in the pace of its clock.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RtspServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        command = [sys.executable, "-c", _RTSP_PROGRAM, str(self._folder), str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(self.port)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def served(handle: Callable[[socket.socket], None], port: int = 0) -> Iterator[int]:
    """Handle each connection in a thread; gives the port."""

    connections: list[socket.socket] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connections.append(self.request)
            with contextlib.suppress(OSError):
                handle(self.request)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

    with Server((HOST, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def served_by_http(
    answer: Callable[[BaseHTTPRequestHandler], None], port: int = 0
) -> Iterator[int]:
    """Answer each GET by a function; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        block_on_close = False

    with Server((HOST, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def send_mjpeg(handler: BaseHTTPRequestHandler, pictures: Iterator[np.ndarray]) -> None:
    """Answer as cameras do: parts that replace each other, without any times."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
    handler.end_headers()
    for pixels in pictures:
        data = jpeg(pixels)
        handler.wfile.write(
            b"--part\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
            + data
            + b"\r\n"
        )


class Proxy:
    """Stands between a reader and a server, and can fall silent or cut the connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.is_stalled = threading.Event()
        self.bytes_until_cut: int | None = None

    def handle(self, client: socket.socket) -> None:
        with socket.create_connection((HOST, self._port)) as server:
            back = threading.Thread(target=self._copy, args=(client, server), daemon=True)
            back.start()
            num_bytes = 0
            while data := server.recv(2**14):
                while self.is_stalled.is_set():
                    time.sleep(0.02)
                limit = self.bytes_until_cut
                if limit is not None and num_bytes + len(data) > limit:
                    client.sendall(data[: limit - num_bytes])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                num_bytes += len(data)
                client.sendall(data)

    def _copy(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(2**14):
                server.sendall(data)


def make_certificate(folder: Path, names: str = f"IP:{HOST}") -> tuple[Path, ssl.SSLContext]:
    """A certificate that only who has its file trusts; gives that file, and what serves by it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=camera"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", f"subjectAltName={names}"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


class TlsProxy(Proxy):
    """Takes TLS, and gives what is in it to a server that knows none."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        self._context = context

    def handle(self, client: socket.socket) -> None:
        with self._context.wrap_socket(client, server_side=True) as secure:
            super().handle(secure)


class Watch:
    """Reads a source in a thread, and waits for what becomes of it."""

    def __init__(self, reader: LiveReader) -> None:
        self.reader = reader
        self.stop = threading.Event()
        self.frames: list[LiveFrame] = []
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        for frame in self.reader.frames(self.stop):
            self.frames.append(frame)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "it does not stop"

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"{what}: {self.reader.state}"
            time.sleep(0.01)

    def until_frames(self, num_more: int = 1) -> None:
        wanted = len(self.frames) + num_more
        self.until(lambda: len(self.frames) >= wanted, f"{num_more} frames")

    def until_lost(self) -> str:
        self.until(lambda: self.reader.state.state == "lost", "lost")
        return self.reader.state.last_error or ""


def transport_stream(path: Path, pictures: list[np.ndarray], *, rate: int = 25) -> Path:
    """Write an MPEG transport stream, each tenth frame a key frame."""
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w", format="mpegts") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"tune": "zerolatency", "g": "10"}
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path
