"""`Client`: asks a server and waits for its answer."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from itertools import count
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import Answer
from actionclip_deploy.errors import (
    ActionClipError,
    LabelBankError,
    MissingExtraError,
    RequestRefusedError,
    RuntimeUnavailableError,
    VideoError,
)
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.recognizer import LabelScore
from actionclip_deploy.runtimes.base import Float32Array, RuntimeInfo
from actionclip_deploy.sampling import Views

if TYPE_CHECKING:
    import httpx


# What a server answers, as frozen dataclasses, and how they are read from its JSON.
#
# Reading raises KeyError, TypeError or ValueError for what is no such answer; `operations.py` turns
# these into one sentence.


Json = Mapping[str, Any]
Record = TypeVar("Record")


@dataclass(frozen=True)
class UsedBank:
    """Which labels an answer is about.

    Attributes:
        name: Of the label bank; None for a list of labels.
        version: Of the bank on this server; None for a list of labels.
        sha256: Of labels, templates and embeddings.
        num_labels: C.
        num_templates: K.
    """

    name: str | None
    version: int | None
    sha256: str
    num_labels: int
    num_templates: int


@dataclass(frozen=True)
class TemplateVote:
    """What one template alone would have chosen, and whether that is the best label of all."""

    template: str
    label: str
    score: float
    agrees: bool


@dataclass(frozen=True, eq=False)
class ServerPrediction:
    """What a server recognised in one video.

    Attributes:
        name: What the video was called in the request.
        predictions: The best labels, best first.
        answer: The best label, or "unknown"; None where the bank is not calibrated.
        frame_indices: Frames that were used, shape (num_clips, T), 0-based; None for embeddings.
        pts_seconds: Their presentation times, shape (num_clips, T); None where not known.
        templates: What each template would have chosen, if that was asked for.
        template_agreement: Share of the templates that choose the best label, if asked for.
        warnings: Damage that was found in the video.
        batch_size: Clips in its call of the runtime, those of other requests too.
        timings_ms: Wall-clock milliseconds by stage, of this video.
        bank: The labels that it was scored against.
        method: How scores were made.
        runtime: What computed it.
        request_id: Under which the server's log has the request.
    """

    name: str
    predictions: tuple[LabelScore, ...]
    answer: Answer | None
    frame_indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    templates: tuple[TemplateVote, ...] | None
    template_agreement: float | None
    warnings: tuple[str, ...]
    batch_size: int | None
    timings_ms: dict[str, float]
    bank: UsedBank
    method: str
    runtime: RuntimeInfo
    request_id: str


@dataclass(frozen=True, eq=False)
class ServerEmbeddings:
    """The embeddings of one video's views.

    Attributes:
        name: What the video was called in the request.
        embeddings: Of unit norm, float32, shape (V, D).
        frame_indices: Frames that were used, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T); None where not known.
        warnings: Damage that was found in the video.
        timings_ms: Wall-clock milliseconds by stage, of this video.
        runtime: What computed it.
    """

    name: str
    embeddings: Float32Array
    frame_indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    timings_ms: dict[str, float]
    runtime: RuntimeInfo


@dataclass(frozen=True)
class RefusedVideo:
    """One of several videos that the server could not do, and why."""

    name: str
    error: RequestRefusedError


@dataclass(frozen=True)
class BankVersion:
    """One version of a label bank on a server; `activated_seconds` is Unix time."""

    version: int
    sha256: str
    num_labels: int
    num_templates: int
    activated_seconds: float


@dataclass(frozen=True)
class BankBuild:
    """A build of a label bank.

    Attributes:
        state: waiting, building, ready, failed or cancelled.
        done: Prompts that are embedded.
        total: Prompts that there are; 0 until known.
        error: Why it failed.
        version: What it became.
    """

    state: str
    done: int
    total: int
    error: str | None
    version: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ("waiting", "building")


@dataclass(frozen=True)
class BankState:
    """A label bank on a server.

    Attributes:
        name: Of the bank.
        active: The version that answers; None while the first one is built.
        labels: C labels, where one bank was asked for.
        templates: K templates, where one bank was asked for.
        calibration: When a video is "unknown"; None where it never is, or the server does not say.
        versions: The last ones.
        build: The last build; None where there was none.
    """

    name: str
    active: BankVersion | None
    labels: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    calibration: dict[str, Any] | None
    versions: tuple[BankVersion, ...]
    build: BankBuild | None


def read_predictions(data: Json) -> tuple[ServerPrediction | RefusedVideo, ...]:
    """The answer of /v1/classify."""
    bank, runtime = _made(UsedBank, data["bank"]), _made(RuntimeInfo, data["runtime"])
    request_id = str(data["request_id"])

    def read(result: Json) -> ServerPrediction | RefusedVideo:
        if result.get("error") is not None:
            return _refused(result, request_id)
        votes, answer = result.get("templates"), result.get("answer")
        return ServerPrediction(
            name=result["name"],
            predictions=tuple(_made(LabelScore, each) for each in result["predictions"]),
            answer=None
            if answer is None
            else Answer(answer["label"], answer["score"], answer["threshold"]),
            **_frames(result),
            templates=None if votes is None else tuple(_made(TemplateVote, each) for each in votes),
            template_agreement=result.get("template_agreement"),
            warnings=tuple(result.get("warnings", ())),
            batch_size=result.get("batch_size"),
            timings_ms=dict(result["timings_ms"]),
            bank=bank,
            method=data["method"],
            runtime=runtime,
            request_id=request_id,
        )

    return tuple(map(read, data["results"]))


def read_embeddings(data: Json) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
    """The answer of /v1/embed for videos."""
    runtime = _made(RuntimeInfo, data["runtime"])

    def read(result: Json) -> ServerEmbeddings | RefusedVideo:
        if result.get("error") is not None:
            return _refused(result, str(data["request_id"]))
        return ServerEmbeddings(
            name=result["name"],
            embeddings=np.array(result["embeddings"], np.float32),
            **_frames(result),
            warnings=tuple(result.get("warnings", ())),
            timings_ms=dict(result["timings_ms"]),
            runtime=runtime,
        )

    return tuple(map(read, data["results"]))


def read_text_embeddings(data: Json) -> Float32Array:
    """The answer of /v1/embed for texts: shape (M, D)."""
    return np.array(data["embeddings"], np.float32).reshape(-1, data["embedding_dim"])


def read_bank(data: Json) -> BankState:
    """The answer of /v1/labels/NAME."""
    active, build = data["active"], data["build"]
    labels, templates = data["labels"], data["templates"]
    return BankState(
        name=data["name"],
        active=None if active is None else _made(BankVersion, active),
        labels=None if labels is None else tuple(labels),
        templates=None if templates is None else tuple(templates),
        calibration=data.get("calibration"),
        versions=tuple(_made(BankVersion, each) for each in data["versions"]),
        build=None if build is None else _made(BankBuild, build),
    )


def read_diff(data: Json) -> LabelBankDiff:
    """The answer of /v1/labels/NAME/diff."""
    return LabelBankDiff(
        added=tuple(data["added"]),
        removed=tuple(data["removed"]),
        moved=tuple((label, int(old), int(new)) for label, old, new in data["moved"]),
        templates_added=tuple(data["templates_added"]),
        templates_removed=tuple(data["templates_removed"]),
    )


def _made(record: type[Record], data: Json) -> Record:
    """A record of the keys that it has; a newer server may tell more."""
    names = {each.name for each in fields(record)}  # type: ignore[arg-type]
    return record(**{name: value for name, value in data.items() if name in names})


def _refused(result: Json, request_id: str) -> RefusedVideo:
    given = result["error"]
    error = RequestRefusedError(
        given["message"], status=given["status"], code=given["code"], request_id=request_id
    )
    return RefusedVideo(result["name"], error)


def _frames(result: Json) -> dict[str, Any]:
    frames = result.get("frames")
    if frames is None:
        return {"frame_indices": None, "pts_seconds": None}
    times = frames["pts_seconds"]
    return {
        "frame_indices": np.array(frames["indices"], np.int64),
        "pts_seconds": None if times is None else np.array(times, np.float64),
    }


# Videos that a caller gives -> parts of a form, which can be read more than once.


# A path, the bytes of a video, an open file, frames, or embeddings of a video's views.
Video: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]
Videos: TypeAlias = Video | list[Video] | tuple[Video, ...]

Field = Literal["video", "frames", "embeddings"]


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
        """What httpx reads the part from.

        Args:
            stack: Closes it.

        Raises:
            VideoError: If a file cannot be opened.
        """
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, Path):
            try:
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
        ValueError: If there is none, or something else than `Video`.
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


def _field_of_file(path: Path) -> Field:
    """A .npy file holds what an array would; any other file is a video."""
    if path.suffix.lower() != ".npy":
        return "video"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as exc:
        raise VideoError(f"{path} cannot be read ({exc}); give a file that exists.") from exc
    except (ValueError, EOFError) as exc:
        raise VideoError(f"{path} is no .npy file ({exc}); write it with numpy.save.") from exc
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


# One request with its retries, as steps: the thread or the event loop carries them out.
#
# A generator yields an `Attempt` and is sent what came of it, or yields a `Pause`. So the blocking
# and the asynchronous client share everything but the sending.


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


# What can be asked of a server, as steps that `Client` and `AsyncClient` carry out.


OnProgress = Callable[[int, int], None]

_FIRST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0
_READY_POLL_SECONDS = 0.25
_PROBE_SECONDS = 5.0


def classify(
    connection: Connection,
    videos: Videos,
    labels: str | Sequence[str],
    *,
    top_k: int,
    views: Views | str,
    templates: Sequence[str] | None,
    multi_label: bool,
    per_template: bool,
    timeout_seconds: float | None,
) -> Steps[tuple[ServerPrediction | RefusedVideo, ...]]:
    """Rank labels for videos."""
    fields = {
        "labels": labels if isinstance(labels, str) else _json_list(labels),
        "top_k": str(top_k),
        "views": str(views),
        "multi_label": json.dumps(multi_label),
        "per_template": json.dumps(per_template),
        **_timeout(timeout_seconds),
    }
    if templates is not None:
        fields["templates"] = _json_list(templates)
    call = Call("POST", "/v1/classify", fields=fields, uploads=uploads(videos))
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, read_predictions)


def embed(
    connection: Connection, videos: Videos, *, views: Views | str, timeout_seconds: float | None
) -> Steps[tuple[ServerEmbeddings | RefusedVideo, ...]]:
    """Embed videos."""
    fields = {"views": str(views), **_timeout(timeout_seconds)}
    call = Call("POST", "/v1/embed", fields=fields, uploads=uploads(videos))
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, read_embeddings)


def embed_texts(
    connection: Connection, texts: Sequence[str], *, timeout_seconds: float | None
) -> Steps[Float32Array]:
    """Embed prompts as they are."""
    body: dict[str, Any] = {"texts": _words(texts, "texts")}
    if timeout_seconds is not None:
        body["timeout_ms"] = timeout_seconds * 1000
    call = Call("POST", "/v1/embed", json=body)
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, read_text_embeddings)


def info(connection: Connection) -> Steps[dict[str, Any]]:
    """What runs."""
    reply = yield from exchange(connection, Call("GET", "/v1/info"), connection.timer())
    return _read(connection, reply, dict)


def list_banks(connection: Connection) -> Steps[tuple[BankState, ...]]:
    """All label banks."""
    reply = yield from exchange(connection, Call("GET", "/v1/labels"), connection.timer())
    return _read(connection, reply, lambda data: tuple(map(read_bank, data["banks"])))


def get_bank(connection: Connection, name: str) -> Steps[BankState]:
    """One label bank."""
    reply = yield from exchange(connection, Call("GET", _bank_path(name)), connection.timer())
    return _read(connection, reply, read_bank)


def put_bank(
    connection: Connection,
    name: str,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    *,
    wait: bool,
    on_progress: OnProgress | None,
    timeout_seconds: float,
) -> Steps[BankState]:
    """Build a label bank, and wait until it is there."""
    body: dict[str, Any] = {"labels": _words(labels, "labels")}
    if templates is not None:
        body["templates"] = _words(templates, "templates")
    call = Call("PUT", _bank_path(name), json=body, is_idempotent=False)
    reply = yield from exchange(connection, call, connection.timer())
    state = _read(connection, reply, read_bank)
    left = connection.timer(timeout_seconds)
    pause = _FIRST_POLL_SECONDS
    while wait:
        build = state.build
        if build is None:
            raise LabelBankError(f"The build of the label bank {name!r} was ended by a DELETE.")
        if on_progress is not None:
            on_progress(build.done, build.total)
        if build.is_over:
            break
        if left() <= 0:
            raise RuntimeUnavailableError(
                f"The label bank {name!r} was not built after {timeout_seconds:g} seconds "
                f"({build.done} of {build.total} prompts); the server goes on, ask for it later."
            )
        yield Pause(min(pause, max(left(), 0.0)))
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        state = yield from get_bank(connection, name)
    build = state.build
    if wait and build is not None and build.state != "ready":
        why = build.error or f"its state is {build.state}"
        raise LabelBankError(f"The label bank {name!r} was not built: {why}")
    return state


def delete_bank(connection: Connection, name: str) -> Steps[None]:
    """Remove a label bank, or end its build."""
    call = Call("DELETE", _bank_path(name), is_idempotent=False)
    yield from exchange(connection, call, connection.timer())


def diff(connection: Connection, name: str, old: int, new: int | None) -> Steps[LabelBankDiff]:
    """What changed from one version of a label bank to another."""
    params = {"old": old} if new is None else {"old": old, "new": new}
    call = Call("GET", f"{_bank_path(name)}/diff", params=params)
    reply = yield from exchange(connection, call, connection.timer())
    return _read(connection, reply, read_diff)


def is_ready(connection: Connection) -> Steps[bool]:
    """Whether requests are taken at this moment."""
    outcome = yield Attempt(Call("GET", "/readyz"), min(_PROBE_SECONDS, connection.timeout_seconds))
    return isinstance(outcome, Reply) and outcome.is_success


def wait_until_ready(connection: Connection, timeout_seconds: float) -> Steps[None]:
    """Wait until requests are taken."""
    left = connection.timer(timeout_seconds)
    while True:
        outcome = yield Attempt(Call("GET", "/readyz"), max(min(left(), _PROBE_SECONDS), 0.001))
        if isinstance(outcome, Reply) and outcome.is_success:
            return
        if left() <= _READY_POLL_SECONDS:
            why = _why_not_ready(connection, outcome)
            raise RuntimeUnavailableError(
                f"The server at {connection.base_url} was not ready after {timeout_seconds:g} "
                f"seconds: {why}"
            )
        yield Pause(_READY_POLL_SECONDS)


def _why_not_ready(connection: Connection, outcome: Reply | NoReply | None) -> str:
    if isinstance(outcome, NoReply):
        return str(unreachable(connection, outcome))
    assert outcome is not None
    try:
        return f"it is {outcome.json()['status']}; wait longer, or read its log."
    except (ValueError, TypeError, KeyError):
        return str(refusal(connection, outcome))


def _read(connection: Connection, reply: Reply, reader: Callable[[Any], Result]) -> Result:
    try:
        return reader(reply.json())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
        raise RuntimeUnavailableError(
            f"{connection.base_url} does not answer as `actionclip serve` of this version does "
            f"({type(exc).__name__}: {exc}); check the address, and the version in /v1/info."
        ) from exc


def _bank_path(name: str) -> str:
    return f"/v1/labels/{quote(name, safe='')}"


def _timeout(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"timeout_ms": repr(seconds * 1000)}


def _json_list(words: Iterable[str]) -> str:
    return json.dumps(list(words))


def _words(words: Sequence[str], what: str) -> list[str]:
    if isinstance(words, str):
        raise ValueError(f"{what} is the string {words!r}; give a list of strings.")
    return list(words)


# What a client is made with, checked, the same for both forms.


DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_RETRIES = 3


def make_connection(base_url: str, timeout_seconds: float, max_retries: int) -> Connection:
    """Check what a client was given.

    Raises:
        ValueError: If it is not allowed.
    """
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an address in brackets that is none
        is_address = False
    if not is_address:
        raise ValueError(
            f"The server's address is {base_url!r}; give one such as http://127.0.0.1:8000."
        )
    if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
        raise ValueError(f"timeout_seconds is {timeout_seconds}; it must be positive.")
    if max_retries < 0:
        raise ValueError(f"max_retries is {max_retries}; it must be 0 or more.")
    return Connection(
        base_url.rstrip("/"), timeout_seconds, max_retries, time.monotonic, random.Random()
    )


def make_headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request.

    Raises:
        ValueError: If the key cannot be one.
    """
    headers = {"accept": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("The API key is empty or holds characters that no key has; check it.")
        headers["authorization"] = f"Bearer {api_key.strip()}"
    return headers


class Client:
    """Asks a server of `actionclip serve`; may be used from several threads.

        with Client("http://127.0.0.1:8000") as client:
            (result,) = client.classify("video.mp4", "mine")
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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = make_connection(base_url, timeout_seconds, max_retries)
        self._send = send
        self._http = open_client(base_url, make_headers(api_key), transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def classify(
        self,
        videos: Videos,
        labels: str | Sequence[str],
        *,
        top_k: int = 5,
        views: Views | str = "1x1",
        templates: Sequence[str] | None = None,
        multi_label: bool = False,
        per_template: bool = False,
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
        return self._run(
            classify(
                self._connection,
                videos,
                labels,
                top_k=top_k,
                views=views,
                templates=templates,
                multi_label=multi_label,
                per_template=per_template,
                timeout_seconds=timeout_seconds,
            )
        )

    def embed(
        self,
        videos: Videos,
        *,
        views: Views | str = "1x1",
        timeout_seconds: float | None = None,
    ) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
        """Embed videos; arguments and errors are those of `classify`."""
        return self._run(
            embed(self._connection, videos, views=views, timeout_seconds=timeout_seconds)
        )

    def embed_texts(
        self, texts: Sequence[str], *, timeout_seconds: float | None = None
    ) -> Float32Array:
        """Embed prompts as they are: unit norm, float32, shape (M, D)."""
        return self._run(embed_texts(self._connection, texts, timeout_seconds=timeout_seconds))

    def list_banks(self) -> tuple[BankState, ...]:
        """All label banks of the server, by name, without their labels."""
        return self._run(list_banks(self._connection))

    def get_bank(self, name: str) -> BankState:
        """One label bank, with its labels, its last versions and its build."""
        return self._run(get_bank(self._connection, name))

    def put_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        timeout_seconds: float = 600.0,
    ) -> BankState:
        """Build a label bank on the server, or a new version of it.

        Args:
            name: Of the bank.
            labels: C labels.
            templates: K sentences with {} for the label; None takes the bundle's.
            wait: Whether to wait until it is active; without, `get_bank` tells how far it is.
            on_progress: Told while waiting of prompts that are embedded, and how many there are.
            timeout_seconds: How long to wait.

        Raises:
            LabelBankError: If the build fails or is ended.
            RequestRefusedError: If the server does not begin it.
            RuntimeUnavailableError: If it takes longer, or no server answers.
        """
        return self._run(
            put_bank(
                self._connection,
                name,
                labels,
                templates,
                wait=wait,
                on_progress=on_progress,
                timeout_seconds=timeout_seconds,
            )
        )

    def delete_bank(self, name: str) -> None:
        """Remove a label bank from the server, or end its build."""
        self._run(delete_bank(self._connection, name))

    def diff(self, name: str, old: int, new: int | None = None) -> LabelBankDiff:
        """What changed from one version of a bank to another; None is the active one."""
        return self._run(diff(self._connection, name, old, new))

    def info(self) -> dict[str, Any]:
        """What runs: version, bundle, model, runtime, batching, banks, limits."""
        return self._run(info(self._connection))

    def is_ready(self) -> bool:
        """Whether there is a server that takes requests at this moment."""
        return self._run(is_ready(self._connection))

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Wait until the server takes requests.

        Raises:
            RuntimeUnavailableError: If it takes longer; says why.
        """
        self._run(wait_until_ready(self._connection, timeout_seconds))

    def _run(self, steps: Steps[Result]) -> Result:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if isinstance(step, Attempt):
                outcome = self._send(self._http, step)
            else:
                time.sleep(step.seconds)
                outcome = None


# `AsyncClient`: asks a server from an event loop of asyncio.


class AsyncClient:
    """`Client` for asyncio: the same methods with the same arguments, to be awaited.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (result,) = await client.classify("video.mp4", "mine")
            print(result.predictions[0])

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
        self._connection = make_connection(base_url, timeout_seconds, max_retries)
        self._send = send_async
        self._http = open_async_client(base_url, make_headers(api_key), transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        timeout_seconds: float | None = None,
    ) -> tuple[ServerPrediction | RefusedVideo, ...]:
        """As `Client.classify`."""
        return await self._run(
            classify(
                self._connection,
                videos,
                labels,
                top_k=top_k,
                views=views,
                templates=templates,
                multi_label=multi_label,
                per_template=per_template,
                timeout_seconds=timeout_seconds,
            )
        )

    async def embed(
        self,
        videos: Videos,
        *,
        views: Views | str = "1x1",
        timeout_seconds: float | None = None,
    ) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
        """As `Client.embed`."""
        return await self._run(
            embed(self._connection, videos, views=views, timeout_seconds=timeout_seconds)
        )

    async def embed_texts(
        self, texts: Sequence[str], *, timeout_seconds: float | None = None
    ) -> Float32Array:
        """Embed prompts as they are: unit norm, float32, shape (M, D)."""
        return await self._run(
            embed_texts(self._connection, texts, timeout_seconds=timeout_seconds)
        )

    async def list_banks(self) -> tuple[BankState, ...]:
        """All label banks of the server, by name, without their labels."""
        return await self._run(list_banks(self._connection))

    async def get_bank(self, name: str) -> BankState:
        """One label bank, with its labels, its last versions and its build."""
        return await self._run(get_bank(self._connection, name))

    async def put_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        timeout_seconds: float = 600.0,
    ) -> BankState:
        """As `Client.put_bank`."""
        return await self._run(
            put_bank(
                self._connection,
                name,
                labels,
                templates,
                wait=wait,
                on_progress=on_progress,
                timeout_seconds=timeout_seconds,
            )
        )

    async def delete_bank(self, name: str) -> None:
        """Remove a label bank from the server, or end its build."""
        await self._run(delete_bank(self._connection, name))

    async def diff(self, name: str, old: int, new: int | None = None) -> LabelBankDiff:
        """What changed from one version of a bank to another; None is the active one."""
        return await self._run(diff(self._connection, name, old, new))

    async def info(self) -> dict[str, Any]:
        """What runs: version, bundle, model, runtime, batching, banks, limits."""
        return await self._run(info(self._connection))

    async def is_ready(self) -> bool:
        """Whether there is a server that takes requests at this moment."""
        return await self._run(is_ready(self._connection))

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """As `Client.wait_until_ready`."""
        await self._run(wait_until_ready(self._connection, timeout_seconds))

    async def _run(self, steps: Steps[Result]) -> Result:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if isinstance(step, Attempt):
                outcome = await self._send(self._http, step)
            else:
                await asyncio.sleep(step.seconds)
                outcome = None


# Carries out one attempt with httpx, whose errors end here.


def _load_httpx() -> ModuleType:
    """The library, imported by the first client: importing the package must not need it."""
    try:
        import httpx
    except ImportError as exc:
        raise MissingExtraError("The client of a server", "client") from exc
    return httpx


def open_client(
    base_url: str, headers: dict[str, str], transport: httpx.BaseTransport | None
) -> httpx.Client:
    """A blocking client; redirects are answers like others, so that no key goes elsewhere."""
    httpx = _load_httpx()
    return httpx.Client(  # type: ignore[no-any-return]
        base_url=base_url, headers=headers, transport=transport, follow_redirects=False
    )


def open_async_client(
    base_url: str, headers: dict[str, str], transport: httpx.AsyncBaseTransport | None
) -> httpx.AsyncClient:
    """An asynchronous client, otherwise as `open_client`."""
    httpx = _load_httpx()
    return httpx.AsyncClient(  # type: ignore[no-any-return]
        base_url=base_url, headers=headers, transport=transport, follow_redirects=False
    )


def send(client: httpx.Client, attempt: Attempt) -> Reply | NoReply:
    """Carry out an attempt."""
    httpx = _load_httpx()
    with ExitStack() as stack:
        request = client.build_request(**_request(attempt, stack))
        try:
            return _reply(client.send(request))
        except httpx.HTTPError as exc:
            return _no_reply(exc, attempt)


async def send_async(client: httpx.AsyncClient, attempt: Attempt) -> Reply | NoReply:
    """Carry out an attempt; files are read in the event loop, 64 KiB at a time."""
    httpx = _load_httpx()
    with ExitStack() as stack:
        request = client.build_request(**_request(attempt, stack))
        try:
            return _reply(await client.send(request))
        except httpx.HTTPError as exc:
            return _no_reply(exc, attempt)


def _request(attempt: Attempt, stack: ExitStack) -> dict[str, Any]:
    httpx = _load_httpx()
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
    httpx = _load_httpx()
    if isinstance(error, httpx.TimeoutException):
        return NoReply(f"{attempt.seconds:.3g} seconds", True, is_late=True)
    reason = str(error) or type(error).__name__
    return NoReply(
        reason,
        not isinstance(
            error,
            (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.PoolTimeout,
                httpx.ProxyError,
            ),
        ),
    )
