"""The frames of samples, and the cache of decoded ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actionclip_deploy.errors import FrameSizeError, TrainingError, VideoError
from actionclip_deploy.evaluate import frames as frames_module
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.frames import FrameCache, open_frames
from actionclip_deploy.train.data import SampleKey, VideoClips
from actionclip_deploy.video import Clip, VideoReader


def _picture_folder(folder: Path, num_frames: int = 6, first: int = 1) -> Path:
    """Lossless pictures whose number is their brightness."""
    folder.mkdir()
    for number in range(num_frames):
        picture = Image.new("RGB", (12, 8), (number, 10 * number, 200))
        picture.save(folder / f"img_{number + first:05d}.png")
    return folder


def _folder_sample(folder: Path, num_frames: int = 6, **fields: object) -> Sample:
    return Sample(
        folder,
        (0,),
        num_frames=num_frames,
        image_template="img_{:05d}.png",
        **fields,  # type: ignore[arg-type]
    )


def test_a_video_file_is_read_as_deployment_reads_it(rendered_video: Path) -> None:
    indices = np.array([3, 0, 17])
    with open_frames(Sample(rendered_video, (0,))) as frames, VideoReader(rendered_video) as reader:
        assert frames.num_frames == reader.num_frames == 40
        assert (frames.read(indices).frames == reader.read(indices).frames).all()


def test_a_part_of_a_video_starts_at_its_first_time_and_ends_before_its_last(
    rendered_video: Path,
) -> None:
    # 10 frames a second: frames 12 to 19 are shown at 1.2 to 1.9 s.
    sample = Sample(rendered_video, (0,), start_seconds=1.2, end_seconds=2.0)

    with open_frames(sample) as frames, VideoReader(rendered_video) as reader:
        assert frames.num_frames == 8
        assert frames.pts_seconds.tolist() == reader.pts_seconds[12:20].tolist()
        clip = frames.read(np.array([0, 7]))
        assert clip.indices.tolist() == [12, 19]
        assert (clip.frames == reader.read(np.array([12, 19])).frames).all()


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(None, 0.5, 5), (3.5, None, 5), (3.5, 99.0, 5), (0.0, 99.0, 40)]
)
def test_a_part_may_be_open_at_one_end(
    rendered_video: Path, start: float | None, end: float | None, expected: int
) -> None:
    with open_frames(Sample(rendered_video, (0,), None, start, end)) as frames:
        assert frames.num_frames == expected


def test_a_part_without_frames_is_refused(rendered_video: Path) -> None:
    sample = Sample(rendered_video, (0,), start_seconds=30.0, end_seconds=31.5)

    with (
        pytest.raises(VideoError, match=r"has from 30 s to 31\.5 s 0 frames and at least 1"),
        open_frames(sample),
    ):
        pass


def test_a_video_of_too_few_frames_is_refused(rendered_video: Path) -> None:
    with (
        pytest.raises(VideoError, match="has altogether 40 frames and at least 41 are needed"),
        open_frames(Sample(rendered_video, (0,)), min_frames=41),
    ):
        pass


def test_pictures_in_a_folder_are_frames(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip")

    with open_frames(_folder_sample(folder)) as frames:
        clip = frames.read(np.array([5, 0, 5]))

    assert clip.frames[:, 0, 0, 0].tolist() == [5, 0, 5]
    assert clip.frames.shape == (3, 8, 12, 3)
    assert clip.indices.tolist() == [5, 0, 5]
    assert np.isnan(clip.pts_seconds).all()


def test_pictures_may_be_counted_from_zero(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip", first=0)

    with open_frames(_folder_sample(folder, index_bias=0)) as frames:
        assert frames.read(np.array([4])).frames[0, 0, 0].tolist() == [4, 40, 200]


def test_a_gray_picture_is_read_as_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    Image.new("L", (12, 8), 77).save(folder / "img_00001.png")

    with open_frames(_folder_sample(folder, 1)) as frames:
        assert frames.read(np.array([0])).frames[0, 0, 0].tolist() == [77, 77, 77]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(VideoError, match=r"There is no folder .*gone"),
        open_frames(_folder_sample(tmp_path / "gone")),
    ):
        pass


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip", 3)

    with (
        open_frames(_folder_sample(folder, 6)) as frames,
        pytest.raises(VideoError, match=r"no frame .*img_00004\.png, and 6 are said"),
    ):
        frames.read(np.array([0, 3]))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip")
    path = folder / "img_00002.png"
    path.write_bytes(path.read_bytes()[:44])

    with (
        open_frames(_folder_sample(folder)) as frames,
        pytest.raises(VideoError, match=r"img_00002\.png cannot be decoded"),
    ):
        frames.read(np.array([1]))


def test_pictures_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip")
    Image.new("RGB", (10, 10)).save(folder / "img_00003.png")

    with (
        open_frames(_folder_sample(folder)) as frames,
        pytest.raises(VideoError, match=r"different sizes \(\[\(8, 12\), \(10, 10\)\]\)"),
    ):
        frames.read(np.array([1, 2]))


SIZE, SHORT_SIDE = 32, 36


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache", short_side=SHORT_SIDE)


def clip(video: Path, cache: FrameCache | None) -> np.ndarray:
    clips = VideoClips([Sample(video, (0,))], num_frames=4, input_size=SIZE, cache=cache)
    return clips[SampleKey(0, 0)].frames.numpy()


def test_a_clip_from_the_cache_is_the_clip_from_the_video(
    rendered_video: Path, cache: FrameCache
) -> None:
    wanted = clip(rendered_video, None)
    for _ in range(2):  # decoded, then read
        np.testing.assert_array_equal(clip(rendered_video, cache), wanted)


def test_a_video_is_decoded_once(
    rendered_video: Path, cache: FrameCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = clip(rendered_video, cache)

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is opened again")

    monkeypatch.setattr(frames_module, "VideoReader", refuse)
    np.testing.assert_array_equal(clip(rendered_video, cache), first)


def test_a_video_that_was_replaced_is_decoded_anew(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    video = shutil.copy(rendered_video, tmp_path / "a.mp4")
    for time_ns in (10**18, 2 * 10**18):
        os.utime(video, ns=(time_ns, time_ns))
        clip(video, cache)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_a_damaged_file_of_the_cache_is_written_anew(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    wanted = clip(rendered_video, cache)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(clip(rendered_video, cache), wanted)
    assert file.stat().st_size > 1000


class Shrinking:
    """Says that it has 70 frames until the 40th turns out to be damaged."""

    num_frames = 70

    @property
    def pts_seconds(self) -> np.ndarray:
        return np.arange(self.num_frames) / 10

    def read(self, indices: np.ndarray) -> Clip:
        if indices.max() >= 40:
            self.num_frames = 40
            indices = np.minimum(indices, 39)
        elif indices.max() >= self.num_frames:
            raise ValueError(f"index {indices.max()} is not a frame")
        frames = np.broadcast_to(indices[:, None, None, None], (len(indices), 9, 9, 3))
        return Clip(frames.astype(np.uint8), indices, self.pts_seconds[indices])


def test_a_video_with_damage_keeps_the_frames_before_it(tmp_path: Path, cache: FrameCache) -> None:
    frames = cache.open(tmp_path / "damaged.mp4", Shrinking)
    assert (frames.num_frames, len(frames.pts_seconds)) == (40, 40)
    assert frames.read(np.arange(40)).frames[:, 0, 0, 0].tolist() == list(range(40))


def test_others_may_read_the_cache(rendered_video: Path, tmp_path: Path, cache: FrameCache) -> None:
    clip(rendered_video, cache)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_part_of_a_video_has_the_frames_of_its_seconds(
    rendered_video: Path, cache: FrameCache
) -> None:
    part = Sample(rendered_video, (0,), start_seconds=0.5, end_seconds=1.0)
    with open_frames(part) as plain, open_frames(part, cache=cache) as cached:
        assert 0 < cached.num_frames == plain.num_frames
        wanted = plain.read(np.array([0, 1]))
        found = cached.read(np.array([0, 1]))
    np.testing.assert_array_equal(found.indices, wanted.indices)
    np.testing.assert_array_equal(found.pts_seconds, wanted.pts_seconds)


def test_a_video_that_cannot_be_read_leaves_nothing(tmp_path: Path, cache: FrameCache) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for path in (tmp_path / "a.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(VideoError), open_frames(Sample(path, (0,)), cache=cache):
            pass
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/cache cannot be made .*another data.cache"):
        FrameCache(tmp_path / "file" / "cache", short_side=8)


def test_frames_that_cannot_be_written_are_told(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder any more")
    with pytest.raises(TrainingError, match=r"cannot be written .*free some space"):
        clip(rendered_video, cache)


def _read_picture(folder: Path, name: str) -> np.ndarray:
    sample = Sample(folder, (0,), num_frames=1, image_template=name.replace(".", "{0:.0f}."))
    with open_frames(sample) as frames:
        return frames.read(np.array([0])).frames[0]


def _picture(folder: Path, values: np.ndarray, suffix: str, **options: object) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    mode = options.pop("mode", None)
    picture = Image.fromarray(values)
    picture = picture.convert(mode) if isinstance(mode, str) else picture
    picture.save(folder / f"p1{suffix}", **options)
    return _read_picture(folder, f"p{suffix}")


ROWS, COLUMNS = np.mgrid[0:64, 0:96]
GRAY16 = (COLUMNS * 600 + ROWS * 100).astype(np.uint16)
COLOURS = np.stack([COLUMNS * 2, 255 - COLUMNS, ROWS * 4], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_gray_of_16_bits_is_scaled_as_ffmpeg_scales_it(tmp_path: Path, suffix: str) -> None:
    frame = _picture(tmp_path / "a", GRAY16, suffix)

    Image.fromarray(GRAY16).save(tmp_path / "same.png")
    with VideoReader(tmp_path / "same.png") as reader:
        decoded = reader.read(np.array([0])).frames[0]
    np.testing.assert_array_equal(frame, decoded)


def test_the_reported_picture_of_16_bits_is_read_right(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "cases" / "gray16.png", tmp_path / "p1.png")

    assert _read_picture(tmp_path, "p.png").mean() == pytest.approx(120, abs=1)


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    floats = (GRAY16 / 65535).astype(np.float32)

    frame = _picture(tmp_path / "a", floats, ".tif")

    np.testing.assert_array_equal(frame[..., 0], np.rint(255 * floats))
    for wrong in (floats * 255, floats - 1, np.full_like(floats, np.nan)):
        with pytest.raises(VideoError, match=r"p1\.tif cannot be decoded \(its values are from"):
            _picture(tmp_path / "a", wrong, ".tif")


def test_whole_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"p1\.tif cannot be decoded .* has no range"):
        _picture(tmp_path / "a", GRAY16.astype(np.int32), ".tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_pictures_are_turned_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[274] = 6  # shown after a quarter turn clockwise

    frame = _picture(tmp_path / "a", COLOURS, suffix, exif=exif, quality=95)

    assert frame.shape == (96, 64, 3)
    assert np.abs(frame.astype(int) - np.rot90(COLOURS, -1)).mean() < 6


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("P", ".png"),
        ("RGBA", ".png"),
        ("LA", ".png"),
        ("1", ".png"),
        ("CMYK", ".jpg"),
        ("P", ".gif"),
    ],
)
def test_other_kinds_of_pictures_are_those_of_ffmpeg(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    frame = _picture(tmp_path / "a", COLOURS, suffix, mode=mode)

    with VideoReader(tmp_path / "a" / f"p1{suffix}") as reader:
        decoded = reader.read(np.array([0])).frames[0]
    assert np.abs(frame.astype(int) - decoded).max() <= 2


def test_what_is_not_a_picture_does_not_wait_or_crash(tmp_path: Path) -> None:
    folder = _picture_folder(tmp_path / "clip")
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"")), 2):
        path = folder / f"img_{number:05d}.png"
        path.unlink()
        make(path)
        with (
            open_frames(_folder_sample(folder)) as frames,
            pytest.raises(VideoError, match=path.name),
        ):
            frames.read(np.array([number - 1]))


def test_a_picture_that_is_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _picture_folder(tmp_path / "clip")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with (
        open_frames(_folder_sample(folder)) as frames,
        pytest.raises(VideoError, match=r"img_00001\.png cannot be decoded"),
    ):
        frames.read(np.array([0]))


def test_frames_of_more_pixels_than_are_allowed_are_refused(
    rendered_video: Path, tmp_path: Path, cache: FrameCache
) -> None:
    with VideoReader(rendered_video) as reader:
        num_pixels = reader.width * reader.height
    for use in (None, cache):
        with (
            pytest.raises(FrameSizeError, match="allow more"),
            open_frames(Sample(rendered_video, (0,)), cache=use, max_pixels=num_pixels - 1),
        ):
            pass
        with open_frames(Sample(rendered_video, (0,)), cache=use, max_pixels=num_pixels):
            pass
    sample = _folder_sample(_picture_folder(tmp_path / "clip"))
    with (
        open_frames(sample, max_pixels=12 * 8 - 1) as frames,
        pytest.raises(FrameSizeError, match=r"img_00001\.png has frames of 12 x 8"),
    ):
        frames.read(np.array([0]))
    with open_frames(sample, max_pixels=12 * 8) as frames:
        frames.read(np.array([0]))
