"""Annotated intervals: when each of several long videos shows which label.

    activitynet   JSON: "database", of each video its subset and the segments of its annotations
    thumos        lines `VIDEO START END` in a file for each class, Class_test.txt, or their folder
    csv           lines `VIDEO,LABEL,START,END`, or a table with a header that names these four

Texts, labels and errors are those of `annotations`. Times are seconds from the first frame.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actionclip_deploy.errors import LabelError
from actionclip_deploy.evaluate.annotations import (
    LabelIds,
    Subset,
    find_files,
    numbered_lines,
    read_annotation_text,
    seconds_of,
    table_rows,
)
from actionclip_deploy.records import Interval
from actionclip_deploy.video.reader import VIDEO_SUFFIXES


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
