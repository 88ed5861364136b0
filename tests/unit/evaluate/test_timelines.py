"""What events are worth against annotated intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actionclip_deploy import Bundle, LabelBank, Recognizer, open_runtime
from actionclip_deploy.errors import ShapeError, VideoError
from actionclip_deploy.evaluate.intervals import AnnotatedVideo
from actionclip_deploy.evaluate.timelines import (
    ACTIVITYNET_TIOUS,
    THUMOS_TIOUS,
    TIOUS,
    MeasuredVideo,
    evaluate_timelines,
    event_precisions,
    found_by,
    live_events,
    measure_events,
    measured_video,
)
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.recognizer import Scoring
from actionclip_deploy.records import (
    Interval,
    LiveEvent,
    RuntimeInfo,
    TimelineEvaluationRecord,
)
from actionclip_deploy.stream import Window, WindowCounts, WindowGrid
from actionclip_deploy.timeline import Timeline

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


def test_each_interval_is_found_once_in_its_own_video() -> None:
    spans = [np.array([[10.0, 20.0], [40.0, 50.0]]), np.array([[0.0, 10.0]]), np.empty((0, 2))]
    ranked = [
        (0, Found("", 11, 20, 0)),  # 9 of 10 seconds
        (0, Found("", 10, 19, 0)),  # of the same interval
        (1, Found("", 0, 4, 0)),  # 4 of 10
        (0, Found("", 40, 60, 0)),  # 10 of 20
        (1, Found("", 5, 12, 0)),  # 5 of 12
        (2, Found("", 0, 10, 0)),  # of a video that shows nothing
        (1, Found("", 0, 10, 0)),
    ]
    hits = found_by(spans, ranked, [0.3, 0.5])
    assert hits.astype(int).tolist() == [
        [1, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 1],
    ]
    assert found_by(spans, [], [0.5]).shape == (1, 0)


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
    assert summary["map_at"] == {
        f"{tiou:g}": pytest.approx((tiou < 0.62) / 2 + (tiou < 0.92) / 2) for tiou in TIOUS
    }
    assert [each.thumos_ap for each in metrics.per_label(["a"])] == [pytest.approx(0.8)]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ShapeError, match="No video has an interval"):
        measure_events([_video([], [])], ["a", "b"])
    with pytest.raises(ShapeError, match=r"scores have shape \(60, 2\); expected \(60, 1\)"):
        measure_events([_video([SPAN], [])], ["a"])


# Timelines.

# Windows of 4 s on a grid of half a second.
GRID = WindowGrid(4.0, 8)
INFO = RuntimeInfo("onnxruntime", "cpu", "fp32", 1)


def _timeline(bank: LabelBank, scores: list[tuple[float, float]]) -> Timeline:
    """A timeline of windows with these scores of two labels, at a threshold of 0.6."""
    watched = WatchedLabels.of(bank, "template-softmax", thresholds=0.6)
    windows = tuple(Window(0, n, n * 0.5, n * 0.5 + 4) for n in range(len(scores)))
    return Timeline(
        video=Path("a.mp4"),
        grid=GRID,
        windows=windows,
        scores=np.array(scores, np.float32),
        watched=watched,
        events=(),
        duration_seconds=len(scores) * 0.5 + 3.5,
        counts=WindowCounts(),
        scoring=Scoring(bank, "template-softmax", INFO),
        timings_ms={},
    )


def _bank() -> LabelBank:
    embeddings = np.zeros((1, 2, 4), np.float32)
    embeddings[..., 0] = 1.0
    return LabelBank("mine", ("a", "b"), ("{}",), embeddings, "ab" * 32, None)


# A label from the 6th window to the 15th.
HIGH = [(0.9, 0.1) if 6 <= n <= 15 else (0.0, 1.0 / 3) for n in range(24)]


def test_live_events_are_told_at_the_end_of_the_window_that_completes_them() -> None:
    # A step is the mean of two windows, in the middle of the time that they cover: of the windows
    # 6 and 7, from 5.0 to 5.5. Two steps make an event, so the window 8, which ends at 8.0, tells
    # of it. The last that is high is that of the windows 14 and 15, and ends at 9.5.
    assert live_events(_timeline(_bank(), HIGH)) == [LiveEvent("a", 5.0, 9.5, new_seconds=8.0)]
    # Two seconds are four steps, which the window 10 completes.
    (event,) = live_events(_timeline(_bank(), HIGH), min_seconds=2.0)
    assert event.new_seconds == 9.0
    assert live_events(_timeline(_bank(), HIGH), min_seconds=6.0) == []


def test_an_event_that_lasts_to_the_end_of_a_video_ends_there() -> None:
    (event,) = live_events(_timeline(_bank(), HIGH[:14]))
    assert (event.start_seconds, event.end_seconds) == (5.0, 13 * 0.5 + 4)


def test_ranked_events_of_a_timeline_are_also_weak_ones() -> None:
    scores = [(0.3, 0.01) if 8 <= n <= 20 else (0.02, 0.01) for n in range(30)]
    timeline = _timeline(_bank(), scores)
    video = measured_video([Interval("a", 5.0, 10.0)], timeline, [])
    # In each step the mean of the windows over it, of which eight have 0.3 from 7.5 to 10.5.
    assert {event.label for event in video.ranked} == {"a"}
    assert len(video.scores) == len(video.times) == 30 + 7
    assert video.times[:2].tolist() == [0.25, 0.75]
    assert video.scores[video.times == 8.25, 0] == pytest.approx(0.3)
    assert video.scores[0] == pytest.approx([0.02, 0.01])


def test_independent_scores_are_ranked_from_their_threshold_on() -> None:
    timeline = _timeline(_bank(), [(0.5, 0.55)] * 12)
    watched = WatchedLabels.of(_bank(), "independent", thresholds=0.52)
    found = measured_video([], replace(timeline, watched=watched), []).ranked
    assert [event.label for event in found] == ["b"]


def test_videos_are_read_and_measured(tiny_bundle: Path, rendered_video: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    gone = rendered_video.with_name("gone.mp4")
    videos = [
        AnnotatedVideo(rendered_video, (Interval("yoga", 0.0, 3.0),)),
        AnnotatedVideo(gone, (Interval("run", 0.0, 3.0),)),
    ]
    told: list[str] = []
    with open_runtime(bundle) as runtime:
        bank = LabelBank.build(bundle, runtime, ("yoga", "run"), name="mine")
        evaluate = partial(
            evaluate_timelines,
            Recognizer(runtime, bank),
            grid=WindowGrid(2.0, 8),
            watched=WatchedLabels.of(bank, "template-softmax", thresholds=1e-12),
            on_video=lambda outcome: told.append(type(outcome).__name__),
        )
        evaluation = evaluate(videos)
        assert told == ["Timeline", "FailedVideo"]
        with pytest.raises(VideoError, match=r"None of the 1 videos.*gone\.mp4"):
            evaluate(videos[1:])
        with pytest.raises(VideoError, match="There are no videos"):
            evaluate([])
    record = evaluation.record()
    assert (record.num_videos, record.num_failed, record.num_intervals) == (1, 1, 1)
    # Both labels always score more than that, so each is one event from begin to end.
    assert record.videos is not None
    events = record.videos[0].events
    assert {event.label for event in events} == {"yoga", "run"}
    assert all(event.start_seconds == 0 for event in events)
    assert record.num_false == 1
    assert record.miss_rate == 0
    assert record.thumos_map == 1.0
    assert TimelineEvaluationRecord.model_validate_json(record.to_json()) == record
