"""Shared libraries of Linux that hold nothing but the names of those that they need.

Tests import it by name: `from elf_files import shared_library`.
"""

from __future__ import annotations

import struct


def shared_library(*needed: str) -> bytes:
    """The smallest ELF file with a dynamic section: header, two segments, strings, entries."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    at = 64 + 2 * 56
    places = [strings.index(name.encode()) for name in needed]
    base = 0x10000  # the address that the file is loaded at
    entries = [(1, place) for place in places] + [(5, base + at), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    start = at + len(strings)
    size = start + len(dynamic)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    section = struct.pack("<IIQQQQQQ", 2, 6, start, base + start, 0, len(dynamic), 0, 8)
    return header + load + section + strings + dynamic
