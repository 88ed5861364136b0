"""What strangers send: forms, read as they arrive, and arrays in .npy files.

Files of a form go to disk, and its fields are bounded. Nothing is unpickled, and the size of an
array is checked before it is read.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.files import try_lock
from actionclip_deploy.records import printable
from actionclip_deploy.serve import refusals

logger = logging.getLogger(__name__)

_HEADER_BYTES = 4096
_MAX_DIMENSIONS = 8  # numpy itself ends at 32 or 64

# What was uploaded, as files that the decoding processes read; gone when a request ends.


class SpooledFile:
    """A file that is being uploaded.

    Attributes:
        path: Where it lies.
        size_bytes: What has been written.
    """

    def __init__(self, path: Path, spool: Spool) -> None:
        self.path = path
        self.size_bytes = 0
        self._spool = spool
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: BinaryIO = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            RequestRefusedError: If there is no room for it (503).
        """
        self._spool.take(len(data))
        self.size_bytes += len(data)
        with _no_space_told():
            self._file.write(data)

    def close(self) -> None:
        """Make it whole; may be called again.

        Raises:
            RequestRefusedError: If there is no room for the last of it (503).
        """
        with _no_space_told():
            self._file.close()

    def remove(self) -> None:
        """Remove it."""
        with suppress(OSError):  # what does not fit on the disk any more is not wanted either
            self._file.close()
        self.path.unlink(missing_ok=True)
        self._spool.give_back(self.size_bytes)


@contextmanager
def _no_space_told() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise refusals.spool_full(
            f"The server cannot keep the upload ({exc.strerror}); try again later, or tell whoever "
            "runs it."
        ) from exc


_FOLDER = "actionclip-spool-"
_UNFINISHED_FOLDER = ".actionclip-spool-"  # not locked yet
_UNFINISHED_SECONDS = 60.0  # far longer than until it is


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder for this process; gives its handle, or None where another one has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if try_lock(handle):
            return handle
    except OSError:  # a file system without locks
        pass
    os.close(handle)
    return None


def _sweep(parent: Path) -> None:
    """Remove the folders of servers that were killed; those of live ones are locked by them."""
    old = time.time() - _UNFINISHED_SECONDS
    unfinished = parent.glob(f"{_UNFINISHED_FOLDER}*")
    for folder in [*parent.glob(f"{_FOLDER}*"), *unfinished]:
        handle = None
        # Another user's, or one that another server is sweeping: nothing to do, and no harm.
        with suppress(OSError):
            found = folder.lstat()
            is_new = folder.name.startswith(".") and found.st_mtime > old
            if found.st_uid != os.geteuid() or is_new:
                continue
            handle = _lock_folder(folder)
            if handle is not None:
                logger.info("Removing %s, which a server that was killed has left.", folder)
                shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


class Spool:
    """A private folder of uploads; a context manager that removes it.

    The folder is locked while its server lives, and the next one removes those that are not.

    Args:
        folder: Where it is made; None for the system's folder of temporary files.
        max_bytes: What all files together may take.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        made = Path(tempfile.mkdtemp(prefix=_UNFINISHED_FOLDER, dir=folder))
        self._lock = _lock_folder(made)
        # It gets the name that others look at once it is locked.
        self.folder = made.rename(made.with_name(made.name.removeprefix(".")))
        _sweep(self.folder.parent)
        self._numbers = count()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder; may be called again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def take(self, num_bytes: int) -> None:
        """Count bytes that are written.

        Raises:
            RequestRefusedError: If there are too many (503).
        """
        if self.num_bytes + num_bytes > self._max_bytes:
            raise refusals.spool_full(
                f"The uploads of all requests together may take {self._max_bytes:,} bytes and "
                "would take more; try again after the time in Retry-After."
            )
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Count bytes that were removed."""
        self.num_bytes -= num_bytes

    @contextmanager
    def files(self) -> Iterator[RequestFiles]:
        """The files of one request, removed at the end of the block."""
        files = RequestFiles(self, self.folder / f"{next(self._numbers):x}")
        try:
            yield files
        finally:
            files.remove()


class RequestFiles:
    """Makes the files of one request.

    Args:
        spool: Counts their bytes.
        prefix: What their paths begin with.
    """

    def __init__(self, spool: Spool, prefix: Path) -> None:
        self._spool = spool
        self._prefix = prefix
        self._files: list[SpooledFile] = []

    def make(self) -> SpooledFile:
        """A new, empty file; its name says nothing of what a client called it."""
        path = self._prefix.with_name(f"{self._prefix.name}-{len(self._files)}")
        file = SpooledFile(path, self._spool)
        self._files.append(file)
        return file

    def remove(self) -> None:
        """Remove all of them."""
        for file in self._files:
            file.remove()


_HEADER_BYTES = 8192
_NAME_CHARACTERS = 255
# Far more than labels and templates of a request may be; each takes memory besides its bytes.
_MAX_PARTS = 2048


@dataclass(frozen=True)
class FormFile:
    """A part that is a file.

    Attributes:
        field: Name of the part.
        name: What its sender calls it.
        file: Where it lies.
    """

    field: str
    name: str
    file: SpooledFile


@dataclass
class Form:
    """What a form holds.

    Attributes:
        fields: Values by name, in their order.
        files: In their order.
    """

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: list[FormFile] = field(default_factory=list)


class _Parts:
    """Gets the parser's events."""

    def __init__(
        self, spool: RequestFiles, file_fields: frozenset[str], field_bytes: int, max_files: int
    ) -> None:
        self.form = Form()
        self.is_complete = False
        self._spool = spool
        self._file_fields = file_fields
        self._bytes_left = field_bytes
        self._field_bytes = field_bytes
        self._max_files = max_files
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._file: SpooledFile | None = None
        self._name = ""
        self._value = bytearray()

    def events(self) -> dict[str, object]:
        return {
            f"on_{name}": getattr(self, name)
            for name in (
                *("part_begin", "header_field", "header_value", "header_end"),
                *("headers_finished", "part_data", "part_end", "end"),
            )
        }

    def part_begin(self) -> None:
        self._headers = {}

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header_name, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header_value, data[start:end])

    def _grow(self, text: bytearray, more: bytes) -> None:
        text += more
        if len(text) > _HEADER_BYTES:
            raise refusals.bad_request("A header of a part of the form is too long; shorten it.")

    def header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise refusals.bad_request(
                "A part of the form has no name; give each one a name in Content-Disposition."
            )
        self._name = options[b"name"].decode("utf-8", "replace")
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise refusals.too_many("parts in its form", self._num_parts, _MAX_PARTS)
        self._value, self._file = bytearray(), None
        if self._name in self._file_fields:
            if len(self.form.files) >= self._max_files:
                raise refusals.too_many("files", len(self.form.files) + 1, self._max_files)
            given = options.get(b"filename", b"").decode("utf-8", "replace")
            self._file = self._spool.make()
            self.form.files.append(FormFile(self._name, _display_name(given), self._file))

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._bytes_left -= end - start
        if self._bytes_left < 0:
            raise refusals.too_many(
                "bytes in fields that are no files",
                self._field_bytes - self._bytes_left,
                self._field_bytes,
            )
        self._value += data[start:end]

    def part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            return
        try:
            text = self._value.decode("utf-8")
        except UnicodeDecodeError:
            raise refusals.bad_request(
                f"The field {self._name!r} is not UTF-8; send text in UTF-8."
            ) from None
        self.form.fields.setdefault(self._name, []).append(text)

    def end(self) -> None:
        self.is_complete = True


async def read_form(
    chunks: AsyncIterator[bytes],
    content_type: str,
    spool: RequestFiles,
    *,
    file_fields: frozenset[str],
    field_bytes: int,
    max_files: int,
) -> Form:
    """Read a form.

    Args:
        chunks: The body.
        content_type: Header of the request.
        spool: Makes the files.
        file_fields: Names of the parts that are files.
        field_bytes: What all other parts may have together.
        max_files: Files there may be.

    Raises:
        RequestRefusedError: If it is not such a form, or more than allowed.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    parts = _Parts(spool, file_fields, field_bytes, max_files)
    try:
        if not boundary:
            raise FormParserError("it has no boundary")
        parser = MultipartParser(boundary, parts.events())  # type: ignore[arg-type]
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except (FormParserError, RequestRefusedError) as exc:
        if isinstance(exc, RequestRefusedError):
            raise
        raise refusals.bad_request(
            f"The body is not multipart/form-data ({exc}); send it as `curl --form` does."
        ) from exc
    if not parts.is_complete:
        raise refusals.bad_request(
            "The body ends in the middle of a part; send all of it, with its last boundary."
        )
    return parts.form


def _display_name(given: str) -> str:
    """A client's name of a file as messages and logs may show it: no folders, nothing odd."""
    last = given.replace("\\", "/").rsplit("/", 1)[-1]
    return printable(last, kept="")[:_NAME_CHARACTERS] or "the video"


# Arrays.


def read_frames_file(path: Path, name: str) -> NDArray[np.uint8]:
    """Map a .npy file of frames into memory.

    Args:
        path: The file.
        name: What its sender called it.

    Returns:
        RGB, uint8, shape (N, H, W, 3), read-only.

    Raises:
        RequestRefusedError: If it is not such a file.
    """
    with path.open("rb") as file:
        shape, dtype = _read_header(file, name)
        start = file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise refusals.bad_tensor(
            f"{name} holds {dtype} of shape {shape}; expected frames, uint8 RGB of shape "
            "(N, H, W, 3) with N, H and W of 1 or more."
        )
    _check_size(name, path.stat().st_size - start, shape, dtype)
    return np.memmap(path, np.uint8, "r", offset=start, shape=shape)


def read_float_array(file: BinaryIO, size_bytes: int, name: str) -> NDArray[np.float32]:
    """Read a .npy file of numbers.

    Args:
        file: The file, at its start.
        size_bytes: Of all of it.
        name: What its sender called it.

    Returns:
        float32, of the shape that the file says.

    Raises:
        RequestRefusedError: If it is not such a file.
    """
    shape, dtype = _read_header(file, name)
    if dtype not in (np.float16, np.float32, np.float64):
        raise refusals.bad_tensor(
            f"{name} holds {dtype}; expected an array of float32, float16 or float64."
        )
    _check_size(name, size_bytes - file.tell(), shape, dtype)
    array = np.frombuffer(file.read(), dtype).reshape(shape)
    return array.astype(np.float32)


def _read_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file, max_header_size=_HEADER_BYTES)
    # The header is the text of a Python literal: parsing it fails in more ways than can be listed,
    # each of them the sender's doing.
    except Exception as exc:
        reason = str(exc).partition("\n")[0]
        raise refusals.bad_tensor(
            f"{name} is not a .npy file that can be read ({reason}); write it with numpy.save."
        ) from exc
    is_odd = len(shape) > _MAX_DIMENSIONS or any(
        type(size) is not int or size < 0 for size in shape
    )
    if is_odd or is_fortran or dtype.hasobject:
        raise refusals.bad_tensor(
            f"{name} holds an array of an unusual shape, in column order or of Python objects; "
            "write a plain one with numpy.save(file, numpy.ascontiguousarray(array))."
        )
    return shape, dtype


def _check_size(name: str, size_bytes: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    wanted = math.prod(shape) * dtype.itemsize
    if size_bytes != wanted:
        raise refusals.bad_tensor(
            f"{name} has {size_bytes:,} bytes after its header and shape {shape} of {dtype} takes "
            f"{wanted:,}; write it again with numpy.save."
        )
