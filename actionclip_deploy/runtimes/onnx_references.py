"""What an ONNX file refers to outside itself, read without the onnx package.

A tensor of an ONNX file may lie in another file, at a path that the ONNX file gives. ONNX Runtime
1.20 and 1.23 follow that path out of the folder, and 1.20 can be led to read any memory of the
process by a reserved name; 1.32 refuses both. Older versions live on in vendors' builds for
devices, so the check is made here, for every runtime.

It is a module of its own because a device that runs a bundle has no onnx, which `onnx_graphs.py`
reads and changes graphs with: it steps over weights in protobuf's own format.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, IntegrityError

# Fields of onnx.proto that lead to tensors or nodes: message -> field number -> its message.
# Source: onnx/onnx.proto of ONNX 1.21; numbers of protocol buffers never change their meaning.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "op_type", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
_MAX_DEPTH = 100  # protocol buffers' own limit of nesting


def check_onnx_file(path: Path, bundle: Bundle) -> dict[str, Path]:
    """Refuse an ONNX file that refers to something that is not a file of its bundle.

    Takes milliseconds, whatever the size of the file: weights are stepped over.

    Args:
        path: A graph of the bundle.
        bundle: The bundle; its manifest says which files belong to it.

    Returns:
        The files that hold weights of it, by name.

    Raises:
        BundleError: If the file is not an ONNX file.
        IntegrityError: If it refers to a file that the manifest does not name or that was altered,
            or to a compiled engine, which a bundle never holds.
    """
    locations, op_types = read_references(path)
    if "EPContext" in op_types:
        raise IntegrityError(
            f"{path} holds a compiled engine (EPContext), which can run any code; a bundle holds "
            "none: do not use this bundle, and export it again from its checkpoint."
        )
    for location in sorted(locations):
        if PurePosixPath(location).as_posix() != location or location not in bundle.manifest.files:
            raise IntegrityError(
                f"{path} keeps weights in {location!r}, which is not a file of the bundle's "
                "manifest; do not use this bundle, and export it again from its checkpoint."
            )
    return {location: bundle.file(location) for location in sorted(locations)}


def read_references(path: Path) -> tuple[set[str], set[str]]:
    """Locations of external data, and the operators used, anywhere in an ONNX file.

    Raises:
        BundleError: If the file is not an ONNX file.
    """
    locations: set[str] = set()
    op_types: set[str] = set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for kind, text in _walk(data, 0, len(data), "model", 0):
                (locations if kind == "location" else op_types).add(text)
    except (OSError, ValueError) as exc:  # an empty file cannot be mapped: ValueError
        raise BundleError(
            f"{path} is not an ONNX file ({exc}); copy the bundle again or export it again."
        ) from exc
    return locations, op_types


def _walk(
    data: mmap.mmap, start: int, end: int, message: str, depth: int
) -> Iterator[tuple[str, str]]:
    """Yield ("location", path) and ("op_type", name) of one message and those inside of it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    keys, values = [], []
    for number, first, last in _fields(data, start, end):
        kind = _FIELDS[message].get(number)
        if kind == "op_type":
            yield "op_type", data[first:last].decode("utf-8")
        elif kind == "key":
            keys.append(data[first:last])
        elif kind == "value":
            values.append(data[first:last])
        elif kind is not None:
            yield from _walk(data, first, last, kind, depth + 1)
    # A field that comes twice counts once to a reader, and which one is no matter here.
    if b"location" in keys:
        yield from (("location", value.decode("utf-8")) for value in values)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of the fields of a message that have a length."""
    while start < end:
        tag, start = _varint(data, start, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, start = _varint(data, start, end)
            continue
        if wire_type == 2:
            length, start = _varint(data, start, end)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"byte {start} begins a field of unknown type {wire_type}")
        if start + length > end:
            raise ValueError(f"it ends inside the field at byte {start}")
        if wire_type == 2:
            yield tag >> 3, start, start + length
        start += length


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and where it ends."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (data[place] & 0x7F) << (7 * (place - start))
        if data[place] < 0x80:
            return value, place + 1
    raise ValueError(f"it has no valid number at byte {start}")
