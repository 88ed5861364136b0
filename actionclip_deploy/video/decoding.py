"""Decodes packets: chosen ones with what they depend on, or all of them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from actionclip_deploy.video.packets import MAX_KEPT_BYTES, PacketIndex, PacketSource, Run

if TYPE_CHECKING:
    from av import FFmpegError
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.plane import VideoPlane
    from av.video.stream import VideoStream

_INTRA = 1  # AV_PICTURE_TYPE_I of FFmpeg: a picture that depends on no other

# Packets after the first within which its frame has to come out: more than any decoder reorders.
_MAX_DELAY = 24


# Decoders that do not ask what to skip once they are open. A frame of AV1 to which no other refers
# leaves nothing behind in them (7.20 of its specification), so that it need not be given.
_NOT_GIVEN = frozenset({"av1", "libdav1d"})


class Damage(str):
    """Why frames cannot be relied on: some of the data of their pictures is broken.

    Attributes:
        tails: Where that is in doubt, the ends of frames by the places of their packets. It was a
            false alarm if decoding everything gives the same.
    """

    tails: dict[int, bytes] | None = None


# The smallest part of a picture that HEVC decodes by itself, and the largest.
_CORNER_PIXELS, _TAIL_PIXELS = 8, 64


def tail_of(frame: VideoFrame, num_pixels: int = _TAIL_PIXELS) -> bytes:
    """The last square of a frame's first plane, which is decoded last."""
    return _tail_of_plane(frame, frame.planes[0], num_pixels)


def _tail_of_plane(frame: VideoFrame, plane: VideoPlane, num_pixels: int) -> bytes:
    name, line_size = frame.format.name, plane.line_size
    rows, start = _tail_rows(name, frame.width, frame.height, line_size, num_pixels)
    # Without numpy, since this is done for every frame.
    return b"".join(rows.unpack_from(plane, start))


@functools.lru_cache(maxsize=64)
def _tail_rows(
    pixel_format: str, width: int, height: int, line_size: int, num_pixels: int
) -> tuple[struct.Struct, int]:
    """The form of the rows of a tail, and where the first begins."""
    bytes_each = 1 if _bits_of(pixel_format) <= 8 else 2
    left, right = max(0, bytes_each * (width - num_pixels)), bytes_each * width
    top = max(0, height - num_pixels)
    row, rest = f"{right - left}s", f"{line_size - (right - left)}x"
    return struct.Struct(rest.join([row] * (height - top))), top * line_size + left


@functools.cache
def _bits_of(pixel_format: str) -> int:
    from av import VideoFormat

    return VideoFormat(pixel_format).components[0].bits


@functools.cache
def _gray_corner(pixel_format: str, num_bytes: int) -> bytes:
    """The end of a frame that is gray."""
    bits = _bits_of(pixel_format)
    gray = (1 << bits - 1).to_bytes(1 if bits <= 8 else 2, "little")
    return gray * (num_bytes // len(gray))


class GapFinder:
    """Notices frames of which the end was perhaps not decoded.

    FFmpeg's decoder of HEVC lets a slice end before the picture does, as one flipped bit can
    make it, without a word; what is left then shows what was in the memory before: an earlier
    frame, the gray of a missing one, or nothing. So a frame is in doubt if its last pixels are
    such, and those of no frame that it could have copied them from.
    """

    def __init__(self) -> None:
        from av.video.plane import VideoPlane

        self._make_plane = VideoPlane
        # By the address of a frame's memory: the place of its packet, and its last pixels.
        self._corners: dict[int, tuple[int, bytes]] = {}
        # Of the frames of one run by place: their last pixels; and of those that end as what was
        # there before, its place and all of the end.
        self._run: dict[int, bytes] = {}
        self._repeated: dict[int, tuple[int, bytes]] = {}

    def see(self, frame: VideoFrame) -> None:
        """Look at the next frame that the decoder gives."""
        place = frame.pts
        if place is None:
            return
        plane = self._make_plane(frame, 0)  # `frame.planes` makes all of them
        address = plane.buffer_ptr
        corner = _tail_of_plane(frame, plane, _CORNER_PIXELS)
        before_place, before = self._corners.get(address) or (-1, bytes(len(corner)))
        self._corners[address] = place, corner
        if corner == _gray_corner(frame.format.name, len(corner)):
            before_place, before = -1, corner
        # What was decoded later may be a copy of this one, from when it was read before.
        self._run[place] = corner
        if corner == before and before_place < place:
            self._repeated[place] = before_place, tail_of(frame)

    def end_run(self, first: int) -> dict[int, bytes]:
        """End a run that began at a place; gives the ends of frames in doubt, by place."""
        run, repeated = self._run, self._repeated
        self._run, self._repeated = {}, {}
        doubtful = {}
        places_of: dict[bytes, list[int]] = {}
        for place in sorted(run):
            places_of.setdefault(run[place], []).append(place)
        for place, (before_place, tail) in repeated.items():
            corner = run[place]
            others = (other for other in places_of[corner] if other != before_place)
            is_copied = next(others) < place
            is_flat = corner == corner[:2] * (len(corner) // 2)
            # Flat ends come and go, such as black; an intra picture may well be gray.
            is_no_sign = is_flat and (before_place >= 0 or place == first)
            if not is_copied and not is_no_sign:
                doubtful[place] = tail
        return doubtful


@dataclass(frozen=True, eq=False)
class StartedRun:
    """A run that was begun and not ended."""

    first: int  # where it began
    next_place: int  # the first packet that the decoder was not given
    frames: tuple[VideoFrame, ...]  # what came out so far


def start_first_run(
    codec: VideoCodecContext,
    index: PacketIndex,
    packets: Iterable[Packet[VideoStream]],
    gaps: GapFinder | None = None,
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
                if gaps is not None:
                    gaps.see(frames[0])
                first = frames[-1]
                is_good = len(frames) == 1 and first.pts == place
                is_good &= first.pict_type == _INTRA and not first.is_corrupt
                return StartedRun(run.first, fed + 1, tuple(frames)) if is_good else None
    except MemoryError:
        raise
    except FFmpegError:
        return None
    return None


def chosen_frames(
    codec: VideoCodecContext,
    index: PacketIndex,
    packets: Iterable[Packet[VideoStream]],
    chosen: Iterable[int],
    started: StartedRun | None = None,
    gaps: GapFinder | None = None,
) -> Generator[tuple[int, VideoFrame], None, str | None]:
    """Decode the frames of some packets, and what they depend on.

    Args:
        codec: The decoder; what it decoded before does not matter, but for `started`.
        index: All packets of the stream.
        packets: The stream's packets from its start; drawn from as far as needed.
        chosen: Places of packets in decoding order.
        started: A run that the decoder is in; it goes on where that serves the first of the runs.
        gaps: Of a decoder that passes over what it cannot decode: it sees all of its frames.

    Yields:
        The place of each chosen packet and its frame, in the order in which they are shown.

    Returns:
        Why the frames cannot be relied on, or None. Some may have been given even so.
    """
    source = PacketSource(packets)
    for run in index.runs(chosen):
        problem = yield from _RunDecoder(codec, index, run, gaps).decode(source, started)
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
        gaps: GapFinder | None = None,
    ) -> None:
        self._codec, self._index, self._run = codec, index, run
        self._gaps = gaps
        self._ready: list[tuple[int, VideoFrame]] = []
        self._first_pts = int(index.pts[run.first])
        self._last_pts = self._first_pts - 1
        shown = index.frames[(index.frames >= run.first) & (index.frames < run.stop)]
        # Frames shown before the run's keyframe cannot be decoded without the one before it.
        is_early = index.pts[shown] < self._first_pts
        self._early = set(shown[is_early].tolist())
        self._missing = {*shown[~is_early].tolist(), *run.wanted}
        self._expected = frozenset(self._missing)

    def decode(
        self, source: PacketSource, started: StartedRun | None
    ) -> Generator[tuple[int, VideoFrame], None, str | None]:
        """Give wanted frames as they come out; ends with what went wrong, or None."""
        from av import FFmpegError

        codec, run = self._codec, self._run
        begin = run.first
        if started and started.first == begin and started.next_place <= run.stop:
            begin = started.next_place
            problem = self._receive(list(started.frames))
            yield from self._take_ready()
            if problem is not None:
                return problem
        else:
            codec.flush_buffers()
        unreferenced = np.flatnonzero(self._index.is_unreferenced[run.first : run.stop])
        skipped = set((run.first + unreferenced).tolist()) - run.wanted
        has_skipped = False
        codec.skip_frame = "DEFAULT"
        decode = codec.decode
        is_given = not skipped or codec.name not in _NOT_GIVEN
        for place, packet in source.take(begin, run.stop):
            skips = place in skipped
            if skips and not is_given:
                self._missing.discard(place)
                continue
            if skips is not has_skipped:  # setting it takes as long as looking at a packet
                codec.skip_frame = "NONREF" if skips else "DEFAULT"
                has_skipped = skips
            if skips:
                self._missing.discard(place)
            try:
                frames = decode(packet)
            except MemoryError:  # FFmpeg's is an FFmpegError too, and tells nothing of the file
                raise
            except FFmpegError as exc:
                return _cannot_be_decoded(place, exc)
            if not frames:
                continue
            problem = self._receive(frames)
            # GIF's decoder draws on the frame before, and copies all of it while somebody has it.
            del frames
            if self._ready:
                yield from self._take_ready()
            if problem is not None:
                return problem
        try:
            problem = self._receive(decode(None))
        except MemoryError:
            raise
        except FFmpegError as exc:
            problem = _cannot_be_decoded(run.stop - 1, exc)
        yield from self._take_ready()
        if problem is None and self._missing:
            return f"packet {min(self._missing)} gave no frame"
        tails = self._gaps.end_run(run.first) if self._gaps is not None else {}
        if problem is None and tails:
            problem = Damage(f"the picture of packet {min(tails)} is perhaps not whole")
            problem.tails = tails
        return problem

    def _take_ready(self) -> list[tuple[int, VideoFrame]]:
        ready, self._ready = self._ready, []
        return ready

    def _receive(self, frames: list[VideoFrame]) -> str | None:
        for frame in frames:
            place = frame.pts  # of its packet, see `demux`
            if self._gaps is not None:
                self._gaps.see(frame)
            if place in self._early:
                continue
            if place not in self._expected:
                return "a frame came out that no packet gives"
            pts = int(self._index.pts[place])
            if pts <= self._last_pts:
                return f"packet {place} has a time that its frame is not shown at"
            self._last_pts = pts
            if frame.is_corrupt:
                return Damage(f"packet {place} is damaged")
            if place == self._run.first and not (frame.pict_type == _INTRA and frame.key_frame):
                return f"packet {place} is called a keyframe and is none"
            self._missing.discard(place)
            if place in self._run.wanted:
                self._ready.append((place, frame))
        return None


def _cannot_be_decoded(place: int, error: FFmpegError) -> Damage:
    return Damage(f"packet {place} cannot be decoded: {error.strerror}")


_DRAWS_ON_LAST = "gif"  # the codec whose decoder draws on the frame before, in its memory


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
            if self._codec.name != _DRAWS_ON_LAST:
                # Kept until the next packet is decoded: its frame does not get their memory, which
                # would show where a damaged picture has nothing of its own.
                yield from frames
                continue
            # Each is let go of as it is given: the decoder copies all of it while somebody has it.
            frames.reverse()
            while frames:
                yield frames.pop()


@dataclass(frozen=True, eq=False)
class Survey:
    """What came out when everything was decoded."""

    first: VideoFrame | None  # the first frame, if there is one
    places: list[int | None]  # of the packets that gave the frames, in the order of output
    kept: list[VideoFrame]  # all frames, where they are small enough together; else none
    is_damaged: bool  # whether the decoder met with errors


def survey_frames(
    decoder: FullDecoder, *, keeps_frames: bool, tails: dict[int, bytes] | None = None
) -> Survey:
    """Decode everything and count what comes out; keep it if asked to and it is not too much.

    Frames that end otherwise than is given by the places of their packets are damage.
    """
    tails = tails or {}
    is_damaged = False
    first: VideoFrame | None = None
    places: list[int | None] = []
    kept: list[VideoFrame] = []
    num_bytes = 0 if keeps_frames else MAX_KEPT_BYTES
    for frame in decoder:
        first = first or frame
        places.append(frame.pts)
        if frame.pts in tails:
            is_damaged |= tails[frame.pts] != tail_of(frame)
        if num_bytes < MAX_KEPT_BYTES:
            num_bytes += sum(plane.buffer_size for plane in frame.planes)
            kept.append(frame)
        del frame  # see `FullDecoder`
    kept = kept if len(kept) == len(places) else []
    return Survey(first, places, kept, is_damaged or decoder.is_damaged)
