"""The border to the decoders: whatever they raise about a file leaves `video` as a `VideoError`.

PyAV, FFmpeg, Pillow and numpy raise errors of many classes, some of them by mistake. One file must
never end a run over thousands, so what is not ours is mapped here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
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
