"""Videos that a caller gives -> parts of a form, which can be read more than once."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import VideoError

# A path, the bytes of a video, an open file, frames, or embeddings of a video's views.
Video: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]
Videos: TypeAlias = Video | list[Video] | tuple[Video, ...]

Field = Literal["video", "frames", "embeddings"]


@dataclass(frozen=True)
class Upload:
    """One part of a form.

    Attributes:
        field: What it holds, as the server calls it.
        name: What it is called there.
        source: A path, which is opened each time; bytes; or an open file.
        start: Where an open file is read from; None where it cannot be rewound.
    """

    field: Field
    name: str
    source: Path | bytes | BinaryIO
    start: int | None = None

    @property
    def can_repeat(self) -> bool:
        """Whether it can be sent a second time."""
        return isinstance(self.source, Path | bytes) or self.start is not None

    def open(self, stack: ExitStack) -> Any:
        """What httpx reads the part from.

        Args:
            stack: Closes it.

        Raises:
            VideoError: If a file cannot be opened.
        """
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, Path):
            try:
                return stack.enter_context(self.source.open("rb"))
            except OSError as exc:
                raise VideoError(
                    f"{self.source} cannot be read ({exc.strerror}); give a file that exists and "
                    "may be read."
                ) from exc
        return _Once(self.source) if self.start is None else _FromStart(self.source, self.start)


class _Once:
    """A file that cannot be rewound, without its methods that would say how long it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


class _FromStart:
    """A file whose beginning is where its owner had read to."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self.read = file.read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + self._start if whence == os.SEEK_SET else offset
        return self._file.seek(place, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


def uploads(videos: Videos) -> tuple[Upload, ...]:
    """Parts of a form for one video or a list of them.

    Raises:
        VideoError: If a file cannot be read.
        ValueError: If there is none, or something else than `Video`.
    """
    given = list(videos) if isinstance(videos, list | tuple) else [videos]
    if not given:
        raise ValueError("videos is empty; give one video or more.")
    names = [f"videos[{index}]" for index in range(len(given))]
    return tuple(map(_upload, given, names))


def _upload(video: Any, name: str) -> Upload:
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        return Upload(_field_of_file(path), path.name, path)
    if isinstance(video, bytes | bytearray | memoryview):
        return Upload("video", name, bytes(video))
    if isinstance(video, np.ndarray):
        field, array = _checked(video, name)
        return Upload(field, name, _npy_bytes(array))
    if hasattr(video, "read") and not isinstance(video, io.TextIOBase):
        path_of_it = getattr(video, "name", None)
        shown = Path(path_of_it).name if isinstance(path_of_it, str) else name
        can_seek = hasattr(video, "seekable") and video.seekable()
        return Upload("video", shown, video, video.tell() if can_seek else None)
    raise ValueError(
        f"{name} is a {type(video).__name__}; give a path, bytes, a file opened with 'rb', frames "
        "as uint8 (N, H, W, 3), or embeddings as float32 (V, D)."
    )


def _field_of_file(path: Path) -> Field:
    """A .npy file holds what an array would; any other file is a video."""
    if path.suffix.lower() != ".npy":
        return "video"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as exc:
        raise VideoError(f"{path} cannot be read ({exc}); give a file that exists.") from exc
    except (ValueError, EOFError) as exc:
        raise VideoError(f"{path} is no .npy file ({exc}); write it with numpy.save.") from exc
    try:
        return _checked(array, str(path))[0]
    except ValueError as exc:
        raise VideoError(str(exc)) from exc


def _checked(array: NDArray[Any], name: str) -> tuple[Field, NDArray[Any]]:
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3:
        return "frames", array
    if array.dtype in (np.float16, np.float32, np.float64) and array.ndim in (1, 2):
        return "embeddings", array.astype(np.float32, copy=False).reshape(-1, array.shape[-1])
    raise ValueError(
        f"{name} is {array.dtype} of shape {array.shape}; give frames as uint8 (N, H, W, 3), or "
        "embeddings as float32 (V, D)."
    )


def _npy_bytes(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
