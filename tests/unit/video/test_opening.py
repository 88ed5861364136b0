from __future__ import annotations

import errno
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec import hwaccel
from PIL import Image
from rendering import add_stream, encode, moving_pictures, render

from actionclip_deploy.errors import DecoderUnavailableError, VideoError
from actionclip_deploy.video import VideoReader
from actionclip_deploy.video import reader as opening


def write_music(path: Path, *, cover: bool = False) -> Path:
    """An MP3 file of half a second, with a picture or without."""
    with av.open(str(path), "w") as file:
        audio = file.add_stream("libmp3lame", rate=16_000)
        picture = None
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
        samples = np.zeros((1, 8_000), np.int16)
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        sound.sample_rate = 16_000
        if picture is not None:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            file.mux(picture.encode(frame.reformat(format="yuvj420p")))
            file.mux(picture.encode(None))
        file.mux(audio.encode(sound))
        file.mux(audio.encode(None))
    return path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"There is no file .*nothing\.mp4; check its name"):
        VideoReader(tmp_path / "nothing.mp4")


def test_a_folder_is_told_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="is a folder; give the video files in it"):
        VideoReader(tmp_path)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4 is empty \(0 bytes\)"):
        VideoReader(tmp_path / "empty.mp4")


@pytest.mark.parametrize(
    "content", [b"a line of text\n" * 20, b"\0" * 5000, np.random.default_rng(0).bytes(50_000)]
)
def test_other_content_is_no_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="is not a video in a format that FFmpeg knows"):
        VideoReader(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("cut.mp4", "MP4"), ("cut.avi", "AVI"), ("cut.mkv", "Matroska")]
)
def test_the_start_of_a_video_alone_is_called_cut_off(tmp_path: Path, name: str, kind: str) -> None:
    path = render(tmp_path / name, codec="mpeg4", b_frames=0)
    share = 0.7 if kind == "MP4" else 0.001
    path.write_bytes(path.read_bytes()[: max(40, int(share * path.stat().st_size))])
    with pytest.raises(VideoError, match=f"starts as {kind} file but .* was cut off"):
        VideoReader(path)


@pytest.mark.parametrize("cover", [False, True])
def test_music_is_called_audio_even_with_a_cover(tmp_path: Path, cover: bool) -> None:
    path = write_music(tmp_path / "music.mp3", cover=cover)
    with pytest.raises(VideoError, match=r"music\.mp3 holds audio only; give a file with a video"):
        VideoReader(path)


def test_a_sound_file_is_called_audio(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    with pytest.raises(VideoError, match="holds audio only"):
        VideoReader(tmp_path / "sound.wav")


def test_subtitles_are_no_video(tmp_path: Path) -> None:
    path = tmp_path / "words.srt"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    with pytest.raises(VideoError, match=r"holds no video stream \(it has: subtitle\)"):
        VideoReader(path)


def test_a_list_of_other_files_is_refused(tmp_path: Path) -> None:
    render(tmp_path / "part.mp4", num_frames=3)
    path = tmp_path / "list.ffconcat"
    path.write_text("ffconcat version 1.0\nfile part.mp4\n")
    with pytest.raises(VideoError, match=r"is a playlist \(concat\), not a video"):
        VideoReader(path)


def test_a_file_that_may_not_be_read_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = render(tmp_path / "secret.mp4", num_frames=3)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Permissions themselves would not do: root may read everything.
    monkeypatch.setattr(opening.os, "open", refuse)
    with pytest.raises(VideoError, match="may not be read by this user; change its permissions"):
        VideoReader(path)


def test_a_single_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "picture.png")
    with VideoReader(tmp_path / "picture.png") as reader:
        assert (reader.num_frames, reader.width, reader.height) == (1, 40, 30)
        assert (reader.read([0]).frames == (200, 10, 10)).all()


@pytest.mark.parametrize("name", ["a:b.mp4", "%03d.mp4", "größe 動画.mp4", "bytes\udcff.mp4"])
def test_names_that_look_like_something_else_are_names(tmp_path: Path, name: str) -> None:
    path = render(tmp_path / "plain.mp4", num_frames=3).rename(tmp_path / name)
    with VideoReader(path) as reader:
        assert reader.num_frames == 3


def test_metadata_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    for name in ("title.mp4", "title.mkv", "title.avi"):
        path = render(
            tmp_path / name, codec="mpeg4", num_frames=3, metadata={"title": "TITLETITLE"}
        )
        content = path.read_bytes()
        assert b"TITLETITLE" in content
        path.write_bytes(content.replace(b"TITLETITLE", b"\xff\xfe\xe9\x80TITLE\xc3"))
        with VideoReader(path) as reader:
            assert reader.num_frames == 3


def test_the_default_of_two_streams_is_taken_and_the_other_can_be(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as file:
        streams = {size: add_stream(file, "mpeg4", size) for size in ((48, 32), (96, 64))}
        streams[48, 32].disposition = 0
        streams[96, 64].disposition = av.stream.Disposition.default.value
        for size, stream in streams.items():
            encode(file, stream, moving_pictures(10, *size))
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (96, 64)
    with VideoReader(path, stream_index=0) as reader:
        assert (reader.width, reader.height) == (48, 32)
        assert reader.read([9]).frames.shape == (1, 32, 48, 3)


@pytest.mark.parametrize("stream_index", [-1, 1, 7])
def test_a_stream_that_is_no_video_stream_is_refused(tmp_path: Path, stream_index: int) -> None:
    path = render(tmp_path / "one.mp4", num_frames=3)
    with pytest.raises(ValueError, match=f"stream_index is {stream_index}; the video streams.* 0"):
        VideoReader(path, stream_index=stream_index)


class FakeAcceleration:
    """What stands for `HWAccel` of PyAV: a device that opens, or does not."""

    error: Exception | None = None

    def __init__(self, device: str, *, allow_software_fallback: bool) -> None:
        assert device == "cuda"
        assert not allow_software_fallback

    def create(self, codec: av.Codec) -> FakeAcceleration:
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture
def opened_with(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A machine with a GPU; gives the acceleration that each file was opened with."""
    given: list[object] = []
    av_open = av.open

    def open_without(*arguments: object, **options: object) -> object:
        if "hwaccel" in options:
            given.append(options.pop("hwaccel"))
        return av_open(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(hwaccel, "HWAccel", FakeAcceleration)
    monkeypatch.setattr(hwaccel, "hwdevices_available", lambda: ["cuda"])
    monkeypatch.setattr(opening, "_is_decoded_on_device", lambda _: True)
    monkeypatch.setattr(av, "open", open_without)
    return given


def test_nvdec_is_asked_for_and_may_not_be_replaced(
    rendered_video: Path, opened_with: list[object]
) -> None:
    with VideoReader(rendered_video, decoder="nvdec") as reader:
        frames = reader.read([3, 20]).frames
    assert opened_with
    assert all(isinstance(given, FakeAcceleration) for given in opened_with)
    with VideoReader(rendered_video) as reader:
        np.testing.assert_array_equal(reader.read([3, 20]).frames, frames)
    assert opened_with[-1] is None


def test_a_codec_that_nvdec_lacks_is_no_fallback(
    rendered_video: Path, opened_with: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_is_decoded_on_device", lambda _: False)
    with pytest.raises(VideoError, match="codec h264, which nvdec cannot decode; ask for the dec"):
        VideoReader(rendered_video, decoder="nvdec")


@pytest.mark.parametrize("error", [av.ExternalError(-1, "no driver"), NotImplementedError("no")])
def test_nvdec_without_a_device_is_an_error_of_the_machine(
    rendered_video: Path,
    opened_with: list[object],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeAcceleration, "error", error)
    with pytest.raises(DecoderUnavailableError, match=r"no cuda device can be opened .*software"):
        VideoReader(rendered_video, decoder="nvdec")
    assert opened_with == []


def test_nvdec_in_a_build_without_it_is_an_error_of_the_build(
    rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hwaccel, "hwdevices_available", list)
    with pytest.raises(DecoderUnavailableError, match="this build of PyAV knows no cuda devices"):
        VideoReader(rendered_video, decoder="nvdec")


def test_a_decoder_that_there_is_none_of_is_named(rendered_video: Path) -> None:
    with pytest.raises(ValueError, match="decoder is 'gpu'; it must be 'software' or 'nvdec'"):
        VideoReader(rendered_video, decoder="gpu")  # type: ignore[arg-type]
