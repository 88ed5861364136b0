"""What was uploaded, as files that the decoding processes read; gone when a request ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import BinaryIO


class SpooledFile:
    """A file that is being uploaded.

    Attributes:
        path: Where it lies.
        size_bytes: What has been written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: BinaryIO = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self.size_bytes += len(data)

    def close(self) -> None:
        """Make it whole; may be called again."""
        self._file.close()


class Spool:
    """A private folder of uploads; a context manager that removes it.

    Args:
        folder: Where it is made; None for the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="actionclip-serve-", dir=folder))
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

    @contextmanager
    def files(self) -> Iterator[RequestFiles]:
        """The files of one request, removed at the end of the block."""
        files = RequestFiles(self.folder / f"{next(self._numbers):x}")
        try:
            yield files
        finally:
            files.remove()


class RequestFiles:
    """Makes the files of one request.

    Args:
        prefix: What their paths begin with.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        self._files: list[SpooledFile] = []

    def make(self) -> SpooledFile:
        """A new, empty file; its name says nothing of what a client called it."""
        file = SpooledFile(self._prefix.with_name(f"{self._prefix.name}-{len(self._files)}"))
        self._files.append(file)
        return file

    def remove(self) -> None:
        """Remove all of them."""
        for file in self._files:
            file.close()
            file.path.unlink(missing_ok=True)
