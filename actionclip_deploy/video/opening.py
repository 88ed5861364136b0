"""Opens a file and finds its video stream; what PyAV says of a bad file becomes a `VideoError`.

In this folder PyAV is imported by what uses it, when it does: a fifth of the time of importing
this package would be PyAV's, and not everyone who imports the package decodes.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from actionclip_deploy.errors import DecoderUnavailableError, VideoError

if TYPE_CHECKING:
    import av
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.video.stream import VideoStream

Decoder = Literal["software", "nvdec"]
# FFmpeg's name of the device that has the decoder.
_DEVICES = {"nvdec": "cuda"}

# Formats of text that names other files, which nobody asked to open.
_PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})
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


def open_video(
    path: Path, stream_index: int | None, decoder: Decoder = "software"
) -> tuple[InputContainer, VideoStream]:
    """Open a file for demuxing and choose its video stream.

    Args:
        path: The file.
        stream_index: Place of the stream among all streams of the container; None takes the one
            that FFmpeg would take: default streams before others, then by bit rate.
        decoder: What is to decode it.

    Returns:
        The container, to be closed by the caller, and the stream.

    Raises:
        VideoError: If it is missing, not a file, empty, not a video, or has no video stream, or
            one of a codec that the decoder lacks.
        DecoderUnavailableError: If the decoder cannot be had on this machine.
        ValueError: If `stream_index` is not that of a video stream, or there is no such decoder.
    """
    import av
    from av.stream import Discard

    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder is {decoder!r}; it must be 'software' or 'nvdec'.")
    _check_file(path)
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps
        # a file from having others fetched over a network.
        container = av.open(
            f"file:{path}",
            mode="r",
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
            hwaccel=_acceleration(decoder),
        )
    except av.FFmpegError as exc:
        raise _opening_error(path, exc) from exc
    try:
        stream = _video_stream(path, container, stream_index)
        if decoder != "software" and not _is_decoded_on_device(stream):
            raise VideoError(
                f"{path} is of the codec {stream.codec_context.name}, which {decoder} cannot "
                "decode; ask for the decoder software."
            )
    except (VideoError, ValueError):
        container.close()
        raise
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # spares reading them
    return container, stream


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


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise VideoError(f"{path} is a folder; give the video files in it one by one.")
    if not path.exists():
        raise VideoError(f"There is no file {path}; check its name.")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); fetch or record it again.")


def _opening_error(path: Path, exc: av.FFmpegError) -> VideoError:
    if exc.errno == errno.EACCES:
        return VideoError(f"{path} may not be read by this user; change its permissions.")
    with path.open("rb") as file:
        start = file.read(16)
    for place, signature, name in _SIGNATURES:
        if start[place : place + len(signature)] == signature:
            return VideoError(
                f"{path} starts as {name} file but cannot be opened ({exc.strerror}), as where a "
                "download or a recording was cut off; fetch it again or repair it."
            )
    return VideoError(
        f"{path} is not a video in a format that FFmpeg knows ({exc.strerror}); "
        "give a video file, such as MP4, MKV, WebM, AVI or GIF."
    )


def _video_stream(path: Path, container: InputContainer, stream_index: int | None) -> VideoStream:
    if _PLAYLISTS & set(container.format.name.split(",")):
        raise VideoError(
            f"{path} is a playlist ({container.format.name}), not a video; give the files it names."
        )
    videos = [s for s in container.streams.video if not _is_attached_picture(s)]
    if not videos:
        raise VideoError(_no_video_message(path, container))
    if stream_index is None:
        best = container.streams.best("video")
        stream = next((s for s in videos if best is not None and s.index == best.index), videos[0])
    else:
        by_index = {s.index: s for s in videos}
        if stream_index not in by_index:
            raise ValueError(
                f"stream_index is {stream_index}; the video streams of {path} are "
                f"{', '.join(map(str, sorted(by_index)))}."
            )
        stream = by_index[stream_index]
    # Typed as always there, but None where the build of FFmpeg has no decoder.
    if getattr(stream, "codec_context", None) is None:
        raise VideoError(
            f"{path} has a video stream of a codec that this build of FFmpeg cannot decode; "
            "convert it, to H.264 for instance."
        )
    return stream


def _is_attached_picture(stream: VideoStream) -> bool:
    from av.stream import Disposition

    # Such as the cover of a piece of music.
    return bool(stream.disposition & Disposition.attached_pic)


def _no_video_message(path: Path, container: InputContainer) -> str:
    if container.streams.audio:
        return f"{path} holds audio only; give a file with a video stream."
    kinds = sorted({s.type for s in container.streams})
    return (
        f"{path} holds no video stream (it has: {', '.join(kinds) or 'nothing'}); "
        "give a file with one."
    )
