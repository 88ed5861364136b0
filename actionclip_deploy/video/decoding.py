"""Decodes packets: chosen ones with what they depend on, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from actionclip_deploy.video.packets import MAX_KEPT_BYTES, PacketIndex, PacketSource, Run

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_INTRA = 1  # AV_PICTURE_TYPE_I of FFmpeg: a picture that depends on no other

# Packets after the first within which its frame has to come out: more than any decoder reorders.
_MAX_DELAY = 24


@dataclass(frozen=True, eq=False)
class StartedRun:
    """A run that was begun and not ended."""

    first: int  # where it began
    next_place: int  # the first packet that the decoder was not given
    frames: tuple[VideoFrame, ...]  # what came out so far


def start_first_run(
    codec: VideoCodecContext, index: PacketIndex, packets: Iterable[Packet[VideoStream]]
) -> StartedRun | None:
    """Decode until the first frame of the video comes out, so that reading can go on from there.

    Returns:
        The run, of which the last frame is the first of the video; None where anything is not
        as it should be, or the frame does not come soon.
    """
    from av import FFmpegError

    place = int(index.frames[0])
    (run,) = index.runs([place])
    frames: list[VideoFrame] = []
    codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    try:
        for fed, packet in PacketSource(packets).take(run.first, place + _MAX_DELAY):
            frames += codec.decode(packet)
            if frames:
                first = frames[-1]
                is_good = len(frames) == 1 and first.pts == index.pts[place]
                is_good &= first.pict_type == _INTRA and not first.is_corrupt
                return StartedRun(run.first, fed + 1, tuple(frames)) if is_good else None
    except MemoryError:
        raise
    except FFmpegError:
        return None
    return None


def decode_chosen(
    codec: VideoCodecContext,
    index: PacketIndex,
    packets: Iterable[Packet[VideoStream]],
    chosen: Iterable[int],
    put: Callable[[int, VideoFrame], None],
    started: StartedRun | None = None,
) -> str | None:
    """Decode the frames of some packets, and what they depend on.

    Args:
        codec: The decoder; what it decoded before does not matter, but for `started`.
        index: All packets of the stream.
        packets: The stream's packets from its start; drawn from as far as needed.
        chosen: Places of packets in decoding order.
        put: Takes the place of a chosen packet and its frame; called once for each.
        started: A run that the decoder is in; it goes on where that serves the first of the runs.

    Returns:
        Why the frames cannot be relied on, or None. Some may have been put even so.
    """
    source = PacketSource(packets)
    for run in index.runs(chosen):
        problem = _RunDecoder(codec, index, run, put).decode(source, started)
        started = None
        if problem is not None:
            return problem
    return None


class _RunDecoder:
    """Decodes one run, and checks that all came out that should."""

    def __init__(
        self,
        codec: VideoCodecContext,
        index: PacketIndex,
        run: Run,
        put: Callable[[int, VideoFrame], None],
    ) -> None:
        self._codec = codec
        self._index = index
        self._run = run
        self._put = put
        self._first_pts = int(index.pts[run.first])
        self._last_pts = self._first_pts - 1
        shown = index.frames[(index.frames >= run.first) & (index.frames < run.stop)]
        # Frames shown before the run's keyframe cannot be decoded without the one before it.
        shown = shown[index.pts[shown] >= self._first_pts]
        self._place_of_pts = {int(index.pts[place]): int(place) for place in shown}
        self._missing = {*self._place_of_pts.values(), *run.wanted}

    def decode(self, source: PacketSource, started: StartedRun | None) -> str | None:
        """Decode; says what went wrong, or None."""
        from av import FFmpegError

        codec, run = self._codec, self._run
        place = begin = run.first
        if started and started.first == begin and started.next_place <= run.stop:
            begin = started.next_place
            problem = self._receive(list(started.frames))
            if problem is not None:
                return problem
        else:
            codec.flush_buffers()
        try:
            for place, packet in source.take(begin, run.stop):
                skips = self._index.is_unreferenced[place] and place not in run.wanted
                codec.skip_frame = "NONREF" if skips else "DEFAULT"
                if skips:
                    self._missing.discard(place)
                problem = self._receive(codec.decode(packet))
                if problem is not None:
                    return problem
            problem = self._receive(codec.decode(None))
        except MemoryError:  # FFmpeg's is an FFmpegError too, and tells nothing of the file
            raise
        except FFmpegError as exc:
            return f"packet {place} cannot be decoded: {exc.strerror}"
        if problem is None and self._missing:
            return f"packet {min(self._missing)} gave no frame"
        return problem

    def _receive(self, frames: list[VideoFrame]) -> str | None:
        for frame in frames:
            if frame.pts is not None and frame.pts < self._first_pts:
                continue
            place = None if frame.pts is None else self._place_of_pts.get(frame.pts)
            if frame.pts is None or place is None:
                return "a frame came out at a time that no packet has"
            if frame.pts <= self._last_pts:
                return f"packet {place} has a time that its frame is not shown at"
            self._last_pts = frame.pts
            if frame.is_corrupt:
                return f"packet {place} is damaged"
            if place == self._run.first and frame.pict_type != _INTRA:
                return f"packet {place} is called a keyframe and is none"
            self._missing.discard(place)
            if place in self._run.wanted:
                self._put(place, frame)
        return None


class FullDecoder:
    """Decodes all packets, passing over those that cannot be decoded.

    `is_damaged` says whether there were any, or frames that the decoder had to patch, so far.
    """

    def __init__(self, codec: VideoCodecContext, packets: Iterable[Packet[VideoStream]]) -> None:
        self._codec = codec
        self._packets = packets
        self.is_damaged = False

    def __iter__(self) -> Iterator[VideoFrame]:
        from av import FFmpegError

        for packet in chain(self._packets, [None]):  # None gives what was held back
            try:
                frames = self._codec.decode(packet)
            except MemoryError:
                raise
            except FFmpegError:
                self.is_damaged = True
                continue
            self.is_damaged |= any(frame.is_corrupt for frame in frames)
            yield from frames


@dataclass(frozen=True, eq=False)
class Survey:
    """What came out when everything was decoded."""

    first: VideoFrame | None  # the first frame, if there is one
    # Presentation times in the order of output, in units of the stream's time base.
    pts: list[int | None]
    kept: list[VideoFrame]  # all frames, where they are small enough together; else none
    is_damaged: bool  # whether the decoder met with errors


def survey_frames(decoder: FullDecoder) -> Survey:
    """Decode everything and count what comes out."""
    first: VideoFrame | None = None
    pts: list[int | None] = []
    kept: list[VideoFrame] = []
    num_bytes = 0
    for frame in decoder:
        first = first or frame
        pts.append(frame.pts)
        num_bytes += sum(plane.buffer_size for plane in frame.planes)
        if num_bytes <= MAX_KEPT_BYTES:
            kept.append(frame)
    return Survey(first, pts, kept if len(kept) == len(pts) else [], decoder.is_damaged)
