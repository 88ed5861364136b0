"""What the headers of coded pictures say: how a packet is to be decoded, and when it is shown.

Containers repeat most of it (keyframes, times), and some containers are wrong. Read from the
specifications: H.264 (ITU-T H.264, 7.3), HEVC (ITU-T H.265, 7.3), MPEG-1, -2 and -4 Part 2,
VP8 (RFC 6386, 9.1), VP9 (Bitstream Specification, 6.2) and AV1 (Bitstream Specification, 5.9).
Nothing but headers is read, a few bytes of a packet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

# Codecs that announce "no change" by a packet of a header alone, which gives no frame.
_PLACEHOLDER_CODECS = frozenset({"flv", "h263", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"})
_PLACEHOLDER_BYTES = 12
# A packet that starts with so many zeros lies in a part of the file that was never written.
_BLANK_BYTES = 16
_START_CODE = b"\0\0\1"
_LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f]")  # of MPEG-4, the header of an object layer
# Of a slice's header; what is read lies within the first 20.
_HEADER_BYTES = 40

# A picture's place in the order of display is one number, which numpy sorts: that of its sequence
# times this, and its own in the sequence.
SEQUENCE = 1 << 36
_LAST_IN_SEQUENCE = SEQUENCE >> 2

_MISSING = "pictures are missing"


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


class PacketInspector:
    """Looks into the packets of one stream, in decoding order.

    Args:
        codec: FFmpeg's name of the decoder.
        extradata: The decoder's configuration as the container has it.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec = codec
        self._num_looks = 0
        self._num_anchors = 0
        self._headers: dict[object, bytes] = {}
        self._units = _UNITS[codec](extradata) if codec in _UNITS else None
        self._look_at_picture = {
            "mpeg1video": self._look_at_mpeg12,
            "mpeg2video": self._look_at_mpeg12,
            "mpeg4": self._look_at_mpeg4,
            "vp8": self._look_at_vp8,
            "vp9": self._look_at_vp9,
        }.get(codec)

    def look(self, data: bytes) -> Look:
        """Look at the next packet."""
        self._num_looks += 1
        if not data[:_BLANK_BYTES].strip(b"\0"):
            return Look(doubt="is blank")
        if self._units is not None:
            return self._units.look(data)
        if self._codec in _PLACEHOLDER_CODECS and len(data) < _PLACEHOLDER_BYTES:
            return Look(doubt="is too small to hold a frame")
        if self._look_at_picture is not None:
            return self._look_at_picture(data)
        return Look(order=self._num_looks)

    def _look_at_mpeg12(self, data: bytes) -> Look:
        place = data.find(_START_CODE + b"\0") + 5
        if not 4 < place < len(data):
            return Look(doubt="holds no picture")
        start = data.find(_START_CODE + b"\xb3", 0, place - 5)
        changed = start >= 0 and self._is_changed("sequence", _header_at(data, start, 140))
        return self._in_anchor_order(data[place] >> 3 & 7, 1, 3, changed=changed)

    def _look_at_mpeg4(self, data: bytes) -> Look:
        place = data.find(_START_CODE + b"\xb6") + 4
        if not 3 < place < len(data):
            return Look(doubt="holds no picture")
        layer = b""
        if place > 4 and (found := _LAYER.search(data, 0, place - 4)):
            layer = _header_at(data, found.start(), 64)
        changed = layer and self._is_changed("layer", layer)
        return self._in_anchor_order(data[place] >> 6, 0, 2, changed=changed)

    def _in_anchor_order(
        self, kind: int, intra: int, bidirectional: int, *, changed: object
    ) -> Look:
        """B-frames are shown before the frame that they follow in the file, others as they come."""
        rupture = "the picture's parameters change" if changed else None
        if kind == bidirectional:
            return Look(self._num_anchors * SEQUENCE + self._num_looks, False, True, rupture)
        self._num_anchors += 1
        # After the B-frames up to the next anchor, which have this number and a smaller one.
        order = self._num_anchors * SEQUENCE + _LAST_IN_SEQUENCE
        return Look(order, kind == intra, False, rupture)

    def _is_changed(self, name: object, header: bytes) -> bool:
        return self._headers.setdefault(name, header) != header

    def _look_at_vp8(self, data: bytes) -> Look:
        return Look(self._num_looks, not data[0] & 1, is_hidden=not data[0] >> 4 & 1)

    def _look_at_vp9(self, data: bytes) -> Look:
        bits = _Bits(data[:4])
        marker, low, high = bits.take(2), bits.take(1), bits.take(1)
        bits.take(int(low and high))
        if marker != 2:
            return Look(doubt="is no frame of VP9")
        shows_existing = bits.take(1)
        is_key = not shows_existing and not bits.take(1)
        return Look(self._num_looks, is_key)


def _header_at(data: bytes, place: int, size: int) -> bytes:
    """A header from its start code up to the next one, or so many bytes of it."""
    stop = data.find(_START_CODE, place + 4)
    return data[place : min(place + size, stop if stop >= 0 else len(data))]


class _Bits:
    """Bits of a header, most significant first; past the end there are zeros."""

    __slots__ = ("_left", "_value")

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big") << 64
        self._left = 8 * len(data) + 64

    def take(self, num_bits: int) -> int:
        """An unsigned number of so many bits."""
        self._left -= num_bits
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & (1 << num_bits) - 1

    def take_golomb(self) -> int:
        """An unsigned number in Exp-Golomb code."""
        rest = self._value & (1 << self._left) - 1
        # As many zeros as there are bits after the first one.
        self._left = left = 2 * rest.bit_length() - self._left - 1
        if left < 0:
            raise IndexError
        return (rest >> left) - 1

    def take_golomb_and_flag(self) -> int:
        """Twice a number in Exp-Golomb code, and the bit after it; this is done most often."""
        rest = self._value & (1 << self._left) - 1
        self._left = left = 2 * rest.bit_length() - self._left - 2
        if left < 0:
            raise IndexError
        return (rest >> left) - 2

    @classmethod
    def of_unit(cls, data: bytes) -> _Bits:
        """Those of a unit of H.264 or HEVC."""
        # Bytes of 3 after two zeros keep start codes from appearing; they are no part of it.
        if b"\0\0\3" in data:
            data = data.replace(b"\0\0\3", b"\0\0")
        return cls(data)

    def take_signed_golomb(self) -> int:
        number = self.take_golomb()
        return (number + 1) // 2 if number & 1 else -(number // 2)


# Of a short-term set of reference pictures of HEVC: how far each is from the one that has it, and
# whether that one refers to it itself.
_References: TypeAlias = tuple[tuple[int, bool], ...]


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


class _UnitInspector:
    """What H.264 and HEVC share: packets of units, and parameter sets by their numbers."""

    _sps_type: int
    _pps_type: int

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = 0  # of the length before each unit; 0 where start codes are
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, tuple[int, int]] = {}  # SPS and flags of each PPS
        self._sets: dict[tuple[int, int], bytes] = {}
        self._sequence_number = 0
        self._last_order = 0  # of the last picture that later ones count from
        self._count = 0
        # The decoder configuration records of ISO/IEC 14496-15.
        if len(extradata) > 6 and extradata[0] == 1:
            self._read_configuration(extradata)
        else:
            for place, stop in self._split(extradata):
                self._read_set(extradata[place:stop])

    def look(self, data: bytes) -> Look:
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
        while place < size:
            start = place + length_bytes
            place = start + int.from_bytes(data[place:start], "big")
            if place == start or place > size:
                raise IndexError
            units.append((start, place))
        return units

    def _read_configuration(self, extradata: bytes) -> None:
        raise NotImplementedError

    def _kind(self, header: int) -> int:
        raise NotImplementedError

    def _read_set(self, unit: bytes) -> str | None:
        """Read a parameter set; says whether it is another than the one of its number before."""
        kind = self._kind(unit[0])
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

    def look(self, data: bytes) -> Look:
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
    ) -> Look:
        is_idr = data[place] & 31 == 5
        try:
            bits = _Bits.of_unit(data[place + 1 : place + _HEADER_BYTES])
            bits.take_golomb()  # first_mb_in_slice
            bits.take_golomb()  # slice_type
            sequence = self._sequences[self._pictures[bits.take_golomb()][0]]
            if sequence.has_planes:
                bits.take(2)
            frame = bits.take(sequence.num_frame_bits)
            is_field = not sequence.is_of_frames and bool(bits.take(1))
            if is_field:
                bits.take(1)
            if is_idr:
                bits.take_golomb()
                self._sequence_number += 1
                self._last_order, self._last_reference = 0, -1
            self._count += 1
            order: int | None = self._sequence_number * SEQUENCE + self._count
            if sequence.order_type == 0:
                number = self._order(bits.take(sequence.num_order_bits), sequence.num_order_bits)
                order = self._sequence_number * SEQUENCE + number
                if not is_unreferenced:
                    self._last_order = number
            elif sequence.order_type == 1:
                order = None
        except (IndexError, KeyError):
            return self._doubt("has a header that cannot be read")
        if rupture is None and not sequence.allows_gaps:
            expected = (self._last_reference, self._last_reference + 1)
            if self._last_reference >= 0 and frame not in (
                expected[0],
                expected[1] % (1 << sequence.num_frame_bits),
            ):
                rupture = _MISSING
        if not is_unreferenced or self._last_reference < 0:
            self._last_reference = frame
        return Look(order, is_idr, is_unreferenced, rupture, rupture == _MISSING)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.take_signed_golomb()) % 256
        last = following or last


class _Hevc(_UnitInspector):
    _sps_type, _pps_type = 33, 34

    def __init__(self, extradata: bytes) -> None:
        # Numbers of the pictures that a decoder keeps here; None where that is not known.
        self._held: set[int] | None = None
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

    def look(self, data: bytes) -> Look:
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
    ) -> Look:
        kind = data[place] >> 1 & 63
        is_start = 16 <= kind <= 23
        try:
            bits = _Bits.of_unit(data[place + 2 : place + _HEADER_BYTES])
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
            self._count += 1
            if 16 <= kind <= 20 or self._count == 1:
                self._sequence_number += 1
                self._last_order = 0
            number = 0
            if kind not in (19, 20):
                number = self._order(bits.take(sequence.num_order_bits), sequence.num_order_bits)
            missing, is_damage = self._miss(bits, sequence, kind, number)
            rupture = rupture or missing
            # Not counted from: leading pictures, and those that nothing in their layer refers to.
            if (
                data[place + 1] & 7 == 1
                and kind not in range(6, 10)
                and kind not in _HEVC_UNREFERENCED
            ):
                self._last_order = number
        except (IndexError, KeyError):
            return self._doubt("has a header that cannot be read")
        # With several layers in time, the next one may refer to it.
        is_unreferenced = is_unreferenced and sequence.has_one_layer
        order = self._sequence_number * SEQUENCE + number
        return Look(order, is_start, is_unreferenced, rupture, is_damage)

    def _miss(
        self, bits: _Bits, sequence: _Sequence, kind: int, number: int
    ) -> tuple[str | None, bool]:
        """Hold the pictures that this one or later ones need against those that there are.

        FFmpeg gives no frame for a picture of which one is missing, and says nothing. It is
        damage if the picture itself refers to it; what is kept for later ones may be missing.
        """
        is_idr = kind in (19, 20)
        if 16 <= kind <= 23:
            # Decoders leave out leading pictures that refer past a point where all begins anew.
            self._skips_leading = kind < 19 or self._count == 1
            if is_idr or self._skips_leading:
                self._held = {number}
                return None, False
        elif self._skips_leading and kind in (8, 9):
            return None, False
        references = None if sequence.sets is None else _references(bits, sequence)
        if references is None or self._held is None:
            self._held = None
            return None, False
        held = self._held
        needed = {number + distance for distance, _ in references}
        self._held = {number} | (held & needed)
        if kind >= 16 or needed <= held:
            return None, False
        missing = [used for distance, used in references if number + distance not in held]
        return _MISSING, any(missing)


def _references(bits: _Bits, sequence: _Sequence) -> _References | None:
    """Read what a slice needs (7.3.6.1); None where that are long-term pictures as well."""
    sets = sequence.sets or ()
    if not bits.take(1):
        references = _read_set_of_references(bits, sets)
    else:
        references = sets[bits.take((len(sets) - 1).bit_length())]
    if sequence.has_long_term:
        num_long_term = bits.take_golomb() if sequence.num_long_term else 0
        if num_long_term + bits.take_golomb():
            return None
    return references


def _read_set_of_references(
    bits: _Bits, sets: tuple[_References, ...], *, is_of_slice: bool = True
) -> _References:
    """Read a short-term set of reference pictures (7.3.7), which comes after others."""
    if sets and bits.take(1):
        origin = sets[-1 - bits.take_golomb() if is_of_slice else -1]
        sign = bits.take(1)
        shift = (1 - 2 * sign) * (bits.take_golomb() + 1)
        found = []
        for distance, _ in (*origin, (0, False)):
            is_used = bool(bits.take(1))
            if is_used or bits.take(1):
                found.append((distance + shift, is_used))
        before = sorted((each for each in found if each[0] < 0), reverse=True)
        return (*before, *sorted(each for each in found if each[0] > 0))
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
    return tuple(entries)


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
        # A container's configuration is 4 bytes and, at times, the sequence's header.
        self._has_sequence = len(extradata) > 4
        if self._has_sequence:
            with suppress(IndexError):
                for kind, place, stop in self._units(extradata[4:]):
                    if kind == _AV1_SEQUENCE:
                        # Some muxers write it shorter than the stream has it.
                        self._sequence = _read_av1_sequence(_Bits(extradata[4:][place:stop]))

    def look(self, data: bytes) -> Look:
        """Look at the next packet."""
        self._count += 1
        is_start: bool | None = None
        rupture = None
        shown = before = self._last
        try:
            for kind, place, stop in self._units(data):
                if kind == _AV1_SEQUENCE:
                    self._has_sequence = True
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
        return Look(self._count, is_start, False, rupture)

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
            return -1
        if not sequence.is_reduced and bits.take(1):  # show_existing_frame
            number, is_key = self._slots[bits.take(3)]
            if is_key:
                self._slots = [(number, True)] * 8
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
