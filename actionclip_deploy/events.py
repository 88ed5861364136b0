"""Scores over time -> events: when a label begins to hold, and when it ends.

`find_events` reads the scores of a whole recording. `EventTracker` reads windows as they come, and
tells of an event when it begins, while it lasts and when it has ended. Both open an event where a
score reaches the label's threshold, and close it only below a share of that (hysteresis), so that
a score that trembles around the threshold makes one event and not twenty.

Letters: S steps, C labels of a bank, E labels and groups that are watched.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import (
    DEFAULT_QUERY_Z,
    QUERY_THRESHOLD,
    Calibration,
    calibrated_scores,
)
from actionclip_deploy.errors import LabelError, ShapeError, ThresholdWarning
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.prompts import check_labels
from actionclip_deploy.records import EndReason, EventKind, EventRecord, RuntimeInfo, UsedBank

Float64Array: TypeAlias = NDArray[np.float64]

# Of a bank that is not calibrated: guesses, which `thresholds_of` warns of.
SOFTMAX_THRESHOLD = 0.6
INDEPENDENT_THRESHOLD = 0.5

CLOSE_RATIO = 0.8

# A label of this name stands for "none of the others", and is never an event.
_UNKNOWN = "unknown"
# Times are sums of grid steps: what differs by less than this share of a step is equal.
_TOLERANCE = 1e-6
_UPDATE_SECONDS = 1.0


# Thresholds and groups


def thresholds_of(
    bank: LabelBank,
    method: ScoreMethod,
    thresholds: float | Mapping[str, float] | None = None,
) -> Float64Array:
    """The score at which an event of each label opens.

    Args:
        bank: Of the labels. Its calibrated threshold holds for calibrated scores, which
            `WatchedLabels.scores` gives.
        method: How the scores are made.
        thresholds: The caller's: for all labels, or for some by name.

    Returns:
        float64, shape (C,): the caller's threshold, or else the bank's where it is calibrated for
        this method, or else 0.6, and 0.5 for independent scores, with a `ThresholdWarning`. It is
        infinite for a label "unknown", which never is an event.

    Raises:
        LabelError: If a label of `thresholds` is not in the bank.
        ValueError: If a threshold is not above 0.
    """
    chosen = _by_name(thresholds, bank.labels)
    others = [label for label in bank.labels if label not in chosen]
    default = _default_threshold(bank, method, is_used=bool(others))
    found = np.array([chosen.get(label, default) for label in bank.labels], np.float64)
    return _checked_thresholds(found, bank.labels)


def _by_name(
    thresholds: float | Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float]:
    if thresholds is None:
        return {}
    if not isinstance(thresholds, Mapping):
        return dict.fromkeys(names, float(thresholds))
    for name in thresholds:
        if name not in names:
            raise LabelError(
                f"There is a threshold for {name!r}, which is neither a label of the bank nor a "
                f"group; expected one of {', '.join(map(repr, names[:5]))}"
                f"{', ...' if len(names) > 5 else ''}."
            )
    return {name: float(value) for name, value in thresholds.items()}


def _calibration(bank: LabelBank, method: ScoreMethod) -> Calibration | None:
    found = bank.calibration
    return None if found is None or found.method != method else found


def _default_threshold(bank: LabelBank, method: ScoreMethod, *, is_used: bool) -> float:
    calibration = _calibration(bank, method)
    if calibration is not None:
        return calibration.threshold
    default = INDEPENDENT_THRESHOLD if method == "independent" else SOFTMAX_THRESHOLD
    if is_used:
        why = (
            "Independent scores of labels that are not shown lie near the middle"
            if method == "independent"
            else f"The label bank {bank.name!r} is not calibrated for {method}"
        )
        instead = "" if method == "independent" else ", or calibrate the bank"
        warnings.warn(
            f"{why}, so the threshold of events, {default:g}, is a guess; give thresholds that "
            f"were found on labelled videos{instead}.",
            ThresholdWarning,
            stacklevel=3,
        )
    return default


def _checked_thresholds(thresholds: Float64Array, labels: Sequence[str]) -> Float64Array:
    """Infinite for labels that never are an event."""
    if not (thresholds > 0).all():  # written so that NaN fails
        wrong = labels[int(np.argmin(thresholds > 0))]
        raise ValueError(
            f"The threshold of {wrong!r} is {thresholds[labels.index(wrong)]:g}; it must be above "
            "0, or every score would be an event."
        )
    is_unknown = [label.strip().casefold() == _UNKNOWN for label in labels]
    return np.where(is_unknown, np.inf, thresholds)


@dataclass(frozen=True, eq=False)
class WatchedLabels:
    """What events are looked for: labels and groups of a bank, and their thresholds.

    A group is several labels that count as one event under its name. By the softmax methods its
    score is the sum of theirs: labels exclude each other there, so the sum is the share of the
    group, where the best alone would fall with every synonym that is added. Independent scores are
    no shares, and their sum may pass 1, so there it is the highest.

    Attributes:
        names: E labels that are in no group, in the order of the bank, then the groups.
        members: For each the places of its labels in the bank.
        thresholds: Where events open, float64, shape (E,); infinite for what never is an event.
        method: How scores are made.
        temperature: Of the bank's calibration; None where scores are read as they are.
        bank: Which bank and version, as records say it.
        query: The bank of a saved query, by which independent scores are read; None for others.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    thresholds: Float64Array
    method: ScoreMethod
    temperature: float | None
    bank: UsedBank
    query: LabelBank | None = None

    @classmethod
    def of(
        cls,
        bank: LabelBank,
        method: ScoreMethod,
        *,
        thresholds: float | Mapping[str, float] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        used: UsedBank | None = None,
    ) -> WatchedLabels:
        """All labels of a bank; of a saved query, the one that is looked for.

        Args:
            bank: Of the labels.
            method: How scores are made.
            thresholds: As for `thresholds_of`; of a label or of a group.
            groups: Labels by the name of their group; those are no events of their own.
            used: The bank as records say it; None for one that has no version.

        Raises:
            LabelError: If a group or a threshold names a label that the bank has not, or a group
                has the name of a label outside of it.
            ValueError: If a threshold is not above 0.
        """
        used = used or bank.used(None if bank.is_adhoc else bank.name)
        groups = {} if groups is None else groups
        if bank.query is not None and method == "independent":
            return cls._of_query(bank, thresholds, groups, used)
        grouped = _check_groups(bank, groups)
        places = {label: place for place, label in enumerate(bank.labels)}
        single = [label for label in bank.labels if label not in grouped]
        names = (*single, *groups)
        chosen = _by_name(thresholds, names)
        missing = any(name not in chosen for name in names)
        default = _default_threshold(bank, method, is_used=missing)
        found = np.array([chosen.get(name, default) for name in names], np.float64)
        calibration = _calibration(bank, method)
        return cls(
            names,
            (
                *((places[label],) for label in single),
                *(tuple(places[label] for label in labels) for labels in groups.values()),
            ),
            _checked_thresholds(found, names),
            method,
            None if calibration is None else calibration.temperature,
            used,
        )

    @classmethod
    def _of_query(
        cls,
        bank: LabelBank,
        thresholds: float | Mapping[str, float] | None,
        groups: Mapping[str, Sequence[str]],
        used: UsedBank,
    ) -> WatchedLabels:
        assert bank.query is not None
        if groups:
            raise LabelError(
                f"The label bank {bank.name!r} is a saved query, of which one label is told of, "
                "and no group; leave the groups out."
            )
        names = bank.labels[:1]
        chosen = _by_name(thresholds, names)
        is_guess = not bank.query.num_accepted and bank.query.threshold_z == DEFAULT_QUERY_Z
        if is_guess and not chosen:
            warnings.warn(
                f"The query {bank.name!r} was saved without accepted moments, so its threshold, "
                f"z {bank.query.threshold_z:g}, is a guess; save it again with --accept.",
                ThresholdWarning,
                stacklevel=3,
            )
        opens = np.array([chosen.get(names[0], QUERY_THRESHOLD)], np.float64)
        return cls(
            names, ((0,),), _checked_thresholds(opens, names), "independent", None, used, bank
        )

    def scores(self, scores: NDArray[np.floating[Any]]) -> Float64Array:
        """Scores of what is watched, from those of the bank's labels.

        Args:
            scores: Shape (S, C), as the recognizer gives them; a step that has none is NaN.

        Returns:
            float64, shape (S, E), calibrated where the bank is; NaN where a step has none.

        Raises:
            ShapeError: If there is not a score for each label, or they are not those of the method.
        """
        if scores.ndim != 2 or scores.shape[1] != self.bank.num_labels:
            raise ShapeError(
                f"scores has shape {scores.shape}; expected (S, {self.bank.num_labels}), one for "
                "each label of the bank."
            )
        read = scores.astype(np.float64)
        if self.query is not None:
            return self.query.query_scores(read)[:, np.newaxis]
        is_void = np.isnan(read).any(axis=1)
        if self.temperature is not None and not is_void.all():
            read[~is_void] = calibrated_scores(read[~is_void], self.temperature)
        read[is_void] = np.nan
        if self._are_all_single:
            return read
        if self.method == "independent":
            columns = [read[:, list(places)].max(axis=1) for places in self.members]
        else:  # rounding may bring the sum of all above 1
            columns = [read[:, list(places)].sum(axis=1).clip(max=1.0) for places in self.members]
        return np.stack(columns, axis=1)

    @cached_property
    def _are_all_single(self) -> bool:
        return self.members == tuple((place,) for place in range(self.bank.num_labels))


def _check_groups(bank: LabelBank, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The labels that are in a group."""
    if groups:
        check_labels(list(groups))
    grouped: set[str] = set()
    for name, labels in groups.items():
        if isinstance(labels, str) or not labels:
            raise LabelError(f"The group {name!r} is {labels!r}; give a list of its labels.")
        for label in labels:
            if label not in bank.labels:
                raise LabelError(
                    f"The group {name!r} has the label {label!r}, which is not in the label bank "
                    f"{bank.name!r}; choose among those of the bank."
                )
        if len(set(labels)) != len(labels):
            raise LabelError(f"The group {name!r} has a label twice; give each once.")
        grouped.update(labels)
    for name in groups:
        if name in bank.labels and name not in grouped:
            raise LabelError(
                f"The group {name!r} has the name of a label that is in no group, and the two "
                "could not be told apart; give the group another name."
            )
    return grouped


# Whole recordings


@dataclass(frozen=True)
class Event:
    """A label that held from one time to another.

    Attributes:
        label: A label or a group.
        start_seconds: Of its first step.
        end_seconds: Of its last step's end.
        mean: Of its scores.
        peak: The highest of them.
        score: What events of a label are ranked by: the mean, lowered by soft-NMS where that was
            asked for.
    """

    label: str
    start_seconds: float
    end_seconds: float
    mean: float
    peak: float
    score: float

    @property
    def duration_seconds(self) -> float:
        """How long it lasts."""
        return self.end_seconds - self.start_seconds


def find_events(
    scores: NDArray[np.floating[Any]],
    labels: Sequence[str],
    *,
    starts_seconds: NDArray[np.floating[Any]],
    step_seconds: float,
    thresholds: float | NDArray[np.floating[Any]],
    close_ratio: float = CLOSE_RATIO,
    min_seconds: float = 0.0,
    merge_seconds: float = 0.0,
    levels: Sequence[float] = (1.0,),
    soft_nms_sigma: float | None = None,
) -> list[Event]:
    """Find the events of a whole recording.

    An event of a label begins at a step whose score is the threshold or more, and ends before the
    first one whose score is below `close_ratio` of it. Then neighbours are merged, and then short
    events left out. Time that has no score belongs to no event, and none goes across it.

    Args:
        scores: Of S steps, shape (S, C); a step without scores is NaN.
        labels: C names.
        starts_seconds: When each step starts, ascending, shape (S,). Where the next step starts
            more than half a step late, there is time without a score between the two.
        step_seconds: How long a step is.
        thresholds: Where events open: one, or one for each label, shape (C,); infinite for none.
        close_ratio: Share of the threshold below which an event closes, above 0 and at most 1.
        min_seconds: Shorter events are left out.
        merge_seconds: Two events of a label that are no further apart are one.
        levels: Factors of the thresholds. With several, events are found at each, and overlap; an
            interval that is found at two levels is given once. For rankings, as mean average
            precision takes them.
        soft_nms_sigma: Lowers the `score` of events that overlap better ones of their label, by
            exp(-IoU^2 / sigma). None leaves them at their mean.

    Returns:
        Events by start, then end, then the order of labels.

    Raises:
        ShapeError: If the arrays do not fit each other.
        ValueError: If another argument is not allowed.

    Source:
        The Gaussian form of Bodla et al. 2017, Soft-NMS, section 3, on intervals.
    """
    _check_steps(scores, labels, starts_seconds, step_seconds)
    if not 0 < close_ratio <= 1:
        raise ValueError(f"close_ratio is {close_ratio}; it must be above 0 and at most 1.")
    for name, value in (("min_seconds", min_seconds), ("merge_seconds", merge_seconds)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more.")
    if not levels or not all(math.isfinite(level) and level > 0 for level in levels):
        raise ValueError(f"levels is {tuple(levels)}; give one positive factor or more.")
    if soft_nms_sigma is not None and not soft_nms_sigma > 0:
        raise ValueError(f"soft_nms_sigma is {soft_nms_sigma}; it must be above 0, or None.")
    given = np.asarray(thresholds, np.float64)
    if given.shape not in ((), (len(labels),)):
        raise ShapeError(
            f"thresholds has shape {given.shape}; expected one number, or ({len(labels)},), one "
            "for each label."
        )
    opens = _checked_thresholds(np.broadcast_to(given, (len(labels),)), labels)
    values = scores.astype(np.float64)
    starts = starts_seconds.astype(np.float64)
    is_late = np.diff(starts, prepend=starts[:1]) > 1.5 * step_seconds
    slack = _TOLERANCE * step_seconds
    found: list[tuple[float, float, int, Event]] = []
    for index in np.flatnonzero(np.isfinite(opens)).tolist():
        spans: set[tuple[int, int]] = set()
        column = values[:, index]
        is_void = np.isnan(column)
        # Steps with no time without scores between them have one number.
        parts: NDArray[np.int64] = np.cumsum(is_late | is_void, dtype=np.int64)
        for level in levels:
            threshold = opens[index] * level
            runs = _runs(column, parts, is_void, threshold, close_ratio * threshold)
            merged: list[list[int]] = []
            for first, last in runs:
                if merged:
                    before = merged[-1]
                    apart = starts[first] - (starts[before[1]] + step_seconds)
                    if parts[before[1]] == parts[first] and apart <= merge_seconds + slack:
                        before[1] = last
                        continue
                merged.append([first, last])
            spans.update((first, last) for first, last in merged)
        events = []
        for first, last in sorted(spans):
            start, end = float(starts[first]), float(starts[last] + step_seconds)
            if end - start < min_seconds - slack:
                continue
            inside = column[first : last + 1]
            mean = float(inside.mean())
            events.append(Event(labels[index], start, end, mean, float(inside.max()), mean))
        if soft_nms_sigma is not None:
            events = [
                lowered
                for together in _overlapping(events)
                for lowered in _soft_nms(together, soft_nms_sigma)
            ]
        found += [(event.start_seconds, event.end_seconds, index, event) for event in events]
    return [event for *_, event in sorted(found, key=lambda each: each[:3])]


def _runs(
    column: Float64Array,
    parts: NDArray[np.int64],
    is_void: NDArray[np.bool_],
    open_at: float,
    close_below: float,
) -> list[tuple[int, int]]:
    """First and last steps from a score that opens to the last before one that closes."""
    places = np.flatnonzero(~is_void & (column >= close_below))
    if not len(places):
        return []
    breaks = (np.diff(places) > 1) | (np.diff(parts[places]) > 0)
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    ends = np.concatenate([begins[1:], [len(places)]])
    opening = np.where(column[places] >= open_at, places, len(column))
    firsts = np.minimum.reduceat(opening, begins)
    return [
        (int(first), int(places[end - 1]))
        for first, end in zip(firsts, ends, strict=True)
        if first < len(column)
    ]


def _overlapping(events: list[Event]) -> list[list[Event]]:
    """Events by start, apart where nothing overlaps: hours have thousands, of which few do."""
    groups: list[list[Event]] = []
    end = -math.inf
    for event in events:
        if event.start_seconds >= end:
            groups.append([])
        groups[-1].append(event)
        end = max(end, event.end_seconds)
    return groups


def _soft_nms(events: list[Event], sigma: float) -> list[Event]:
    """Events of one label with their scores lowered."""
    if len(events) == 1:
        return events
    starts = np.array([event.start_seconds for event in events])
    ends = np.array([event.end_seconds for event in events])
    scores = np.array([event.mean for event in events])
    waiting = np.ones(len(events), bool)
    for _ in range(len(events)):
        best = int(np.argmax(np.where(waiting, scores, -np.inf)))
        waiting[best] = False
        overlap = np.minimum(ends, ends[best]) - np.maximum(starts, starts[best])
        overlap = overlap.clip(min=0.0)
        union = (ends - starts) + (ends[best] - starts[best]) - overlap
        scores = np.where(waiting, scores * np.exp(-((overlap / union) ** 2) / sigma), scores)
    return [
        Event(each.label, each.start_seconds, each.end_seconds, each.mean, each.peak, float(score))
        for each, score in zip(events, scores, strict=True)
    ]


def _check_steps(
    scores: NDArray[np.floating[Any]],
    labels: Sequence[str],
    starts_seconds: NDArray[np.floating[Any]],
    step_seconds: float,
) -> None:
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise ShapeError(
            f"scores has shape {scores.shape} and dtype {scores.dtype}; expected floating-point "
            "numbers of shape (S, C)."
        )
    if scores.shape[1] != len(labels) or starts_seconds.shape != (len(scores),):
        raise ShapeError(
            f"scores has shape {scores.shape}, with {len(labels)} labels and starts_seconds of "
            f"shape {starts_seconds.shape}; expected (S, C), C labels and (S,)."
        )
    if np.isinf(scores).any():
        raise ValueError("scores holds infinite values; give numbers, or NaN where there are none.")
    if not (math.isfinite(step_seconds) and step_seconds > 0):
        raise ValueError(f"step_seconds is {step_seconds}; it must be a positive number.")
    if not np.isfinite(starts_seconds).all():
        raise ValueError("starts_seconds holds values that are not finite; give seconds.")
    steps = np.diff(starts_seconds.astype(np.float64))
    if len(steps) and steps.min() < 0.5 * step_seconds:
        raise ValueError(
            f"starts_seconds has steps of {steps.min():g} s, and step_seconds is {step_seconds:g}; "
            "steps must ascend and may not overlap: give scores per step, not per window."
        )


# Windows as they come


@dataclass(frozen=True, eq=False)
class ScoredWindow:
    """The scores of one window of a source.

    Attributes:
        source: Name of the source.
        session: Number of the time between two connections or jumps of the clock; no event goes
            from one to the next.
        start_seconds: By the clock of the source.
        end_seconds: Likewise; the window ends before it.
        stride_seconds: From the start of one window to the next where none is left out.
        wall_start: When it started, in seconds since 1970.
        wall_end: When it ended.
        scores: Of the bank's labels, shape (C,); NaN for a window that has none.
        watched: The labels that they are scores of.
    """

    source: str
    session: int
    start_seconds: float
    end_seconds: float
    stride_seconds: float
    wall_start: float
    wall_end: float
    scores: NDArray[np.floating[Any]]
    watched: WatchedLabels

    def __post_init__(self) -> None:
        """Check that the times are a window's.

        Raises:
            ShapeError: If there is not a score for each label.
            ValueError: If the window ends before it starts, or has no stride.
        """
        if self.scores.shape != (self.watched.bank.num_labels,):
            raise ShapeError(
                f"scores has shape {self.scores.shape}; expected "
                f"({self.watched.bank.num_labels},), one for each label of the bank."
            )
        if not (self.end_seconds > self.start_seconds and self.stride_seconds > 0):
            raise ValueError(
                f"The window is from {self.start_seconds} to {self.end_seconds} s with a stride "
                f"of {self.stride_seconds} s; it must end after it starts, and have a stride."
            )


@dataclass
class _Open:
    """An event that has begun; one that is still too short has no id."""

    name: str
    start_seconds: float  # what is told, which is earlier than the first step at a session's start
    wall_start: float
    first_seconds: float  # of its first step
    end_seconds: float  # of its last step's end
    id: str | None = None
    num_messages: int = 0
    said_seconds: float = -math.inf
    score: float = math.nan
    peak: float = -math.inf
    total: float = 0.0
    count: int = 0
    late_total: float = 0.0  # of steps since, which are its own if it goes on
    late_count: int = 0
    num_below: int = 0
    is_closed: bool = False

    def take(self, score: float, end_seconds: float) -> None:
        """One more step, and with it those since the last."""
        self.total += self.late_total + score
        self.count += self.late_count + 1
        self.late_total, self.late_count, self.num_below, self.is_closed = 0.0, 0, 0, False
        self.score, self.peak = score, max(self.peak, score)
        self.end_seconds = end_seconds

    def wait(self, score: float) -> None:
        """A step that is its own only if it goes on."""
        self.late_total += score
        self.late_count += 1


@dataclass
class _SourceState:
    """What is remembered of a source."""

    watched: WatchedLabels
    windows: deque[ScoredWindow]
    recent: Float64Array  # (n, E), n at most the number of windows that are averaged
    has_stepped: bool = False  # whether the session has had a step before
    open: dict[str, _Open] = field(default_factory=dict)


class EventTracker:
    """Turns the windows of sources into events as they come; used from one thread.

    A window's scores are averaged with those of the windows just before it. The mean is the score
    of a step, one stride long, in the middle of the time that these windows cover. An event that
    holds from the first step of a session on starts with the session's first window, and one that
    holds at the end of a session ends with its last: no other time is known for them.

    `new` is told once an event is as long as the shortest that counts, `update` at most once a
    second while it holds, and `end` once nothing can be merged with it any more. Each message has
    the event's id and its number in the event, from 0.

    Labels may change from window to window: an event goes on where the new ones have its name, by
    the threshold that they have for it, and ends where they have not.

    Args:
        runtime: What runs, for the records.
        num_averaged: Windows whose mean is a step's score.
        close_ratio: Share of the threshold below which a step counts towards closing.
        num_closing: Steps in a row below it that close an event.
        min_strides: Strides that an event lasts at least.
        merge_windows: Two events of a label that are no further apart than so many windows are
            one.
        cooldown_seconds: Time after an event of a source in which none of the same label begins.
        clock: Gives the time since 1970 for ids.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        *,
        runtime: RuntimeInfo | None = None,
        num_averaged: int = 2,
        close_ratio: float = CLOSE_RATIO,
        num_closing: int = 2,
        min_strides: float = 2.0,
        merge_windows: float = 1.0,
        cooldown_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, count in (("num_averaged", num_averaged), ("num_closing", num_closing)):
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be 1 or more.")
        if not 0 < close_ratio <= 1:
            raise ValueError(f"close_ratio is {close_ratio}; it must be above 0 and at most 1.")
        for name, value in (
            ("min_strides", min_strides),
            ("merge_windows", merge_windows),
            ("cooldown_seconds", cooldown_seconds),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        self._runtime = runtime
        self._num_averaged = num_averaged
        self._close_ratio = close_ratio
        self._num_closing = num_closing
        self._min_strides = min_strides
        self._merge_windows = merge_windows
        self._cooldown_seconds = cooldown_seconds
        self._new_id = _EventIds(clock)
        self._sources: dict[str, _SourceState] = {}
        self._cooled: dict[tuple[str, str], float] = {}  # by source and label, in wall time

    def push(self, window: ScoredWindow) -> list[EventRecord]:
        """Take the next window of a source; gives what there is to tell, in order."""
        state = self._sources.get(window.source)
        told: list[EventRecord] = []
        if state is not None:
            last = state.windows[-1]
            if window.session != last.session:
                told += self._end(state, "session")
                state = None
            elif window.start_seconds > last.end_seconds + _TOLERANCE * window.stride_seconds:
                told += self._end(state, "gap")  # a time that no window has seen
                state = None
        scores = window.watched.scores(window.scores[np.newaxis])[0]
        if np.isnan(scores).any():
            if state is not None:
                told += self._end(state, "gap")
            self._sources.pop(window.source, None)
            return told
        if state is None:
            kept: deque[ScoredWindow] = deque(maxlen=self._num_averaged)
            empty = np.empty((0, len(scores)))
            state = self._sources[window.source] = _SourceState(window.watched, kept, empty)
        elif state.watched is not window.watched:
            told += self._change_labels(state, window.watched)
        state.windows.append(window)
        state.recent = np.concatenate([state.recent, scores[np.newaxis]])[-self._num_averaged :]
        if len(state.recent) == self._num_averaged:
            told += self._step(state)
        return told

    def end(self, source: str | None = None) -> list[EventRecord]:
        """End the open events of a source whose session is over, or of all sources."""
        names = list(self._sources) if source is None else [source]
        told = []
        for name in names:
            if (state := self._sources.pop(name, None)) is not None:
                told += self._end(state, "session")
        return told

    def open_labels(self, source: str) -> list[str]:
        """Labels of a source's events that were told of and have not ended."""
        state = self._sources.get(source)
        return [] if state is None else [each.name for each in state.open.values() if each.id]

    def _step(self, state: _SourceState) -> list[EventRecord]:
        first, window = state.windows[0], state.windows[-1]
        middle = (first.start_seconds + window.end_seconds) / 2
        start, end = middle - window.stride_seconds / 2, middle + window.stride_seconds / 2
        merge = self._merge_windows * (window.end_seconds - window.start_seconds)
        slack = _TOLERANCE * window.stride_seconds
        means = state.recent.mean(axis=0)
        told = []
        # A label that is new to the source has no score (NaN) before it has windows enough.
        wanted = {state.watched.names[i] for i in np.flatnonzero(means >= state.watched.thresholds)}
        for name in [*state.open, *(each for each in state.watched.names if each in wanted)]:
            place = state.watched.names.index(name)
            score, threshold = float(means[place]), float(state.watched.thresholds[place])
            event = state.open.get(name)
            if event is not None and event.end_seconds >= end - slack:
                continue  # it is in both lists, and this step is its own already
            if event is not None and event.is_closed and start - event.end_seconds > merge + slack:
                told += self._finish(state, event, "closed")
                event = None
            if event is None:
                if name not in wanted or self._is_cooling(state, name, start):
                    continue
                told_start = start if state.has_stepped else first.start_seconds
                event = state.open[name] = _Open(
                    name, told_start, _wall(window, told_start), start, start
                )
            bound = threshold if event.is_closed else self._close_ratio * threshold
            if score >= bound:
                event.take(score, end)
                told += self._announce(state, event)
                continue
            event.wait(score)
            event.num_below += 1
            if event.num_below >= self._num_closing:
                event.is_closed = True
            if event.is_closed and end - event.end_seconds > merge + slack:
                told += self._finish(state, event, "closed")
        state.has_stepped = True
        return told

    def _is_cooling(self, state: _SourceState, name: str, start_seconds: float) -> bool:
        window = state.windows[-1]
        until = self._cooled.get((window.source, name), -math.inf)
        return _wall(window, start_seconds) < until - _TOLERANCE

    def _announce(self, state: _SourceState, event: _Open) -> list[EventRecord]:
        window = state.windows[-1]
        length = event.end_seconds - event.first_seconds
        if event.id is None:
            if length < (self._min_strides - _TOLERANCE) * window.stride_seconds:
                return []
            event.id = self._new_id()
            kind: EventKind = "new"
        elif window.end_seconds - event.said_seconds >= _UPDATE_SECONDS - _TOLERANCE:
            kind = "update"
        else:
            return []
        event.said_seconds = window.end_seconds
        return [self._record(state, event, kind)]

    def _finish(self, state: _SourceState, event: _Open, reason: EndReason) -> list[EventRecord]:
        del state.open[event.name]
        if event.id is None:
            return []
        window = state.windows[-1]
        if self._cooldown_seconds:
            until = _wall(window, event.end_seconds) + self._cooldown_seconds
            self._cooled[window.source, event.name] = until
        return [self._record(state, event, "end", reason)]

    def _end(self, state: _SourceState, reason: EndReason) -> list[EventRecord]:
        told = []
        for event in list(state.open.values()):
            if not (event.num_below or event.is_closed):
                event.end_seconds = state.windows[-1].end_seconds
            told += self._finish(state, event, reason)
        return told

    def _change_labels(self, state: _SourceState, watched: WatchedLabels) -> list[EventRecord]:
        places = {name: place for place, name in enumerate(state.watched.names)}
        told = []
        for event in list(state.open.values()):
            if event.name not in watched.names:
                told += self._finish(state, event, "labels")
        recent = np.full((len(state.recent), len(watched.names)), np.nan)
        for place, name in enumerate(watched.names):
            if name in places:
                recent[:, place] = state.recent[:, places[name]]
        state.recent, state.watched = recent, watched
        return told

    def _record(
        self,
        state: _SourceState,
        event: _Open,
        kind: EventKind,
        reason: EndReason | None = None,
    ) -> EventRecord:
        window, watched = state.windows[-1], state.watched
        threshold = float(watched.thresholds[watched.names.index(event.name)])
        has_ended = kind == "end"
        number, event.num_messages = event.num_messages, event.num_messages + 1
        return EventRecord(
            kind=kind,
            id=event.id or "",
            number=number,
            source=window.source,
            label=event.name,
            start_seconds=round(event.start_seconds, 6),
            end_seconds=round(event.end_seconds, 6) if has_ended else None,
            start_time=utc_text(event.wall_start),
            end_time=utc_text(_wall(window, event.end_seconds)) if has_ended else None,
            end_reason=reason,
            score=event.score,
            mean=event.total / event.count,
            peak=event.peak,
            threshold=threshold,
            method=watched.method,
            bank=watched.bank,
            runtime=self._runtime,
        )


def _wall(window: ScoredWindow, seconds: float) -> float:
    """The wall's time of one of the source's, near a window."""
    return window.wall_start + (seconds - window.start_seconds)


def utc_text(unix_seconds: float) -> str:
    """A time as ISO 8601 in UTC with milliseconds, such as 2026-11-30T08:15:00.250Z."""
    milliseconds = round(unix_seconds * 1000)
    whole = datetime.fromtimestamp(milliseconds // 1000, timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03d}Z"


class _EventIds:
    """Ids that sort in the order in which they were given, and that no other program gives."""

    # UUIDs of version 7 would do; Python has them from 3.14 on.
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = (0, 0)
        self._program = os.urandom(5).hex()

    def __call__(self) -> str:
        milliseconds, last = int(self._clock() * 1000), self._last
        # A clock that goes back gives the same time until it has caught up.
        is_later = milliseconds > last[0]
        self._last = (milliseconds, 0) if is_later else (last[0], last[1] + 1)
        return f"{self._last[0]:013d}-{self._last[1]:06d}-{self._program}"
