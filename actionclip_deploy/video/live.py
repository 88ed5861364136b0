"""Frames of live sources (cameras, RTSP, HTTP, RTMP, UDP, screens), of files and of pipes.

`LiveReader` gives them: for ever and with reconnections from what is live, once and all of them
from a file or a pipe.

Not taken: OpenCV's VideoCapture, whose read blocks for half a minute and which tells neither the
times of frames nor why it failed; and a process of ffmpeg per camera, through whose pipe every
frame would go as pixels, also those that nobody wants.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import queue
import random
import select
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from errno import EIO
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import VideoError
from actionclip_deploy.video.border import stream_errors
from actionclip_deploy.video.pixels import FrameConverter, Scaling, stamp_clock
from actionclip_deploy.video.reader import (
    MAX_PIXELS,
    VideoReader,
    check_frame_size,
    decoder_pixels,
)
from actionclip_deploy.video.sources import (
    FORMATS_OF_FILES,
    UNVERIFIED_HOSTS,
    Source,
    certificate_problem,
    ffmpeg_arguments,
    options_of,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

State = Literal["opening", "running", "lost", "ended", "failed"]
Renderer = Callable[[int], NDArray[np.uint8]]  # from the number of a frame to RGB (H, W, 3)

_TEST_FPS = 12.0
# Of these the times are counted frames at a rate that nobody stated.
_WITHOUT_TIMES = frozenset(
    {"mpjpeg", "mjpeg", "h264", "hevc", "vvc", "evc", "m4v", "mpegvideo", "av1", "obu"}
)
# HLS comes segment by segment, of up to 10 seconds.
_HLS_READ_FACTOR = 6
# A picture may have to wait for the next key frame, though packets arrive.
_MIN_UNDECODED_SECONDS = 15.0
_NUM_HANDED = 4  # frames between the thread that decodes and the one that asks
_TICK_SECONDS = 0.1
# FFmpeg's limits are later than ours: at the first, RTSP gives what it has and waits anew.
_GRACE_SECONDS = 0.5
# So that a source can be opened again at once: two cannot have one device or port.
_PARTING_SECONDS = 0.5
_NUM_KNOWN = 5000  # packets: some minutes, and a playlist holds less
_NUM_LEFT = 2  # connections of one source that were given up and have not ended yet
_NUM_HELD = 8  # frames without a time at the start of a connection


# Gives the pixels of a frame; scaled on the way, where it is decoded.
Convert: TypeAlias = Callable[[Scaling | None], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class LiveFrame:
    """One frame of a source, not converted yet.

    Attributes:
        pts_seconds: When it is shown by the clock of the source; ascends within a session.
        wall_seconds: When it was shown, in seconds since 1970.
        arrival_seconds: When it was decoded, by `time.monotonic`.
        session: Grows with each connection, change of size and jump of the clock, from 0.
        width: As displayed, in pixels.
        height: As displayed, in pixels.
        convert: Gives its pixels.
    """

    pts_seconds: float
    wall_seconds: float
    arrival_seconds: float
    session: int
    width: int
    height: int
    convert: Convert = field(repr=False)

    def to_rgb(self, scaling: Scaling | None = None) -> NDArray[np.uint8]:
        """Its pixels as displayed, RGB, uint8, shape (H, W, 3); converted anew in each call.

        Args:
            scaling: What to scale them to on the way, where they are decoded and not rendered.
        """
        return self.convert(scaling)


@dataclass(frozen=True)
class SourceState:
    """How a source is.

    Attributes:
        name: Of the source.
        state: `"opening"`, `"running"`, `"lost"` (and opened again after a while), `"ended"` or
            `"failed"` (both for good).
        since: When it came to be so, in seconds since 1970.
        reconnects: How often frames came again after it was lost.
        frames: Frames so far.
        last_error: Why it was lost last, without secrets; None where it never was.
        seconds_since_frame: None before the first frame.
    """

    name: str
    state: State
    since: float
    reconnects: int
    frames: int
    last_error: str | None
    seconds_since_frame: float | None


class StreamClock:
    """Places the frames of one session in time, by their clock and by the wall's.

    A frame is shown before it arrives, so that the least time that frames took lately tells how
    the clock of the source lies to that of this machine: a backlog, a burst of HLS or a busy
    moment delays frames and moves nothing.

    Args:
        is_live: Whether a step ahead by more than frames took to arrive is another clock.
        follows_arrival: Whether the wall's time is held against when frames arrive; else a frame
            is shown as long after the first one as its clock says.
        frame_seconds: From one frame to the next, as long as nothing else is known.
    """

    _JUMP_BACK_SECONDS = 1.0
    _JUMP_AHEAD_SECONDS = 10.0
    _DRIFT_SECONDS = 0.5
    _SETTLING_SECONDS = 2.0  # a backlog at the start comes within these
    _WINDOW_SECONDS = 30.0  # longer than segments of HLS
    _MIN_STEP_SECONDS = 1e-6

    def __init__(
        self, *, is_live: bool = True, follows_arrival: bool = True, frame_seconds: float = 0.04
    ) -> None:
        self._is_live = is_live
        self._follows_arrival = follows_arrival
        self._step = frame_seconds
        self._last_pts: float | None = None
        self._tells_times = False
        self._first_arrival = self._last_arrival = 0.0
        self._anchor = 0.0
        # Least delays: a later one stands here only while it is less than all that follow.
        self._delays: deque[tuple[float, float]] = deque()

    def place(self, pts: float | None, arrival: float) -> float | None:
        """Give the time of the next frame; None where its clock is another: begin a new session.

        Args:
            pts: What the source says; None where it says nothing. Such a frame, and one that is
                not after the last, is placed by its arrival.
            arrival: When it came, by a clock that never jumps.
        """
        last = self._last_pts
        self._tells_times |= pts is not None
        if last is None:
            pts = 0.0 if pts is None else pts
            self._first_arrival, self._anchor = arrival, arrival - pts
        else:
            waited = max(0.0, arrival - self._last_arrival)
            if pts is not None:
                if pts < last - self._JUMP_BACK_SECONDS:
                    return None
                if self._is_live and pts > last + waited + self._JUMP_AHEAD_SECONDS:
                    return None
                if pts > last:
                    self._step = 0.9 * self._step + 0.1 * min(pts - last, 1.0)
            if pts is None or pts <= last:
                step = self._step
                if self._is_live:
                    # Of a source that tells times, one frame is not late by much.
                    step = min(waited, step) if self._tells_times else waited
                pts = last + max(step, self._MIN_STEP_SECONDS)
        self._last_pts, self._last_arrival = pts, arrival
        if self._follows_arrival:
            self._hold_against(arrival - pts, arrival)
        return pts

    def _hold_against(self, delay: float, arrival: float) -> None:
        delays = self._delays
        while delays and delays[-1][1] >= delay:
            delays.pop()
        delays.append((arrival, delay))
        while delays[0][0] < arrival - self._WINDOW_SECONDS:
            delays.popleft()
        least = delays[0][1]
        is_settling = arrival - self._first_arrival < self._SETTLING_SECONDS
        if is_settling or abs(least - self._anchor) > self._DRIFT_SECONDS:
            self._anchor = least

    def shown_at(self, pts_seconds: float) -> float:
        """When a frame was shown, by the clock that arrivals are told in."""
        return self._anchor + pts_seconds


class Backoff:
    """How long to wait before a source is opened again: 1, 2, 4, 8, 16, 30, 30 ... seconds.

    Each is a fifth more or less by chance, so that cameras behind one switch do not return all
    at once.

    Args:
        first_seconds: The first wait.
        most_seconds: No wait is longer.
        healthy_seconds: After so long a connection the waits begin anew.
        rng: Where chance comes from.
    """

    _JITTER = 0.2

    def __init__(
        self,
        first_seconds: float = 1.0,
        most_seconds: float = 30.0,
        healthy_seconds: float = 10.0,
        rng: random.Random | None = None,
    ) -> None:
        self._first_seconds = first_seconds
        self._most_seconds = most_seconds
        self._healthy_seconds = healthy_seconds
        self._rng = rng or random.Random()
        self._num_failures = 0

    def next_seconds(self, ran_seconds: float) -> float:
        """The next wait, after a connection that gave frames for so long; 0 if it gave none."""
        if ran_seconds >= self._healthy_seconds:
            self._num_failures = 0
        wait = min(self._first_seconds * 2.0 ** min(self._num_failures, 32), self._most_seconds)
        self._num_failures += 1
        return min(wait * self._rng.uniform(1 - self._JITTER, 1 + self._JITTER), self._most_seconds)


class LiveReader:
    """Reads the frames of a source.

    What is live is opened again whenever it ends, fails or falls silent, for ever; it need not be
    there at the start. Frames then have another `session`. A file or a pipe is read to its end.

    No frame is left out here: who cannot keep up with a live source has to drop some itself, or
    they get old. All are decoded, in a thread of their own, and none is converted before
    `LiveFrame.to_rgb`.

    Args:
        source: What to read, from `parse_source`.
        realtime: Whether a file or a pipe is given as fast as it is to be shown, and no faster.
        max_pixels: Most pixels of a frame.
        open_timeout_seconds: How long a source may take to answer, and again to show what it has.
        read_timeout_seconds: How long a live source may be silent; six times that for HLS.
        on_state: Is called with each new state, by the thread that asks for frames.
        backoff: How long to wait before a source is opened again.
        render: Frames of the source `test:` by their numbers, RGB, uint8, all of one shape.

    Raises:
        ValueError: If a number is not positive, or the source `test:` has nothing to render.
    """

    def __init__(
        self,
        source: Source,
        *,
        realtime: bool = False,
        max_pixels: int = MAX_PIXELS,
        open_timeout_seconds: float = 5.0,
        read_timeout_seconds: float = 5.0,
        on_state: Callable[[SourceState], None] | None = None,
        backoff: Backoff | None = None,
        render: Renderer | None = None,
    ) -> None:
        for name, value in (
            ("max_pixels", max_pixels),
            ("open_timeout_seconds", open_timeout_seconds),
            ("read_timeout_seconds", read_timeout_seconds),
        ):
            if not value > 0 or math.isinf(value):
                raise ValueError(f"{name} is {value}; it must be a number above 0.")
        if source.kind == "test" and render is None:
            raise ValueError(
                "The source test: shows what is rendered, and render is None; give a function from "
                "the number of a frame to its pixels, such as motions.EndlessMotions(seed=0)."
            )
        self.source = source
        self._realtime = realtime
        self._limits = _Limits(max_pixels, open_timeout_seconds, read_timeout_seconds)
        self._on_state = on_state
        self._backoff = backoff or Backoff()
        self._render = render
        self._given = _Given()
        self._state: State = "opening"
        self._since = time.time()
        self._reconnects = 0
        self._num_frames = 0
        self._session = -1
        self._last_error: str | None = None
        self._last_arrival: float | None = None

    @property
    def state(self) -> SourceState:
        """How the source is; any thread may ask."""
        last = self._last_arrival
        return SourceState(
            self.source.name,
            self._state,
            self._since,
            self._reconnects,
            self._num_frames,
            self._last_error,
            None if last is None else time.monotonic() - last,
        )

    def frames(self, stop: threading.Event) -> Iterator[LiveFrame]:
        """Give frames as they come, until `stop` is set or a file or pipe is at its end.

        Whatever the source does, setting `stop` ends this within about a second. A connection that
        hangs is left to its thread, which ends by its own time limits.

        Raises:
            VideoError: If a file or a pipe cannot be read; what is live is tried again instead.
        """
        reads = self._read_for_ever if self.source.is_live else self._read_once
        try:
            yield from reads(stop)
        finally:
            if self._state != "failed":
                self._enter("ended")

    def _read_for_ever(self, stop: threading.Event) -> Iterator[LiveFrame]:
        left: list[_Feed] = []
        while not stop.is_set():
            feed = self._start_feed()
            first_arrival: float | None = None
            try:
                for frame in self._placed(feed, stop):
                    first_arrival = first_arrival or frame.arrival_seconds
                    yield frame
            finally:
                feed.leave()
            left = [*filter(_Feed.is_alive, left), feed]
            if stop.is_set():
                feed.join(_PARTING_SECONDS)
                break
            error = feed.error or (
                f"{self.source.shown} ended, which a live stream does not; it is opened again."
            )
            # A camera that stays away for days says so once.
            level = logging.DEBUG if error == self._last_error else logging.WARNING
            self._last_error = error
            self._enter("lost")
            logger.log(level, "%s is lost: %s", self.source.name, error)
            last = self._last_arrival or 0.0
            ran_seconds = last - first_arrival if first_arrival is not None else 0.0
            stop.wait(self._backoff.next_seconds(ran_seconds))
            # Connections that hang end by FFmpeg's limits; there are never many of them.
            while len(left) >= _NUM_LEFT and not stop.wait(_TICK_SECONDS):
                left = [*filter(_Feed.is_alive, left)]

    def _read_once(self, stop: threading.Event) -> Iterator[LiveFrame]:
        feed = self._start_feed()
        paced = _Pace(stop) if self._realtime else None
        try:
            for frame in self._placed(feed, stop):
                if paced is not None and not paced.wait_for(frame):
                    break
                yield frame
        finally:
            feed.leave()
        if feed.failure is not None and not stop.is_set():
            self._last_error = str(feed.failure)
            self._enter("failed")
            raise feed.failure

    def _start_feed(self) -> _Feed:
        self._enter("opening")
        pictures = partial(_pictures, self.source, self._limits, self._render, self._given)
        # FFmpeg's limit holds for the connection, and again for what it learns of the stream.
        feed = _Feed(self.source, pictures, 2 * self._limits.open_seconds + 1)
        feed.start()
        return feed

    def _placed(self, feed: _Feed, stop: threading.Event) -> Iterator[LiveFrame]:
        """The frames of one connection, with their sessions and times."""
        source = self.source
        make_clock = partial(
            StreamClock, is_live=source.is_live, follows_arrival=source.kind != "file"
        )
        clock: StreamClock | None = None
        layout: object = None
        for picture in feed.pictures(stop):
            if clock is None or picture.layout != layout:
                clock, layout = make_clock(frame_seconds=picture.frame_seconds), picture.layout
                self._session += 1
            pts_seconds = clock.place(picture.pts_seconds, picture.arrival_seconds)
            if pts_seconds is None:
                logger.info("The clock of %s jumps; a new session begins", source.name)
                clock = make_clock(frame_seconds=picture.frame_seconds)
                self._session += 1
                pts_seconds = clock.place(picture.pts_seconds, picture.arrival_seconds)
            assert pts_seconds is not None, "a new clock takes any first time"
            self._last_arrival = picture.arrival_seconds
            if self._state != "running":
                self._reconnects += self._num_frames > 0
                self._enter("running")
            self._num_frames += 1
            # The wall's clock may be set; how far it is from the other is asked each time.
            wall = time.time() - time.monotonic()
            yield LiveFrame(
                pts_seconds,
                clock.shown_at(pts_seconds) + wall,
                picture.arrival_seconds,
                self._session,
                picture.width,
                picture.height,
                picture.convert,
            )

    def _enter(self, state: State) -> None:
        self._state, self._since = state, time.time()
        if self._on_state is not None:
            self._on_state(self.state)


class _Pace:
    """Holds frames back until they are to be shown."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._session = -1
        self._start = 0.0

    def wait_for(self, frame: LiveFrame) -> bool:
        """Wait; False if that was stopped."""
        now = time.monotonic()
        if frame.session != self._session:
            self._session, self._start = frame.session, now - frame.pts_seconds
        return not self._stop.wait(max(0.0, self._start + frame.pts_seconds - now))


@dataclass(frozen=True)
class _Limits:
    max_pixels: int
    open_seconds: float
    read_seconds: float


@dataclass(frozen=True, eq=False)
class _Picture:
    """A frame as its source gives it. Frames of another `layout` are of another session."""

    pts_seconds: float | None
    arrival_seconds: float
    width: int
    height: int
    layout: object
    frame_seconds: float
    convert: Convert


class _Given:
    """What earlier connections gave, of a source that tells again what it has told.

    A playlist of HLS stays when its maker is gone. Who opens it anew would see the last seconds
    over and over, and those before the end of a connection twice.
    """

    def __init__(self) -> None:
        self._packets: dict[tuple[int | None, int], None] = {}

    def knows(self, packet: Packet[VideoStream]) -> bool:
        """Whether a packet was given before; it is known from now on."""
        key = packet.pts, zlib.crc32(bytes(packet))
        is_known = key in self._packets
        self._packets[key] = None
        if len(self._packets) > _NUM_KNOWN:
            del self._packets[next(iter(self._packets))]
        return is_known


class _Link:
    """What a feed's thread and the one that takes its frames tell each other."""

    def __init__(self, silence_seconds: float) -> None:
        self.is_left = threading.Event()  # nobody takes frames any more
        self.last_sign = time.monotonic()  # when the source last gave anything
        self.silence_seconds = silence_seconds  # how long it may give nothing


class _Feed(threading.Thread):
    """Opens a source and decodes it, in a thread that can be left alone.

    FFmpeg cannot be told to stop waiting for a network, only to stop after a time; looking up the
    name of a host has not even that. So whoever asks for frames waits for this thread and not for
    the source. A container is used and closed by the thread that opened it.
    """

    def __init__(
        self,
        source: Source,
        pictures: Callable[[_Link], Iterator[_Picture]],
        opening_seconds: float,
    ) -> None:
        super().__init__(name=f"source {source.name}", daemon=True)
        self._source = source
        self._pictures = pictures
        self._handed: queue.Queue[_Picture | None] = queue.Queue(_NUM_HANDED)
        self._link = _Link(opening_seconds if source.is_live else math.inf)
        self.failure: VideoError | None = None
        self.error: str | None = None

    def run(self) -> None:
        """What the thread does."""
        source = self._source
        try:
            with (
                stream_errors(source.shown, source.mask),
                contextlib.closing(self._pictures(self._link)) as pictures,  # type: ignore[type-var]
            ):
                for picture in pictures:
                    if not self._hand(picture):
                        return
        except VideoError as exc:
            self.error = source.mask(str(exc))
            # What is behind an error of an address has the address in its text.
            self.failure = exc if source.kind == "file" else type(exc)(self.error)
        finally:
            self._hand(None)

    def _hand(self, picture: _Picture | None) -> bool:
        self._link.last_sign = time.monotonic()
        while not self._link.is_left.is_set():
            try:
                self._handed.put(picture, timeout=_TICK_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def leave(self) -> None:
        """Ask for no more; the thread ends when its source lets it."""
        self._link.is_left.set()

    def pictures(self, stop: threading.Event) -> Iterator[_Picture]:
        """What it decodes, until the source ends or is silent for too long, or `stop` is set."""
        link = self._link
        while not stop.is_set():
            try:
                picture = self._handed.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                if time.monotonic() - link.last_sign > link.silence_seconds:
                    self.error = (
                        f"{self._source.shown} was silent for {link.silence_seconds:.3g} s; check "
                        "that it is on and sends."
                    )
                    return
                continue
            if picture is None:
                return
            yield picture


def _pictures(
    source: Source, limits: _Limits, render: Renderer | None, given: _Given, link: _Link
) -> Iterator[_Picture]:
    """The frames of one connection to a source, or of a file from its start to its end."""
    if source.kind == "test":
        assert render is not None, "checked when the reader was made"
        return _rendered(source, limits, render, link)
    if source.kind == "file":
        return _of_file(Path(source.address), limits)
    if source.kind == "pipe":
        return _of_pipe(source, limits, link)
    return _of_stream(source, limits, given, link)


def _of_file(path: Path, limits: _Limits) -> Iterator[_Picture]:
    tell = partial(logger.warning, "%s")
    with VideoReader(path, max_pixels=limits.max_pixels, on_warning=tell) as reader:
        frame_seconds = 1 / (reader.average_fps or 25)
        for pts_seconds, convert in reader.read_all():
            yield _Picture(
                pts_seconds,
                time.monotonic(),
                reader.width,
                reader.height,
                None,
                frame_seconds,
                convert,
            )


def _copy_of(pixels: NDArray[np.uint8], _: Scaling | None = None) -> NDArray[np.uint8]:
    copied: NDArray[np.uint8] = pixels.copy()
    return copied


def _rendered(source: Source, limits: _Limits, render: Renderer, link: _Link) -> Iterator[_Picture]:
    fps = float(options_of(source.address).get("fps", _TEST_FPS))
    has_clock = source.address.startswith("test:clock")
    start, number = time.monotonic(), 0
    while not link.is_left.wait(max(0.0, start + number / fps - time.monotonic())):
        pixels = render(number)
        if has_clock:
            pixels = stamp_clock(pixels, time.time())
        height, width = pixels.shape[:2]
        check_frame_size(source.shown, width, height, limits.max_pixels)
        layout = (width, height)
        give = partial(_copy_of, pixels)
        yield _Picture(number / fps, time.monotonic(), width, height, layout, 1 / fps, give)
        # As a camera does: what could not be rendered in time is not shown later.
        number = max(number + 1, int((time.monotonic() - start) * fps))


class _Pipe(io.RawIOBase):
    """The reading end of a pipe, which lets go of one that stays open and silent."""

    def __init__(self, descriptor: int, link: _Link) -> None:
        self._descriptor = descriptor
        self._link = link

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        poll = select.poll()
        # Of a named pipe that nobody has opened to write, nothing is reported.
        poll.register(self._descriptor, select.POLLIN | select.POLLHUP)
        while not self._link.is_left.is_set():
            if poll.poll(_TICK_SECONDS * 1000):
                return os.read(self._descriptor, size if size > 0 else 2**16)
        return b""


def _of_pipe(source: Source, limits: _Limits, link: _Link) -> Iterator[_Picture]:
    import av

    with contextlib.ExitStack() as stack:
        if source.address == "-":
            descriptor = 0
        else:
            descriptor = os.open(source.address, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
        container = av.open(
            _Pipe(descriptor, link),
            mode="r",
            options={
                "protocol_whitelist": "fd",
                "format_whitelist": FORMATS_OF_FILES,
                "max_pixels": decoder_pixels(limits.max_pixels),
            },
            metadata_errors="replace",
        )
        stack.enter_context(contextlib.closing(container))
        yield from _decoded(source, container, limits, link)


def _of_stream(source: Source, limits: _Limits, given: _Given, link: _Link) -> Iterator[_Picture]:
    import av

    slow_seconds = _HLS_READ_FACTOR * limits.read_seconds
    with av.logging.Capture() as lines, contextlib.ExitStack() as stack:
        tell = partial(_log_masked, source, lines)
        stack.callback(tell)
        is_likely_hls = source.address.partition("?")[0].endswith(".m3u8")
        container = _open(source, limits, slow_seconds if is_likely_hls else limits.read_seconds)
        is_hls = container.format.name == "hls"
        if is_hls and not is_likely_hls:
            # A limit cannot be changed once it shows which it is.
            container.close()
            container = _open(source, limits, slow_seconds)
        link.last_sign = time.monotonic()
        link.silence_seconds = slow_seconds if is_hls else limits.read_seconds
        stack.enter_context(contextlib.closing(container))
        for picture in _decoded(source, container, limits, link, given if is_hls else None):
            tell()
            yield picture
        if source.kind == "http" and container.duration and not link.is_left.is_set():
            raise VideoError(
                f"{source.shown} is a recording of {container.duration / 1e6:.0f} s and no live "
                "stream, and begins anew; download it and give the file."
            )


def _open(source: Source, limits: _Limits, read_seconds: float) -> InputContainer:
    import av

    address, form, options = ffmpeg_arguments(
        source, max_pixels=limits.max_pixels, timeout_seconds=limits.read_seconds + _GRACE_SECONDS
    )
    start = time.monotonic()
    try:
        return av.open(
            address,
            mode="r",
            format=form,
            options=options,
            timeout=(limits.open_seconds, read_seconds + _GRACE_SECONDS),
            metadata_errors="replace",
        )
    except av.FFmpegError as exc:
        # Of RTSP, for instance, the error is then that its data are invalid.
        if time.monotonic() - start >= limits.open_seconds:
            raise VideoError(
                f"{source.shown} gave no answer for {limits.open_seconds:.3g} s; check that it is "
                "on and can be reached."
            ) from exc
        problem = certificate_problem(address, limits.open_seconds) if exc.errno == EIO else None
        if problem is not None:
            raise VideoError(
                f"{source.shown} has a certificate that is refused ({problem}); put it, or that of "
                "who issued it, into a file and name that in SSL_CERT_FILE, or name the host in "
                f"{UNVERIFIED_HOSTS} if its certificate shall not be checked."
            ) from exc
        raise


def _log_masked(source: Source, lines: list[tuple[int, str, str]]) -> None:
    """Hand on what FFmpeg logs, where someone has set PyAV's level, without secrets."""
    import av

    taken, lines[:] = list(lines), []
    for level, context, message in taken:
        logger.log(
            av.logging.adapt_level(level), "FFmpeg (%s): %s", context, source.mask(message.strip())
        )


def _decoded(
    source: Source,
    container: InputContainer,
    limits: _Limits,
    link: _Link,
    given: _Given | None = None,
) -> Iterator[_Picture]:
    """Decode the video stream of a container that was opened."""
    import av
    from av.stream import Discard

    best = container.streams.best("video")
    stream = next((s for s in container.streams.video if best and s.index == best.index), None)
    # Typed as always there, but None where the build of FFmpeg has no decoder.
    if stream is None or getattr(stream, "codec_context", None) is None:
        kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
        raise VideoError(
            f"{source.shown} has no video that can be decoded (it has: {', '.join(kinds)}); give "
            "a source with some, in H.264 for instance."
        )
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    codec = stream.codec_context
    check_frame_size(source.shown, codec.width, codec.height, limits.max_pixels)
    codec.options = {"max_pixels": decoder_pixels(limits.max_pixels)}
    # Threads by frame hold back as many frames as there are of them.
    codec.thread_count, codec.thread_type = 1, "SLICE"
    maker = _PictureMaker(source, container, stream, limits.max_pixels)
    undecoded_seconds = max(_MIN_UNDECODED_SECONDS, 3 * limits.read_seconds)
    last_frame = time.monotonic()
    repeated: set[int | None] = set()
    with contextlib.closing(_packets(source, container, stream, link)) as packets:
        for packet in packets:
            if not packet.size and packet.dts is not None:
                continue  # an empty one in the middle would end the decoding
            if given is not None and packet.size and given.knows(packet):
                repeated.add(packet.pts)  # decoded, since others refer to it
            try:
                frames = codec.decode(packet if packet.size else None)
            except MemoryError:
                raise
            except av.FFmpegError:
                frames = []  # a part of the stream was lost; what follows may be well
            for frame in frames:
                last_frame = time.monotonic()
                if frame.pts in repeated:
                    repeated.discard(frame.pts)
                else:
                    yield from maker.take(frame)
            if source.is_live and time.monotonic() - last_frame > undecoded_seconds:
                raise VideoError(
                    f"{source.shown} sends data, and no picture could be decoded from it for "
                    f"{undecoded_seconds:.0f} s ({codec.name}); check what it sends."
                )
    yield from maker.give_held()


def _packets(
    source: Source, container: InputContainer, stream: VideoStream, link: _Link
) -> Generator[Packet[VideoStream], None, None]:
    """The packets of a stream, until it ends or breaks off, or nobody takes any more."""
    from av import FFmpegError

    try:
        for packet in container.demux(stream):
            link.last_sign = time.monotonic()
            if link.is_left.is_set():
                return
            yield packet
    except MemoryError:
        raise
    except FFmpegError as exc:
        raise VideoError(
            f"{source.shown} broke off ({exc.strerror}); see what its other side says."
        ) from exc


class _PictureMaker:
    """Gives the frames of one connection times, as far as the source tells, and pixels."""

    def __init__(
        self, source: Source, container: InputContainer, stream: VideoStream, max_pixels: int
    ) -> None:
        self._source = source
        self._max_pixels = max_pixels
        self._time_base = stream.time_base or 1
        self._frame_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        # A file's counted frames are its times, whichever rate they are counted by.
        names = set(container.format.name.split(","))
        self._has_times = not (source.is_live and names & _WITHOUT_TIMES)
        self._held: list[tuple[VideoFrame, float]] = []
        self._is_anchored = not (source.is_live and self._has_times)
        self._layout: tuple[int, ...] = ()
        self._converter: FrameConverter | None = None

    def take(self, frame: VideoFrame) -> Iterator[_Picture]:
        """Give a frame, after those that were held; or hold it."""
        now = time.monotonic()
        pts = frame.pts if self._has_times else None
        seconds = None if pts is None else float(pts * self._time_base)
        if not self._is_anchored:
            if seconds is None:
                # As the first one of RTSP: its time is told by the next that has one.
                self._held.append((frame, now))
                if len(self._held) > _NUM_HELD:
                    self._has_times = False
                    yield from self.give_held()
                return
            yield from self.give_held(seconds)
        yield self._picture(frame, seconds, now)

    def give_held(self, next_seconds: float | None = None) -> Iterator[_Picture]:
        """Give what is held, at times before that of the next frame."""
        held, self._held, self._is_anchored = self._held, [], True
        for place, (frame, arrival) in enumerate(held):
            seconds = None
            if next_seconds is not None:
                seconds = next_seconds - (len(held) - place) * self._frame_seconds
            yield self._picture(frame, seconds, arrival)

    def _picture(self, frame: VideoFrame, seconds: float | None, arrival: float) -> _Picture:
        layout = (frame.width, frame.height, int(frame.rotation))
        if self._converter is None or layout != self._layout:
            check_frame_size(self._source.shown, frame.width, frame.height, self._max_pixels)
            self._converter, self._layout = FrameConverter(frame), layout
        return _Picture(
            seconds,
            arrival,
            self._converter.width,
            self._converter.height,
            layout,
            self._frame_seconds,
            partial(self._converter.convert, frame),
        )
