"""`Client` and `AsyncClient`: ask a server of `actionclip serve`.

`AsyncClient` does the work; `Client` runs it in an event loop of its own, in another thread.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial, update_wrapper
from http import HTTPStatus
from itertools import count
from pathlib import Path
from threading import Lock, Thread
from types import ModuleType
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Concatenate,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    cast,
)
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from actionclip_deploy.command_records import ArchiveAnswer, LabelBankDiff, SearchAnswer
from actionclip_deploy.errors import (
    ActionClipError,
    ArgumentError,
    LabelBankError,
    MissingExtraError,
    RequestRefusedError,
    RuntimeUnavailableError,
    VideoError,
)
from actionclip_deploy.files import opening_may_wait
from actionclip_deploy.known_words import warn_of_unknown_words
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.records import (
    BankListAnswer,
    BankState,
    ClassifyAnswer,
    EmbedAnswer,
    EmbeddedRecord,
    EventRecord,
    FramesRecord,
    HistoryAnswer,
    HistoryPoint,
    LabelScore,
    Matrix,
    Record,
    RefusedVideo,
    RuntimeInfo,
    StreamListAnswer,
    StreamRecord,
    UsedBank,
    VideoRecord,
)
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views

if TYPE_CHECKING:
    import httpx
    from anyio.from_thread import BlockingPortal

    _Opened: TypeAlias = Future[tuple[BlockingPortal, Callable[[], object]]]  # with what ends it

DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_RETRIES = 3

# A path, the bytes of a video, an open file, frames, or embeddings of a video's views.
Video: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]
Videos: TypeAlias = Video | list[Video] | tuple[Video, ...]

Field = Literal["video", "frames", "embeddings"]

OnProgress = Callable[[int, int], None]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# What a server answers that has too much to do, or is starting or ending.
_WORTH_ANOTHER_TRY = (429, 503)
# And a proxy in front of one that is gone.
_MAY_COME_BACK = (*_WORTH_ANOTHER_TRY, 502, 504)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
# Beyond Retry-After, as a share of it, so that clients do not all come back at once.
_JITTER = 0.1
_FIRST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0
_READY_POLL_SECONDS = 0.25
_PROBE_SECONDS = 5.0
# Of events: the server says something every 15 seconds.
_SILENCE_SECONDS = 45.0
_MAX_MESSAGE_BYTES = 2**24
_EVENT_STREAM = "text/event-stream"
_PHRASES = {each.value: each.phrase for each in HTTPStatus}


class _Sampled:
    """The frames of a record as arrays of shape (num_clips, T)."""

    frames: FramesRecord | None

    @property
    def frame_indices(self) -> NDArray[np.int64] | None:
        """Frames that were used, 0-based; None for embeddings."""
        return None if self.frames is None else np.array(self.frames.indices, np.int64)

    @property
    def pts_seconds(self) -> NDArray[np.float64] | None:
        """Their presentation times; None where not known."""
        times = None if self.frames is None else self.frames.pts_seconds
        return None if times is None else np.array(times, np.float64)


class ServerPrediction(_Sampled, VideoRecord):
    """What a server recognised in one video: the record, without what only failures lack."""

    predictions: tuple[LabelScore, ...]
    method: ScoreMethod
    bank: UsedBank
    runtime: RuntimeInfo
    request_id: str


class ServerEmbeddings(_Sampled, EmbeddedRecord):
    """The embeddings of one video's views, float32, of unit norm, shape (V, D)."""

    embeddings: Matrix
    runtime: RuntimeInfo


class AsyncClient:
    """Asks a server of `actionclip serve`, from an event loop of asyncio.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (result,) = await client.classify("video.mp4", "mine")
            print(result.predictions[0])

    Every method raises `RequestRefusedError` with the server's sentence where the server does not
    do what is asked, and `RuntimeUnavailableError` where no server answers. A server that is full
    or starting is asked again after the time that it says, and so is one whose connection failed,
    where that does no harm; files are streamed, and read again from their beginning.

    Args:
        base_url: Address of the server, such as http://127.0.0.1:8000.
        api_key: One of the server's keys; None where it has none.
        timeout_seconds: Of one method with its retries.
        max_retries: Attempts after the first one.
        transport: What carries requests instead of the network, for tests.

    Raises:
        MissingExtraError: If httpx is not installed.
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        _check_address(base_url)
        if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
            raise ArgumentError("timeout_seconds", f"is {timeout_seconds}; it must be positive.")
        if max_retries < 0:
            raise ArgumentError("max_retries", f"is {max_retries}; it must be 0 or more.")
        self._base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._max_retries = max_retries
        self._random = random.Random()
        # Redirects are answers like others, so that no key goes elsewhere.
        self._http: httpx.AsyncClient = _load_httpx().AsyncClient(
            base_url=base_url,
            headers=_headers(api_key),
            transport=transport,
            follow_redirects=False,
            timeout=None,  # an attempt has a deadline as a whole
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def classify(
        self,
        videos: Videos,
        labels: str | Sequence[str],
        *,
        top_k: int = 5,
        views: Views | str = "1x1",
        templates: Sequence[str] | None = None,
        multi_label: bool = False,
        per_template: bool = False,
        allow_unknown_words: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[ServerPrediction | RefusedVideo, ...]:
        """Rank labels for videos.

        Args:
            videos: One or a list of them: a path, bytes, a file opened with "rb", frames as uint8
                RGB of shape (N, H, W, 3), or embeddings of one video's views as float32 of norm
                1, shape (V, D) or (D,). A path that ends in .npy is such an array.
            labels: Name of a label bank, or a list of labels.
            top_k: Labels of a result.
            views: Clips x crops per video, such as "10x3".
            templates: Sentences with {} for the label, for a list of labels; of a bank, those of
                its templates to use; None for all.
            multi_label: Whether each label is scored by itself.
            per_template: Whether to say what each template alone would choose.
            allow_unknown_words: Whether labels are taken of which the model knows no word. A
                `LabelWarning` names words that it does not know.
            timeout_seconds: Of this call, for the server too; None takes the client's, and the
                server its own limit.

        Returns:
            A result for each video, in their order. Of several, one that the server cannot do is
            a `RefusedVideo`; a single one raises.

        Raises:
            RequestRefusedError: If the server does not do it.
            RuntimeUnavailableError: If no server answers in time.
            VideoError: If a file cannot be read.
        """
        fields = {
            "labels": labels if isinstance(labels, str) else json.dumps(list(labels)),
            "top_k": str(top_k),
            "views": str(views),
            "multi_label": json.dumps(multi_label),
            "per_template": json.dumps(per_template),
            **_timeout(timeout_seconds),
        }
        if templates is not None:
            fields["templates"] = json.dumps(list(templates))
        if allow_unknown_words:  # an older server does not know the field
            fields["allow_unknown_words"] = "true"
        reply = await self._ask(
            "POST", "/v1/classify", timeout_seconds, uploads=uploads(videos), data=fields
        )
        return self._read(reply, _predictions)

    async def embed(
        self,
        videos: Videos,
        *,
        views: Views | str = "1x1",
        timeout_seconds: float | None = None,
    ) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
        """Embed videos; arguments and errors are those of `classify`."""
        fields = {"views": str(views), **_timeout(timeout_seconds)}
        reply = await self._ask(
            "POST", "/v1/embed", timeout_seconds, uploads=uploads(videos), data=fields
        )
        return self._read(reply, _embeddings)

    async def embed_texts(
        self, texts: Sequence[str], *, timeout_seconds: float | None = None
    ) -> Float32Array:
        """Embed prompts as they are: unit norm, float32, shape (M, D)."""
        body: dict[str, Any] = {"texts": _texts(texts, "texts")}
        if timeout_seconds is not None:
            body["timeout_ms"] = timeout_seconds * 1000
        reply = await self._ask("POST", "/v1/embed", timeout_seconds, json=body)
        return self._read(reply, _text_embeddings)

    async def list_banks(self) -> tuple[BankState, ...]:
        """All label banks of the server, by name, without their labels."""
        reply = await self._ask("GET", "/v1/labels")
        return self._read(reply, lambda body: BankListAnswer.model_validate_json(body).banks)

    async def get_bank(self, name: str) -> BankState:
        """One label bank, with its labels, its last versions and its build."""
        reply = await self._ask("GET", _bank_path(name))
        return self._read(reply, BankState.model_validate_json)

    async def put_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        allow_unknown_words: bool = False,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        timeout_seconds: float = 600.0,
    ) -> BankState:
        """Build a label bank on the server, or a new version of it.

        Args:
            name: Of the bank.
            labels: C labels.
            templates: K sentences with {} for the label; None takes the bundle's.
            allow_unknown_words: As of `classify`.
            wait: Whether to wait until it is active; without, `get_bank` tells how far it is.
            on_progress: Told while waiting how many prompts are embedded, and how many there are;
                a `Client` calls it in its own thread.
            timeout_seconds: How long to wait.

        Raises:
            LabelBankError: If the build fails or is ended.
            RequestRefusedError: If the server does not begin it.
            RuntimeUnavailableError: If it takes longer, or no server answers.
        """
        import anyio

        body: dict[str, Any] = {"labels": _texts(labels, "labels")}
        if templates is not None:
            body["templates"] = _texts(templates, "templates")
        if allow_unknown_words:
            body["allow_unknown_words"] = True
        reply = await self._ask("PUT", _bank_path(name), json=body, is_idempotent=False)
        state = self._read(reply, BankState.model_validate_json)
        warn_of_unknown_words(state.build.unknown_words if state.build else None)
        left = self._timer(timeout_seconds)
        pause = _FIRST_POLL_SECONDS
        while wait:
            build = state.build
            if build is None:
                raise LabelBankError(f"The build of the label bank {name!r} was ended by a DELETE.")
            if on_progress is not None:
                on_progress(build.done, build.total)
            if build.state == "ready":
                break
            if build.is_over:
                why = build.error or f"its state is {build.state}"
                raise LabelBankError(f"The label bank {name!r} was not built: {why}")
            if left() <= 0:
                raise RuntimeUnavailableError(
                    f"The label bank {name!r} was not built after {timeout_seconds:g} seconds "
                    f"({build.done} of {build.total} prompts); the server goes on, ask for it "
                    "later."
                )
            await anyio.sleep(min(pause, max(left(), 0.0)))
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
            state = await self.get_bank(name)
        return state

    async def delete_bank(self, name: str) -> None:
        """Remove a label bank from the server, or end its build."""
        await self._ask("DELETE", _bank_path(name), is_idempotent=False)

    async def diff(self, name: str, old: int, new: int | None = None) -> LabelBankDiff:
        """What changed from one version of a bank to another; None is the active one."""
        params = {"old": old} if new is None else {"old": old, "new": new}
        reply = await self._ask("GET", f"{_bank_path(name)}/diff", params=params)
        return self._read(reply, LabelBankDiff.model_validate_json)

    async def list_streams(self) -> tuple[StreamRecord, ...]:
        """How all cameras are that the server watches, in their order."""
        reply = await self._ask("GET", "/v1/streams")
        return self._read(reply, lambda body: StreamListAnswer.model_validate_json(body).streams)

    async def get_stream(self, name: str) -> StreamRecord:
        """How one of them is: its state, its counts, its newest label."""
        reply = await self._ask("GET", _stream_path(name))
        return self._read(reply, StreamRecord.model_validate_json)

    async def get_snapshot(self, name: str, *, width: int | None = None) -> bytes:
        """The newest frame of a camera as a JPEG; a wider one is shrunk to `width`.

        Raises:
            RequestRefusedError: If there is no such camera, or no frame of it yet.
        """
        params = {} if width is None else {"width": width}
        reply = await self._ask("GET", f"{_stream_path(name)}/snapshot", params=params)
        return self._read(reply, lambda body: _of_kind(reply, "image/jpeg", body))

    async def get_history(
        self, name: str, *, seconds: float | None = None
    ) -> tuple[HistoryPoint, ...]:
        """The best label of each window of a camera, oldest first.

        Args:
            name: Of the camera.
            seconds: How far it goes back, at most 600; None for all.
        """
        params = {} if seconds is None else {"seconds": seconds}
        reply = await self._ask("GET", f"{_stream_path(name)}/history", params=params)
        return self._read(reply, lambda body: HistoryAnswer.model_validate_json(body).points)

    async def events(
        self,
        name: str | None = None,
        *,
        last_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[EventRecord, None]:
        """Events of cameras from now on, as they come, until the client is closed.

        A connection that is lost, or that says nothing for 45 seconds, is made again, and what
        came meanwhile is told first. So is a server that ends and is started again.

        Args:
            name: Of a camera; None for all.
            last_id: What came after this message is told first: `event.message_id` of the last
                one that was seen before. Of one that the server does not know, such as "0", it
                tells all that it has kept.
            timeout_seconds: How long a server may be gone; None takes the client's. A client
                without retries does not wait for it.

        Raises:
            RequestRefusedError: If there is no such camera, or too many clients listen.
            RuntimeUnavailableError: If no server answers, or it is gone for too long; says how to
                go on.
        """
        path = "/v1/events" if name is None else f"{_stream_path(name)}/events"
        listening = _Listening(last_id)
        reply = await self._listen(path, listening, timeout_seconds)
        while True:
            async with aclosing(self._events_of(reply, listening)) as events:
                async for event in events:
                    yield event
            if self._http.is_closed:
                return
            reply = await self._listen_again(path, listening, timeout_seconds)

    async def get_archive(self) -> ArchiveAnswer:
        """What the server has to search: cameras, videos, windows, times.

        Raises:
            RequestRefusedError: If it has no archive.
        """
        reply = await self._ask("GET", "/v1/archive")
        return self._read(reply, ArchiveAnswer.model_validate_json)

    async def search(
        self,
        text: str | None = None,
        *,
        without: str | Sequence[str] = (),
        like: tuple[str | int, float] | None = None,
        cameras: Sequence[str] = (),
        videos: Sequence[str] = (),
        from_seconds: float | None = None,
        to_seconds: float | None = None,
        top: int = 20,
        allow_unknown_words: bool = False,
        timeout_seconds: float | None = None,
    ) -> SearchAnswer:
        """Find the moments of the server's archive that show what a text says.

            for moment in client.search("a person falls", cameras=["yard"]).moments:
                print(moment.rank, moment.z, moment.video, moment.start_seconds)

        Args:
            text: What is looked for, as one would write a label.
            without: What moments must not show: they are nearer to `text` than to these.
            like: In the place of a text, a video of the archive (its id, its path, or the end of
                that) and a time in it, in seconds.
            cameras: Names of folders that are looked in; empty for all.
            videos: Paths of videos, or their ends, that are looked in; empty for all.
            from_seconds: What was recorded from this time on, in seconds since 1970.
            to_seconds: What was recorded until this time.
            top: Moments at most.
            allow_unknown_words: As of `classify`.
            timeout_seconds: As of `classify`.

        Raises:
            RequestRefusedError: If the server has no archive, or does not do it.
            RuntimeUnavailableError: If no server answers in time.
        """
        given = [without] if isinstance(without, str) else list(without)
        body: dict[str, Any] = {
            "text": text,
            "like": None if like is None else {"video": like[0], "seconds": like[1]},
            "without": given,
            "cameras": _texts(cameras, "cameras"),
            "videos": _texts(videos, "videos"),
            "from_seconds": from_seconds,
            "to_seconds": to_seconds,
            "top": top,
            "allow_unknown_words": allow_unknown_words,
        }
        if timeout_seconds is not None:
            body["timeout_ms"] = timeout_seconds * 1000
        reply = await self._ask("POST", "/v1/search", timeout_seconds, json=body)
        answer = self._read(reply, SearchAnswer.model_validate_json)
        warn_of_unknown_words(answer.unknown_words, of_texts=True)
        return answer

    async def get_thumbnail(self, video_id: int, window: int) -> bytes:
        """The picture of a window of a video of the archive as a JPEG, as a moment names both.

        Raises:
            RequestRefusedError: If there is no such video, or no picture was kept.
        """
        reply = await self._ask("GET", f"/v1/archive/thumbnails/{video_id}/{window}")
        return self._read(reply, lambda body: _of_kind(reply, "image/jpeg", body))

    async def info(self) -> dict[str, Any]:
        """What runs: version, bundle, model, runtime, batching, banks, limits."""
        reply = await self._ask("GET", "/v1/info")
        return self._read(reply, lambda body: dict(json.loads(body)))

    async def is_ready(self) -> bool:
        """Whether there is a server that takes requests at this moment."""
        seconds = min(_PROBE_SECONDS, self._timeout_seconds)
        outcome = await self._attempt("GET", "/readyz", seconds)
        return not isinstance(outcome, _NoReply) and outcome.is_success

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Wait until the server takes requests.

        Raises:
            RuntimeUnavailableError: If it takes longer; says why.
        """
        import anyio

        left = self._timer(timeout_seconds)
        while True:
            seconds = max(min(left(), _PROBE_SECONDS), 0.001)
            outcome = await self._attempt("GET", "/readyz", seconds)
            if not isinstance(outcome, _NoReply) and outcome.is_success:
                return
            if left() <= _READY_POLL_SECONDS:
                raise RuntimeUnavailableError(
                    f"The server at {self._base_url} was not ready after {timeout_seconds:g} "
                    f"seconds: {self._why_not_ready(outcome)}"
                )
            await anyio.sleep(_READY_POLL_SECONDS)

    def _timer(self, seconds: float | None = None) -> Callable[[], float]:
        """A function that tells how many seconds are left of a time that begins now."""
        end = time.monotonic() + (self._timeout_seconds if seconds is None else seconds)
        return lambda: end - time.monotonic()

    # httpx-retries 0.6 was tried for this loop. It cuts a Retry-After off at a bound and tries
    # again too early, where we give up; reads dates by this machine's clock; adds no jitter to
    # Retry-After; and closes a refusal unread. With these overridden its loop was all that stayed.
    async def _ask(
        self,
        method: str,
        path: str,
        timeout_seconds: float | None = None,
        *,
        uploads: Sequence[Upload] = (),
        is_idempotent: bool = True,
        max_retries: float | None = None,
        worth_another_try: Sequence[int] = _WORTH_ANOTHER_TRY,
        **body: Any,
    ) -> httpx.Response:
        """Send a request until it is done.

        A server that is full or starting is asked again after the time that it says; a connection
        that failed is tried again where the request can be repeated. No other refusal is.

        Args:
            method: Of HTTP.
            path: After the server's address.
            timeout_seconds: Of all attempts together; None for the client's.
            uploads: Files of a form.
            is_idempotent: Whether doing it twice is as doing it once.
            max_retries: Attempts after the first one; None for the client's.
            worth_another_try: Statuses after which it is sent again.
            body: See `_attempt`.

        Raises:
            RequestRefusedError: If the server does not do it.
            RuntimeUnavailableError: If no server answers, or not in time.
        """
        import anyio

        can_repeat = all(each.can_repeat for each in uploads)
        left = self._timer(timeout_seconds)
        most = self._max_retries if max_retries is None else max_retries
        for num_failed in count():
            outcome = await self._attempt(method, path, max(left(), 0.001), uploads, **body)
            error: ActionClipError
            if isinstance(outcome, _NoReply):
                error = self._unreachable(outcome)
                is_safe = is_idempotent or not outcome.was_connected
                is_worth_it, retry_after = is_safe and not outcome.is_late, None
            elif outcome.is_success:
                return outcome
            else:
                error = refused = self._refusal(outcome)
                is_worth_it = outcome.status_code in worth_another_try
                retry_after = refused.retry_after_seconds
            pause = self._pause_seconds(num_failed, retry_after)
            may_repeat = is_worth_it and can_repeat and num_failed < most
            if not may_repeat or pause >= left():
                raise error
            await anyio.sleep(pause)
        raise AssertionError("unreachable")

    def _pause_seconds(self, num_failed: int, retry_after_seconds: float | None) -> float:
        """How long to wait after an attempt: what the server asks for, or ever longer."""
        if retry_after_seconds is not None:
            return retry_after_seconds * (1 + _JITTER * self._random.random())
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**num_failed)
        return longest * (0.5 + 0.5 * self._random.random())

    async def _attempt(
        self,
        method: str,
        path: str,
        seconds: float,
        uploads: Sequence[Upload] = (),
        *,
        streams: bool = False,
        **body: Any,
    ) -> httpx.Response | _NoReply:
        """Send a request once; files are read in the event loop, 64 KiB at a time.

        Args:
            method: Of HTTP.
            path: After the server's address.
            seconds: Until it has to be done.
            uploads: Files of a form.
            streams: Whether the body of an answer is left to be read, but of a refusal.
            body: As httpx takes it: `json`, `data`, `params`, `headers`.
        """
        import anyio

        httpx = _load_httpx()
        with ExitStack() as stack:
            files = [
                (each.field, (each.name, each.open(stack), "application/octet-stream"))
                for each in uploads
            ]
            request = self._http.build_request(method, path, files=files or None, **body)
            try:
                with anyio.fail_after(seconds):
                    reply = await self._http.send(request, stream=streams)
                    if not reply.is_success:
                        await reply.aread()
                    return reply
            except (TimeoutError, httpx.TimeoutException):
                return _NoReply(f"{seconds:.3g} seconds", is_late=True)
            except httpx.HTTPError as exc:
                was_connected = not isinstance(exc, httpx.ConnectError | httpx.ProxyError)
                return _NoReply(str(exc) or type(exc).__name__, was_connected=was_connected)

    async def _listen(
        self,
        path: str,
        listening: _Listening,
        timeout_seconds: float | None,
        **how: Any,
    ) -> httpx.Response:
        """Ask for events; the answer's body is yet to be read."""
        listening.begin()
        headers = {"accept": _EVENT_STREAM}
        if listening.last_id is not None:
            headers["last-event-id"] = listening.last_id
        return await self._ask("GET", path, timeout_seconds, streams=True, headers=headers, **how)

    async def _listen_again(
        self, path: str, listening: _Listening, timeout_seconds: float | None
    ) -> httpx.Response:
        """Ask for what came since the connection was lost, for as long as the server may be gone.

        Raises:
            RequestRefusedError: If it is back and does not do it.
            RuntimeUnavailableError: If it is not back in time.
        """
        import anyio

        may_wait = self._max_retries > 0
        left = self._timer(timeout_seconds)
        if may_wait:
            pause = self._pause_seconds(0, listening.retry_seconds)
            await anyio.sleep(min(pause, left() / 2))  # so that there is time for an answer
        try:
            return await self._listen(
                path,
                listening,
                max(left(), 0.001),
                max_retries=math.inf if may_wait else 0,
                worth_another_try=_MAY_COME_BACK,
            )
        except RuntimeUnavailableError as exc:
            seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
            waited = f" and was not back after {seconds:g} seconds" if may_wait else ""
            raise RuntimeUnavailableError(
                f"The connection for events was lost{waited}. {exc} Listen again with "
                f"last_id={listening.last_id or '0'!r} to be told what came meanwhile."
            ) from exc

    async def _events_of(
        self, reply: httpx.Response, listening: _Listening
    ) -> AsyncGenerator[EventRecord, None]:
        """Events of one connection, until it is lost."""
        import anyio

        httpx = _load_httpx()
        chunks = cast("AsyncGenerator[bytes, None]", reply.aiter_bytes())
        try:
            self._parse(b"", partial(_of_kind, reply, _EVENT_STREAM))
            while True:
                try:
                    with anyio.fail_after(_SILENCE_SECONDS):
                        chunk = await anext(chunks)
                except (StopAsyncIteration, TimeoutError, httpx.HTTPError):
                    return
                for data in self._parse(chunk, listening.read):
                    yield self._parse(data, EventRecord.model_validate_json)
        finally:
            with anyio.CancelScope(shield=True):
                await chunks.aclose()
                await reply.aclose()

    def _refusal(self, reply: httpx.Response) -> RequestRefusedError:
        """The server's own sentence, or one about what it answered instead."""
        status = reply.status_code
        code, message, request_id = f"http_{status}", None, reply.headers.get("x-request-id")
        try:
            given = reply.json()["error"]
            if isinstance(given, str):  # as the inference protocol has it
                message = given
            else:
                code, message, request_id = given["code"], given["message"], given["request_id"]
        except (ValueError, TypeError, KeyError):
            pass
        if message is None:
            message = (
                f"{self._base_url} answers with status {status} "
                f"({_PHRASES.get(status, 'unknown')}) and not as `actionclip serve` does; check "
                "the address."
            )
        return RequestRefusedError(
            message,
            status=status,
            code=code,
            request_id=request_id,
            retry_after_seconds=retry_after(reply.headers),
        )

    def _unreachable(self, outcome: _NoReply) -> RuntimeUnavailableError:
        """Why there is no answer, in one sentence."""
        if outcome.is_late:
            return RuntimeUnavailableError(
                f"The server at {self._base_url} did not answer in time ({outcome.reason}); give "
                "it more time, or send less at a time."
            )
        what = "closed the connection" if outcome.was_connected else "cannot be reached"
        return RuntimeUnavailableError(
            f"The server at {self._base_url} {what} ({outcome.reason}); check the address, and "
            "that `actionclip serve` runs there."
        )

    def _why_not_ready(self, outcome: httpx.Response | _NoReply) -> str:
        if isinstance(outcome, _NoReply):
            return str(self._unreachable(outcome))
        try:
            return f"it is {outcome.json()['status']}; wait longer, or read its log."
        except (ValueError, TypeError, KeyError):
            return str(self._refusal(outcome))

    def _read(self, reply: httpx.Response, reader: Callable[[bytes], Result]) -> Result:
        return self._parse(reply.content, reader)

    def _parse(self, content: bytes, reader: Callable[[bytes], Result]) -> Result:
        try:
            return reader(content)
        except (ValueError, TypeError) as exc:
            problem = f"{type(exc).__name__}: {exc}"
            if isinstance(exc, ValidationError):
                first = exc.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"])) or "the body"
                problem = f"{where}: {first['msg']}"
            raise RuntimeUnavailableError(
                f"{self._base_url} does not answer as `actionclip serve` of this version does "
                f"({problem}); check the address, and the version in /v1/info."
            ) from exc


def _blocking(
    method: Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Client, Arguments], Result]:
    """The same method of `Client`, with its signature and its docstring."""

    def run(self: Client, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._run(partial(method, self._client, *args, **kwargs))

    update_wrapper(run, method)
    return run


class Client:
    """`AsyncClient` without `await`; may be used from several threads.

        with Client("http://127.0.0.1:8000") as client:
            (result,) = client.classify("video.mp4", "mine")
            print(result.predictions[0])

    Arguments, methods and errors are those of `AsyncClient`, which runs in a thread of its own.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = AsyncClient(
            base_url,
            api_key=api_key,
            timeout_seconds=timeout_seconds,
            max_retries=max_retries,
            transport=transport,
        )
        opened: _Opened = Future()
        # The interpreter would wait at its end for the thread of `anyio.from_thread.
        # start_blocking_portal`, and so for ever where nobody closes a client.
        self._thread = Thread(
            target=_run_loop,
            args=(self._client, opened),
            name="actionclip-client",
            daemon=True,
        )
        self._thread.start()
        self._portal, stop = opened.result()
        self._stop = weakref.finalize(self, stop)
        self._stop.atexit = False
        self._lock = Lock()  # around what listens, and the end of it
        self._listening: set[Future[EventRecord]] = set()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, once what has begun is done; a second call does nothing.

        Who listens for events in another thread gets no more of them.
        """
        with self._lock:
            for future in self._listening:
                future.cancel()  # which needs the loop, and so comes first
            self._stop()
        self._thread.join()

    classify = _blocking(AsyncClient.classify)
    embed = _blocking(AsyncClient.embed)
    embed_texts = _blocking(AsyncClient.embed_texts)
    list_banks = _blocking(AsyncClient.list_banks)
    get_bank = _blocking(AsyncClient.get_bank)
    put_bank = _blocking(AsyncClient.put_bank)
    delete_bank = _blocking(AsyncClient.delete_bank)
    diff = _blocking(AsyncClient.diff)
    list_streams = _blocking(AsyncClient.list_streams)
    get_stream = _blocking(AsyncClient.get_stream)
    get_snapshot = _blocking(AsyncClient.get_snapshot)
    get_history = _blocking(AsyncClient.get_history)
    get_archive = _blocking(AsyncClient.get_archive)
    search = _blocking(AsyncClient.search)
    get_thumbnail = _blocking(AsyncClient.get_thumbnail)
    info = _blocking(AsyncClient.info)
    is_ready = _blocking(AsyncClient.is_ready)
    wait_until_ready = _blocking(AsyncClient.wait_until_ready)

    def events(
        self,
        name: str | None = None,
        *,
        last_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Iterator[EventRecord]:
        """Events of cameras as they come, as of `AsyncClient.events`, which has the arguments.

            for event in client.events("door"):
                print(event.kind, event.label, event.start_time)

        They end when the client is closed, in another thread as well.
        """
        # Once nobody refers to it any more, the event loop ends it, and its connection.
        events = self._client.events(name, last_id=last_id, timeout_seconds=timeout_seconds)
        while True:
            with self._lock:
                if not self._stop.alive:
                    return
                future: Future[EventRecord] = self._portal.start_task_soon(events.__anext__)
                self._listening.add(future)
            try:
                event = future.result()
            except (StopAsyncIteration, CancelledError):  # the client was closed
                return
            except BaseException:
                future.cancel()
                raise
            finally:
                with self._lock:
                    self._listening.discard(future)
            yield event

    def _run(self, method: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        future: Future[Result] = self._portal.start_task_soon(method)
        try:
            return future.result()
        except BaseException:  # an interrupt ends the request as well
            future.cancel()
            raise


def _run_loop(client: AsyncClient, opened: _Opened) -> None:
    import anyio

    try:
        anyio.run(_serve, client, opened)
    except BaseException as exc:
        if opened.done():
            raise
        opened.set_exception(exc)  # no loop could be made, for want of open files, say


async def _serve(client: AsyncClient, opened: _Opened) -> None:
    """Run what is given to a portal, until the function that comes with it is called."""
    import anyio
    from anyio.from_thread import BlockingPortal

    stopping = anyio.Event()
    loop = asyncio.get_running_loop()
    async with BlockingPortal() as portal:
        # Not by the portal: garbage may be collected in this very thread, which it refuses.
        opened.set_result((portal, lambda: loop.call_soon_threadsafe(stopping.set)))
        await stopping.wait()
    await client.close()


# What a client is made with.


def _load_httpx() -> ModuleType:
    """The library, imported by the first client: importing the package must not need it."""
    try:
        import httpx
    except ImportError as exc:
        raise MissingExtraError("The client of a server", "client") from exc
    return httpx


def _check_address(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number, or brackets around no address
        is_address = False
    if not is_address:
        raise ValueError(
            f"The server's address is {base_url!r}; give one such as http://127.0.0.1:8000."
        )


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"accept": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("The API key is empty or holds characters that no key has; check it.")
        headers["authorization"] = f"Bearer {api_key.strip()}"
    return headers


# Requests, and what comes of them.


@dataclass(frozen=True)
class _NoReply:
    """An attempt that got no answer.

    Attributes:
        reason: In words.
        was_connected: Whether the server may have got the request.
        is_late: Whether the time was up.
    """

    reason: str
    was_connected: bool = True
    is_late: bool = False


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds to wait; a date, which proxies send, is compared with the server's own clock."""
    given = headers.get("retry-after", "").strip()
    if given.isdecimal():
        return float(given)
    try:
        until, now = parsedate_to_datetime(given), parsedate_to_datetime(headers["date"])
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError, KeyError):
        return None


def _bank_path(name: str) -> str:
    return f"/v1/labels/{quote(name, safe='')}"


def _stream_path(name: str) -> str:
    return f"/v1/streams/{quote(name, safe='')}"


def _timeout(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"timeout_ms": repr(seconds * 1000)}


def _texts(texts: Sequence[str], what: str) -> list[str]:
    if isinstance(texts, str):
        raise ValueError(f"{what} is the string {texts!r}; give a list of strings.")
    return list(texts)


# Answers. What does not fit the models is a ValueError.


# httpx-sse 0.4 was read: it splits lines as this does, and leaves silence, limits and connecting
# again to its caller.
class _Listening:
    """Server-sent events, over all connections.

    Args:
        last_id: Of the last message of before.

    Attributes:
        last_id: Of the last message.
        retry_seconds: After which the server wants to be asked again; None if it says nothing.
    """

    def __init__(self, last_id: str | None) -> None:
        self.last_id = last_id
        self.retry_seconds: float | None = None
        self._line = b""
        self._id: str | None = None
        self._data: list[bytes] = []

    def begin(self) -> None:
        """Forget what a connection that was lost had said of a message."""
        self._line, self._id, self._data = b"", None, []

    def read(self, chunk: bytes) -> list[bytes]:
        """The data of messages that end in a chunk.

        Raises:
            ValueError: If a message has no end.
        """
        found = []
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                self._data.append(value)
            elif field == b"id":
                self._id = value.decode("ascii")
            elif field == b"retry" and value.isdigit():
                self.retry_seconds = int(value) / 1000
            elif not line.rstrip(b"\r"):
                if self._data:
                    found.append(b"\n".join(self._data))
                if self._id is not None:
                    self.last_id = self._id
                self._id, self._data = None, []
        if len(self._line) + sum(map(len, self._data)) > _MAX_MESSAGE_BYTES:
            raise ValueError("a message has no end")
        return found


def _of_kind(reply: httpx.Response, media_type: str, content: bytes) -> bytes:
    given = reply.headers.get("content-type", "nothing")
    if given.partition(";")[0].strip().lower() != media_type:
        raise ValueError(f"the answer is {given}, and not {media_type}")
    return content


def _predictions(body: bytes) -> tuple[ServerPrediction | RefusedVideo, ...]:
    answer = ClassifyAnswer.model_validate_json(body)
    warn_of_unknown_words(answer.bank.unknown_words)
    # A server of before there were versions says these once for all results.
    shared = {name: getattr(answer, name) for name in ("request_id", "bank", "method", "runtime")}
    return tuple(
        _refused(each, answer.request_id)
        if each.error is not None
        else ServerPrediction.model_validate({**shared, **_said(each)})
        for each in answer.results
    )


def _embeddings(body: bytes) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
    answer = EmbedAnswer.model_validate_json(body)
    if answer.results is None:
        raise ValueError("the answer has no results")
    return tuple(
        _refused(each, answer.request_id)
        if each.error is not None
        else ServerEmbeddings.model_validate({"runtime": answer.runtime, **_said(each)})
        for each in answer.results
    )


def _text_embeddings(body: bytes) -> Float32Array:
    answer = EmbedAnswer.model_validate_json(body)
    if answer.embeddings is None:
        raise ValueError("the answer has no embeddings")
    warn_of_unknown_words(answer.unknown_words, of_texts=True)
    return answer.embeddings


def _said(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.model_fields_set}


def _refused(record: VideoRecord | EmbeddedRecord, request_id: str) -> RefusedVideo:
    given = record.error
    assert given is not None
    error = RequestRefusedError(
        given.message, status=given.status or 0, code=given.code, request_id=request_id
    )
    return RefusedVideo(record.name, error)


# Videos that a caller gives -> parts of a form, which can be read more than once.


@dataclass(frozen=True)
class Upload:
    """One part of a form.

    Attributes:
        field: What it holds, as the server calls it.
        name: What it is called there.
        source: A path, which is opened each time; bytes; or an open file.
        start: Where an open file is read from; None where it cannot be rewound.
    """

    field: Field
    name: str
    source: Path | bytes | BinaryIO
    start: int | None = None

    @property
    def can_repeat(self) -> bool:
        """Whether it can be sent a second time."""
        return isinstance(self.source, Path | bytes) or self.start is not None

    def open(self, stack: ExitStack) -> Any:
        """What httpx reads the part from; the stack closes it.

        Raises:
            VideoError: If a file cannot be opened.
        """
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, Path):
            try:
                _refuse_what_waits(self.source)
                return stack.enter_context(self.source.open("rb"))
            except OSError as exc:
                raise VideoError(
                    f"{self.source} cannot be read ({exc.strerror}); give a file that exists and "
                    "may be read."
                ) from exc
        return _Once(self.source) if self.start is None else _FromStart(self.source, self.start)


class _Once:
    """A file that cannot be rewound, without its methods that would say how long it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


class _FromStart:
    """A file whose beginning is where its owner had read to."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self.read = file.read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + self._start if whence == os.SEEK_SET else offset
        return self._file.seek(place, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


def uploads(videos: Videos) -> tuple[Upload, ...]:
    """Parts of a form for one video or a list of them.

    Raises:
        VideoError: If a file cannot be read.
        ValueError: If there is none, or something other than a `Video`.
    """
    given = list(videos) if isinstance(videos, list | tuple) else [videos]
    if not given:
        raise ValueError("videos is empty; give one video or more.")
    names = [f"videos[{index}]" for index in range(len(given))]
    return tuple(map(_upload, given, names))


def _upload(video: Any, name: str) -> Upload:
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        return Upload(_field_of_file(path), path.name, path)
    if isinstance(video, bytes | bytearray | memoryview):
        return Upload("video", name, bytes(video))
    if isinstance(video, np.ndarray):
        field, array = _checked(video, name)
        return Upload(field, name, _npy_bytes(array))
    if hasattr(video, "read") and not isinstance(video, io.TextIOBase):
        path_of_it = getattr(video, "name", None)
        shown = Path(path_of_it).name if isinstance(path_of_it, str) else name
        can_seek = hasattr(video, "seekable") and video.seekable()
        return Upload("video", shown, video, video.tell() if can_seek else None)
    raise ValueError(
        f"{name} is a {type(video).__name__}; give a path, bytes, a file opened with 'rb', frames "
        "as uint8 (N, H, W, 3), or embeddings as float32 (V, D)."
    )


def _refuse_what_waits(path: Path) -> None:
    if opening_may_wait(path):
        raise VideoError(f"{path} is a pipe, a socket or a device; give a file, or an open stream.")


def _field_of_file(path: Path) -> Field:
    """A .npy file holds what an array would; any other file is a video."""
    if path.suffix.lower() != ".npy":
        return "video"
    try:
        _refuse_what_waits(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as exc:
        raise VideoError(f"{path} cannot be read ({exc}); give a file that exists.") from exc
    except (ValueError, EOFError) as exc:
        raise VideoError(f"{path} is not a .npy file ({exc}); write it with numpy.save.") from exc
    try:
        return _checked(array, str(path))[0]
    except ValueError as exc:
        raise VideoError(str(exc)) from exc


def _checked(array: NDArray[Any], name: str) -> tuple[Field, NDArray[Any]]:
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3:
        return "frames", array
    if array.dtype in (np.float16, np.float32, np.float64) and array.ndim in (1, 2):
        return "embeddings", array.astype(np.float32, copy=False).reshape(-1, array.shape[-1])
    raise ValueError(
        f"{name} is {array.dtype} of shape {array.shape}; give frames as uint8 (N, H, W, 3), or "
        "embeddings as float32 (V, D)."
    )


def _npy_bytes(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
