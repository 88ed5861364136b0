"""The archive that a server looks through: searches, pictures of windows, and the videos' files.

    served = ServedArchive(archive, texts, limits, metrics=metrics)
    found = await served.search(SearchJson(text="a person falls"), deadline=deadline)
    opened = await asyncio.to_thread(served.open_video, found.moments[0].video_id)

Searches are done in a thread, one at a time and each on all cores. Files are found by the ids of
videos: no path ever comes from a client.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from actionclip_deploy.archive import Snapshot
from actionclip_deploy.command_records import ArchiveAnswer
from actionclip_deploy.errors import ArchiveError
from actionclip_deploy.files import opening_may_wait
from actionclip_deploy.moments import Moments
from actionclip_deploy.records import SearchJson, printable
from actionclip_deploy.scoring import mean_embedding
from actionclip_deploy.search import Archive, check_search_texts
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import TextEncoder
from actionclip_deploy.serve.observability import ServerMetrics
from actionclip_deploy.serve.settings import Limits

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_NAME_CHARACTERS = 4096  # of a folder or a path of a video
_TICKET_SECONDS = 6 * 3600  # for which an address opens a file without a key
_FILES = re.compile(r"/v1/archive/(videos/\d{1,16}|thumbnails/\d{1,16}/\d{1,16})")
_TICKET = re.compile(rb"ticket=(\d{1,12})\.([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)

# What comes out of the archive is shown on pages of this server alone, and is no page itself.
FILE_HEADERS = {
    "content-security-policy": "default-src 'none'; media-src 'self'; frame-ancestors 'none'; "
    "sandbox",
    "cross-origin-resource-policy": "same-origin",
}
_START_BYTES = 256
# Place of bytes at the start of a file, and the type of such a file. Its name could say anything.
_MEDIA_TYPES = (
    (4, b"ftypqt", "video/quicktime"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/x-matroska"),
    (8, b"AVI ", "video/x-msvideo"),
    (0, b"FLV", "video/x-flv"),
    (0, b"OggS", "video/ogg"),
    (0, b"\0\0\1\xba", "video/mpeg"),
    (188, b"G", "video/mp2t"),
    (0, b"GIF8", "image/gif"),
)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        moments: The moments.
        has_picture: Of each, whether a picture was kept.
        unknown_words: Words of its texts that the model does not know; None of one that knows
            every token.
        seconds: By stage.
    """

    moments: Moments
    has_picture: tuple[bool, ...]
    unknown_words: tuple[str, ...] | None
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class OpenedVideo:
    """The file of a video.

    Attributes:
        file: Open; closed when it is forgotten, too.
        state: Of the file that is open, whatever lies under its path by now.
        media_type: By the bytes at its start.
    """

    file: io.FileIO
    state: os.stat_result
    media_type: str


class ServedArchive:
    """What a server does with an archive. Calls that block say so; they are for threads.

    Args:
        archive: Open; closed by `stop`.
        texts: Embeds the words of searches.
        limits: What a search may ask for.
        metrics: Where searches are counted.
        asks_for_key: Whether clients need a key; addresses of files then have a ticket, since a
            player sends no key.
    """

    def __init__(
        self,
        archive: Archive,
        texts: TextEncoder,
        limits: Limits,
        *,
        metrics: ServerMetrics,
        asks_for_key: bool = False,
    ) -> None:
        self._archive = archive
        self._texts = texts
        self._limits = limits
        self._metrics = metrics
        self._secret = secrets.token_bytes(32) if asks_for_key else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="actionclip-search")
        self._lock = threading.Lock()
        self.num_waiting = 0  # searches, the one that is done included
        self._num_sending = 0
        self._described: tuple[Snapshot, ArchiveAnswer] | None = None

    @property
    def name(self) -> str:
        """Name of the archive's folder."""
        return self._archive.folder.resolve().name

    @property
    def num_windows(self) -> int:
        """Windows that are stored; blocks."""
        return self._archive.num_windows

    async def start(self) -> None:
        """Read what there is, so that the first search need not.

        Raises:
            ArchiveError: If it is damaged.
        """
        self._count(await asyncio.to_thread(self._archive.snapshot))

    async def stop(self) -> None:
        """Finish the search that has begun, and close the archive."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._archive.close()

    async def look(self) -> None:
        """Bring the metrics up to date with what others have added to the archive."""
        try:
            self._count(await asyncio.to_thread(self._archive.snapshot))
        except ArchiveError as exc:  # each search tells it as well
            logger.warning("%s", exc)

    def describe(self) -> ArchiveAnswer:
        """What there is to be searched; blocks."""
        snapshot = self._archive.snapshot()
        known = self._described
        if known is None or known[0] is not snapshot:
            known = self._described = snapshot, self._archive.describe(snapshot)
        return known[1]

    async def search(self, asked: SearchJson, *, deadline: float) -> Found:
        """Find moments.

        Args:
            asked: The request.
            deadline: When its time ends, by the event loop's clock.

        Raises:
            RequestRefusedError: If it asks for too much or too little, or there is no such video,
                or the time is over.
            LabelError: If a text cannot be used.
            ArchiveError: If the archive is damaged.
        """
        self._check(asked)
        began = time.perf_counter()
        texts = (*(() if asked.text is None else (asked.text,)), *asked.without)
        embeddings = np.empty((0, self._archive.model.embedding_dim), np.float32)
        unknown: tuple[str, ...] | None = None
        if texts:
            made = await self._texts.adhoc_bank(
                texts,
                None,
                allow_unknown_words=asked.allow_unknown_words,
                deadline=deadline,
                noun="text",
            )
            embeddings = mean_embedding(made.bank.embeddings)[0]
            unknown = made.bank.unknown_words
        embedded = time.perf_counter()

        def search() -> tuple[Moments, tuple[bool, ...], float]:
            started = time.perf_counter()
            moments = self._archive.search(
                asked.text,
                without=asked.without,
                like=None if asked.like is None else (asked.like.video, asked.like.seconds),
                cameras=asked.cameras,
                videos=asked.videos,
                from_seconds=asked.from_seconds,
                to_seconds=asked.to_seconds,
                top=asked.top,
                embeddings=embeddings,
            )
            pictures = tuple(
                self._archive.thumbnail(each.video_id, each.window) is not None for each in moments
            )
            seconds = time.perf_counter() - started
            self._metrics.search_seconds.observe(seconds)
            self._metrics.search_windows.inc(moments.num_windows)
            return moments, pictures, seconds

        moments, pictures, seconds = await self._in_thread(search, deadline)
        waited = time.perf_counter() - embedded - seconds
        stages = {"labels": embedded - began, "queue": max(0.0, waited), "search": seconds}
        return Found(moments, pictures, unknown, stages)

    # Files

    def thumbnail(self, video_id: int, window: int) -> bytes:
        """The picture of a window, or of the nearest before it, as JPEG; blocks.

        Raises:
            RequestRefusedError: If none was kept (404).
        """
        found = self._archive.thumbnail(video_id, window)
        if found is None:
            raise refusals.no_thumbnail(video_id, window)
        return found

    def open_video(self, video_id: int) -> OpenedVideo:
        """Open the file of a video, if it is still what was indexed; blocks.

        What is looked at is the file that is open, so nothing can be put in its place meanwhile.

        Raises:
            RequestRefusedError: If there is no such video, or its file leads out of its folder
                (404), or is gone or changed (410).
        """
        video = self._archive.video(video_id)
        if video is None:
            raise refusals.unknown_video_id(video_id)
        path, name = Path(video.path), printable(Path(video.path).name, kept="")
        try:
            if opening_may_wait(path) or path.is_dir():
                raise refusals.video_left(name)
            # Not blocking, should it have become a pipe this moment.
            file = io.FileIO(path, opener=lambda each, _: os.open(each, _OPENING))
        except OSError as exc:
            raise refusals.video_gone(name, f"cannot be read ({exc.strerror})") from exc
        with ExitStack() as stack:
            stack.enter_context(file)
            try:
                real = _descriptor_path(file).readlink()
                folder = path.parent.resolve(strict=True)
                state = os.fstat(file.fileno())
                is_file = stat.S_ISREG(state.st_mode)
                start = os.pread(file.fileno(), _START_BYTES, 0) if is_file else b""
            except OSError as exc:
                raise refusals.video_gone(name, f"cannot be read ({exc.strerror})") from exc
            if not (is_file and real.is_relative_to(folder)):
                raise refusals.video_left(name)
            if (state.st_size, state.st_mtime_ns) != (video.size_bytes, video.modified_ns):
                raise refusals.video_gone(name, "has changed")
            stack.pop_all()  # the answer closes it
        return OpenedVideo(file, state, _media_type(start))

    @contextmanager
    def sending(self) -> Iterator[None]:
        """A place among the videos that are sent at a time, until the end of the context.

        Raises:
            RequestRefusedError: If none is free (429).
        """
        limit = self._limits.archive_files
        if self._num_sending >= limit:
            raise refusals.too_many_files(limit)
        self._num_sending += 1
        try:
            yield
        finally:
            self._num_sending -= 1

    def url(self, what: str) -> str:
        """The address of a file, such as `videos/5`, with a ticket where clients need a key."""
        ticket = ""
        if self._secret is not None:
            until = int(time.time()) + _TICKET_SECONDS
            ticket = f"?ticket={until}.{self._signature(what, until)}"
        return f"/v1/archive/{what}{ticket}"

    def opens(self, path: str, query: bytes) -> bool:
        """Whether a request has a ticket for the file that it asks for."""
        asked, ticket = _FILES.fullmatch(path), _TICKET.fullmatch(query)
        if self._secret is None or asked is None or ticket is None:
            return False
        until = int(ticket[1])
        is_signed = hmac.compare_digest(ticket[2].decode(), self._signature(asked[1], until))
        return is_signed and time.time() < until

    def _signature(self, what: str, until: int) -> str:
        assert self._secret is not None
        return hmac.new(self._secret, f"{what} {until}".encode(), "sha256").hexdigest()

    def _check(self, asked: SearchJson) -> None:
        """Refuse what asks for too much, or for nothing."""
        limits = self._limits
        if (asked.text is None) == (asked.like is None):
            raise refusals.bad_value(
                "text and like were given; give one of them."
                if asked.like is not None
                else "Neither text nor like was given; give one of them."
            )
        check_search_texts(asked.text, asked.without)
        begin, end = asked.from_seconds, asked.to_seconds
        if begin is not None and end is not None and begin > end:
            raise refusals.bad_value(
                f"from_seconds is {begin:.0f}, which is later than to_seconds, {end:.0f}; give the "
                "earlier time first."
            )
        if asked.top > limits.moments:
            raise refusals.too_many("moments of its answer", asked.top, limits.moments)
        for name in ("without", "cameras", "videos"):
            number = len(getattr(asked, name))
            if number > limits.search_texts:
                raise refusals.too_many(f"values of {name}", number, limits.search_texts)
        like = "" if asked.like is None else str(asked.like.video)
        for noun, texts, limit in (
            ("texts", (asked.text or "", *asked.without), limits.text_characters),
            ("names", (like, *asked.cameras, *asked.videos), _NAME_CHARACTERS),
        ):
            longest = max(map(len, texts))
            if longest > limit:
                raise refusals.too_many(f"characters in one of its {noun}", longest, limit)

    async def _in_thread(self, work: Callable[[], Result], deadline: float) -> Result:
        """Do something after what waits already; not at all if nobody waits for it any more."""
        with self._lock:
            if self.num_waiting >= self._limits.waiting_searches:
                raise refusals.too_many_searches(self._limits.waiting_searches)
            self.num_waiting += 1
        pending = self._thread.submit(work)
        pending.add_done_callback(self._leave)
        left = deadline - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(pending), left)
        except asyncio.TimeoutError:
            raise refusals.deadline() from None

    def _leave(self, _: Future[Any]) -> None:
        with self._lock:
            self.num_waiting -= 1

    def _count(self, snapshot: Snapshot) -> None:
        self._metrics.archive_videos.set(len(snapshot.paths))
        self._metrics.archive_windows.set(snapshot.num_windows)


_OPENING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def _descriptor_path(file: io.FileIO) -> Path:
    """Where Linux has the file that is open, whatever its own path leads to by now."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _media_type(start: bytes) -> str:
    for place, signature, media_type in _MEDIA_TYPES:
        if start[place:].startswith(signature):
            is_webm = media_type == "video/x-matroska" and b"webm" in start[:64]
            return "video/webm" if is_webm else media_type
    return "application/octet-stream"


class VideoFile(FileResponse):
    """A video's file, or the part of it that a player asks for; closed with the answer.

    Starlette sends it. Which part that is, is decided here: Starlette answers 400 to a range that
    RFC 9110 wants ignored, and takes several at a time, for which players have no use.
    """

    def __init__(self, archive: ServedArchive, opened: OpenedVideo) -> None:
        super().__init__(
            _descriptor_path(opened.file),
            headers=FILE_HEADERS,
            media_type=opened.media_type,
            stat_result=opened.state,
        )
        self._archive = archive
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer.

        Raises:
            HTTPException: If the file has no such part (416).
            RequestRefusedError: If too many are being sent (429).
        """
        try:
            span = self._span(Headers(scope=scope))
            headers = [pair for pair in scope["headers"] if pair[0] not in (b"range", b"if-range")]
            if span is not None:
                headers.append((b"range", f"bytes={span[0]}-{span[1]}".encode()))
            asked = {**scope, "headers": headers}
            if scope["state"]["is_head"]:  # which the guards have made a GET
                asked["method"] = "HEAD"
            with self._archive.sending():
                # The request's end, as in `streams.EventStream`.
                await receive()
                await super().__call__(asked, receive, send)
        finally:
            with suppress(OSError):
                self._opened.file.close()

    def _span(self, headers: Headers) -> tuple[int, int] | None:
        """The first and the last byte that are asked for; None for all of them."""
        found = _RANGE.fullmatch(headers.get("range", ""))
        known = (None, self.headers["etag"], self.headers["last-modified"])
        if found is None or headers.get("if-range") not in known:
            return None
        size, (first, last) = self._opened.state.st_size, found.groups()
        if (first and last and int(last) < int(first)) or not (first or last):
            return None
        begin = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if begin > end:
            raise HTTPException(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                headers={"content-range": f"bytes */{size}"},
            )
        return begin, end
