"""The inference protocol over gRPC, with a service in this process: messages, guards, limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from hypothesis import given
from hypothesis import strategies as st
from serving import make_service
from tritonclient.grpc import model_config_pb2, service_pb2

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.manifest import TensorSpec
from actionclip_deploy.serve.oip import Inference
from actionclip_deploy.serve.oip.oip_tensors import InferRequest, Model
from actionclip_deploy.serve.rpc import rpc_server, wire
from actionclip_deploy.serve.rpc.rpc_server import RpcServer

FOLDER = Path(wire.__file__).parent
INFER = f"/{wire.SERVICE}/ModelInfer"
TOKENS = Model(
    "textual",
    TensorSpec(name="tokens", dtype="int32", shape=("M", "L")),
    TensorSpec(name="text_embedding", dtype="float32", shape=("M", 4)),
)
PATIENCE_SECONDS = 60.0


def test_the_descriptors_are_those_of_the_proto_file(tmp_path: Path) -> None:
    made = tmp_path / "made.binpb"
    arguments = ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={made}", "open_inference.proto"]
    assert protoc.main(arguments) == 0
    kept = (FOLDER / "open_inference.binpb").read_bytes()
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read(kept), "make open_inference.binpb again, as it says"


def test_every_field_has_the_number_and_type_that_triton_gives_it() -> None:
    file = descriptor_pb2.FileDescriptorSet.FromString(
        (FOLDER / "open_inference.binpb").read_bytes()
    ).file[0]

    def compare(ours: Any, theirs: Any) -> None:
        for field in ours.field:
            other = theirs.fields_by_name[field.name]
            kind = (field.number, field.type, field.label == field.LABEL_REPEATED)
            assert kind == (other.number, other.type, other.is_repeated), field.name
        for nested in ours.nested_type:
            compare(nested, theirs.nested_types_by_name[nested.name])

    theirs = {
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
        **service_pb2.DESCRIPTOR.message_types_by_name,
    }
    for message in file.message_type:
        compare(message, theirs[message.name])
    (service,) = file.service
    for method in service.method:
        known = service_pb2.DESCRIPTOR.services_by_name[service.name].methods_by_name[method.name]
        names = (known.input_type.full_name, known.output_type.full_name)
        assert (method.input_type[1:], method.output_type[1:]) == names
    (kinds,) = file.enum_type
    numbers = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    assert all(numbers[each.name].number == each.number for each in kinds.value)


def request(**fields: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name="textual", **fields)
    message.inputs.add(name="tokens", datatype="INT32", shape=[2, 3])
    return message


def raw() -> Any:
    message = request()
    message.raw_input_contents.append(np.arange(6, dtype="<i4").tobytes())
    return message


def typed() -> Any:
    message = request()
    message.inputs[0].contents.int_contents.extend(range(6))
    return message


def parse(message: Any, *, max_bytes: int = 1000) -> InferRequest:
    return wire.look_through(message.SerializeToString(), max_bytes=max_bytes).read(TOKENS)


@pytest.mark.parametrize("make", [raw, typed])
def test_raw_and_typed_contents_are_the_same(make: Callable[[], Any]) -> None:
    message = make()
    message.id = "7"
    message.parameters["timeout"].int64_param = 2_000_000
    parsed = parse(message)
    np.testing.assert_array_equal(parsed.array, [[0, 1, 2], [3, 4, 5]])
    assert parsed.array.dtype == np.int32
    assert (parsed.request_id, parsed.timeout_seconds) == ("7", 2.0)
    # What came in as bytes goes out as bytes.
    assert parsed.is_binary == (make is raw)
    answer = service_pb2.ModelInferResponse.FromString(
        wire.answer_message(TOKENS, np.ones((2, 4), np.float32), parsed).SerializeToString()
    )
    assert len(answer.raw_output_contents) == (make is raw)
    assert len(answer.outputs[0].contents.fp32_contents) == (0 if make is raw else 8)


def test_raw_pixels_are_not_copied() -> None:
    frames = Model(
        "visual",
        TensorSpec(name="frames", dtype="uint8", shape=("N", 2, 2, 3)),
        TensorSpec(name="frame_features", dtype="float32", shape=("N", 4)),
    )
    message = service_pb2.ModelInferRequest(raw_input_contents=[bytes(range(12))])
    message.inputs.add(name="frames", datatype="UINT8", shape=[1, 2, 2, 3])
    data = message.SerializeToString()
    array = wire.look_through(data, max_bytes=1000).read(frames).array
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


def change(name: str) -> Any:
    message = raw()
    if name == "both":
        message.inputs[0].contents.int_contents.append(1)
    elif name == "neither":
        del message.raw_input_contents[:]
    elif name == "another type's":
        message = request()
        message.inputs[0].contents.fp32_contents.extend([1.0] * 6)
    elif name == "two":
        message.raw_input_contents.append(b"")
    elif name == "short":
        message.raw_input_contents[0] = bytes(23)
    elif name == "sequence":
        message.parameters["sequence_id"].int64_param = 3
    elif name == "classes":
        message.outputs.add(name="text_embedding").parameters["classification"].int64_param = 3
    elif name == "shared memory":
        message.inputs[0].parameters["shared_memory_region"].string_param = "a"
    elif name == "another output":
        message.outputs.add(name="logits")
    elif name == "another name":
        message.inputs[0].name = "words"
    elif name == "a timeout in words":
        message.parameters["timeout"].string_param = "soon"
    return message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("both", "has both `contents` and raw_input_contents"),
        ("neither", "has no values; send int_contents, or raw_input_contents."),
        ("another type's", "has fp32_contents; send int_contents"),
        ("two", "has 1 inputs and 2 raw_input_contents"),
        ("short", "takes 24 bytes, and its raw_input_contents has 23."),
        ("sequence", "the extension for sequences"),
        ("classes", "the extension for classification"),
        ("shared memory", "the extension for shared memory"),
        ("another output", "gives one, 'text_embedding'."),
        ("another name", "takes one, 'tokens'."),
        ("a timeout in words", "parameters.timeout"),
    ],
)
def test_a_request_for_something_else_is_refused(name: str, told: str) -> None:
    with pytest.raises(RequestRefusedError) as refused:
        parse(change(name))
    assert refused.value.status == 400
    assert told in str(refused.value)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(data: bytes) -> None:
    with suppress(RequestRefusedError):
        wire.look_through(data, max_bytes=100).read(TOKENS)


@given(st.integers(0, 60), st.binary(max_size=4))
def test_a_message_with_other_bytes_in_it_is_read_or_refused(place: int, put: bytes) -> None:
    good = raw().SerializeToString()
    with suppress(RequestRefusedError):
        wire.look_through(good[:place] + put + good[place:], max_bytes=1000).read(TOKENS)


def test_what_is_no_raw_tensor_has_a_limit_of_its_own() -> None:
    assert parse(raw(), max_bytes=60).array.shape == (2, 3)
    with pytest.raises(RequestRefusedError) as refused:
        parse(typed(), max_bytes=20)
    assert (refused.value.status, refused.value.code) == (413, "too_many")


def serve(
    folder: Path, use: Callable[[Any, Any], Awaitable[Any]], *, starts: bool = True, **options: Any
) -> Any:
    """Use a channel to a server, and its service."""

    async def run() -> Any:
        service = make_service(folder, grpc_port=0, **options)
        server = RpcServer(Inference(service))
        await server.start()
        if starts:
            await service.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                return await use(channel, service)
        finally:
            await server.give_up()
            if starts:
                await service.stop()

    return asyncio.run(run())


async def refusal(channel: Any, data: bytes, *, path: str = INFER, **options: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary(path)(data, timeout=PATIENCE_SECONDS, **options)
    return refused.value


def test_with_keys_a_call_needs_one_and_its_message_is_not_read(tmp_path: Path) -> None:
    async def use(channel: Any, service: Any) -> None:
        for metadata in ((), (("authorization", "Bearer other"),), (("x-api-key", "other"),)):
            error = await refusal(channel, raw().SerializeToString(), metadata=metadata)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        # No message is waited for: there is none.
        call = channel.stream_unary(INFER)()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(call, PATIENCE_SECONDS)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for metadata in ((("authorization", "bearer a-key"),), (("x-api-key", "a-key"),)):
            data = raw().SerializeToString()
            answer = await channel.unary_unary(INFER)(data, metadata=metadata)
            assert service_pb2.ModelInferResponse.FromString(answer).model_name == "textual"
        for method in ("ServerLive", "ServerReady", "ServerMetadata"):
            assert await channel.unary_unary(f"/{wire.SERVICE}/{method}")(b"")
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
        error = await refusal(channel, b"", path=f"/{wire.SERVICE}/ModelMetadata")
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    serve(tmp_path, use, api_keys=("a-key",))


def test_a_server_that_is_not_ready_says_so(tmp_path: Path) -> None:
    async def use(channel: Any, _: Any) -> None:
        error = await refusal(channel, raw().SerializeToString())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "still starting" in error.details()
        told = dict(error.trailing_metadata())
        assert told["actionclip-code"] == "not_ready"
        assert int(told["grpc-retry-pushback-ms"]) == 5000
        assert await channel.unary_unary(f"/{wire.SERVICE}/ServerLive")(b"") == b"\x08\x01"
        assert await channel.unary_unary(f"/{wire.SERVICE}/ServerReady")(b"") == b""  # false
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"") == b"\x08\x02"  # NOT_SERVING

    serve(tmp_path, use, starts=False)


def test_calls_are_counted_and_logged_as_requests_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "actionclip_deploy.serve.access")

    async def use(channel: Any, service: Any) -> str:
        call = channel.unary_unary(INFER)(
            raw().SerializeToString(), metadata=(("x-request-id", "mine"),)
        )
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
        await refusal(channel, b"\xff")
        return str(service.metrics.render().decode())

    text = serve(tmp_path, use)
    labels = f'method="POST",route="{INFER}"'
    assert f'actionclip_requests_total{{{labels},status="200"}} 1.0' in text
    assert f'actionclip_requests_total{{{labels},status="400"}} 1.0' in text
    assert 'actionclip_rejections_total{code="bad_request"} 1.0' in text
    (first, second) = [each for each in caplog.records if each.name.endswith("access")]
    assert (vars(first)["request_id"], vars(first)["status"]) == ("mine", 200)
    assert (vars(second)["code"], vars(second)["client"]) == ("bad_request", "127.0.0.1")


def test_places_are_shared_with_http(tmp_path: Path) -> None:
    async def use(channel: Any, service: Any) -> None:
        with service.place():
            error = await refusal(channel, raw().SerializeToString())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 requests are worked on, which is the limit" in error.details()
        assert await channel.unary_unary(INFER)(raw().SerializeToString())

    serve(tmp_path, use, limits={"requests": 1})


def test_the_time_of_a_client_is_the_time_of_its_request(tmp_path: Path) -> None:
    async def use(channel: Any, service: Any) -> None:
        service.batcher.in_thread(lambda: __import__("time").sleep(1.0))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(INFER)(raw().SerializeToString(), timeout=0.2)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while service.batcher.num_waiting:
            await asyncio.sleep(0.01)

    serve(tmp_path, use)


def test_a_client_that_reads_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "IDLE_SECONDS", 0.3)
    many = service_pb2.ModelInferRequest(model_name="textual")
    many.inputs.add(name="tokens", datatype="INT32", shape=[1000, 2])
    many.raw_input_contents.append(np.ones((1000, 2), "<i4").tobytes())
    data = many.SerializeToString()

    async def use(channel: Any, service: Any) -> None:
        call = channel.stream_stream(f"/{wire.SERVICE}/ModelStreamInfer")()

        async def write() -> None:
            with suppress(asyncio.InvalidStateError):
                for _ in range(3000):  # whose answers are 190 MB, which no window holds
                    await call.write(data)

        writing = asyncio.ensure_future(write())
        while "disconnected" not in service.metrics.render().decode():
            await asyncio.sleep(0.05)
        # Its place is free, though nothing could be told to it.
        assert await channel.unary_unary(INFER)(raw().SerializeToString())
        call.cancel()
        writing.cancel()

    serve(tmp_path, use)


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        first = RpcServer(Inference(make_service(tmp_path / "a", grpc_port=0)))
        await first.start()
        port = int(first.address.rpartition(":")[2])
        second = RpcServer(Inference(make_service(tmp_path / "b", grpc_port=port)))
        with pytest.raises(
            Exception, match=f"Nothing can listen for gRPC on 127.0.0.1 port {port}"
        ):
            await second.start()
        await first.give_up()

    asyncio.run(run())
