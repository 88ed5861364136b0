from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rendering import decode_everything, encode, moving_pictures, render, to_rgb

from actionclip_deploy.errors import ShapeError, VideoError, VideoWarning
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video import Clip, VideoReader, packets, read_clip
from actionclip_deploy.video.reader import list_videos

FRAMES = np.zeros((2, 4, 6, 3), np.uint8)
INDICES = np.array([0, 5], np.int64)
PTS = np.array([0.0, 0.2])


def test_a_clip_knows_its_size() -> None:
    clip = Clip(FRAMES, INDICES, PTS)
    assert (clip.num_frames, clip.height, clip.width) == (2, 4, 6)


@pytest.mark.parametrize(
    ("frames", "indices", "pts_seconds", "message"),
    [
        (FRAMES.astype(np.float32), INDICES, PTS, "frames are float32.*expected uint8 RGB"),
        (FRAMES[0], INDICES, PTS, r"shape \(4, 6, 3\); expected uint8 RGB of shape \(T, H, W, 3\)"),
        (FRAMES[..., :1], INDICES, PTS, r"shape \(2, 4, 6, 1\)"),
        (FRAMES[:0], INDICES[:0], PTS[:0], "T, H and W of 1 or more"),
        (
            FRAMES,
            INDICES[:1],
            PTS,
            r"indices is int64 of shape \(1,\); expected int64 of shape \(2,\)",
        ),
        (FRAMES, INDICES.astype(np.int32), PTS, "indices is int32"),
        (FRAMES, INDICES, PTS.astype(np.float32), "pts_seconds is float32.*expected float64"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(frames, indices, pts_seconds, message) -> None:
    with pytest.raises(ShapeError, match=message):
        Clip(frames, indices, pts_seconds)


NUM_FRAMES = 30
X264_OPEN = {"x264-params": "open-gop=1:b-pyramid=normal:keyint=10:min-keyint=10:scenecut=0"}
X265_OPEN = {"x265-params": "log-level=none:open-gop=1:keyint=10:min-keyint=10:scenecut=0"}
X265_LAYERS = {"x265-params": "log-level=none:temporal-layers=3:keyint=16:bframes=7"}
VP8 = {"b": "200k", "cpu-used": "8"}
VP9_HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k", "cpu-used": "8"}
AV1 = {"preset": "12", "svtav1-params": "keyint=12"}

# Name -> file name, how to render it.
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("a.mp4", {}),
    "h264 without B-frames": ("a.mp4", {"b_frames": 0}),
    "h264 in one group": ("a.mkv", {"group": 500, "b_frames": 3}),
    "h264 of keyframes alone": ("a.mp4", {"group": 1, "b_frames": 0}),
    "h264 with open groups": ("a.mkv", {"options": X264_OPEN, "b_frames": 4}),
    "h264 interlaced": ("a.ts", {"options": {"x264-params": "interlaced=1:tff=1"}}),
    "h264 in pieces": ("a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264 in FLV": ("a.flv", {}),
    "h264 of 10 bits": ("a.mp4", {"pix_fmt": "yuv420p10le"}),
    "h264 4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}),
    "h264 of an odd size": ("a.mp4", {"pix_fmt": "yuv444p", "size": (97, 65)}),
    "hevc with open groups": (
        "a.mp4",
        {"codec": "libx265", "options": X265_OPEN, "b_frames": 4},
    ),
    "hevc in layers": ("a.mp4", {"codec": "libx265", "options": X265_LAYERS}),
    "hevc without a record": ("a.ts", {"codec": "libx265", "options": X265_OPEN}),
    "vp8": ("a.webm", {"codec": "libvpx", "options": VP8}),
    "vp9 with hidden frames": ("a.webm", {"codec": "libvpx-vp9", "options": VP9_HIDDEN}),
    "av1": ("a.mkv", {"codec": "libsvtav1", "options": AV1}),
    "mpeg4": ("a.avi", {"codec": "mpeg4", "b_frames": 0}),
    "mpeg4 with B-frames": ("a.mp4", {"codec": "mpeg4"}),
    "mpeg2": ("a.ts", {"codec": "mpeg2video"}),
    "mpeg1": ("a.mkv", {"codec": "mpeg1video"}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "b_frames": 0}),
    "ffv1": ("a.mkv", {"codec": "ffv1", "b_frames": 0}),
    "prores": ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "b_frames": 0}),
    "no B-frames in AVI": ("a.avi", {"b_frames": 0}),
    "mpeg4 B-frames in AVI": ("a.avi", {"codec": "mpeg4"}),
    "keyframes that are none": (
        "a.mp4",
        {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    ),
}
# Those where decoding from a keyframe cannot be relied on, and the reason that is given.
FALLBACKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "B-frames in AVI": ("a.avi", {}, "stores no presentation times"),
    "no times at all": ("a.h264", {}, "packets without a presentation time"),
    "an unusual codec": (
        "a.mov",
        {"codec": "qtrle", "pix_fmt": "rgb24", "b_frames": 0},
        "codec qtrle may depend on any earlier one",
    ),
}


@pytest.fixture(autouse=True)
def _no_warning_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        yield


def index_sets(num_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(num_frames)
    last = num_frames - 1
    return [
        sample_segments(num_frames, 8),
        np.array([0]),
        np.array([last]),
        np.array([last, 0, last // 2, last // 2, 0, last]),
        *rng.integers(0, num_frames, (3, 4)),
        np.sort(rng.integers(0, num_frames, 6)),
        np.arange(num_frames)[::-1],
    ]


def assert_equal_to_decoding_everything(reader: VideoReader, frames: list[av.VideoFrame]) -> None:
    assert reader.num_frames == len(frames)
    for indices in index_sets(len(frames)):
        clip = reader.read(indices)
        assert np.array_equal(clip.indices, indices)
        assert np.array_equal(clip.pts_seconds, reader.pts_seconds[indices])
        for place, index in enumerate(indices):
            assert np.array_equal(clip.frames[place], to_rgb(frames[index])), (indices, index)


@pytest.mark.parametrize("name", ENCODINGS)
def test_chosen_frames_equal_those_of_decoding_everything(tmp_path: Path, name: str) -> None:
    file_name, arguments = ENCODINGS[name]
    path = render(tmp_path / file_name, num_frames=NUM_FRAMES, **arguments)
    frames = decode_everything(path)
    assert len(frames) == NUM_FRAMES
    with VideoReader(path) as reader:
        assert_equal_to_decoding_everything(reader, frames)
        assert reader.fallback_reason is None
        assert reader.pts_seconds == pytest.approx([float(f.time) for f in frames], abs=1e-9)


@pytest.mark.parametrize("name", FALLBACKS)
def test_where_packets_mislead_everything_is_decoded(tmp_path: Path, name: str) -> None:
    file_name, arguments, reason = FALLBACKS[name]
    path = render(tmp_path / file_name, num_frames=NUM_FRAMES, **arguments)
    frames = decode_everything(path)
    with VideoReader(path) as reader:
        assert_equal_to_decoding_everything(reader, frames)
        assert reason in str(reader.fallback_reason)
        assert (np.diff(reader.pts_seconds) > 0).all()
        assert reader.duration_seconds == pytest.approx(NUM_FRAMES / 25, abs=0.081)


@pytest.mark.parametrize(
    "name", ["h264", "h264 with open groups", "hevc with open groups", "mpeg4 with B-frames", "av1"]
)
def test_threads_do_not_change_frames(tmp_path: Path, name: str) -> None:
    file_name, arguments = ENCODINGS[name]
    path = render(tmp_path / file_name, num_frames=NUM_FRAMES, **arguments)
    with VideoReader(path, num_threads=3) as reader:
        assert_equal_to_decoding_everything(reader, decode_everything(path))
        assert reader.fallback_reason is None


@pytest.mark.parametrize("name", ["h264 with open groups", "mpeg4", "vp8"])
def test_videos_too_large_to_keep_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(packets, "MAX_KEPT_BYTES", 1000)
    file_name, arguments = ENCODINGS[name]
    path = render(tmp_path / file_name, num_frames=NUM_FRAMES, **arguments)
    with VideoReader(path) as reader:
        assert_equal_to_decoding_everything(reader, decode_everything(path))


def test_hidden_frames_of_vp8_have_no_number(tmp_path: Path) -> None:
    path = render(tmp_path / "a.webm", num_frames=NUM_FRAMES, codec="libvpx", options=VP8)
    with av.open(str(path)) as file:
        hidden = bytes([packet for packet in file.demux(video=0) if packet.size][14])
    content = bytearray(path.read_bytes())
    content[content.index(hidden)] &= ~0x10  # show_frame
    path.write_bytes(content)
    frames = decode_everything(path)
    assert len(frames) == NUM_FRAMES - 1
    with VideoReader(path) as reader:
        assert_equal_to_decoding_everything(reader, frames)
        assert reader.fallback_reason is None


def test_what_a_reader_tells_about_a_video(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=50, size=(80, 48))
    with VideoReader(str(path)) as reader:
        assert reader.path == path
        assert (reader.num_frames, reader.codec, reader.average_fps) == (50, "h264", 25.0)
        assert (reader.width, reader.height, reader.rotation_degrees) == (80, 48, 0)
        assert reader.duration_seconds == pytest.approx(2.0)
        assert reader.pts_seconds == pytest.approx(np.arange(50) / 25)
    # What was told stays true after closing.
    assert (reader.num_frames, reader.codec, reader.average_fps) == (50, "h264", 25.0)


def test_times_of_a_variable_rate_are_kept(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).integers(1, 6, NUM_FRAMES)
    pts = (np.cumsum(steps) - steps[0]).tolist()
    path = render(tmp_path / "a.mkv", num_frames=NUM_FRAMES, pts=pts)
    with VideoReader(path) as reader:
        # Matroska counts milliseconds.
        assert reader.pts_seconds == pytest.approx(np.array(pts) / 25, abs=0.0006)
        assert_equal_to_decoding_everything(reader, decode_everything(path))


@pytest.mark.parametrize("file_name", ["a.mkv", "a.ts", "a.mp4"])
def test_a_start_other_than_zero_is_kept(tmp_path: Path, file_name: str) -> None:
    path = render(tmp_path / file_name, num_frames=10, pts=[100 + i for i in range(10)])
    expected = [float(frame.time) for frame in decode_everything(path)]
    assert expected[0] > 3.5
    with VideoReader(path) as reader:
        assert reader.pts_seconds == pytest.approx(expected)
        assert reader.duration_seconds == pytest.approx(0.4, abs=0.002)
        assert reader.read([3]).pts_seconds[0] == pytest.approx(expected[3])


@pytest.mark.parametrize("num_skipped", [5, 12, 17])
def test_frames_outside_of_an_edit_list_do_not_count(tmp_path: Path, num_skipped: int) -> None:
    path = render(tmp_path / "a.mp4", num_frames=NUM_FRAMES)
    whole = [to_rgb(frame) for frame in decode_everything(path)]
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 4 + 8
    duration, start = struct.unpack_from(">Ii", content, entry)
    # The track counts 512 to a frame, the movie 1000 to a second.
    struct.pack_into(">Ii", content, entry, duration - 40 * num_skipped, start + 512 * num_skipped)
    path.write_bytes(content)
    with VideoReader(path) as reader:
        assert reader.num_frames == NUM_FRAMES - num_skipped
        assert reader.fallback_reason is None
        assert_equal_to_decoding_everything(reader, decode_everything(path))
        clip = reader.read(np.arange(reader.num_frames))
    assert np.array_equal(clip.frames, np.stack(whole[num_skipped:]))
    assert clip.pts_seconds == pytest.approx(np.arange(NUM_FRAMES - num_skipped) / 25)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9", "ffv1"])
def test_a_video_of_one_frame_is_read(tmp_path: Path, codec: str) -> None:
    path = render(tmp_path / "a.mkv", num_frames=1, codec=codec, b_frames=0)
    clip = read_clip(path, num_frames=4)
    assert clip.indices.tolist() == [0, 0, 0, 0]
    assert np.array_equal(clip.frames[3], to_rgb(decode_everything(path)[0]))


def test_a_video_shorter_than_the_clip_gives_its_frames_repeatedly(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=5)
    clip = read_clip(path, num_frames=8)
    assert clip.indices.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    frames = [to_rgb(frame) for frame in decode_everything(path)]
    assert np.array_equal(clip.frames, np.stack([frames[i] for i in clip.indices]))


def test_the_clip_of_the_original_is_read_by_default(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=300, size=(32, 32))
    clip = read_clip(path)
    assert clip.indices.tolist() == [18, 55, 93, 130, 168, 205, 243, 280]
    assert clip.pts_seconds == pytest.approx(clip.indices / 25)


@pytest.mark.parametrize("file_name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.webm", "a.gif"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_frames_of_a_cut_off_video_are_used(
    tmp_path: Path, file_name: str, share: float
) -> None:
    codec = {"a.avi": "mpeg4", "a.webm": "libvpx-vp9", "a.gif": "gif"}.get(file_name, "libx264")
    path = render(
        tmp_path / file_name,
        num_frames=100,
        codec=codec,
        b_frames=0 if file_name == "a.avi" else 2,
        pix_fmt="rgb8" if codec == "gif" else "yuv420p",
        container_options={"movflags": "faststart"} if file_name == "a.mp4" else None,
    )
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    frames = decode_everything(path)
    assert 0 < len(frames) < 100
    # These two do not say how long they are.
    knows_its_length = file_name not in ("a.ts", "a.gif")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoReader(path) as reader:
            clip = reader.read_sampled(lambda count: sample_segments(count, 8))
    assert reader.num_frames == len(frames)
    assert clip.indices.tolist() == sample_segments(len(frames), 8).tolist()
    for row, index in zip(clip.frames, clip.indices, strict=True):
        assert np.array_equal(row, to_rgb(frames[index]))
    if knows_its_length:
        assert [warning.category for warning in caught] == [VideoWarning]
        assert f"The {len(frames)} frames that" in str(caught[0].message)


def test_a_video_without_a_whole_frame_is_an_error(tmp_path: Path) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"}
    path = render(tmp_path / "a.mp4", container_options=options)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moof") + 4])
    with pytest.raises(VideoError, match="gives no frame: none of its 0 packets could be decoded"):
        VideoReader(path)


def test_a_part_that_was_never_written_is_found_when_opening(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    content = path.read_bytes()
    kept = int(0.6 * len(content))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))
    frames = decode_everything(path)
    assert 0 < len(frames) < NUM_FRAMES
    with pytest.warns(VideoWarning, match=f"The {len(frames)} frames that could be decoded"):
        reader = VideoReader(path)
    with reader:
        assert_equal_to_decoding_everything(reader, frames)


def break_packet(path: Path, number: int) -> None:
    """Overwrite the slice of an H.264 packet but for its first numbers, and leave its length."""
    with av.open(str(path)) as file:
        broken = [packet for packet in file.demux(video=0) if packet.size][number]
        start, size = broken.pos, broken.size
    content = bytearray(path.read_bytes())
    assert content[start : start + 4] == struct.pack(">I", size - 4)
    content[start + 8 : start + size] = b"\xff" * (size - 8)
    path.write_bytes(content)


def test_damage_that_shows_while_reading_changes_the_number_of_frames(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", b_frames=0, group=NUM_FRAMES)
    break_packet(path, 20)
    frames = decode_everything(path)
    assert len(frames) == NUM_FRAMES - 1
    with VideoReader(path) as reader:
        assert reader.num_frames == NUM_FRAMES
        with pytest.warns(VideoWarning, match=r"is damaged: packet 20 .* The 29 frames that could"):
            clip = reader.read([3, 29])
        assert reader.num_frames == len(reader.pts_seconds) == 29
        assert "packet 20" in str(reader.fallback_reason)
        assert clip.indices.tolist() == [3, 28]
        assert np.array_equal(clip.frames[1], to_rgb(frames[28]))
        assert_equal_to_decoding_everything(reader, frames)


def test_a_sampler_is_asked_again_when_the_number_of_frames_changes(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", b_frames=0, group=NUM_FRAMES)
    break_packet(path, 20)
    asked = []

    def sample(num_frames: int) -> np.ndarray:
        asked.append(num_frames)
        return np.array([0, num_frames - 1])

    with VideoReader(path) as reader, pytest.warns(VideoWarning):
        clip = reader.read_sampled(sample)
    assert asked == [30, 29]
    assert clip.indices.tolist() == [0, 28]


def test_damage_elsewhere_does_not_disturb_a_group(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", b_frames=0, group=10)
    whole = decode_everything(path)
    break_packet(path, 25)
    with VideoReader(path) as reader:
        assert np.array_equal(reader.read([12]).frames[0], to_rgb(whole[12]))
        assert reader.fallback_reason is None


def test_damage_is_warned_of_once(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoReader(path) as reader:
            reader.read([0])
            reader.read([reader.num_frames - 1])
    assert len(caught) == 1


def test_indices_that_are_no_frames_are_refused(tmp_path: Path) -> None:
    with VideoReader(render(tmp_path / "a.mp4", num_frames=6)) as reader:
        with pytest.raises(ValueError, match=r"index 6 is not a frame .* \[0, 6\)"):
            reader.read([0, 6])
        with pytest.raises(ValueError, match="index -1 is not a frame"):
            reader.read(np.array([-1]))
        with pytest.raises(ValueError, match=r"shape \(0,\); expected integers of shape \(T,\)"):
            reader.read([])
        with pytest.raises(ValueError, match="indices are float64"):
            reader.read(np.array([0.0]))
        with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
            reader.read(np.array([[0, 1]]))


def test_a_closed_reader_reads_no_more(tmp_path: Path) -> None:
    reader = VideoReader(render(tmp_path / "a.mp4", num_frames=3))
    reader.close()
    reader.close()
    with pytest.raises(VideoError, match=r"a\.mp4 is closed; open it again"):
        reader.read([0])


def test_a_number_of_threads_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=3)
    with pytest.raises(ValueError, match="num_threads is 0; it must be 1 or more"):
        read_clip(path, num_threads=0)


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 400, 400, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        video = file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((400, 400, 3), np.uint8), format="rgb24")
        encode(file, cover, [picture.reformat(format="yuvj420p")])
        encode(file, video, moving_pictures(4))
    with VideoReader(path) as reader:
        assert (reader.num_frames, reader.width) == (4, 96)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.MKV", "notes.txt", ".hidden.mp4", "in/c.webm", ".cache/d.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("recursive", "names"),
    [(False, ["a.MKV", "b.mp4"]), (True, ["a.MKV", "b.mp4", "in/c.webm"])],
)
def test_videos_are_known_by_their_suffixes(
    folder: Path, recursive: bool, names: list[str]
) -> None:
    found = list_videos(folder, recursive=recursive)
    assert [path.relative_to(folder).as_posix() for path in found] == names


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    told: list[OSError] = []
    assert list_videos(tmp_path / "missing", recursive=True, on_error=told.append) == []
    assert [type(error) for error in told] == [FileNotFoundError]
