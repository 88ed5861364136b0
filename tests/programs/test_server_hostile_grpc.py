"""Hostile calls over gRPC, to a real server: refused, soon, in little memory; and its end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serving_programs import END_SECONDS, Server, memory_bytes, running_server, until
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2

MIB = 1024 * 1024
BODY_BYTES = 8 * MIB
# Of all calls here together: 16 messages on their way and 32 streams of 8 MiB, and what is made of
# them. Measured: 245 MiB.
GROWTH_BYTES = 512 * MIB
PATIENCE_SECONDS = 60.0
SOON_SECONDS = 20.0  # less than a message may take
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def bundle_options() -> tuple[str, ...]:
    size = ("--max-body-mib", str(BODY_BYTES // MIB))
    return ("--runtime", "onnxruntime", "--no-verify", "--workers", "1", *size, "--grpc-port", "0")


@pytest.fixture(scope="module")
def server(
    tiny_bundle: Path, bundle_options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("grpc")
    with running_server(tiny_bundle, folder, *bundle_options) as server:
        before = memory_bytes(server.process.pid)
        yield server
        assert memory_bytes(server.process.pid, "VmHWM") - before < GROWTH_BYTES
        assert [line for line in server.logs() if line["level"] in ("error", "critical")] == []


def tokens(*, num_rows: int = 1, **fields: Any) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="textual", **fields)
    message.inputs.add(name="tokens", datatype="INT32", shape=[num_rows, 3])
    message.raw_input_contents.append(np.full((num_rows, 3), 2, "<i4").tobytes())
    return message


GOOD = tokens().SerializeToString()


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as it:
        yield it


@pytest.fixture(autouse=True)
def _still_good(server: Server) -> Iterator[None]:
    """After each test a good request is answered, and nothing is held any more."""
    yield
    with grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as it:
        assert it.unary_unary(INFER)(GOOD, timeout=PATIENCE_SECONDS)
    until(lambda: server.metric("actionclip_requests_in_flight") == 1)  # which asks


def refused(channel: grpc.Channel, data: bytes, *, path: str = INFER) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(data, timeout=PATIENCE_SECONDS)
    code, details = caught.value.code(), caught.value.details()
    assert 0 < len(details) < 1000
    return code, details


def field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def nested(depth: int) -> bytes:
    """Groups in groups, which protobuf has to walk through though it knows none of them."""
    return bytes([9 << 3 | 3]) * depth + bytes([9 << 3 | 4]) * depth


NAMED = field(1, b"textual")
MESSAGES: dict[str, Callable[[], bytes]] = {
    "no message": lambda: b"\xff" * 100,
    "a length beyond its end": lambda: b"\x0a\xff\xff\xff\x7fabc",
    "a number without end": lambda: b"\x80" * MIB,
    "inputs without end": lambda: NAMED + field(5, b"") * (3 * MIB),
    "outputs without end": lambda: NAMED + field(6, b"") * (3 * MIB),
    "tensors without end": lambda: NAMED + field(7, b"") * (3 * MIB),
    "parameters without end": lambda: NAMED + field(4, b"") * (3 * MIB),
    "values without end": lambda: NAMED + field(5, field(5, field(2, b"\0" * 7 * MIB))),
    "strings without end": lambda: NAMED + field(5, field(5, field(8, b"") * (3 * MIB))),
    "parameters of an input": lambda: NAMED + field(5, field(4, b"") * (3 * MIB)),
    "a shape without end": lambda: NAMED + field(5, field(3, b"\x7f" * 7 * MIB)),
    "a shape that overflows": lambda: (
        NAMED + field(5, field(3, (b"\xff" * 8 + b"\x7f") * 8)) + field(7, b"")
    ),
    "a negative shape": lambda: NAMED + field(5, field(3, b"\xff" * 9 + b"\x01")) + field(7, b""),
    "depth": lambda: nested(1_000_000),
    "depth in an input": lambda: NAMED + field(5, nested(1_000_000)),
    "a name without end": lambda: field(1, b"a" * 7 * MIB),
    "a name that is no UTF-8": lambda: field(1, b"\xff\xfe"),
    "an id without end": lambda: NAMED + field(3, b"a" * 100_000) + field(5, b""),
    "tensors without inputs": lambda: NAMED + field(7, bytes(12)),
    "another size": lambda: tokens().SerializeToString() + field(7, bytes(11)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_is_no_request_is_refused(channel: grpc.Channel, name: str) -> None:
    code, details = refused(channel, MESSAGES[name]())
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert details.endswith("."), details


def test_a_message_beyond_the_limit_is_refused(channel: grpc.Channel) -> None:
    code, details = refused(channel, bytes(BODY_BYTES + 1))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(BODY_BYTES) in details


def test_what_is_compressed_is_not_unpacked(server: Server) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(
        server.grpc_address, options, compression=grpc.Compression.Gzip
    ) as channel:
        code, _ = refused(channel, tokens(id="a" * 100_000).SerializeToString())
    assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("path", ["/", "/a", "/inference.GRPCInferenceService/RepositoryModelLoad"])
def test_other_methods_are_refused_and_make_no_metrics(
    server: Server, channel: grpc.Channel, path: str
) -> None:
    code, details = refused(channel, b"", path=path)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "ModelStreamInfer" in details
    with server.client() as client:
        assert "RepositoryModelLoad" not in client.get("/metrics").text


def test_a_call_without_a_message_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(INFER)(iter(()), timeout=PATIENCE_SECONDS)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class Stalled:
    """Calls whose messages never come, until the end of the block."""

    def __init__(self, channel: grpc.Channel, path: str, number: int) -> None:
        self._over = threading.Event()
        call = channel.stream_stream(path)
        self.calls = [call(self._never()) for _ in range(number)]

    def _never(self) -> Iterator[bytes]:
        self._over.wait(PATIENCE_SECONDS)
        yield from ()

    def __enter__(self) -> Stalled:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.calls:
            each.cancel()
        self._over.set()


def test_calls_that_send_nothing_keep_nobody_out(server: Server, channel: grpc.Channel) -> None:
    with Stalled(channel, INFER, 40):
        until(lambda: server.metric("actionclip_requests_in_flight") > 16)
        with grpc.insecure_channel(server.grpc_address) as other:
            assert other.unary_unary(INFER)(GOOD, timeout=PATIENCE_SECONDS)


def test_streams_are_bounded_and_what_is_open_goes_on(
    server: Server, channel: grpc.Channel
) -> None:
    with Stalled(channel, STREAM, 32):
        until(lambda: server.metric("actionclip_requests_in_flight") == 33)
        calls = channel.stream_stream(STREAM)
        with pytest.raises(grpc.RpcError) as caught:
            next(calls(iter([GOOD]), timeout=PATIENCE_SECONDS))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "32 streams are open" in caught.value.details()
        assert channel.unary_unary(INFER)(GOOD, timeout=PATIENCE_SECONDS)
    until(lambda: server.metric("actionclip_requests_in_flight") == 1)
    assert next(channel.stream_stream(STREAM)(iter([GOOD]), timeout=PATIENCE_SECONDS))


def test_thousands_of_calls_at_a_time_are_answered_or_refused(server: Server) -> None:
    def call_many(_: int) -> list[Any]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.grpc_address, options) as own:
            infer = own.unary_unary(INFER)
            calls = [infer.future(GOOD, timeout=PATIENCE_SECONDS) for _ in range(500)]
            return [each.exception() for each in calls]

    with ThreadPoolExecutor(8) as pool:
        errors = [each for batch in pool.map(call_many, range(8)) for each in batch]
    codes = {None if each is None else each.code() for each in errors}
    assert codes <= {None, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert None in codes


def test_a_stream_without_end_that_is_never_read_is_held_back(
    server: Server, channel: grpc.Channel
) -> None:
    sent, many = 0, tokens(num_rows=500).SerializeToString()

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100_000:
            sent += 1
            yield many

    call = channel.stream_stream(STREAM)(endless())
    before = -1
    while sent != before:  # until nothing more is taken
        before = sent
        time.sleep(1.0)
    call.cancel()
    assert sent < 100_000


def test_calls_that_are_given_up_leave_nothing(server: Server, channel: grpc.Channel) -> None:
    infer = channel.unary_unary(INFER)
    for _ in range(300):
        infer.future(GOOD).cancel()
    with suppress(grpc.RpcError):
        infer(GOOD, timeout=0.001)


def test_bytes_that_are_no_grpc_are_let_go(server: Server) -> None:
    host, _, port = server.grpc_address.rpartition(":")
    for sent in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", bytes(100_000), b"PRI * HTTP/2.0\r\n\r\nSM"):
        connection = socket.create_connection((host, int(port)), PATIENCE_SECONDS)
        connection.settimeout(0.5)  # a client that waits may be let wait
        with connection, suppress(OSError):
            connection.sendall(sent)
            while connection.recv(65536):
                pass


def test_requests_that_have_begun_are_answered_at_its_end_and_streams_are_told(
    tiny_bundle: Path, bundle_options: tuple[str, ...], tmp_path: Path
) -> None:
    codes: list[Any] = []
    answered = threading.Event()

    def load(address: str) -> None:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as own:
            while True:
                try:
                    own.unary_unary(INFER)(GOOD, timeout=PATIENCE_SECONDS)
                except grpc.RpcError as exc:
                    codes.append((exc.code(), exc.details()))
                    return
                codes.append(None)
                if len(codes) > 200:
                    answered.set()

    with running_server(tiny_bundle, tmp_path, *bundle_options) as server:
        threads = [
            threading.Thread(target=load, args=[server.grpc_address], daemon=True) for _ in range(8)
        ]
        for each in threads:
            each.start()
        ends: list[Any] = []
        with InferenceServerClient(server.grpc_address) as client:
            got: list[Any] = []
            tensor = InferInput("tokens", [1, 3], "INT32")
            tensor.set_data_from_numpy(np.array([[1, 2, 3]], np.int32))
            client.start_stream(
                lambda result, error: got.append(result) if error is None else ends.append(error)
            )
            client.async_stream_infer("textual", [tensor])
            until(lambda: len(got) == 1)
            assert answered.wait(PATIENCE_SECONDS)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(END_SECONDS) == 0
            until(lambda: len(ends) > 0)
        for each in threads:
            each.join(END_SECONDS)
        logs = server.logs()
    assert "the server is ending" in str(ends[0]).lower()
    refusals = [each for each in codes if each is not None]
    assert len(refusals) == 8
    assert {code for code, _ in refusals} == {grpc.StatusCode.UNAVAILABLE}
    # Each that the server has seen was answered: none is cut off in the middle.
    statuses = [line["status"] for line in logs if line.get("path") == INFER]
    assert statuses.count(200) == codes.count(None)
    assert set(statuses) <= {200, 503}
    assert [line for line in logs if line["level"] in ("error", "critical")] == []


def test_a_second_signal_refuses_what_is_still_on_its_way(
    tiny_bundle: Path, bundle_options: tuple[str, ...], tmp_path: Path
) -> None:
    with (
        running_server(tiny_bundle, tmp_path, *bundle_options) as server,
        grpc.insecure_channel(server.grpc_address) as channel,
        Stalled(channel, INFER, 1) as stalled,
    ):
        until(lambda: server.metric("actionclip_requests_in_flight") == 2)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not can_connect(server))
        assert server.process.poll() is None  # its message may still come
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SOON_SECONDS) == 0
        assert stalled.calls[0].code() is grpc.StatusCode.UNAVAILABLE
        assert "is ending" in stalled.calls[0].details()
        (line,) = [line for line in server.logs() if line.get("path") == INFER]
        assert (line["status"], line["code"]) == (503, "shutting_down")


def can_connect(server: Server) -> bool:
    try:
        socket.create_connection(server.address, timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True
