"""How sources are written, and what of them is shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actionclip_deploy.errors import VideoError
from actionclip_deploy.video import expand_sources, parse_source
from actionclip_deploy.video.sources import ffmpeg_arguments, mask_addresses


@pytest.mark.parametrize(
    ("text", "kind", "address", "name"),
    [
        ("0", "camera", "/dev/video0", "video0"),
        ("/dev/video12", "camera", "/dev/video12", "video12"),
        ("0?size=640x480&fps=15", "camera", "/dev/video0?size=640x480&fps=15", "video0"),
        ("/dev/v4l/by-id/door", "camera", "/dev/v4l/by-id/door", "door"),
        ("rtsp://host:554/a/b", "rtsp", "rtsp://host:554/a/b", "host:554/a/b"),
        ("RTSPS://host/a", "rtsp", "rtsps://host/a", "host/a"),
        ("http://host/v.m3u8", "http", "http://host/v.m3u8", "host/v.m3u8"),
        ("https://host/mjpg?fps=5", "http", "https://host/mjpg?fps=5", "host/mjpg"),
        ("rtmp://host/live/x", "rtmp", "rtmp://host/live/x", "host/live/x"),
        ("udp://@:5000", "udp", "udp://@:5000", ":5000"),
        ("udp://239.0.0.1:5000?pkt_size=1316", "udp", None, "239.0.0.1:5000"),
        ("rtp://host:5004", "rtp", "rtp://host:5004", "host:5004"),
        ("tcp://host:9", "tcp", "tcp://host:9", "host:9"),
        ("screen", "screen", "screen", "screen"),
        ("screen?size=64x48&at=10,20", "screen", "screen?size=64x48&at=10,20", "screen"),
        ("test:", "test", "test:", "test"),
        ("test:clock?fps=25", "test", "test:clock?fps=25", "test"),
        ("-", "pipe", "-", "pipe"),
    ],
)
def test_each_form_of_a_source_is_known(
    text: str, kind: str, address: str | None, name: str
) -> None:
    source = parse_source(text, environ={})
    assert (source.kind, source.address, source.name) == (kind, address or text, name)
    assert source.is_live == (kind != "pipe")


def test_files_and_named_pipes_are_known_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    os.mkfifo(tmp_path / "b")
    file, pipe = (parse_source(str(tmp_path / name)) for name in ("a.mp4", "b"))
    assert (file.kind, file.is_live, file.name) == ("file", False, str(tmp_path / "a.mp4"))
    assert (pipe.kind, pipe.is_live) == ("pipe", False)
    assert parse_source("0", name="door").name == "door"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", ValueError, "empty"),
        ("rtsp://", ValueError, "names no host; give it as rtsp://HOST/PATH"),
        ("file:///etc/passwd", ValueError, "give its path"),
        ("file:/etc/passwd", ValueError, "give its path"),
        ("gopher://host/", ValueError, "expected one of http, https, rtmp"),
        ("srt://host:9", VideoError, "has no srt.*as RTSP"),
        ("rist://host:9", VideoError, "has no rist"),
        ("s3://bucket/a", VideoError, "has no s3"),
        ("test:pattern", ValueError, "give test: or test:clock"),
        ("0?codec=h264", ValueError, "expected format, fps, size"),
        ("screen?size=big", ValueError, "size=big is not an option"),
        ("no/such/file.mp4", VideoError, "There is no file"),
        ("concat:a.mp4|b.mp4", VideoError, "There is no file"),
        (".", VideoError, "is a folder"),
        ("rtsp://u:${PASSWORD}@host/", ValueError, "environment variable PASSWORD, which is not"),
    ],
)
def test_what_is_no_source_is_told_in_a_sentence(
    text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        parse_source(text, environ={})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:geheim@host/a", "rtsp://***@host/a"),
        ("rtsp://admin@host/a", "rtsp://***@host/a"),
        # Wrongly written: a password with what ends the name of a host.
        ("rtsp://admin:ge/he@im@host/a", "rtsp://***@host/a"),
        ("http://host/a?token=geheim&channel=2", "http://host/a?token=***&channel=2"),
        ("http://host/a?geheim", "http://host/a?***"),
        ("http://u:p@host/v.m3u8?a=1;b=2", "http://***@host/v.m3u8?a=***"),
        ("rtsp://host/a?udp", "rtsp://host/a?udp"),
    ],
)
def test_users_passwords_and_queries_are_not_shown(text: str, shown: str) -> None:
    source = parse_source(text, environ={})
    assert source.shown == shown
    assert "geheim" not in repr(source) + source.name + source.shown
    assert source.address == text
    line = f"method DESCRIBE failed: 401 for '{text}' and {text}"
    assert source.mask(line) == f"method DESCRIBE failed: 401 for '{shown}' and {shown}"


@pytest.mark.parametrize("unseen", ["s3cret/pass@word", "s3cret%2Fpass%40word"])
def test_a_variable_is_filled_in_in_percent_and_hidden_in_every_spelling(unseen: str) -> None:
    environ = {"CAMERA_PASSWORD": "s3cret/pass@word", "TOKEN": "t&=k n"}
    source = parse_source("rtsp://u:${CAMERA_PASSWORD}@host/a?token=${TOKEN}", environ=environ)
    assert source.address == "rtsp://u:s3cret%2Fpass%40word@host/a?token=t%26%3Dk%20n"
    assert source.shown == "rtsp://***@host/a?token=***"
    assert unseen not in source.mask(f"wrong password {unseen} for host/a")


def test_a_secret_in_the_path_comes_from_a_variable_and_is_hidden() -> None:
    source = parse_source("rtmp://host/live/${KEY}", environ={"KEY": "abcd-1234"})
    assert source.address == "rtmp://host/live/abcd-1234"
    assert source.name == "host/live/***"
    assert source.mask("opening abcd-1234 failed") == "opening *** failed"


def test_a_variable_can_be_the_whole_source() -> None:
    source = parse_source("${CAMERA}", environ={"CAMERA": "rtsp://u:p4ss@host/a"})
    assert (source.kind, source.shown) == ("rtsp", "rtsp://***@host/a")


def test_addresses_of_others_are_masked_in_a_text_too() -> None:
    line = "Opening 'http://u:p@host/seg1.ts?sig=abc' for reading"
    assert mask_addresses(line) == "Opening 'http://***@host/seg1.ts?sig=***' for reading"


def test_patterns_and_folders_stand_for_their_files(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4", "notes.txt", "[x].mp4"):
        (tmp_path / name).write_bytes(b"x")
    names = [source.name for source in expand_sources([f"{tmp_path}/?.mp4", "0"])]
    assert names == [f"{tmp_path}/a.mp4", f"{tmp_path}/b.mp4", "video0"]
    # A name that is one is no pattern.
    assert [s.name for s in expand_sources([f"{tmp_path}/[x].mp4"])] == [f"{tmp_path}/[x].mp4"]
    folder = [Path(source.name).name for source in expand_sources([str(tmp_path)])]
    assert folder == ["[x].mp4", "a.mp4", "b.mp4"]
    assert expand_sources(["http://host/a?b=1"])[0].kind == "http"
    devices = ["test:?fps=40", "test:clock?fps=5", "0?fps=15", "/dev/video0?fps=15", "screen?fps=5"]
    kinds = [source.kind for source in expand_sources(devices)]
    assert kinds == ["test", "test", "camera", "camera", "screen"]
    with pytest.raises(VideoError, match="No video is at"):
        expand_sources([f"{tmp_path}/*.mkv"])


def test_what_a_connection_may_open_excludes_files() -> None:
    for text in ("rtsp://h/a", "http://h/a", "rtmp://h/a", "udp://h:1", "rtp://h:1", "tcp://h:1"):
        source = parse_source(text)
        address, _, options = ffmpeg_arguments(source, max_pixels=100, timeout_seconds=1.5)
        assert address == text
        allowed = options["protocol_whitelist"].split(",")
        assert not {"file", "fd", "pipe", "concat", "concatf", "subfile", "data"} & {*allowed}
        assert not {"concat", "image2", "lavfi"} & {*options["format_whitelist"].split(",")}
        limit = "rw_timeout" if text.startswith("rtmp") else "timeout"
        assert options[limit] == "1500000"
        # For RTMP it would mean to listen.
        assert ("timeout" in options) == (not text.startswith("rtmp"))


def test_cameras_and_screens_are_opened_with_their_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPLAY", ":7")
    camera = parse_source("/dev/video2?size=640x480&fps=15&format=mjpeg")
    address, form, options = ffmpeg_arguments(camera, max_pixels=100, timeout_seconds=1)
    assert (address, form) == ("/dev/video2", "video4linux2,v4l2")
    del options["max_pixels"]
    assert options == {"video_size": "640x480", "framerate": "15", "input_format": "mjpeg"}
    screen = parse_source("screen?size=64x48&at=10,20")
    address, form, options = ffmpeg_arguments(screen, max_pixels=100, timeout_seconds=1)
    assert (address, form) == (":7+10,20", "x11grab")
    assert (options["video_size"], options["framerate"]) == ("64x48", "15")
