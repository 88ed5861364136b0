"""The border to the decoders: whatever they raise about a file leaves `video` as a `VideoError`.

PyAV, FFmpeg, Pillow and numpy raise errors of many classes, some of them by mistake. One file must
never end a run over thousands, so what is not ours is mapped here, and nowhere else.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actionclip_deploy.errors import ActionClipError, VideoError, VideoMemoryError, VideoWarning


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
        elif number == errno.EIO:
            advice = "the other side broke off, or is none; check the address, and what serves it"
        raise VideoError(f"{shown} cannot be read ({kind}: {reason}); {advice}.") from exc
