"""The border to files and decoders: what they raise about a file becomes a `VideoError`.

PyAV, FFmpeg, Pillow and numpy raise errors of many classes, some of them by mistake. One file must
never end a run over thousands, so what is not ours is mapped here, and nowhere else.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from actionclip_deploy.errors import ActionClipError, VideoError, VideoMemoryError, VideoWarning

# A path has lost one of the two slashes of an address.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(\S.*)")
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def foreign_errors(path: Path) -> Iterator[None]:
    """Map what is raised while a block decodes a file; our own errors pass as they are.

    Raises:
        VideoMemoryError: Where memory ran out, which says nothing about the file.
        VideoError: For everything else.
    """
    try:
        yield
    except (ActionClipError, VideoWarning):  # the latter where the caller makes it an error
        raise
    except MemoryError as exc:  # also PyAV's and numpy's
        raise VideoMemoryError.of(path) from exc
    except FileNotFoundError as exc:
        raise VideoError(f"There is no file {path} any more; check what removes it.") from exc
    # The libraries document no list of what they raise.
    except Exception as exc:
        reason = " ".join(str(exc).split()) or "no reason given"
        raise VideoError(
            f"{path} cannot be decoded ({type(exc).__name__}: {reason}); convert it, "
            "to H.264 for instance."
        ) from exc


# What a server or the network says, and what to do about it; by the name of PyAV's error.
_STREAM_ADVICE = {
    "ConnectionRefusedError": "nothing listens there; start it, or check host and port",
    "ConnectionResetError": "the other side ended the connection; check its log",
    "TimeoutError": "no answer came in time; check that it is on and can be reached",
    "ExitError": "it was silent for too long; check that it is on and sends",
    "HTTPUnauthorizedError": "user or password is wrong or missing; check them",
    "HTTPForbiddenError": "this user may not read it; check user, password and permissions",
    "HTTPNotFoundError": "there is no such stream; check the path of the address",
    "HTTPServerError": "the server failed; check its log",
    "InvalidDataError": "what comes is no video in a form that is taken here; check the address",
    "PermissionError": "this user may not open it; change its permissions",
    "FileNotFoundError": "there is no such device or address; check its name",
    "ProtocolNotFoundError": "that protocol is not allowed here; give the address itself",
    "ArgumentError": "what comes is no video in a form that is taken here; check the address",
}
_NO_NETWORK = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN})


@contextmanager
def stream_errors(shown: str, mask: Callable[[str], str]) -> Iterator[None]:
    """As `foreign_errors`, for what has an address; the texts of errors can contain it.

    Args:
        shown: What may be shown of the address.
        mask: Hides secrets in a text.

    Raises:
        VideoMemoryError: Where memory ran out, which says nothing about the source.
        VideoError: For everything else, with nothing in its message that is a secret. Its cause
            may have secrets, and is not to be shown.
    """
    try:
        yield
    except (ActionClipError, VideoWarning):
        raise
    except MemoryError as exc:
        raise VideoMemoryError.of(shown) from exc
    except Exception as exc:
        kind = type(exc).__name__
        # PyAV's own text adds the address, and a line of FFmpeg's log, of any thread.
        reason = getattr(exc, "strerror", None) or str(exc)
        reason = mask(" ".join(str(reason).split())) or "no reason given"
        advice = _STREAM_ADVICE.get(kind, "check the address, and what serves it")
        number = getattr(exc, "errno", None)
        if number in _NO_NETWORK:
            advice = "there is no way to it; check the network"
        elif number in (errno.EADDRINUSE, errno.EBUSY):
            advice = "another program, or another source, has it already; end that"
        elif number == errno.EIO:
            advice = "the other side broke off, or is none; check the address, and what serves it"
        raise VideoError(f"{shown} cannot be read ({kind}: {reason}); {advice}.") from exc


def open_file(path: Path) -> BinaryIO:
    """Open a regular file that is not empty.

    Raises:
        VideoError: For anything else, a pipe included, which would wait for ever; says what it is.
            Its cause is a `FileNotFoundError` or `NotADirectoryError` where nothing is there.
    """
    text = str(path)
    try:
        # Whoever opens a pipe that nobody writes to would wait for ever without O_NONBLOCK, which
        # says nothing to regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as exc:  # ValueError: a name with a zero in it
        address = _ADDRESS.match(text)
        if address is not None and not os.path.isdir(path.parent):  # noqa: PTH112
            place = address[2].rpartition("@")[2]  # a password stays out of logs and records
            raise VideoError(
                f"{address[1]}://{place} is an address, and files are read here; download it "
                "first, or use `actionclip watch` where it is a stream or a camera."
            ) from exc
        raise VideoError(_reason_not_opened(path, exc)) from exc
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise VideoError(f"{path} is a folder; give the video files in it one by one.")
        if not stat.S_ISREG(found.st_mode):
            raise VideoError(
                f"{path} is {_kind(found.st_mode)}, and only files can be read; write what comes "
                "from it into a file and give that."
            )
        if found.st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes); fetch or record it again.")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def check_path(path: Path, *, is_folder: bool = False) -> None:
    """Refuse what is not a file that can be read, or not a folder, as `open_file` does.

    Raises:
        VideoError: As for `open_file`.
    """
    if not is_folder:
        open_file(path).close()
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:
        raise VideoError(_reason_not_opened(path, exc, "folder")) from exc
    if not stat.S_ISDIR(mode):
        raise VideoError(f"{path} is {_kind(mode)} and not a folder; correct the list.")


def is_missing(error: VideoError) -> bool:
    """Whether a file or folder was refused because nothing is there."""
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


def _kind(mode: int) -> str:
    return next((word for is_kind, word in _KINDS if is_kind(mode)), "something else")


def _reason_not_opened(path: Path, exc: OSError | ValueError, wanted: str = "file") -> str:
    number = exc.errno if isinstance(exc, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return f"There is no {wanted} {path}; check its name."
    if number in (errno.EACCES, errno.EPERM):
        return f"{path} may not be read by this user; change its permissions."
    if number == errno.ENAMETOOLONG:
        return f"{path} is a name longer than a file may have here; there is no such file."
    if number in (errno.ENXIO, errno.ENODEV):
        return f"{path} is a socket or a device, and only files can be read; give a file."
    reason = exc.strerror if isinstance(exc, OSError) else exc
    return f"{path} cannot be opened ({reason}); give a file that can be read."
