"""The ends of a server's processes: killed ones are replaced, and told ones finish their work."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
import pytest
from fakes import fake_manifest
from serving import make_service
from serving_programs import (
    END_SECONDS,
    Server,
    bundle_with_bank,
    is_running,
    running_server,
    until,
)

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import decode_pool
from actionclip_deploy.serve.decode_pool import DecodeJob, DecodePool
from actionclip_deploy.serve.settings import Limits

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

NUM_CLIENTS = 12


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    return bundle_with_bank(tiny_bundle, folder, "mine", ["run", "walk", "sit"])


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[Server]:
    with running_server(bundle, tmp_path, "--workers", "2") as server:
        yield server


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video whose decoding takes about a second: one keyframe, and frames of its end are used."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("long") / "long.mp4"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 720, 1280, 3), np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "1000", "qp": "40"}
        for step in range(120):
            frame = av.VideoFrame.from_ndarray(pictures[step % 2], format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path.read_bytes()


def post(client: httpx.Client, video: bytes, request_id: str = "a") -> httpx.Response:
    files, headers = {"video": ("a.mp4", video)}, {"x-request-id": request_id}
    return client.post("/v1/classify", files=files, data={"labels": "mine"}, headers=headers)


def busy_worker(server: Server) -> int:
    """A decoding process that has a video open."""
    found: list[int] = []

    def look() -> bool:
        for process_id in server.worker_ids():
            with suppress(OSError):
                opened = [each.readlink() for each in Path(f"/proc/{process_id}/fd").iterdir()]
                if any(server.spool in each.parents for each in opened):
                    found.append(process_id)
        return bool(found)

    until(look)
    return found[0]


def warnings_of(server: Server) -> list[str]:
    """What it warned of, or worse, while it served."""
    lines = [line for line in server.logs() if line["level"] != "info"]
    return [each["message"] for each in lines if not each["logger"].endswith(".runtimes.auto")]


def test_a_killed_decoding_process_loses_no_video(server: Server, long_video: bytes) -> None:
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        expected = post(client, long_video).json()["results"][0]["predictions"]
        answer = pool.submit(post, client, long_video)
        victim = busy_worker(server)
        os.kill(victim, signal.SIGKILL)
        result = answer.result()
        assert result.status_code == 200, result.text
        assert result.json()["results"][0]["predictions"] == expected
        until(lambda: len(server.worker_ids()) == 2)
        assert victim not in server.worker_ids()
        assert server.metric("actionclip_decode_workers_replaced") == 1
    assert warnings_of(server) == ["A decoding process ended (SIGKILL) and is replaced."]


NONSENSE = {
    "words": "what a nice video",
    "a number": "12",
    "nothing": "",
    "half an object": '{"shape": [8, 64, 64',
    "too little": "{}",
    "a huge shape": '{"shape": [1000000, 1000000, 1000000, 3], "pts_seconds": null}',
    "a shape of words": '{"shape": ["a"], "pts_seconds": null}',
    "a negative shape": '{"shape": [-1, 64, 64, 3], "pts_seconds": null}',
    "a long line": "x" * 5_000_000,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_decoding_process_that_writes_nonsense_is_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable} -S\n"
        "import sys\n"
        "sys.stdin.readline()\n"
        "print('{\"is_ready\": true}', flush=True)\n"
        f"for line in sys.stdin: print({NONSENSE[name]!r}, flush=True)\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(decode_pool.sys, "executable", str(program))

    async def run() -> tuple[RequestRefusedError, int]:
        pool = DecodePool(fake_manifest(), Limits(), num_workers=1)
        await pool.start()
        try:
            with pytest.raises(RequestRefusedError) as caught:
                await pool.decode(DecodeJob(tmp_path / "a.mp4", "a.mp4", Views()))
            while pool.num_replaced < 2 or not pool.process_ids:
                await asyncio.sleep(0.01)
        finally:
            await pool.stop()
        return caught.value, pool.num_replaced

    error, num_replaced = asyncio.run(run())
    assert (error.status, error.code) == (422, "video_unreadable")
    assert "a.mp4 made the decoder crash 2 times" in str(error)
    assert num_replaced == 2


def test_videos_whose_clients_went_away_keep_nobody_out(tmp_path: Path) -> None:
    endless = tmp_path / "endless.mp4"
    os.mkfifo(endless)  # reading it waits for a writer that never comes

    async def run() -> tuple[int, int]:
        pool = DecodePool(fake_manifest(), Limits(waiting_decodes=2), num_workers=1)
        await pool.start()
        try:
            job = DecodeJob(endless, "endless.mp4", Views(), "frames")
            jobs = []
            for num_jobs in range(3):
                await asyncio.sleep(0.2 if num_jobs == 1 else 0)
                jobs.append(asyncio.ensure_future(pool.decode(job)))
            await asyncio.sleep(0)
            before = pool.num_waiting
            for each in jobs[1:]:
                each.cancel()
            await asyncio.wait(jobs[1:])
            with suppress(asyncio.TimeoutError):  # it waits, and is not refused
                await asyncio.wait_for(pool.decode(job), 0.1)
            return before, pool.num_waiting
        finally:
            await pool.stop()
            await asyncio.gather(*jobs, return_exceptions=True)

    assert asyncio.run(run()) == (2, 0)


def test_a_server_that_is_killed_leaves_no_process_and_no_upload_beyond_the_next_start(
    server: Server, bundle: Path, long_video: bytes, tmp_path: Path
) -> None:
    workers = server.worker_ids()
    assert len(workers) == 2
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, client, long_video)
        busy_worker(server)
        server.process.kill()
        with pytest.raises(httpx.TransportError):
            answer.result()
    until(lambda: not any(is_running(each) for each in workers))
    (left,) = server.spool.iterdir()
    assert [path.read_bytes() for path in left.iterdir()] == [long_video]
    others = server.spool / "mine"  # of somebody else, in a folder that is not for uploads alone
    others.mkdir()
    with running_server(bundle, tmp_path / "again", "--spool", str(server.spool)) as again:
        assert not left.exists()
        assert len(list(server.spool.iterdir())) == 2
        assert again.end() == 0
    assert list(server.spool.iterdir()) == [others]


@dataclass(frozen=True)
class Outcome:
    """Of one request: its id, when it was sent, and its status; None where it was cut off."""

    request_id: str
    sent: float
    status: int | None


class Load:
    """Clients that send one request after another, each on a connection of its own."""

    def __init__(self, server: Server, video: bytes) -> None:
        self.outcomes: list[Outcome] = []
        self._server = server
        self._video = video
        self._threads = [threading.Thread(target=self._send, args=[n]) for n in range(NUM_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(END_SECONDS)
            assert not thread.is_alive()

    def _send(self, client_number: int) -> None:
        for number in count():
            request_id, sent = f"{client_number}-{number}", time.monotonic()
            status = None
            with suppress(httpx.TransportError), self._server.client() as client:
                status = post(client, self._video, request_id).status_code
            self.outcomes.append(Outcome(request_id, sent, status))
            if status != 200:
                return


def test_a_server_that_is_told_to_end_answers_what_it_has_begun(
    server: Server, rendered_video: Path
) -> None:
    workers = server.worker_ids()
    with Load(server, rendered_video.read_bytes()) as load:
        until(lambda: len(load.outcomes) > 3 * NUM_CLIENTS)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(END_SECONDS)
    assert code == 0
    logged = {line["request_id"]: line["status"] for line in server.logs() if "request_id" in line}
    begun = {each.request_id: each.status for each in load.outcomes if each.request_id in logged}
    # Whatever the server has seen of a request, its client has the answer of.
    assert begun == logged
    assert set(begun.values()) <= {200, 503}
    # Those that were under way are among them, and whoever came later was not let in.
    assert sum(each.status == 200 and each.sent < told for each in load.outcomes) > 3 * NUM_CLIENTS
    assert sum(each.status != 200 for each in load.outcomes) == NUM_CLIENTS
    assert not any(is_running(each) for each in workers)
    assert list(server.spool.iterdir()) == []
    assert warnings_of(server) == []


def test_a_body_that_is_on_its_way_is_waited_for_and_nobody_else_let_in(
    server: Server, rendered_video: Path
) -> None:
    head = (
        "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Type: multipart/form-data; boundary=xyz\r\n"
    )
    part = b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (b"labels", b"mine") + part % (b"video", rendered_video.read_bytes())
    body += b"--xyz--\r\n"
    with server.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:3000])
        until(lambda: any(each.is_file() for each in server.spool.rglob("*")))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not can_connect(server))
        assert server.process.poll() is None
        connection.sendall(body[3000:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
    assert server.process.wait(END_SECONDS) == 0


def test_a_server_that_is_told_to_end_while_it_starts_never_takes_requests(
    tmp_path: Path,
) -> None:
    service = make_service(tmp_path)

    async def run() -> tuple[str, str]:
        async def end() -> None:
            while service.state != "starting":
                await asyncio.sleep(0)
            service.begin_stop()

        await asyncio.gather(service.start(), end())
        state = service.state
        await service.stop()
        return state, service.state

    assert asyncio.run(run()) == ("stopping", "stopped")


def can_connect(server: Server) -> bool:
    try:
        socket.create_connection(server.address, timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_second_signal_ends_it_at_once(bundle: Path, tmp_path: Path, long_video: bytes) -> None:
    # By itself it would wait for the idle client's body until that is answered by 408.
    options = ("--workers", "2", "--drain-seconds", "3600")
    with (
        running_server(bundle, tmp_path, *options) as server,
        server.connect() as idle,
        server.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):
        workers = server.worker_ids()
        idle.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        answers = [pool.submit(post, client, long_video) for _ in range(8)]
        busy_worker(server)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not can_connect(server))
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(END_SECONDS)
        # Nobody waits for ever: what was not done by then is refused.
        assert {answer.result().status_code for answer in answers} <= {200, 503}
        assert idle.recv(65536).startswith(b"HTTP/1.1 503 ")
    assert warnings_of(server) == []
    assert code == 0
    assert not any(is_running(each) for each in workers)
    assert list(server.spool.iterdir()) == []
