from __future__ import annotations

import csv

import av
import numpy as np
import pytest

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.evaluate.intervals import read_intervals
from actionclip_deploy.motions import (
    CODECS,
    MOTIONS,
    Act,
    MotionLabel,
    all_labels,
    draw_labels,
    labels,
    render_acts,
    render_clip,
    write_dataset,
    write_long_videos,
    write_pictures,
    write_video,
)
from actionclip_deploy.motions.rendering import all_captions
from actionclip_deploy.prompts import read_labels

LABEL = MotionLabel("star", "yellow", "orbiting")


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("codec", CODECS)
def test_a_written_video_reads_back_as_what_it_shows(tmp_path, codec):
    frames = render_clip(LABEL, seed=3)
    path = write_video(tmp_path / "a.mp4", frames, codec=codec)
    decoded = decode(path)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 12  # noise and thin colours are lost


def test_frame_rate_and_quality_are_what_was_asked_for(tmp_path):
    frames = render_clip(LABEL, seed=3)
    fine = write_video(tmp_path / "fine.mp4", frames, fps=8, crf=10)
    coarse = write_video(tmp_path / "coarse.mp4", frames, fps=15, crf=40)
    assert fine.stat().st_size > 2 * coarse.stat().st_size
    for path, fps in ((fine, 8), (coarse, 15)):
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == fps


def test_another_codec_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"codec is 'gif'.*'mpeg4'"):
        write_video(tmp_path / "a.mp4", render_clip(LABEL, seed=0), codec="gif")


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 7, 3), np.uint8), np.zeros((2, 8, 8, 3), np.float32)]
)
def test_frames_that_cannot_be_encoded_are_refused(tmp_path, frames):
    with pytest.raises(ShapeError, match="even H and W"):
        write_video(tmp_path / "a.mp4", frames)


def test_a_dataset_lists_each_video_with_the_id_of_its_label(tmp_path):
    calls = []
    path = write_dataset(
        tmp_path, "heldout", 5, 1, size=32, progress=lambda *done: calls.append(done)
    )
    assert path == tmp_path / "heldout.txt"
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        names = {row["id"]: row["name"] for row in csv.DictReader(file)}
    assert list(names.values()) == [str(label) for label in all_labels()]
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    assert [names[number] for _, number in lines] == [
        str(label) for label in draw_labels("heldout", 5, 1)
    ]
    for name, _ in lines:
        assert decode(tmp_path / name).shape == (24, 32, 32, 3)
    assert calls == [(done, 5) for done in range(1, 6)]


def test_a_dataset_names_the_motion_of_each_video_beside_its_label(tmp_path):
    write_dataset(tmp_path, "train", 3, 1, size=32)
    phrases = read_labels(tmp_path / "phrases.csv")
    assert phrases == (*map(str, all_labels()), *MOTIONS)
    samples = read_annotations(tmp_path / "train.csv", phrases, root=tmp_path / "train")
    for sample, label in zip(samples, draw_labels("train", 3, 1), strict=True):
        assert {phrases[number] for number in sample.label_ids} == {str(label), label.motion}


def test_the_same_seed_writes_the_same_videos(tmp_path):
    for folder in ("a", "b"):
        # x264 does not always make the same bytes of the same frames.
        write_dataset(tmp_path / folder, "test", 2, 1, size=32, codec="mpeg4")
    for name in ("test/000000.mp4", "test/000001.mp4", "test.txt", "labels.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_training_and_test_videos_differ(tmp_path):
    for split in ("train", "test"):
        write_dataset(tmp_path, split, 1, 1, size=32)
    first, second = (decode(tmp_path / split / "000000.mp4") for split in ("train", "test"))
    assert (first != second).any()


def test_labels_are_drawn_as_often_as_each_other_up_to_one():
    drawn = draw_labels("heldout", 400, 0)
    counts = [drawn.count(label) for label in labels("heldout")]
    assert sum(counts) == 400
    assert max(counts) - min(counts) == 1
    assert drawn != draw_labels("heldout", 400, 1)


def test_no_video_at_all_gives_an_empty_list(tmp_path):
    assert write_dataset(tmp_path, "train", 0, 0).read_text(encoding="utf-8") == ""


def test_several_processes_write_what_one_does(tmp_path):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        write_dataset(folder, "test", 3, 1, size=32, codec="mpeg4", workers=workers)
    for name in ("test/000002.mp4", "test.txt"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_pictures_are_videos_of_one_frame_with_captions(tmp_path):
    path = write_pictures(tmp_path, 4, 0, size=32)
    assert path == tmp_path / "pictures.csv"
    captions = read_labels(tmp_path / "captions.csv")
    assert captions == all_captions()
    samples = read_annotations(path, captions, root=tmp_path / "pictures")
    assert [sample.path.name for sample in samples] == [f"{i:06d}.mp4" for i in range(4)]
    for sample in samples:
        assert decode(sample.path).shape == (1, 32, 32, 3)
        shown = [captions[number] for number in sample.label_ids]
        assert shown == ["nothing"] or len(shown) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "gif"}, r"codec is 'gif'.*'mpeg4'"),
        ({"workers": 0}, "workers is 0; it has to be 1 or more"),
    ],
)
def test_a_wrong_argument_leaves_nothing_behind(tmp_path, options, message):
    folder = tmp_path / "motions"
    with pytest.raises(ValueError, match=message):
        write_dataset(folder, "train", 1, 0, **options)
    with pytest.raises(ValueError, match=message):
        write_pictures(folder, 1, 0, **options)
    assert not folder.exists()


# Long videos.


def _spans(path):
    """What the table of long videos says, by video."""
    with path.open(encoding="utf-8", newline="") as file:
        spans = {}
        for row in csv.DictReader(file):
            span = (row["label"], float(row["start"]), float(row["end"]))
            spans.setdefault(row["video"], []).append(span)
    return spans


def test_a_long_video_shows_an_object_when_the_table_says_so(tmp_path):
    """Objects are coloured, and all else is nearly grey: the frames tell when one is there."""
    path = write_long_videos(tmp_path, "tune", 1, 3, seconds=40, size=48)
    ((name, spans),) = _spans(path).items()
    frames = decode(tmp_path / name).astype(int)
    with av.open(str(tmp_path / name)) as container:
        fps = float(container.streams.video[0].average_rate)
    assert len(frames) == 40 * fps
    has_white = [" white " in label or " blinking" in label for label, _, _ in spans]
    spread = (frames.max(axis=3) - frames.min(axis=3)).reshape(len(frames), -1)
    is_coloured = np.quantile(spread, 0.97, axis=1) > 60
    is_shown = np.zeros(len(frames), bool)
    is_open = np.zeros(len(frames), bool)  # what is white or unseen for a while says nothing
    for (_, start, end), white in zip(spans, has_white, strict=True):
        part = slice(round(start * fps), round(end * fps))
        is_shown[part], is_open[part] = True, white
        assert start * fps == pytest.approx(round(start * fps), abs=1e-3)
    assert (~is_shown).sum() > fps
    assert (is_shown & ~is_open).sum() > 5 * fps
    assert (is_coloured == is_shown)[~is_open].all()


def test_motions_of_long_videos_last_2_to_12_seconds_with_gaps_between(tmp_path):
    spans = _spans(write_long_videos(tmp_path, "test", 3, 1, seconds=120, size=16))
    assert list(spans) == [f"test/test-{number:03d}.mp4" for number in range(3)]
    for shown in spans.values():
        starts, ends = [start for _, start, _ in shown], [end for _, _, end in shown]
        lengths = np.subtract(ends, starts)
        gaps = np.subtract([*starts, 120], [0, *ends])
        # To the nearest frame, of which there are 8 or more a second.
        assert (lengths > 2 - 1 / 8).all()
        assert (lengths < 12 + 1 / 8).all()
        assert (gaps > 1 - 1 / 8).all()
        assert (gaps[:-1] < 8 + 1 / 8).all()
    assert len({tuple(shown) for shown in spans.values()}) == 3


def test_both_splits_of_long_videos_show_the_same_labels_of_training(tmp_path):
    known = set(map(str, labels("train")))
    shown = {}
    for split in ("tune", "test"):
        spans = _spans(write_long_videos(tmp_path, split, 1, 0, seconds=1500, size=8))
        (found,) = spans.values()
        counts = [[label for label, _, _ in found].count(each) for each in {s[0] for s in found}]
        assert max(counts) - min(counts) <= 1
        shown[split] = {label for label, _, _ in found}
        assert shown[split] <= known
    assert len(shown["tune"]) == 112
    assert shown["tune"] == shown["test"]


def test_long_videos_show_the_labels_that_are_given_with_gaps_as_long_as_asked(tmp_path):
    shown = labels("heldout")[:3]
    options = {"seconds": 120, "size": 16, "shown": shown, "gap_seconds": (20, 30)}
    spans = _spans(write_long_videos(tmp_path, "tune", 4, 2, **options))
    found = {label for of_video in spans.values() for label, _, _ in of_video}
    assert found == set(map(str, shown))
    for of_video in spans.values():
        ends = [0.0, *(end for _, _, end in of_video)]
        for (_, start, _), end in zip(of_video, ends, strict=False):
            assert 20 - 1 / 8 < start - end < 30 + 1 / 8


def test_a_long_video_that_shows_nothing_is_in_the_tables(tmp_path):
    path = write_long_videos(tmp_path, "tune", 1, 2, seconds=15, size=16, gap_seconds=(15, 15))
    for table in (path, path.with_suffix(".json")):
        (video,) = read_intervals(table, read_labels(tmp_path / "labels.csv"))
        assert video.path.is_file()
        assert video.intervals == ()


def test_the_tables_of_long_videos_are_read_as_annotated_intervals(tmp_path):
    path = write_long_videos(tmp_path, "tune", 2, 5, seconds=30, size=16)
    names = read_labels(tmp_path / "labels.csv")
    assert names == tuple(map(str, all_labels()))
    of_table = read_intervals(path, names)
    assert read_intervals(path.with_suffix(".json"), names) == of_table
    assert {video.path.name: len(video.intervals) for video in of_table} == {
        name.removeprefix("tune/"): len(spans) for name, spans in _spans(path).items()
    }
    assert all(video.path.is_file() for video in of_table)


def test_the_same_seed_writes_the_same_long_videos_in_any_number_of_processes(tmp_path):
    calls = []
    for workers in (1, 2):
        write_long_videos(
            tmp_path / str(workers),
            "test",
            2,
            1,
            seconds=20,
            size=16,
            codec="mpeg4",
            workers=workers,
            progress=lambda *done: calls.append(done),
        )
    assert calls == [(1, 2), (2, 2)] * 2
    for name in ("test/test-000.mp4", "test/test-001.mp4", "test.csv", "test.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, r"split is 'train'.*\['tune', 'test'\]"),
        ({"seconds": 14.9}, "seconds is 14.9; it has to be 15 or more"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"codec": "gif"}, r"codec is 'gif'"),
        ({"workers": 0}, "workers is 0"),
        ({"gap_seconds": (2, 1)}, r"gap_seconds is \(2, 1\); give the shortest"),
        ({"gap_seconds": (0, float("nan"))}, "gap_seconds is"),
        ({"shown": ()}, "shown is empty; give a label or more"),
    ],
)
def test_a_wrong_argument_writes_no_long_videos(tmp_path, options, message):
    folder = tmp_path / "long"
    with pytest.raises(ValueError, match=message):
        write_long_videos(folder, **{"split": "tune", "num_videos": 1, "seed": 0, **options})
    assert not folder.exists()


def test_an_act_goes_through_its_motion_again_and_again():
    act = Act(LABEL, first=10, num_frames=12, num_rounds=3)
    assert act.times(np.arange(10, 22)).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1] * 3)


def test_the_parts_of_a_long_video_fit_together():
    """It is rendered in parts, whose frames have to be those of one scene."""
    act = Act(MotionLabel("star", "yellow", "standing still"), first=200, num_frames=80)
    frames = render_acts([act], 300, fps=12, seed=3, size=32).astype(float)
    change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    # The object comes and goes; nothing else jumps, least of all between the parts.
    assert set(np.argsort(change)[-2:]) == {199, 279}
    assert change[239] < 1.5 * np.median(change)


@pytest.mark.parametrize(
    "acts",
    [
        [Act(LABEL, 5, 10), Act(LABEL, 14, 3)],
        [Act(LABEL, 95, 10)],
        [Act(LABEL, -1, 10)],
    ],
)
def test_acts_that_overlap_or_lie_outside_are_refused(acts):
    with pytest.raises(ValueError, match="one after the other, and within 100 frames"):
        render_acts(acts, 100, fps=12, seed=0, size=16)
