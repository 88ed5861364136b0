"""One request with its retries, as steps: the thread or the event loop carries them out.

A generator yields an `Attempt` and is sent what came of it, or yields a `Pause`. So the blocking
and the asynchronous client share everything but the sending.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from itertools import count
from typing import Any, TypeAlias, TypeVar

from actionclip_deploy.client.uploads import Upload
from actionclip_deploy.errors import ActionClipError, RequestRefusedError, RuntimeUnavailableError

Result = TypeVar("Result")

# What a server answers that has too much to do, or is starting or ending.
_WORTH_ANOTHER_TRY = (429, 503)
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
# Beyond Retry-After, as a share of it, so that clients do not all come back at once.
_JITTER = 0.1
_PHRASES = {each.value: each.phrase for each in HTTPStatus}


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        method: Of HTTP.
        path: After the server's address.
        json: Body in JSON; None without one.
        fields: Of a form.
        uploads: Files of a form.
        params: Of the query.
        is_idempotent: Whether doing it twice is as doing it once.
    """

    method: str
    path: str
    json: Mapping[str, Any] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    uploads: tuple[Upload, ...] = ()
    params: Mapping[str, int] = field(default_factory=dict)
    is_idempotent: bool = True

    @property
    def can_be_sent_again(self) -> bool:
        """Whether its body can be read a second time."""
        return all(each.can_repeat for each in self.uploads)


@dataclass(frozen=True)
class Reply:
    """What a server answered; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the request was done."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body.

        Raises:
            ValueError: If it is no JSON.
        """
        return json.loads(self.body)


@dataclass(frozen=True)
class NoReply:
    """An attempt that got no answer.

    Attributes:
        reason: In words.
        was_connected: Whether the server may have got the request.
        is_late: Whether the time was up.
    """

    reason: str
    was_connected: bool
    is_late: bool = False


@dataclass(frozen=True)
class Attempt:
    """A step: send this, and wait so long."""

    call: Call
    seconds: float


@dataclass(frozen=True)
class Pause:
    """A step: do nothing for so long."""

    seconds: float


Outcome: TypeAlias = "Reply | NoReply | None"
Steps: TypeAlias = "Generator[Attempt | Pause, Outcome, Result]"


@dataclass(frozen=True)
class Connection:
    """What every request of a client goes by.

    Attributes:
        base_url: Address of the server, for messages.
        timeout_seconds: Of a request with its retries, unless it has its own.
        max_retries: Attempts after the first one.
        clock: Seconds, as `time.monotonic`.
        random: Where the jitter comes from.
    """

    base_url: str
    timeout_seconds: float
    max_retries: int
    clock: Callable[[], float]
    random: random.Random

    def timer(self, seconds: float | None = None) -> Callable[[], float]:
        """A function that tells how many seconds are left of a time that begins now."""
        end = self.clock() + (self.timeout_seconds if seconds is None else seconds)
        return lambda: end - self.clock()

    def pause_seconds(self, num_failed: int, retry_after_seconds: float | None) -> float:
        """How long to wait after an attempt: what the server asks for, or ever longer."""
        if retry_after_seconds is not None:
            return retry_after_seconds * (1 + _JITTER * self.random.random())
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**num_failed)
        return longest * (0.5 + 0.5 * self.random.random())


def exchange(connection: Connection, call: Call, left: Callable[[], float]) -> Steps[Reply]:
    """Send a request until it is done.

    A server that is full or starting is asked again after the time that it says; a connection
    that failed is tried again where the request can be repeated. No other refusal is.

    Args:
        connection: Of the client.
        call: The request.
        left: Seconds that are left for it.

    Raises:
        RequestRefusedError: If the server does not do it.
        RuntimeUnavailableError: If no server answers, or not in time.
    """
    for num_failed in count():
        outcome = yield Attempt(call, max(left(), 0.001))
        error: ActionClipError
        if isinstance(outcome, Reply):
            if outcome.is_success:
                return outcome
            error = refused = refusal(connection, outcome)
            is_worth_it = outcome.status in _WORTH_ANOTHER_TRY
            pause = connection.pause_seconds(num_failed, refused.retry_after_seconds)
        else:
            assert outcome is not None
            error = unreachable(connection, outcome)
            is_worth_it = not outcome.is_late and (call.is_idempotent or not outcome.was_connected)
            pause = connection.pause_seconds(num_failed, None)
        may_repeat = is_worth_it and call.can_be_sent_again and num_failed < connection.max_retries
        if not may_repeat or pause >= left():
            raise error
        yield Pause(pause)
    raise AssertionError("unreachable")


def refusal(connection: Connection, reply: Reply) -> RequestRefusedError:
    """The server's own sentence, or one about what it answered instead."""
    code, message, request_id = f"http_{reply.status}", None, reply.headers.get("x-request-id")
    try:
        given = reply.json()["error"]
        if isinstance(given, str):  # as the inference protocol has it
            message = given
        else:
            code, message, request_id = given["code"], given["message"], given["request_id"]
    except (ValueError, TypeError, KeyError):
        pass
    if message is None:
        phrase = _PHRASES.get(reply.status, "unknown")
        message = (
            f"{connection.base_url} answers with status {reply.status} ({phrase}) and not as "
            "`actionclip serve` does; check the address."
        )
    return RequestRefusedError(
        message,
        status=reply.status,
        code=code,
        request_id=request_id,
        retry_after_seconds=_retry_after(reply.headers),
    )


def unreachable(connection: Connection, outcome: NoReply) -> RuntimeUnavailableError:
    """Why there is no answer, in one sentence."""
    if outcome.is_late:
        return RuntimeUnavailableError(
            f"The server at {connection.base_url} did not answer in time ({outcome.reason}); give "
            "it more time, or send less at a time."
        )
    what = "closed the connection" if outcome.was_connected else "cannot be reached"
    return RuntimeUnavailableError(
        f"The server at {connection.base_url} {what} ({outcome.reason}); check the address, and "
        "that `actionclip serve` runs there."
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait; a date, which proxies send, is compared with the server's own clock."""
    given = headers.get("retry-after", "").strip()
    if given.isdecimal():
        return float(given)
    try:
        until, now = parsedate_to_datetime(given), parsedate_to_datetime(headers["date"])
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError, KeyError):
        return None
