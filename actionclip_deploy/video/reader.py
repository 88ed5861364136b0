"""Reads the frames of a video that were asked for, and gives them as a clip.

In this folder PyAV is imported by what uses it, when it does: a fifth of the time of importing
this package would be PyAV's, and not everyone who imports the package decodes.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actionclip_deploy.errors import (
    ArgumentError,
    DecoderUnavailableError,
    FramesChangedError,
    FrameSizeError,
    ShapeError,
    VideoError,
    VideoWarning,
)
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video.border import foreign_errors, open_file
from actionclip_deploy.video.decoding import (
    Damage,
    FullDecoder,
    GapFinder,
    StartedRun,
    chosen_frames,
    start_first_run,
    survey_frames,
)
from actionclip_deploy.video.packets import demux, scan_packets
from actionclip_deploy.video.pixels import Cropping, FrameConverter, Scaling

if TYPE_CHECKING:
    import av
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

Decoder = Literal["software", "nvdec"]
# FFmpeg's name of the device that has the decoder.
_DEVICES = {"nvdec": "cuda"}

# Most pixels of a frame, unless more are allowed: those of 8K. Eight frames of it have 850 MB.
MAX_PIXELS = 8192 * 4320
# A decoder counts the pixels of the rows and columns that it adds to a frame as well.
_DECODER_PIXELS = 2**18
_MOST_PIXELS = 2**31 - 1 - _DECODER_PIXELS  # FFmpeg takes no higher bound

# FFmpeg's demuxers that may open a file. Left out: those that draw texts or take any bytes for a
# picture (tty, bintext, cdg, rawvideo), read other files (concat, hls, dash, image2, imf) or are
# devices. Those of sound and of subtitles are here for the sentence that says what a file is.
FILE_FORMATS = frozenset(
    {"3g2", "3gp", "mov", "mp4", "matroska", "webm", "avi", "asf", "flv", "live_flv", "kux"}
    | {"mpeg", "mpegts", "mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vvc", "evc", "av1"}
    | {"obu", "ivf", "vc1", "vc1test", "cavsvideo", "avs2", "avs3", "dirac", "dnxhd", "dv"}
    | {"mjpeg", "mpjpeg", "mjpeg_2000", "smjpeg", "yuv4mpegpipe", "gif", "gif_pipe", "apng"}
    | {"nut", "mxf", "gxf", "lxf", "ogg", "rm", "ivr", "wtv", "swf", "nsv", "nuv", "pva", "ty"}
    | {"dhav", "apv", "mlv", "cine", "flic"}
    | {f"{kind}_pipe" for kind in ("bmp", "dds", "dpx", "exr", "hdr", "j2k", "jpeg", "jpegls")}
    | {f"{kind}_pipe" for kind in ("jpegxl", "pam", "pbm", "pfm", "pgm", "png", "ppm", "psd")}
    | {f"{kind}_pipe" for kind in ("qoi", "sgi", "sunrast", "tiff", "webp", "xwd", "pcx")}
    | {"jpegxl_anim", "webp_anim", "ico"}
    | {"aac", "ac3", "aiff", "amr", "ape", "au", "caf", "dts", "eac3", "flac", "mp3", "oma"}
    | {"w64", "wav", "wv", "ass", "srt", "webvtt"}
)
_FORMAT_WHITELIST = ",".join(sorted(FILE_FORMATS))
_START_BYTES = 256
# Where pictures have their width and height: the signature, the place, and the form for `struct`.
_PICTURE_SIZES = ((b"GIF8", 6, "<HH"), (b"\x89PNG", 16, ">II"), (b"BM", 18, "<ii"))
_PLAYLISTS: dict[str, Callable[[bytes], bool]] = {
    "hls": lambda text: text.startswith(b"#EXTM3U"),
    "concat": lambda text: text.startswith(b"ffconcat version"),
    "dash": lambda text: text.startswith(b"<") and b"<MPD" in text,
    "imf": lambda text: text.startswith(b"<") and b"<CompositionPlaylist" in text,
    "pls": lambda text: text[:10].lower() == b"[playlist]",
    "asx": lambda text: text[:4].lower() == b"<asx",
}
# Bytes at the start of a file that was a video once; the place of the bytes and the format.
_SIGNATURES = (
    (4, b"ftyp", "MP4"),
    (4, b"moov", "MP4"),
    (4, b"mdat", "MP4"),
    (0, b"RIFF", "AVI"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska"),
    (0, b"FLV", "FLV"),
    (0, b"OggS", "Ogg"),
)

# What to do about a video without any frame. A GPU's decoder takes few profiles of a codec.
_WITHOUT_FRAMES = {
    "software": "fetch or record it again",
    "nvdec": "ask for the decoder software, and if that fails too, fetch or record it again",
}

# By suffix, since opening a hundred thousand files to find out takes longer than saying so.
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames sampled from one video.

    Attributes:
        frames: RGB, uint8, shape (T, H, W, 3), as displayed.
        indices: Place of each frame in the video, 0-based, int64, shape (T,).
        pts_seconds: When each frame is shown, by the container's clock, float64, shape (T,).

    Raises:
        ShapeError: If the three do not fit together.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    pts_seconds: NDArray[np.float64]

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise ShapeError(
                f"frames are {frames.dtype} of shape {frames.shape}; expected uint8 RGB of shape "
                "(T, H, W, 3) with T, H and W of 1 or more."
            )
        for name, dtype in (("indices", np.int64), ("pts_seconds", np.float64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != frames.shape[:1]:
                raise ShapeError(
                    f"{name} is {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} "
                    f"of shape ({len(frames)},), one for each frame."
                )

    @property
    def num_frames(self) -> int:
        """T."""
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        """H, in pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """W, in pixels."""
        return int(self.frames.shape[2])


# Decoders that leave what they cannot decode as the memory was: with what an earlier frame left
# in it. That depends on which frames are still held, so that none may be.
_LEAVE_GAPS = frozenset({"hevc", "mjpeg", "png", "apng", "huffyuv", "ffvhuff", "utvideo", "prores"})


def check_max_pixels(max_pixels: int) -> None:
    """Refuse a bound on pixels that is none, or that FFmpeg cannot take.

    Raises:
        ArgumentError: If it is below 1 or above 2^31 - 1.
    """
    if not 1 <= max_pixels <= _MOST_PIXELS:
        raise ArgumentError(
            "max_pixels", f"is {max_pixels}; it must be 1 or more, and {_MOST_PIXELS:,} at most."
        )


class VideoReader:
    """Reads chosen frames of a video, bit for bit those that decoding all of it would give.

    Opening reads the packets once without decoding them. Reading decodes from the keyframe
    before a wanted frame up to that frame, and leaves out frames on the way that no other refers
    to. Keyframes and the order of frames are read in the pictures' own headers, and times are
    held against them. Where that cannot be relied on (damage, missing or false times, a clock that
    starts again, parameters that change, a codec with no clean keyframes) the video is decoded
    from its start; `fallback_reason` says so. Some damage shows only once
    the frames around it are decoded: then `num_frames` shrinks during `read`, with a warning;
    in a group of pictures that is never decoded it goes unseen.

    Frames are numbered in the order in which a decoder of the whole video gives them. One that an
    edit list leaves out has no number. Frames are turned as their display matrix says; how
    colours are converted is told at `pixels.FrameConverter`.

    A reader is a context manager, and not for use by several threads at a time.

    Args:
        path: A video file.
        num_threads: Threads of the decoder. One is best where several videos are read at a time.
        stream_index: Video stream by its place in the container; None takes the best.
        decoder: `"software"`, or `"nvdec"` for the decoder of an NVIDIA GPU. Neither ever stands
            in for the other.
        on_warning: Is given what would go to `warnings.warn`, which is not for use by threads.

    Raises:
        VideoError: If no frame can be had from the file; a `FrameSizeError` where its frames are
            too large, a `VideoMemoryError` where memory ran out.
        DecoderUnavailableError: If this machine, or this build of PyAV, lacks the decoder.
        ValueError: If `num_threads`, `stream_index` or `decoder` is not allowed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_threads: int = 1,
        stream_index: int | None = None,
        decoder: Decoder = "software",
        max_pixels: int = MAX_PIXELS,
        on_warning: Callable[[VideoWarning], None] | None = None,
    ) -> None:
        if num_threads < 1:
            raise ArgumentError("num_threads", f"is {num_threads}; it must be 1 or more.")
        check_max_pixels(max_pixels)
        self.path = Path(path)
        self._stream_index = stream_index
        self._decoder = decoder
        self._max_pixels = max_pixels
        self._on_warning = on_warning
        self._is_closed = False
        self._scaling: Scaling | None = None
        # Of a short video that had to be decoded as a whole, to be counted; else empty.
        self._decoded: list[VideoFrame] = []
        # The decoder's state after the first frame; the first read goes on from there.
        self._started: StartedRun | None = None
        self._gaps: GapFinder | None = None
        self._container, stream = self._open()
        with ExitStack() as stack, foreign_errors(self.path):
            stack.callback(self.close)
            # A stream may not be touched once its container is closed; these may.
            self._codec = stream.codec_context
            self._time_base = stream.time_base or Fraction(1)
            self._average_rate = stream.average_rate
            self._codec.thread_count = num_threads
            self._codec.thread_type = "AUTO"
            if self._codec.name in _LEAVE_GAPS:
                # Else what cannot be decoded is passed over, and the frame shows what the memory
                # held before.
                self._codec.options = {**self._codec.options, "err_detect": "explode"}
            if self._codec.name == "hevc":
                self._gaps = GapFinder()
            self._index = scan_packets(self._container, stream)
            self._set_times(self._index.pts[self._index.frames])
            self._fallback_reason = self._index.distrust
            cropping = Cropping.of_stream(self._container, stream)
            first = self._first_frame()
            check_frame_size(self.path, first.width, first.height, max_pixels)
            self._converter = FrameConverter(first, cropping)
            stack.pop_all()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._is_closed = True
        self._decoded, self._started = [], None
        self._container.close()

    def _open(self) -> tuple[InputContainer, VideoStream]:
        return open_video(self.path, self._stream_index, self._decoder, self._max_pixels)

    @property
    def num_frames(self) -> int:
        """Frames that decoding all of the video gives, N."""
        return len(self._pts_seconds)

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """When each frame is shown, by the container's clock, float64, shape (N,).

        The first need not be 0. They ascend, but for a file whose clock starts again: there the
        times of each part do.
        """
        return self._pts_seconds

    @property
    def average_fps(self) -> float:
        """Frames per second as the container has it, or else over all frames; 0 if unknown."""
        if self._average_rate:
            return float(self._average_rate)
        return (self.num_frames - 1) / self._span_seconds if self._span_seconds > 0 else 0.0

    @property
    def duration_seconds(self) -> float:
        """From the first frame until one frame after the last."""
        return self._span_seconds + (1 / self.average_fps if self.average_fps else 0.0)

    @property
    def _span_seconds(self) -> float:
        # Where the clock starts again, a frame takes as long as most do.
        steps = np.diff(self._pts_seconds)
        is_back = steps < 0
        if not is_back.any():
            return float(self._pts_seconds[-1] - self._pts_seconds[0])
        return float(steps[~is_back].sum() + is_back.sum() * np.median(np.abs(steps)))

    @property
    def width(self) -> int:
        """Width as displayed, in pixels."""
        return self._converter.width

    @property
    def height(self) -> int:
        """Height as displayed, in pixels."""
        return self._converter.height

    @property
    def rotation_degrees(self) -> int:
        """By how much stored frames are turned clockwise for display: 0, 90, 180 or 270."""
        return self._converter.orientation.rotation_degrees

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec, such as `h264`."""
        return self._codec.codec.canonical_name

    @property
    def fallback_reason(self) -> str | None:
        """Why frames are read by decoding the video from its start; None where they are not."""
        return self._fallback_reason

    def scale_to(self, scaling: Scaling | None) -> None:
        """Have frames scaled while their colours are converted, from now on; None as they are.

        What `read`, `read_sampled` and `read_in_order` give then has a shorter side of
        `scaling.short_side` pixels, or is as displayed where the container asks to cut off a part.
        `width` and `height` stay those as displayed.
        """
        self._scaling = scaling

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> Clip:
        """Read frames by their numbers.

        Args:
            indices: Numbers in [0, num_frames), in any order, also several times.

        Returns:
            The frames in the order of `indices`. Where damage is found only now and a frame turns
            out not to exist, the last one that does stands in, after a `VideoWarning`; the clip's
            `indices` say which frames they really are.

        Raises:
            ValueError: If `indices` is empty, or a number is not in the range.
            VideoError: If no frame can be decoded, or the reader is closed.
        """
        wanted = self._check_indices(indices)
        with foreign_errors(self.path):
            return self._read(wanted)

    def _read(self, wanted: NDArray[np.int64]) -> Clip:
        problem: str | None = None
        for _ in range(2):
            places = np.minimum(wanted, self.num_frames - 1)
            width, height = self._converter.size_for(self._scaling)
            frames = np.empty((len(places), height, width, 3), dtype=np.uint8)
            problem = self._read_into(frames, places)
            if problem is None:
                return Clip(frames, places, self._pts_seconds[places])
            self._count_frames(problem)
        raise VideoError(f"{self.path} changed while it was read ({problem}); read it again.")

    def read_sampled(self, sample: Callable[[int], NDArray[np.int64]]) -> Clip:
        """Read the frames that a sampler picks, given the number of frames.

        Asks it again if damage is found while reading, which changes that number.

        Args:
            sample: From a number of frames N to indices in [0, N).

        Raises:
            ValueError: If it picks frames that do not exist.
            VideoError: If no frame can be decoded.
        """
        while True:
            num_frames = self.num_frames
            clip = self.read(sample(num_frames))
            if self.num_frames == num_frames:
                return clip

    def read_in_order(
        self, indices: Sequence[int] | NDArray[np.integer]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Give frames one by one, in one pass and at a memory that does not grow with them.

        Args:
            indices: Numbers in [0, num_frames), each larger than the one before.

        Yields:
            The number of a frame, and its RGB, uint8, shape (H, W, 3). The same as `read` gives.

        Raises:
            ValueError: If `indices` is empty or does not ascend, or a number is not in the range.
            FramesChangedError: If damage is found only now. What was given is not to be relied
                on; begin again, with the number of frames as it is then.
            VideoError: If no frame can be decoded, or the reader is closed.
        """
        wanted = self._check_indices(indices)
        if (np.diff(wanted) <= 0).any():
            raise ValueError("indices do not ascend; give each frame once, in order.")
        return self._read_in_order(wanted)

    def _read_in_order(self, wanted: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        with foreign_errors(self.path), ExitStack() as stack:
            frames = self._in_order(wanted, stack)
            while True:
                try:
                    place, frame = next(frames)
                except StopIteration as end:
                    problem = end.value
                    break
                yield place, self._converter.convert(frame, self._scaling)
            if problem is None:
                return
            if self._fallback_reason is not None:
                raise VideoError(
                    f"{self.path} changed while it was read ({problem}); read it again."
                )
            self._count_frames(problem)
        raise FramesChangedError(f"{self.path} has to be read again, from its start: {problem}.")

    def _all_in_order(
        self, wanted: NDArray[np.int64], stack: ExitStack
    ) -> Generator[tuple[int, VideoFrame], None, str | None]:
        frames: Iterator[VideoFrame]
        if self._decoded:
            frames = iter(self._decoded)
        else:
            frames = iter(stack.enter_context(self._full_decoder()))
        next_place = 0
        for place in wanted.tolist():
            # Those on the way are let go of at once, see `FullDecoder`.
            frame = next(islice(frames, place - next_place, None), None)
            if frame is None:
                return f"it holds fewer frames than {self.num_frames}"
            yield place, frame
            next_place = place + 1
        return None

    def read_all(self) -> Iterator[tuple[float, Callable[[Scaling | None], NDArray[np.uint8]]]]:
        """Decode the video once, from its start to its end, with memory for a few frames.

        Yields:
            When a frame is shown, in seconds by the container's clock, and a function that gives
            its pixels, RGB, uint8, shape (H, W, 3): bit for bit those of `read`, or scaled as its
            argument says. Nothing is converted before it is called, by any thread.

        Raises:
            VideoError: If the file cannot be read any more, or the reader is closed.
        """
        self._check_open()
        index, is_trusted = self._index, self._fallback_reason is None
        with foreign_errors(self.path), self._full_decoder() as decoder:
            number = 0
            for frame in decoder:
                place = frame.pts  # of its packet, see `demux`
                if is_trusted and place is not None:
                    # Not by its number: damage that shows only now can cost frames before it.
                    pts_seconds = float(index.pts[place] * self._time_base)
                else:
                    pts_seconds = float(self._pts_seconds[min(number, self.num_frames - 1)])
                yield pts_seconds, partial(self._converter.convert, frame)
                del frame  # see `FullDecoder`
                number += 1  # noqa: SIM113 - `enumerate` would hold the frame
            if is_trusted and decoder.is_damaged:
                self._warn(
                    f"{self.path} is damaged, which showed while it was decoded. The frames that "
                    "could be decoded are used; fetch it again or repair it to have all."
                )

    def _check_open(self) -> None:
        if self._is_closed:
            raise VideoError(f"The reader of {self.path} is closed; open it again.")

    def _check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        self._check_open()
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or not wanted.size or not np.issubdtype(wanted.dtype, np.integer):
            raise ValueError(
                f"indices are {wanted.dtype} of shape {wanted.shape}; expected integers of shape "
                "(T,) with T of 1 or more."
            )
        outside = wanted[(wanted < 0) | (wanted >= self.num_frames)]
        if outside.size:
            raise ValueError(
                f"index {outside[0]} is not a frame of {self.path}; indices must be in "
                f"[0, {self.num_frames})."
            )
        return wanted.astype(np.int64)

    def _set_times(self, pts: NDArray[np.int64]) -> None:
        self._pts_seconds = pts * self._time_base.numerator / self._time_base.denominator
        self._pts_seconds.setflags(write=False)

    def _first_frame(self) -> VideoFrame:
        """Decode the first frame; count the frames where packets cannot be believed."""
        index, problem = self._index, self._index.distrust
        if problem is None and len(index.frames):
            if index.kept is not None:
                self._started = start_first_run(self._codec, index, index.kept, self._gaps)
            if self._started is not None:
                return self._started.frames[0]
            first: list[VideoFrame] = []
            problem = _drain(self._chosen([0]), lambda _, frame: first.append(frame))
            if problem is None:
                return first[0]
        elif index.count_is_known and len(index.frames):
            with self._full_decoder() as decoder:
                for frame in decoder:
                    return frame
        return self._count_frames(problem or "no packet is to be shown", is_new=True)

    def _read_into(self, frames: NDArray[np.uint8], places: NDArray[np.int64]) -> str | None:
        """Put frame `places[i]` into row i; says why the result is not to be used, or None."""

        def put(place: int, frame: VideoFrame) -> None:
            frames[places == place] = self._converter.convert(frame, self._scaling)

        with ExitStack() as stack:
            return _drain(self._in_order(np.unique(places), stack), put)

    def _in_order(
        self, wanted: NDArray[np.int64], stack: ExitStack
    ) -> Generator[tuple[int, VideoFrame], None, str | None]:
        """Give frames by their ascending numbers; ends with why not to rely on them, or None."""
        if self._fallback_reason is None:
            return self._chosen(wanted)
        return self._all_in_order(wanted, stack)

    def _chosen(self, wanted: Iterable[int]) -> Generator[tuple[int, VideoFrame], None, str | None]:
        """Give frames by their numbers; ends with why they cannot be relied on, or None."""
        index, started = self._index, self._started
        self._started = None
        number_of = {int(index.frames[number]): int(number) for number in wanted}
        with ExitStack() as stack:
            packets: Iterable[Packet[VideoStream]] | None = index.kept
            if packets is None:
                container, stream = self._open()
                packets = demux(stack.enter_context(container), stream)
            frames = chosen_frames(self._codec, index, packets, number_of, started, self._gaps)
            while True:
                try:
                    packet, frame = next(frames)
                except StopIteration as end:
                    problem: str | None = end.value
                    return problem
                yield number_of[packet], frame

    @contextmanager
    def _full_decoder(self) -> Iterator[FullDecoder]:
        container, stream = self._open()
        with container:
            # With damage, what several threads make of a frame depends on their timing.
            stream.codec_context.thread_count = 1
            packets = islice(demux(container, stream), len(self._index.pts))
            yield FullDecoder(stream.codec_context, self._index.kept or packets)

    def _count_frames(self, reason: str, *, is_new: bool = False) -> VideoFrame:
        """Decode everything, and go by the frames that come out from now on; gives the first."""
        logger.info("%s is decoded from its start: %s", self.path, reason)
        with self._full_decoder() as decoder:
            is_whole = is_new and self._index.damage is None
            keeps_frames = is_whole and self._codec.name not in _LEAVE_GAPS
            tails = reason.tails if isinstance(reason, Damage) else None
            survey = survey_frames(decoder, keeps_frames=keeps_frames, tails=tails)
        if survey.first is None:
            raise VideoError(
                f"{self.path} gives no frame: none of its {len(self._index.pts)} packets could be "
                f"decoded by {self._decoder} ({reason}); "
                f"{_WITHOUT_FRAMES[self._decoder]}. Frames of more than {self._max_pixels:,} "
                "pixels are not decoded (--max-pixels, max_pixels)."
            )
        has_changed = not is_new and len(survey.places) != self.num_frames
        # Packets that give no frame are odd only where others show that something is not there.
        has_changed |= self._index.contradicts and len(survey.places) < len(self._index.frames)
        is_damaged = survey.is_damaged or (isinstance(reason, Damage) and tails is None)
        if self._index.damage or is_damaged or has_changed:
            self._warn(
                f"{self.path} is damaged: {self._index.damage or reason}. The {len(survey.places)} "
                "frames that could be decoded are used; fetch it again or repair it to have all."
            )
        self._fallback_reason = reason
        self._decoded = survey.kept
        self._set_times(self._times_of(survey.places))
        return survey.first

    def _times_of(self, places: list[int | None]) -> NDArray[np.int64]:
        """When the frames of some packets are shown, in the order in which they came out."""
        index = self._index
        if not index.has_times or None in places:
            step = 1 / (self._average_rate or Fraction(25)) / self._time_base
            return np.array([round(i * step) for i in range(len(places))], dtype=np.int64)
        packets = np.array(places, dtype=np.int64)
        times = index.pts[packets]
        # Packets may carry times in decoding order, and so do the frames; hence the sorting. Not
        # past a clock that starts again: each frame keeps a time of its own part.
        starts = np.flatnonzero(np.diff(index.clock[packets])) + 1
        return np.concatenate([np.sort(part) for part in np.split(times, starts)])

    def _warn(self, text: str) -> None:
        if self._on_warning is not None:
            self._on_warning(VideoWarning(text))
        else:
            warnings.warn(text, VideoWarning, stacklevel=4)


def _drain(
    frames: Generator[tuple[int, VideoFrame], None, str | None],
    put: Callable[[int, VideoFrame], None],
) -> str | None:
    while True:
        try:
            place, frame = next(frames)
        except StopIteration as end:
            problem: str | None = end.value
            return problem
        put(place, frame)


def read_clip(path: str | Path, *, num_frames: int = 8, num_threads: int = 1) -> Clip:
    """Read the clip that the original evaluates: the middle frame of each of T equal segments.

    Args:
        path: A video file.
        num_frames: Frames of the clip, T. A shorter video gives some of its frames repeatedly.
        num_threads: Threads of the decoder.

    Raises:
        VideoError: If no frame can be had from the file.
        ValueError: If one of the two numbers is not positive.
    """
    with VideoReader(path, num_threads=num_threads) as reader:
        return reader.read_sampled(lambda count: sample_segments(count, num_frames))


def open_video(
    path: Path,
    stream_index: int | None,
    decoder: Decoder = "software",
    max_pixels: int = MAX_PIXELS,
) -> tuple[InputContainer, VideoStream]:
    """Open a file for demuxing and choose its video stream; what PyAV says becomes a `VideoError`.

    FFmpeg is given the open file and never its name: a name can be a pattern that stands for
    other files (`%03d`), name a protocol, or have a suffix by which any bytes pass for a picture
    or a text that is drawn.

    Args:
        path: The file.
        stream_index: Place of the stream among all streams of the container; None takes the one
            that FFmpeg would take: default streams before others, then by bit rate.
        decoder: What is to decode it.
        max_pixels: Of a frame; the decoder allocates none that is much larger.

    Returns:
        The container, to be closed by the caller, and the stream.

    Raises:
        VideoError: If it is missing, not a file, empty, not a video, or has no video stream, or
            one of a codec that the decoder lacks.
        FrameSizeError: If a frame has more pixels.
        DecoderUnavailableError: If the decoder cannot be had on this machine.
        ValueError: If `stream_index` is not that of a video stream, or there is no such decoder.
    """
    import av
    from av.stream import Discard

    if decoder not in get_args(Decoder):
        raise ArgumentError("decoder", f"is {decoder!r}; it must be 'software' or 'nvdec'.")
    acceleration = _acceleration(decoder)
    with open_file(path) as file, foreign_errors(path):
        start = file.read(_START_BYTES)
        _check_start(path, start)
        file.seek(0)
        try:
            # FFmpeg makes a descriptor of its own of this one. The whitelists keep a file from
            # having others read, and from being taken for what is no video.
            container = av.open(
                "fd:",
                mode="r",
                options={
                    "fd": str(file.fileno()),
                    "protocol_whitelist": "fd",
                    "format_whitelist": _FORMAT_WHITELIST,
                    "max_pixels": decoder_pixels(max_pixels),
                },
                metadata_errors="replace",
                hwaccel=acceleration,
            )
        except MemoryError:
            raise
        except av.FFmpegError as exc:
            raise _opening_error(path, start, exc) from exc
    with ExitStack() as stack:
        stack.callback(container.close)
        stream = _video_stream(path, container, stream_index)
        if decoder != "software" and not _is_decoded_on_device(stream):
            raise VideoError(
                f"{path} is of the codec {stream.codec_context.name}, which {decoder} cannot "
                "decode; ask for the decoder software."
            )
        check_frame_size(path, *_frame_size(stream, start), max_pixels)
        stream.codec_context.options = {"max_pixels": decoder_pixels(max_pixels)}
        stack.pop_all()
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # spares reading them
    return container, stream


def _frame_size(stream: VideoStream, start: bytes) -> tuple[int, int]:
    """Width and height as the container has them; (0, 0) where it has none."""
    codec = stream.codec_context
    if codec.width and codec.height:
        return codec.width, codec.height
    # Of pictures FFmpeg learns the size by decoding one, which is refused where it is too large.
    for signature, place, form in _PICTURE_SIZES:
        if start.startswith(signature) and len(start) >= place + struct.calcsize(form):
            width, height = struct.unpack_from(form, start, place)
            return abs(width), abs(height)
    return 0, 0


def decoder_pixels(max_pixels: int) -> str:
    """FFmpeg's option that keeps a decoder from allocating frames that are much larger."""
    return str(_DECODER_PIXELS + 2 * max_pixels)


def check_frame_size(path: Path | str, width: int, height: int, max_pixels: int) -> None:
    """Refuse frames that are too large.

    Raises:
        FrameSizeError: If they have more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise FrameSizeError(
            f"{path} has frames of {width} x {height} and they may have {max_pixels:,} pixels; "
            "make it smaller, or allow more (--max-pixels, max_pixels)."
        )


def _acceleration(decoder: Decoder) -> HWAccel | None:
    """What PyAV takes to decode on a device, once it is known that there is one."""
    if decoder == "software":
        return None
    import av
    from av.codec.hwaccel import HWAccel, hwdevices_available

    device = _DEVICES[decoder]
    if device not in hwdevices_available():
        raise DecoderUnavailableError(
            f"{decoder} was asked for and this build of PyAV knows no {device} devices; "
            "install PyAV from PyPI, or ask for the decoder software."
        )
    acceleration = HWAccel(device, allow_software_fallback=False)
    try:
        # The same that opening does for each stream: here its error cannot be the file's.
        acceleration.create(av.Codec("h264", "r"))
    except (av.FFmpegError, NotImplementedError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise DecoderUnavailableError(
            f"{decoder} was asked for and no {device} device can be opened ({reason}); install "
            "NVIDIA's driver with its video libraries, or ask for the decoder software."
        ) from exc
    return acceleration


def _is_decoded_on_device(stream: VideoStream) -> bool:
    return stream.codec_context.is_hwaccel


def _check_start(path: Path, start: bytes) -> None:
    """Refuse text that names other files, which nobody asked to open."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for kind, is_kind in _PLAYLISTS.items():
        if is_kind(text):
            raise VideoError(
                f"{path} is a playlist ({kind}), not a video; give the files it names, downloaded "
                "where they are addresses."
            )


def _opening_error(path: Path, start: bytes, exc: av.FFmpegError) -> VideoError:
    for place, signature, name in _SIGNATURES:
        if start[place : place + len(signature)] == signature:
            return VideoError(
                f"{path} starts as {name} file but cannot be opened ({exc.strerror}), as where a "
                "download or a recording was cut off; fetch it again or repair it."
            )
    return VideoError(
        f"{path} is not a video in a format that FFmpeg knows ({exc.strerror}); "
        "give a video file, such as MP4, MKV, WebM, AVI or GIF."
        if exc.errno != errno.EINVAL
        else f"{path} is not a video in a format that is taken here (text, a subtitle, bytes that "
        "say nothing); give a video file, such as MP4, MKV, WebM, AVI or GIF."
    )


def _video_stream(path: Path, container: InputContainer, stream_index: int | None) -> VideoStream:
    from av.stream import Disposition

    # An attached picture is no video, such as the cover of a piece of music.
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise VideoError(_no_video_message(path, container))
    if stream_index is None:
        best = container.streams.best("video")
        stream = next((s for s in videos if best is not None and s.index == best.index), videos[0])
    else:
        by_index = {s.index: s for s in videos}
        if stream_index not in by_index:
            raise ArgumentError(
                "stream_index",
                f"is {stream_index}; the video streams of {path} are "
                f"{', '.join(map(str, sorted(by_index)))}.",
            )
        stream = by_index[stream_index]
    # Typed as always there, but None where the build of FFmpeg has no decoder.
    if getattr(stream, "codec_context", None) is None:
        raise VideoError(
            f"{path} has a video stream of a codec that this build of FFmpeg cannot decode; "
            "convert it, to H.264 for instance."
        )
    return stream


def _no_video_message(path: Path, container: InputContainer) -> str:
    if container.streams.audio:
        return f"{path} holds audio only; give a file with a video stream."
    kinds = sorted({s.type for s in container.streams})
    return (
        f"{path} holds no video stream (it has: {', '.join(kinds) or 'nothing'}); "
        "give a file with one."
    )


def list_videos(
    folder: Path, *, recursive: bool, on_error: Callable[[OSError], None] | None = None
) -> list[Path]:
    """The files of a folder that have the suffix of a video, sorted.

    Hidden files and folders are left out, and links to folders are not followed. A folder that
    cannot be read is passed over, after `on_error` was called.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES)
