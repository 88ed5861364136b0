"""Test videos of many kinds: containers x codecs x structures, made by FFmpeg.

Each stream is encoded once, by the FFmpeg that PyAV brings; its packets are then written into
containers as they are or with another clock, other flags or damage. What only FFmpeg's program
can do (field coding, edit lists of cut files, Theora) is asked of Debian's, where it is installed.
All frames of a video differ from each other, so that a wrong one is seen.
"""

from __future__ import annotations

import functools
import io
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rendering import usual_priority

from actionclip_deploy.video.pixels import FrameConverter

FFMPEG = shutil.which("ffmpeg")
NUM_FRAMES = 36
WIDTH, HEIGHT = 96, 64


class NotMade(Exception):  # noqa: N818 - it is no error that a container does not take a codec
    """The encoder or the container is not there, or does not take this."""


@dataclass(frozen=True)
class Stream:
    """How a stream is encoded."""

    name: str
    codec: str
    options: tuple[tuple[str, str], ...] = ()
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (WIDTH, HEIGHT)
    gop: int = 12
    b_frames: int = 0
    full_range: bool = False
    seed: int = 0
    num_frames: int = NUM_FRAMES
    # Another scene at times, which gives I-frames that are no IDR; a part of the picture looks as
    # it did two frames before, across them.
    flash: bool = False


def x264(name: str, params: str = "", **rest: object) -> Stream:
    options = (("crf", "18"), ("x264-params", params))
    return Stream(f"h264-{name}", "libx264", options, **rest)  # type: ignore[arg-type]


def x265(name: str, params: str = "", **rest: object) -> Stream:
    params = ":".join(filter(None, ["log-level=none:pools=1:frame-threads=1", params]))
    options = (("crf", "20"), ("preset", "ultrafast"), ("x265-params", params))
    return Stream(f"hevc-{name}", "libx265", options, **rest)  # type: ignore[arg-type]


NO_SCENES = "scenecut=0:b-adapt=0"
STREAMS = (
    x264("plain", NO_SCENES),
    x264("b2", NO_SCENES + ":b-pyramid=none:open-gop=0", b_frames=2),
    x264("pyramid", NO_SCENES + ":b-pyramid=normal", b_frames=5),
    x264("open", NO_SCENES + ":open-gop=1", b_frames=3),
    x264("refresh", NO_SCENES + ":intra-refresh=1"),
    x264("flash", "min-keyint=36:keyint=36:ref=4:scenecut=100", gop=36, flash=True),
    x264("one-group", NO_SCENES + ":keyint=infinite", gop=999, b_frames=2),
    x264("intra", NO_SCENES + ":keyint=1", gop=1),
    x264("fields", NO_SCENES + ":tff=1", b_frames=2),
    x264("slices", NO_SCENES + ":slices=4", b_frames=1),
    x264("refs", NO_SCENES + ":ref=8:mixed-refs=1:weightp=2", b_frames=3),
    x264("aud", NO_SCENES + ":aud=1:repeat-headers=1", b_frames=2),
    x264("lossless", NO_SCENES + ":qp=0", b_frames=2),
    x264("10bit", NO_SCENES, b_frames=2, pix_fmt="yuv420p10le"),
    x264("444", NO_SCENES, b_frames=1, pix_fmt="yuv444p"),
    x264("gray", NO_SCENES, pix_fmt="gray"),
    x264("full", NO_SCENES, full_range=True),
    x264("422", NO_SCENES, b_frames=2, pix_fmt="yuv422p10le"),
    x264("odd", NO_SCENES, size=(94, 62), b_frames=2),
    x265("plain", "scenecut=0:bframes=0:open-gop=0"),
    x265("b3", "scenecut=0:b-adapt=0:open-gop=0", b_frames=3),
    x265("open", "scenecut=0:b-adapt=0:open-gop=1", b_frames=3),
    x265("layers", "scenecut=0:b-adapt=0:temporal-layers=1", b_frames=3),
    x265("repeat", "scenecut=0:repeat-headers=1:open-gop=0", b_frames=2),
    x265("refresh", "scenecut=0:intra-refresh=1:bframes=0"),
    x265("10bit", "scenecut=0:b-adapt=0:open-gop=0", b_frames=2, pix_fmt="yuv420p10le"),
    x265("444", "scenecut=0:open-gop=0", b_frames=1, pix_fmt="yuv444p"),
    x265("gray", "scenecut=0:open-gop=0", b_frames=2, pix_fmt="gray"),
    x265("12bit", "scenecut=0:open-gop=0", b_frames=2, pix_fmt="yuv420p12le"),
    x265("full", "scenecut=0:open-gop=0:range=full", b_frames=2, full_range=True),
    x265("one-group", "scenecut=0:keyint=999", gop=999, b_frames=3),
    x265("fields", "scenecut=0:open-gop=0:interlace=tff", b_frames=0),
    Stream("mpeg4-plain", "mpeg4"),
    Stream("mpeg4-one-group", "mpeg4", gop=600, b_frames=2),
    Stream("mpeg4-intra", "mpeg4", gop=1),
    Stream("mpeg4-b2", "mpeg4", b_frames=2),
    Stream("mpeg4-qpel", "mpeg4", (("flags", "+qpel+aic"),), b_frames=1),
    Stream("mpeg2-plain", "mpeg2video"),
    Stream("mpeg2-b2", "mpeg2video", b_frames=2),
    Stream(
        "mpeg2-closed",
        "mpeg2video",
        (("flags", "+cgop"), ("sc_threshold", "1000000000")),
        b_frames=2,
    ),
    Stream("mpeg2-422", "mpeg2video", b_frames=1, pix_fmt="yuv422p"),
    Stream("mpeg1-b2", "mpeg1video", b_frames=2),
    Stream("vp8", "libvpx", (("cpu-used", "8"), ("deadline", "realtime"))),
    Stream(
        "vp8-altref", "libvpx", (("cpu-used", "4"), ("auto-alt-ref", "1"), ("lag-in-frames", "10"))
    ),
    Stream("vp9", "libvpx-vp9", (("cpu-used", "8"), ("deadline", "realtime"))),
    Stream(
        "vp9-altref",
        "libvpx-vp9",
        (("cpu-used", "5"), ("auto-alt-ref", "1"), ("lag-in-frames", "12")),
    ),
    Stream("vp9-one-group", "libvpx-vp9", (("cpu-used", "8"),), gop=999),
    Stream("vp9-444", "libvpx-vp9", (("cpu-used", "8"),), pix_fmt="yuv444p"),
    Stream("av1", "libsvtav1", (("preset", "12"),)),
    Stream(
        "av1-low-delay",
        "libsvtav1",
        (("preset", "12"), ("crf", "30"), ("svtav1-params", "pred-struct=1")),
    ),
    Stream("av1-10bit", "libsvtav1", (("preset", "12"),), pix_fmt="yuv420p10le"),
    Stream("av1-one-group", "libsvtav1", (("preset", "12"),), gop=300),
    Stream("mjpeg", "mjpeg", (), "yuvj420p"),
    Stream("mjpeg-444", "mjpeg", (), "yuvj444p"),
    Stream("ffv1", "ffv1"),
    Stream("ffv1-gray", "ffv1", (), "gray"),
    Stream("ffv1-16bit", "ffv1", (("level", "3"),), "gray16le"),
    Stream("ffv1-groups", "ffv1", (("level", "3"),), gop=12),
    Stream("ffv1-10bit", "ffv1", (("level", "3"),), "yuv420p10le"),
    Stream("huffyuv", "huffyuv", (), "yuv422p"),
    Stream("ffvhuff", "ffvhuff", (("context", "1"),)),
    Stream("utvideo", "utvideo"),
    Stream("png", "png", (), "rgb24"),
    Stream("png-gray16", "png", (), "gray16be"),
    Stream("png-alpha", "png", (), "rgba"),
    Stream("rawvideo", "rawvideo"),
    Stream("prores", "prores_ks", (), "yuv422p10le"),
    Stream("flv1", "flv"),
    Stream("h263", "h263", (), "yuv420p", (128, 96)),
    Stream("wmv1", "wmv1"),
    Stream("wmv2", "wmv2"),
    Stream("msmpeg4v3", "msmpeg4"),
    Stream("msmpeg4v2", "msmpeg4v2"),
    Stream("gif", "gif", (), "rgb8"),
    Stream("snow", "snow", (("strict", "-2"),)),
    Stream("cinepak", "cinepak", (), "rgb24"),
    Stream("zmbv", "zmbv", (), "bgr0"),
    Stream("flashsv", "flashsv", (), "bgr24"),
    Stream("svq1", "svq1", (), "yuv410p"),
    Stream("rpza", "rpza", (), "rgb555le"),
    Stream("qtrle", "qtrle", (), "rgb24"),
    Stream("msvideo1", "msvideo1", (), "rgb555le"),
    Stream("theora", "libtheora"),
)
BY_NAME = {stream.name: stream for stream in STREAMS}

# Container -> the streams that are written into it, by the first part of their names.
CONTAINERS = {
    "mp4": "h264 hevc mpeg4 mpeg2 mpeg1 vp9 av1 mjpeg png",
    "mov": "h264 hevc mpeg4 mpeg2 mjpeg png prores qtrle rawvideo rpza svq1 cinepak h263",
    "mkv": "h264 hevc mpeg4 mpeg2 mpeg1 vp8 vp9 av1 mjpeg ffv1 prores theora msmpeg4v3 snow",
    "webm": "vp8 vp9 av1",
    "avi": "h264 mpeg4 mpeg2 mjpeg ffv1 huffyuv ffvhuff utvideo wmv1 wmv2 msmpeg4v3 msmpeg4v2 "
    "png rawvideo h263 zmbv cinepak msvideo1 vp8 snow",
    "flv": "h264 hevc flv1 flashsv av1",
    "ts": "h264 hevc mpeg4 mpeg2 mpeg1",
    "m2ts": "h264 hevc mpeg2",
    "mpg": "mpeg1 mpeg2",
    "vob": "mpeg2 mpeg1",
    "nut": "h264 hevc mpeg4 mpeg2 vp8 vp9 ffv1 mjpeg snow theora",
    "asf": "wmv1 wmv2 msmpeg4v3 h264 mpeg4",
    "3gp": "h264 mpeg4 h263",
    "ogv": "theora vp8",
    "gif": "gif",
    "ivf": "vp8 vp9 av1",
    "h264": "h264",
    "hevc": "hevc",
    "m2v": "mpeg2",
    "m1v": "mpeg1",
    "m4v": "mpeg4",
    "mjpeg": "mjpeg",
    "obu": "av1",
    "mxf": "mpeg2",
    "wtv": "mpeg2",
    "ismv": "h264",
}
_MUXERS = {
    "mkv": "matroska", "ts": "mpegts", "m2ts": "mpegts", "mpg": "mpeg", "m2v": "mpeg2video",
    "m1v": "mpeg1video",
}  # fmt: skip
# What Debian's program is told where the suffix does not say it.
_FORMATS = {"ogv": "-f ogg", "m1v": "-f mpeg1video", "m4v": "-f m4v", "wtv": "-f wtv"}


def picture(number: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """A textured background that moves, and a square that says which frame it is."""
    y, x = np.mgrid[:height, :width]
    random_source = np.random.default_rng(seed)
    texture = random_source.integers(0, 60, (height, width + 4 * NUM_FRAMES)).astype(np.int32)
    texture = texture[:, 2 * (number % NUM_FRAMES) :][:, :width]
    base = 60 + 30 * np.sin(x / 11 + number / 5) + 20 * np.cos(y / 7 - seed)
    pixels = np.stack([base + texture, base[::-1] + texture / 2, base[:, ::-1] + 40], axis=2)
    side = max(height // 8, 4)
    for bit in range(7):
        corner = np.s_[height // 2 : height // 2 + side, bit * side : (bit + 1) * side]
        pixels[corner] = 230 if number >> bit & 1 else 20
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _flashed(number: int, stream: Stream) -> np.ndarray:
    pixels = picture(number, *stream.size, stream.seed + 50 * (number // 8 % 2))
    band = stream.size[1] // 4
    pixels[-band:] = np.random.default_rng(number % 2).integers(0, 255, pixels[-band:].shape)
    return pixels


def _base_format(stream: Stream) -> str:
    return "mov" if stream.name in ("prores", "qtrle") else "nut"


@functools.cache
def encoded(stream: Stream) -> bytes:
    """The stream in a container that changes nothing."""
    buffer = io.BytesIO()
    try:
        with usual_priority(), av.open(buffer, "w", format=_base_format(stream)) as output:
            target = output.add_stream(stream.codec, rate=25)
            target.width, target.height = stream.size
            target.pix_fmt = stream.pix_fmt
            target.gop_size = stream.gop
            target.max_b_frames = stream.b_frames
            target.thread_count = 1
            if stream.full_range:
                target.codec_context.color_range = 2
            target.codec_context.options = dict(stream.options)
            if stream.codec in ("libx264", "libx265", "mpeg4"):
                target.codec_context.flags |= av.codec.context.Flags.global_header
            if not dict(stream.options).get("crf"):
                target.bit_rate = 900_000
            for number in range(stream.num_frames):
                pixels = picture(number, *stream.size, stream.seed)
                if stream.flash:
                    pixels = _flashed(number, stream)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format=stream.pix_fmt, dst_color_range=2 if stream.full_range else None
                )
                frame.pts = number
                for packet in target.encode(frame):
                    output.mux(packet)
            for packet in target.encode(None):
                output.mux(packet)
    except (av.FFmpegError, ValueError) as exc:
        raise NotMade(f"{stream.name}: {exc}") from exc
    return buffer.getvalue()


Change = Callable[[list[av.Packet], Fraction], list[av.Packet]]


def write(
    path: Path,
    stream: Stream,
    change: Change | None = None,
    *,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a stream into the container that the suffix says, its packets changed or not."""
    suffix = path.suffix[1:]
    data = encoded(stream)
    try:
        with (
            av.open(io.BytesIO(data), format=_base_format(stream)) as source,
            av.open(
                str(path),
                "w",
                format=_MUXERS.get(suffix),
                options={"flush_packets": "0"} | (options or {}),
            ) as output,
        ):
            origin = source.streams.video[0]
            target = output.add_stream_from_template(origin, opaque=rotation is None)
            if rotation is not None:
                target.set_display_rotation(rotation)
            packets = [packet for packet in source.demux(origin) if packet.size]
            step = 1 / (25 * packets[0].time_base)
            if any(packet.dts is None for packet in packets):
                delay = max(i - round(packet.pts / step) for i, packet in enumerate(packets))
                for i, packet in enumerate(packets):
                    packet.dts = round((i - delay) * step)
            for packet in change(packets, step) if change else packets:
                packet.stream = target
                output.mux_one(packet)
    except (av.FFmpegError, ValueError, OSError) as exc:
        path.unlink(missing_ok=True)
        raise NotMade(f"{stream.name} into {suffix}: {exc}") from exc
    return path


# What is done to packets on their way into a container.


def as_they_are(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    return packets


def pts_are_dts(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    for packet in packets:
        packet.pts = packet.dts
    return packets


def all_key(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    for packet in packets:
        packet.is_keyframe = True
    return packets


def none_key(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    for packet in packets[1:]:
        packet.is_keyframe = False
    return packets


def some_key(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    for packet in packets[5::7]:
        packet.is_keyframe = True
    return packets


def without_one(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    return packets[:14] + packets[15:]


def without_a_key(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    places = [i for i, packet in enumerate(packets) if packet.is_keyframe and i]
    return packets[: places[0]] + packets[places[0] + 1 :] if places else packets[1:]


def without_the_first(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    return packets[1:]


def at_uneven_times(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    for packet in packets:
        for name in ("pts", "dts"):
            number = round(getattr(packet, name) / step)
            setattr(packet, name, round((number + max(number, 0) // 5 * 2) * step))
    return packets


def shifted(packets: list[av.Packet], step: Fraction, *, seconds: float) -> list[av.Packet]:
    for packet in packets:
        packet.pts += round(seconds * 25 * step)
        packet.dts += round(seconds * 25 * step)
    return packets


def swapped_times(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    """Two neighbouring frames say that they are shown in the other order."""
    ordered = sorted(packets, key=lambda packet: packet.pts)
    first, second = ordered[20:22]
    if first.dts <= second.pts and second.dts <= first.pts:
        first.pts, second.pts = second.pts, first.pts
    return packets


def copied(packet: av.Packet, data: bytes) -> av.Packet:
    """A packet with other bytes."""
    copy = av.Packet(data)
    copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
    copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
    return copy


def with_flipped_bits(
    packets: list[av.Packet], step: Fraction, *, seed: int, first: int = 1, num_bits: int = 1
) -> list[av.Packet]:
    """Flip bits of some packet, neither in the first of the file nor in its first bytes."""
    chooser = random.Random(seed)
    place = chooser.randrange(first, len(packets))
    data = bytearray(bytes(packets[place]))
    for _ in range(num_bits):
        bit = chooser.randrange(min(48, 4 * len(data)), 8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    packets[place] = copied(packets[place], bytes(data))
    return packets


_RECOVERY_POINT = bytes.fromhex("00000001 06 06 01 c4 80")


def with_recovery_points(packets: list[av.Packet], step: Fraction) -> list[av.Packet]:
    """Call I-frames that are no IDR points to start from, though frames refer past them."""
    marked = []
    for packet in packets:
        data = bytes(packet)
        place = data.find(b"\0\0\1\x65")
        # first_mb_in_slice 0 and slice_type 7: an I-frame.
        if place < 0 and any(data[i + 4 : i + 6].startswith(b"\x88") for i in _starts(data)):
            packet = copied(packet, _RECOVERY_POINT + data)
            packet.is_keyframe = True
        marked.append(packet)
    return marked


def _starts(data: bytes) -> Iterator[int]:
    place = -1
    while (place := data.find(b"\0\0\1", place + 1)) >= 0:
        yield place


# A kind of video: how one file of it is made.


@dataclass(frozen=True)
class Kind:
    """One file: its name says stream, container and what was done."""

    stream: str
    container: str
    change: str
    make: Callable[[Path], Path]
    window: tuple[slice, slice] | None = None  # rows and columns that the container shows

    @property
    def name(self) -> str:
        return f"{self.stream}.{self.change}.{self.container}"


def written(stream: Stream, container: str, change: str, how: Change, **rest: object) -> Kind:
    def make(folder: Path) -> Path:
        path = folder / f"{stream.name}.{change}.{container}"
        return write(path, stream, how, **rest)  # type: ignore[arg-type]

    return Kind(stream.name, container, change, make)


def streams_of(container: str) -> list[Stream]:
    codecs = CONTAINERS[container].split()
    return [stream for stream in STREAMS if stream.name.split("-")[0] in codecs]


CHANGES: dict[str, Change] = {
    "plain": as_they_are,
    "pts-are-dts": pts_are_dts,
    "all-key": all_key,
    "none-key": none_key,
    "some-key": some_key,
    "one-lost": without_one,
    "key-lost": without_a_key,
    "first-lost": without_the_first,
    "uneven": at_uneven_times,
    "late": functools.partial(shifted, seconds=4000.52),
    "early": functools.partial(shifted, seconds=-0.4),
    "swapped": swapped_times,
}
# 2 ** 33 ticks of 90 kHz are 95,443.7 seconds.
_WRAPS = functools.partial(shifted, seconds=95_443.0)
_DAMAGED = ("h264", "hevc", "mpeg4", "mpeg2", "vp9", "av1", "vp8", "mpeg1", "mjpeg", "wmv2")


def kinds(*, num_damaged: int = 2) -> Iterator[Kind]:
    """All kinds of files."""
    for container in CONTAINERS:
        for stream in streams_of(container):
            for change, how in CHANGES.items():
                if container in ("nut", "mxf", "wtv") and change != "plain":
                    continue  # these muxers abort the process over packets that do not fit
                yield written(stream, container, change, how)
            if container in ("ts", "m2ts", "mpg", "vob"):
                yield written(stream, container, "wraps", _WRAPS)
            if container in ("mp4", "mov", "mkv"):
                for degrees in (90, 180, 270) if stream.codec != "libsvtav1" else ():
                    rest = {"rotation": degrees}
                    yield written(stream, container, f"turned-{degrees}", as_they_are, **rest)
            if container in ("mp4", "mkv") and stream.size == (WIDTH, HEIGHT):
                yield _cropped(stream, container)
            if container in ("mp4", "mov"):
                rest = {"options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}
                yield written(stream, container, "fragments", as_they_are, **rest)
            if stream.name == "h264-flash":
                yield written(stream, container, "recovery-points", with_recovery_points)
            if stream.name.split("-")[0] in _DAMAGED:
                for seed in range(num_damaged):
                    how = functools.partial(with_flipped_bits, seed=seed, num_bits=1 + seed % 2)
                    yield written(stream, container, f"damaged-{seed}", how)
            if container in ("ts", "flv", "mpg", "h264", "hevc", "m2v", "mjpeg", "ivf", "obu"):
                yield from _joined(stream, container)
    if FFMPEG:
        yield from _of_the_program()


def _cropped(stream: Stream, container: str) -> Kind:
    """A window in the middle, as MP4's `clap` box and Matroska's PixelCrop ask for."""

    def make(folder: Path) -> Path:
        path = with_clap(write(folder / f"{stream.name}.cropped.mp4", stream), 80, 48)
        if container == "mp4":
            return path
        try:
            return copied_to(path.with_suffix(f".{container}"), path)
        finally:
            path.unlink()

    return Kind(stream.name, container, "cropped", make, np.s_[8:56, 8:88])


def with_clap(path: Path, width: int, height: int) -> Path:
    """Put a `clap` box, of a centred window, into the sample description of an MP4 file."""
    data = bytearray(path.read_bytes())
    start, stop, parents = 0, len(data), []
    for name, header in (("moov", 8), ("trak", 8), ("mdia", 8), ("minf", 8), ("stbl", 8),
                         ("stsd", 16)):  # fmt: skip
        place = data.index(name.encode(), start, stop) - 4
        parents.append(place)
        start, stop = place + header, place + int.from_bytes(data[place : place + 4], "big")
    parents.append(start)  # the description of the only stream
    stop = start + int.from_bytes(data[start : start + 4], "big")
    box = struct.pack(">I4s8I", 40, b"clap", width, 1, height, 1, 0, 1, 0, 1)
    data[stop:stop] = box
    for place in parents:
        size = int.from_bytes(data[place : place + 4], "big") + len(box)
        data[place : place + 4] = size.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def copied_to(path: Path, source: Path) -> Path:
    """The packets of a file in another container; FFmpeg writes the cropping that it has read."""
    try:
        with av.open(str(source)) as origin, av.open(str(path), "w") as output:
            stream = output.add_stream_from_template(origin.streams.video[0], opaque=True)
            for packet in origin.demux(origin.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    output.mux(packet)
    except (av.FFmpegError, ValueError) as exc:
        path.unlink(missing_ok=True)
        raise NotMade(f"{path.name}: {exc}") from exc
    return path


def _joined(stream: Stream, container: str) -> Iterator[Kind]:
    """Two videos, one after the other in one file, as `cat` does."""
    others = {
        "twice": stream,
        "joined": replace(stream, name=stream.name + "2", seed=1, num_frames=20),
        "joined-other-size": replace(stream, name=stream.name + "3", seed=1, size=(80, 48)),
    }
    for change, other in others.items():

        def make(folder: Path, other: Stream = other, change: str = change) -> Path:
            path = folder / f"{stream.name}.{change}.{container}"
            first = write(folder / f"1-{path.name}", stream)
            second = write(folder / f"2-{path.name}", other)
            # The header of FLV: 9 bytes and the size of the tag before the first, which is none.
            skip = {"flv": 13, "ivf": 32}.get(container, 0)
            path.write_bytes(first.read_bytes() + second.read_bytes()[skip:])
            first.unlink()
            second.unlink()
            return path

        yield Kind(stream.name, container, change, make)


_SOURCE = (
    "-f lavfi -i color=gray:s=96x64:r=25:d=3,format=yuv420p,"
    "geq=lum='20+3*N+X/8+Y/16+30*mod(floor(X/9)+floor(Y/7)+N\\,2)':cb='128+24*sin(N/4)'"
    ":cr='128+20*cos(Y/40)',trim=end_frame=40"
)
# Arguments of FFmpeg's program, by the name of what they make.
_PROGRAM = {
    "theora.plain.ogv": "-c:v libtheora -g 12 -q:v 6",
    "theora.plain.mkv": "-c:v libtheora -g 12 -q:v 6",
    "mpeg2-fields.plain.ts": "-c:v mpeg2video -flags +ildct+ilme -bf 2 -g 12 -b:v 900k",
    "mpeg2-fields.plain.mpg": "-c:v mpeg2video -flags +ildct+ilme -bf 2 -g 12 -b:v 900k",
    "mpeg2.intra-vlc.mkv": "-c:v mpeg2video -intra_vlc 1 -non_linear_quant 1 -bf 2 -g 9 -b:v 900k",
    "mpeg2.dvd.vob": "-c:v mpeg2video -bf 2 -g 12 -b:v 900k -f dvd",
    "mpeg1.vcd.mpg": "-c:v mpeg1video -bf 2 -g 12 -b:v 900k -f mpeg",
    "xvid.packed.avi": "-c:v libxvid -bf 2 -g 12 -q:v 4",
    "xvid.plain.mp4": "-c:v libxvid -bf 2 -g 12 -q:v 4",
    "h264-fields.paff.ts": "-c:v libx264 -flags +ildct+ilme -bf 2 -g 12 -x264-params bff=1",
    "av1-mono.plain.mkv": "-pix_fmt gray -c:v libaom-av1 -cpu-used 8 -g 12 -row-mt 0",
    "av1-layers.plain.mp4": "-c:v libaom-av1 -usage realtime -cpu-used 8 -g 12 -row-mt 0",
    "av1-12bit.plain.mkv": "-pix_fmt yuv420p12le -c:v libaom-av1 -cpu-used 8 -g 12 -row-mt 0",
    "h264.vfr.mp4": "-vf select='not(eq(mod(n\\,5)\\,3))' -fps_mode vfr -c:v libx264 -bf 2 -g 12",
    "h264.vfr.mkv": "-vf select='not(eq(mod(n\\,5)\\,3))' -fps_mode vfr -c:v libx264 -bf 2 -g 12",
    "hevc.vfr.mp4": "-vf select='lt(mod(n\\,7)\\,4)' -fps_mode vfr -c:v libx265 -bf 2 -g 12 "
    "-x265-params log-level=none",
    "vp9-10bit.plain.mkv": "-pix_fmt yuv420p10le -c:v libvpx-vp9 -cpu-used 8 -g 12",
    "mpeg4-b2.avi-b.avi": "-c:v mpeg4 -bf 2 -g 12 -q:v 4",
    "mpeg4-partitioned.plain.mp4": "-c:v mpeg4 -data_partitioning 1 -bf 0 -g 12 -q:v 4",
    "h264.avi-b.avi": "-c:v libx264 -bf 2 -g 12 -crf 15",
    "h264.setts.mkv": "-c:v libx264 -bf 2 -g 12 -crf 15 -bsf:v setts=pts=DTS",
    "h264.setts.mp4": "-c:v libx264 -bf 2 -g 12 -crf 15 -bsf:v setts=pts=DTS",
    "h264.setts.flv": "-c:v libx264 -bf 2 -g 12 -crf 15 -bsf:v setts=pts=DTS",
    "h264.setts.ts": "-c:v libx264 -bf 2 -g 12 -crf 15 -bsf:v setts=pts=DTS",
    "hevc.setts.mkv": "-c:v libx265 -bf 2 -g 12 -crf 15 -x265-params log-level=none "
    "-bsf:v setts=pts=DTS",
    "mpeg4.setts.mkv": "-c:v mpeg4 -bf 2 -g 12 -q:v 4 -bsf:v setts=pts=DTS",
    "mpeg2.setts.mkv": "-c:v mpeg2video -bf 2 -g 12 -q:v 4 -bsf:v setts=pts=DTS",
    "h264.wraps.ts": "-c:v libx264 -bf 2 -g 12 -crf 15 -output_ts_offset 95442.5",
    "mpeg2.wraps.mpg": "-c:v mpeg2video -bf 2 -g 12 -q:v 4 -output_ts_offset 95442.5",
    "h264.restarts.flv": "-c:v libx264 -bf 2 -g 12 -crf 15 "
    "-bsf:v setts=ts='if(gt(N,25),TS-600,TS)'",
    "vp9.hidden.ivf": "-c:v libvpx-vp9 -auto-alt-ref 1 -lag-in-frames 16 -g 12 -cpu-used 5 "
    "-bsf:v vp9_superframe_split",
    "av1-aom.plain.mkv": "-c:v libaom-av1 -cpu-used 8 -g 12 -lag-in-frames 19 -row-mt 0",
    "mjpeg-fields.plain.avi": "-c:v mjpeg -flags +ildct -q:v 4",
    "dv.plain.dv": "-s 720x576 -pix_fmt yuv420p -c:v dvvideo -r 25",
    "dnxhd.plain.mxf": "-s 1280x720 -pix_fmt yuv422p -c:v dnxhd -b:v 60M -frames:v 12",
    "vc2.plain.mkv": "-c:v vc2 -strict -1 -pix_fmt yuv420p",
    "rv20.plain.rm": "-c:v rv20 -g 12 -bf 0 -s 128x96",
    "apng.plain.apng": "-c:v apng -f apng",
    "webp.plain.webp": "-c:v libwebp -loop 0",
    "utvideo.plain.mkv": "-c:v utvideo -pix_fmt yuv422p",
    "huffyuv.plain.mkv": "-c:v huffyuv",
    "h264.paff-like.ts": "-c:v libx264 -flags +ildct+ilme -bf 2 -g 12 -crf 15 -x264-params tff=1",
    "hevc.open.ts": "-c:v libx265 -bf 3 -g 12 -crf 18 "
    "-x265-params log-level=none:open-gop=1:keyint=12",
    "h264.open.ts": "-c:v libx264 -bf 3 -g 12 -crf 18 -x264-params open-gop=1:keyint=12",
}


def _of_the_program() -> Iterator[Kind]:
    for name, arguments in _PROGRAM.items():
        stream, change, container = name.split(".")

        def make(folder: Path, name: str = name, arguments: str = arguments) -> Path:
            return ffmpeg(f"{_SOURCE} {arguments}", folder / name)

        yield Kind(stream, container, change, make)
    for container in CONTAINERS:
        for stream in streams_of(container):

            def remux(folder: Path, container: str = container, stream: Stream = stream) -> Path:
                base = folder / f"0-{stream.name}.{_base_format(stream)}"
                base.write_bytes(encoded(stream))
                path = folder / f"{stream.name}.remuxed.{container}"
                try:
                    return ffmpeg(f"-i {base} -c copy {_FORMATS.get(container, '')}", path)
                finally:
                    base.unlink()

            yield Kind(stream.name, container, "remuxed", remux)
    for container in ("mp4", "mov", "mkv", "ts", "flv"):
        for seconds in (0.2, 0.56, 1.0):

            def cut(folder: Path, container: str = container, seconds: float = seconds) -> Path:
                base = write(folder / f"0-cut.{container}", BY_NAME["h264-pyramid"])
                path = folder / f"h264-pyramid.cut-{seconds}.{container}"
                ffmpeg(f"-ss {seconds} -i {base} -c copy", path)
                base.unlink()
                return path

            yield Kind("h264-pyramid", container, f"cut-{seconds}", cut)


def ffmpeg(arguments: str, path: Path) -> Path:
    """Run Debian's FFmpeg; the arguments are separated by blanks."""
    if FFMPEG is None:
        raise NotMade("FFmpeg's program is not installed")
    words = [
        FFMPEG,
        "-v",
        "error",
        "-y",
        "-nostdin",
        "-threads",
        "1",
        *arguments.split(),
        str(path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        path.unlink(missing_ok=True)
        raise NotMade(f"{path.name}: {done.stderr.strip()[-200:]}")
    return path


class Decoded:
    """A file decoded from its first packet to the last, by PyAV alone."""

    def __init__(self, path: Path) -> None:
        self.frames: list[np.ndarray] = []
        self.pts: list[int | None] = []
        self.num_packets = 0
        self.is_damaged = False  # whether the decoder met with errors, or had to patch a frame
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("no video stream")
            stream.thread_count = 1
            converter: FrameConverter | None = None
            for packet in container.demux(stream):
                self.num_packets += packet.size > 0
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    self.is_damaged = True
                    continue
                for frame in frames:
                    converter = converter or FrameConverter(frame)
                    self.is_damaged |= frame.is_corrupt
                    self.pts.append(frame.pts)
                    self.frames.append(converter.convert(frame).copy())
            self.time_base = float(stream.time_base or 1)
