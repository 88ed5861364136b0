"""What the packets of a video tell before anything is decoded.

A packet is what the container holds for one frame, in decoding order. From its times and its
keyframe flags follows which packets have to be decoded for a frame to come out right. Whether
they can be believed is decided here as well: `PacketIndex.distrust` says why not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Packets of short videos are kept, so that the file is read once.
MAX_KEPT_BYTES = 64 * 2**20

# Codecs of which a packet gives one frame and a keyframe starts afresh.
_RELIABLE_CODECS = frozenset(
    {"av1", "libdav1d", "vp8", "vp9"}
    | {"h264", "hevc", "h263", "flv", "mpeg1video", "mpeg2video", "mpeg4"}
    | {"msmpeg4", "msmpeg4v2", "wmv1", "wmv2"}
    | {"dnxhd", "dvvideo", "ffv1", "ffvhuff", "gif", "huffyuv", "mjpeg", "png", "prores"}
    | {"rawvideo", "utvideo", "v210"}
)
# A container's duration may run on after the last frame, with another muxer's rounding.
_MAX_MISSING_SHARE = 0.02
_MAX_MISSING_FRAMES = 3

# Codecs that announce "no change" by a packet of a header alone, which gives no frame.
_PLACEHOLDER_CODECS = frozenset({"flv", "h263", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"})
_PLACEHOLDER_BYTES = 12
# A packet that starts with so many zeros lies in a part of the file that was never written.
_BLANK_BYTES = 16
_START_CODE = b"\0\0\1"


@dataclass(frozen=True)
class Run:
    """Packets to decode in one go, from a keyframe on; `stop` is exclusive."""

    first: int
    stop: int
    wanted: frozenset[int]


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """The packets of one video stream. P packets in decoding order, N of which give a frame."""

    # Presentation times in units of the stream's time base, shape (P,), int64.
    pts: NDArray[np.int64]
    is_key: NDArray[np.bool_]  # whether the container calls it a keyframe, shape (P,), bool
    # Whether no other frame refers to its frame, shape (P,), bool. False where that is not known.
    is_unreferenced: NDArray[np.bool_]
    frames: NDArray[np.int64]  # packet of each frame in presentation order, shape (N,), int64
    # The packets themselves, where they are small enough together.
    kept: tuple[Packet[VideoStream], ...] | None
    # What is missing or broken in the file as far as the container tells, or None.
    damage: str | None
    # Why decoding from a keyframe might give another result than decoding everything, or None.
    distrust: str | None
    count_is_known: bool  # whether N can be believed all the same

    def runs(self, packets: Iterable[int]) -> list[Run]:
        """Plan the decoding of some packets: ascending runs that do not overlap."""
        runs: list[Run] = []
        for first, packet in sorted((self._start_of(packet), packet) for packet in packets):
            if runs and first < runs[-1].stop:
                last = runs.pop()
                stop = max(last.stop, packet + 1)
                runs.append(Run(last.first, stop, last.wanted | {packet}))
            else:
                runs.append(Run(first, packet + 1, frozenset({packet})))
        return runs

    def _start_of(self, packet: int) -> int:
        keys = np.flatnonzero(self.is_key[: packet + 1])
        # A frame shown before the keyframe that it follows refers to the one before as well.
        earlier = keys[self.pts[keys] <= self.pts[packet]]
        return int(earlier[-1]) if len(earlier) else 0


class PacketSource:
    """Hands out packets by their places, which have to go up."""

    def __init__(self, packets: Iterable[Packet[VideoStream]]) -> None:
        self._packets = iter(packets)
        self._place = 0

    def take(self, first: int, stop: int) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """Give the packets of [first, stop) with their places."""
        packets = islice(self._packets, first - self._place, stop - self._place)
        self._place = stop
        return zip(range(first, stop), packets, strict=False)


def demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Give the packets that count: an empty one would end the decoding."""
    return (packet for packet in container.demux(stream) if packet.size)


def scan_packets(container: InputContainer, stream: VideoStream) -> PacketIndex:
    """Read all packets of a freshly opened container once, and judge them."""
    from av import FFmpegError

    scan = _Scan(stream)
    try:
        for packet in container.demux(stream):
            if packet.size:
                scan.add(packet)
            elif packet.dts is not None:
                scan.num_empty += 1
    except MemoryError:
        raise
    except FFmpegError as exc:
        scan.damage = f"it cannot be read past packet {len(scan.pts)}: {exc.strerror}"
    return scan.index(container)


@dataclass
class _Scan:
    """Gathers what `scan_packets` sees."""

    stream: VideoStream
    pts: list[int | None] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    gives_frame: list[bool] = field(default_factory=list)
    is_unreferenced: list[bool] = field(default_factory=list)
    end_pts: int = 0
    kept: list[Packet[VideoStream]] | None = field(default_factory=list)
    num_bytes: int = 0
    num_empty: int = 0
    damage: str | None = None
    distrust: str | None = None

    def __post_init__(self) -> None:
        codec = self.stream.codec_context
        self.inspector = PacketInspector(codec.name, codec.extradata or b"")
        if codec.name not in _RELIABLE_CODECS:
            self.distrust = f"frames of the codec {codec.name} may depend on any earlier one"

    def add(self, packet: Packet[VideoStream]) -> None:
        pts, size = packet.pts, packet.size
        if packet.is_corrupt:
            self.damage = f"packet {len(self.pts)} is cut off or marked as damaged"
        look = self.inspector.look(bytes(packet))
        if look.doubt is not None:
            self.distrust = f"packet {len(self.pts)} {look.doubt}"
        self.pts.append(pts)
        self.is_key.append(packet.is_keyframe)
        # Frames outside of an edit list are decoded and not shown.
        self.gives_frame.append(not (look.is_hidden or packet.is_discard))
        self.is_unreferenced.append(look.is_unreferenced)
        end_pts = (pts or 0) + (packet.duration or 0)
        if end_pts > self.end_pts:
            self.end_pts = end_pts
        self.num_bytes += size
        if self.kept is not None:
            self.kept.append(packet)
            if self.num_bytes > MAX_KEPT_BYTES:
                self.kept = None

    def index(self, container: InputContainer) -> PacketIndex:
        has_times = None not in self.pts
        pts = np.array([0 if t is None else t for t in self.pts], dtype=np.int64)
        is_key = np.array(self.is_key, dtype=np.bool_)
        places = np.flatnonzero(np.array(self.gives_frame, dtype=np.bool_))
        frames = places[np.argsort(pts[places], kind="stable")]
        damage = self.damage or self._missing_part(container)
        distrust = self.distrust or damage
        if distrust is None and len(frames):
            distrust = _distrust_of_times(pts, is_key, frames, has_times)
        count_is_known = distrust is None
        # AVI numbers packets in decoding order; with B-frames that is another order than shown.
        has_b_frames = self.stream.codec_context.has_b_frames
        if distrust is None and container.format.name == "avi" and has_b_frames:
            distrust = "the container stores no presentation times"
        return PacketIndex(
            pts=pts,
            is_key=is_key,
            frames=frames,
            kept=None if self.kept is None else tuple(self.kept),
            is_unreferenced=np.array(self.is_unreferenced, dtype=np.bool_),
            damage=damage,
            distrust=distrust,
            count_is_known=count_is_known,
        )

    def _missing_part(self, container: InputContainer) -> str | None:
        """Compare with what the container promises, where its format promises anything."""
        stream, num_packets = self.stream, len(self.pts) + self.num_empty
        # MP4 counts frames that an edit list leaves out; its index does not.
        is_mp4 = "mp4" in container.format.name
        promised = len(stream.index_entries) if is_mp4 else stream.frames
        if num_packets < promised:
            return f"it ends after {num_packets} of {promised} packets"
        if len(container.streams) > 1 or not container.duration or not stream.time_base:
            return None
        # Some muxers count the duration from the first frame, some from zero: this suits both.
        promised_seconds = container.duration / 1_000_000
        missing = promised_seconds - float(self.end_pts * stream.time_base)
        frame_seconds = 1 / (stream.average_rate or 25)
        if missing > max(
            _MAX_MISSING_FRAMES * frame_seconds, _MAX_MISSING_SHARE * promised_seconds
        ):
            return f"the last {missing:.1f} of {promised_seconds:.1f} seconds are missing"
        return None


def _distrust_of_times(
    pts: NDArray[np.int64],
    is_key: NDArray[np.bool_],
    frames: NDArray[np.int64],
    has_times: bool,
) -> str | None:
    if not has_times:
        return "there are packets without a presentation time"
    if len(np.unique(pts[frames])) < len(frames):
        return "there are frames with the same presentation time"
    if not is_key[0]:
        return "it does not start with a keyframe"
    if pts[frames[0]] < pts[0]:
        return "there are frames before the first keyframe"
    return None


# The first bytes of what a packet holds: is it whole, is it shown, is it needed.


@dataclass(frozen=True)
class Look:
    """What the first bytes of a packet say."""

    doubt: str | None = None  # why the packet might not give a frame, or None
    is_hidden: bool = False  # whether its frame is never shown
    is_unreferenced: bool = False  # whether no other frame refers to its own


# The commonest, made once: thousands of packets are looked at before the first is decoded.
_PLAIN, _UNREFERENCED = Look(), Look(is_unreferenced=True)


class PacketInspector:
    """Looks into the packets of one stream.

    Args:
        codec: FFmpeg's name of the decoder.
        extradata: The decoder's configuration as the container has it.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec = codec
        # Bytes of the length before each unit; 0 where units start with a start code.
        self._length_bytes = 0
        # Frames of one temporal layer that nothing refers to in it may be used by the next.
        self._has_one_layer = codec != "hevc"
        # The decoder configuration records of ISO/IEC 14496-15.
        if len(extradata) > 22 and extradata[0] == 1:
            if codec == "h264":
                self._length_bytes = (extradata[4] & 3) + 1
            elif codec == "hevc":
                self._length_bytes = (extradata[21] & 3) + 1
                self._has_one_layer = extradata[21] >> 3 & 7 == 1

    def look(self, data: bytes) -> Look:
        """Look at a packet."""
        if not any(data[:_BLANK_BYTES]):
            return Look(doubt="is blank")
        if self._codec in ("h264", "hevc"):
            return self._look_at_units(data)
        if self._codec == "vp8":
            # RFC 6386, 9.1: show_frame.
            return Look(is_hidden=not data[0] >> 4 & 1)
        if self._codec in _PLACEHOLDER_CODECS and len(data) < _PLACEHOLDER_BYTES:
            return Look(doubt="is too small to hold a frame")
        return _UNREFERENCED if self._is_b_frame(data) else _PLAIN

    def _look_at_units(self, data: bytes) -> Look:
        try:
            headers = self._unit_headers(data)
        except IndexError:
            return Look(doubt="is not made of whole units")
        if self._codec == "h264":
            unreferenced = [header >> 5 & 3 == 0 for header in headers if 1 <= header & 31 <= 5]
        else:
            types = [header >> 1 & 63 for header in headers]
            unreferenced = [kind in range(0, 16, 2) for kind in types if kind < 32]
        if not unreferenced:
            return Look(doubt="holds no picture")
        return _UNREFERENCED if self._has_one_layer and all(unreferenced) else _PLAIN

    def _unit_headers(self, data: bytes) -> list[int]:
        """First byte of each unit; IndexError where lengths do not lead to the packet's end."""
        place, headers = 0, []
        if not self._length_bytes:
            while (place := data.find(_START_CODE, place) + 3) > 2 and place < len(data):
                headers.append(data[place])
            return headers
        size, length_bytes = len(data), self._length_bytes
        while place < size:
            start = place + length_bytes
            place = start + int.from_bytes(data[place:start], "big")
            if place == start or place > size:
                raise IndexError
            headers.append(data[start])
        return headers

    def _is_b_frame(self, data: bytes) -> bool:
        """Whether it is a B-frame of MPEG-1, -2 or -4 Part 2, to which nothing refers."""
        if self._codec == "mpeg4":
            place = data.find(_START_CODE + b"\xb6") + 4
            return 3 < place < len(data) and data[place] >> 6 == 2
        if self._codec in ("mpeg1video", "mpeg2video"):
            place = data.find(_START_CODE + b"\0") + 5
            return 4 < place < len(data) and data[place] >> 3 & 7 == 3
        return False
