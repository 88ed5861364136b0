"""Videos that are in memory: arrays of frames, and the bytes of a file.

Both look like files to whoever scores videos: they have a name, and are opened for reading.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError, VideoError, VideoWarning, WrongKindError
from actionclip_deploy.video.reader import (
    MAX_PIXELS,
    Clip,
    Decoder,
    VideoReader,
    check_frame_size,
)

OnWarning: TypeAlias = Callable[[VideoWarning], None] | None


class OpenVideo(Protocol):
    """A video whose frames can be read."""

    @property
    def num_frames(self) -> int:
        """Frames there are, N."""
        ...

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, shape (N,); NaN where that is not known."""
        ...

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        ...


class VideoSource(Protocol):
    """A video that is no file: what it is called, and how it is opened."""

    @property
    def name(self) -> str:
        """What it is called in predictions and messages."""
        ...

    def open(
        self,
        *,
        decoder: Decoder = "software",
        max_pixels: int = MAX_PIXELS,
        on_warning: OnWarning = None,
    ) -> AbstractContextManager[OpenVideo]:
        """Open it for the time of a block.

        Raises:
            VideoError: If no frame can be had from it.
        """
        ...


class ArrayVideo:
    """Frames in memory; a clip of them is sampled as from a file of as many frames.

    Args:
        frames: RGB, uint8, shape (T, H, W, 3), as an array or what numpy makes one of, such as
            a tensor on the CPU. It is not copied.
        name: What it is called.

    Raises:
        ShapeError: If it has another shape or dtype; says how to change it.
        WrongKindError: If numpy cannot make an array of it.
    """

    def __init__(self, frames: Any, name: str = "frames") -> None:
        self.name = name
        self._frames = checked_frames(frames, name)

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self._frames)

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """NaN for each frame: an array has no times, shape (T,)."""
        return np.full(len(self._frames), np.nan)

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        return Clip(self._frames[indices], indices, self.pts_seconds[indices])

    def open(
        self,
        *,
        decoder: Decoder = "software",  # noqa: ARG002 - nothing is decoded
        max_pixels: int = MAX_PIXELS,
        on_warning: OnWarning = None,  # noqa: ARG002 - nothing can be damaged
    ) -> AbstractContextManager[ArrayVideo]:
        """Open it, as the others are opened.

        Raises:
            FrameSizeError: If its frames have more pixels.
        """
        height, width = self._frames.shape[1:3]
        check_frame_size(Path(self.name), width, height, max_pixels)
        return nullcontext(self)


class BytesVideo:
    """The bytes of a video file. FFmpeg reads them from a temporary file, while it is open.

    Args:
        data: All of them.
        name: What it is called.
    """

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "bytes") -> None:
        self.name = name
        self._data = data

    @contextmanager
    def open(
        self,
        *,
        decoder: Decoder = "software",
        max_pixels: int = MAX_PIXELS,
        on_warning: OnWarning = None,
    ) -> Iterator[VideoReader]:
        """Open it for the time of a block.

        Raises:
            VideoError: As for `VideoReader`.
        """
        with tempfile.NamedTemporaryFile(prefix="actionclip-") as file:
            file.write(self._data)
            file.flush()

            def told(text: object) -> str:
                return str(text).replace(file.name, self.name)

            def warn(warning: VideoWarning) -> None:
                if on_warning is not None:
                    on_warning(VideoWarning(told(warning)))

            try:
                with VideoReader(
                    file.name, decoder=decoder, max_pixels=max_pixels, on_warning=warn
                ) as reader:
                    yield reader
            except VideoError as exc:
                raise type(exc)(told(exc)) from exc


def checked_frames(given: Any, name: str = "frames") -> NDArray[np.uint8]:
    """Take frames as an array, or say what to do about what is not one.

    Args:
        given: As for `ArrayVideo`.
        name: What it is called.

    Raises:
        ShapeError: If it has another shape or dtype.
        WrongKindError: If numpy cannot make an array of it.
    """
    is_tensor = type(given).__module__.partition(".")[0] == "torch"
    try:
        frames = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as exc:
        what = "frames.detach().cpu()" if is_tensor else "an array of uint8"
        reason = str(exc).partition("\n")[0].rstrip(".")
        raise WrongKindError(
            f"{name} is of type {type(given).__name__}, which numpy cannot take ({reason}); "
            f"give {what}."
        ) from exc
    shape = frames.shape
    if frames.dtype == np.uint8 and frames.ndim == 4 and shape[3] == 3 and frames.size:
        return frames
    raise ShapeError(
        f"{name} is {frames.dtype} of shape {shape}; expected RGB, uint8, shape (T, H, W, 3): "
        f"{_advice(frames, 'permute' if is_tensor else 'transpose')}."
    )


def _advice(frames: NDArray[Any], transpose: str) -> str:
    shape = frames.shape
    if not frames.size:
        return "give one frame or more"
    if frames.ndim == 5:
        return "give one clip, or a batch by itself and not in a list"
    if frames.ndim == 3 and shape[-1] == 3:
        return "this is one frame, and a clip is several; put frames into a list or an array"
    if frames.ndim != 4:
        return "give frames one after the other in the first dimension"
    if shape[3] != 3:
        for place, order in ((1, "0, 2, 3, 1"), (0, "1, 2, 3, 0")):
            if shape[place] == 3:
                return f"the channels come last, as frames.{transpose}({order}) puts them"
        if shape[3] == 4:
            return "leave out the fourth channel with frames[..., :3]"
        if shape[3] == 1:
            return "give each gray value three times, with frames.repeat(3, axis=-1)"
        return "give three channels"
    if np.issubdtype(frames.dtype, np.floating):
        return (
            "give values from 0 to 255 as uint8, which is (frames * 255).round() of values from 0 "
            "to 1; the model takes off the mean itself"
        )
    return "give values from 0 to 255 as uint8"
