"""Videos like those of public bug reports, of which other readers give wrong frames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import video_kinds
from rendering import render
from video_kinds import BY_NAME, Decoded, copied_to, with_clap

from actionclip_deploy.errors import VideoError, VideoWarning
from actionclip_deploy.video import VideoReader, read_clip


def assert_every_frame_alone_is_that_of_the_whole(path: Path) -> None:
    whole = Decoded(path)
    for index, frame in enumerate(whole.frames):
        with VideoReader(path) as reader:
            assert reader.num_frames == len(whole.frames)
            np.testing.assert_array_equal(reader.read([index]).frames[0], frame)


@pytest.mark.parametrize("container", ["mkv", "mp4", "flv", "ts"])
@pytest.mark.parametrize("stream", ["h264-b2", "h264-pyramid", "hevc-b3", "mpeg4-b2", "mpeg2-b2"])
def test_b_frames_with_the_times_of_their_decoding(
    tmp_path: Path, stream: str, container: str
) -> None:
    if (stream, container) in {("mpeg4-b2", "flv"), ("mpeg2-b2", "flv"), ("mpeg4-b2", "ts")}:
        pytest.skip("the container does not take it, or loses the stream's header")
    path = tmp_path / f"a.{container}"
    video_kinds.write(path, BY_NAME[stream], video_kinds.pts_are_dts)
    assert_every_frame_alone_is_that_of_the_whole(path)
    with VideoReader(path) as reader:
        assert "has a time that its frame is not shown at" in str(reader.fallback_reason)
        assert (np.diff(reader.pts_seconds) > 0).all()


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "flv"])
@pytest.mark.parametrize("stream", ["h264-flash", "h264-open", "h264-refresh", "hevc-open"])
def test_keyframes_that_do_not_stand_for_themselves(
    tmp_path: Path, stream: str, container: str
) -> None:
    path = tmp_path / f"a.{container}"
    video_kinds.write(path, BY_NAME[stream], video_kinds.with_recovery_points)
    if stream == "h264-flash":
        with av.open(str(path)) as file:
            assert sum(p.is_keyframe for p in file.demux(video=0) if p.size) > 1
    assert_every_frame_alone_is_that_of_the_whole(path)


@pytest.mark.parametrize("container", ["ts", "flv", "mpg"])
def test_a_clock_that_starts_again_keeps_both_parts_in_order(
    tmp_path: Path, container: str, recwarn: pytest.WarningsRecorder
) -> None:
    stream = BY_NAME["mpeg2-b2" if container == "mpg" else "h264-b2"]
    (kind,) = (k for k in video_kinds._joined(stream, container) if k.change == "twice")
    path = kind.make(tmp_path)
    whole = Decoded(path)
    with VideoReader(path) as reader:
        clip = reader.read(range(reader.num_frames))
        assert "the clock starts again" in str(reader.fallback_reason)
        times = reader.pts_seconds
        assert reader.duration_seconds == pytest.approx(len(times) / 25, abs=0.05)
    np.testing.assert_array_equal(clip.frames, np.stack(whole.frames))
    assert (np.diff(times) < 0).sum() == 1
    np.testing.assert_allclose(times, np.array(whole.pts) * whole.time_base)
    assert not [w for w in recwarn if issubclass(w.category, VideoWarning)]


@pytest.mark.parametrize("container", ["ts", "mpg"])
def test_a_clock_that_wraps_is_no_damage(
    tmp_path: Path, container: str, recwarn: pytest.WarningsRecorder
) -> None:
    stream = BY_NAME["mpeg2-b2" if container == "mpg" else "h264-b2"]
    path = video_kinds.write(tmp_path / f"a.{container}", stream, video_kinds._WRAPS)
    with VideoReader(path) as reader:
        assert reader.num_frames == video_kinds.NUM_FRAMES
        assert reader.fallback_reason is None or container == "mpg"
    assert not [w for w in recwarn if issubclass(w.category, VideoWarning)]


REPORTED = {
    "A_clock_restarts.flv": 60,
    "A_recording_clock_restarts.flv": 60,
    "B1_noctts.mp4": 58,
    "B2_rawcopy.mp4": 58,
    "B3_setts.mkv": 60,
    "B8_mpeg4.mkv": 60,
    "B9_gop4.mkv": 96,
    "B9_gop4.mp4": 95,
    "L1_wrap.ts": 60,
    "O2_exif.avi": 12,
    "O2_exif.mov": 12,
}


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_reported_files_give_the_frames_of_decoding_everything(
    shared: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = shared / "cases" / name
    assert_every_frame_alone_is_that_of_the_whole(path)
    with VideoReader(path) as reader:
        assert reader.num_frames == REPORTED[name]
        assert (reader.fallback_reason is None) == (name[0] in "LO")
    assert not [w for w in recwarn if issubclass(w.category, VideoWarning)]


def test_the_clip_of_a_recording_that_went_on(shared: Path) -> None:
    path = shared / "cases" / "A_recording_clock_restarts.flv"
    clip = read_clip(path)
    indices = [3, 10, 18, 25, 33, 40, 48, 55]
    assert clip.indices.tolist() == indices
    whole = Decoded(path)
    np.testing.assert_array_equal(clip.frames, np.stack([whole.frames[i] for i in indices]))


@pytest.mark.parametrize("name", ["O1_exif.jpg", "O4_exif.png"])
def test_pictures_are_turned_as_exif_says(shared: Path, name: str) -> None:
    with VideoReader(shared / "cases" / name) as reader:
        assert (reader.width, reader.height) == (64, 96)
        assert reader.read([0]).frames.shape == (1, 96, 64, 3)


@pytest.mark.parametrize("name", ["F7_av1mono_tv.mkv", "F7_hevcmono_tv.mp4", "F7_420_tv.mp4"])
def test_gray_of_limited_range_is_stretched(shared: Path, name: str) -> None:
    frame = read_clip(shared / "cases" / name, num_frames=1).frames[0]
    np.testing.assert_allclose(frame[30, [0, 48, 95], 0], [0, 128, 255], atol=2)


@pytest.fixture
def cropped(tmp_path: Path) -> Path:
    return with_clap(render(tmp_path / "a.mp4", num_frames=6), 80, 48)


def test_the_window_that_mp4_asks_for_is_shown(cropped: Path) -> None:
    whole = Decoded(cropped)
    with VideoReader(cropped) as reader:
        assert (reader.width, reader.height) == (80, 48)
        np.testing.assert_array_equal(reader.read([3]).frames[0], whole.frames[3][8:56, 8:88])


def test_the_cropping_that_matroska_asks_for_is_done(cropped: Path, tmp_path: Path) -> None:
    path = copied_to(tmp_path / "b.mkv", cropped)
    assert b"\x54\xbb\x81\x08" in path.read_bytes()
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (80, 48)


def test_what_pyav_raises_over_a_video_is_a_video_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = render(tmp_path / "a.mp4", num_frames=6)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("31 is not a valid Type")

    with VideoReader(path) as reader:
        monkeypatch.setattr("actionclip_deploy.video.reader.chosen_frames", fail)
        with pytest.raises(VideoError, match=r"cannot be decoded \(ValueError: 31 is not"):
            reader.read([3])
    monkeypatch.setattr("actionclip_deploy.video.reader.scan_packets", fail)
    with pytest.raises(VideoError, match=r"cannot be decoded .*; convert it"):
        VideoReader(path)


def test_frames_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    path = render(
        tmp_path / "uhd.mp4",
        pictures=[np.full((2160, 3840, 3), 90, np.uint8)] * 2,
        options={"preset": "ultrafast"},
    )
    program = (
        "import gc, os, sys; from actionclip_deploy.video import read_clip; gc.disable()\n"
        # Not the largest of getrusage, which is inherited from the process of the tests.
        "pages = lambda: int(open('/proc/self/statm').read().split()[1])\n"
        "for turn in range(14):\n"
        "    read_clip(sys.argv[1], num_frames=1)\n"
        "    if turn == 3: before = pages()\n"
        "print((pages() - before) * os.sysconf('SC_PAGE_SIZE') / 2**20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    # 10 videos; each that kept a frame took 12 MB.
    assert float(done.stdout) < 40, done.stdout
