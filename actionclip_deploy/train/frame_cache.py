"""Frames that are decoded once: a folder of every video's frames, resized and uncompressed.

A small model waits for its decoder: eight frames of a video of 96 pixels take as long to read as
to train on. A video's file in the folder is named after the video, its time of change and size,
so one that was replaced is decoded anew.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.preprocess import resize_frames
from actionclip_deploy.recognizer import FrameSource
from actionclip_deploy.video import Clip

_FRAMES, _SECONDS = "frames", "pts_seconds"
_FRAMES_PER_READ = 32


class FrameCache:
    """The folder; several processes may use it at once.

    Args:
        folder: Made if missing.
        short_side: Of the frames, in pixels; a crop from the centre finds the pixels that it
            would find in the video.

    Raises:
        TrainingError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, *, short_side: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise TrainingError(
                f"{folder} cannot be made ({exc.strerror}); choose another data.cache."
            ) from exc
        self._folder = folder
        self._short_side = short_side

    def open(self, video: Path, decode: Callable[[], FrameSource]) -> FrameSource:
        """Open the frames of a video, which is decoded if it never was.

        Args:
            video: The file.
            decode: Opens it.

        Raises:
            VideoError: If it has to be decoded and gives no frames.
            TrainingError: If its frames cannot be written.
        """
        path = self._path_of(video)
        try:
            return CachedFrames(path)
        except (OSError, safetensors.SafetensorError):
            pass  # it was never decoded, or its file is damaged or closed to this user
        frames, seconds = _read_all(decode(), self._short_side)
        _write(path, {_FRAMES: frames, _SECONDS: seconds})
        return CachedFrames(path)

    def _path_of(self, video: Path) -> Path:
        try:
            found = video.stat()
            state = f"{found.st_mtime_ns} {found.st_size}"
        except OSError:
            state = "missing"  # decoding it will say so
        name = f"{video.absolute()} {state} {self._short_side}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.safetensors"


class CachedFrames:
    """Frames in a file of the cache; looks like `video.VideoReader`."""

    def __init__(self, path: Path) -> None:
        file: Any = safetensors.safe_open
        self._file = file(path, "np")
        self._frames = self._file.get_slice(_FRAMES)  # read on demand

    @property
    def num_frames(self) -> int:
        """Frames there are."""
        return int(self._frames.get_shape()[0])

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each of them is shown, float64, shape (N,)."""
        seconds: NDArray[np.float64] = self._file.get_tensor(_SECONDS)
        return seconds

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        frames = np.concatenate([self._frames[index : index + 1] for index in indices.tolist()])
        return Clip(frames, indices, self.pts_seconds[indices])


def _read_all(
    source: FrameSource, short_side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Read and resize every frame; whole frames are held a few at a time."""
    parts: list[NDArray[np.uint8]] = []
    done, count = 0, source.num_frames
    while done < count:
        wanted = np.arange(done, min(done + _FRAMES_PER_READ, count))
        frames = source.read(wanted).frames
        if source.num_frames != count:  # damage was found, and there are fewer
            parts.clear()
            done, count = 0, source.num_frames
            continue
        parts.append(resize_frames(frames, short_side=short_side))
        done += len(wanted)
    return np.concatenate(parts), np.asarray(source.pts_seconds, np.float64)


def _write(path: Path, tensors: dict[str, NDArray[np.generic]]) -> None:
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file(tensors, temporary)
        temporary.chmod(0o644)  # it is written for its owner alone
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise TrainingError(
            f"The frames of a video cannot be written to {path.parent} ({exc}); free some space "
            "there, or choose another data.cache, or none."
        ) from exc
    finally:
        with suppress(OSError):
            temporary.unlink()
