"""Requests for inference as strangers send them: their bodies, and the tensors in these."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.manifest import TensorSpec
from actionclip_deploy.serve.oip.oip_tensors import (
    BodyMemory,
    InferRequest,
    Model,
    parse_request,
)
from actionclip_deploy.serve.settings import Limits

FRAMES = Model(
    "visual",
    TensorSpec(name="frames", dtype="uint8", shape=("N", 2, 2, 3)),
    TensorSpec(name="frame_features", dtype="float32", shape=("N", 4)),
)
FEATURES = Model(
    "temporal",
    TensorSpec(name="features", dtype="float32", shape=("B", "T", 4)),
    TensorSpec(name="video_embedding", dtype="float32", shape=("B", 4)),
)
TOKENS = Model(
    "textual",
    TensorSpec(name="tokens", dtype="int32", shape=("M", "L")),
    TensorSpec(name="text_embedding", dtype="float32", shape=("M", 4)),
)


def parse(model: Model, request: Any, binary: bytes = b"") -> InferRequest:
    head = request if isinstance(request, bytes) else json.dumps(request).encode()
    return parse_request(model, bytearray(head + binary), len(head))


def refusal(model: Model, request: Any, binary: bytes = b"") -> str:
    with pytest.raises(RequestRefusedError) as refused:
        parse(model, request, binary)
    assert refused.value.status == 400
    return str(refused.value)


def tokens(data: Any = (1, 2, 3, 4, 5, 6), shape: Any = (2, 3), **fields: Any) -> dict[str, Any]:
    tensor = {"name": "tokens", "shape": shape, "datatype": "INT32", "data": data}
    return {"inputs": [{**tensor, **fields}]}


def binary_tokens(size: Any = 24, shape: Any = (2, 3), **fields: Any) -> dict[str, Any]:
    request = tokens(shape=shape, parameters={"binary_data_size": size}, **fields)
    if "data" not in fields:
        del request["inputs"][0]["data"]
    return request


BYTES = np.arange(6, dtype="<i4").tobytes()


def test_flat_and_nested_data_are_the_same() -> None:
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        array = parse(TOKENS, tokens(data)).array
        np.testing.assert_array_equal(array, [[1, 2, 3], [4, 5, 6]])
        assert array.dtype == np.int32


@pytest.mark.parametrize(
    "data",
    [
        [],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6, 7],
        [[1, 2], [3, 4], [5, 6]],
        [[1, 2, 3], [4, 5]],
        [[1, 2, 3]],
        [[1, 2, 3], 4],
        [[1, 2, 3], []],
        [[[1, 2, 3], [4, 5, 6]]],
    ],
)
def test_data_of_another_shape_are_refused(data: Any) -> None:
    error = refusal(TOKENS, tokens(data))
    assert error == (
        "`data` of the input tokens is not of shape [2, 3]; send its 6 values in row-major order, "
        "flat or nested as the shape."
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (True, "holds integers, true or false; INT32 takes integers alone."),
        (1.0, "holds integers, numbers with a point; INT32 takes integers alone."),
        ("1", "holds integers, strings;"),
        (None, "holds integers, null;"),
        ([1], "holds integers, lists;"),
        ({}, "holds integers, objects;"),
        (2**31, "send values from -2147483648 to 2147483647."),
        (-(2**31) - 1, "a value that INT32 does not"),
        (10**300, "a value that INT32 does not"),
    ],
)
def test_values_of_another_type_are_refused(value: Any, told: str) -> None:
    assert told in refusal(TOKENS, tokens([1, 2, value, 4, 5, 6]))


def test_the_ends_of_a_type_are_taken() -> None:
    data = [-(2**31), 2**31 - 1, 0]
    np.testing.assert_array_equal(parse(TOKENS, tokens(data, [1, 3])).array, [data])
    pixels = [0, 255] * 6
    request = {"inputs": [{"name": "frames", "shape": [1, 2, 2, 3], "datatype": "UINT8"}]}
    request["inputs"][0]["data"] = pixels
    np.testing.assert_array_equal(parse(FRAMES, request).array.ravel(), pixels)
    for value in (-1, 256):
        request["inputs"][0]["data"] = [*pixels[:11], value]
        assert "send values from 0 to 255." in refusal(FRAMES, request)


def features(data: str) -> bytes:
    head = '{"inputs": [{"name": "features", "shape": [1, 1, 4], "datatype": "FP32", "data": '
    return (head + data + "}]}").encode()


def test_numbers_with_and_without_a_point_are_float32() -> None:
    array = parse(FEATURES, features("[1, -2.5, 3e38, 0.1]")).array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.ravel(), np.array([1, -2.5, 3e38, 0.1], np.float32))


@pytest.mark.parametrize("value", ["1e39", "-1e999", "1" + "0" * 400])
def test_numbers_beyond_float32_are_refused(value: str) -> None:
    error = refusal(FEATURES, features(f"[1, 2, 3, {value}]"))
    assert "holds a value that FP32 does not; send values from -3.4" in error


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0x1", ".5", "1 2"])
def test_what_is_no_json_is_refused(value: str) -> None:
    assert "does not begin with JSON" in refusal(FEATURES, features(f"[1, 2, 3, {value}]"))


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"id": "\\ud800"}']
)
def test_a_body_that_is_no_json_is_refused(body: bytes) -> None:
    assert "does not begin with JSON" in refusal(TOKENS, body)


def test_reading_leaves_the_garbage_collector_as_it_was() -> None:
    for switch, is_enabled in ((gc.disable, False), (gc.enable, True)):
        switch()
        parse(TOKENS, tokens())
        refusal(TOKENS, b"[")
        assert gc.isenabled() == is_enabled


@pytest.mark.parametrize(
    ("request_json", "told"),
    [
        ([], "the body: "),
        ({}, "inputs: Field required"),
        ({"inputs": []}, "inputs: "),
        ({"inputs": [{}] * 17}, "inputs: "),
        ({"inputs": [7]}, "inputs.0: "),
        ({"inputs": [{"name": "tokens"}]}, "inputs.0.shape: Field required"),
        (tokens(shape=[2, -3]), "inputs.0.shape.1: Input should be greater than or equal to 1"),
        (tokens(shape=[2, 0]), "inputs.0.shape.1: "),
        (tokens(shape=[2, 3.0]), "inputs.0.shape.1: "),
        (tokens(shape=[True, 6]), "inputs.0.shape.0: "),
        (tokens(shape=[2**31, 2**31]), "inputs.0.shape.0: "),
        (tokens(shape=[1] * 9), "inputs.0.shape: "),
        (tokens(shape=6), "inputs.0.shape: "),
        (tokens(data="123456"), "inputs.0.data: "),
        (binary_tokens(-1), "inputs.0.parameters.binary_data_size: "),
        (binary_tokens("24"), "inputs.0.parameters.binary_data_size: "),
        (binary_tokens(10**4000), "inputs.0.parameters.binary_data_size: "),
        ({**tokens(), "id": 7}, "id: Input should be a valid string"),
        ({**tokens(), "id": "x" * 1001}, "id: "),
        ({**tokens(), "parameters": {"timeout": -1}}, "parameters.timeout: "),
        ({**tokens(), "parameters": {"timeout": 10**4000}}, "parameters.timeout: "),
        ({**tokens(), "parameters": {"timeout": True}}, "parameters.timeout: "),
        ({**tokens(), "parameters": {"binary_data_output": 1}}, "parameters.binary_data_output: "),
        ({**tokens(), "outputs": {}}, "outputs: "),
    ],
)
def test_a_request_of_another_form_is_refused(request_json: Any, told: str) -> None:
    error = refusal(TOKENS, request_json)
    assert error.startswith(told)
    assert error.endswith("; see /openapi.json.")


@pytest.mark.parametrize(
    ("request_json", "told"),
    [
        (tokens(name="frames"), "has the inputs ['frames']; textual takes one, 'tokens'."),
        ({"inputs": tokens()["inputs"] * 2}, "has the inputs ['tokens', 'tokens']; textual takes"),
        (tokens(name="x" * 100_000), "...; textual takes one, 'tokens'."),
        (tokens(datatype="INT64"), "is of type 'INT64'; textual takes INT32."),
        (tokens(shape=[6]), "has shape (6,) and dtype int32; expected shape (M, L) and"),
        (tokens(shape=[2, 3, 1]), "has shape (2, 3, 1) and dtype int32; expected"),
        ({**tokens(), "outputs": [{"name": "x"}]}, "outputs ['x']; textual gives one"),
        ({**tokens(), "outputs": [{"name": "text_embedding"}] * 2}, "textual gives one"),
        (
            {**tokens(), "outputs": [{"name": "text_embedding"}, {"name": "x"}]},
            "outputs ['text_embedding', 'x']; textual gives one, 'text_embedding'.",
        ),
        ({**tokens(), "parameters": {"sequence_id": 3}}, "the extension for sequences"),
        (tokens(parameters={"shared_memory_region": "a"}), "the extension for shared memory"),
        (
            {
                **tokens(),
                "outputs": [{"name": "text_embedding", "parameters": {"classification": 3}}],
            },
            "the extension for classification",
        ),
    ],
)
def test_a_request_for_something_else_is_refused(request_json: Any, told: str) -> None:
    error = refusal(TOKENS, request_json)
    assert told in error
    assert len(error) < 300


@pytest.mark.parametrize("padding", range(4))
def test_binary_data_are_read_wherever_they_begin(padding: int) -> None:
    head = json.dumps(binary_tokens()).encode() + b" " * padding
    array = parse(TOKENS, head, BYTES).array
    np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
    assert array.dtype == np.dtype(np.int32)
    assert array.flags.aligned
    assert array.flags.c_contiguous


def test_pixels_are_not_copied() -> None:
    num_frames = 50_000
    shape = [num_frames, 2, 2, 3]
    parameters = {"binary_data_size": num_frames * 12}
    tensor = {"name": "frames", "shape": shape, "datatype": "UINT8", "parameters": parameters}
    head = json.dumps({"inputs": [tensor]}).encode()
    body = bytearray(head) + np.arange(num_frames * 12, dtype=np.uint8).tobytes()
    parse_request(FRAMES, body, len(head))  # what is made once is made now
    tracemalloc.start()
    array = parse_request(FRAMES, body, len(head)).array
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.shape == tuple(shape)
    assert peak_bytes < array.nbytes / 10
    body[len(head)] = 77
    assert array.flat[0] == 77


@pytest.mark.parametrize(
    ("request_json", "binary", "told"),
    [
        (binary_tokens(), BYTES[:-1], "takes 24 bytes; `binary_data_size` is 24 and 23 bytes"),
        (binary_tokens(), BYTES + b"x", "`binary_data_size` is 24 and 25 bytes follow"),
        (binary_tokens(23), BYTES[:-1], "`binary_data_size` is 23 and 23 bytes follow"),
        (binary_tokens(0), b"", "`binary_data_size` is 0 and 0 bytes follow"),
        (binary_tokens(), b"", "whose length is given in Inference-Header-Content-Length."),
        (
            binary_tokens(24, (2**31 - 1, 2**31 - 1)),
            BYTES,
            "takes 18,446,744,056,529,682,436 bytes;",
        ),
        (binary_tokens(data=[1, 2, 3, 4, 5, 6]), BYTES, "both `data` and `binary_data_size`"),
        (tokens(), BYTES, "has its `data` and 24 bytes follow the JSON"),
        ({"inputs": [{"name": "tokens", "shape": [2, 3], "datatype": "INT32"}]}, b"", "no `data`"),
    ],
)
def test_binary_data_that_do_not_fit_are_refused(
    request_json: Any, binary: bytes, told: str
) -> None:
    assert told in refusal(TOKENS, request_json, binary)


def test_a_shape_costs_no_memory_before_its_values_are_there() -> None:
    head = json.dumps(tokens([1], (2**31 - 1, 2**31 - 1))).encode()
    tracemalloc.start()
    error = refusal(TOKENS, head)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "send its 4,611,686,014,132,420,609 values" in error
    assert peak_bytes < 1_000_000


def test_the_rest_of_a_request_is_read() -> None:
    request = {
        **tokens(),
        "id": "a",
        "parameters": {"timeout": 1500, "binary_data_output": True, "other": [1]},
        "outputs": [{"name": "text_embedding", "parameters": {"binary_data": False}}],
    }
    read = parse(TOKENS, request)
    assert (read.request_id, read.is_binary, read.timeout_seconds) == ("a", False, 0.0015)
    del request["outputs"]
    request["parameters"]["timeout"] = 0
    read = parse(TOKENS, request)
    assert (read.is_binary, read.timeout_seconds) == (True, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def changed(request: Any, path: list[int], value: Any) -> Any:
    """A copy of a request in which one place, found by a path, holds something else."""
    if not path or not isinstance(request, (dict, list)) or not request:
        return value
    keys = list(request) if isinstance(request, dict) else list(range(len(request)))
    key = keys[path[0] % len(keys)]
    copy = request.copy()
    copy[key] = changed(request[key], path[1:], value)
    return copy


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), JSON, st.binary(max_size=30))
def test_whatever_is_sent_is_read_or_refused(path: list[int], value: Any, binary: bytes) -> None:
    whole = {
        **tokens([1, 2, 3, 4, 5, 6], [2, 3], parameters={}),
        "outputs": [{"name": "text_embedding", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 5, "binary_data_output": True},
    }
    try:
        array = parse(TOKENS, changed(whole, path, value), binary).array
    except RequestRefusedError as refused:
        facts = (refused.status, len(str(refused)) < 500)
        expected: tuple[object, ...] = (400, True)
    else:
        facts = (array.dtype, array.ndim, array.size)
        expected = (np.int32, 2, 6)
    assert facts == expected


@given(st.binary(max_size=200), st.integers(0, 200))
def test_bytes_of_any_kind_are_refused(body: bytes, json_bytes: int) -> None:
    with pytest.raises(RequestRefusedError):
        parse_request(TOKENS, bytearray(body), min(json_bytes, len(body)))


# Bodies: where the JSON ends, and what all of them together may take.

JSON_LIMIT = 10


def make_memory(body_bytes: int = 100) -> BodyMemory:
    batcher = SimpleNamespace(retry_after_seconds=0.2)
    service: Any = SimpleNamespace(limits=Limits(body_bytes=body_bytes), batcher=batcher)
    return BodyMemory(service)


def make_request(chunks: Sequence[bytes], **headers: str) -> Request:
    messages = [{"type": "http.request", "body": each, "more_body": True} for each in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def receive() -> Any:
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": given}, receive)


def read_body(memory: BodyMemory, chunks: Sequence[bytes], **headers: str) -> tuple[bytes, int]:
    async def run() -> tuple[bytes, int]:
        with memory.body() as body:
            await body.read(make_request(chunks, **headers), JSON_LIMIT)
            assert memory.num_bytes == len(body.data)
            return bytes(body.data), body.json_bytes

    return asyncio.run(run())


def refused_body(
    memory: BodyMemory, chunks: Sequence[bytes], **headers: str
) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as refused:
        read_body(memory, chunks, **headers)
    assert memory.num_bytes == 0
    return refused.value


def test_a_body_without_the_header_is_json() -> None:
    memory = make_memory()
    assert read_body(memory, [b"{", b"}"]) == (b"{}", 2)
    assert memory.num_bytes == 0


def test_the_header_says_where_the_json_ends() -> None:
    body = read_body(
        make_memory(), [b"{}1", b"23456789", b"0123"], inference_header_content_length="2"
    )
    assert body == (b"{}1234567890123", 2)


@pytest.mark.parametrize(
    "value", ["", "0", "-2", "+2", "2.0", "two", " 2 3", "0x2", "\u0662", "1" * 5000]
)
def test_a_header_that_is_no_length_is_refused(value: str) -> None:
    error = refused_body(make_memory(), [b"{}"], inference_header_content_length=value)
    assert error.status == 400
    assert "give the length of the JSON that the body begins with, in bytes." in str(error)
    assert len(str(error)) < 200


def test_a_body_that_is_shorter_than_its_header_says_is_refused() -> None:
    error = refused_body(make_memory(), [b"{}"], inference_header_content_length="3")
    assert error.status == 400
    assert str(error) == (
        "Inference-Header-Content-Length is 3 and the body has 2 bytes; give the length of its "
        "JSON."
    )


def test_json_beyond_its_limit_is_refused_before_all_of_it_is_read() -> None:
    error = refused_body(make_memory(), [b"[" * (JSON_LIMIT + 1)] * 2)
    assert error.status == 413
    assert "more than 10 bytes of JSON" in str(error)
    error = refused_body(make_memory(), [], inference_header_content_length="11")
    assert (error.status, error.code) == (413, "too_many")
    read_body(make_memory(), [b"[" * JSON_LIMIT])
    read_body(make_memory(), [b"[" * (JSON_LIMIT + 1)], inference_header_content_length="10")


def test_a_body_that_is_not_compressed_may_say_so() -> None:
    assert read_body(make_memory(), [b"{}"], content_encoding="Identity") == (b"{}", 2)
    error = refused_body(make_memory(), [b"{}"], content_encoding="gzip")
    assert (error.status, error.code) == (415, "unsupported_type")


def test_all_bodies_together_have_a_limit_and_give_back_what_they_took() -> None:
    memory = make_memory(body_bytes=5)
    assert memory.limit_bytes == 40

    async def run() -> None:
        with memory.body() as first, memory.body() as second:
            await first.read(make_request([b"x" * 20], inference_header_content_length="1"), 9)
            await second.read(make_request([b"x" * 20], inference_header_content_length="1"), 9)
            with memory.body() as third:
                with pytest.raises(RequestRefusedError, match="may take 40 bytes") as refused:
                    await third.read(make_request([b"x"]), 9)
                assert refused.value.status == 429
                assert refused.value.retry_after_seconds == 1.0
            assert memory.num_bytes == 40
        assert memory.num_bytes == 0
        with memory.body() as fourth:
            await fourth.read(make_request([b"x"]), 9)

    asyncio.run(run())
