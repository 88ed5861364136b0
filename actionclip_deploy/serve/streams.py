"""Cameras that a server watches: their states, newest frames, and events for whoever listens.

    streams = LiveStreams(bundle, runtime, cameras, bank_names=["mine"], in_thread=call)
    streams.start()
    client = streams.listen("door")
    message = await client.next(15.0)

A thread runs the `Watcher`, whose calls of the runtime take turns with those for requests. All
that has to do with listeners happens in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import LabelBankError, LabelError, ThresholdWarning
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.motions import EndlessMotions
from actionclip_deploy.records import EventRecord, StreamRecord, printable
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankVersion, InThread
from actionclip_deploy.sinks import Sink, SinkStats, frames_to
from actionclip_deploy.video import MAX_PIXELS
from actionclip_deploy.video.recording import jpeg_bytes, shrink
from actionclip_deploy.watch import Camera, WatchedBank, Watcher

logger = logging.getLogger(__name__)

# Messages that are kept for a listener that comes back, of each camera; fewer of very many.
_KEPT_MESSAGES = 256
_ALL_KEPT_MESSAGES = 16_384
# Messages that wait for one listener; with one more it has to come back.
_WAITING_MESSAGES = 512
_NO_ID = "0"  # of no message: whoever gives it is told all that is kept
_HEARTBEAT_SECONDS = 15.0  # proxies close what is silent for a minute
_RETRY_MS = 2000  # after which a browser comes back
_SNAPSHOT_SECONDS = 0.5  # for which a picture is the newest, however many ask
_JOIN_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class StreamMessage:
    """An event as listeners get it.

    Attributes:
        number: Counts the messages of all streams.
        source: Name of the stream.
        id: The event's id and the message's number in it.
        text: Its JSON.
    """

    number: int
    source: str
    id: str
    text: str


class Listener:
    """One client that is told of events, and what waits for it.

    Args:
        source: Name of the stream; None for all.
        last_id: Of the last message before those that it is told.
        missed: What it is told first.
        close: Called once when it is closed.

    Attributes:
        last_id: As given.
        is_closed: Whether it is told no more.
    """

    def __init__(
        self,
        source: str | None,
        last_id: str,
        missed: Sequence[StreamMessage],
        close: Callable[[Listener], None],
    ) -> None:
        self.last_id = last_id
        self.is_closed = False
        self._source = source
        self._waiting = deque(missed)
        self._close = close
        self._changed = asyncio.Event()

    def give(self, message: StreamMessage) -> None:
        """Tell it of an event; one that has fallen far behind is closed, and may come back."""
        if self._source not in (None, message.source):
            return
        if len(self._waiting) >= _WAITING_MESSAGES:
            self.close()
            return
        self._waiting.append(message)
        self._changed.set()

    async def next(self, seconds: float) -> StreamMessage | None:
        """The next message; None where none comes in time, or it was closed."""
        if not self._waiting and not self.is_closed:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except asyncio.TimeoutError:
                return None
        return None if self.is_closed or not self._waiting else self._waiting.popleft()

    def close(self) -> None:
        """End it; a second call does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._waiting.clear()
            self._changed.set()
            self._close(self)


class EventStream(StreamingResponse):
    """Events as server-sent events, as long as the client listens."""

    media_type = "text/event-stream"

    def __init__(self, listener: Listener) -> None:
        # nginx would collect what is to be seen at once.
        super().__init__(_server_sent(listener), headers={"x-accel-buffering": "no"})
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the client goes away, or the listener is closed."""
        try:
            # The request's end: else whoever waits for the client to go would take it away from
            # the guards, which read the whole request before an answer.
            await receive()
            await super().__call__(scope, receive, send)
        finally:
            self._listener.close()


async def _server_sent(listener: Listener) -> AsyncIterator[str]:
    # Whoever loses the connection before anything has happened comes back with this id.
    yield f"id: {listener.last_id}\nretry: {_RETRY_MS}\n\n"
    while not listener.is_closed:
        message = await listener.next(_HEARTBEAT_SECONDS)
        if message is not None:
            yield f"id: {message.id}\ndata: {message.text}\n\n"
        elif not listener.is_closed:
            yield ":\n\n"


@dataclass
class _Snapshot:
    """The newest picture of a camera, and when and how wide it was made."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: float = -1e9
    max_width: int | None = None
    jpeg: bytes = b""


class LiveStreams:
    """What a server watches.

    Args:
        bundle: The bundle that is served.
        runtime: Its runtime.
        cameras: What to watch; none is allowed.
        bank_names: The label banks of the bundle that the server has when it starts.
        in_thread: Calls something in the thread of the runtime, between two calls for clips.
        banks: Other label banks that it has then.
        sinks: Where events go, besides the listeners; not closed here.
        max_pixels: Of a frame.
        max_listeners: Clients that are told of events at a time.
        on_age: See `watch.Watcher`.
        on_call: See `watch.Watcher`.

    Raises:
        ValueError: If a camera's window, stride or thresholds are not allowed.
        LabelError: If a camera has a threshold or a group for a label that its bank lacks.
        LabelBankError: If a camera's bank is not among them, or it names none and there are
            several.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        cameras: Sequence[Camera],
        *,
        bank_names: Sequence[str],
        in_thread: InThread,
        banks: Sequence[LabelBank] = (),
        sinks: Sequence[Sink] = (),
        max_pixels: int = MAX_PIXELS,
        max_listeners: int = 64,
        on_age: Callable[[str, float], None] | None = None,
        on_call: Callable[[int], None] | None = None,
    ) -> None:
        self._runtime = runtime
        given = {bank.name: bank for bank in banks}
        names = tuple(dict.fromkeys([*bank_names, *given]))
        self._cameras = [_with_bank(camera, names) for camera in cameras]
        self._in_thread = in_thread
        self._sinks = tuple(sinks)
        self._max_pixels, self._max_listeners = max_pixels, max_listeners
        self._on_age, self._on_call = on_age, on_call
        self._stop = threading.Event()
        self._lock = threading.Lock()  # around the watcher and its banks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._listeners: set[Listener] = set()
        self._num_messages = 0
        num_kept = min(_KEPT_MESSAGES, max(16, _ALL_KEPT_MESSAGES // max(1, len(cameras))))
        self._kept: dict[str, deque[StreamMessage]] = {
            camera.name: deque(maxlen=num_kept) for camera in cameras
        }
        self._snapshots = {camera.name: _Snapshot() for camera in cameras}
        self._banks: dict[str, WatchedBank] = {
            name: WatchedBank.of(given.get(name) or LabelBank.load(bundle, name))
            for name in dict.fromkeys(camera.labels or "" for camera in self._cameras)
        }
        self._watcher: Watcher | None = self._make_watcher() if self._cameras else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the streams, in the order of the cameras."""
        return tuple(self._kept)

    @property
    def num_listeners(self) -> int:
        """Clients that are told of events."""
        return len(self._listeners)

    def start(self) -> None:
        """Begin to watch; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        if self._watcher is None or self._stop.is_set():
            return
        self._thread = threading.Thread(target=self._run, name="actionclip-streams", daemon=True)
        self._thread.start()

    def begin_stop(self) -> None:
        """Let the listeners go; may be called by a signal's handler."""
        if self._loop is not None:
            self._in_loop(self._close_listeners)

    async def stop(self) -> None:
        """End watching; events that are open end, and sinks are told."""
        self._stop.set()
        self._close_listeners()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
            if self._thread.is_alive():
                logger.warning("The cameras were still watched after %g seconds.", _JOIN_SECONDS)

    # Label banks, which the server's registry tells of.

    def set_bank(self, active: BankVersion) -> None:
        """Watch with a new version of a bank from the next window on, where a camera uses it."""
        if active.name not in self._banks:
            return
        bank = WatchedBank.of(active.bank, active.version)
        with self._lock, _threshold_warnings_are_logged():
            assert self._watcher is not None
            try:
                self._watcher.set_bank(active.name, bank)
            except LabelError as exc:
                # As when a file was put into the bundle; `check_labels` refuses requests.
                logger.warning("The cameras' label bank stays as it was: %s", exc)
                return
            self._banks[active.name] = bank

    def check_labels(self, bank: str, labels: Sequence[str]) -> None:
        """Refuse labels for a bank that lack what a camera is set up for.

        Raises:
            RequestRefusedError: If they do (409).
        """
        for camera in self._cameras:
            if camera.labels != bank:
                continue
            missing = sorted(_needed_labels(camera) - set(labels))
            if missing:
                raise refusals.bank_lacks(bank, camera.name, missing[0])

    def check_unused(self, bank: str) -> None:
        """Refuse that a bank goes that cameras are watched with.

        Raises:
            RequestRefusedError: If there are such cameras (409).
        """
        using = [camera.name for camera in self._cameras if camera.labels == bank]
        if using:
            raise refusals.bank_watched(bank, using)

    # What is known of each stream.

    def states(self) -> list[StreamRecord]:
        """How all streams are, in the order of the cameras."""
        with self._lock:
            watcher, failure = self._watcher, self._failure
        if watcher is None:
            return []
        states = watcher.states()
        if failure is not None:  # none is read until they are watched anew
            said = {"state": "lost", "last_error": failure}
            states = [state.model_copy(update=said) for state in states]
        return states

    def state(self, name: str) -> StreamRecord:
        """How a stream is.

        Raises:
            RequestRefusedError: If there is none of this name (404).
        """
        self._check(name)
        return next(state for state in self.states() if state.name == name)

    def sink_stats(self) -> list[SinkStats]:
        """How the sinks are."""
        return [sink.stats for sink in self._sinks]

    def history(self, name: str, seconds: float) -> list[tuple[float, str, float]]:
        """Of each window of the last seconds: its end since 1970, its best label, and the score.

        Raises:
            RequestRefusedError: If there is no such stream (404).
        """
        self._check(name)
        oldest = time.time() - seconds
        return [each for each in self._known.history(name) if each[0] >= oldest]

    def snapshot(self, name: str, max_width: int | None = None) -> bytes:
        """The newest frame as a JPEG; blocks, so it is for a thread.

        Args:
            name: Of the stream.
            max_width: Wider frames are shrunk.

        Raises:
            RequestRefusedError: If there is no such stream, or no frame yet (404).
        """
        self._check(name)
        kept = self._snapshots[name]
        with kept.lock:
            is_new = time.monotonic() - kept.made < _SNAPSHOT_SECONDS
            if is_new and kept.max_width == max_width:
                return kept.jpeg
            frame = self._known.snapshot(name)
            if frame is None:
                raise refusals.no_frame(name)
            kept.jpeg = jpeg_bytes(frame if max_width is None else shrink(frame, max_width))
            kept.made, kept.max_width = time.monotonic(), max_width
            return kept.jpeg

    # Listeners. All of this happens in the event loop.

    def listen(self, name: str | None = None, *, last_id: str | None = None) -> Listener:
        """Tell a client of events from now on, until it is closed.

        Args:
            name: Of a stream; None for all.
            last_id: Of the last message that it got before; it is told first of what came since,
                or if that message is not known, of all that is kept.

        Raises:
            RequestRefusedError: If there is no such stream, or none at all (404), or there are too
                many clients already (429).
        """
        if name is not None:
            self._check(name)
        if not self._kept:  # or it would listen for ever to what never comes
            raise refusals.no_streams()
        if len(self._listeners) >= self._max_listeners:
            raise refusals.queue_full(
                f"{self._max_listeners} clients are told of events, which is the limit; try again "
                "after the time in Retry-After.",
                retry_after_seconds=refusals.RETRY_SECONDS,
            )
        if name is not None:
            kept = list(self._kept[name])
        else:
            kept = sorted(chain(*self._kept.values()), key=lambda message: message.number)
        if last_id is None:
            last_id = kept[-1].id if kept else _NO_ID
        places = [place for place, message in enumerate(kept) if message.id == last_id]
        missed = kept[places[-1] + 1 if places else 0 :][-_KEPT_MESSAGES:]
        before = last_id if places else _NO_ID
        listener = Listener(name, before, missed, self._listeners.discard)
        self._listeners.add(listener)
        return listener

    def _publish(self, event: EventRecord) -> None:
        self._num_messages += 1
        text = event.to_json().decode()
        message = StreamMessage(self._num_messages, event.source, event.message_id, text)
        self._kept[event.source].append(message)
        for listener in list(self._listeners):
            listener.give(message)

    def _close_listeners(self) -> None:
        for listener in list(self._listeners):
            listener.close()

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # The thread.

    @property
    def _known(self) -> Watcher:
        with self._lock:
            assert self._watcher is not None
            return self._watcher

    def _check(self, name: str) -> None:
        if name not in self._kept:
            raise refusals.unknown_stream(name, self.names)

    def _make_watcher(self) -> Watcher:
        is_live = {camera.name: camera.source.is_live for camera in self._cameras}
        with _threshold_warnings_are_logged():
            return Watcher(
                self._runtime,
                self._cameras,
                self._banks,
                on_event=self._tell,
                on_frame=frames_to(self._sinks, is_live),
                on_age=self._on_age,
                on_call=self._on_call,
                max_pixels=self._max_pixels,
                render=EndlessMotions(seed=0),
                execute=lambda work: self._in_thread(work).result(),
            )

    def _tell(self, event: EventRecord) -> None:
        for sink in self._sinks:
            sink.send(event)
        self._in_loop(self._publish, event)

    def _run(self) -> None:
        """Watch until told to end; after a failure, as of the runtime, anew after a pause."""
        pause = _FIRST_PAUSE_SECONDS
        watcher = self._known
        while True:
            began = time.monotonic()
            try:
                watcher.run(self._stop)
                return
            # Whatever it is: a thread that ended unseen would look like one that watches.
            except Exception as exc:
                if self._stop.is_set():
                    return
                if time.monotonic() - began > _LONGEST_PAUSE_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                self._failure = f"Watching failed: {printable(str(exc) or type(exc).__name__)}"
                logger.exception("Watching failed; all cameras are opened anew in %g s", pause)
            if self._stop.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            with self._lock:
                watcher = self._watcher = self._make_watcher()
                self._failure = None


def _with_bank(camera: Camera, names: Sequence[str]) -> Camera:
    """A camera that names its label bank, which is the only one where it says nothing."""
    there = ", ".join(map(repr, names)) or "none"
    if camera.labels is None:
        if len(names) != 1:
            raise LabelBankError(
                f"The camera {camera.name!r} names no label bank, and the server has {there}; give "
                "it `labels` in the file of cameras, or serve a single one with --labels."
            )
        return replace(camera, labels=names[0])
    if camera.labels not in names:
        raise LabelBankError(
            f"The camera {camera.name!r} is to be watched with the label bank {camera.labels!r}, "
            f"and the server has {there}; build it with `actionclip labels build`, or name "
            "another one."
        )
    return camera


def _needed_labels(camera: Camera) -> set[str]:
    """Labels that a bank must have for a camera's thresholds and groups to mean something."""
    given = camera.thresholds
    named = set(given) if isinstance(given, Mapping) else set()
    return (named - set(camera.groups)) | set(chain(*camera.groups.values()))


@contextmanager
def _threshold_warnings_are_logged() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        logger.warning("%s", text)
