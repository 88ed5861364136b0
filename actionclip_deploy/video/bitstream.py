"""What the headers of coded pictures say: how a packet is to be decoded, and when it is shown.

Containers repeat most of it (keyframes, times), and some containers are wrong. Read from the
specifications: H.264 (ITU-T H.264, 7.3), HEVC (ITU-T H.265, 7.3), MPEG-1, -2 and -4 Part 2,
VP8 (RFC 6386, 9.1), VP9 (Bitstream Specification, 6.2) and AV1 (Bitstream Specification, 5.9).
Nothing but headers is read, a few bytes of a packet.
"""

from __future__ import annotations

from dataclasses import dataclass

# Codecs that announce "no change" by a packet of a header alone, which gives no frame.
_PLACEHOLDER_CODECS = frozenset({"flv", "h263", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"})
_PLACEHOLDER_BYTES = 12
# A packet that starts with so many zeros lies in a part of the file that was never written.
_BLANK_BYTES = 16
_START_CODE = b"\0\0\1"
# Of a slice's header; what is read lies within the first 20.
_HEADER_BYTES = 40

# A picture's place in the order of display: its sequence, and its number in the sequence.
Order = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """What the headers in a packet say."""

    doubt: str | None = None  # why the packet might not give a frame, or None
    is_hidden: bool = False  # whether its frame is never shown
    is_unreferenced: bool = False  # whether no other frame refers to its own
    is_start: bool | None = None  # whether decoding can begin here; None if headers do not say
    order: Order | None = None  # None if headers do not say
    # What ends with the picture before, so that a decoder has to have come by here; or None.
    rupture: str | None = None


class PacketInspector:
    """Looks into the packets of one stream, in decoding order.

    Args:
        codec: FFmpeg's name of the decoder.
        extradata: The decoder's configuration as the container has it.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._codec = codec
        # Of AV1; a container's configuration is 4 bytes and, at times, the sequence's header.
        self._has_sequence = len(extradata) > 4
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
            "av1": self._look_at_av1,
            "libdav1d": self._look_at_av1,
        }.get(codec)

    def look(self, data: bytes) -> Look:
        """Look at the next packet."""
        self._num_looks += 1
        if not any(data[:_BLANK_BYTES]):
            return Look(doubt="is blank")
        if self._units is not None:
            return self._units.look(data)
        if self._codec in _PLACEHOLDER_CODECS and len(data) < _PLACEHOLDER_BYTES:
            return Look(doubt="is too small to hold a frame")
        if self._look_at_picture is not None:
            return self._look_at_picture(data)
        return Look(order=(0, self._num_looks))

    def _look_at_mpeg12(self, data: bytes) -> Look:
        place = data.find(_START_CODE + b"\0") + 5
        if not 4 < place < len(data):
            return Look(doubt="holds no picture")
        header = _found(data, _START_CODE + b"\xb3", 140, place - 5)
        changed = header and self._is_changed("sequence", header)
        return self._in_anchor_order(data[place] >> 3 & 7, 1, 3, changed=changed)

    def _look_at_mpeg4(self, data: bytes) -> Look:
        place = data.find(_START_CODE + b"\xb6") + 4
        if not 3 < place < len(data):
            return Look(doubt="holds no picture")
        layer = b""
        if place > 4:  # the object layer's header, before the picture; one of 16 start codes
            layers = (_START_CODE + bytes([0x20 + number]) for number in range(16))
            layer = next(filter(None, (_found(data, code, 64, place - 4) for code in layers)), b"")
        changed = layer and self._is_changed("layer", layer)
        return self._in_anchor_order(data[place] >> 6, 0, 2, changed=changed)

    def _in_anchor_order(
        self, kind: int, intra: int, bidirectional: int, *, changed: object
    ) -> Look:
        """B-frames are shown before the frame that they follow in the file, others as they come."""
        rupture = "the picture's parameters change" if changed else None
        if kind == bidirectional:
            order = (self._num_anchors, self._num_looks)
            return Look(is_unreferenced=True, is_start=False, order=order, rupture=rupture)
        self._num_anchors += 1
        # After the B-frames up to the next anchor, which have this number and a smaller one.
        order = (self._num_anchors, 1 << 40)
        return Look(is_start=kind == intra, order=order, rupture=rupture)

    def _is_changed(self, name: object, header: bytes) -> bool:
        return self._headers.setdefault(name, header) != header

    def _look_at_vp8(self, data: bytes) -> Look:
        return Look(
            is_hidden=not data[0] >> 4 & 1, is_start=not data[0] & 1, order=(0, self._num_looks)
        )

    def _look_at_vp9(self, data: bytes) -> Look:
        bits = _Bits(data[:4])
        marker, low, high = bits.take(2), bits.take(1), bits.take(1)
        bits.take(int(low and high))
        if marker != 2:
            return Look(doubt="is no frame of VP9")
        shows_existing = bits.take(1)
        is_key = not shows_existing and not bits.take(1)
        return Look(is_start=is_key, order=(0, self._num_looks))

    def _look_at_av1(self, data: bytes) -> Look:
        order = (0, self._num_looks)
        place, has_sequence = 0, self._has_sequence
        while place < len(data):
            kind, has_extension, has_size = (
                data[place] >> 3 & 15,
                data[place] >> 2 & 1,
                data[place] >> 1 & 1,
            )
            place += 1 + has_extension
            size = len(data) - place
            if has_size:
                size = 0
                for i in range(8):
                    if place >= len(data):
                        return Look(doubt="is not made of whole units")
                    byte = data[place]
                    place += 1
                    size |= (byte & 127) << 7 * i
                    if not byte & 128:
                        break
            if place + size > len(data):
                return Look(doubt="is not made of whole units")
            if kind == 1:
                has_sequence = True
                if self._is_changed("sequence", data[place : place + size]):
                    return Look(order=order, rupture="the sequence's parameters change")
            elif kind in (3, 6) and size:
                # show_existing_frame, frame_type (0 is a keyframe), show_frame.
                is_key = data[place] >> 4 == 1
                return Look(is_start=is_key and has_sequence, order=order)
            place += size
        return Look(doubt="holds no picture")


def _found(data: bytes, start: bytes, size: int, end: int) -> bytes:
    """A header from its start code up to the next one; empty if there is none before `end`."""
    place = data.find(start, 0, end)
    if place < 0:
        return b""
    stop = data.find(_START_CODE, place + 4)
    return data[place : min(place + size, stop if stop >= 0 else len(data))]


class _Bits:
    """Bits of a header, most significant first; past the end there are zeros."""

    __slots__ = ("_left", "_value")

    def __init__(self, data: bytes) -> None:
        # Bytes of 3 after two zeros keep start codes from appearing; they are no part of it.
        if b"\0\0\3" in data:
            data = data.replace(b"\0\0\3", b"\0\0")
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
        num_zeros = self._left - rest.bit_length()
        return self.take(2 * num_zeros + 1) - 1

    def take_signed_golomb(self) -> int:
        number = self.take_golomb()
        return (number + 1) // 2 if number & 1 else -(number // 2)


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
        bits = _Bits(unit[1:])
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
        bits = _Bits(unit[1:_HEADER_BYTES])
        return bits.take_golomb(), (bits.take_golomb(), 0)

    def look(self, data: bytes) -> Look:
        try:
            units = self._split(data)
        except IndexError:
            return Look(doubt="is not made of whole units")
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
            return Look(doubt="holds no picture")
        return self._look_at_slice(data, first, is_unreferenced, rupture)

    def _look_at_slice(
        self, data: bytes, place: int, is_unreferenced: bool, rupture: str | None
    ) -> Look:
        is_idr = data[place] & 31 == 5
        try:
            bits = _Bits(data[place + 1 : place + _HEADER_BYTES])
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
            order: Order | None = (self._sequence_number, self._count)
            if sequence.order_type == 0:
                number = self._order(bits.take(sequence.num_order_bits), sequence.num_order_bits)
                order = (self._sequence_number, number)
                if not is_unreferenced:
                    self._last_order = number
            elif sequence.order_type == 1:
                order = None
        except (IndexError, KeyError):
            return Look(doubt="has a header that cannot be read")
        if rupture is None and not sequence.allows_gaps:
            expected = (self._last_reference, self._last_reference + 1)
            if self._last_reference >= 0 and frame not in (
                expected[0],
                expected[1] % (1 << sequence.num_frame_bits),
            ):
                rupture = "pictures are missing"
        if not is_unreferenced or self._last_reference < 0:
            self._last_reference = frame
        return Look(is_unreferenced=is_unreferenced, is_start=is_idr, order=order, rupture=rupture)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.take_signed_golomb()) % 256
        last = following or last


class _Hevc(_UnitInspector):
    _sps_type, _pps_type = 33, 34

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
        bits = _Bits(unit[2:])
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
        return number, _Sequence(
            num_order_bits=num_order_bits, has_planes=has_planes, has_one_layer=num_layers == 1
        )

    def _read_pps(self, unit: bytes) -> tuple[int, tuple[int, int]]:
        bits = _Bits(unit[2:_HEADER_BYTES])
        number, sequence = bits.take_golomb(), bits.take_golomb()
        bits.take(1)
        # output_flag_present_flag, num_extra_slice_header_bits
        return number, (sequence, bits.take(4))

    def look(self, data: bytes) -> Look:
        try:
            units = self._split(data)
        except IndexError:
            return Look(doubt="is not made of whole units")
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
            return Look(doubt="holds no picture")
        return self._look_at_slice(data, first, is_unreferenced, rupture)

    def _look_at_slice(
        self, data: bytes, place: int, is_unreferenced: bool, rupture: str | None
    ) -> Look:
        kind = data[place] >> 1 & 63
        is_start = 16 <= kind <= 23
        try:
            bits = _Bits(data[place + 2 : place + _HEADER_BYTES])
            if not bits.take(1):
                return Look(doubt="lacks the first part of its picture")
            if is_start and bits.take(1) and self._count:
                rupture = "frames before it are not to be shown"
            sequence_number, flags = self._pictures[bits.take_golomb()]
            sequence = self._sequences[sequence_number]
            bits.take(flags & 7)
            bits.take_golomb()  # slice_type
            if flags >> 3 and not bits.take(1):  # pic_output_flag
                return Look(doubt="holds a picture that is not to be shown")
            if sequence.has_planes:
                bits.take(2)
            self._count += 1
            if 16 <= kind <= 20 or self._count == 1:
                self._sequence_number += 1
                self._last_order = 0
            number = 0
            if kind not in (19, 20):
                number = self._order(bits.take(sequence.num_order_bits), sequence.num_order_bits)
            # Not counted from: leading pictures, and those that nothing in their layer refers to.
            if (
                data[place + 1] & 7 == 1
                and kind not in range(6, 10)
                and kind not in _HEVC_UNREFERENCED
            ):
                self._last_order = number
        except (IndexError, KeyError):
            return Look(doubt="has a header that cannot be read")
        return Look(
            # With several layers in time, the next one may refer to it.
            is_unreferenced=is_unreferenced and sequence.has_one_layer,
            is_start=is_start,
            order=(self._sequence_number, number),
            rupture=rupture,
        )


_HEVC_UNREFERENCED = frozenset(range(0, 16, 2))
_UNITS = {"h264": _H264, "hevc": _Hevc}
