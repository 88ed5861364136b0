"""Which libraries a shared library of Linux needs, read from the file without loading it."""

from __future__ import annotations

import struct
from pathlib import Path

# ELF specification (gabi), 64 bits, little-endian: x86-64 and aarch64.
_MAGIC = b"\x7fELF\x02\x01"
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_LOAD, _DYNAMIC = 1, 2  # program headers
_NEEDED, _STRINGS = 1, 5  # entries of the dynamic section


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The names of the libraries that a shared library is linked to, in its own order.

    Args:
        path: Of a 64-bit little-endian ELF file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such file, or is cut off.
    """
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError(f"{path} is no 64-bit little-endian ELF file.")
    try:
        return _needed(data)
    except (struct.error, IndexError, StopIteration) as exc:
        raise ValueError(f"{path} is cut off or damaged.") from exc


def _needed(data: bytes) -> tuple[str, ...]:
    (offset,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    headers = [
        _PROGRAM_HEADER.unpack_from(data, offset + i * _PROGRAM_HEADER.size) for i in range(count)
    ]
    loads = [(h[3], h[2], h[5]) for h in headers if h[0] == _LOAD]  # address, offset, size
    entries: list[tuple[int, int]] = []
    for kind, _, start, _, _, size, _, _ in headers:
        if kind == _DYNAMIC:
            if start + size > len(data):
                raise IndexError(start + size)
            entries = list(struct.iter_unpack("<qQ", data[start : start + size]))
    if not entries:
        return ()
    address = next(value for tag, value in entries if tag == _STRINGS)
    strings = next(
        offset + address - base for base, offset, size in loads if base <= address < base + size
    )
    return tuple(_text(data, strings + value) for tag, value in entries if tag == _NEEDED)


def _text(data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    if end < 0:
        raise IndexError(start)
    return data[start:end].decode(errors="replace")
