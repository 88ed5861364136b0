"""Timelines of annotated long videos: what their events are worth.

An event is a label from one time to another, as `events` finds it. Two kinds are measured. Ranked
ones, found in the whole recording, give average precision; live ones, as a stream tells them while
it runs, give false alarms, misses and delays.

Letters: S steps of a grid in time, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError, VideoError
from actionclip_deploy.evaluate.intervals import AnnotatedVideo
from actionclip_deploy.evaluate.metrics import average_precision
from actionclip_deploy.events import EventTracker, ScoredWindow, WatchedLabels, find_events
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.recognizer import FailedVideo, Recognizer, Scoring
from actionclip_deploy.records import (
    EvaluatedTimeline,
    EventRecord,
    Interval,
    IntervalRecord,
    LabelEvents,
    LiveEvent,
    TimelineEvaluationRecord,
    UnreadVideo,
)
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import Timeline, read_timeline

# Temporal intersection over union from which an event counts as an interval, as the two benchmarks
# average over them.
THUMOS_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TIOUS = tuple(sorted({*THUMOS_TIOUS, *ACTIVITYNET_TIOUS}))

# Events for average precision are found at this share of the thresholds: a ranking wants weak ones
# too. Of independent scores even a label that is not shown has half or more of a threshold.
_RANKING_LEVELS: dict[ScoreMethod, float] = {"independent": 1.0}
_RANKING_LEVEL = 0.1
_MIN_STRIDES = 2.0  # of an event, where nothing else is said


@dataclass(frozen=True, eq=False)
class TimelineEvaluation:
    """Long videos, what was found in them, and what was measured.

    Attributes:
        videos: Those that gave windows.
        timelines: Of each of them.
        live: What a stream of each of them would have told, at the same thresholds.
        failed: Videos that gave none; they count neither as right nor as wrong.
        metrics: The measurements.
        grid: Where windows lay.
        scoring: What the timelines were made with.
        seconds: What it took, without the text.
    """

    videos: tuple[AnnotatedVideo, ...]
    timelines: tuple[Timeline, ...]
    live: tuple[tuple[LiveEvent, ...], ...]
    failed: tuple[FailedVideo, ...]
    metrics: EventMetrics
    grid: WindowGrid
    scoring: Scoring
    seconds: float

    def summary(self) -> TimelineEvaluationRecord:
        """What there is to tell, without single labels and videos."""
        watched = self.timelines[0].watched
        thresholds = np.unique(watched.thresholds[np.isfinite(watched.thresholds)])
        return TimelineEvaluationRecord(
            **self.metrics.summary(),
            num_labels=len(watched.names),
            threshold=float(thresholds[0]) if len(thresholds) == 1 else None,
            window_seconds=self.grid.window_seconds,
            stride_seconds=self.grid.stride_seconds,
            num_failed=len(self.failed),
            failed=tuple(
                UnreadVideo(video=str(each.video), error=str(each.error)) for each in self.failed
            ),
            runtime=self.scoring.runtime,
            scores=self.scoring.method,
            num_templates=len(self.scoring.bank.templates),
            seconds=round(self.seconds, 3),
        )

    def record(self) -> TimelineEvaluationRecord:
        """Everything: also each label, and each video with its intervals and events."""
        videos = tuple(
            EvaluatedTimeline(
                video=str(video.path),
                duration_seconds=round(timeline.duration_seconds, 6),
                intervals=video.intervals,
                events=tuple(map(IntervalRecord.model_validate, timeline.events)),
                live_events=live,
            )
            for video, timeline, live in zip(self.videos, self.timelines, self.live, strict=True)
        )
        per_label = self.metrics.per_label(self.timelines[0].watched.names)
        return self.summary().model_copy(update={"per_label": per_label, "videos": videos})


def evaluate_timelines(
    recognizer: Recognizer,
    videos: Iterable[AnnotatedVideo],
    grid: WindowGrid,
    *,
    watched: WatchedLabels | None = None,
    min_seconds: float | None = None,
    num_threads: int | None = None,
    on_video: Callable[[Timeline | FailedVideo], None] | None = None,
) -> TimelineEvaluation:
    """Find events in annotated videos, and measure them against the annotations.

    Args:
        recognizer: Its bank has the labels of the annotations.
        videos: The videos; one without intervals tells of false alarms.
        grid: Where windows lie.
        watched: Thresholds; None for those of the bank.
        min_seconds: Shorter events are left out; None for two strides.
        num_threads: Of the decoder.
        on_video: Called after each video.

    Raises:
        VideoError: If none of the videos gives windows.
        ShapeError: If none of those that do shows one of the labels.
        InferenceError: If the runtime fails.
    """
    watched = watched or WatchedLabels.of(recognizer.bank, recognizer.method)
    started = time.perf_counter()
    shown: list[AnnotatedVideo] = []
    timelines: list[Timeline] = []
    failed: list[FailedVideo] = []
    measured: list[MeasuredVideo] = []
    for video in videos:
        outcome: Timeline | FailedVideo
        try:
            outcome = read_timeline(
                recognizer,
                video.path,
                grid,
                watched=watched,
                min_seconds=min_seconds,
                num_threads=num_threads,
            )
        except VideoError as exc:
            outcome = FailedVideo(video.path, exc)
        if isinstance(outcome, Timeline):
            shown.append(video)
            timelines.append(outcome)
            live = live_events(outcome, min_seconds=min_seconds)
            measured.append(measured_video(video.intervals, outcome, live))
        else:
            failed.append(outcome)
        if on_video is not None:
            on_video(outcome)
    if not measured:
        raise VideoError(
            f"None of the {len(failed)} videos could be read; the first error: {failed[0].error}"
            if failed
            else "There are no videos; give annotations that list some."
        )
    return TimelineEvaluation(
        videos=tuple(shown),
        timelines=tuple(timelines),
        live=tuple(tuple(each.live) for each in measured),
        failed=tuple(failed),
        metrics=measure_events(measured, watched.names),
        grid=grid,
        scoring=recognizer.scoring,
        seconds=time.perf_counter() - started,
    )


def measured_video(
    intervals: Sequence[Interval], timeline: Timeline, live: Sequence[LiveEvent]
) -> MeasuredVideo:
    """What a timeline is measured by; its events for average precision are weaker ones, too."""
    watched, grid = timeline.watched, timeline.grid
    starts, scores = timeline.step_scores()
    ranked = find_events(
        scores,
        watched.names,
        starts_seconds=starts,
        step_seconds=grid.step_seconds,
        thresholds=watched.thresholds,
        levels=(_RANKING_LEVELS.get(watched.method, _RANKING_LEVEL),),
    )
    times = starts + grid.step_seconds / 2
    return MeasuredVideo(
        intervals, timeline.duration_seconds, ranked, live, scores.astype(np.float32), times
    )


def live_events(timeline: Timeline, *, min_seconds: float | None = None) -> list[LiveEvent]:
    """What a stream of a video tells: its windows, one after the other, through an `EventTracker`.

    An event is told at the end of the window that completes it, as if computing took no time.

    Args:
        min_seconds: Events are told once they are as long; None for two strides.
    """
    grid = timeline.grid
    tracker = EventTracker(
        min_strides=_MIN_STRIDES if min_seconds is None else min_seconds / grid.stride_seconds
    )
    told: dict[str, float] = {}
    events: list[LiveEvent] = []

    def take(records: Iterable[EventRecord], seconds: float) -> None:
        for record in records:
            if record.kind == "new":
                told[record.id] = seconds
            elif record.kind == "end" and record.end_seconds is not None:
                span = record.start_seconds, record.end_seconds
                events.append(LiveEvent(record.label, *span, told[record.id]))

    for window, scores in zip(timeline.windows, timeline.scores, strict=True):
        take(
            tracker.push(
                ScoredWindow(
                    source=timeline.name,
                    session=window.run,
                    start_seconds=window.start_seconds,
                    end_seconds=window.end_seconds,
                    stride_seconds=grid.stride_seconds,
                    wall_start=window.start_seconds,
                    wall_end=window.end_seconds,
                    scores=scores,
                    watched=timeline.watched,
                )
            ),
            window.end_seconds,
        )
    take(tracker.end(), timeline.duration_seconds)
    return events


# What events are worth.


class Timed(Protocol):
    """Has a start and an end."""

    @property
    def start_seconds(self) -> float: ...  # noqa: D102
    @property
    def end_seconds(self) -> float: ...  # noqa: D102


class RankedEvent(Timed, Protocol):
    """An event whose score ranks it among others of its label."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class MeasuredVideo:
    """What a video shows, and what was found in it.

    Attributes:
        intervals: What it shows.
        seconds: How long it is.
        ranked: Events for average precision, also weak ones, which cost nothing at the end of a
            ranking.
        live: Events at the thresholds that are used, as someone is told of them.
        scores: Of each label over time, shape (S, C).
        times: The middle of each step, in seconds, shape (S,).
    """

    intervals: Sequence[Interval]
    seconds: float
    ranked: Sequence[RankedEvent]
    live: Sequence[LiveEvent]
    scores: NDArray[np.floating[Any]]
    times: NDArray[np.floating[Any]]


def measure_events(videos: Sequence[MeasuredVideo], labels: Sequence[str]) -> EventMetrics:
    """Measure what was found in videos against what they show.

    Args:
        labels: C labels, those of the columns of all scores.

    Raises:
        ShapeError: If no video shows any of the labels, or scores do not fit times and labels.
    """
    intervals = [video.intervals for video in videos]
    if not any(intervals):
        raise ShapeError("No video has an interval; give annotations that have some.")
    counts: dict[str, EventCounts] = {}
    for video in videos:
        count_events(video.intervals, video.live, counts)
    return EventMetrics(
        num_videos=len(videos),
        hours=sum(video.seconds for video in videos) / 3600,
        precisions=event_precisions(intervals, [video.ranked for video in videos], TIOUS),
        frame_precisions=frame_precisions(videos, labels),
        counts=counts,
    )


@dataclass(eq=False)
class EventCounts:
    """What came of the intervals and of the live events of one label.

    Attributes:
        num_missed: Intervals to which no event belongs.
        num_false: Events that belong to no interval.
        delays: From the start of each other interval to the first time that it was told, in
            seconds; negative where an event began before.
    """

    num_intervals: int = 0
    num_missed: int = 0
    num_events: int = 0
    num_false: int = 0
    delays: list[float] = field(default_factory=list)

    def __add__(self, other: EventCounts) -> EventCounts:
        """The counts of two labels together."""
        return EventCounts(
            self.num_intervals + other.num_intervals,
            self.num_missed + other.num_missed,
            self.num_events + other.num_events,
            self.num_false + other.num_false,
            self.delays + other.delays,
        )


@dataclass(frozen=True, eq=False)
class EventMetrics:
    """What was measured.

    Attributes:
        precisions: Average precision of each label that some video shows, at each of `TIOUS`.
        frame_precisions: Average precision of the ranking of all steps of all videos, of each
            label that some step shows.
        counts: By label, of those that are shown and of those that were told.
    """

    num_videos: int
    hours: float
    precisions: Mapping[str, NDArray[np.float64]]
    frame_precisions: Mapping[str, float]
    counts: Mapping[str, EventCounts]

    def mean_average_precision(self, tious: Sequence[float]) -> float:
        """Mean over labels, and over these of `TIOUS`."""
        columns = [TIOUS.index(tiou) for tiou in tious]
        return float(np.mean([row[columns] for row in self.precisions.values()]))

    def summary(self) -> dict[str, Any]:
        """The fields of a `TimelineEvaluationRecord` that stand for all videos."""
        total = sum(self.counts.values(), EventCounts())
        found = total.num_intervals - total.num_missed
        delays = total.delays
        return {
            "num_videos": self.num_videos,
            "hours": self.hours,
            "num_intervals": total.num_intervals,
            "num_shown_labels": len(self.precisions),
            "thumos_map": self.mean_average_precision(THUMOS_TIOUS),
            "activitynet_map": self.mean_average_precision(ACTIVITYNET_TIOUS),
            "map_at": {f"{tiou:g}": self.mean_average_precision([tiou]) for tiou in TIOUS},
            "frame_map": _mean_or_none(self.frame_precisions.values()),
            "num_events": total.num_events,
            "num_false": total.num_false,
            "false_alarms_per_hour": total.num_false / self.hours if self.hours else None,
            "num_missed": total.num_missed,
            "miss_rate": total.num_missed / total.num_intervals,
            "events_per_found": (total.num_events - total.num_false) / found if found else None,
            "delay_p50_seconds": float(np.percentile(delays, 50)) if delays else None,
            "delay_p95_seconds": float(np.percentile(delays, 95)) if delays else None,
        }

    def per_label(self, labels: Sequence[str]) -> tuple[LabelEvents, ...]:
        """The numbers of each label."""
        return tuple(
            LabelEvents(
                label=label,
                num_intervals=counts.num_intervals,
                thumos_ap=self._label_precision(label, THUMOS_TIOUS),
                activitynet_ap=self._label_precision(label, ACTIVITYNET_TIOUS),
                frame_ap=self.frame_precisions.get(label),
                num_missed=counts.num_missed,
                num_events=counts.num_events,
                num_false=counts.num_false,
            )
            for label in labels
            for counts in [self.counts.get(label, EventCounts())]
        )

    def _label_precision(self, label: str, tious: Sequence[float]) -> float | None:
        if label not in self.precisions:
            return None
        return float(self.precisions[label][[TIOUS.index(tiou) for tiou in tious]].mean())


def event_precisions(
    intervals: Sequence[Sequence[Interval]],
    events: Sequence[Sequence[RankedEvent]],
    tious: Sequence[float],
) -> dict[str, NDArray[np.float64]]:
    """Average precision of the events of each label, as the evaluation of ActivityNet has it.

    The events of a label are ranked over all videos by their score, equal ones in the order
    in which they are given. In this order each takes, of the intervals of its video and label that
    overlap by `tiou` or more and are not taken, the one that overlaps most; an event that takes
    none is false, a second event of one interval therefore too. Precision is interpolated: at a
    recall it is the highest precision at that recall or any above. Labels that no video shows have
    no average precision, and events of them count in none.

    Args:
        intervals: What each video shows.
        events: What was found in each of the same videos.
        tious: Intersections over union of two times.

    Returns:
        By label, in the order in which intervals name them, shape (len(tious),).

    Source:
        activitynet/ActivityNet@ebc8aeb Evaluation/eval_detection.py,
        compute_average_precision_detection; utils.py, interpolated_prec_rec. There the order of
        equal scores is that of an unstable sort.
    """
    by_label: dict[str, list[NDArray[np.float64]]] = {}  # the intervals of each video
    for number, shown in enumerate(intervals):
        for interval in shown:
            if interval.label not in by_label:
                by_label[interval.label] = [np.empty((0, 2))] * len(intervals)
            span = np.array([[interval.start_seconds, interval.end_seconds]])
            spans = by_label[interval.label]
            spans[number] = np.concatenate([spans[number], span])
    ranked: dict[str, list[tuple[int, RankedEvent]]] = {label: [] for label in by_label}
    for number, found in enumerate(events):
        for event in found:
            if event.label in ranked:
                ranked[event.label].append((number, event))
    for found_of_label in ranked.values():
        found_of_label.sort(key=lambda each: -each[1].score)
    return {label: _precision_of(by_label[label], ranked[label], tious) for label in by_label}


def _precision_of(
    spans: Sequence[NDArray[np.float64]],
    ranked: Sequence[tuple[int, RankedEvent]],
    tious: Sequence[float],
) -> NDArray[np.float64]:
    """Average precision of one label's ranking: shape (len(tious),)."""
    return interpolated_precision(found_by(spans, ranked, tious), sum(map(len, spans)))


def found_by(
    spans: Sequence[NDArray[np.float64]],
    ranked: Sequence[tuple[int, Timed]],
    tious: Sequence[float],
) -> NDArray[np.bool_]:
    """Which parts of a ranking find an interval, as `event_precisions` says it.

    Args:
        spans: Start and end of the intervals of each video, each of shape (n, 2).
        ranked: What was found, the best first, each with the number of its video.
        tious: Intersections over union of two times.

    Returns:
        Shape (len(tious), len(ranked)).
    """
    taken = [np.zeros((len(tious), len(each)), np.bool_) for each in spans]
    hits = np.zeros((len(tious), len(ranked)), np.bool_)
    for rank, (video, event) in enumerate(ranked):
        overlaps = _overlaps(event, spans[video])
        for place in np.argsort(-overlaps, kind="stable"):
            # At each tIoU the best that is not taken.
            fits = (overlaps[place] >= np.asarray(tious)) & ~taken[video][:, place] & ~hits[:, rank]
            taken[video][fits, place] = True
            hits[fits, rank] = True
    return hits


def interpolated_precision(hits: NDArray[np.bool_], num_true: int) -> NDArray[np.float64]:
    """Average precision of rankings, interpolated as `event_precisions` says it.

    Args:
        hits: Of each ranking, which of its R parts are right, the best first, shape (..., R).
        num_true: How many there are to be found, 1 or more.

    Returns:
        Shape (...).
    """
    precision = np.cumsum(hits, axis=-1) / np.arange(1, hits.shape[-1] + 1)
    highest = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    total: NDArray[np.float64] = (highest * hits).sum(axis=-1) / num_true
    return total


def _overlaps(event: Timed, spans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of an event and of intervals, shape (len(spans),)."""
    shared = _shared_seconds(event, spans)
    length = event.end_seconds - event.start_seconds
    union = length + spans[:, 1] - spans[:, 0] - shared
    overlaps: NDArray[np.float64] = shared / union
    return overlaps


def _shared_seconds(event: Timed, spans: NDArray[np.float64]) -> NDArray[np.float64]:
    ends = np.minimum(event.end_seconds, spans[:, 1])
    shared: NDArray[np.float64] = np.clip(
        ends - np.maximum(event.start_seconds, spans[:, 0]), 0, None
    )
    return shared


def count_events(
    intervals: Sequence[Interval], events: Sequence[LiveEvent], counts: dict[str, EventCounts]
) -> None:
    """Count what came of the intervals and events of one video, by label.

    An event belongs to the interval of its label that it overlaps longest, however little, and to
    the first of those that it overlaps as long. An event that goes on over two intervals belongs to
    one, and the other is missed: nobody was told of it.

    Args:
        counts: By label, to which those of the video are added.
    """
    by_label = [each.label for each in intervals] + [each.label for each in events]
    for label in dict.fromkeys(by_label):
        shown = [each for each in intervals if each.label == label]
        told = [each for each in events if each.label == label]
        spans = np.array([(each.start_seconds, each.end_seconds) for each in shown]).reshape(-1, 2)
        owned: list[list[LiveEvent]] = [[] for _ in shown]
        num_false = 0
        for event in told:
            shared = _shared_seconds(event, spans)
            if shared.any():
                owned[int(shared.argmax())].append(event)
            else:
                num_false += 1
        news = [
            [event.new_seconds for event in own if event.new_seconds is not None] for own in owned
        ]
        found = EventCounts(
            num_intervals=len(shown),
            num_missed=sum(not own for own in owned),
            num_events=len(told),
            num_false=num_false,
            delays=[
                min(times) - interval.start_seconds
                for interval, times in zip(shown, news, strict=True)
                if times
            ],
        )
        counts[label] = counts.get(label, EventCounts()) + found


def frame_precisions(videos: Sequence[MeasuredVideo], labels: Sequence[str]) -> dict[str, float]:
    """Average precision of each label's ranking of the steps of all videos, background included.

    A step shows a label if its middle lies in an interval of the label. Labels that no step shows
    have none.

    Source:
        De Geest et al., Online Action Detection, 2016: per-frame average precision, here on the
        steps of the grid.
    """
    columns = {label: number for number, label in enumerate(labels)}
    targets = []
    for video in videos:
        if video.scores.shape != (len(video.times), len(labels)):
            raise ShapeError(
                f"scores have shape {video.scores.shape}; expected ({len(video.times)}, "
                f"{len(labels)}) for that many times and labels."
            )
        shown = np.zeros(video.scores.shape, np.bool_)
        for each in video.intervals:
            inside = (video.times >= each.start_seconds) & (video.times < each.end_seconds)
            shown[inside, columns[each.label]] = True
        targets.append(shown)
    scores, shown = np.concatenate([video.scores for video in videos]), np.concatenate(targets)
    return {
        label: average_precision(scores[:, column], shown[:, column])
        for label, column in columns.items()
        if shown[:, column].any()
    }


def _mean_or_none(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None
