"""Live sources on this machine, and what goes wrong with them: who is lost, and who is back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rendering import moving_pictures, render
from stream_servers import (
    DEADLINE_SECONDS,
    HOST,
    Proxy,
    RtspServer,
    TlsProxy,
    Watch,
    free_port,
    make_certificate,
    send_mjpeg,
    served,
    served_by_http,
    transport_stream,
)

from actionclip_deploy.video import LiveReader, parse_source
from actionclip_deploy.video.live import Backoff

# Short, so that a lost source is seen soon; longer than any pause of a busy machine's servers.
_SILENCE_SECONDS = 1.0
# What is told then: by FFmpeg, whose limit is later, where a busy machine held up who looks first.
_SILENT = r"was silent for 1 s|no answer came in time"


def watch(address: str, **options: Any) -> Watch:
    backoff = Backoff(first_seconds=0.05, most_seconds=0.2)
    options = {"open_timeout_seconds": 5, "read_timeout_seconds": _SILENCE_SECONDS, **options}
    return Watch(LiveReader(parse_source(address), backoff=backoff, **options))


def steps(frames: list[Any]) -> np.ndarray:
    """Times between neighbours of one session."""
    return np.array(
        [
            b.pts_seconds - a.pts_seconds
            for a, b in itertools.pairwise(frames)
            if a.session == b.session
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    render(folder / "a.mp4", pictures=moving_pictures(400), b_frames=0, group=10)
    render(folder / "large.mp4", pictures=moving_pictures(200, 160, 128), b_frames=0, group=10)
    return folder


def test_rtsp_is_back_after_silence_and_after_its_server_was_killed(folder: Path) -> None:
    with RtspServer(folder) as server:
        address = f"rtsp://{HOST}:{server.port}/a.mp4"
        with watch(address) as camera:
            # Nobody is there at the start.
            assert "nothing listens there" in camera.until_lost()
            server.start()
            camera.until_frames(30)
            assert {(f.session, f.width, f.height) for f in camera.frames} == {(0, 96, 64)}
            assert camera.reader.state.reconnects == 0
            server.send(signal.SIGSTOP)
            assert re.search(_SILENT, camera.until_lost())
            server.send(signal.SIGCONT)
            camera.until_frames(5)
            assert camera.reader.state.reconnects == 1
            server.kill()
            assert camera.until_lost()
            # Another size under the same address.
            (folder / "a.mp4").rename(folder / "b.mp4")
            (folder / "large.mp4").rename(folder / "a.mp4")
            server.start()
            camera.until_frames(5)
            state = camera.reader.state
            assert (state.state, state.reconnects) == ("running", 2)
        sessions = [f.session for f in camera.frames]
        assert sorted(sessions) == sessions
        assert (camera.frames[-1].width, camera.frames[-1].height) == (160, 128)
        assert camera.frames[-1].to_rgb().shape == (128, 160, 3)
        assert (steps(camera.frames) > 0).all()
        assert np.median(steps(camera.frames)) == pytest.approx(0.04, abs=0.001)
        assert camera.reader.state.state == "ended"


def accepts_and_says_nothing(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


@pytest.mark.parametrize("scheme", ["rtsp", "http", "rtmp", "tcp"])
def test_a_camera_that_accepts_and_sends_nothing_is_lost_and_stops_at_once(scheme: str) -> None:
    with served(accepts_and_says_nothing) as port:
        address = f"{scheme}://{HOST}:{port}/a"
        with watch(address, open_timeout_seconds=0.3) as camera:
            assert "gave no answer for 0.3 s; check that it is on" in camera.until_lost()
        with watch(address, open_timeout_seconds=3600, read_timeout_seconds=3600) as camera:
            time.sleep(0.2)
            camera.stop.set()
            # Waiting for its limits would take longer than `until` waits.
            camera.until(lambda: camera.reader.state.state == "ended", "ended")


def colours(*sizes: tuple[int, int], pause_seconds: float = 0.02) -> Iterator[np.ndarray]:
    for number, (width, height) in enumerate(sizes):
        yield np.full((height, width, 3), (10 * number % 200, 90, 40), np.uint8)
        time.sleep(pause_seconds)


def test_mjpeg_goes_by_its_arrival_and_may_change_its_size() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        send_mjpeg(handler, colours(*[(64, 48)] * 12, *[(32, 48)] * 400, pause_seconds=0.1))

    with served_by_http(answer) as port, watch(f"http://{HOST}:{port}/video") as camera:
        camera.until(lambda: any(f.width == 32 for f in camera.frames), "the other size")
        camera.until_frames(8)
    sizes = [(f.session, f.width, f.height) for f in camera.frames]
    assert set(sizes) == {(0, 64, 48), (1, 32, 48)}
    # FFmpeg counts such frames at 25 a second, whatever their number really is.
    late = [f for f in camera.frames if f.session == 1]
    seconds = late[-1].arrival_seconds - late[0].arrival_seconds
    assert late[-1].pts_seconds - late[0].pts_seconds == pytest.approx(seconds, abs=0.05)
    for frame in camera.frames:
        assert frame.to_rgb().shape == (frame.height, frame.width, 3)


def test_what_ends_is_opened_again_in_another_session() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        send_mjpeg(handler, colours(*[(64, 48)] * 10, pause_seconds=0))

    with served_by_http(answer) as port, watch(f"http://{HOST}:{port}/video") as camera:
        camera.until(lambda: camera.reader.state.reconnects >= 3, "three reconnections")
    assert "/video broke off (Input/output error); see what" in str(camera.reader.state.last_error)
    assert {f.session for f in camera.frames} >= {0, 1, 2, 3}


def transport_server(data: bytes) -> Any:
    """Send a stream over and over, a piece each few milliseconds."""

    def handle(connection: socket.socket) -> None:
        for start in itertools.count(0, 188 * 7):
            place = start % len(data)
            connection.sendall(data[place : place + 188 * 7])
            time.sleep(0.01)

    return handle


def test_a_stalled_and_a_cut_connection_are_lost_and_come_back(tmp_path: Path) -> None:
    data = transport_stream(tmp_path / "a.ts", moving_pictures(400)).read_bytes()
    with served(transport_server(data)) as behind:
        proxy = Proxy(behind)
        with served(proxy.handle) as port, watch(f"tcp://{HOST}:{port}") as camera:
            camera.until_frames(20)
            proxy.is_stalled.set()
            assert re.search(_SILENT, camera.until_lost())
            proxy.is_stalled.clear()
            camera.until_frames(20)
            proxy.bytes_until_cut = 1  # of those that are open as well
            camera.until_lost()
            proxy.bytes_until_cut = None
            camera.until_frames(20)
            assert camera.reader.state.reconnects >= 2


class Broadcast:
    """Sends a transport stream by UDP to whoever listens, in its pace."""

    def __init__(self, port: int) -> None:
        self._address = f"udp://{HOST}:{port}?pkt_size=1316"
        self.first_seconds = 100.0
        self.size = (96, 64)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Broadcast:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            width, height = self.size
            first = self.first_seconds
            with av.open(self._address, "w", format="mpegts") as file:
                stream = file.add_stream("libx264", rate=25)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"tune": "zerolatency", "g": "5"}
                for number, picture in enumerate(
                    itertools.cycle(moving_pictures(20, width, height))
                ):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts = round(first * 25) + number
                    file.mux(stream.encode(frame))
                    if self._is_over.wait(0.02):
                        return
                    if (first, (width, height)) != (self.first_seconds, self.size):
                        break


def test_a_clock_that_jumps_and_a_size_that_changes_begin_sessions_without_a_loss() -> None:
    port = free_port(socket.SOCK_DGRAM)
    with Broadcast(port) as broadcast, watch(f"udp://{HOST}:{port}") as camera:
        camera.until_frames(10)
        assert camera.frames[-1].session == 0
        broadcast.first_seconds = 5000.0
        camera.until(lambda: camera.frames[-1].session >= 1, "a session by another clock")
        camera.until_frames(10)
        assert camera.frames[-1].pts_seconds - camera.frames[0].pts_seconds > 4000
        broadcast.size = (160, 128)
        camera.until(lambda: camera.frames[-1].width == 160, "the other size")
        camera.until_frames(5)
    now = time.monotonic() - time.time()
    # Of most: a busy machine may hold some up.
    late = [frame.wall_seconds + now - frame.arrival_seconds for frame in camera.frames]
    assert np.median(np.abs(late)) < 1
    assert camera.reader.state.reconnects <= 1
    assert (steps(camera.frames) > 0).all()


def test_a_port_that_is_taken_is_told_and_one_that_was_left_is_free() -> None:
    port = free_port(socket.SOCK_DGRAM)
    with Broadcast(port):
        with watch(f"udp://{HOST}:{port}") as camera:
            camera.until_frames()
            with watch(f"udp://@:{port}") as other:
                assert "another source, has it already" in other.until_lost()
        with watch(f"udp://{HOST}:{port}") as camera:
            camera.until_frames()
            assert camera.reader.state.last_error is None


PASSWORD = "s3cret-passw0rd"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "user or password is wrong or missing"),
        (403, "may not read it"),
        (404, "no such stream"),
        (500, "the server failed"),
    ],
)
def test_what_a_server_refuses_is_told_without_the_password(
    status: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_error(status)

    av.logging.set_level(av.logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    try:
        with served_by_http(answer) as port:
            source = parse_source(
                f"http://admin:${{CAMERA}}@{HOST}:{port}/v?token=t0ken-t0ken",
                environ={"CAMERA": PASSWORD},
            )
            states: list[Any] = []
            reader = LiveReader(source, backoff=Backoff(0.01, 0.02), on_state=states.append)
            with Watch(reader) as camera:
                error = camera.until_lost()
                camera.until(lambda: len(states) > 4, "another try")
    finally:
        av.logging.set_level(None)
    assert says in error
    assert f"http://***@{HOST}:{port}/v?token=***" in error
    assert str(status) in caplog.text or says in caplog.text
    assert any(record.getMessage().startswith("FFmpeg (") for record in caplog.records)
    for text in (caplog.text, repr(states), repr(source)):
        assert PASSWORD not in text
        assert "t0ken" not in text
        assert "admin" not in text


def test_rtsp_with_a_wrong_password_is_told_without_it(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(connection: socket.socket) -> None:
        while request := connection.recv(4096).decode():
            number = request.partition("CSeq: ")[2].partition("\r\n")[0]
            connection.sendall(
                f"RTSP/1.0 401 Unauthorized\r\nCSeq: {number}\r\n"
                'WWW-Authenticate: Basic realm="door"\r\n\r\n'.encode()
            )

    with served(refuse) as port, watch(f"rtsp://admin:{PASSWORD}@{HOST}:{port}/a") as camera:
        error = camera.until_lost()
    assert error == (
        f"rtsp://***@{HOST}:{port}/a cannot be read (HTTPUnauthorizedError: Server returned 401 "
        "Unauthorized (authorization failed)); user or password is wrong or missing; check them."
    )
    assert PASSWORD not in caplog.text


def test_a_password_of_any_letters_reaches_the_server() -> None:
    import base64

    password, seen = "p@ss/w?rd:#%", []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        if seen[-1] is None:
            handler.send_response(401)
            handler.send_header("WWW-Authenticate", 'Basic realm="door"')
            handler.end_headers()
            return
        send_mjpeg(handler, colours(*[(64, 48)] * 400))

    with served_by_http(answer) as port:
        source = parse_source(f"http://me:${{P}}@{HOST}:{port}/v", environ={"P": password})
        with Watch(LiveReader(source)) as camera:
            camera.until_frames()
    assert base64.b64decode(seen[-1].split()[1]).decode() == f"me:{password}"


HOSTILE = [
    "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{file}\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{file}\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nconcat:{file}|{file}\n",
    '#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MAP:URI="file://{file}"\n#EXTINF:2,\na.ts\n',
    '#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-KEY:METHOD=AES-128,URI="file://{file}"\n'
    "#EXTINF:2,\na.ts\n",
    "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nfile://{file}\n",
    "ffconcat version 1.0\nfile 'file:{file}'\n",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_no_playlist_has_a_local_file_read(tmp_path: Path, number: int) -> None:
    path = transport_stream(tmp_path / "local.ts", moving_pictures(30))
    playlist = HOSTILE[number].format(file=path)
    if "#EXTM3U" in playlist:
        playlist += "#EXT-X-ENDLIST\n"

    def answer(handler: BaseHTTPRequestHandler) -> None:
        is_playlist = handler.path.endswith(".m3u8")
        handler.send_response(200 if is_playlist else 404)
        handler.end_headers()
        if is_playlist:
            handler.wfile.write(playlist.encode())

    # The same stream by itself is taken, so that it is no other reason.
    assert list(LiveReader(parse_source(str(path))).frames(threading.Event()))
    with served_by_http(answer) as port:
        opened = []
        with watch(f"http://{HOST}:{port}/v.m3u8") as camera:
            opened.append(camera.until_lost())
    assert camera.frames == []


def test_a_redirection_to_a_local_file_is_not_followed(tmp_path: Path) -> None:
    path = transport_stream(tmp_path / "local.ts", moving_pictures(30))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"file://{path}")
        handler.end_headers()

    with served_by_http(answer) as port, watch(f"http://{HOST}:{port}/v") as camera:
        camera.until_lost()
    assert camera.frames == []


class Playlist:
    """Segments of 2 seconds, of which a playlist has so many."""

    def __init__(self, folder: Path, num_segments: int) -> None:
        self._folder = folder
        self.num_segments = num_segments
        options = {"hls_time": "2", "hls_list_size": "0"}
        with av.open(str(folder / "v.m3u8"), "w", format="hls", options=options) as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.options = {"g": "50", "bf": "2"}
            for number, picture in enumerate(moving_pictures(400)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if handler.path.endswith(".ts"):
            data = (self._folder / handler.path.lstrip("/")).read_bytes()
        else:
            text = (self._folder / "v.m3u8").read_text().replace("#EXT-X-ENDLIST\n", "")
            data = "#EXTINF".join(text.split("#EXTINF")[: self.num_segments + 1]).encode()
            handler.send_header("Content-Type", "application/vnd.apple.mpegurl")
        handler.end_headers()
        handler.wfile.write(data)


@pytest.mark.parametrize("name", ["v.m3u8", "live"])
def test_bursts_of_hls_keep_their_own_clock(tmp_path: Path, name: str) -> None:
    """The limit on silence is half of a segment."""
    playlist = Playlist(tmp_path, 3)
    with (
        served_by_http(playlist.answer) as port,
        watch(f"http://{HOST}:{port}/{name}") as camera,
    ):
        camera.until_frames(3 * 50 - 5)
        time.sleep(1.2 * _SILENCE_SECONDS)  # for which it is not taken for lost
        playlist.num_segments = 4
        camera.until(lambda: len(camera.frames) >= 170, "another segment")
        state = camera.reader.state
        assert (state.state, state.reconnects, state.last_error) == ("running", 0, None)
    np.testing.assert_allclose(steps(camera.frames), 0.04, atol=0.001)
    arrivals = np.diff([frame.arrival_seconds for frame in camera.frames])
    assert arrivals.max() > _SILENCE_SECONDS


def test_a_playlist_whose_maker_is_gone_is_lost_and_its_end_is_not_seen_again(
    tmp_path: Path,
) -> None:
    playlist = Playlist(tmp_path, 4)
    lost = []

    def note(state: Any) -> None:
        if state.state == "lost":
            lost.append(state.last_error)

    with (
        served_by_http(playlist.answer) as port,
        watch(f"http://{HOST}:{port}/v.m3u8", read_timeout_seconds=0.1, on_state=note) as camera,
    ):
        camera.until(lambda: len(lost) >= 3, "lost three times")
        num_frames = len(camera.frames)
        assert num_frames >= 3 * 50 - 5
        assert {frame.session for frame in camera.frames} == {0}
        assert "silent" in lost[0]
        # It goes on, and nothing is seen twice.
        playlist.num_segments = 7
        camera.until_frames(50)
    times = [round(frame.pts_seconds, 3) for frame in camera.frames]
    assert len({*times}) == len(times)
    assert times == sorted(times)


def test_frames_that_are_too_large_are_not_decoded_and_the_source_is_tried_again() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        send_mjpeg(handler, colours(*[(64, 48)] * 3, *[(320, 240)] * 100))

    with served_by_http(answer) as port:
        with watch(f"http://{HOST}:{port}/video", max_pixels=5000) as camera:
            error = camera.until_lost()
        assert "320 x 240 and they may have 5,000 pixels" in error
        assert {f.width for f in camera.frames} == {64}


def test_a_recording_at_an_address_is_told_to_be_one(tmp_path: Path) -> None:
    data = render(tmp_path / "a.mp4", num_frames=50).read_bytes()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    with served_by_http(answer) as port, watch(f"http://{HOST}:{port}/a.mp4") as camera:
        assert "is a recording of 2 s and no live stream" in camera.until_lost()


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp3"), "w") as file:
        stream = file.add_stream("libmp3lame", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 44100), np.int16), format="s16", layout="mono"
        )
        frame.rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write((tmp_path / "a.mp3").read_bytes())

    with served_by_http(answer) as port, watch(f"http://{HOST}:{port}/a.mp3") as camera:
        assert "no video that can be decoded (it has: audio)" in camera.until_lost()


def test_connections_leave_no_threads_and_no_descriptors_behind() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        send_mjpeg(handler, colours(*[(64, 48)] * 3, pause_seconds=0))

    def counted() -> tuple[int, int]:
        feeds = sum(f":{port}/" in thread.name for thread in threading.enumerate())
        return feeds, sum(1 for _ in Path("/proc/self/fd").iterdir())

    with served_by_http(answer) as port:
        source = parse_source(f"http://{HOST}:{port}/video")
        with Watch(LiveReader(source, backoff=Backoff(0.001, 0.001))) as camera:
            camera.until(lambda: camera.reader.state.reconnects >= 5, "5 reconnections")
            _, before = counted()
            camera.until(lambda: camera.reader.state.reconnects >= 40, "40 reconnections")
            feeds, after = counted()
            assert feeds <= 3  # one, and two that are ending
            assert after <= before + 8  # sockets of the server's that are being closed
    deadline = time.monotonic() + DEADLINE_SECONDS
    while counted()[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted()[0] == 0


# TLS

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@contextlib.contextmanager
def tls_in_front_of(scheme: str, context: ssl.SSLContext, folder: Path) -> Iterator[str]:
    """The address of a camera whose server speaks TLS."""
    with contextlib.ExitStack() as stack:
        if scheme == "rtsps":
            server = stack.enter_context(RtspServer(folder))
            server.start()
            port, path = server.port, "/a.mp4"
        else:
            answer = lambda handler: send_mjpeg(handler, colours(*[(64, 48)] * 4000))  # noqa: E731
            port, path = stack.enter_context(served_by_http(answer)), "/v"
        secure = stack.enter_context(served(TlsProxy(port, context).handle))
        yield f"{scheme}://{HOST}:{secure}{path}"


@needs_openssl
@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_a_certificate_that_is_trusted_is_taken_and_another_refused(
    scheme: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificate, context = make_certificate(tmp_path)
    with tls_in_front_of(scheme, context, folder) as address:
        with watch(address) as camera:
            error = camera.until_lost()
        assert not camera.frames
        assert error.startswith(
            f"{address} has a certificate that is refused (self-signed certificate); put it, or "
        ), error
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with watch(address) as camera:
            camera.until_frames(3)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with watch(address) as camera:
            assert "the file in SSL_CERT_FILE cannot be read: No such file" in camera.until_lost()
        monkeypatch.setenv("ACTIONCLIP_UNVERIFIED_HOSTS", f"elsewhere {HOST}")
        with watch(address) as camera:
            camera.until_frames(3)


@needs_openssl
@pytest.mark.parametrize("scheme", ["https", "rtsps"])
def test_a_certificate_of_another_host_is_refused(
    scheme: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, context = make_certificate(tmp_path, "DNS:camera.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with tls_in_front_of(scheme, context, folder) as address, watch(address) as camera:
        error = camera.until_lost()
    assert f"certificate is not valid for '{HOST}'" in error
    assert not camera.frames


@needs_openssl
def test_hls_comes_by_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, context = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    part = transport_stream(tmp_path / "0.ts", moving_pictures(50)).read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n0.ts\n"

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(part if handler.path.endswith(".ts") else playlist)

    with (
        served_by_http(answer) as port,
        served(TlsProxy(port, context).handle) as secure,
        watch(f"https://{HOST}:{secure}/v.m3u8") as camera,
    ):
        camera.until_frames(20)
