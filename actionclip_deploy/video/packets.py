"""What the packets of a video tell before anything is decoded.

A packet is what the container holds for one frame, in decoding order. From its times and its
keyframe flags follows which packets have to be decoded for a frame to come out right. Whether
they can be believed is decided here as well: `PacketIndex.distrust` says why not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.video.bitstream import PacketInspector

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

# Packets to either side of a join that may be marked as damaged.
_MAX_FROM_JOIN = 3
# No decoder holds back more frames than these.
_MAX_REORDERED = 16


@dataclass(frozen=True)
class Run:
    """Packets to decode in one go, from a keyframe on; `stop` is exclusive."""

    first: int
    stop: int
    wanted: frozenset[int]


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """The packets of one video stream. P packets in decoding order, N of which give a frame."""

    # Presentation times in units of the stream's time base, shape (P,), int64; 0 where unknown.
    pts: NDArray[np.int64]
    has_times: bool  # whether all are known
    # Which clock a time is by, counted from 0, shape (P,), int64: one that goes back is a new one.
    clock: NDArray[np.int64]
    # Whether decoding can begin with it, by its headers or else the container, shape (P,), bool.
    is_key: NDArray[np.bool_]
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
    # Whether each frame has a time of its own, and pictures say that they are shown at others.
    contradicts: bool = False

    def runs(self, packets: Iterable[int]) -> list[Run]:
        """Plan the decoding of some packets: ascending runs that do not overlap."""
        keys = np.flatnonzero(self.is_key)
        runs: list[tuple[int, int, list[int]]] = []
        for first, packet in sorted((self._start_of(packet, keys), packet) for packet in packets):
            if runs and first < runs[-1][1]:
                start, stop, wanted = runs.pop()
                wanted.append(packet)
                runs.append((start, max(stop, packet + 1), wanted))
            else:
                runs.append((first, packet + 1, [packet]))
        return [Run(first, stop, frozenset(wanted)) for first, stop, wanted in runs]

    def _start_of(self, packet: int, keys: NDArray[np.int64]) -> int:
        # A frame shown before the keyframe that it follows refers to the one before as well.
        place = int(np.searchsorted(keys, packet, side="right")) - 1
        while place >= 0 and self.pts[keys[place]] > self.pts[packet]:
            place -= 1
        return int(keys[place]) if place >= 0 else 0


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
    """Give the packets that count, their places for times: an empty one would end the decoding."""
    packets = (packet for packet in container.demux(stream) if packet.size)
    return (_placed(packet, place) for place, packet in enumerate(packets))


def _placed(packet: Packet[VideoStream], place: int) -> Packet[VideoStream]:
    """A frame comes out with the time of its packet; times repeat and lie, places do not."""
    packet.pts = place
    return packet


def scan_packets(container: InputContainer, stream: VideoStream) -> PacketIndex:
    """Read all packets of a freshly opened container once, and judge them."""
    from av import FFmpegError

    scan = _Scan(stream)
    try:
        scan.read(container)
    except MemoryError:
        raise
    except FFmpegError as exc:
        scan.damage = f"it cannot be read past packet {len(scan.pts)}: {exc.strerror}"
    return scan.index(container)


@dataclass
class _Scan:
    """Gathers what `scan_packets` sees."""

    stream: VideoStream
    # Of each packet: its times, and its place in the order of display.
    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    orders: list[int | None] = field(default_factory=list)
    # Places of the packets that decoding can begin with, that give no frame, and so on.
    keys: list[int] = field(default_factory=list)
    frameless: list[int] = field(default_factory=list)
    unreferenced: list[int] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)
    end_pts: int | None = None  # the end of the last one's time
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

    def read(self, container: InputContainer) -> None:
        """Go through the packets. A video of an hour has 90,000: each line here counts."""
        look = self.inspector.fields
        add_pts, add_dts, add_order = self.pts.append, self.dts.append, self.orders.append
        add_key, add_unreferenced = self.keys.append, self.unreferenced.append
        kept, num_bytes, end_pts = self.kept, 0, self.end_pts
        place = -1
        for packet in container.demux(self.stream):
            size = packet.size
            if not size:
                self.num_empty += packet.dts is not None
                continue
            place += 1
            pts, dts = packet.pts, packet.dts
            order, is_start, is_unreferenced, rupture, is_damage, is_hidden, doubt = look(
                bytes(packet)
            )
            if packet.is_keyframe if is_start is None else is_start:
                add_key(place)
            if is_unreferenced:
                add_unreferenced(place)
            # Frames outside of an edit list are decoded and not shown.
            if is_hidden or packet.is_discard:
                self.frameless.append(place)
            if packet.is_corrupt:
                self.corrupt.append(place)
            if is_damage and self.damage is None:
                self.damage = f"{rupture} at packet {place}"
            if self.distrust is None:
                if doubt is not None:
                    self.distrust = f"packet {place} {doubt}"
                elif rupture is not None:
                    self.distrust = f"{rupture} at packet {place}"
                # Nearly all have no side data, and asking for one kind of it takes longer.
                elif next(packet.iter_sidedata(), None) is not None and self._is_new(packet):
                    self.distrust = f"the decoder's configuration changes at packet {place}"
            add_pts(pts)
            add_dts(dts)
            add_order(order)
            if pts is not None:
                pts += packet.duration or 0
                if end_pts is None or pts > end_pts:
                    self.end_pts = end_pts = pts
            if kept is not None:
                packet.pts = place  # see `_placed`
                kept.append(packet)
                num_bytes += size
                if num_bytes > MAX_KEPT_BYTES:
                    kept = self.kept = None

    def _is_new(self, packet: Packet[VideoStream]) -> bool:
        if not packet.has_sidedata("new_extradata"):
            return False
        # FLV repeats the configuration that there is, where a recording goes on.
        return bytes(packet.get_sidedata("new_extradata")) != self.stream.codec_context.extradata

    def index(self, container: InputContainer) -> PacketIndex:
        times, dts, orders = self.pts, self.dts, self.orders
        has_times = None not in times
        pts = np.array(times if has_times else [t or 0 for t in times], dtype=np.int64)
        is_key, is_unreferenced, gives_frame = np.zeros((3, len(pts)), dtype=np.bool_)
        is_key[self.keys], is_unreferenced[self.unreferenced] = True, True
        gives_frame[:] = True
        gives_frame[self.frameless] = False
        clock = self._clock(pts, dts, has_times=has_times)
        places = np.flatnonzero(gives_frame)
        frames = places[np.argsort(pts[places], kind="stable")]
        damage = self._mark_of_damage(clock) or self.damage
        if damage is None:
            span = None
            if self.end_pts is not None and not clock.any():
                span = min(time for time in times if time is not None), self.end_pts
            step = float(np.median(np.diff(np.sort(pts)))) if len(pts) > 1 else 0.0
            damage = self._missing_part(container, span, step)
        distrust = damage or self.distrust
        if distrust is None and clock.any():
            distrust = f"the clock starts again at packet {int(np.argmax(clock))}"
        if distrust is None and len(frames):
            distrust = _distrust_of_times(pts, is_key, frames, has_times)
        count_is_known, contradicts = distrust is None, False
        if distrust is None:
            distrust = self._distrust_of_order(orders, places, frames)
            # AVI numbers packets in decoding order, and FFmpeg makes times of that: with B-frames
            # they say little. Where one number is left out, a picture may be missing, and B-frames
            # that need it give nothing.
            is_avi = container.format.name == "avi"
            is_reordered = bool((np.diff(frames) < 0).any()) or distrust is not None
            if is_avi and is_reordered and not _is_even(dts):
                distrust = distrust or "packets are missing between B-frames"
                is_avi = False
            count_is_known = distrust is None or is_avi
            contradicts = not count_is_known
            if distrust is not None and count_is_known:
                distrust = "the container stores no presentation times"
        return PacketIndex(
            pts=pts,
            has_times=has_times,
            clock=clock,
            is_key=is_key,
            frames=frames,
            kept=None if self.kept is None else tuple(self.kept),
            is_unreferenced=is_unreferenced,
            damage=damage,
            distrust=distrust,
            count_is_known=count_is_known,
            contradicts=contradicts,
        )

    def _clock(
        self, pts: NDArray[np.int64], dts: Sequence[int | None], *, has_times: bool
    ) -> NDArray[np.int64]:
        """Number the clocks: a new one has times below all before, more than frames reorder."""
        clock = np.zeros(len(pts), dtype=np.int64)
        if not has_times or len(pts) < 2 or not self.stream.time_base:
            return clock
        # Decoding times only go up, where they are the file's and not guessed from the others.
        num_reordered = self.stream.codec_context.reorder_depth
        if None in dts:
            num_reordered = _MAX_REORDERED
        frame = 1 / (self.stream.average_rate or Fraction(25)) / self.stream.time_base
        slack = round((num_reordered + 1) * frame)
        if not (pts[1:] + slack < np.maximum.accumulate(pts)[:-1]).any():
            return clock
        is_back = np.ones(len(pts), dtype=np.bool_)
        if None not in dts:
            is_back[1:] = np.diff(np.array(dts, dtype=np.int64)) < 0
        latest = int(pts[0])
        for place in range(1, len(pts)):
            time = int(pts[place])
            starts_again = bool(is_back[place]) and time + slack < latest
            clock[place] = clock[place - 1] + starts_again
            latest = time if starts_again else max(time, latest)
        return clock

    def _distrust_of_order(
        self, orders: Sequence[int | None], places: NDArray[np.int64], frames: NDArray[np.int64]
    ) -> str | None:
        """Compare the order of times with the one that is written in the pictures themselves."""
        if None in orders:
            return "the order of its pictures cannot be read"
        shown = np.array(orders, dtype=np.int64)[places]
        by_order = places[np.argsort(shown, kind="stable")]
        if not np.diff(np.sort(shown)).all():
            return "there are pictures with the same place in the order of display"
        wrong = np.flatnonzero(frames != by_order)
        if len(wrong):
            return f"packet {by_order[wrong[0]]} has a time that its frame is not shown at"
        codec = self.stream.codec_context
        if codec.name == "h264" and _num_reordered(by_order) > codec.reorder_depth:
            return "the decoder finds out only on the way how far frames are reordered"
        return None

    def _mark_of_damage(self, clock: NDArray[np.int64]) -> str | None:
        # Where one stream was appended to another, packets do not follow on each other, for
        # which FFmpeg marks them; what is damaged there, the decoder tells.
        joins = np.flatnonzero(np.diff(clock)) + 1
        for place in self.corrupt:
            if not len(joins) or np.abs(joins - place).min() > _MAX_FROM_JOIN:
                return f"packet {place} is cut off or marked as damaged"
        return None

    def _missing_part(
        self, container: InputContainer, span: tuple[int, int] | None, step: float
    ) -> str | None:
        """Compare with what the container promises, where its format promises anything.

        `span` is from the first time to the last, None where there is more than one clock; `step`
        is the usual one between two frames.
        """
        stream, num_packets = self.stream, len(self.pts) + self.num_empty
        # MP4 counts frames that an edit list leaves out; its index does not.
        is_mp4 = "mp4" in container.format.name
        promised = len(stream.index_entries) if is_mp4 else stream.frames
        # AVI and IVF count in units of time, of which a frame may take several.
        counts_time = promised == stream.duration and step > 1
        # Packed MPEG-4 has fewer packets than units, and still comes to the end.
        is_reached = span is not None and span[1] - min(0, span[0]) >= promised == stream.duration
        if num_packets < promised and not counts_time and not is_reached:
            return f"it ends after {num_packets} of {promised} packets"
        if span is None or not stream.time_base:
            return None
        if counts_time:
            promised_seconds = float(promised * stream.time_base)
        elif len(container.streams) > 1 or not container.duration:
            return None
        else:
            promised_seconds = container.duration / 1_000_000
        # Some muxers count the duration from the first frame, some from zero: this suits both.
        # A clock that has wrapped begins below zero.
        start_pts = min(0, span[0])
        missing = promised_seconds - float((span[1] - start_pts) * stream.time_base)
        frame_seconds = max(1 / (stream.average_rate or 25), step * stream.time_base)
        if missing > max(
            _MAX_MISSING_FRAMES * frame_seconds, _MAX_MISSING_SHARE * promised_seconds
        ):
            return f"the last {missing:.1f} of {promised_seconds:.1f} seconds are missing"
        return None


def _is_even(dts: Sequence[int | None]) -> bool:
    return None in dts or not np.diff(np.array(dts, dtype=np.int64), 2).any()


def _num_reordered(by_order: NDArray[np.int64]) -> int:
    """How many frames a decoder has to hold back, of packets in the order of display."""
    rank = np.argsort(by_order)
    num_later = np.zeros(len(rank), dtype=np.int64)
    for distance in range(1, min(_MAX_REORDERED, len(rank) - 1) + 1):
        num_later[distance:] += rank[:-distance] > rank[distance:]
    return int(num_later.max(initial=0))


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
