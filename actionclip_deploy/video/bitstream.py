"""What the headers of coded pictures say: how a packet is to be decoded, and when it is shown.

Containers repeat most of it (keyframes, times), and some containers are wrong. Read from the
specifications: H.264 (ITU-T H.264, 7.3), HEVC (ITU-T H.265, 7.3), MPEG-1, -2 and -4 Part 2,
VP8 (RFC 6386, 9.1), VP9 (Bitstream Specification, 6.2) and AV1 (Bitstream Specification, 5.9).
Nothing but headers is read, a few bytes of a packet.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

# Codecs that announce "no change" by a packet of a header alone, which gives no frame.
_PLACEHOLDER_CODECS = frozenset({"flv", "h263", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"})
_PLACEHOLDER_BYTES = 12
# A packet that starts with so many zeros lies in a part of the file that was never written.
_BLANK_BYTES = 16
_START_CODE, _ESCAPE = b"\0\0\1", b"\0\0\3"
_MPEG12_PICTURE, _MPEG4_PICTURE = _START_CODE + b"\0", _START_CODE + b"\xb6"
_LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f]")  # of MPEG-4, the header of an object layer
# Of a slice's header; what is read lies within the first 20.
_HEADER_BYTES = 40

# A picture's place in the order of display is one number, which numpy sorts: that of its sequence
# times this, and its own in the sequence.
SEQUENCE = 1 << 36
_LAST_IN_SEQUENCE = SEQUENCE >> 2

_MISSING, _CHANGED = "pictures are missing", "the picture's parameters change"


class Look(NamedTuple):
    """What the headers in a packet say."""

    order: int | None = None  # place in the order of display; None if headers do not say
    is_start: bool | None = None  # whether decoding can begin here; None if headers do not say
    is_unreferenced: bool = False  # whether no other frame refers to its own
    # What ends with the picture before, so that a decoder has to have come by here; or None.
    rupture: str | None = None
    is_damage: bool = False  # whether that is damage by itself, whatever a decoder makes of it
    is_hidden: bool = False  # whether its frame is never shown
    doubt: str | None = None  # why the packet might not give a frame, or None


# The same without names, which take longer to make, and to take apart, than many a header.
LookFields: TypeAlias = tuple[int | None, bool | None, bool, str | None, bool, bool, str | None]


class PacketInspector:
    """Looks into the packets of one stream, in decoding order.

    Attributes:
        fields: Looks at the next packet, as `look` does; gives the fields without their names.

    Args:
        codec: FFmpeg's name of the decoder.
        extradata: The decoder's configuration as the container has it.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec = codec
        self._num_looks = 0
        self._num_anchors = 0
        self._headers: dict[object, bytes] = {}
        looks = {
            "mpeg1video": self._look_at_mpeg12,
            "mpeg2video": self._look_at_mpeg12,
            "mpeg4": self._look_at_mpeg4,
            "vp8": self._look_at_vp8,
            "vp9": self._look_at_vp9,
        }
        self.fields: Callable[[bytes], LookFields] = looks.get(codec, self._look_at_other)
        if codec in _UNITS:
            self.fields = _UNITS[codec](extradata).look

    def look(self, data: bytes) -> Look:
        """Look at the next packet."""
        return Look(*self.fields(data))

    def _look_at_other(self, data: bytes) -> LookFields:
        self._num_looks += 1
        if _is_blank(data):
            return Look(doubt="is blank")
        if self._codec in _PLACEHOLDER_CODECS and len(data) < _PLACEHOLDER_BYTES:
            return Look(doubt="is too small to hold a frame")
        return Look(order=self._num_looks)

    def _look_at_mpeg12(self, data: bytes) -> LookFields:
        self._num_looks += 1
        if (len(data) < _BLANK_BYTES or not data[5]) and _is_blank(data):
            return Look(doubt="is blank")
        place = data.find(_MPEG12_PICTURE) + 5
        if not 4 < place < len(data):
            return Look(doubt="holds no picture")
        rupture = None
        if place > 5:
            start = data.find(_START_CODE + b"\xb3", 0, place - 5)
            if start >= 0 and self._is_changed("sequence", _header_at(data, start, 140)):
                rupture = _CHANGED
        kind = data[place] >> 3 & 7
        return self._in_anchor_order(kind == 3, kind == 1, rupture)

    def _look_at_mpeg4(self, data: bytes) -> LookFields:
        if len(data) < _BLANK_BYTES or not data[3]:
            look = self._look_at_other(data)
            if look[6] is not None:
                return look
        else:
            self._num_looks += 1
        place = data.find(_MPEG4_PICTURE) + 4
        if not 3 < place < len(data):
            return Look(doubt="holds no picture")
        rupture = None
        if place > 4 and (found := _LAYER.search(data, 0, place - 4)):
            layer = _header_at(data, found.start(), 64)
            if layer and self._is_changed("layer", layer):
                rupture = _CHANGED
        kind = data[place] >> 6
        return self._in_anchor_order(kind == 2, kind == 0, rupture)

    def _in_anchor_order(
        self, is_bidirectional: bool, is_intra: bool, rupture: str | None
    ) -> LookFields:
        """B-frames are shown before the frame that they follow in the file, others as they come."""
        if is_bidirectional:
            order = self._num_anchors * SEQUENCE + self._num_looks
            return (order, False, True, rupture, False, False, None)
        self._num_anchors += 1
        # After the B-frames up to the next anchor, which have this number and a smaller one.
        order = self._num_anchors * SEQUENCE + _LAST_IN_SEQUENCE
        return (order, is_intra, False, rupture, False, False, None)

    def _is_changed(self, name: object, header: bytes) -> bool:
        return self._headers.setdefault(name, header) != header

    def _look_at_vp8(self, data: bytes) -> LookFields:
        self._num_looks += 1
        if (len(data) < _BLANK_BYTES or not data[3]) and _is_blank(data):
            return Look(doubt="is blank")
        tag = data[0]
        return (self._num_looks, not tag & 1, False, None, False, not tag >> 4 & 1, None)

    def _look_at_vp9(self, data: bytes) -> LookFields:
        self._num_looks += 1
        if (len(data) < _BLANK_BYTES or not data[3]) and _is_blank(data):
            return Look(doubt="is blank")
        header = data[0]
        if header >> 6 != 2:
            return Look(doubt="is no frame of VP9")
        # show_existing_frame and frame_type follow on the profile, of which 3 has one bit more.
        shift = 1 if header >> 4 & 3 == 3 else 2
        is_key = not header >> shift & 3
        return (self._num_looks, is_key, False, None, False, False, None)


def _is_blank(data: bytes) -> bool:
    return not data[:_BLANK_BYTES].strip(b"\0")


def _header_at(data: bytes, place: int, size: int) -> bytes:
    """A header from its start code up to the next one, or so many bytes of it."""
    stop = data.find(_START_CODE, place + 4)
    return data[place : min(place + size, stop if stop >= 0 else len(data))]


class _Bits:
    """Bits of a header, most significant first; past the end there are zeros."""

    __slots__ = ("_value", "num_left")

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big") << 64
        self.num_left = 8 * len(data) + 64

    def take(self, num_bits: int) -> int:
        """An unsigned number of so many bits."""
        self.num_left -= num_bits
        if self.num_left < 0:
            raise IndexError
        return self._value >> self.num_left & (1 << num_bits) - 1

    def rest(self) -> int:
        """All that is left, as one number."""
        return self._value & (1 << self.num_left) - 1

    def take_golomb(self) -> int:
        """An unsigned number in Exp-Golomb code."""
        rest = self._value & (1 << self.num_left) - 1
        # As many zeros as there are bits after the first one.
        self.num_left = left = 2 * rest.bit_length() - self.num_left - 1
        if left < 0:
            raise IndexError
        return (rest >> left) - 1

    def take_golomb_and_flag(self) -> int:
        """Twice a number in Exp-Golomb code, and the bit after it; this is done most often."""
        rest = self._value & (1 << self.num_left) - 1
        self.num_left = left = 2 * rest.bit_length() - self.num_left - 2
        if left < 0:
            raise IndexError
        return (rest >> left) - 2

    @classmethod
    def of_unit(cls, data: bytes) -> _Bits:
        """Those of a unit of H.264 or HEVC."""
        # Bytes of 3 after two zeros keep start codes from appearing; they are no part of it.
        if _ESCAPE in data:
            data = data.replace(_ESCAPE, b"\0\0")
        return cls(data)

    def take_signed_golomb(self) -> int:
        number = self.take_golomb()
        return (number + 1) // 2 if number & 1 else -(number // 2)


_read_length = struct.Struct(">I").unpack_from


class _References(NamedTuple):
    """A short-term set of reference pictures of HEVC: how far each is from the one that has it."""

    entries: tuple[tuple[int, bool], ...]  # distance, and whether that one refers to it itself
    needed: frozenset[int]
    used: frozenset[int]

    @classmethod
    def of_entries(cls, entries: tuple[tuple[int, bool], ...]) -> _References:
        needed = frozenset(distance for distance, _ in entries)
        return cls(entries, needed, frozenset(distance for distance, used in entries if used))


@dataclass(frozen=True)
class _Sequence:
    """Of a sequence parameter set, what headers of slices are read with."""

    num_order_bits: int
    num_frame_bits: int = 0
    order_type: int = 0
    allows_gaps: bool = False
    is_of_frames: bool = True
    has_planes: bool = False
    has_one_layer: bool = True
    # Of HEVC: sets of pictures that others need, and what else their headers are read with.
    sets: tuple[_References, ...] | None = None  # None where they cannot be read
    has_long_term: bool = False
    num_long_term: int = 0
    # Sets that slices gave, by their first bits: number of bits, these, and what they say.
    written: dict[int, list[tuple[int, int, _References]]] = field(
        default_factory=dict, compare=False, repr=False
    )


class _UnitInspector:
    """What H.264 and HEVC share: packets of units, and parameter sets by their numbers."""

    _sps_type: int
    _pps_type: int

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = 0  # of the length before each unit; 0 where start codes are
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, tuple[int, int]] = {}  # SPS and flags of each PPS
        self._sets: dict[tuple[int, int], bytes] = {}
        # By the first bytes of a slice: its parameters, and where in its header numbers are.
        self._layouts: dict[bytes, tuple[_Sequence, int]] = {}
        self._sequence_number = 0
        self._last_order = 0  # of the last picture that later ones count from
        self._count = 0
        # The decoder configuration records of ISO/IEC 14496-15.
        if len(extradata) > 6 and extradata[0] == 1:
            self._read_configuration(extradata)
        else:
            for place, stop in self._split(extradata):
                self._read_set(extradata[place:stop])

    def look(self, data: bytes) -> LookFields:
        """Look at the next packet."""
        raise NotImplementedError

    def _doubt(self, reason: str) -> Look:
        """Doubt a packet; what it would have told about the next ones is not known."""
        self._lose_track()
        return Look(doubt=reason)

    def _lose_track(self) -> None:
        raise NotImplementedError

    def _split(self, data: bytes) -> list[tuple[int, int]]:
        """Where units begin and end; IndexError where lengths do not lead to the packet's end."""
        units: list[tuple[int, int]] = []
        place, size, length_bytes = 0, len(data), self._length_bytes
        if not length_bytes:
            place = data.find(_START_CODE) + 3
            while 2 < place < size:
                stop = data.find(_START_CODE, place)
                units.append((place, stop if stop >= 0 else size))
                place = stop + 3
            return units
        if length_bytes == 4 and size > 4 and _read_length(data)[0] == size - 4:
            return [(4, size)]  # the usual packet
        while place < size:
            start = place + length_bytes
            place = start + int.from_bytes(data[place:start], "big")
            if place == start or place > size:
                raise IndexError
            units.append((start, place))
        return units

    def _keep_layout(self, start: bytes, sequence: _Sequence, num_before: int) -> None:
        """Keep it for all slices of which so many bits of the last byte are the same."""
        if num_before <= 8:
            others = 1 << 8 - num_before
            first = start[-1] - start[-1] % others
            for byte in range(first, first + others):
                self._layouts[start[:-1] + bytes([byte])] = sequence, num_before

    def _read_configuration(self, extradata: bytes) -> None:
        raise NotImplementedError

    def _kind(self, header: int) -> int:
        raise NotImplementedError

    def _read_set(self, unit: bytes) -> str | None:
        """Read a parameter set; says whether it is another than the one of its number before."""
        kind = self._kind(unit[0])
        self._layouts.clear()
        try:
            if kind == self._sps_type:
                number, self._sequences[number] = self._read_sps(unit)
            elif kind == self._pps_type:
                number, self._pictures[number] = self._read_pps(unit)
            else:
                return None
        except (IndexError, ValueError):
            return "parameters of the pictures cannot be read"
        unit = unit.rstrip(b"\0")
        is_new = self._sets.setdefault((kind, number), unit) == unit
        return None if is_new else "the pictures' parameters change"

    def _read_sps(self, unit: bytes) -> tuple[int, _Sequence]:
        raise NotImplementedError

    def _read_pps(self, unit: bytes) -> tuple[int, tuple[int, int]]:
        raise NotImplementedError

    def _order(self, low: int, num_bits: int) -> int:
        """The whole number of a picture of which the stream holds the lower bits."""
        half = 1 << num_bits - 1
        return self._last_order + ((low - self._last_order + half) % (2 * half)) - half


class _H264(_UnitInspector):
    _sps_type, _pps_type = 7, 8

    def __init__(self, extradata: bytes) -> None:
        self._last_reference = -1  # frame_num; -1 before the first
        super().__init__(extradata)

    def _lose_track(self) -> None:
        self._last_reference = -1

    def _kind(self, header: int) -> int:
        return header & 31

    def _read_configuration(self, extradata: bytes) -> None:
        self._length_bytes = (extradata[4] & 3) + 1
        place = 6
        for num_sets in (extradata[5] & 31, None):
            if num_sets is None:
                if place >= len(extradata):
                    return
                num_sets = extradata[place]
                place += 1
            for _ in range(num_sets):
                size = int.from_bytes(extradata[place : place + 2], "big")
                unit = extradata[place + 2 : place + 2 + size]
                if unit:
                    self._read_set(unit)
                place += 2 + size

    def _read_sps(self, unit: bytes) -> tuple[int, _Sequence]:
        bits = _Bits.of_unit(unit[1:])
        profile = bits.take(8)
        bits.take(16)
        number, chroma, has_planes = bits.take_golomb(), 1, False
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            chroma = bits.take_golomb()
            has_planes = chroma == 3 and bool(bits.take(1))
            bits.take_golomb()
            bits.take_golomb()
            bits.take(1)
            if bits.take(1):  # scaling lists
                for i in range(8 if chroma != 3 else 12):
                    if bits.take(1):
                        _skip_scaling_list(bits, 16 if i < 6 else 64)
        num_frame_bits = bits.take_golomb() + 4
        order_type, num_order_bits = bits.take_golomb(), 0
        if order_type == 0:
            num_order_bits = bits.take_golomb() + 4
        elif order_type == 1:
            bits.take(1)
            bits.take_signed_golomb()
            bits.take_signed_golomb()
            for _ in range(bits.take_golomb()):
                bits.take_signed_golomb()
        if max(num_frame_bits, num_order_bits) > 16 or order_type > 2:
            raise ValueError
        bits.take_golomb()
        allows_gaps = bool(bits.take(1))
        bits.take_golomb()
        bits.take_golomb()
        return number, _Sequence(
            num_order_bits=num_order_bits,
            num_frame_bits=num_frame_bits,
            order_type=order_type,
            allows_gaps=allows_gaps,
            is_of_frames=bool(bits.take(1)),
            has_planes=has_planes,
        )

    def _read_pps(self, unit: bytes) -> tuple[int, tuple[int, int]]:
        bits = _Bits.of_unit(unit[1:_HEADER_BYTES])
        return bits.take_golomb(), (bits.take_golomb(), 0)

    def look(self, data: bytes) -> LookFields:
        if (len(data) < _BLANK_BYTES or not data[3]) and _is_blank(data):
            return Look(doubt="is blank")
        try:
            units = self._split(data)
        except IndexError:
            return self._doubt("is not made of whole units")
        is_unreferenced, first, rupture = True, None, None
        for place, stop in units:
            header = data[place]
            kind = header & 31
            if 1 <= kind <= 5:
                is_unreferenced &= not header & 0x60
                if first is None and kind in (1, 2, 5):
                    first = place
            elif kind in (7, 8):
                rupture = self._read_set(data[place:stop]) or rupture
        if first is None:
            return self._doubt("holds no picture")
        return self._look_at_slice(data, first, is_unreferenced, rupture)

    def _look_at_slice(
        self, data: bytes, place: int, is_unreferenced: bool, rupture: str | None
    ) -> LookFields:
        is_idr = data[place] & 31 == 5
        window = data[place + 1 : place + 9]
        layout = None if is_idr else self._layouts.get(window[:1])
        try:
            if layout is not None and len(window) == 8 and _ESCAPE not in window:
                # Nothing but the two numbers, one after the other.
                sequence, num_before = layout
                num_bits = sequence.num_frame_bits + sequence.num_order_bits
                numbers = int.from_bytes(window, "big") >> 64 - num_before - num_bits
                numbers &= (1 << num_bits) - 1
                frame = numbers >> sequence.num_order_bits
                low = numbers & (1 << sequence.num_order_bits) - 1
            else:
                sequence, frame, low = self._read_numbers(data, place, is_idr)
        except (IndexError, KeyError):
            return self._doubt("has a header that cannot be read")
        if is_idr:
            self._sequence_number += 1
            self._last_order, self._last_reference = 0, -1
        self._count += 1
        order: int | None = self._sequence_number * SEQUENCE + self._count
        if sequence.order_type == 0:
            number = self._order(low, sequence.num_order_bits)
            order = self._sequence_number * SEQUENCE + number
            if not is_unreferenced:
                self._last_order = number
        elif sequence.order_type == 1:
            order = None
        last = self._last_reference
        if (
            rupture is None
            and last >= 0
            and frame != last
            and frame != (last + 1) % (1 << sequence.num_frame_bits)
            and not sequence.allows_gaps
        ):
            rupture = _MISSING
        if not is_unreferenced or last < 0:
            self._last_reference = frame
        return (order, is_idr, is_unreferenced, rupture, rupture is _MISSING, False, None)

    def _read_numbers(self, data: bytes, place: int, is_idr: bool) -> tuple[_Sequence, int, int]:
        """Read a slice's header (7.3.3): its parameters, frame_num and the bits of its order."""
        bits = _Bits.of_unit(data[place + 1 : place + _HEADER_BYTES])
        num_all = bits.num_left
        bits.take_golomb()  # first_mb_in_slice
        bits.take_golomb()  # slice_type
        sequence = self._sequences[self._pictures[bits.take_golomb()][0]]
        if sequence.has_planes:
            bits.take(2)
        if sequence.is_of_frames and sequence.order_type == 0:
            self._keep_layout(data[place + 1 : place + 2], sequence, num_all - bits.num_left)
        frame = bits.take(sequence.num_frame_bits)
        if not sequence.is_of_frames and bits.take(1):
            bits.take(1)
        if is_idr:
            bits.take_golomb()
        return sequence, frame, bits.take(sequence.num_order_bits)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.take_signed_golomb()) % 256
        last = following or last


class _Hevc(_UnitInspector):
    _sps_type, _pps_type = 33, 34

    def __init__(self, extradata: bytes) -> None:
        # How far the pictures that a decoder keeps here are from the one with this number; None
        # where that is not known.
        self._held: frozenset[int] | None = None
        self._held_number = 0
        self._skips_leading = False
        super().__init__(extradata)

    def _lose_track(self) -> None:
        self._held = None

    def _kind(self, header: int) -> int:
        return header >> 1 & 63

    def _read_configuration(self, extradata: bytes) -> None:
        if len(extradata) < 23:
            return
        self._length_bytes = (extradata[21] & 3) + 1
        place = 23
        for _ in range(extradata[22]):
            num_units = int.from_bytes(extradata[place + 1 : place + 3], "big")
            place += 3
            for _ in range(num_units):
                size = int.from_bytes(extradata[place : place + 2], "big")
                unit = extradata[place + 2 : place + 2 + size]
                if len(unit) > 2:
                    self._read_set(unit)
                place += 2 + size

    def _read_sps(self, unit: bytes) -> tuple[int, _Sequence]:
        bits = _Bits.of_unit(unit[2:])
        bits.take(4)
        num_layers = bits.take(3) + 1
        bits.take(1)
        bits.take(88)  # profile and tier
        bits.take(8)
        has = [(bits.take(1), bits.take(1)) for _ in range(num_layers - 1)]
        if num_layers > 1:
            bits.take(2 * (9 - num_layers))
        for has_profile, has_level in has:
            bits.take(88 * has_profile + 8 * has_level)
        number = bits.take_golomb()
        has_planes = bits.take_golomb() == 3 and bool(bits.take(1))
        bits.take_golomb()
        bits.take_golomb()
        if bits.take(1):
            for _ in range(4):
                bits.take_golomb()
        bits.take_golomb()
        bits.take_golomb()
        num_order_bits = bits.take_golomb() + 4
        if num_order_bits > 16:
            raise ValueError
        sequence = _Sequence(
            num_order_bits=num_order_bits, has_planes=has_planes, has_one_layer=num_layers == 1
        )
        with suppress(IndexError, ValueError):
            sequence = replace(sequence, **_read_references(bits, num_layers))
        return number, sequence

    def _read_pps(self, unit: bytes) -> tuple[int, tuple[int, int]]:
        bits = _Bits.of_unit(unit[2:_HEADER_BYTES])
        number, sequence = bits.take_golomb(), bits.take_golomb()
        bits.take(1)
        # output_flag_present_flag, num_extra_slice_header_bits
        return number, (sequence, bits.take(4))

    def look(self, data: bytes) -> LookFields:
        if (len(data) < _BLANK_BYTES or not data[3]) and _is_blank(data):
            return Look(doubt="is blank")
        try:
            units = self._split(data)
        except IndexError:
            return self._doubt("is not made of whole units")
        is_unreferenced, first, rupture = True, None, None
        for place, stop in units:
            kind = data[place] >> 1 & 63
            if kind < 32:
                is_unreferenced &= kind in _HEVC_UNREFERENCED
                if first is None:
                    first = place
            elif kind in (33, 34):
                rupture = self._read_set(data[place:stop]) or rupture
            elif kind in (36, 37):
                rupture = "a sequence ends"
        if first is None:
            return self._doubt("holds no picture")
        return self._look_at_slice(data, first, is_unreferenced, rupture)

    def _look_at_slice(
        self, data: bytes, place: int, is_unreferenced: bool, rupture: str | None
    ) -> LookFields:
        kind = data[place] >> 1 & 63
        is_start = 16 <= kind <= 23
        try:
            known = self._known_header(data, place)
            if known is not None:
                sequence, low, references = known
            else:
                bits = _Bits.of_unit(data[place + 2 : place + _HEADER_BYTES])
                num_all = bits.num_left
                if not bits.take(1):
                    return self._doubt("lacks the first part of its picture")
                if is_start and bits.take(1) and self._count:
                    rupture = "frames before it are not to be shown"
                sequence_number, flags = self._pictures[bits.take_golomb()]
                sequence = self._sequences[sequence_number]
                bits.take(flags & 7)
                bits.take_golomb()  # slice_type
                if flags >> 3 and not bits.take(1):  # pic_output_flag
                    return self._doubt("holds a picture that is not to be shown")
                if sequence.has_planes:
                    bits.take(2)
                if not is_start:
                    self._keep_layout(data[place : place + 3], sequence, num_all - bits.num_left)
                low = bits.take(sequence.num_order_bits) if kind not in (19, 20) else 0
                references = bits
            self._count += 1
            if 16 <= kind <= 20 or self._count == 1:
                self._sequence_number += 1
                self._last_order = 0
            number = 0 if kind in (19, 20) else self._order(low, sequence.num_order_bits)
            missing, is_damage = self._miss(kind, number, sequence, references)
            rupture = rupture or missing
            # Not counted from: leading pictures, and those that nothing in their layer refers to.
            if data[place + 1] & 7 == 1 and kind not in _HEVC_UNREFERENCED and not 6 <= kind <= 9:
                self._last_order = number
        except (IndexError, KeyError):
            return self._doubt("has a header that cannot be read")
        # With several layers in time, the next one may refer to it.
        is_unreferenced = is_unreferenced and sequence.has_one_layer
        order = self._sequence_number * SEQUENCE + number
        return (order, is_start, is_unreferenced, rupture, is_damage, False, None)

    def _known_header(
        self, data: bytes, place: int
    ) -> tuple[_Sequence, int, _References | _Bits] | None:
        """As much of a slice's header as is used, if there was one like it; else None."""
        layout = self._layouts.get(data[place : place + 3])
        window = data[place + 2 : place + 18]
        if layout is None or len(window) < 16 or _ESCAPE in window:
            return None
        sequence, num_before = layout
        left = 128 - num_before - sequence.num_order_bits
        value = int.from_bytes(window, "big")
        rest = value & (1 << left) - 1
        for length, code, references in sequence.written.get(rest >> left - _NUM_KEY_BITS, ()):
            if length <= left and rest >> left - length == code:
                return sequence, value >> left & (1 << sequence.num_order_bits) - 1, references
        return None

    def _miss(
        self, kind: int, number: int, sequence: _Sequence, references: _References | _Bits | None
    ) -> tuple[str | None, bool]:
        """Hold the pictures that this one or later ones need against those that there are.

        FFmpeg gives no frame for a picture of which one is missing, and says nothing. It is
        damage if the picture itself refers to it; what is kept for later ones may be missing.
        """
        if 16 <= kind <= 23:
            # Decoders leave out leading pictures that refer past a point where all begins anew.
            self._skips_leading = kind < 19 or self._count == 1
            if kind in (19, 20) or self._skips_leading:
                self._held, self._held_number = _ITSELF, number
                return None, False
        elif self._skips_leading and kind in (8, 9):
            return None, False
        if isinstance(references, _Bits):
            references = None if sequence.sets is None else _references(references, sequence)
        if references is None or self._held is None:
            self._held = None
            return None, False
        step, self._held_number = number - self._held_number, number
        self._held, is_missing, is_damage = _held_after(
            self._held, step, references.needed, references.used
        )
        return (_MISSING, is_damage) if is_missing and kind < 16 else (None, False)


_ITSELF = frozenset([0])


# Pictures follow on each other in few ways, again and again.
@functools.lru_cache(maxsize=4096)
def _held_after(
    held: frozenset[int], step: int, needed: frozenset[int], used: frozenset[int]
) -> tuple[frozenset[int], bool, bool]:
    """What a decoder keeps after a picture, and whether it lacked any that it needed, or used."""
    there = frozenset(distance - step for distance in held)
    return _ITSELF | (there & needed), not needed <= there, not used <= there


def _references(bits: _Bits, sequence: _Sequence) -> _References | None:
    """Read what a slice needs (7.3.6.1); None where that are long-term pictures as well."""
    sets, written = sequence.sets or (), sequence.written
    left, rest = bits.num_left, bits.rest()
    if not bits.take(1):
        references = _read_set_of_references(bits, sets)
    else:
        references = sets[bits.take((len(sets) - 1).bit_length())]
    if not sequence.has_long_term:
        if left >= _NUM_KEY_BITS and len(written) < _MAX_WRITTEN:
            known = written.setdefault(rest >> left - _NUM_KEY_BITS, [])
            if len(known) < _MAX_WRITTEN:
                known.append((left - bits.num_left, rest >> bits.num_left, references))
        return references
    num_long_term = bits.take_golomb() if sequence.num_long_term else 0
    return None if num_long_term + bits.take_golomb() else references


# The first bits of a set, and how many sets are kept with the same ones, and for how many.
_NUM_KEY_BITS, _MAX_WRITTEN = 16, 64


def _read_set_of_references(
    bits: _Bits, sets: tuple[_References, ...], *, is_of_slice: bool = True
) -> _References:
    """Read a short-term set of reference pictures (7.3.7), which comes after others."""
    if sets and bits.take(1):
        origin = sets[-1 - bits.take_golomb() if is_of_slice else -1].entries
        sign = bits.take(1)
        shift = (1 - 2 * sign) * (bits.take_golomb() + 1)
        found = []
        for distance, _ in (*origin, (0, False)):
            is_used = bool(bits.take(1))
            if is_used or bits.take(1):
                found.append((distance + shift, is_used))
        before = sorted((each for each in found if each[0] < 0), reverse=True)
        return _References.of_entries((*before, *sorted(each for each in found if each[0] > 0)))
    numbers = bits.take_golomb(), bits.take_golomb()
    if max(numbers) > _MAX_REFERENCES:
        raise IndexError
    entries = []
    take = bits.take_golomb_and_flag
    for sign, number in zip((-1, 1), numbers, strict=True):
        distance = 0
        for _ in range(number):
            code = take()
            distance += sign * ((code >> 1) + 1)
            entries.append((distance, code & 1 == 1))
    return _References.of_entries(tuple(entries))


_MAX_REFERENCES, _MAX_SETS = 16, 64


def _read_references(bits: _Bits, num_layers: int) -> dict[str, Any]:
    """Read a sequence parameter set (7.3.2.2) past the bits of the order, up to its references."""
    num_listed = num_layers if bits.take(1) else 1
    for _ in range(3 * num_listed + 6):
        bits.take_golomb()
    if bits.take(1) and bits.take(1):
        _skip_scaling_lists(bits)
    bits.take(2)
    if bits.take(1):  # PCM
        bits.take(8)
        bits.take_golomb()
        bits.take_golomb()
        bits.take(1)
    num_sets = bits.take_golomb()
    if num_sets > _MAX_SETS:
        raise ValueError
    sets: tuple[_References, ...] = ()
    for _ in range(num_sets):
        sets += (_read_set_of_references(bits, sets, is_of_slice=False),)
    has_long_term = bool(bits.take(1))
    num_long_term = bits.take_golomb() if has_long_term else 0
    return {"sets": sets, "has_long_term": has_long_term, "num_long_term": num_long_term}


def _skip_scaling_lists(bits: _Bits) -> None:
    for size in range(4):
        for _ in range(2 if size == 3 else 6):
            if not bits.take(1):
                bits.take_golomb()
                continue
            for _ in range((size > 1) + min(64, 16 << 2 * size)):
                bits.take_golomb()


_HEVC_UNREFERENCED = frozenset(range(0, 16, 2))


@dataclass(frozen=True)
class _Av1Sequence:
    """Of a sequence header, what headers of frames are read with."""

    num_order_bits: int = 0  # 0 where frames do not say when they are shown
    num_id_bits: int = 0
    is_reduced: bool = False
    # As in the specification, where 2 stands for a choice in each frame.
    screen_content: int = 0
    integer_motion: int = 2


class _Av1:
    """Looks into temporal units of AV1: one frame that is shown, and hidden ones before it.

    A frame holds its number in the order of display. Where the next one that is shown does not
    have the next number, packets are missing, or the encoder left frames out: a decoder tells.
    """

    def __init__(self, extradata: bytes) -> None:
        self._sequence: _Av1Sequence | None = None
        self._header = b""
        self._count = 0
        self._slots = [(-1, False)] * 8  # number and whether it is a keyframe of each kept frame
        self._last = -1  # number of the frame shown last; -1 where that is not known
        self._is_kept = True  # whether a decoder keeps anything of the packet for later ones
        # A container's configuration is 4 bytes and, at times, the sequence's header.
        self._has_sequence = len(extradata) > 4
        if self._has_sequence:
            with suppress(IndexError):
                for kind, place, stop in self._units(extradata[4:]):
                    if kind == _AV1_SEQUENCE:
                        # Some muxers write it shorter than the stream has it.
                        self._sequence = _read_av1_sequence(_Bits(extradata[4:][place:stop]))

    def look(self, data: bytes) -> LookFields:
        """Look at the next packet."""
        if (len(data) < _BLANK_BYTES or not data[3]) and _is_blank(data):
            return Look(doubt="is blank")
        self._count += 1
        is_start: bool | None = None
        rupture = None
        shown = before = self._last
        self._is_kept = False
        try:
            for kind, place, stop in self._units(data):
                if kind == _AV1_SEQUENCE:
                    self._has_sequence = self._is_kept = True
                    if self._read_sequence(data[place:stop]):
                        rupture = "the sequence's parameters change"
                elif kind in _AV1_FRAMES and place < stop:
                    if is_start is None:
                        # show_existing_frame, frame_type (0 is a keyframe), show_frame.
                        is_start = data[place] >> 4 == 1 and self._has_sequence
                        before = -1 if is_start else before
                    found = self._show(_Bits(data[place : place + _AV1_HEADER_BYTES]))
                    shown = shown if found is None else found
        except IndexError:
            return Look(doubt="is not made of whole units")
        if is_start is None:
            return Look(doubt="holds no picture")
        sequence = self._sequence
        self._last = shown
        # Layers of a picture have one number, and only the best of them is shown.
        if (
            rupture is None
            and sequence
            and before >= 0 <= shown
            and (shown - before) % (1 << sequence.num_order_bits) != 1
        ):
            rupture = _MISSING
        return Look(self._count, is_start, not self._is_kept, rupture)

    def _units(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        """Kind of each unit, and where it begins and ends; IndexError where that is not so."""
        place, end = 0, len(data)
        while place < end:
            header = data[place]
            place += 1 + (header >> 2 & 1)
            size = end - place
            if header >> 1 & 1:
                size = 0
                for i in range(8):
                    byte = data[place]
                    place += 1
                    size |= (byte & 127) << 7 * i
                    if not byte & 128:
                        break
            if place + size > end:
                raise IndexError
            yield header >> 3 & 15, place, place + size
            place += size

    def _read_sequence(self, header: bytes) -> bool:
        """Read a sequence header; says whether it is another than before."""
        is_changed = self._header not in (b"", header)
        if self._header != header:
            self._header = header
            self._sequence = None
            with suppress(IndexError):
                self._sequence = _read_av1_sequence(_Bits(header))
        return is_changed

    def _show(self, bits: _Bits) -> int | None:
        """Read a frame's header; gives its number if it is shown, -1 if that is not known."""
        sequence = self._sequence
        if sequence is None or not sequence.num_order_bits:
            self._is_kept = True
            return -1
        if not sequence.is_reduced and bits.take(1):  # show_existing_frame
            number, is_key = self._slots[bits.take(3)]
            if is_key:
                self._slots = [(number, True)] * 8
                self._is_kept = True
            return number
        kind, is_key, is_shown, is_resilient, is_switch = 0, True, True, True, False
        if not sequence.is_reduced:
            kind = bits.take(2)
            is_key, is_switch = kind == 0, kind == 3
            is_shown = bool(bits.take(1))
            if not is_shown:
                bits.take(1)  # showable_frame
            if not is_switch and not (is_key and is_shown):
                is_resilient = bool(bits.take(1))
        bits.take(1)  # disable_cdf_update
        allows_screen = sequence.screen_content
        if allows_screen == 2:
            allows_screen = bits.take(1)
        if allows_screen and sequence.integer_motion == 2:
            bits.take(1)
        bits.take(sequence.num_id_bits)
        if not is_switch and not sequence.is_reduced:
            bits.take(1)  # frame_size_override_flag
        number = bits.take(sequence.num_order_bits)
        if not is_resilient and kind not in (0, 2):  # neither of them refers to others
            bits.take(3)  # primary_ref_frame
        refreshed = 255 if is_switch or (is_key and is_shown) else bits.take(8)
        # Frames with numbers of their own are left to the decoder, which may hold them to those.
        self._is_kept |= bool(refreshed or sequence.num_id_bits)
        for slot in range(8):
            if refreshed >> slot & 1:
                self._slots[slot] = number, is_key
        return number if is_shown else None


_AV1_SEQUENCE, _AV1_FRAMES = 1, (3, 6)  # frame headers alone, and with their frames
_AV1_HEADER_BYTES = 16


def _read_av1_sequence(bits: _Bits) -> _Av1Sequence | None:
    """Read a sequence header (5.5.1); None where frames have a decoder model's fields as well."""
    bits.take(4)  # seq_profile, still_picture
    is_reduced = bool(bits.take(1))
    if is_reduced:
        bits.take(5)
    else:
        if bits.take(1):  # timing_info
            bits.take(64)
            if bits.take(1):
                bits.take_golomb()
            if bits.take(1):
                return None
        has_delay = bits.take(1)
        for _ in range(bits.take(5) + 1):
            bits.take(12)
            if bits.take(5) > 7:
                bits.take(1)
            if has_delay and bits.take(1):
                bits.take(4)
    num_bits = bits.take(4) + 1, bits.take(4) + 1
    bits.take(sum(num_bits))
    num_id_bits = 0
    if not is_reduced and bits.take(1):
        delta = bits.take(4) + 2
        num_id_bits = delta + bits.take(3) + 1
    bits.take(3)
    if is_reduced:
        return _Av1Sequence(is_reduced=True)
    bits.take(4)
    has_order = bits.take(1)
    if has_order:
        bits.take(2)
    screen_content = 2 if bits.take(1) else bits.take(1)
    integer_motion = 2
    if screen_content and not bits.take(1):
        integer_motion = bits.take(1)
    return _Av1Sequence(
        num_order_bits=bits.take(3) + 1 if has_order else 0,
        num_id_bits=num_id_bits,
        screen_content=screen_content,
        integer_motion=integer_motion,
    )


_UNITS: dict[str, type[_H264 | _Hevc | _Av1]] = {
    "h264": _H264,
    "hevc": _Hevc,
    "av1": _Av1,
    "libdav1d": _Av1,
}
