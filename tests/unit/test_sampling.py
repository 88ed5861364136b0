from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actionclip_deploy.sampling import (
    Views,
    sample_random_segments,
    sample_segments,
    sample_views,
    sample_windows,
)

VIDEO_LENGTHS = st.integers(1, 20_000)
CLIP_LENGTHS = st.integers(1, 64)


def test_segments_equal_those_of_the_original(center_samples: dict[str, list[int]]) -> None:
    assert len(center_samples) > 50
    for key, expected in center_samples.items():
        num_video_frames, num_frames = map(int, key.split("/"))
        indices = sample_segments(num_video_frames, num_frames)
        assert indices.dtype == np.int64
        assert indices.tolist() == expected, key


@given(VIDEO_LENGTHS, CLIP_LENGTHS)
def test_segments_ascend_and_lie_in_the_video(num_video_frames: int, num_frames: int) -> None:
    indices = sample_segments(num_video_frames, num_frames)
    assert indices.shape == (num_frames,)
    assert indices[0] >= 0
    assert indices[-1] < num_video_frames
    assert (np.diff(indices) >= 0).all()


@given(VIDEO_LENGTHS, CLIP_LENGTHS)
def test_each_segment_gives_the_frame_in_its_middle(num_video_frames: int, num_frames: int) -> None:
    indices = sample_segments(num_video_frames, num_frames)
    if 1 < num_frames < num_video_frames:
        middles = [(2 * i + 1) * num_video_frames / (2 * num_frames) for i in range(num_frames)]
        assert all(0 <= m - i <= 1.5 for m, i in zip(middles, indices, strict=True))


@given(st.integers(1, 64), CLIP_LENGTHS)
def test_a_short_video_gives_every_frame(num_video_frames: int, num_frames: int) -> None:
    if num_frames > 1 and num_video_frames <= num_frames:
        assert set(sample_segments(num_video_frames, num_frames)) == set(range(num_video_frames))


@given(VIDEO_LENGTHS, CLIP_LENGTHS, st.integers(0, 2**32 - 1))
def test_random_segments_give_one_frame_of_each_segment(
    num_video_frames: int, num_frames: int, seed: int
) -> None:
    indices = sample_random_segments(num_video_frames, num_frames, np.random.default_rng(seed))
    assert indices.shape == (num_frames,)
    assert indices.dtype == np.int64
    if num_video_frames > num_frames:
        for i, index in enumerate(indices):
            start = i * num_video_frames // num_frames
            end = (i + 1) * num_video_frames // num_frames
            assert start <= index < end
    else:
        assert set(indices) == set(range(num_video_frames))
        assert (np.diff(indices) >= 0).all()


def test_random_segments_reach_every_frame_and_follow_the_seed() -> None:
    rng = np.random.default_rng(0)
    seen = {int(i) for _ in range(500) for i in sample_random_segments(33, 8, rng)}
    assert seen == set(range(33))
    first, second = (sample_random_segments(300, 8, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, second)


@given(VIDEO_LENGTHS, CLIP_LENGTHS)
def test_one_clip_of_views_is_the_centre_sampler(num_video_frames: int, num_frames: int) -> None:
    views = sample_views(num_video_frames, num_frames, 1)
    assert np.array_equal(views, sample_segments(num_video_frames, num_frames)[np.newaxis])


@given(VIDEO_LENGTHS, CLIP_LENGTHS, st.integers(2, 12))
def test_clips_of_views_stay_in_their_segments_and_move_on(
    num_video_frames: int, num_frames: int, num_clips: int
) -> None:
    views = sample_views(num_video_frames, num_frames, num_clips)
    assert views.shape == (num_clips, num_frames)
    assert views.dtype == np.int64
    if num_video_frames <= num_frames:
        assert (views == sample_segments(num_video_frames, num_frames)).all()
        return
    segment = num_video_frames / num_frames
    assert (views[0] == [int(i * segment) for i in range(num_frames)]).all()
    assert (np.diff(views, axis=0) >= 0).all()
    assert (views >= np.floor(np.arange(num_frames) * segment)).all()
    assert (views < np.ceil(np.arange(1, num_frames + 1) * segment)).all()


def test_views_are_at_equal_steps_within_the_segments() -> None:
    # 80 frames, 8 segments of 10: clip k takes frame k of every segment.
    expected = np.arange(10)[:, np.newaxis] + 10 * np.arange(8)
    assert np.array_equal(sample_views(80, 8, 10), expected)


def test_windows_are_placed_every_stride_and_stay_inside() -> None:
    windows = sample_windows(25, 4, window_frames=8, stride_frames=5)
    # Starts 0, 5, 10, 15; one at 20 would end at 28. The middle of 8 frames in 4 parts: 0 2 4 6.
    assert windows.tolist() == [[s + o for o in (0, 2, 4, 6)] for s in (0, 5, 10, 15)]


def test_a_window_that_ends_with_the_stream_is_kept() -> None:
    assert sample_windows(24, 4, window_frames=8, stride_frames=8).shape == (3, 4)
    assert sample_windows(23, 4, window_frames=8, stride_frames=8).shape == (2, 4)


def test_the_only_window_covers_a_stream_that_is_too_short() -> None:
    windows = sample_windows(5, 8, window_frames=16, stride_frames=4)
    assert windows.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4]]


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 64), st.integers(1, 64))
def test_windows_lie_in_the_stream(
    num_video_frames: int, num_frames: int, window_frames: int, stride_frames: int
) -> None:
    windows = sample_windows(
        num_video_frames, num_frames, window_frames=window_frames, stride_frames=stride_frames
    )
    assert windows.dtype == np.int64
    assert windows.shape[0] >= 1
    assert windows.min() >= 0
    assert windows.max() < num_video_frames


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: sample_segments(0, 8), "num_video_frames is 0"),
        (lambda: sample_segments(10, -1), "num_frames is -1"),
        (lambda: sample_random_segments(10, 0, np.random.default_rng(0)), "num_frames is 0"),
        (lambda: sample_views(10, 8, 0), "num_clips is 0"),
        (lambda: sample_windows(9, 8, window_frames=0, stride_frames=1), "window_frames is 0"),
        (lambda: sample_windows(9, 8, window_frames=4, stride_frames=0), "stride_frames is 0"),
    ],
)
def test_numbers_that_are_not_positive_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}; it must be 1 or more"):
        call()


@pytest.mark.parametrize(
    ("text", "clips", "crops"), [("1x1", 1, 1), ("10x3", 10, 3), ("2x1", 2, 1)]
)
def test_views_are_read_and_written_in_one_form(text: str, clips: int, crops: int) -> None:
    views = Views.parse(text)
    assert views == Views(num_clips=clips, num_crops=crops)
    assert views.num_views == clips * crops
    assert str(views) == text


@pytest.mark.parametrize("text", ["", "3", "10x", "x3", "10*3", "10x3x1", "-1x3", "1.5x1", "tenx3"])
def test_views_of_another_form_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="must be CLIPSxCROPS, such as 1x1 or 10x3"):
        Views.parse(text)


def test_views_of_numbers_that_are_not_allowed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'10x2'.*num_crops is 2; it must be 1 or 3"):
        Views.parse("10x2")
    with pytest.raises(ValueError, match="num_clips is 0; it must be 1 or more"):
        Views.parse("0x1")
    with pytest.raises(ValueError, match="num_crops is 10"):
        Views(num_crops=10)
