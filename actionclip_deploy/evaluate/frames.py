"""The frames of a sample: of a video file, of a part of one, or of a folder of pictures.

All three look like `video.VideoReader`, so that training, evaluation and deployment read alike. A
cache keeps the frames of every video, resized and uncompressed: a small model waits for its
decoder, since eight frames of a video of 96 pixels take as long to read as to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image, ImageOps

from actionclip_deploy.errors import FileWriteError, TrainingError, VideoError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.keyed_store import Store
from actionclip_deploy.preprocess import resize_frames
from actionclip_deploy.video import MAX_PIXELS, Clip, VideoReader
from actionclip_deploy.video.border import check_path, foreign_errors, is_missing
from actionclip_deploy.video.reader import check_frame_size
from actionclip_deploy.views import FrameSource, frames_per_read

_FILE_NAME = "frames.safetensors"
_FRAMES, _SECONDS = "frames", "pts_seconds"
_TIFF_BITS, _TIFF_MEANING = 258, 262


@contextmanager
def open_frames(
    sample: Sample,
    *,
    min_frames: int = 1,
    cache: FrameCache | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[FrameSource]:
    """Open the frames of a sample for the time of a block.

    Args:
        cache: Where frames of video files are kept; they come resized from there.
        max_pixels: Most pixels of a frame.

    Raises:
        VideoError: If no frame can be had, or there are fewer.
    """
    with ExitStack() as stack:
        frames: FrameSource
        if sample.image_template is not None:
            check_path(sample.path, is_folder=True)
            frames = FrameFolder(
                sample.path,
                num_frames=sample.num_frames or 0,
                image_template=sample.image_template,
                index_bias=sample.index_bias,
                max_pixels=max_pixels,
            )
        else:

            def decode() -> FrameSource:
                return stack.enter_context(VideoReader(sample.path, max_pixels=max_pixels))

            frames = decode() if cache is None else cache.open(sample.path, decode)
        if sample.start_seconds is not None or sample.end_seconds is not None:
            frames = VideoPart(frames, sample.start_seconds, sample.end_seconds)
        if frames.num_frames < min_frames:
            raise VideoError(
                f"{sample.path} has {_in_words(sample)} {frames.num_frames} frames and at least "
                f"{min_frames} are needed; leave it out of the list."
            )
        yield frames


def _in_words(sample: Sample) -> str:
    start, end = sample.start_seconds or 0, sample.end_seconds
    if not start and end is None:
        return "altogether"
    return f"from {start:g} s to {'its end' if end is None else f'{end:g} s'}"


class VideoPart:
    """The frames of a video between two times.

    Args:
        start_seconds: Inclusive, counted from the first frame; None for the start.
        end_seconds: Exclusive; None for the end.
    """

    def __init__(
        self, frames: FrameSource, start_seconds: float | None, end_seconds: float | None
    ) -> None:
        self._frames = frames
        self._start_seconds = start_seconds
        self._end_seconds = end_seconds

    @property
    def _range(self) -> slice:
        # Each time anew: reading may show that a damaged video has fewer frames.
        seconds = self._frames.pts_seconds - self._frames.pts_seconds[0]
        start, end = self._start_seconds, self._end_seconds
        first = 0 if start is None else int(np.searchsorted(seconds, start))
        stop = len(seconds) if end is None else int(np.searchsorted(seconds, end))
        return slice(first, max(first, stop))

    @property
    def num_frames(self) -> int:
        """Frames of the part."""
        return len(self.pts_seconds)

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each of them is shown in the whole video, float64, shape (N,)."""
        return self._frames.pts_seconds[self._range]

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers in the part; the clip says those in the whole video."""
        return self._frames.read(indices + self._range.start)


class FrameFolder:
    """The frames of a video as pictures in a folder; see `Sample` for their names.

    A `VideoError` says which one is missing, cannot be decoded or has another size than the rest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_frames: int,
        image_template: str,
        index_bias: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._folder = folder
        self._max_pixels = max_pixels
        self._num_frames = num_frames
        self._image_template = image_template
        self._index_bias = index_bias

    @property
    def num_frames(self) -> int:
        """Frames there are."""
        return self._num_frames

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """NaN for each frame: pictures do not tell, float64, shape (N,)."""
        return np.full(self._num_frames, np.nan)

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        pictures = {place: self._decode(place) for place in dict.fromkeys(indices.tolist())}
        shapes = {picture.shape[:2] for picture in pictures.values()}
        if len(shapes) > 1:
            raise VideoError(
                f"The frames in {self._folder} have different sizes ({sorted(shapes)}); "
                "extract them from the video again."
            )
        frames = np.stack([pictures[place] for place in indices.tolist()])
        return Clip(frames, indices, self.pts_seconds[indices])

    def _decode(self, place: int) -> NDArray[np.uint8]:
        path = self._folder / self._image_template.format(place + self._index_bias)
        try:
            check_path(path)
        except VideoError as exc:
            if not is_missing(exc):
                raise
            raise VideoError(
                f"There is no frame {path}, and {self._num_frames} are said to be there; check "
                "the template and the number of the first frame."
            ) from None
        with foreign_errors(path):
            try:
                with Image.open(path) as picture:
                    check_frame_size(path, picture.width, picture.height, self._max_pixels)
                    return rgb_of(picture)
            except (MemoryError, VideoError):
                raise
            # Pillow's own errors, and whatever a format's parser trips over.
            except Exception as exc:
                raise VideoError(
                    f"The frame {path} cannot be decoded ({str(exc) or type(exc).__name__}); "
                    "extract it from the video again."
                ) from exc


def rgb_of(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture as it is shown, uint8, shape (H, W, 3): upright, its range scaled to 8 bits.

    Colours are those that FFmpeg gives but for rounding; alpha is left out, as by the reader of
    videos.

    Raises:
        ValueError: If its range is not known.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if not picture.mode.startswith(("I", "F")):
        return np.asarray(picture.convert("RGB"))
    gray = np.asarray(picture)
    if picture.mode == "F":
        top = 1.0
    elif picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):
        # Pillow's own conversion cuts everything above 255 off.
        top = 65535.0
    else:
        raise ValueError(f"Pillow's mode {picture.mode} has no range; save it with 8 or 16 bits")
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if tags.get(_TIFF_BITS, (16,)) not in ((16,), (32,)) or tags.get(_TIFF_MEANING, 1) != 1:
        raise ValueError("a TIFF of 12 bits, or of inverted values; save it with 8 or 16 bits")
    if not (gray.min() >= 0 and gray.max() <= top):  # nor NaN
        raise ValueError(f"its values are from {gray.min()} to {gray.max()}, not 0 to {top:g}")
    # FFmpeg takes the upper byte of 16 bits, rounded.
    by_byte = np.minimum((gray.astype(np.int64) + 128) >> 8, 255)
    scaled = (np.rint(gray * 255.0) if picture.mode == "F" else by_byte).astype(np.uint8)
    return np.repeat(scaled[..., np.newaxis], 3, axis=-1)


class FrameCache:
    """A folder of decoded frames, made if missing; several processes may use it at once.

    The file of a video is named after its path, time of change and size, so a video that was
    replaced is decoded anew.

    Args:
        short_side: Of the frames, in pixels; a crop from the centre finds the pixels that it
            would find in the video.
    """

    def __init__(self, folder: Path, *, short_side: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise TrainingError(
                f"{folder} cannot be made ({exc.strerror}); choose another data.cache."
            ) from exc
        # Others may read it: one decodes a data set for all of a group.
        self._store = Store(folder, private=False)
        self._short_side = short_side

    def open(self, video: Path, decode: Callable[[], FrameSource]) -> FrameSource:
        """Open the frames of a video, which is decoded if it never was."""

        def write(folder: Path) -> None:
            frames, seconds = _read_all(decode(), self._short_side)
            tensors: dict[str, NDArray[Any]] = {_FRAMES: frames, _SECONDS: seconds}
            safetensors.numpy.save_file(tensors, folder / _FILE_NAME)

        try:
            entry = self._store.find_or_add(self._key_of(video), write)
        except FileWriteError as exc:
            raise TrainingError(
                f"The frames of a video cannot be written to {self._store.folder} "
                f"({exc.strerror}); free some space there, or choose another data.cache, or none."
            ) from exc
        return CachedFrames(entry.folder / _FILE_NAME)

    def _key_of(self, video: Path) -> dict[str, Any]:
        try:
            found = video.stat()
            state = f"{found.st_mtime_ns} {found.st_size}"
        except OSError:
            state = "missing"  # decoding it will say so
        return {"video": str(video.absolute()), "state": state, "short_side": self._short_side}


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
    done, count, per_read = 0, source.num_frames, frames_per_read(source)
    while done < count:
        wanted = np.arange(done, min(done + per_read, count))
        frames = source.read(wanted).frames
        if source.num_frames != count:  # damage was found, and there are fewer
            parts.clear()
            done, count = 0, source.num_frames
            continue
        parts.append(resize_frames(frames, short_side=short_side))
        done += len(wanted)
    return np.concatenate(parts), np.asarray(source.pts_seconds, np.float64)
