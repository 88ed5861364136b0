"""What live sources do when something goes wrong, and within which time they are back.

Needs the programs `ffmpeg` (5 or newer) and, for one of the servers, Debian's GStreamer:
`apt install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-ugly python3-gi`. A server whose
program is missing is left out, and said so. Everything listens on the loopback alone. Servers with
TLS, which need `openssl`, have a certificate that is made for the run and named in SSL_CERT_FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image
from workbench import make_parser, settings_of, write_report

from actionclip_deploy.motions import EndlessMotions, write_video
from actionclip_deploy.video import LiveReader, parse_source
from actionclip_deploy.video.live import Backoff

HOST = "127.0.0.1"
SIZES = ((320, 240), (480, 360))
# Longer than the limit on silence, 5 seconds.
AWAY_SECONDS = 8.0
PATIENCE_SECONDS = 90.0
FAULTS = ("absent at start", "SIGSTOP", "SIGKILL", "another size")

GSTREAMER = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
port, width, height, *tls = sys.argv[1:]
server = GstRtspServer.RTSPServer(); server.set_address("127.0.0.1"); server.set_service(port)
factory = GstRtspServer.RTSPMediaFactory(); factory.set_shared(True)
factory.set_launch(f"( videotestsrc is-live=true pattern=ball ! video/x-raw,width={width},"
    f"height={height},framerate=25/1 ! x264enc tune=zerolatency key-int-max=50 ! "
    "rtph264pay name=pay0 pt=96 )")
if tls:
    gi.require_version("Gio", "2.0")
    from gi.repository import Gio
    auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
    auth.set_tls_certificate(Gio.TlsCertificate.new_from_files(*tls))
    token.set_string("media.factory.role", "all"); auth.set_default_token(token)
    permissions = GstRtspServer.RTSPPermissions()
    for what in ("access", "construct"):
        permissions.add_permission_for_role("all", f"media.factory.{what}", True)
    factory.set_permissions(permissions); server.set_auth(auth)
server.get_mount_points().add_factory("/a", factory); server.attach(None)
GLib.MainLoop().run()
"""
RTSP_TOOLKIT = """
import asyncio, sys
from aio_rtsp_toolkit import server
asyncio.run(server.serve(sys.argv[1], "127.0.0.1", int(sys.argv[2])))
"""
# Takes TLS, and gives what is in it to a server that knows none.
TLS_PROXY = """
import asyncio, contextlib, ssl, sys
port, inner, certificate, key = sys.argv[1:]
async def copy(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data); await writer.drain()
    writer.close()
async def handle(reader, writer):
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", int(inner))
    except OSError:
        writer.close(); return
    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(certificate, key)
    async with await asyncio.start_server(handle, "127.0.0.1", int(port), ssl=context) as server:
        await server.serve_forever()
asyncio.run(main())
"""
PICTURES = "testsrc2=size={0}x{1}:rate=25"
X264 = "-c:v libx264 -preset ultrafast -tune zerolatency -g 50 -pix_fmt yuv420p"


class Server:
    """A server in a group of processes of its own.

    Args:
        address: What a reader is given.
        command: For each size, a line for a shell; one whose program ends begins anew.
    """

    def __init__(self, address: str, command: Callable[[tuple[int, int]], str]) -> None:
        self.address = address
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, size: tuple[int, int] = SIZES[0]) -> None:
        """Begin to show pictures of a size."""
        self._process = subprocess.Popen(
            ["sh", "-c", f"while :; do {self.command(size)}; sleep 0.2; done"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End all of its processes, if there are any."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def make_servers(folder: Path) -> dict[str, Server]:
    """The servers whose programs are there."""
    servers: dict[str, Server] = {}
    port = free_port()
    if (
        Path("/usr/bin/python3").exists()
        and not subprocess.run(
            ["/usr/bin/python3", "-c", "import gi; gi.require_version('GstRtspServer', '1.0')"],
            capture_output=True,
            check=False,
        ).returncode
    ):
        program = folder / "gstreamer.py"
        program.write_text(GSTREAMER)
        servers["RTSP, GStreamer"] = Server(
            f"rtsp://{HOST}:{port}/a",
            lambda size, port=port: f"/usr/bin/python3 {program} {port} {size[0]} {size[1]}",
        )
    toolkit = folder / "toolkit.py"
    toolkit.write_text(RTSP_TOOLKIT)
    for width, height in SIZES:
        motions = EndlessMotions(size=width)
        frames = [motions(number)[:height] for number in range(500)]
        (folder / f"{width}").mkdir()
        write_video(folder / f"{width}" / "a.mp4", np.stack(frames), fps=25)
    port = free_port()
    servers["RTSP, aio-rtsp-toolkit"] = Server(
        f"rtsp://{HOST}:{port}/a.mp4",
        lambda size, port=port: f"{sys.executable} {toolkit} {folder}/{size[0]} {port}",
    )
    if shutil.which("ffmpeg") is None:
        return servers

    def encoder(target: str) -> Callable[[tuple[int, int]], str]:
        start = "exec ffmpeg -loglevel quiet -re -f lavfi -i"
        return lambda size: f"( {start} {PICTURES.format(*size)} {target} )"

    port = free_port()
    hls = folder / "hls"
    hls.mkdir()
    files = f"{sys.executable} -m http.server {port} --bind {HOST} --directory {hls}"
    make = encoder(
        f"{X264} -f hls -hls_time 2 -hls_list_size 5 -hls_flags delete_segments {hls}/v.m3u8"
    )
    # As a server that starts anew: what was there before is gone.
    servers["HLS"] = Server(
        f"http://{HOST}:{port}/v.m3u8", lambda size: f"rm -f {hls}/*; {files} & {make(size)}"
    )
    port = free_port()
    target = f"rtmp://{HOST}:{port}/live/a"
    servers["RTMP"] = Server(target, encoder(f"{X264} -f flv -listen 1 {target}"))
    port = free_port(socket.SOCK_DGRAM)
    servers["UDP, MPEG-TS"] = Server(
        f"udp://{HOST}:{port}", encoder(f"{X264} -f mpegts 'udp://{HOST}:{port}?pkt_size=1316'")
    )
    port = free_port()
    target = f"http://{HOST}:{port}/a"
    servers["MJPEG"] = Server(target, encoder(f"-c:v mjpeg -q:v 5 -f mpjpeg -listen 1 {target}"))
    if shutil.which("openssl") is not None:
        servers |= with_tls(servers, folder)
    return servers


def with_tls(servers: dict[str, Server], folder: Path) -> dict[str, Server]:
    """Some of the servers again, by TLS; their certificate is trusted from here on."""
    certificate, key, proxy = (folder / name for name in ("tls.pem", "tls.key", "tls.py"))
    proxy.write_text(TLS_PROXY)
    line = (
        "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
        f"-subj /CN=camera -addext subjectAltName=IP:{HOST} -keyout {key} -out {certificate}"
    )
    subprocess.run(line.split(), check=True, capture_output=True)
    os.environ["SSL_CERT_FILE"] = str(certificate)
    found: dict[str, Server] = {}
    for name, scheme in (("HLS", "https"), ("MJPEG", "https"), ("RTMP", "rtmps")):
        plain, port = servers[name], free_port()
        parts = urlsplit(plain.address)
        found[f"{name}, TLS"] = Server(
            f"{scheme}://{HOST}:{port}{parts.path}",
            lambda size, plain=plain, port=port, inner=parts.port: (
                f"{sys.executable} {proxy} {port} {inner} {certificate} {key} & "
                f"{plain.command(size)}; kill $!"
            ),
        )
    if "RTSP, GStreamer" in servers:
        port, program = free_port(), folder / "gstreamer.py"
        found["RTSPS, GStreamer"] = Server(
            f"rtsps://{HOST}:{port}/a",
            lambda size: (
                f"/usr/bin/python3 {program} {port} {size[0]} {size[1]} {certificate} {key}"
            ),
        )
    return found


class Camera:
    """Reads a source with the limits and the waits of a user, in a thread."""

    def __init__(self, source: str, *, remembers: bool = True, **options: Any) -> None:
        self.reader = LiveReader(parse_source(source), on_state=self._note, **options)
        self.stop = threading.Event()
        self._remembers = remembers
        self.states: list[tuple[float, str, str | None]] = []
        self.arrivals: list[float] = []
        self.widths: list[int] = []
        self._thread = threading.Thread(target=self._read)

    def _note(self, state: Any) -> None:
        if self._remembers:
            self.states.append((time.monotonic(), state.state, state.last_error))

    def _read(self) -> None:
        for frame in self.reader.frames(self.stop):
            if self._remembers:
                self.widths.append(frame.width)
                self.arrivals.append(time.monotonic())

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()

    def first_frame_after(self, moment: float, width: int | None = None) -> float | None:
        """When a frame came after a moment, waited for; None if none does."""
        place = 0
        while time.monotonic() < moment + PATIENCE_SECONDS:
            while place < len(self.arrivals):
                is_it = width is None or self.widths[place] == width
                if is_it and self.arrivals[place] > moment:
                    return self.arrivals[place]
                place += 1
            time.sleep(0.01)
        return None

    def lost_after(self, moment: float, until: float) -> tuple[float | None, str | None]:
        """When the source was lost between two moments, and why; None if it was not."""
        for when, state, error in self.states:
            if moment < when <= until and state == "lost":
                return when, error
        return None, None


def try_fault(server: Server, fault: str) -> dict[str, Any]:
    """Do one thing to a server that runs, and tell what became of the camera."""
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        camera = Camera(server.address)
        before = time.monotonic()
        if fault == "absent at start":
            stack.enter_context(camera)
            time.sleep(AWAY_SECONDS)
            server.start()
            cured, size = time.monotonic(), SIZES[0]
        else:
            server.start()
            time.sleep(3)
            stack.enter_context(camera)
            if camera.first_frame_after(time.monotonic()) is None:
                return {"fault": fault, "error": camera.reader.state.last_error}
            time.sleep(6)
            before, size = time.monotonic(), SIZES[0]
            if fault == "SIGSTOP":
                server.send(signal.SIGSTOP)
                time.sleep(AWAY_SECONDS)
                server.send(signal.SIGCONT)
            else:
                server.kill()
                if fault == "SIGKILL":
                    time.sleep(AWAY_SECONDS)
                else:
                    size = SIZES[1]
                server.start(size)
            cured = time.monotonic()
        back = camera.first_frame_after(cured, size[0])
        lost, error = camera.lost_after(before, back or time.monotonic())
        return {
            "fault": fault,
            "lost_seconds": None if lost is None else round(lost - before, 2),
            "back_seconds": None if back is None else round(back - cured, 2),
            "attempts": sum(when > before and s == "opening" for when, s, _ in camera.states),
            "error": error,
        }


def largest_gap(camera: Camera) -> float:
    arrivals = camera.arrivals
    return max((b - a for a, b in itertools.pairwise(arrivals)), default=0.0)


def try_all(wanted: list[str]) -> dict[str, Any]:
    """Every server with every fault, servers side by side; and a camera that has to see nothing."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {k: v for k, v in make_servers(folder).items() if not wanted or k in wanted}
        quiet = stack.enter_context(Camera("test:", render=EndlessMotions()))

        def try_server(name: str) -> list[dict[str, Any]]:
            found = []
            for fault in FAULTS:
                found.append(try_fault(servers[name], fault))
                print(name, found[-1], file=sys.stderr, flush=True)
            return found

        pool = stack.enter_context(ThreadPoolExecutor(len(servers)))
        rows = dict(zip(servers, pool.map(try_server, servers), strict=True))
        return {
            "servers": rows,
            "undisturbed_camera": {
                "frames": quiet.reader.state.frames,
                "reconnects": quiet.reader.state.reconnects,
                "largest_gap_seconds": round(largest_gap(quiet), 2),
            },
        }


@contextlib.contextmanager
def served_in_pieces() -> Iterator[str]:
    """MJPEG that ends after three pictures, by a server in a process of its own."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import bench_sources as b; b.serve()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        yield f"http://{HOST}:{int(process.stdout.readline())}/a"
        process.kill()


def serve() -> None:
    """What that process does."""
    buffer = io.BytesIO()
    Image.new("RGB", SIZES[0]).save(buffer, "jpeg")
    data = buffer.getvalue()
    part = b"--part\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data) + data

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
            self.end_headers()
            self.wfile.write((part + b"\r\n") * 3)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def count_leaks(num_reconnects: int) -> dict[str, Any]:
    """Open a source again and again; memory, descriptors and threads on the way."""
    process = psutil.Process()
    marks = []

    def mark(camera: Camera) -> None:
        marks.append(
            {
                "reconnects": camera.reader.state.reconnects,
                "rss_mb": round(process.memory_info().rss / 2**20, 1),
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
            }
        )

    backoff = Backoff(1e-3, 1e-3)
    with (
        served_in_pieces() as address,
        Camera(address, remembers=False, backoff=backoff) as camera,
    ):
        for share in range(11):
            while camera.reader.state.reconnects < num_reconnects * share / 10:
                time.sleep(0.01)
            mark(camera)
    return {"reconnects": marks}


def main() -> None:
    parser: argparse.ArgumentParser = make_parser(__doc__, rounds=1)
    parser.add_argument("--server", action="append", default=[], help="one of them; or more")
    parser.add_argument("--reconnects", type=int, help="count what so many reconnections leave")
    given = parser.parse_args()
    found = count_leaks(given.reconnects) if given.reconnects else try_all(given.server)
    write_report({"settings": settings_of(given), **found}, given.output)


if __name__ == "__main__":
    main()
