"""Annotation files -> samples: which videos there are, and what each of them shows.

    original      lines `FOLDER NUM_FRAMES LABEL`; a folder holds the frames as pictures
    videos        lines `PATH LABEL`
    kinetics      CSV with label, youtube_id, time_start, time_end
    ucf101        trainlist01.txt or testlist01.txt, or the folder that holds them
    hmdb51        the folder of ACTION_test_split1.txt and its like, or one of these files
    multi-label   CSV as Charades has it: id and actions, "c092 11.90 21.20;c147 0.00 12.60"
    folders       a folder with a folder of videos for each label, which has its name

A label is a number from 0 or a name of the label file, whose case and word breaks may differ:
"ApplyEyeMakeup" and "apply_eye_makeup" find "apply eye makeup", and "café" the same in another
Unicode form. Paths and labels may hold blanks; blanks, a tab or a comma separate them. A line that
can be read in two ways is refused.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from actionclip_deploy.errors import AnnotationWarning, ArgumentError, LabelError
from actionclip_deploy.files import read_text
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.prompts import clean_prompt, split_label
from actionclip_deploy.video.reader import VIDEO_SUFFIXES

Subset = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A video and its labels.

    Attributes:
        path: A video file, or the folder of its frames where `image_template` says so.
        label_ids: Ids of its labels, each once; none where a multi-label file names none.
        num_frames: How many frames there are, where the annotation states it.
        start_seconds: Where the part of the video begins that is meant, inclusive, counted from
            the first frame; None for its start.
        end_seconds: Where the part ends, exclusive; None for the end.
        image_template: File name of a frame such as "img_{:05d}.jpg"; None for a video file.
        index_bias: Number of the first frame in such a name.
    """

    path: Path
    label_ids: tuple[int, ...]
    num_frames: int | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    image_template: str | None = None
    index_bias: int = 1


def read_annotations(
    path: str | Path,
    labels: Sequence[str],
    *,
    format: str = "auto",
    root: str | Path | None = None,
    subset: Subset = "train",
    split: int = 1,
    intervals: bool = False,
    image_template: str = "img_{:05d}.jpg",
    index_bias: int = 1,
) -> list[Sample]:
    """Read which videos there are and what each of them shows.

    Whether they exist is another question. The seconds in Kinetics are those of
    the recordings that its videos were cut from, and serve to find a video's file alone.

    Args:
        path: The file; for UCF-101 and HMDB-51 also the folder of all splits; or a folder with a
            folder of videos for each label.
        format: One of `FORMATS`; "auto" detects it from names, header and first line.
        root: Folder that paths start from; None for the one of the file.
        intervals: Of a multi-label file, whether each interval in which an action is shown is a
            sample, instead of each video with all that it shows.
        image_template: File name of a frame, where a video is a folder of pictures.

    Returns:
        The samples in the order of the file.

    Raises:
        LabelError: If the file is not what it is said to be, lists no video, or has a label that
            there is not; names the line.
        ValueError: If `format`, `subset` or `image_template` is not allowed, or `root` was given
            with a folder that holds the videos.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ArgumentError("format", f"is {format!r}; it must be one of {', '.join(FORMATS)}.")
    if subset not in ("train", "test"):
        raise ArgumentError("subset", f"is {subset!r}; it must be train or test.")
    _check_template(image_template)
    chosen = detect_format(path) if format == "auto" else format
    if chosen == "folders" and root is not None:
        raise ArgumentError("root", f"is {root}, and {path} holds the videos itself; leave it out.")
    samples = _READERS[chosen](
        _AnnotationFile(
            path=path,
            root=Path(root) if root is not None else path if path.is_dir() else path.parent,
            label_ids=LabelIds(labels),
            subset=subset,
            split=split,
            intervals=intervals,
            image_template=image_template,
            index_bias=index_bias,
        )
    )
    if not samples:
        raise LabelError(
            f"{path} lists no video (format {chosen}, {subset}); give a list with at least one."
        )
    return samples


def score_method_of(samples: Iterable[Sample]) -> ScoreMethod | None:
    """How annotated videos are scored, in training's validation, `evaluate` and `export` alike.

    Returns:
        Independent where a video has several labels or none; None for the method of the model.
    """
    several = any(len(sample.label_ids) != 1 for sample in samples)
    return "independent" if several else None


def _check_template(image_template: str) -> None:
    try:
        names = {image_template.format(number) for number in (1, 2)}
    except (ValueError, LookupError, AttributeError, TypeError):
        names = set()
    if len(names) != 2:
        raise ArgumentError(
            "image_template",
            f"is {image_template!r}; it must have the number of the frame in it, as "
            "img_{:05d}.jpg has.",
        )


def detect_format(path: Path) -> str:
    """Tell the format of an annotation file by names, header and first line."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    if any(_HMDB_FILE.fullmatch(name) for name in names):
        return "hmdb51"
    if any(_UCF_FILE.fullmatch(name) for name in names):
        return "ucf101"
    if path.is_dir():
        if any(folder.is_dir() for folder in path.iterdir() if not folder.name.startswith(".")):
            return "folders"
        raise LabelError(
            f"The folder {path} holds splits neither of UCF-101 (trainlist01.txt) nor of HMDB-51 "
            "(ACTION_test_split1.txt), and no folder of videos for each label; give an annotation "
            "file, or such a folder."
        )
    for _, line in numbered_lines(path):
        if _is_kinetics(line):
            return "kinetics"
        if _is_multi_label(line):
            return "multi-label"
        if _UCF_VIDEO.fullmatch(line):
            return "ucf101"
        return "original" if _is_original(line) else "videos"
    raise LabelError(f"The annotation file {path} is empty; expected one video on each line.")


@dataclass(frozen=True)
class _AnnotationFile:
    """The arguments of `read_annotations`, for the reader of a format."""

    path: Path
    root: Path
    label_ids: LabelIds
    subset: Subset
    split: int
    intervals: bool
    image_template: str
    index_bias: int


class LabelIds:
    """Finds the ids of labels; the index of a label is its id.

    `place` is where a label stands, such as "train.txt line 3", for messages.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._cleaned = {clean_prompt(label): number for number, label in enumerate(labels)}
        self._folded: dict[str, list[int]] = {}  # several differ in case and word breaks alone
        for number, label in enumerate(labels):
            self._folded.setdefault(split_label(label), []).append(number)

    def find(self, text: str) -> int | None:
        """Id of a label by its name: as the text encoder reads it, or with other word breaks."""
        found = self._cleaned.get(clean_prompt(text))
        if found is not None:
            return found
        alike = self._folded.get(split_label(text), [])
        return alike[0] if len(alike) == 1 else None

    def parse(self, text: str, place: str) -> int:
        """Id of a label given as a name, or as a number where there are digits alone."""
        found = self.find(text)
        if _DIGITS.fullmatch(text):
            if found not in (None, int(text)):
                raise LabelError(
                    f"{place} has the label {text}, which is the name of label {found} and the "
                    f"number of {self._describe(int(text))}; give label {found} another name in "
                    "the label file."
                )
            return self.number(int(text), place)
        if found is None:
            if len(alike := self._folded.get(split_label(text), [])) > 1:
                raise LabelError(
                    f"{place} has the label {text!r}, which may be {self._describe(alike[0])} or "
                    f"{self._describe(alike[1])}; write it as the label file does."
                )
            raise LabelError(
                f"{place} has the label {text!r}, which is not one of the {len(self.labels)} "
                f"labels ({self.labels[0]!r}, ...); give the label file that belongs to this list."
            )
        return found

    def number(self, number: int, place: str, *, first: int = 0) -> int:
        """Id of a label given as a number, where the first label has the number `first`."""
        if not 0 <= number - first < len(self.labels):
            raise LabelError(
                f"{place} has the label {number}, and the {len(self.labels)} labels have the "
                f"numbers {first} to {len(self.labels) - 1 + first}; give the label file that "
                "belongs to this list."
            )
        return number - first

    def _describe(self, label_id: int) -> str:
        if label_id >= len(self.labels):
            return "no label"
        return f"label {label_id} ({self.labels[label_id]!r})"


_MAX_FILE_BYTES = 1 << 30  # the lists of the largest data sets have some 30 MB


def read_annotation_text(path: Path) -> str:
    """The text of an annotation file.

    Raises:
        LabelError: If it cannot be read, or is not UTF-8; names the line.
    """
    return read_text(path, "annotation file", LabelError, max_bytes=_MAX_FILE_BYTES)


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The place, such as "train.txt line 3", and the text of each line that is not empty."""
    for number, line in enumerate(read_annotation_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path} line {number}", line.strip()


_DIGITS = re.compile(r"\d{1,9}")
_SEPARATOR = re.compile(r"\s*,\s*|\s+")
_COUNTED = re.compile(r"(?P<folder>.+?)[\s,]+(?P<count>\d{1,9})")
_NUMBER_OF_LABEL = re.compile(r"c?\d{1,9}")


def _is_video(path: str) -> bool:
    return path.lower().endswith(tuple(VIDEO_SUFFIXES))


def _is_original(line: str) -> bool:
    """Whether a line looks like one of the original's: two numbers after what is no video file."""
    match = re.fullmatch(r"(.+?)\s+\d+\s+\d+", line)
    return match is not None and not _is_video(match[1])


def _read_original(file: _AnnotationFile) -> list[Sample]:
    """Read lines `FOLDER NUM_FRAMES LABEL`; a folder holds the frames of a video as pictures.

    Source:
        sallymmx/ActionCLIP@31c34df datasets/datasets.py, Action_DATASETS.
    """
    form = "FOLDER NUM_FRAMES LABEL"
    samples = []
    for line in _labelled_lines(file, form, lambda rest: _COUNTED.fullmatch(rest) is not None):
        counted = _COUNTED.fullmatch(line.path)
        if counted is None or not int(counted["count"]):
            raise LabelError(
                f"{line.place} is {line.text!r}; expected {form}, with a number of frames "
                "of 1 or more."
            )
        samples.append(
            Sample(
                path=file.root / counted["folder"],
                label_ids=(line.label_id,),
                num_frames=int(counted["count"]),
                image_template=file.image_template,
                index_bias=file.index_bias,
            )
        )
    return samples


def _read_videos(file: _AnnotationFile) -> list[Sample]:
    """Read lines `PATH LABEL`."""
    return [
        Sample(file.root / line.path, (line.label_id,))
        for line in _labelled_lines(file, "PATH LABEL", _is_video)
    ]


@dataclass(frozen=True)
class _LabelledLine:
    """A line with a label at its end; `path` is all that stands before it."""

    place: str
    text: str
    path: str
    label: str
    label_id: int = -1  # until all lines are known


def _labelled_lines(
    file: _AnnotationFile, form: str, is_whole: Callable[[str], bool]
) -> list[_LabelledLine]:
    """Read the lines of a list, whose numbers may count from 1.

    Args:
        form: What a line looks like, for messages.
        is_whole: Whether a text surely ends where the label begins.
    """
    labels = file.label_ids
    lines = []
    for place, text in numbered_lines(file.path):
        path, label = _split_line(text, place, labels, form, is_whole)
        is_label_list = _NUMBER_OF_LABEL.fullmatch(path) and labels.find(label) is not None
        if is_label_list and not (file.root / path).exists():
            raise LabelError(
                f"{place} is {text!r}, a label after its number; expected {form}. Give a list of "
                "videos, and this file as the labels."
            )
        lines.append(_LabelledLine(place, text, path, label))
    return _with_ids(lines, labels)


def _with_ids(lines: list[_LabelledLine], labels: LabelIds) -> list[_LabelledLine]:
    """Find the id of each label; folders that are named as labels say where numbers begin."""
    shown = [_label_of_folder(line, labels) for line in lines]
    told = {
        int(line.label) - label_id
        for line, label_id in zip(lines, shown, strict=True)
        if label_id is not None
    }
    first = 1 if told == {1} else 0
    may_begin_at_1 = "0" not in {line.label for line in lines}
    if lines and not told and may_begin_at_1 and all(map(_is_numbered_ucf, lines)):
        raise LabelError(
            f"{lines[0].place} is {lines[0].text!r}, whose number may count from 1 or from 0; give "
            "a label file with the names of the folders, or choose the format ucf101 for 1."
        )
    found = []
    for line, by_folder in zip(lines, shown, strict=True):
        if first and _DIGITS.fullmatch(line.label):
            label_id = labels.number(int(line.label), line.place, first=1)
        else:
            label_id = labels.parse(line.label, line.place)
        if by_folder is not None and by_folder != label_id:
            raise LabelError(
                f"{line.place} has the number {line.label} for the label "
                f"{labels.labels[label_id]!r}, in a folder of the label "
                f"{labels.labels[by_folder]!r}, number {by_folder}; give the label file that "
                "belongs to this list, or write the names of the labels."
            )
        found.append(replace(line, label_id=label_id))
    return found


def _label_of_folder(line: _LabelledLine, labels: LabelIds) -> int | None:
    """Id of the label that the folder of a video with a number is named after."""
    folder = line.path.replace("\\", "/").rpartition("/")[0].rpartition("/")[2]
    return labels.find(folder) if folder and _DIGITS.fullmatch(line.label) else None


def _is_numbered_ucf(line: _LabelledLine) -> bool:
    return bool(_UCF_VIDEO.fullmatch(line.path) and _DIGITS.fullmatch(line.label))


def _split_line(
    line: str, place: str, labels: LabelIds, form: str, is_whole: Callable[[str], bool]
) -> tuple[str, str]:
    """Split a line into what stands before its label, and the label.

    Paths and labels may both hold blanks, and end in a number. A tab or a comma, or a text that is
    surely whole, such as a path with a video's suffix, says where the label begins; otherwise it
    is the longest end of the line that is a label.
    """
    fields = [field.strip() for field in line.split("\t") if field.strip()]
    if len(fields) == form.count(" ") + 1:
        return " ".join(fields[:-1]), fields[-1]
    breaks, whole = [], []
    for match in _SEPARATOR.finditer(line):
        split = (line[: match.start()].strip('"'), line[match.end() :].strip('"'))
        if is_whole(split[0]):
            whole.append(split)
        elif "," in match[0]:
            continue  # of a path or a label
        breaks.append(split)
    if not breaks:
        raise LabelError(
            f"{place} is {line!r}; expected {form}, with a blank, a tab or a comma between them."
        )
    named = [split for split in breaks if labels.find(split[1]) is not None]
    if _DIGITS.fullmatch(breaks[-1][1]) and breaks[-1] not in named:
        named.append(breaks[-1])
    if sure := [split for split in named if split in whole]:
        return sure[0]
    if whole or not named:
        return (whole or breaks)[-1]  # whose end is not a label, which will be refused
    if named[0] != named[-1] and _DIGITS.fullmatch(named[-1][1]):
        raise LabelError(
            f"{place} is {line!r}, whose label may be {named[0][1]!r} or the number "
            f"{named[-1][1]}; write a tab before the label."
        )
    return named[0]


_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_CHARADES_COLUMNS = ("id", "actions")
# Charades writes its 7th class as c006.
_CHARADES_CLASS = re.compile(r"c(\d{3})")
_MAX_DEPTH = 2  # of folders below the root, such as val/LABEL


def _is_kinetics(first_line: str) -> bool:
    """Whether a file with this first line is a table of Kinetics."""
    return set(_KINETICS_COLUMNS) <= set(_fields(first_line))


def _is_multi_label(first_line: str) -> bool:
    """Whether a file with this first line is a table like that of Charades."""
    return set(_CHARADES_COLUMNS) <= set(_fields(first_line))


def _fields(line: str) -> list[str]:
    return [field.strip().strip('"') for field in line.split(",")]


def _read_kinetics(file: _AnnotationFile) -> list[Sample]:
    """Read a table of Kinetics.

    A video is looked for by its name, in the root folder and two levels of folders below:
    ID_000010_000020 with the seconds that it was cut at, or the ID alone.
    """
    files = find_files(file.root)
    samples = []
    for place, row in table_rows(file.path, _KINETICS_COLUMNS):
        name = row["youtube_id"]
        start, end = (
            seconds_of(row[column], column, place) for column in ("time_start", "time_end")
        )
        full_name = f"{name}_{int(start):06d}_{int(end):06d}"
        path = files.get(full_name) or files.get(name) or file.root / f"{full_name}.mp4"
        samples.append(Sample(path, (file.label_ids.parse(row["label"], place),)))
    return samples


def _read_multi_label(file: _AnnotationFile) -> list[Sample]:
    """Read a table with `id` and `actions`, which are LABEL START END between semicolons.

    A label is a class of Charades (c000 to c156), a number or a name; times are seconds.
    """
    files = find_files(file.root)
    samples = []
    for place, row in table_rows(file.path, _CHARADES_COLUMNS):
        path = files.get(row["id"]) or file.root / f"{row['id']}.mp4"
        actions = [
            _parse_action(text.strip(), place, file.label_ids)
            for text in row["actions"].split(";")
            if text.strip()
        ]
        if file.intervals:
            samples += [Sample(path, (label,), None, start, end) for label, start, end in actions]
        else:
            samples.append(Sample(path, tuple(sorted({label for label, _, _ in actions}))))
    return samples


def _parse_action(text: str, place: str, labels: LabelIds) -> tuple[int, float, float]:
    parts = text.rsplit(maxsplit=2)
    if len(parts) != 3:
        raise LabelError(
            f"{place} has the action {text!r}; expected LABEL START END, such as c092 11.90 21.20."
        )
    name, start, end = (
        parts[0],
        seconds_of(parts[1], "start of an action", place),
        seconds_of(parts[2], "end of an action", place),
    )
    match = _CHARADES_CLASS.fullmatch(name)
    label_id = labels.number(int(match[1]), place) if match else labels.parse(name, place)
    return label_id, start, end


def table_rows(
    path: Path, columns: tuple[str, ...], *, has_header: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the place of each row and its fields by column.

    Args:
        has_header: Whether the first row names the columns; otherwise each row has these alone.
    """
    reader = csv.reader(io.StringIO(read_annotation_text(path), newline=""), strict=True)
    names = None if has_header else columns
    missing = list(columns) if has_header else []
    line = 1  # where a row begins: a quoted field may have several lines
    try:
        for fields in reader:
            place, line = f"{path} line {line}", reader.line_num + 1
            if not fields:
                continue
            if names is None:
                names = tuple(fields)
                missing = [column for column in columns if column not in names]
                if missing:
                    break
                continue
            row = dict(zip(names, fields, strict=False))
            if absent := [column for column in columns if column not in row]:
                raise LabelError(f"{place} has no {absent[0]}; expected a field for each column.")
            if len(fields) > len(names) and not has_header:
                raise LabelError(
                    f"{place} has more fields than {','.join(columns)}; expected one for each. A "
                    "field that holds a comma stands in quotation marks."
                )
            yield place, {column: row[column].strip() for column in columns}
    except csv.Error as exc:
        raise LabelError(
            f"{path} line {reader.line_num} is not CSV ({exc}); close every quotation mark and "
            "write one inside of a field twice."
        ) from exc
    if missing:
        raise LabelError(
            f"{path} has no column {' and no '.join(missing)}; expected a table with a header "
            f"that names {', '.join(columns)}."
        )


def seconds_of(text: str, what: str, place: str) -> float:
    """Seconds that stand at a place; they are finite."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise LabelError(f"{place} has the {what} {text!r}; expected seconds.")
    return seconds


def find_files(root: Path) -> dict[str, Path]:
    """Videos in a folder and in the folders below it, by their names without the suffix."""
    found: dict[str, Path] = {}
    folders = [(root, 0)]
    for folder, depth in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue  # each of its videos will be reported as missing
        for entry in entries:
            if entry.is_dir():
                if depth < _MAX_DEPTH:
                    folders.append((Path(entry.path), depth + 1))
            elif entry.name.lower().endswith(tuple(VIDEO_SUFFIXES)):
                found.setdefault(Path(entry.name).stem, Path(entry.path))
    return found


_UCF_FILE = re.compile(r"(train|test)list\d+\.txt")
_HMDB_FILE = re.compile(r"(.+)_test_split(\d+)\.txt")
_UCF_CLASSES = "classInd.txt"
_UCF_LINE = re.compile(r"(([^/]+)/.+\.avi)(?:\s+(\d{1,9}))?")
# Of a list under another name; one with numbers says by its folders whether they count from 1.
_UCF_VIDEO = re.compile(r"[^/]+/v_.+_g\d+_c\d+\.avi")
# What HMDB-51 says of a video: 1 for training, 2 for test, 0 for neither.
_HMDB_USES: dict[str, Subset | None] = {"1": "train", "2": "test", "0": None}


def _read_ucf101(file: _AnnotationFile) -> list[Sample]:
    """Read lines `Class/v_Class_g08_c01.avi 1`, or without the number as the test lists are.

    Numbers count from 1. Where a line has none, classInd.txt next to the list has them, if it is
    there; a label of the same name has to have the same number.
    """
    path = file.path
    if path.is_dir():
        path /= f"{file.subset}list{file.split:02d}.txt"
    numbers = _read_class_numbers(path.parent / _UCF_CLASSES)
    samples = []
    for place, line in numbered_lines(path):
        match = _UCF_LINE.fullmatch(line)
        if match is None:
            raise LabelError(
                f"{place} is {line!r}; expected CLASS/VIDEO.avi, and in a training list the "
                "number of the class after it."
            )
        name, class_name, number = match.groups()
        stated = int(number) if number else numbers.get(class_name)
        if numbers.get(class_name, stated) != stated:
            raise LabelError(
                f"{place} gives the class {class_name} the number {number}, and {_UCF_CLASSES} "
                f"the number {numbers[class_name]}; give the two files of one release."
            )
        label_id = _ucf_label(class_name, stated, place, file.label_ids)
        samples.append(Sample(file.root / name, (label_id,)))
    return samples


def _read_class_numbers(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for place, line in numbered_lines(path):
        number, name = [*line.split(maxsplit=1), ""][:2]
        if not _DIGITS.fullmatch(number) or not name:
            raise LabelError(f"{place} is {line!r}; expected a number and a class.")
        if numbers.setdefault(name, int(number)) != int(number):
            raise LabelError(f"{place} gives {name} the number {number} after {numbers[name]}.")
        if names.setdefault(int(number), name) != name:
            raise LabelError(f"{place} gives {name} the number of {names[int(number)]}, {number}.")
    return numbers


def _ucf_label(class_name: str, number: int | None, place: str, labels: LabelIds) -> int:
    named = labels.find(class_name)
    if number is None:
        return labels.parse(class_name, place) if named is None else named
    label_id = labels.number(number, place, first=1)
    if named not in (None, label_id):
        raise LabelError(
            f"{place} gives the class {class_name} the number {number}, which is the label "
            f"{labels.labels[label_id]!r}; give labels in the order of classInd.txt."
        )
    return label_id


def _read_hmdb51(file: _AnnotationFile) -> list[Sample]:
    """Read lines `name.avi 1` of ACTION_test_split1.txt; the videos are in a folder ACTION."""
    samples = []
    for path in _hmdb_files(file):
        match = _HMDB_FILE.fullmatch(path.name)
        if match is None:
            raise LabelError(
                f"{path} is not named as the splits of HMDB-51 are; expected "
                "ACTION_test_split1.txt, from whose name the label is taken."
            )
        label_id = file.label_ids.parse(match[1], str(path))
        for place, line in numbered_lines(path):
            name, _, use = line.rpartition(" ")
            if use not in _HMDB_USES or not name.strip():
                raise LabelError(
                    f"{place} is {line!r}; expected VIDEO.avi and 1 (training), 2 (test) or 0."
                )
            if _HMDB_USES[use] == file.subset:
                samples.append(Sample(file.root / match[1] / name.strip(), (label_id,)))
    return samples


def _hmdb_files(file: _AnnotationFile) -> list[Path]:
    if not file.path.is_dir():
        return [file.path]
    found = sorted(file.path.glob(f"*_test_split{file.split}.txt"))
    if not found:
        raise LabelError(
            f"The folder {file.path} has no ACTION_test_split{file.split}.txt; give the folder of "
            "the splits of HMDB-51, and a split that it has."
        )
    return found


# A folder of videos for each label


_NAMED = 8  # folders or entries in a message


def labels_of_folders(folder: str | Path) -> tuple[str, ...]:
    """The labels of a folder that has a folder of videos for each of them, sorted.

    They are the names of the folders, with blanks in the place of underscores.

    Raises:
        LabelError: If there is no such folder, or it holds no video.
    """
    found, _ = _videos_by_folder(Path(folder))
    if not found:
        raise _no_videos(Path(folder))
    return tuple(sorted({" ".join(name.replace("_", " ").split()) for name in found}))


def _read_folders(file: _AnnotationFile) -> list[Sample]:
    """Read `LABEL/VIDEO`: the name of a folder is that of its label."""
    found, left_out = _videos_by_folder(file.path)
    if not found:
        raise _no_videos(file.path)
    ids = {name: file.label_ids.find(name) for name in found}
    unknown = [name for name, label_id in ids.items() if label_id is None]
    if unknown:
        labels = file.label_ids.labels
        raise LabelError(
            f"{file.path} has videos in {_some(unknown)}, which {'are' if unknown[1:] else 'is'} "
            f"not among the {len(labels)} labels ({labels[0]!r}, ...); give the labels that belong "
            "to these folders, name the folders as the labels, or give the folder that holds those."
        )
    if left_out:
        warnings.warn(
            f"{file.path}: not a video in the folder of a label, and left out: {_some(left_out)}.",
            AnnotationWarning,
            stacklevel=3,
        )
    return [
        Sample(video, (label_id,))
        for name, label_id in ids.items()
        if label_id is not None
        for video in found[name]
    ]


def _videos_by_folder(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The videos of each folder in a folder, both sorted, and the rest; hidden entries are neither.

    Files next to the folders are of no account, unless they are videos.
    """
    found: dict[str, list[Path]] = {}
    left_out = []
    for folder in _entries(root):
        if not folder.is_dir():
            left_out += [folder.name] if _is_video(folder.name) else []
            continue
        inside = _entries(folder)
        videos = [path for path in inside if _is_video(path.name) and not path.is_dir()]
        if videos:
            found[folder.name] = videos
        others = [f"{folder.name}/{path.name}" for path in inside if path not in videos]
        left_out += others if videos else [f"{folder.name}/"]
    return found, left_out


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as exc:
        raise LabelError(
            f"The folder {folder} cannot be read ({exc.strerror}); check the path and its "
            "permissions."
        ) from exc


def _no_videos(folder: Path) -> LabelError:
    return LabelError(
        f"No folder in {folder} holds videos, which are known by their suffixes "
        f"({', '.join(sorted(VIDEO_SUFFIXES))}); give a folder with a folder of videos for each "
        "label."
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    shown = ", ".join(map(repr, names[:_NAMED]))
    return f"{shown} and {more} more" if more > 0 else shown


_READERS: dict[str, Callable[[_AnnotationFile], list[Sample]]] = {
    "original": _read_original,
    "videos": _read_videos,
    "kinetics": _read_kinetics,
    "ucf101": _read_ucf101,
    "hmdb51": _read_hmdb51,
    "multi-label": _read_multi_label,
    "folders": _read_folders,
}
FORMATS = ("auto", *_READERS)
