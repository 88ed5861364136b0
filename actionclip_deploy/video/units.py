"""Looks at the first bytes of what a packet holds: is it whole, is it shown, is it needed."""

from __future__ import annotations

from dataclasses import dataclass

# Codecs that announce "no change" by a packet of a header alone, which gives no frame.
_PLACEHOLDER_CODECS = frozenset({"flv", "h263", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"})
_PLACEHOLDER_BYTES = 12
# A packet that starts with so many zeros lies in a part of the file that was never written.
_BLANK_BYTES = 16
_START_CODE = b"\0\0\1"


@dataclass(frozen=True)
class Look:
    """What the first bytes of a packet say.

    Attributes:
        doubt: Why the packet might not give a frame, or None.
        is_hidden: Whether its frame is never shown.
        is_unreferenced: Whether no other frame refers to its own.
    """

    doubt: str | None = None
    is_hidden: bool = False
    is_unreferenced: bool = False


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
