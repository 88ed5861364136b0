"""What was uploaded, as files that the decoding processes read; gone when a request ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from actionclip_deploy.serve import refusals


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
            f"The server cannot keep the upload ({exc.strerror}); try again later, or tell who "
            "runs it."
        ) from exc


class Spool:
    """A private folder of uploads; a context manager that removes it.

    Args:
        folder: Where it is made; None for the system's folder of temporary files.
        max_bytes: What all files together may take.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
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
