"""Carries out one attempt with httpx, whose errors end here."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from actionclip_deploy.client.exchange import Attempt, NoReply, Reply
from actionclip_deploy.errors import MissingExtraError

try:
    import httpx
except ImportError as exc:
    raise MissingExtraError("The client of a server", "client") from exc

# Errors of attempts that no server has seen.
_NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


def open_client(
    base_url: str, headers: dict[str, str], transport: httpx.BaseTransport | None
) -> httpx.Client:
    """A blocking client; redirects are answers like others, so that no key goes elsewhere."""
    return httpx.Client(
        base_url=base_url, headers=headers, transport=transport, follow_redirects=False
    )


def open_async_client(
    base_url: str, headers: dict[str, str], transport: httpx.AsyncBaseTransport | None
) -> httpx.AsyncClient:
    """An asynchronous client, otherwise as `open_client`."""
    return httpx.AsyncClient(
        base_url=base_url, headers=headers, transport=transport, follow_redirects=False
    )


def send(client: httpx.Client, attempt: Attempt) -> Reply | NoReply:
    """Carry out an attempt."""
    with ExitStack() as stack:
        request = client.build_request(**_request(attempt, stack))
        try:
            return _reply(client.send(request))
        except httpx.HTTPError as exc:
            return _no_reply(exc, attempt)


async def send_async(client: httpx.AsyncClient, attempt: Attempt) -> Reply | NoReply:
    """Carry out an attempt; files are read in the event loop, 64 KiB at a time."""
    with ExitStack() as stack:
        request = client.build_request(**_request(attempt, stack))
        try:
            return _reply(await client.send(request))
        except httpx.HTTPError as exc:
            return _no_reply(exc, attempt)


def _request(attempt: Attempt, stack: ExitStack) -> dict[str, Any]:
    call = attempt.call
    given: dict[str, Any] = {
        "method": call.method,
        "url": call.path,
        "timeout": httpx.Timeout(attempt.seconds),
    }
    if call.params:
        given["params"] = dict(call.params)
    if call.json is not None:
        given["json"] = dict(call.json)
    if call.uploads:
        given["data"] = dict(call.fields)
        given["files"] = [
            (each.field, (each.name, each.open(stack), "application/octet-stream"))
            for each in call.uploads
        ]
    return given


def _reply(response: httpx.Response) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, response.content)


def _no_reply(error: httpx.HTTPError, attempt: Attempt) -> NoReply:
    if isinstance(error, httpx.TimeoutException):
        return NoReply(f"{attempt.seconds:.3g} seconds", True, is_late=True)
    reason = str(error) or type(error).__name__
    return NoReply(reason, not isinstance(error, _NOT_CONNECTED))
