"""What all sinks have in common, and the simplest of them: lines of JSON."""

from __future__ import annotations

import logging
import os
import random
import re
import stat
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ActionClipError, SinkError
from actionclip_deploy.files import sha256_of, write_errors
from actionclip_deploy.records import EventRecord, printable

logger = logging.getLogger(__name__)

State: TypeAlias = Literal["running", "failing", "failed", "closed"]

MAX_WAITING_EVENTS = 1000
MAX_WAITING_FRAMES = 16  # of a camera of 1080 lines each takes 3 MB
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 10.0  # of a reader of a file for a sink that does not come on
_CLOSE_SECONDS = 5.0
# Of what is dropped: single frames of a copy, and a clip of a time of which there were none.
_NO_LOSS = frozenset({"frames", "no_frames"})


class Frame(Protocol):
    """One frame of a source, as a camera's reader gives it."""

    @property
    def pts_seconds(self) -> float:
        """By the clock of the source."""

    @property
    def wall_seconds(self) -> float:
        """When it was shown, in seconds since 1970."""

    @property
    def session(self) -> int:
        """Grows with each connection, change of size and jump of the clock."""

    def to_rgb(self) -> NDArray[np.uint8]:
        """Its pixels, RGB, shape (H, W, 3)."""


@dataclass(frozen=True)
class SinkStats:
    """How a sink is, for metrics; nothing in it is secret.

    Attributes:
        name: Of the sink, without secrets.
        kind: `jsonl`, `webhook`, `mqtt`, `clips` or `video`.
        state: `running`, `failing` (it is tried again), `failed` (for good) or `closed`.
        num_sent: Events that arrived, or files that were written.
        num_failures: Attempts that failed.
        num_waiting: Events that wait, on disk too.
        dropped: Events and frames that were given up, by reason.
        last_error: Why the last attempt failed; None where none did.
    """

    name: str
    kind: str
    state: State
    num_sent: int
    num_failures: int
    num_waiting: int
    dropped: Mapping[str, int]
    last_error: str | None

    @property
    def num_lost(self) -> int:
        """Events and files that were given up; frames that a sink passes over are none."""
        return sum(count for reason, count in self.dropped.items() if reason not in _NO_LOSS)


@dataclass(frozen=True)
class _FrameOf:
    source: str
    frame: Frame = field(repr=False)


class Sink(ABC):
    """Takes events, and frames where it wants them, and delivers them in a thread of its own.

    What is given waits in a bounded queue. If that is full, the oldest `update` is dropped, whose
    successor says more, or else the oldest event; of frames, the oldest. A delivery that fails is
    tried again after a pause that grows; the log tells it once, and once that it works again.

    Args:
        name: For logs and metrics, without secrets.
    """

    kind: ClassVar[str]
    wants_frames: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = printable(name, kept="")
        self._changed = threading.Condition()
        self._events: deque[tuple[int, EventRecord]] = deque()
        self._frames: deque[tuple[int, _FrameOf]] = deque()
        self._num_given = 0
        self._busy = 0
        self._dropped: Counter[str] = Counter()
        self._num_sent = 0
        self._num_failures = 0
        self._last_error: str | None = None
        self._state: State = "running"
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.kind}", daemon=True)

    def send(self, event: EventRecord) -> None:
        """Give an event to deliver; returns at once."""
        with self._changed:
            if self._state in ("failed", "closed") or self._is_closing.is_set():
                self._dropped["closed" if self._is_closing.is_set() else "failed"] += 1
                return
            if len(self._events) >= MAX_WAITING_EVENTS:
                self._drop_oldest()
            self._num_given += 1
            self._events.append((self._num_given, event))
            self._changed.notify_all()

    def frame(self, source: str, frame: Frame, *, may_wait: bool = False) -> None:
        """Give a frame of a source; returns at once, but of a file, which waits for room.

        Args:
            source: Its name.
            frame: Converted only where it is used.
            may_wait: Whether the frame is of a file, none of which shall be missing.
        """
        if not self.wants_frames or not self._wants(source, frame):
            return
        with self._changed:
            if may_wait:
                self._changed.wait_for(self._has_room, _LONGEST_WAIT_SECONDS)
            if self._state in ("failed", "closed") or self._is_closing.is_set():
                return
            if len(self._frames) >= MAX_WAITING_FRAMES:
                self._frames.popleft()
                self._dropped["frames"] += 1
            self._num_given += 1
            self._frames.append((self._num_given, _FrameOf(source, frame)))
            self._changed.notify_all()

    def close(self, timeout_seconds: float = _CLOSE_SECONDS) -> None:
        """Deliver what waits, and end; what cannot be delivered in time is dropped."""
        self._is_closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        with self._changed:
            left = len(self._events) + (self._busy if self._thread.is_alive() else 0)
            self._dropped["closed"] += left
            self._events.clear()
            self._frames.clear()
            self._state = "failed" if self._state == "failed" else "closed"
        if left:
            logger.warning("the sink %s is closed with %d events undelivered", self.name, left)

    @property
    def stats(self) -> SinkStats:
        """How it is at this moment."""
        with self._changed:
            num_kept = self._num_kept()
            return SinkStats(
                self.name,
                self.kind,
                self._state,
                self._num_sent,
                self._num_failures,
                len(self._events) + self._busy + num_kept,
                {reason: count for reason, count in self._dropped.items() if count},
                self._last_error,
            )

    # What a kind of sink does. An OSError or one of ours is an attempt that failed.

    @abstractmethod
    def _deliver(self, event: EventRecord) -> None:
        """Deliver one event."""

    def _take(self, source: str, frame: Frame) -> None:  # noqa: B027 - few want frames
        """Use a frame."""

    def _wants(self, source: str, frame: Frame) -> bool:  # noqa: ARG002
        """Whether a frame is of use; called where it was read, so at once."""
        return True

    def _finish(self) -> None:  # noqa: B027 - most have nothing to do
        """What is to be done at the end."""

    def _num_kept(self) -> int:
        """Events that wait elsewhere than in the queue."""
        return 0

    # For their use.

    def _note_sent(self) -> None:
        with self._changed:
            self._num_sent += 1
        self._note_working()

    def _note_working(self) -> None:
        with self._changed:
            was_failing = self._state == "failing"
            if was_failing:
                self._state = "running"
        if was_failing:
            logger.warning("the sink %s works again", self.name)

    def _note_failure(self, why: str) -> None:
        with self._changed:
            self._num_failures += 1
            self._last_error = printable(why, kept="")
            is_first = self._state == "running"
            if is_first:
                self._state = "failing"
        if is_first:
            logger.warning("the sink %s fails, and is tried again: %s", self.name, self._last_error)

    def _note_dropped(self, reason: str, count: int = 1) -> None:
        with self._changed:
            self._dropped[reason] += count

    # The thread.

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Around all that a thread does: one that ended unseen would look like one that works."""
        try:
            yield
        except Exception as exc:
            self._give_up(f"{type(exc).__name__}: {exc}")
            logger.exception("the sink %s ends", self.name)

    def _run(self) -> None:
        with self._told():
            while (item := self._next()) is not None:
                if isinstance(item, _FrameOf):
                    self._take_frame(item)
                else:
                    self._deliver_at_last(item)
                with self._changed:
                    self._busy = 0
            self._finish_at_last()

    def _next(self) -> EventRecord | _FrameOf | None:
        """The oldest of what was given; None at the end."""
        with self._changed:
            while not (self._events or self._frames):
                if self._is_closing.is_set():
                    return None
                self._changed.wait()
            is_event = bool(self._events) and (
                not self._frames or self._events[0][0] < self._frames[0][0]
            )
            item: EventRecord | _FrameOf
            item = self._events.popleft()[1] if is_event else self._frames.popleft()[1]
            self._busy = int(is_event)
            self._changed.notify_all()
            return item

    def _deliver_at_last(self, event: EventRecord) -> None:
        num_failed = 0
        while self._state != "failed":
            retry_after = None
            try:
                self._deliver(event)
            except (OSError, ActionClipError) as exc:
                if isinstance(exc, SinkError):
                    retry_after = exc.retry_after_seconds
                    if exc.is_final:
                        self._give_up(str(exc))
                        break
                self._note_failure(str(exc))
            else:
                return
            if self._is_closing.wait(pause_seconds(num_failed, retry_after)):
                self._note_dropped("closed")
                return
            num_failed += 1
        self._note_dropped("failed")

    def _take_frame(self, item: _FrameOf) -> None:
        try:
            self._take(item.source, item.frame)
        except (OSError, ActionClipError) as exc:
            self._note_failure(str(exc))
            self._note_dropped("frames")

    def _finish_at_last(self) -> None:
        try:
            self._finish()
        except (OSError, ActionClipError) as exc:
            self._note_failure(str(exc))
            self._note_dropped("unwritten")

    def _give_up(self, why: str) -> None:
        with self._changed:
            self._state, self._last_error = "failed", printable(why, kept="")
            self._num_failures += 1
            self._dropped["failed"] += len(self._events)
            self._events.clear()
            self._frames.clear()
            self._changed.notify_all()
        logger.warning("the sink %s fails for good: %s", self.name, self._last_error)

    def _has_room(self) -> bool:
        return (
            len(self._frames) < MAX_WAITING_FRAMES
            or self._state in ("failed", "closed")
            or self._is_closing.is_set()
        )

    def _drop_oldest(self) -> None:
        updates = (i for i, (_, event) in enumerate(self._events) if event.kind == "update")
        del self._events[next(updates, 0)]
        self._dropped["queue_full"] += 1


def pause_seconds(num_failed: int, retry_after_seconds: float | None = None) -> float:
    """How long to wait after so many attempts and one: as asked for, or ever longer."""
    if retry_after_seconds is not None:
        return retry_after_seconds
    longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(num_failed, 30))
    return longest * (0.5 + 0.5 * random.random())  # many sinks do not come back at once


def slug(text: str) -> str:
    """A text as a part of a topic or of a file's name; two texts have two."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:64].strip("_")
    return plain if plain and plain == text else f"{plain or 'x'}_{sha256_of(text)[:8]}"


class JsonlSink(Sink):
    """A line of JSON for each message, appended to a file or written to standard output.

    A line is there whole or not at all, also where the disk is full, and can be read at once. The
    file is opened for each, so that it may be moved away for a new one (logrotate).

    Args:
        path: Of the file; None for standard output.

    Raises:
        FileWriteError: If it cannot be written.
    """

    kind = "jsonl"

    def __init__(self, path: str | Path | None) -> None:
        super().__init__("-" if path is None else str(path))
        self._path = None if path is None else Path(path)
        if self._path is not None:
            with write_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
        self._thread.start()

    def _deliver(self, event: EventRecord) -> None:
        line = event.to_json() + b"\n"
        if self._path is None:
            self._print(line)
        else:
            with write_errors(self._path):
                self._append(self._path, line)
        self._note_sent()

    def _print(self, line: bytes) -> None:
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        except (BrokenPipeError, ValueError) as exc:  # its reader has gone, or it is closed
            raise SinkError("nobody reads the standard output any more", is_final=True) from exc

    def _append(self, path: Path, line: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            status = os.fstat(handle)
            is_file, size = stat.S_ISREG(status.st_mode), status.st_size
            if is_file and size and not _ends_a_line(path, size):
                line = b"\n" + line  # a program was killed in the middle of one
            written = 0
            try:
                while written < len(line):
                    written += os.write(handle, line[written:])
            except OSError:
                if is_file and os.fstat(handle).st_size == size + written:
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def _ends_a_line(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"
