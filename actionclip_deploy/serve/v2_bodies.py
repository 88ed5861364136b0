"""Bodies of tensors in memory: each bounded, and all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.v2_refusals import memory_full, too_many_bytes_of_json

HEADER = "inference-header-content-length"

# Of the largest size; as many as this may be in memory at a time, or more that are smaller.
_LARGEST_BODIES = 8
_DIGITS = 12  # of a number in a header; more than any body has


class BodyMemory:
    """Counts the bytes of all bodies that are in memory.

    Args:
        service: Has the limits, and knows when some memory will be free.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.limit_bytes = _LARGEST_BODIES * service.limits.body_bytes
        self.num_bytes = 0

    @contextmanager
    def body(self) -> Iterator[Body]:
        """A body whose bytes count until the end of the context."""
        body = Body(self)
        try:
            yield body
        finally:
            self.num_bytes -= len(body.data)

    def take(self, num_bytes: int) -> None:
        """Count bytes that have come.

        Raises:
            RequestRefusedError: If there are too many together (429).
        """
        if self.num_bytes + num_bytes > self.limit_bytes:
            seconds = max(1.0, self._service.batcher.retry_after_seconds)
            raise memory_full(self.limit_bytes, seconds)
        self.num_bytes += num_bytes


class Body:
    """One body: JSON, and binary tensors after it.

    Attributes:
        data: All of it.
        json_bytes: How much of it is JSON; None before it is read.
    """

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.data = bytearray()
        self.json_bytes = 0

    async def read(self, request: Request, max_json_bytes: int) -> None:
        """Read the body of a request, whose length Guards have limited.

        Raises:
            RequestRefusedError: If its headers do not fit, or it is too large.
        """
        _check_encoding(request)
        json_bytes = _json_bytes(request)
        if json_bytes is not None and json_bytes > max_json_bytes:
            raise too_many_bytes_of_json(max_json_bytes)
        async for chunk in request.stream():
            self._memory.take(len(chunk))
            self.data += chunk
            if json_bytes is None and len(self.data) > max_json_bytes:
                raise too_many_bytes_of_json(max_json_bytes)
        if json_bytes is not None and json_bytes > len(self.data):
            raise refusals.bad_request(
                f"Inference-Header-Content-Length is {json_bytes} and the body has "
                f"{len(self.data)} bytes; give the length of its JSON."
            )
        self.json_bytes = len(self.data) if json_bytes is None else json_bytes


def _json_bytes(request: Request) -> int | None:
    """How much of the body is JSON by its header; None where there is no such header."""
    given = request.headers.get(HEADER)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= _DIGITS and int(given) > 0):
        raise refusals.bad_request(
            f"Inference-Header-Content-Length is {given[:40]!r}; give the length of the JSON that "
            "the body begins with, in bytes."
        )
    return int(given)


def _check_encoding(request: Request) -> None:
    given = request.headers.get("content-encoding", "identity").strip().lower()
    if given != "identity":
        raise refusals.unsupported_type(
            f"The body is compressed ({given[:40]!r}), which this server does not read; send it as "
            "it is."
        )
