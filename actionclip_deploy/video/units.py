"""Looks at the first bytes of what a packet holds: is it whole, is it shown, is it needed."""

from __future__ import annotations

from collections.abc import Iterator
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
        return Look(is_unreferenced=self._is_b_frame(data))

    def _look_at_units(self, data: bytes) -> Look:
        try:
            headers = list(self._unit_headers(data))
        except IndexError:
            return Look(doubt="is not made of whole units")
        if self._codec == "h264":
            pictures = [header for header in headers if 1 <= header & 31 <= 5]
            unreferenced = [header >> 5 & 3 == 0 for header in pictures]
        else:
            pictures = [header for header in headers if header >> 1 & 63 < 32]
            unreferenced = [header >> 1 & 63 in range(0, 16, 2) for header in pictures]
        if not pictures:
            return Look(doubt="holds no picture")
        return Look(is_unreferenced=self._has_one_layer and all(unreferenced))

    def _unit_headers(self, data: bytes) -> Iterator[int]:
        """First byte of each unit; IndexError where lengths do not lead to the packet's end."""
        place = 0
        if not self._length_bytes:
            while (place := data.find(_START_CODE, place) + 3) > 2 and place < len(data):
                yield data[place]
            return
        while place < len(data):
            start = place + self._length_bytes
            length = int.from_bytes(data[place:start], "big")
            if not length or start + length > len(data):
                raise IndexError
            yield data[start]
            place = start + length

    def _is_b_frame(self, data: bytes) -> bool:
        """Whether it is a B-frame of MPEG-1, -2 or -4 Part 2, to which nothing refers."""
        if self._codec == "mpeg4":
            place = data.find(_START_CODE + b"\xb6") + 4
            return 3 < place < len(data) and data[place] >> 6 == 2
        if self._codec in ("mpeg1video", "mpeg2video"):
            place = data.find(_START_CODE + b"\0") + 5
            return 4 < place < len(data) and data[place] >> 3 & 7 == 3
        return False
