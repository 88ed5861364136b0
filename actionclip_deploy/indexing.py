"""Videos into an archive: their windows are read, encoded and stored, in one pass over each.

A scheduler of the one road: short videos are read ahead by several threads, as a directory run
reads them; long ones in parts, as a timeline does, so that memory does not grow with them. The
graphs get the windows of all in shared calls.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import repeat
from pathlib import Path
from threading import Event
from typing import cast

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.archive import ArchivedVideo, ArchiveModel, ArchiveWriter
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    FramesChangedError,
    VideoError,
    VideoMemoryError,
    VideoWarning,
)
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.runtimes.machine import check_num_threads
from actionclip_deploy.stream import (
    Window,
    WindowBuilder,
    WindowFrames,
    WindowGrid,
    encode_windows,
    preparation,
)
from actionclip_deploy.timeline import FRAMES_PER_PART, FileGrid, OpenFile, read_windows
from actionclip_deploy.views import (
    Encoded,
    FeatureCache,
    ReadingStoppedError,
    default_num_workers,
    scale_frames_of,
    work_ahead,
)

# A video of more frames of the grid than this is read in parts; 40 MB of a 224-pixel model.
_FRAMES_AHEAD = 256
# Two windows with this cosine are taken for the same. On 4 hours of `motions`, in which nothing
# happens most of the time before a camera that sways, it leaves 22 of 100 windows, and no moment is
# found worse; 0.98 leaves 16, but windows of other models differ less. Not measured on recordings.
STATIC_COSINE = 0.999
NO_STATIC_COSINE = 2.0  # which no cosine reaches
# A window may begin so much after the end of the one before and still touch it.
_TOUCHING_SECONDS = 1e-3

# Times in names, as recorders and phones give them: 20261130_181500, 2026-11-30T18-15-00,
# 20261130_181500123 with milliseconds, 20261130T181500Z and 2026-11-30T18-15-00+0100 with a zone.
_DAY = r"(?<!\d)(20\d\d)([-_.]?)(0[1-9]|1[0-2])\2([0-2]\d|3[01])"
_TIME = (
    r"([01]\d|2[0-3])([-_.:]?)([0-5]\d)\6([0-5]\d)(?:[.,]?(\d{3}))?(?!\d)"
    r"(?:(Z)(?![A-Za-z])|([+-])(0\d|1[0-4]):?(00|30|45)(?!\d))?"
)
_DATE_IN_NAME = re.compile(f"{_DAY}[-_T. ]{{0,3}}{_TIME}")
# In a folder of a day: 2026-11-30/18-15-00.
_DAY_ALONE = re.compile(rf"{_DAY}(?!\d)")
_DATE_IN_PATH = re.compile(rf"{_DAY}/(?<!\d){_TIME}")


@dataclass(frozen=True)
class IndexedVideo:
    """A video that was brought into an archive.

    Attributes:
        video: What the archive knows of it now.
        warnings: Damage that was found in it.
        num_windows: Windows that were encoded, of which static ones are stored once.
    """

    video: ArchivedVideo
    warnings: tuple[str, ...]
    num_windows: int


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video whose windows are encoded, as an archive takes it.

    Attributes:
        video: What is known of it.
        intervals: Start and end of each window to store, in seconds, float64, shape (N, 2).
        embeddings: Of these windows, of unit norm, float32, shape (N, D).
        thumbnails: JPEG pictures by the window that they show.
        warnings: Damage that was found in it.
        num_windows: Windows that were encoded, of which static ones are stored once.
    """

    video: ArchivedVideo
    intervals: NDArray[np.float64]
    embeddings: NDArray[np.float32]
    thumbnails: tuple[tuple[int, bytes], ...]
    warnings: tuple[str, ...]
    num_windows: int

    def store(self, writer: ArchiveWriter) -> IndexedVideo:
        """Bring it into an archive, as a whole.

        Raises:
            FileWriteError: If the disk is full.
        """
        writer.put(self.video, self.intervals, self.embeddings, self.thumbnails)
        return IndexedVideo(self.video, self.warnings, self.num_windows)


@dataclass(frozen=True, eq=False)
class _Part(WindowFrames):
    """Windows of a video; `end` comes with the last ones."""

    number: int
    attempt: int
    end: _End | None = None


@dataclass(frozen=True)
class _End:
    """How the reading of a video ended."""

    duration_seconds: float = 0.0
    error: VideoError | None = None
    warnings: tuple[str, ...] = ()


def archive_model(
    bundle: Bundle,
    runtime: str,
    grid: WindowGrid,
    *,
    static_cosine: float,
    region: Region = "frame",
) -> ArchiveModel:
    """What an archive notes of the model that makes its windows.

    Args:
        bundle: The model.
        runtime: What encodes them, in words.
        grid: Where they lie.
        static_cosine: From which cosine on a window is the last stored one over again.
        region: What of a frame is resized.
    """
    return ArchiveModel(
        bundle=str(bundle.path.absolute()),
        visual_sha256=bundle.visual_sha256,
        textual_sha256=bundle.textual_sha256,
        embedding_dim=bundle.manifest.model.embedding_dim,
        window_seconds=grid.window_seconds,
        stride_seconds=grid.stride_seconds,
        runtime=runtime,
        static_cosine=static_cosine,
        region=region,
    )


@dataclass(frozen=True)
class Changes:
    """What there is to do, to bring videos into an archive.

    Attributes:
        todo: Videos that are new or have changed, and those to try again.
        num_same: Those that have windows in the archive, and did not change.
        failed_before: Those that failed before, did not change, and are not tried again.
    """

    todo: list[Path]
    num_same: int
    failed_before: list[ArchivedVideo]


def what_changed(
    known: dict[str, ArchivedVideo], videos: Iterable[Path], *, retry_failed: bool = False
) -> Changes:
    """Which videos have to be brought into an archive, and which are in it as they are.

    Args:
        known: What the archive has, by path.
        videos: Those that it is to have.
        retry_failed: Whether videos that failed before are tried again, though they are the same.
    """
    todo: list[Path] = []
    failed_before: list[ArchivedVideo] = []
    num_same = 0
    # Links stay as they are: a recorder's folder may be one, and its name is the camera's.
    for video in dict.fromkeys(Path(os.path.abspath(each)) for each in videos):  # noqa: PTH100
        before = known.get(str(video))
        try:
            state = video.stat()
        except OSError:
            todo.append(video)  # whose failure is told and noted
            continue
        now = (state.st_size, state.st_mtime_ns)
        if before is None or (before.size_bytes, before.modified_ns) != now:
            todo.append(video)
        elif before.error is None:
            num_same += 1
        elif retry_failed:
            todo.append(video)
        else:
            failed_before.append(before)
    return Changes(todo, num_same, failed_before)


def what_is_gone(
    known: dict[str, ArchivedVideo], folders: Iterable[Path], *, recursive: bool
) -> tuple[list[str], list[str]]:
    """Videos of an archive that lay in one of some folders and do so no longer, by their paths.

    Args:
        known: What the archive has, by path.
        folders: That were given.
        recursive: Whether folders in them were looked through as well.

    Returns:
        Those that were deleted; and those whose own folder is gone or empty, as it is where the
        disk of a camera is not mounted.
    """
    roots = [Path(os.path.abspath(folder)) for folder in folders]  # noqa: PTH100 - links stay
    deleted: list[str] = []
    unmounted: list[str] = []
    has_files: dict[Path, bool] = {}
    for name in known:
        path = Path(name)
        is_inside = any(
            root in path.parents if recursive else root == path.parent for root in roots
        )
        if not is_inside or path.exists():
            continue
        folder = path.parent
        if folder not in has_files:
            has_files[folder] = folder.is_dir() and any(folder.iterdir())
        (deleted if has_files[folder] else unmounted).append(name)
    return deleted, unmounted


def index_videos(
    encoder: VideoEncoder,
    writer: ArchiveWriter,
    videos: Sequence[Path],
    grid: WindowGrid,
    *,
    thumbnails: bool = False,
    num_workers: int | None = None,
) -> Generator[IndexedVideo, None, None]:
    """Bring videos into an archive, each as a whole; one that fails is noted with its reason.

    Args:
        encoder: Its runtime, and how it reads videos; its views are not used.
        writer: Of the archive.
        videos: Files. One that the archive has already is put in the place of that.
        grid: Where windows lie.
        thumbnails: Whether to keep a picture of each stored window, of the model's input.
        num_workers: Videos read at a time; None for one a core.

    Yields:
        Each video once it is stored, in their order.

    Raises:
        FileWriteError: If the disk is full; what was stored stays.
        InferenceError: If the runtime fails.
        ValueError: If `num_workers` is not positive, or far above the cores that there are.
    """
    encoded = encode_videos(
        encoder,
        videos,
        grid,
        static_cosine=writer.model.static_cosine,
        thumbnails=thumbnails,
        num_workers=num_workers,
    )
    with closing(encoded):
        for each in encoded:
            yield each.store(writer)


def encode_videos(
    encoder: VideoEncoder,
    videos: Sequence[Path],
    grid: WindowGrid,
    *,
    static_cosine: float,
    thumbnails: bool = False,
    num_workers: int | None = None,
) -> Generator[EncodedVideo, None, None]:
    """As `index_videos`, for whoever writes the archive elsewhere.

    Args:
        encoder: As for `index_videos`, and likewise the other arguments.
        videos: Files.
        grid: Where windows lie.
        static_cosine: Of the archive.
        thumbnails: Whether to make pictures.
        num_workers: Videos read at a time.
    """
    num_workers = default_num_workers() if num_workers is None else num_workers
    check_num_threads("num_workers", num_workers)
    reader = _Reader(encoder, grid)
    cache = FeatureCache(grid.num_frames + 2 * FRAMES_PER_PART)
    readings = work_ahead(
        enumerate(videos), reader.read, num_workers=num_workers, max_ahead=num_workers + 2
    )
    with closing(readings), closing(_parts_of(readings)) as parts:
        found: _Collected | None = None
        for encoded in encode_windows(encoder.runtime, parts, cache=cache):
            part = encoded.work
            if found is None or (found.number, found.attempt) != (part.number, part.attempt):
                found = _Collected(part.number, part.attempt, static_cosine, thumbnails)
            found.add(encoded)
            if part.end is not None:
                width = encoder.runtime.manifest.model.embedding_dim
                yield found.finish(videos[part.number], part.end, width)
                found = None


# Reading


@dataclass(eq=False)
class _Reading:
    """A video that was opened: all of its parts, or those to come, one after the other."""

    parts: Iterable[_Part]
    opened: ExitStack


class _Reader:
    def __init__(self, encoder: VideoEncoder, grid: WindowGrid) -> None:
        self._encoder = encoder
        self._grid = grid
        self._prepare = preparation(encoder.runtime.manifest, encoder.region)

    def read(self, item: tuple[int, Path], stop: Event) -> _Reading:
        """Open a video, and read all of it if it is short."""
        number, path = item
        found: list[VideoWarning] = []
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(self._encoder.open_video(path, found.append))
                if not hasattr(opened, "read_in_order"):
                    raise VideoError(
                        f"{path} holds frames without times; give the file of a video."
                    )
                video = cast(OpenFile, opened)
                scale_frames_of(opened, self._encoder.runtime.manifest, self._encoder.region)
                grid = FileGrid.of(video, self._grid)
            except MemoryError:
                return _failed(number, VideoMemoryError.of(path), found)
            except VideoError as exc:
                return _failed(number, exc, found)
            parts = self._parts(number, path, video, grid, found, stop)
            if len(grid.points) <= _FRAMES_AHEAD:
                return _Reading(list(parts), stack.pop_all())
            return _Reading(parts, stack.pop_all())

    def _parts(
        self,
        number: int,
        path: Path,
        video: OpenFile,
        grid: FileGrid,
        found: list[VideoWarning],
        stop: Event,
    ) -> Iterator[_Part]:
        """The windows of a video; from the first on, where damage is found on the way."""
        attempt = 0
        while True:
            builder = WindowBuilder(grid.grid, source=(number, attempt))
            last: WindowFrames | None = None
            error: VideoError | None = None
            try:
                for work in read_windows(video, grid, self._prepare, builder, stop):
                    if last is not None:
                        yield _part(last, number, attempt)
                    last = work
            except FramesChangedError:
                attempt += 1  # at most once: from now on the reader decodes everything
                grid = FileGrid.of(video, self._grid)
                continue
            except MemoryError:
                error = VideoMemoryError.of(path)
            except VideoError as exc:
                error = exc
            end = _End(grid.duration_seconds, error, tuple(map(str, found)))
            yield _part(last or _NOTHING, number, attempt, end)
            return


_NOTHING = WindowFrames(
    np.empty((0, 0, 0, 3), np.uint8), np.empty((0, 0), np.int64), keys=[], windows=()
)


def _part(work: WindowFrames, number: int, attempt: int, end: _End | None = None) -> _Part:
    return _Part(
        work.pixels,
        work.views,
        keys=work.keys,
        windows=work.windows,
        number=number,
        attempt=attempt,
        end=end,
    )


def _failed(number: int, error: VideoError, found: Sequence[VideoWarning]) -> _Reading:
    end = _End(error=error, warnings=tuple(map(str, found)))
    return _Reading([_part(_NOTHING, number, 0, end)], ExitStack())


def _parts_of(readings: Iterable[_Reading]) -> Generator[_Part, None, None]:
    """The parts of videos in their order; those of a long one are read beside the graphs."""
    for reading in readings:
        with reading.opened:
            if isinstance(reading.parts, list):
                yield from reading.parts
                continue
            parts = iter(reading.parts)

            def read(_: None, stop: Event, parts: Iterator[_Part] = parts) -> _Part | None:
                if stop.is_set():
                    raise ReadingStoppedError
                return next(parts, None)

            # One thread, since a decoder goes on from frame to frame.
            with closing(work_ahead(repeat(None), read, num_workers=1, max_ahead=2)) as ahead:
                for part in ahead:
                    if part is None:
                        break
                    yield part


# Windows of a video


class _Collected:
    """The windows of one video, static ones once."""

    def __init__(
        self, number: int, attempt: int, static_cosine: float, with_thumbnails: bool
    ) -> None:
        self.number = number
        self.attempt = attempt
        self._static_cosine = static_cosine
        self._with_thumbnails = with_thumbnails
        self._intervals: list[tuple[float, float]] = []
        self._embeddings: list[Float32Array] = []
        self._thumbnails: list[tuple[int, bytes]] = []
        self._last_run = -1
        self._num_windows = 0

    def add(self, encoded: Encoded[_Part]) -> None:
        part = encoded.work
        for place, (window, embedding) in enumerate(
            zip(part.windows, encoded.embeddings, strict=True)
        ):
            self._num_windows += 1
            if self._is_static(window, embedding):
                self._intervals[-1] = (self._intervals[-1][0], window.end_seconds)
                continue
            self._last_run = window.run
            self._intervals.append((window.start_seconds, window.end_seconds))
            self._embeddings.append(embedding)
            if self._with_thumbnails:
                from actionclip_deploy.video.recording import jpeg_bytes

                frames = part.views[place]
                picture = part.pixels[frames[len(frames) // 2]]
                self._thumbnails.append((len(self._intervals) - 1, jpeg_bytes(picture)))

    def _is_static(self, window: Window, embedding: Float32Array) -> bool:
        """Whether a window shows what the last stored one does; that one, so nothing can creep."""
        return (
            bool(self._embeddings)
            and window.run == self._last_run
            and window.start_seconds <= self._intervals[-1][1] + _TOUCHING_SECONDS
            and float(embedding @ self._embeddings[-1]) >= self._static_cosine
        )

    def finish(self, path: Path, end: _End, width: int) -> EncodedVideo:
        """The video with its windows, or why it has none."""
        state = path.stat() if path.exists() else None
        is_failed = end.error is not None
        video = ArchivedVideo(
            path=str(path),
            folder=camera_folder(path),
            size_bytes=0 if state is None else state.st_size,
            modified_ns=0 if state is None else state.st_mtime_ns,
            recorded_seconds=recording_time(path),
            duration_seconds=end.duration_seconds,
            error=None if end.error is None else str(end.error),
            num_windows=0 if is_failed else len(self._intervals),
        )
        intervals = np.array([] if is_failed else self._intervals, np.float64).reshape(-1, 2)
        embeddings: NDArray[np.float32] = np.zeros((0, width), np.float32)
        if len(intervals):
            embeddings = np.stack(self._embeddings)
        pictures = () if is_failed else tuple(self._thumbnails)
        return EncodedVideo(video, intervals, embeddings, pictures, end.warnings, self._num_windows)


def recording_time(path: Path) -> float | None:
    """When a recording began, in seconds since 1970, by its name, or also that of a day's folder.

    Recorders write the local time, unless a zone stands there; the time of the file itself says
    when it was copied.
    """
    found = _DATE_IN_NAME.search(path.name)
    if found is None and _is_day(path.parent):
        found = _DATE_IN_PATH.match(f"{path.parent.name}/{path.name}")
    if found is None:
        return None
    year, _, month, day, hour, _, minute, second, fraction, utc, sign, *offset = found.groups()
    zone = None
    if utc:
        zone = timezone.utc
    elif sign == "+" or (sign and "T" in found[0]):  # else it may be the number of a part
        hours, minutes = (int(f"{sign}{each}") for each in offset)
        zone = timezone(timedelta(hours=hours, minutes=minutes))
    microsecond = 1000 * int(fraction or 0)
    numbers = [int(each) for each in (year, month, day, hour, minute, second)]
    try:
        date = datetime(*numbers)  # type: ignore[arg-type]
    except ValueError:  # such as the 31st of February
        return None
    return date.replace(microsecond=microsecond, tzinfo=zone).timestamp()


def camera_folder(path: Path) -> str:
    """The name of the folder that a video lies in, such as that of a camera; not that of a day."""
    return (path.parent.parent if _is_day(path.parent) else path.parent).name


def _is_day(folder: Path) -> bool:
    return _DAY_ALONE.fullmatch(folder.name) is not None
