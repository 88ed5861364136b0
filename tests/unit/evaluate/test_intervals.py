"""Annotated intervals, and what events are worth against them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actionclip_deploy.errors import LabelError, ShapeError
from actionclip_deploy.evaluate.intervals import (
    ACTIVITYNET_TIOUS,
    THUMOS_TIOUS,
    TIOUS,
    Interval,
    LiveEvent,
    MeasuredVideo,
    event_precisions,
    measure_events,
    read_intervals,
)

LABELS = ("Long jump", "Baseball Pitch", "yoga, hot")


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _read(path: Path, **options: Any) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """What stands in a file, as plain values; paths from its folder."""
    root = options.get("root", path if path.is_dir() else path.parent)
    return [
        (
            video.path.relative_to(root).as_posix(),
            [(each.label, each.start_seconds, each.end_seconds) for each in video.intervals],
        )
        for video in read_intervals(path, LABELS, **options)
    ]


# Files.


ROWS = 'a.mp4,long jump,0,1.5\nb/c d.mkv,BaseballPitch,2,3\na.mp4,"yoga, hot",1,4e0\nd.mp4,,,\n'
SHOWN = [
    ("a.mp4", [("Long jump", 0.0, 1.5), ("yoga, hot", 1.0, 4.0)]),
    ("b/c d.mkv", [("Baseball Pitch", 2.0, 3.0)]),
    ("d.mp4", []),
]


def test_a_table_may_have_a_header_or_none(tmp_path: Path) -> None:
    bare = _write(tmp_path, "bare.csv", ROWS)
    headed = _write(tmp_path, "headed.csv", "\ufeffvideo,label,start,end\n" + ROWS)
    assert _read(bare) == _read(headed) == SHOWN


def test_a_header_may_have_other_columns_and_another_order(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.csv", "note,end,start,label,video\nx,2,1,1,a.mp4\n")
    assert _read(path) == [("a.mp4", [("Baseball Pitch", 1.0, 2.0)])]


def test_a_name_without_a_suffix_is_looked_for_in_the_root(tmp_path: Path) -> None:
    for name in ("deep/down/one.webm", "v_two.mkv"):
        _write(tmp_path / "videos", name, "")
    rows = "".join(f"{name},0,1,2\n" for name in ("one", "two", "three"))
    path = _write(tmp_path, "a.csv", rows)
    found = _read(path, root=tmp_path / "videos")
    assert [name for name, _ in found] == ["deep/down/one.webm", "v_two.mkv", "three.mp4"]


def _activitynet(**videos: tuple[str, list[tuple[str, float, float]]]) -> str:
    database = {
        name: {
            "duration": 60.0,
            "subset": subset,
            "annotations": [
                {"segment": [start, end], "label": label} for label, start, end in all_
            ],
        }
        for name, (subset, all_) in videos.items()
    }
    whole = {"version": "VERSION 1.3", "taxonomy": [{"nodeId": 0}], "database": database}
    return json.dumps(whole, indent=1)


def test_activitynet_is_read_by_subset(tmp_path: Path) -> None:
    first, second = ("Long jump", 0.5, 2.0), ("Baseball Pitch", 3.0, 4.0)
    validation = {"b": ("validation", [first, second]), "c": ("validation", [])}
    text = _activitynet(a=("training", [first]), t=("testing", []), **validation)
    path = _write(tmp_path, "activity_net.json", text)
    # The release has no annotations for testing.
    assert _read(path) == [("b.mp4", [first, second]), ("c.mp4", [])]
    assert _read(path, subset="train") == [("a.mp4", [first])]


def test_activitynets_form_may_have_annotations_for_testing(tmp_path: Path) -> None:
    one = ("Long jump", 0.5, 2.0)
    text = _activitynet(a=("Test", [one]), b=("Validation", [one]))
    path = _write(tmp_path, "thumos14.json", text)
    assert [name for name, _ in _read(path)] == ["a.mp4"]
    assert [name for name, _ in _read(path, subset="train")] == ["b.mp4"]


def test_a_folder_of_thumos_has_a_file_for_each_class(tmp_path: Path) -> None:
    _write(tmp_path, "BaseballPitch_test.txt", "video_test_0000324  0.2 1.1\nv2 3.0  4.5\n")
    _write(tmp_path, "LongJump_test.txt", "v2 1 2\n")
    _write(tmp_path, "LongJump_val.txt", "v3 1 2\n")
    _write(tmp_path, "Ambiguous_test.txt", "v2 7 8\n")
    _write(tmp_path, "detclasslist.txt", "7 BaseballPitch\n")
    assert _read(tmp_path) == [
        ("video_test_0000324.mp4", [("Baseball Pitch", 0.2, 1.1)]),
        ("v2.mp4", [("Baseball Pitch", 3.0, 4.5), ("Long jump", 1.0, 2.0)]),
    ]
    assert _read(tmp_path, subset="train") == [("v3.mp4", [("Long jump", 1.0, 2.0)])]
    assert _read(tmp_path / "LongJump_test.txt") == [("v2.mp4", [("Long jump", 1.0, 2.0)])]


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ("Long jump,2,2", "from 2 to 2 seconds.*end after its start"),
        ("Long jump,3,2.5", "from 3 to 2.5 seconds"),
        ("Long jump,-1,2", "from -1 to 2 seconds.*start at 0"),
        ("Long jump,nan,2", "start of an interval 'nan'; expected seconds"),
        ("Long jump,1,inf", "end of an interval 'inf'; expected seconds"),
        ("Long jump,1,2 s", "end of an interval '2 s'; expected seconds"),
        ("High jump,1,2", "label 'High jump', which is not one of the 3"),
        ("3,1,2", "label 3, and the 3 labels have the numbers 0 to 2"),
        ("Long jump,1", "has no end"),
        ("yoga, hot,1,2", "more fields than video,label,start,end.*quotation marks"),
    ],
)
def test_a_wrong_interval_is_refused_with_its_line(
    tmp_path: Path, interval: str, message: str
) -> None:
    path = _write(tmp_path, "a.csv", f"a.mp4,0,1,2\n\nb.mp4,{interval}\n")
    with pytest.raises(LabelError, match=f"a\\.csv line 3 .*{message}"):
        read_intervals(path, LABELS)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ('{"segment": [2, 1], "label": "yoga, hot"}', "from 2 to 1 seconds"),
        ('{"segment": [NaN, 1], "label": "yoga, hot"}', "'nan'; expected seconds"),
        ('{"segment": [-1, 1], "label": "yoga, hot"}', "start at 0"),
        ('{"segment": [0, true], "label": "yoga, hot"}', "'True'; expected seconds"),
        ('{"segment": [0, 1], "label": "yoga {"}', "label 'yoga {', which is not one"),
        ('{"segment": [0], "label": "yoga, hot"}', "list of start and end"),
        ('{"segment": [0, 1], "label": 2}', "expected a text"),
        ('{"segment": [0, 1], "label": "", "label": "a"}', "'label' twice"),
    ],
)
def test_a_wrong_annotation_of_activitynet_is_refused_with_its_line(
    tmp_path: Path, annotation: str, message: str
) -> None:
    text = '{"version": "\\"}{",\n"database": {"a":\n {"subset": "testing", "annotations": [\n'
    good = '{"segment": [0, 1],\n "label": "Long jump"}'
    path = _write(tmp_path, "a.json", f"{text}{good},\n{annotation}]}}}}}}\n")
    with pytest.raises(LabelError, match=rf"a\.json line 6 .*{message}"):
        read_intervals(path, LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"database": []}', 'no object "database"'),
        ('{"taxonomy": {}}', 'no object "database"'),
        ('{"database": {"a": {"subset": "testing"}}}', "line 1 has no list .*for the video 'a'"),
        ('{"database": {"a": 3}}', "no list of objects"),
        ('{"database": {\n"a": \n', "line 3 is not JSON"),
        ('{"database": {}}', "lists no video"),
        ('{"a":' + "[" * 100_000, "cannot be read as JSON"),
        ('{"a": ' + "1" * 5_000 + "}", "cannot be read as JSON|no object"),
    ],
)
def test_what_is_not_a_file_of_activitynet_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(LabelError, match=f"a\\.json.*{message}"):
        read_intervals(_write(tmp_path, "a.json", text), LABELS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("LongJump_test.txt", "v1 1 2\nv2 1\n", r"line 2 is 'v2 1'; expected VIDEO START END"),
        ("LongJump_test.txt", "v1 1 2\n\nv2 2 1\n", r"line 3 .*from 2 to 1 seconds"),
        ("HighJump_test.txt", "v1 1 2\n", r"HighJump_test.txt has the label 'HighJump'"),
    ],
)
def test_a_wrong_line_of_thumos_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(LabelError, match=message):
        read_intervals(_write(tmp_path, name, text), LABELS)


def test_folders_and_arguments_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="no file named as those of THUMOS"):
        read_intervals(tmp_path, LABELS)
    path = _write(tmp_path, "LongJump_val.txt", "v 1 2\n")
    with pytest.raises(LabelError, match=r"no Class_test\.txt"):
        read_intervals(tmp_path, LABELS)
    with pytest.raises(LabelError, match="named as the files of THUMOS"):
        read_intervals(_write(tmp_path, "a.txt", "v 1 2\n"), LABELS, format="thumos")
    with pytest.raises(ValueError, match="auto, activitynet, thumos, csv"):
        read_intervals(path, LABELS, format="json")
    with pytest.raises(ValueError, match="train or test"):
        read_intervals(path, LABELS, subset="val")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match=r"empty\.csv is empty"):
        read_intervals(_write(tmp_path, "empty.csv", "\n"), LABELS)
    with pytest.raises(LabelError, match="line 1 names no video"):
        read_intervals(_write(tmp_path, "b.csv", ",0,1,2\n"), LABELS)


# Average precision.


class Found(NamedTuple):
    label: str
    start_seconds: float
    end_seconds: float
    score: float


def _loop_precision(
    shown: Sequence[Sequence[Interval]], found: Sequence[Sequence[Found]], label: str, tiou: float
) -> float:
    """The definition, one step at a time: Pascal VOC's interpolated precision over intervals."""
    ranked = [(event.score, video, event) for video, all_ in enumerate(found) for event in all_]
    ranked = [each for each in ranked if each[2].label == label]
    ranked.sort(key=lambda each: each[0], reverse=True)
    total = sum(each.label == label for all_ in shown for each in all_)
    taken: set[tuple[int, int]] = set()
    points = []  # recall and precision after each event
    num_right = 0
    for rank, (_, video, event) in enumerate(ranked, start=1):
        best = None
        for number, interval in enumerate(shown[video]):
            if interval.label != label or (video, number) in taken:
                continue
            start = max(event.start_seconds, interval.start_seconds)
            end = min(event.end_seconds, interval.end_seconds)
            first = min(event.start_seconds, interval.start_seconds)
            last = max(event.end_seconds, interval.end_seconds)
            if end <= start:
                continue
            overlap = (end - start) / (last - first)
            if overlap >= tiou and (best is None or overlap > best[0]):
                best = (overlap, number)
        if best is not None:
            taken.add((video, best[1]))
            num_right += 1
        points.append((num_right / total, num_right / rank))
    area, last_recall = 0.0, 0.0
    for recall, _ in points:
        if recall > last_recall:
            highest = max(precision for other, precision in points if other >= recall)
            area += (recall - last_recall) * highest
            last_recall = recall
    return area


def _random_case(seed: int) -> tuple[list[list[Interval]], list[list[Found]]]:
    rng = np.random.default_rng(seed)
    shown: list[list[Interval]] = []
    found: list[list[Found]] = []
    for _ in range(rng.integers(1, 5)):
        shown.append([])
        found.append([])
        for _ in range(rng.integers(0, 6)):
            start, length = rng.uniform(0, 20), rng.uniform(0.5, 6)
            shown[-1].append(Interval("ab"[rng.integers(2)], start, start + length))
        for near in [*shown[-1]] * 3:
            start = near.start_seconds + rng.normal(0, 0.6)
            end = max(start + 0.1, near.end_seconds + rng.normal(0, 0.6))
            label = near.label if rng.random() < 0.8 else "abc"[rng.integers(3)]
            if rng.random() < 0.7:
                found[-1].append(Found(label, start, end, rng.random()))
    shown[0].append(Interval("a", 30, 31))
    return shown, found


@pytest.mark.parametrize("seed", range(200))
def test_average_precision_is_that_of_its_definition(seed: int) -> None:
    shown, found = _random_case(seed)
    precisions = event_precisions(shown, found, TIOUS)
    assert set(precisions) == {each.label for all_ in shown for each in all_}
    for label, row in precisions.items():
        expected = [_loop_precision(shown, found, label, tiou) for tiou in TIOUS]
        assert row == pytest.approx(expected, abs=1e-12)


SPAN = Interval("a", 10, 20)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], 0.0),
        ([Found("a", 10, 20, 0.1)], 1.0),
        ([Found("a", 10, 15, 0.1)], 1.0),  # a tIoU of exactly 0.5 counts
        ([Found("a", 10, 14.9, 0.1)], 0.0),
        ([Found("a", 25, 30, 0.9), Found("a", 10, 20, 0.1)], 0.5),
        ([Found("a", 10, 20, 0.9), Found("a", 25, 30, 0.1)], 1.0),
        # Two of one interval: the better ranked takes it, though it overlaps less.
        ([Found("a", 10, 16, 0.9), Found("a", 10, 20, 0.1)], 1.0),
        # An event of another label counts in no average precision.
        ([Found("b", 10, 20, 0.9), Found("a", 10, 20, 0.1)], 1.0),
        # Equal scores stay in their order.
        ([Found("a", 25, 30, 0.5), Found("a", 10, 20, 0.5)], 0.5),
        ([Found("a", 10, 20, 0.5), Found("a", 25, 30, 0.5)], 1.0),
    ],
)
def test_average_precision_of_one_interval(found: list[Found], expected: float) -> None:
    assert event_precisions([[SPAN]], [found], [0.5]) == {"a": pytest.approx(expected)}


def test_precision_is_interpolated() -> None:
    # Right, wrong, right, of two: precision 1, 1/2, 2/3; at recall 1 it is 2/3.
    shown = [[Interval("a", 0, 1), Interval("a", 5, 6)]]
    found = [[Found("a", 0, 1, 0.9), Found("a", 2, 3, 0.8), Found("a", 5, 6, 0.7)]]
    assert event_precisions(shown, found, [0.5])["a"] == pytest.approx([(1 + 2 / 3) / 2])
    # Wrong, right, right: 0, 1/2, 2/3, and at recall 1/2 already 2/3.
    found = [[Found("a", 2, 3, 0.9), Found("a", 0, 1, 0.8), Found("a", 5, 6, 0.7)]]
    assert event_precisions(shown, found, [0.5])["a"] == pytest.approx([2 / 3])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_average_precision_depends_on_the_order_of_scores_alone(seed: int) -> None:
    shown, found = _random_case(seed)
    squared = [[event._replace(score=event.score**2 - 5) for event in all_] for all_ in found]
    first, second = (event_precisions(shown, each, [0.3, 0.7]) for each in (found, squared))
    for label in first:
        assert first[label] == pytest.approx(second[label])


# What is told of a stream.


def _video(
    intervals: list[Interval], live: list[LiveEvent], *, seconds: float = 60
) -> MeasuredVideo:
    times = np.arange(0.5, seconds)
    return MeasuredVideo(
        intervals=intervals,
        seconds=seconds,
        ranked=[],
        live=live,
        scores=np.zeros((len(times), 2)),
        times=times,
    )


def test_events_are_counted_against_the_interval_that_they_overlap_longest() -> None:
    video = _video(
        [
            Interval("a", 10, 20),
            Interval("a", 22, 30),
            Interval("b", 40, 50),
            Interval("b", 55, 58),
        ],
        [
            LiveEvent("a", 9, 15, 11.0),
            LiveEvent("a", 16, 29, 18.0),  # 4 seconds of the first and 7 of the second
            LiveEvent("b", 10, 20, 12.0),  # of another label: a false alarm
            LiveEvent("b", 41, 43, 43.0),
            LiveEvent("b", 44, 46, 46.0),
            LiveEvent("b", 50, 55, 52.0),  # touches two, and overlaps none
        ],
        seconds=1800,
    )
    measured = measure_events([video], ["a", "b"]).summary()
    assert measured["num_videos"] == 1
    assert measured["hours"] == 0.5
    assert measured["num_intervals"] == 4
    assert measured["num_events"] == 6
    assert measured["num_false"] == 2
    assert measured["false_alarms_per_hour"] == 4
    assert measured["num_missed"] == 1
    assert measured["miss_rate"] == 0.25
    assert measured["events_per_found"] == pytest.approx(4 / 3)
    # From 10 to 11, from 22 back to 18, from 40 to 43.
    assert measured["delay_p50_seconds"] == pytest.approx(1)
    assert measured["delay_p95_seconds"] == pytest.approx(np.percentile([1, -4, 3], 95))


def test_labels_that_no_video_shows_give_false_alarms_alone() -> None:
    video = _video([Interval("a", 1, 2)], [LiveEvent("b", 1, 2, 2.0)])
    metrics = measure_events([video, _video([], [LiveEvent("b", 5, 6)])], ["a", "b"])
    summary = metrics.summary()
    assert (summary["num_false"], summary["num_missed"], summary["miss_rate"]) == (2, 1, 1)
    assert summary["events_per_found"] is None
    assert summary["delay_p50_seconds"] is None
    assert summary["num_shown_labels"] == 1
    first, second = metrics.per_label(["a", "b"])
    assert (first.num_intervals, first.num_missed, first.thumos_ap) == (1, 1, 0.0)
    assert (second.num_false, second.thumos_ap, second.frame_ap) == (2, None, None)


def test_steps_are_ranked_over_all_videos_with_the_background() -> None:
    def video(intervals: list[Interval], column: list[float]) -> MeasuredVideo:
        return MeasuredVideo(
            intervals=intervals,
            seconds=len(column),
            ranked=[],
            live=[],
            scores=np.array([column, [0.0] * len(column)]).T,
            times=np.arange(len(column)) + 0.5,
        )

    videos = [
        # The end is exclusive: the step from 3 to 4, whose middle is 3.5, is not shown.
        video([Interval("a", 1, 3.5)], [0.1, 0.9, 0.2, 0.3]),
        video([], [0.8, 0.0]),
    ]
    metrics = measure_events(videos, ["a", "b"])
    # Ranked: 0.9 right, 0.8, 0.3, 0.2 right.
    assert metrics.frame_precisions == {"a": pytest.approx((1 + 2 / 4) / 2)}
    assert metrics.summary()["frame_map"] == pytest.approx(0.75)


def test_means_are_over_labels_and_overlaps() -> None:
    video = MeasuredVideo(
        intervals=[Interval("a", 0, 10), Interval("b", 20, 30)],
        seconds=60,
        ranked=[Found("a", 0, 6.2, 0.5), Found("b", 20, 29.2, 0.5)],
        live=[],
        scores=np.zeros((1, 2)),
        times=np.array([40.0]),
    )
    metrics = measure_events([video], ["a", "b"])
    # a overlaps by 0.62 and b by 0.92.
    assert metrics.mean_average_precision(THUMOS_TIOUS) == pytest.approx((4 / 5 + 1) / 2)
    assert metrics.mean_average_precision(ACTIVITYNET_TIOUS) == pytest.approx((3 / 10 + 9 / 10) / 2)
    summary = metrics.summary()
    assert [(each.tiou, each.map) for each in summary["map_at"]] == [
        (tiou, pytest.approx((tiou < 0.62) / 2 + (tiou < 0.92) / 2)) for tiou in TIOUS
    ]
    assert [each.thumos_ap for each in metrics.per_label(["a"])] == [pytest.approx(0.8)]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ShapeError, match="No video has an interval"):
        measure_events([_video([], [])], ["a", "b"])
    with pytest.raises(ShapeError, match=r"scores have shape \(60, 2\); expected \(60, 1\)"):
        measure_events([_video([SPAN], [])], ["a"])
