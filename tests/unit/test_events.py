"""Scores over time to events, on whole recordings and window by window."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actionclip_deploy import LabelBank, LabelError, ShapeError, ThresholdWarning
from actionclip_deploy.calibration import Calibration
from actionclip_deploy.events import (
    Event,
    EventTracker,
    ScoredWindow,
    WatchedLabels,
    find_events,
    thresholds_of,
    utc_text,
)
from actionclip_deploy.records import EventRecord, RuntimeInfo

STEP = 0.5
RTOL = 1e-9  # means are taken in another order

no_clock = settings(deadline=None, max_examples=60)  # on a busy machine an example takes a while


def bank_of(*labels: str, calibration: Calibration | None = None) -> LabelBank:
    embeddings = np.zeros((1, len(labels), 4), np.float32)
    embeddings[..., 0] = 1.0
    return LabelBank("mine", labels, ("{}",), embeddings, "ab" * 32, calibration)


def calibration(temperature: float = 2.0, threshold: float = 0.35) -> Calibration:
    return Calibration(
        temperature, threshold, "template-softmax", "1x1", "cd" * 32, 0.95, 0.95, None, 9, 0, 0, 0
    )


def starts(num_steps: int) -> NDArray[np.float64]:
    return np.arange(num_steps) * STEP


def events_of(column: Sequence[float], **options: Any) -> list[Event]:
    scores = np.array(column, np.float64).reshape(-1, 1)
    options = {"thresholds": 0.6, "starts_seconds": starts(len(scores)), **options}
    return find_events(scores, ["run"], step_seconds=STEP, **options)


def spans(events: Sequence[Event]) -> list[tuple[float, float]]:
    return [(event.start_seconds, event.end_seconds) for event in events]


# Whole recordings


def one_label_slowly(
    column: list[float],
    *,
    open_at: float,
    close_ratio: float,
    min_steps: int,
    merge_steps: int,
) -> list[tuple[int, int, float, float]]:
    """Events of one label as (first step, step after the last, mean, peak): step by step."""
    runs: list[list[int]] = []
    is_open = False
    for step, score in enumerate(column):
        if math.isnan(score) or (is_open and score < close_ratio * open_at):
            is_open = False
        elif is_open:
            runs[-1][1] = step + 1
        elif score >= open_at:
            runs.append([step, step + 1])
            is_open = True
    merged: list[list[int]] = []
    for first, end in runs:
        between = column[merged[-1][1] : first] if merged else [math.nan]
        if len(between) <= merge_steps and not any(map(math.isnan, between)):
            merged[-1][1] = end
        else:
            merged.append([first, end])
    return [
        (first, end, sum(column[first:end]) / (end - first), max(column[first:end]))
        for first, end in merged
        if end - first >= min_steps
    ]


a_score = st.sampled_from([0.0, 0.3, 0.47, 0.48, 0.5, 0.59, 0.6, 0.7, 1.0])
maybe_a_score = st.one_of(a_score, st.just(math.nan))


@no_clock
@given(
    column=st.lists(maybe_a_score, max_size=40),
    close_ratio=st.sampled_from([0.5, 0.8, 1.0]),
    min_steps=st.integers(0, 4),
    merge_steps=st.integers(0, 4),
)
def test_events_are_those_of_a_loop_over_steps(
    column: list[float], close_ratio: float, min_steps: int, merge_steps: int
) -> None:
    found = events_of(
        column,
        close_ratio=close_ratio,
        min_seconds=min_steps * STEP,
        merge_seconds=merge_steps * STEP,
    )
    slow = one_label_slowly(
        column,
        open_at=0.6,
        close_ratio=close_ratio,
        min_steps=min_steps,
        merge_steps=merge_steps,
    )
    assert spans(found) == [(first * STEP, end * STEP) for first, end, *_ in slow]
    for event, (_, _, mean, peak) in zip(found, slow, strict=True):
        assert event.mean == pytest.approx(mean, rel=RTOL)
        assert (event.peak, event.score) == (peak, event.mean)


@no_clock
@given(
    columns=st.lists(
        st.lists(maybe_a_score, min_size=12, max_size=12), min_size=1, max_size=4
    ).filter(lambda given: len(given) > 0),
    levels=st.sampled_from([(1.0,), (1.0, 0.5), (0.5, 0.8, 1.0, 1.5)]),
)
def test_each_label_and_level_is_by_itself(
    columns: list[list[float]], levels: tuple[float, ...]
) -> None:
    labels = [f"label {index}" for index in range(len(columns))]
    thresholds = np.array([0.6, 0.3, 0.5, math.inf][: len(columns)])
    found = find_events(
        np.array(columns).T,
        labels,
        starts_seconds=starts(12),
        step_seconds=STEP,
        thresholds=thresholds,
        levels=levels,
    )
    expected = {
        (first * STEP, end * STEP, label)
        for label, column, threshold in zip(labels, columns, thresholds, strict=True)
        for level in levels
        for first, end, *_ in one_label_slowly(
            column, open_at=threshold * level, close_ratio=0.8, min_steps=0, merge_steps=0
        )
        if math.isfinite(threshold)
    }
    assert [(e.start_seconds, e.end_seconds, e.label) for e in found] == sorted(expected)


def test_an_event_opens_at_the_threshold_and_closes_only_below_a_share_of_it() -> None:
    assert spans(events_of([0.59, 0.6, 0.5, 0.48, 0.47, 0.59])) == [(0.5, 2.0)]


def test_time_without_scores_ends_an_event_and_nothing_is_merged_across_it() -> None:
    late = np.array([0.0, 0.5, 1.8, 2.3])
    assert spans(events_of([1, 1, 1, 1], starts_seconds=late, merge_seconds=9)) == [
        (0.0, 1.0),
        (1.8, 2.8),
    ]
    assert spans(events_of([1, math.nan, 1], merge_seconds=9)) == [(0.0, 0.5), (1.0, 1.5)]


def test_times_that_jitter_by_less_than_half_a_step_are_no_gap() -> None:
    assert spans(events_of([1, 1, 1], starts_seconds=np.array([0.0, 0.6, 1.0]))) == [(0.0, 1.5)]


def test_sums_of_steps_that_floats_do_not_have_exactly_are_equal_to_their_bounds() -> None:
    times = np.cumsum(np.full(9, 0.1))
    column = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1.0]).reshape(-1, 1)
    for merge, count in ((0.3, 1), (0.29, 2)):
        found = find_events(
            column,
            ["run"],
            starts_seconds=times,
            step_seconds=0.1,
            thresholds=0.5,
            merge_seconds=merge,
            min_seconds=0.3,
        )
        assert len(found) == count


def test_soft_nms_lowers_events_that_overlap_better_ones() -> None:
    column = [0.4, 0.9, 0.4, 0.0, 0.4]
    options: dict[str, Any] = {"levels": (1.0, 0.5), "close_ratio": 1.0}
    plain = events_of(column, **options)
    lowered = events_of(column, soft_nms_sigma=0.5, **options)
    assert spans(plain) == spans(lowered) == [(0.0, 1.5), (0.5, 1.0), (2.0, 2.5)]
    overlap = 0.5 / 1.5
    wanted = [(1.7 / 3) * math.exp(-(overlap**2) / 0.5), 0.9, 0.4]
    assert [event.score for event in lowered] == pytest.approx(wanted, rel=RTOL)
    assert [event.mean for event in lowered] == [event.mean for event in plain]


@no_clock
@given(st.lists(st.sampled_from([0.1, 0.2, 0.4, 0.7, 0.9]), min_size=3, max_size=25))
def test_soft_nms_is_that_of_a_loop_over_events(column: list[float]) -> None:
    levels, sigma = (1.5, 1.0, 0.6, 0.3), 0.4
    options: dict[str, Any] = {"levels": levels, "close_ratio": 1.0}
    plain = events_of(column, **options)
    left = [[event.mean, event.start_seconds, event.end_seconds] for event in plain]
    expected = {}
    while left:
        best = max(left, key=lambda each: each[0])  # the first of equal ones
        left.remove(best)
        expected[best[1], best[2]] = best[0]
        for other in left:
            inter = max(0.0, min(best[2], other[2]) - max(best[1], other[1]))
            union = (best[2] - best[1]) + (other[2] - other[1]) - inter
            other[0] *= math.exp(-((inter / union) ** 2) / sigma)
    found = events_of(column, soft_nms_sigma=sigma, **options)
    scores = {(event.start_seconds, event.end_seconds): event.score for event in found}
    assert scores == pytest.approx(expected, rel=1e-6)


def test_a_label_called_unknown_is_never_an_event() -> None:
    found = find_events(
        np.ones((4, 2)),
        ["Unknown ", "run"],
        starts_seconds=starts(4),
        step_seconds=STEP,
        thresholds=0.5,
    )
    assert [event.label for event in found] == ["run"]


def test_a_recording_without_steps_has_no_events() -> None:
    assert events_of([]) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"close_ratio": 0}, "close_ratio is 0; it must be above 0"),
        ({"min_seconds": -1}, "min_seconds is -1; it must be 0 or more"),
        ({"merge_seconds": math.nan}, "merge_seconds is nan"),
        ({"levels": ()}, "give one positive factor or more"),
        ({"soft_nms_sigma": 0}, "soft_nms_sigma is 0; it must be above 0"),
        ({"thresholds": 0.0}, "threshold of 'run' is 0; it must be above"),
        ({"thresholds": np.array([0.1, 0.2])}, r"expected one number, or \(1,\)"),
        ({"starts_seconds": np.array([0.0, 0.1, 0.2])}, "may not overlap: give scores per step"),
        ({"starts_seconds": np.array([0.0])}, r"expected \(S, C\), C labels and \(S,\)"),
        ({"starts_seconds": np.array([0.0, math.nan, 1.0])}, "not finite"),
    ],
)
def test_wrong_arguments_of_find_events_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        events_of([1, 1, 1], **options)


def test_infinite_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="holds infinite values"):
        events_of([1, math.inf])


# Thresholds and groups


def test_thresholds_are_those_of_the_calibration_of_the_same_method() -> None:
    bank = bank_of("a", "b", "UNKNOWN", calibration=calibration())
    assert thresholds_of(bank, "template-softmax").tolist() == [0.35, 0.35, math.inf]


@pytest.mark.parametrize(
    ("method", "threshold", "told"),
    [
        ("mean-embedding", 0.6, "not calibrated for mean-embedding, .* 0.6, is a guess"),
        ("independent", 0.5, "lie near the middle, .* 0.5, is a guess"),
    ],
)
def test_thresholds_without_calibration_are_guesses_and_said_to_be(
    method: Any, threshold: float, told: str
) -> None:
    bank = bank_of("a", "b", calibration=calibration())
    with pytest.warns(ThresholdWarning, match=told):
        assert thresholds_of(bank, method).tolist() == [threshold] * 2
    with pytest.warns(ThresholdWarning, match=told):
        assert WatchedLabels.of(bank, method).thresholds.tolist() == [threshold] * 2


def test_the_callers_thresholds_come_first_and_all_of_them_need_no_warning() -> None:
    bank = bank_of("a", "b")
    assert thresholds_of(bank, "independent", 0.7).tolist() == [0.7, 0.7]
    assert thresholds_of(bank, "independent", {"b": 0.2, "a": 0.1}).tolist() == [0.1, 0.2]
    with pytest.warns(ThresholdWarning):
        assert thresholds_of(bank, "independent", {"b": 0.2}).tolist() == [0.5, 0.2]
    with pytest.raises(LabelError, match="threshold for 'c', which is neither a label"):
        thresholds_of(bank, "independent", {"c": 0.2})


def test_scores_are_calibrated_as_the_threshold_is() -> None:
    watched = WatchedLabels.of(bank_of("a", "b", calibration=calibration(2.0)), "template-softmax")
    scores = watched.scores(np.array([[0.8, 0.2], [math.nan, math.nan]], np.float32))
    share = math.sqrt(0.8) / (math.sqrt(0.8) + math.sqrt(0.2))  # of a temperature of 2
    assert scores[0].tolist() == pytest.approx([share, 1 - share], rel=1e-6)
    assert np.isnan(scores[1]).all()


@pytest.mark.parametrize(
    ("method", "of_the_group"), [("template-softmax", 0.7), ("independent", 0.4)]
)
def test_a_group_is_the_sum_of_shares_or_the_best_of_independent_scores(
    method: Any, of_the_group: float
) -> None:
    watched = WatchedLabels.of(
        bank_of("punch", "wave", "kick"),
        method,
        thresholds={"fight": 0.25, "wave": 0.5},
        groups={"fight": ["kick", "punch"]},
    )
    assert watched.names == ("wave", "fight")
    assert watched.thresholds.tolist() == [0.5, 0.25]
    scores = watched.scores(np.array([[0.3, 0.3, 0.4]]))
    assert scores[0].tolist() == pytest.approx([0.3, of_the_group])


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"g": ["no"]}, "has the label 'no', which is not in the label bank"),
        ({"g": "a"}, "give a list of its labels"),
        ({"g": []}, "give a list of its labels"),
        ({"g": ["a", "a"]}, "has a label twice"),
        ({"b": ["a"]}, "has the name of a label that is in no group"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: Any, told: str) -> None:
    with pytest.raises(LabelError, match=told):
        WatchedLabels.of(bank_of("a", "b"), "independent", thresholds=0.5, groups=groups)


# Window by window. Windows of 2 s, one each half second.

WINDOW = 2.0


def windows_of(
    columns: Sequence[Sequence[float]],
    watched: WatchedLabels,
    *,
    source: str = "door",
    session: int = 0,
    start: float = 0.0,
    wall: float = 1_800_000_000.0,
) -> list[ScoredWindow]:
    """Windows whose scores are the rows given, from `start` on."""
    return [
        ScoredWindow(
            source,
            session,
            begin := start + STEP * index,
            begin + WINDOW,
            STEP,
            wall + begin,
            wall + begin + WINDOW,
            np.array(scores, np.float64),
            watched,
        )
        for index, scores in enumerate(columns)
    ]


def watch(*names: str, **options: Any) -> WatchedLabels:
    options = {"thresholds": 0.6, **options}
    return WatchedLabels.of(bank_of(*(names or ("run",))), "independent", **options)


def run_through(
    tracker: EventTracker, windows: Sequence[ScoredWindow], *, end: bool = False
) -> list[EventRecord]:
    told = list(itertools.chain.from_iterable(map(tracker.push, windows)))
    return told + (tracker.end() if end else [])


def kinds(records: Sequence[EventRecord]) -> list[str]:
    return [record.kind for record in records]


def column(*scores: float) -> list[list[float]]:
    return [[score] for score in scores]


@no_clock
@given(
    scores=st.lists(a_score, min_size=1, max_size=40),
    num_averaged=st.integers(1, 3),
    min_strides=st.integers(0, 4),
    merge_windows=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_events_of_windows_are_those_of_their_means_as_a_recording(
    scores: list[float], num_averaged: int, min_strides: int, merge_windows: float
) -> None:
    # Zeros at both ends, so that no event touches an end of the session.
    rows = [0.0] * 4 + scores + [0.0] * 12
    tracker = EventTracker(
        num_averaged=num_averaged,
        num_closing=1,
        min_strides=min_strides,
        merge_windows=merge_windows,
    )
    told = run_through(tracker, windows_of(column(*rows), watch()))
    means = [
        np.mean(rows[index : index + num_averaged]) for index in range(len(rows) - num_averaged + 1)
    ]
    middles = [
        (STEP * (index + index + num_averaged - 1) + WINDOW) / 2 for index in range(len(means))
    ]
    expected = find_events(
        np.array(means).reshape(-1, 1),
        ["run"],
        starts_seconds=np.array(middles) - STEP / 2,
        step_seconds=STEP,
        thresholds=0.6,
        min_seconds=min_strides * STEP,
        merge_seconds=merge_windows * WINDOW,
    )
    ends = [record for record in told if record.kind == "end"]
    assert [(r.start_seconds, r.end_seconds) for r in ends] == spans(expected)
    assert [r.mean for r in ends] == pytest.approx([e.mean for e in expected], rel=RTOL)
    assert [r.peak for r in ends] == pytest.approx([e.peak for e in expected], rel=RTOL)
    assert kinds(told).count("new") == len(ends)


def test_an_event_is_told_of_when_it_begins_each_second_and_when_it_has_ended() -> None:
    rows = column(*[0.0] * 3, *[0.9] * 8, *[0.0] * 8)
    tracker = EventTracker(runtime=RuntimeInfo("fake", "cpu", "fp32", 1))
    told = run_through(tracker, windows_of(rows, watch()))
    assert kinds(told) == ["new", "update", "update", "end"]
    assert [record.number for record in told] == [0, 1, 2, 3]
    assert len({record.id for record in told}) == 1
    first, *_, last = told
    # Means are 0.45 with the last zero, and 0.9 for seven steps from windows 3 and 4 on, whose
    # middle is 2.75 s; and half of 0.9 is below 0.8 of 0.6.
    assert (first.start_seconds, first.end_seconds, first.end_time) == (2.5, None, None)
    assert (last.start_seconds, last.end_seconds) == (2.5, 6.0)
    assert (last.start_time, last.end_time) == (
        "2027-01-15T08:00:02.500Z",
        "2027-01-15T08:00:06.000Z",
    )
    assert (last.mean, last.peak, last.threshold) == (pytest.approx(0.9), 0.9, 0.6)
    assert (last.end_reason, first.end_reason) == ("closed", None)
    assert last.bank.name == "mine"
    assert last.runtime is not None
    assert (last.source, last.label, last.method) == ("door", "run", "independent")


def test_one_low_window_does_not_close_an_event_and_two_do() -> None:
    tracker = EventTracker(num_averaged=1, merge_windows=0)
    rows = column(0, *[0.9] * 3, 0, *[0.9] * 3, 0, 0, *[0.9] * 3, 0, 0)
    ends = [r for r in run_through(tracker, windows_of(rows, watch())) if r.kind == "end"]
    assert [(r.start_seconds, r.end_seconds) for r in ends] == [(1.25, 4.75), (5.75, 7.25)]
    assert ends[0].mean == pytest.approx(6 * 0.9 / 7)  # with the low one between


def test_a_flicker_is_told_to_nobody() -> None:
    tracker = EventTracker(num_averaged=1)
    rows = column(0, 0, 0.9, *[0.0] * 12)
    assert run_through(tracker, windows_of(rows, watch()), end=True) == []


def test_the_mean_of_windows_opens_an_event_and_not_one_of_them() -> None:
    rows = column(0, 0, 1.0, 0, 0, 1.0, 0, 0)
    assert run_through(EventTracker(min_strides=0), windows_of(rows, watch()), end=True) == []


def test_an_event_from_end_to_end_of_a_session_has_the_times_of_its_windows() -> None:
    told = run_through(EventTracker(), windows_of(column(*[0.9] * 4), watch()), end=True)
    assert kinds(told) == ["new", "end"]
    assert (told[1].start_seconds, told[1].end_seconds) == (0.0, 3 * STEP + WINDOW)
    assert told[1].end_reason == "session"


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        (windows_of(column(0.0, 0.0), watch(), session=1), "session"),
        (windows_of(column(0.0, 0.0), watch(), start=3 * STEP + WINDOW + 0.1), "gap"),
        (windows_of(column(math.nan), watch(), start=4 * STEP), "gap"),
    ],
)
def test_a_gap_or_another_session_ends_what_is_open(
    windows: list[ScoredWindow], reason: str
) -> None:
    tracker = EventTracker()
    run_through(tracker, windows_of(column(*[0.9] * 4), watch()))
    assert tracker.open_labels("door") == ["run"]
    (ended,) = tracker.push(windows[0])
    assert (ended.kind, ended.end_reason, ended.end_seconds) == ("end", reason, 3.5)
    assert tracker.open_labels("door") == []


def test_windows_that_were_left_out_are_no_gap_while_the_others_overlap() -> None:
    tracker = EventTracker()
    windows = windows_of(column(*[0.9] * 13), watch())[::3]
    assert kinds(run_through(tracker, windows, end=True)) == ["new", "update", "update", "end"]


def test_sources_and_labels_are_told_apart() -> None:
    watched = watch("run", "jump")
    tracker = EventTracker()
    one = windows_of([[0.9, 0.0]] * 6, watched)
    other = windows_of([[0.9, 0.9]] * 6, watched, source="yard")
    told = run_through(tracker, [w for pair in zip(one, other, strict=True) for w in pair])
    first = {(r.source, r.label): r.id for r in told if r.kind == "new"}
    assert set(first) == {("door", "run"), ("yard", "run"), ("yard", "jump")}
    assert len(set(first.values())) == 3
    assert {r.source for r in tracker.end("door")} == {"door"}
    assert {(r.source, r.label) for r in tracker.end()} == {("yard", "run"), ("yard", "jump")}


def test_ids_sort_by_when_they_were_given_even_if_the_clock_goes_back() -> None:
    times = iter([100.0, 50.0, 100.0, 100.001, 7.0])
    tracker = EventTracker(clock=lambda: next(times))
    ids = []
    for session in range(5):
        windows = windows_of(column(*[0.9] * 4), watch(), session=session)
        ids += [r.id for r in run_through(tracker, windows) if r.kind == "new"]
    assert ids == sorted(ids)
    assert len(set(ids)) == 5
    other = run_through(EventTracker(clock=lambda: 100.0), windows_of(column(*[0.9] * 4), watch()))
    assert other[0].id not in ids


def test_after_an_event_none_of_its_label_begins_for_a_while() -> None:
    rows = [[0.9, 0.0]] * 6 + [[0.0, 0.0]] * 7 + [[0.9, 0.9]] * 20
    windows = windows_of(rows, watch("run", "jump"))
    starting: dict[float, list[tuple[str, float]]] = {}
    for cooldown in (0.0, 8.0, 100.0):
        told = run_through(EventTracker(cooldown_seconds=cooldown), windows)
        starting[cooldown] = [(r.label, r.start_seconds) for r in told if r.kind == "new"]
    assert starting[0.0] == [("run", 0.0), ("run", 7.5), ("jump", 7.5)]
    # The first one ends at 4 s: the middle of the last two windows above is 3.5 s or so.
    assert starting[8.0][:2] == [("run", 0.0), ("jump", 7.5)]
    ((label, start),) = starting[8.0][2:]
    assert label == "run"
    assert 8.0 + 3.5 <= start <= 8.0 + 4.5
    assert starting[100.0] == [("run", 0.0), ("jump", 7.5)]


def test_a_cooldown_lasts_over_a_new_session() -> None:
    tracker = EventTracker(cooldown_seconds=60)
    run_through(tracker, windows_of(column(*[0.9] * 4), watch()))
    again = windows_of(column(*[0.9] * 4), watch(), session=1, wall=1_800_000_010.0)
    assert kinds(run_through(tracker, again)) == ["end"]
    later = windows_of(column(*[0.9] * 4), watch(), session=2, wall=1_800_000_080.0)
    assert kinds(run_through(tracker, later)) == ["new"]


def test_labels_that_go_end_their_events_and_others_go_on_by_the_new_bank() -> None:
    old, new = watch("run", "jump"), watch("wave", "run")
    new = replace(new, bank=new.bank.model_copy(update={"version": 2}))
    tracker = EventTracker()
    told = run_through(tracker, windows_of([[0.9, 0.9]] * 4, old))
    ids = {r.label: r.id for r in told}
    gone, _ = tracker.push(windows_of([[0.0, 0.9]], new, start=4 * STEP)[0])
    assert (gone.label, gone.kind, gone.end_reason, gone.id) == (
        "jump",
        "end",
        "labels",
        ids["jump"],
    )
    assert gone.bank.version is None
    told = run_through(tracker, windows_of([[0.9, 0.9]] * 8, new, start=5 * STEP))
    of_run = [r for r in told if r.label == "run"]
    assert set(kinds(of_run)) == {"update"}
    assert {r.id for r in of_run} == {ids["run"]}
    assert {r.bank.version for r in told} == {2}
    assert [r.label for r in told if r.kind == "new"] == ["wave"]


def test_unknown_never_fires() -> None:
    tracker = EventTracker()
    told = run_through(tracker, windows_of([[0.9, 0.9]] * 6, watch("unknown", "run")), end=True)
    assert {r.label for r in told} == {"run"}


def test_a_group_is_one_event_under_its_name() -> None:
    watched = WatchedLabels.of(
        bank_of("punch", "kick", "wave"),
        "template-softmax",
        thresholds=0.6,
        groups={"fight": ["punch", "kick"]},
    )
    rows = [[0.35, 0.35, 0.3], [0.1, 0.7, 0.2], [0.7, 0.1, 0.2], [0.4, 0.4, 0.2]]
    told = run_through(EventTracker(), windows_of(rows, watched), end=True)
    assert [(r.kind, r.label) for r in told] == [("new", "fight"), ("end", "fight")]


def test_wrong_windows_and_options_are_refused() -> None:
    window = windows_of(column(0.5), watch())[0]
    with pytest.raises(ShapeError, match=r"expected \(1,\), one for each label"):
        replace(window, scores=np.zeros(2))
    with pytest.raises(ValueError, match="must end after it starts"):
        replace(window, end_seconds=window.start_seconds)
    for name, value in (("num_averaged", 0), ("num_closing", 0), ("min_strides", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
            EventTracker(**{name: value})


def test_times_are_iso_8601_in_utc_with_milliseconds() -> None:
    assert utc_text(0.0) == "1970-01-01T00:00:00.000Z"
    assert utc_text(1_800_000_000.9996) == "2027-01-15T08:00:01.000Z"


def test_no_warning_where_all_thresholds_are_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WatchedLabels.of(bank_of("a", "b", calibration=calibration()), "template-softmax")
