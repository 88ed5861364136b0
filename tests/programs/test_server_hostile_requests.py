"""Requests that nobody should send, to a real server: each is refused, and the server goes on."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_programs import (
    Server,
    bundle_with_bank,
    costs_at_most,
    memory_bytes,
    running_server,
    until,
)

MIB = 1024 * 1024
BODY_BYTES = 2 * MIB
# Of all requests here together: bodies are bounded, and so is what is made of them. Measured:
# 113 MiB, of which 50 are the build of 10,000 labels, and 42 the first text that is embedded.
SERVER_GROWTH_BYTES = 192 * MIB
# What the server may compute to read 2 MiB and find them wrong, in times of what reading as much
# JSON takes here. Measured: 3 at most; to describe each wrong thing takes 70 to 110.
ANSWER_COST = 30.0
FORM = "multipart/form-data; boundary=xyz"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("requests")
    bundle = bundle_with_bank(tiny_bundle, folder, "mine", ["run", "walk", "sit"])
    options = ("--workers", "2", "--max-body-mib", str(BODY_BYTES / MIB))
    with running_server(bundle, folder, *options) as server:
        before = memory_bytes(server.process.pid)
        yield server
        assert memory_bytes(server.process.pid, "VmHWM") - before < SERVER_GROWTH_BYTES


@pytest.fixture(autouse=True)
def _still_good(server: Server, rendered_video: Path) -> Iterator[None]:
    """After each test a good request is answered, no upload is left, and nothing has failed."""
    yield
    video = {"video": ("good.mp4", rendered_video.read_bytes())}
    with server.client() as client:
        answer = client.post("/v1/classify", files=video, data={"labels": "mine"})
    assert answer.status_code == 200, answer.text
    until(lambda: not any(each.is_file() for each in server.spool.rglob("*")))
    assert [line for line in server.logs() if line["level"] in ("error", "critical")] == []
    assert server.metric("actionclip_decode_workers_replaced") == 0


def error_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"].endswith("."), error["message"]
    assert len(error["message"]) < 1000
    return answer.status_code, error["code"]


def classify_json(server: Server, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client() as client:
        return client.post(
            "/v1/classify", content=content, headers={"content-type": "application/json"}
        )


def form_part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def post_form(server: Server, body: bytes, content_type: str = FORM) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/classify", content=body, headers={"content-type": content_type})


def embedding(server: Server) -> list[float]:
    with server.client() as client:
        return list(client.post("/v1/embed", json={"texts": ["a"]}).json()["embeddings"][0])


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_beyond_the_limit_is_refused(server: Server, is_chunked: bool) -> None:
    body = form_part("video", bytes(BODY_BYTES + 1), '; filename="a.mp4"') + b"--xyz--\r\n"
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    with server.client() as client:
        headers = {"content-type": FORM}
        content = pieces if is_chunked else body
        answer = client.post("/v1/classify", content=content, headers=headers)
        assert error_of(answer) == (413, "body_too_large")
        assert client.get("/v1/info").status_code == 200


def test_a_body_that_never_ends_is_cut_off(server: Server) -> None:
    with server.connect(timeout_seconds=20.0) as connection:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        answer, sent = b"", 0
        with suppress(ConnectionError):
            while sent < 20 * BODY_BYTES:
                connection.sendall(chunk)
                sent += 0x10000
        with suppress(ConnectionError):
            answer = connection.recv(65536)
    # What the two ends hold in between comes on top of the two bodies that are read.
    assert sent < 2 * BODY_BYTES + 8 * MIB
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")


FORMS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "nothing": (b"", (400, "bad_request")),
    "no end": (form_part("labels", b"mine"), (400, "bad_request")),
    "no end of a file": (
        form_part("video", b"abc", '; filename="a.mp4"')[:-2],
        (400, "bad_request"),
    ),
    "no boundary": (b"labels=mine", (400, "bad_request")),
    "another boundary": (
        form_part("labels", b"mine").replace(b"xyz", b"abc"),
        (400, "bad_request"),
    ),
    "only an end": (b"--xyz--\r\n", (422, "bad_value")),
    "a part without a name": (b"--xyz\r\n\r\nabc\r\n--xyz--\r\n", (400, "bad_request")),
    "a header without an end": (b"--xyz\r\n" + b"a" * 100_000, (400, "bad_request")),
    "a header of odd bytes": (b"--xyz\r\n\0\xff: 1\r\n\r\n\r\n--xyz--\r\n", (400, "bad_request")),
    "a charset that is none": (
        b"--xyz\r\nContent-Disposition: form-data; name*=bogus'en'%ff%fe\r\n\r\na\r\n--xyz--\r\n",
        (400, "bad_request"),
    ),
    "text that is no UTF-8": (
        form_part("labels", b"\xff\xfe") + b"--xyz--\r\n",
        (400, "bad_request"),
    ),
    "30,000 fields": (
        b"".join(form_part(f"f{n}", b"") for n in range(30_000)) + b"--xyz--\r\n",
        (413, "too_many"),
    ),
    "one field 30,000 times": (
        form_part("labels", b"a") * 30_000 + b"--xyz--\r\n",
        (413, "too_many"),
    ),
    "a part of 300,000 headers": (b"--xyz\r\n" + b"a: b\r\n" * 300_000, (400, "bad_request")),
    "a name of 8,000 letters": (form_part("n" * 8000, b"") + b"--xyz--\r\n", (400, "bad_request")),
    "many files": (
        b"".join(form_part("video", b"", '; filename="a"') for _ in range(1000)) + b"--xyz--\r\n",
        (413, "too_many"),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_none_is_refused(server: Server, name: str) -> None:
    body, expected = FORMS[name]
    with costs_at_most(server, ANSWER_COST, num_bytes=BODY_BYTES):
        assert error_of(post_form(server, body)) == expected


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 20_000,
        'multipart/form-data; boundary="\\',
        "multipart/form-data; boundary*=bogus''%ff",
        "application/json; charset=klingon",
        "text/plain",
        ";;;;",
        "x" * 30_000,
    ],
)
def test_a_type_that_is_odd_is_refused(server: Server, content_type: str) -> None:
    answer = post_form(server, form_part("labels", b"mine"), content_type)
    assert error_of(answer)[0] in (400, 415), answer.text


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


JSON: dict[str, tuple[Any, tuple[int, str]]] = {
    "nothing": (b"", (400, "bad_request")),
    "half": (b'{"labels": ', (400, "bad_request")),
    "deep": (deep(200_000), (400, "bad_request")),
    "deep in a field": (b'{"labels": ' + deep(100_000) + b"}", (400, "bad_request")),
    "not as deep": (b'{"labels": ' + deep(500) + b"}", (422, "bad_value")),
    "no UTF-8": (b'{"labels": "\xff"}', (400, "bad_request")),
    "a number without end": (b'{"top_k": ' + b"9" * 100_000 + b"}", (400, "bad_request")),
    "a list": ([1, 2], (422, "bad_value")),
    "nulls": ({"labels": None, "embeddings": None}, (422, "bad_value")),
    "100,000 fields": ({f"f{n}": n for n in range(100_000)}, (422, "bad_value")),
    "600,000 numbers for labels": (
        {"labels": [0] * 600_000, "embeddings": [[[0]]]},
        (422, "bad_value"),
    ),
    "400,000 words for numbers": (
        {"labels": "mine", "embeddings": [[["a"] * 400_000]]},
        (422, "bad_value"),
    ),
    "a field of 1 MB": ({"f" * MIB: 1}, (422, "bad_value")),
    "a field of half a character": (b'{"\\ud800": 1}', (422, "bad_value")),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_does_not_fit_is_refused(server: Server, name: str) -> None:
    body, expected = JSON[name]
    with costs_at_most(server, ANSWER_COST, num_bytes=BODY_BYTES):
        assert error_of(classify_json(server, body)) == expected


LABELS: dict[str, tuple[Any, tuple[int, str]]] = {
    "10,000 labels": ([f"label {n}" for n in range(10_000)], (413, "too_many")),
    "a label of 1 MB": (["a" * MIB, "b"], (413, "too_many")),
    "a bank that is not there": ("nothing", (404, "unknown_bank")),
    "a name of 1 MB": ("a" * MIB, (404, "unknown_bank")),
    "a name of half a character": ("\ud800", (404, "unknown_bank")),
    "labels of half a character": (["\ud800", "b"], (422, "bad_value")),
    "no labels": ([], (422, "bad_value")),
    "an empty label": ([""], (422, "bad_value")),
    "control characters": (["a\0b"], (422, "bad_value")),
    "the same label twice": (["a", "a"], (422, "bad_value")),
    "a label of too many tokens": (["run " * 200], (422, "bad_value")),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_cannot_be_used_are_refused(server: Server, name: str) -> None:
    labels, expected = LABELS[name]
    body = {"labels": labels, "embeddings": [[embedding(server)]]}
    assert error_of(classify_json(server, body)) == expected


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e999", "0", "1e300", "null", '"a"'])
def test_embeddings_that_are_none_are_refused(server: Server, bad: str) -> None:
    row = ",".join([bad] * 64)
    body = f'{{"labels": "mine", "embeddings": [[[{row}]]]}}'.encode()
    assert error_of(classify_json(server, body)) == (422, "bad_value")


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-1", "0", "1e300", '"soon"'])
def test_a_time_that_is_none_is_refused(server: Server, bad: str) -> None:
    row = ",".join(map(str, embedding(server)))
    body = f'{{"labels": "mine", "embeddings": [[[{row}]]], "timeout_ms": {bad}}}'.encode()
    assert error_of(classify_json(server, body)) == (422, "bad_value")


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "..", "a%00b", "%ff", "a" * 129, "-a", "a b", "%ed%a0%80"]
)
def test_a_bank_of_a_name_that_is_none_is_not_built(server: Server, name: str) -> None:
    with server.client() as client:
        answer = client.put(f"/v1/labels/{name}", json={"labels": ["a", "b"]})
        assert error_of(answer)[0] in (404, 405, 422)
        assert [bank["name"] for bank in client.get("/v1/labels").json()["banks"]] == ["mine"]


def request_bytes(method: str, path: str, body: Any, more: str = "") -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n{more}\r\n".encode() + content


def test_a_bank_may_have_10_000_labels_and_no_more(server: Server) -> None:
    labels = [f"label {n}" for n in range(10_000)]
    with server.client() as client:
        more = client.put("/v1/labels/large", json={"labels": [*labels, "one more"]})
        assert error_of(more) == (413, "too_many")
        templates = ["{} " + "again " * n for n in range(21)]
        long = client.put("/v1/labels/large", json={"labels": labels, "templates": templates})
        assert error_of(long) == (413, "too_many")
        given = {"labels": labels, "templates": ["{}"]}
        # A build holds nobody up. All of it is asked at once, so that no time passes in between.
        questions = request_bytes("PUT", "/v1/labels/large", given)
        questions += request_bytes("POST", "/v1/embed", {"texts": ["a"]})
        questions += request_bytes("GET", "/v1/labels/large", None, "Connection: close\r\n")
        with server.connect() as connection:
            connection.sendall(questions)
            _, *answers = read_all(connection).split(b"HTTP/1.1 ")
        assert [answer[:4] for answer in answers] == [b"202 ", b"200 ", b"200 "]
        build = json.loads(answers[-1].partition(b"\r\n\r\n")[2])["build"]
        assert build["state"] in ("waiting", "building")
        assert build["done"] < len(labels) / 4
        until(lambda: client.get("/v1/labels/large").json()["build"]["state"] == "ready")
        found = client.get("/v1/labels/large").json()
        assert found["labels"] == labels
        assert client.delete("/v1/labels/large").status_code == 204


def test_frames_that_are_returned_are_no_more_than_may_be_sent(
    server: Server, rendered_video: Path
) -> None:
    # 8 frames of 64 x 64 x 3 bytes for each of 30 views: 2,949,120 of at most 2,097,152 bytes.
    video = {"video": ("a.mp4", rendered_video.read_bytes())}
    fields = {"labels": "mine", "views": "10x3"}
    with server.client() as client:
        refused = client.post("/v1/classify", files=video, data={**fields, "return_frames": "true"})
        assert error_of(refused) == (413, "too_many")
        assert "2,949,120 bytes of frames to return" in refused.json()["error"]["message"]
        assert client.post("/v1/classify", files=video, data=fields).status_code == 200


GARBAGE: dict[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": bytes(100_000),
    "a line without end": b"GET /" + b"a" * 200_000,
    "headers without end": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000,
    "a version that is none": b"GET / HTTQ/1.1\r\nHost: localhost\r\n\r\n",
    "a method that is none": b"\x00\x01 / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Content-Length: 4\r\n\r\nabcd",
    "a length and chunks": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length that is none": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: -1\r\n\r\n",
    "a length of 5,000 digits": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    + b"9" * 5000
    + b"\r\n\r\n",
    "chunks of no length": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n",
    "chunks of a huge length": b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a path of odd bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path that is cut off": b"GET /%f HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_request_is_answered_by_4xx_or_an_end(server: Server, name: str) -> None:
    with server.connect(timeout_seconds=10.0) as connection:
        answer = b""
        with suppress(OSError):  # the server has closed it by then
            connection.sendall(GARBAGE[name])
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer


def test_a_client_that_goes_away_in_the_middle_of_a_body_leaves_nothing(server: Server) -> None:
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
    head += "X-Request-Id: gone-while-sending\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as connection:
        part = form_part("video", bytes(10_000), '; filename="a.mp4"')
        connection.sendall(head.encode() + part)
        until(lambda: any(each.is_file() for each in server.spool.rglob("*")))
    assert status_in_log(server, "gone-while-sending") == 499


def status_in_log(server: Server, request_id: str) -> int:
    """The status that the access log has for a request, once it is there."""

    def found() -> list[int]:
        lines = [line for line in server.logs() if line.get("request_id") == request_id]
        return [line["status"] for line in lines]

    until(lambda: bool(found()))
    (status,) = found()
    return status


def test_a_client_that_goes_away_while_it_waits_leaves_nothing(
    server: Server, rendered_video: Path
) -> None:
    parts = form_part("labels", b"mine") + form_part("views", b"10x3")
    for _ in range(16):
        parts += form_part("video", rendered_video.read_bytes(), '; filename="a.mp4"')
    parts += b"--xyz--\r\n"
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
    head += f"X-Request-Id: gone-while-waiting\r\nContent-Length: {len(parts)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + parts)
        until(lambda: any(each.is_file() for each in server.spool.rglob("*")))
    assert status_in_log(server, "gone-while-waiting") == 499


JSON_HEAD = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
# Sends bodies in pieces of one byte, one after the other, as fast as it goes. In processes of their
# own, as other clients are: threads of this one would take the interpreter from who is measured.
SENDER = """
import contextlib, socket, sys
host, port, head, pieces = sys.argv[1], int(sys.argv[2]), *map(str.encode, sys.argv[3:])
while True:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head)
        while True:
            connection.sendall(pieces)
"""
NUM_SENDERS, NUM_ANSWERS = 4, 20
# The server's own seconds of CPU from a question to its answer. Measured: 0.02 of most; and 3 to 4
# of each before pieces were given out a few at a time.
HEALTH_CPU_SECONDS = 0.5


@contextmanager
def sending_single_bytes(server: Server, *, is_chunked: bool) -> Iterator[None]:
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 1000000"
    pieces = b"1\r\n \r\n" * 10_000 if is_chunked else b" "
    host, port = server.address
    given = (host, str(port), (JSON_HEAD + length + b"\r\n\r\n").decode(), pieces.decode())
    senders = [
        subprocess.Popen([sys.executable, "-S", "-c", SENDER, *given]) for _ in range(NUM_SENDERS)
    ]
    try:
        yield
        assert all(sender.poll() is None for sender in senders)
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()


@pytest.mark.parametrize("is_chunked", [True, False], ids=["in chunks", "with its length"])
def test_bodies_in_single_bytes_hold_nobody_up(server: Server, is_chunked: bool) -> None:
    seconds = []
    with sending_single_bytes(server, is_chunked=is_chunked), server.client() as client:
        begun = server.cpu_seconds()
        until(lambda: server.cpu_seconds() > begun + 0.1)  # until it is busy with them
        for _ in range(NUM_ANSWERS):
            begun = server.cpu_seconds()
            assert client.get("/healthz").status_code == 200
            seconds.append(server.cpu_seconds() - begun)
            time.sleep(0.02)
    assert statistics.median(seconds) < HEALTH_CPU_SECONDS


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection, which it has to."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return answer


def test_a_body_in_single_bytes_is_refused_with_a_sentence(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\n \r\n" * 20_000)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert "send it in larger ones" in json.loads(body)["error"]["message"]


def test_a_body_in_many_pieces_is_read_as_it_is(server: Server) -> None:
    text = json.dumps({"texts": [f"label {n}" for n in range(200)], "timeout_ms": 60_000}).encode()
    text += b" " * (100_000 - len(text))
    with server.client() as client:
        headers = {"content-type": "application/json"}
        whole = client.post("/v1/embed", content=text, headers=headers).json()["embeddings"]
    with server.connect() as connection:
        connection.sendall(JSON_HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        pieces = (text[start : start + 20] for start in range(0, len(text), 20))
        connection.sendall(b"".join(b"14\r\n" + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n")
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["embeddings"] == whole


@pytest.mark.parametrize(
    "framing",
    [
        b"HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n",
    ],
)
@pytest.mark.parametrize("path", [b"/v1/embed", b"/v2/repository/index", b"/healthz"])
def test_what_has_two_ends_is_refused_and_nothing_after_it_is_served(
    server: Server, path: bytes, framing: bytes
) -> None:
    second = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(b"POST " + path + b" " + framing + b"\r\n0\r\n\r\n" + second)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Transfer-Encoding together with Content-Length" in answer


@pytest.mark.parametrize("sends_at_once", [True, False])
def test_an_early_refusal_arrives_as_a_whole(server: Server, sends_at_once: bool) -> None:
    head = JSON_HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES + 1)
    for _ in range(20):
        with server.connect(timeout_seconds=20.0) as connection:
            connection.sendall(head)
            if sends_at_once:
                connection.sendall(bytes(BODY_BYTES + 1))
            answer = b""
            while b'"request_id"' not in answer or not answer.endswith(b"}}"):
                data = connection.recv(65536)
                assert data, answer
                answer += data
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.count(b"HTTP/1.1 ") == 1
