"""Annotated intervals of long videos, and what events are worth against them.

    activitynet   JSON: "database", of each video its subset and the segments of its annotations
    thumos        lines `VIDEO START END` in a file for each class, Class_test.txt, or their folder
    csv           lines `VIDEO,LABEL,START,END`, or a table with a header that names these four

Texts, labels and errors are those of `annotations`. An event is a label from one time to another,
as `events` finds it; intervals include their start and not their end, both in seconds from the
first frame.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import LabelError, ShapeError
from actionclip_deploy.evaluate.annotations import (
    LabelIds,
    Subset,
    find_files,
    numbered_lines,
    read_annotation_text,
    seconds_of,
    table_rows,
)
from actionclip_deploy.evaluate.metrics import average_precision
from actionclip_deploy.records import LabelEvents, PrecisionAtTiou
from actionclip_deploy.video.reader import VIDEO_SUFFIXES

# Temporal intersection over union from which an event counts as an interval, as the two benchmarks
# average over them.
THUMOS_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TIOUS = tuple(sorted({*THUMOS_TIOUS, *ACTIVITYNET_TIOUS}))


@dataclass(frozen=True, slots=True)
class Interval:
    """A label and the time for which a video shows it; the end is exclusive."""

    label: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class AnnotatedVideo:
    """A long video, and every interval in which it shows one of the labels."""

    path: Path
    intervals: tuple[Interval, ...]


def read_intervals(
    path: str | Path,
    labels: Sequence[str],
    *,
    format: str = "auto",
    root: str | Path | None = None,
    subset: Subset = "test",
) -> list[AnnotatedVideo]:
    """Read when each of several long videos shows which label.

    A video's name with the suffix of a video is a path; any other is looked for by the names of
    the files in the root folder and two levels of folders below, also after `v_`, with which files
    of ActivityNet begin. Whether a video exists is another question.

    Args:
        path: The file, or for THUMOS also the folder of those of all classes.
        labels: The labels that intervals may have.
        format: One of `INTERVAL_FORMATS`; "auto" detects it from names and the first character.
        root: Folder that paths start from; None for the one of the file.
        subset: Of ActivityNet, "test" is the subset for testing, or the one for validation where
            the former has no annotations, as in its releases. Of a folder of THUMOS, "test" are
            the files Class_test.txt, and "train" the files Class_val.txt, on which models train.

    Returns:
        The videos in the order in which the file first names them, intervals in that of the file.
        A video may have none; in CSV, that is a row whose other fields are empty. What THUMOS calls
        ambiguous is left out.

    Raises:
        LabelError: If the file is not what it is said to be, lists no video, has a label that there
            is not, or an interval that does not end after it starts; names the line.
        ValueError: If `format` or `subset` is not allowed.
    """
    path = Path(path)
    if format not in INTERVAL_FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(INTERVAL_FORMATS)}.")
    if subset not in ("train", "test"):
        raise ValueError(f"subset is {subset!r}; it must be train or test.")
    chosen = detect_interval_format(path) if format == "auto" else format
    folder = Path(root) if root is not None else path if path.is_dir() else path.parent
    file = _IntervalFile(path, LabelIds(labels), subset)
    _READERS[chosen](file)
    if not file.found:
        raise LabelError(
            f"{path} lists no video (format {chosen}, {subset}); give a list with at least one."
        )
    files = find_files(folder)
    return [
        AnnotatedVideo(_find_video(name, folder, files), tuple(intervals))
        for name, intervals in file.found.items()
    ]


def detect_interval_format(path: Path) -> str:
    """Tell the format of a file of intervals by names and the first character."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    if any(_THUMOS_FILE.fullmatch(name) for name in names):
        return "thumos"
    if path.is_dir():
        raise LabelError(
            f"The folder {path} holds no file named as those of THUMOS are (Class_test.txt); give "
            "a file of annotated intervals."
        )
    for _, line in numbered_lines(path):
        return "activitynet" if line.startswith("{") else "csv"
    raise LabelError(f"The annotation file {path} is empty; expected intervals of videos.")


@dataclass(frozen=True)
class _IntervalFile:
    """The arguments of `read_intervals` for the reader of a format, and what that has found."""

    path: Path
    label_ids: LabelIds
    subset: Subset
    found: dict[str, list[Interval]] = field(default_factory=dict)  # by the name of the video

    def add(self, video: str, label_id: int, start: float, end: float, place: str) -> None:
        if start < 0 or end <= start:
            raise LabelError(
                f"{place} has an interval from {start:g} to {end:g} seconds; it has to start at 0 "
                "or later, and to end after its start."
            )
        label = self.label_ids.labels[label_id]
        self.found.setdefault(video, []).append(Interval(label, start, end))


def _find_video(name: str, folder: Path, files: Mapping[str, Path]) -> Path:
    if name.lower().endswith(tuple(VIDEO_SUFFIXES)):
        return folder / name
    return files.get(name) or files.get(f"v_{name}") or folder / f"{name}.mp4"


_CSV_COLUMNS = ("video", "label", "start", "end")


def _read_csv(file: _IntervalFile) -> None:
    first = next(iter(numbered_lines(file.path)), ("", ""))[1]
    has_header = set(_CSV_COLUMNS) <= {each.strip().strip('"') for each in first.split(",")}
    for place, row in table_rows(file.path, _CSV_COLUMNS, has_header=has_header):
        video, label, *times = (row[column] for column in _CSV_COLUMNS)
        if not video:
            raise LabelError(f"{place} names no video; expected {','.join(_CSV_COLUMNS)}.")
        if not any((label, *times)):
            file.found.setdefault(video, [])
            continue
        start, end = (
            seconds_of(text, f"{column} of an interval", place)
            for text, column in zip(times, _CSV_COLUMNS[2:], strict=True)
        )
        file.add(video, file.label_ids.parse(label, place), start, end, place)


_THUMOS_FILE = re.compile(r"(.+)_(test|val)\.txt")
_THUMOS_USES: dict[Subset, str] = {"train": "val", "test": "test"}
_AMBIGUOUS = "Ambiguous"  # of what nobody can say whether it is one of the classes


def _read_thumos(file: _IntervalFile) -> None:
    for path in _thumos_files(file):
        match = _THUMOS_FILE.fullmatch(path.name)
        if match is None:
            raise LabelError(
                f"{path} is not named as the files of THUMOS are; expected Class_test.txt, from "
                "whose name the label is taken."
            )
        if match[1] == _AMBIGUOUS and file.label_ids.find(_AMBIGUOUS) is None:
            continue
        label_id = file.label_ids.parse(match[1], str(path))
        for place, line in numbered_lines(path):
            fields = line.rsplit(maxsplit=2)
            if len(fields) != 3:
                raise LabelError(f"{place} is {line!r}; expected VIDEO START END.")
            start, end = (
                seconds_of(text, f"{name} of an interval", place)
                for text, name in zip(fields[1:], ("start", "end"), strict=True)
            )
            file.add(fields[0], label_id, start, end, place)


def _thumos_files(file: _IntervalFile) -> list[Path]:
    if not file.path.is_dir():
        return [file.path]
    found = sorted(file.path.glob(f"*_{_THUMOS_USES[file.subset]}.txt"))
    if not found:
        raise LabelError(
            f"The folder {file.path} has no Class_{_THUMOS_USES[file.subset]}.txt; give the folder "
            "of the annotations of THUMOS, and a subset that it has."
        )
    return found


# By what releases and those who wrote THUMOS in this form call them; the first with annotations.
_ACTIVITYNET_SUBSETS: dict[Subset, tuple[tuple[str, ...], ...]] = {
    "train": (("training", "train"), ("validation", "val")),
    "test": (("testing", "test"), ("validation", "val")),
}


class _JsonObject(dict[str, Any]):
    """An object of a JSON file that knows where it begins."""

    place = ""


def _read_activitynet(file: _IntervalFile) -> None:
    database = _load_json(file.path).get("database")
    if not isinstance(database, _JsonObject):
        raise LabelError(
            f'{file.path} has no object "database"; expected a file as those of ActivityNet are, '
            "with an object for each video in it."
        )
    videos = [(name, *_parse_video(name, video, file.path)) for name, video in database.items()]
    wanted: tuple[str, ...] = ()
    for wanted in _ACTIVITYNET_SUBSETS[file.subset]:
        if any(subset in wanted and segments for _, subset, segments in videos):
            break
    for name, subset, segments in videos:
        if subset and subset not in wanted:
            continue
        file.found.setdefault(name, [])
        for annotation in segments:
            label_id, start, end = _parse_annotation(annotation, file.label_ids)
            file.add(name, label_id, start, end, annotation.place)


def _parse_video(name: str, video: Any, path: Path) -> tuple[str, list[_JsonObject]]:
    """The subset of a video, in lower case and empty where none is stated, and its annotations."""
    annotations = video.get("annotations") if isinstance(video, _JsonObject) else None
    if not isinstance(annotations, list) or not all(
        isinstance(each, _JsonObject) for each in annotations
    ):
        place = video.place if isinstance(video, _JsonObject) else str(path)
        raise LabelError(
            f'{place} has no list of objects "annotations" for the video {name!r}; give an empty '
            "list where there is nothing to be seen."
        )
    return str(video.get("subset") or "").lower(), annotations


def _parse_annotation(annotation: _JsonObject, labels: LabelIds) -> tuple[int, float, float]:
    label, segment = annotation.get("label"), annotation.get("segment")
    if not isinstance(label, str) or not isinstance(segment, list) or len(segment) != 2:
        raise LabelError(
            f"{annotation.place} has the label {label!r} and the segment {segment!r}; expected a "
            "text, and a list of start and end in seconds."
        )
    start, end = (seconds_of(str(each), "segment's time", annotation.place) for each in segment)
    return labels.parse(label, annotation.place), start, end


def _load_json(path: Path) -> dict[str, Any]:
    text = read_annotation_text(path)
    places = iter(_object_lines(text))

    def read_object(pairs: list[tuple[str, Any]]) -> _JsonObject:
        found = _JsonObject(pairs)
        found.place = f"{path} line {next(places, 1)}"
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LabelError(f"{found.place} begins an object that has {twice!r} twice; give one.")
        return found

    try:
        loaded = json.loads(text, object_pairs_hook=read_object)
    except LabelError:
        raise
    except json.JSONDecodeError as exc:
        raise LabelError(
            f"{path} line {exc.lineno} is not JSON ({exc.msg}); give the file as it was released."
        ) from exc
    except (RecursionError, ValueError) as exc:  # of a number of thousands of digits, too
        raise LabelError(f"{path} cannot be read as JSON ({exc}); give another file.") from exc
    if not isinstance(loaded, _JsonObject):
        raise LabelError(f"{path} holds a {type(loaded).__name__}; expected an object.")
    return loaded


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)


def _object_lines(text: str) -> list[int]:
    """The line in which each object begins, in the order in which they end, as they are read."""
    breaks = [match.start() for match in re.finditer("\n", text)]
    begun, lines = [], []
    for token in _JSON_TOKEN.finditer(text):
        if token[0] == "{":
            begun.append(bisect_right(breaks, token.start()) + 1)
        elif token[0] == "}" and begun:
            lines.append(begun.pop())
    return lines


_READERS = {"activitynet": _read_activitynet, "thumos": _read_thumos, "csv": _read_csv}
INTERVAL_FORMATS = ("auto", *_READERS)


# What events are worth. Letters: S steps of a grid in time, C labels.


class _Timed(Protocol):
    """Has a start and an end."""

    @property
    def start_seconds(self) -> float: ...
    @property
    def end_seconds(self) -> float: ...


class RankedEvent(_Timed, Protocol):
    """An event whose score ranks it among others of its label."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """An event as a stream tells it.

    Attributes:
        new_seconds: When it was told first, by the clock of the video; None where it was only
            found afterwards, so that no delay is known.
    """

    label: str
    start_seconds: float
    end_seconds: float
    new_seconds: float | None = None


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
            "map_at": tuple(
                PrecisionAtTiou(tiou=tiou, map=self.mean_average_precision([tiou]))
                for tiou in TIOUS
            ),
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
    taken = [np.zeros((len(tious), len(each)), np.bool_) for each in spans]
    hits = np.zeros((len(tious), len(ranked)), np.bool_)
    for rank, (video, event) in enumerate(ranked):
        overlaps = _overlaps(event, spans[video])
        for place in np.argsort(-overlaps, kind="stable"):
            # At each tIoU the best that is not taken.
            fits = (overlaps[place] >= np.asarray(tious)) & ~taken[video][:, place] & ~hits[:, rank]
            taken[video][fits, place] = True
            hits[fits, rank] = True
    precision = np.cumsum(hits, axis=1) / np.arange(1, len(ranked) + 1)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    total: NDArray[np.float64] = (highest * hits).sum(axis=1) / sum(map(len, spans))
    return total


def _overlaps(event: _Timed, spans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of an event and of intervals, shape (len(spans),)."""
    shared = _shared_seconds(event, spans)
    length = event.end_seconds - event.start_seconds
    union = length + spans[:, 1] - spans[:, 0] - shared
    overlaps: NDArray[np.float64] = shared / union
    return overlaps


def _shared_seconds(event: _Timed, spans: NDArray[np.float64]) -> NDArray[np.float64]:
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
