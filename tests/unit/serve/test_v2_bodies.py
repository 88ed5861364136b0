"""Bodies of /v2: where the JSON ends, and what all bodies together may take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve.oip_tensors import BodyMemory
from actionclip_deploy.serve.settings import Limits

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


def read(memory: BodyMemory, chunks: Sequence[bytes], **headers: str) -> tuple[bytes, int]:
    async def run() -> tuple[bytes, int]:
        with memory.body() as body:
            await body.read(make_request(chunks, **headers), JSON_LIMIT)
            assert memory.num_bytes == len(body.data)
            return bytes(body.data), body.json_bytes

    return asyncio.run(run())


def refusal(memory: BodyMemory, chunks: Sequence[bytes], **headers: str) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as refused:
        read(memory, chunks, **headers)
    assert memory.num_bytes == 0
    return refused.value


def test_a_body_without_the_header_is_json() -> None:
    memory = make_memory()
    assert read(memory, [b"{", b"}"]) == (b"{}", 2)
    assert memory.num_bytes == 0


def test_the_header_says_where_the_json_ends() -> None:
    body = read(make_memory(), [b"{}1", b"23456789", b"0123"], inference_header_content_length="2")
    assert body == (b"{}1234567890123", 2)


@pytest.mark.parametrize(
    "value", ["", "0", "-2", "+2", "2.0", "two", " 2 3", "0x2", "\u0662", "1" * 5000]
)
def test_a_header_that_is_no_length_is_refused(value: str) -> None:
    error = refusal(make_memory(), [b"{}"], inference_header_content_length=value)
    assert error.status == 400
    assert "give the length of the JSON that the body begins with, in bytes." in str(error)
    assert len(str(error)) < 200


def test_a_body_that_is_shorter_than_its_header_says_is_refused() -> None:
    error = refusal(make_memory(), [b"{}"], inference_header_content_length="3")
    assert error.status == 400
    assert str(error) == (
        "Inference-Header-Content-Length is 3 and the body has 2 bytes; give the length of its "
        "JSON."
    )


def test_json_beyond_its_limit_is_refused_before_all_of_it_is_read() -> None:
    error = refusal(make_memory(), [b"[" * (JSON_LIMIT + 1)] * 2)
    assert error.status == 413
    assert "more than 10 bytes of JSON" in str(error)
    error = refusal(make_memory(), [], inference_header_content_length="11")
    assert (error.status, error.code) == (413, "too_many")
    read(make_memory(), [b"[" * JSON_LIMIT])
    read(make_memory(), [b"[" * (JSON_LIMIT + 1)], inference_header_content_length="10")


def test_a_body_that_is_not_compressed_may_say_so() -> None:
    assert read(make_memory(), [b"{}"], content_encoding="Identity") == (b"{}", 2)
    error = refusal(make_memory(), [b"{}"], content_encoding="gzip")
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
