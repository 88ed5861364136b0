"""Which samples can be used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from actionclip_deploy.errors import VideoError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.train.data import screen_samples


@pytest.fixture
def samples(rendered_video: Path, tmp_path: Path) -> tuple[Sample, ...]:
    """Good, missing, good but for its part, broken, too short by its list, missing again."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(rendered_video.read_bytes()[:200])
    folder = tmp_path / "frames"
    folder.mkdir()
    missing = tmp_path / "missing.mp4"
    return (
        Sample(rendered_video, (0,)),
        Sample(missing, (0,)),
        Sample(rendered_video, (1,), start_seconds=3.0, end_seconds=3.25),
        Sample(broken, (0,)),
        Sample(folder, (0,), num_frames=3, image_template="img_{:05d}.jpg"),
        Sample(missing, (1,)),
    )


def test_each_kind_of_bad_video_is_found_and_listed_once(samples: tuple[Sample, ...]) -> None:
    screening = screen_samples(samples, min_frames=4, open_videos=True)

    assert screening.samples == samples[:1]
    assert [(bad.path.name, bad.problem) for bad in screening.bad] == [
        ("missing.mp4", "missing"),
        ("square.mp4", "too short"),
        ("broken.mp4", "unreadable"),
        ("frames", "too short"),
    ]


def test_without_opening_videos_only_what_is_cheap_is_found(samples: tuple[Sample, ...]) -> None:
    screening = screen_samples(samples, min_frames=4)

    assert [bad.problem for bad in screening.bad] == ["missing", "too short"]
    assert screening.samples == (samples[0], samples[2], samples[3])


def test_a_summary_counts_and_names_them_in_one_warning(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        screen_samples(samples, min_frames=4, open_videos=True)

    (record,) = caplog.records
    assert "4 videos cannot be used (1 missing, 2 too short, 1 unreadable)" in record.message
    assert "missing.mp4 (missing)" in record.message


def test_good_samples_give_no_warning(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    screening = screen_samples(samples[:1], open_videos=True)

    assert screening.samples == samples[:1]
    assert screening.bad == ()
    assert not caplog.records


def test_bad_videos_may_be_fatal(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(VideoError, match=r"1 videos cannot be used \(1 missing\): .*missing\.mp4"):
        screen_samples(samples, bad_videos="fail")


def test_samples_of_which_none_is_left_are_refused(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(VideoError, match="correct the list or the folder"):
        screen_samples([samples[1], samples[5]])


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    missing = [Sample(tmp_path / f"{number}.mp4", (0,)) for number in range(14)]

    with pytest.raises(VideoError, match=r"14 videos .* and 4 more; correct"):
        screen_samples(missing)
