"""Annotation tables: the CSV files of Kinetics, and of Charades with several labels a video."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from actionclip_deploy.errors import LabelError
from actionclip_deploy.train.annotation_files import AnnotationFile, Sample, read_text
from actionclip_deploy.train.label_ids import LabelIds

_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_CHARADES_COLUMNS = ("id", "actions")
# Charades writes its 7th class as c006.
_CHARADES_CLASS = re.compile(r"c(\d{3})")
_MAX_DEPTH = 2  # of folders below the root, such as val/LABEL
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def is_kinetics(first_line: str) -> bool:
    """Whether a file with this first line is a table of Kinetics."""
    return set(_KINETICS_COLUMNS) <= set(_fields(first_line))


def is_multi_label(first_line: str) -> bool:
    """Whether a file with this first line is a table like that of Charades."""
    return set(_CHARADES_COLUMNS) <= set(_fields(first_line))


def read_kinetics(file: AnnotationFile) -> list[Sample]:
    """Read a table of Kinetics.

    A video is looked for by its name, in the root folder and two levels of folders below:
    ID_000010_000020 with the seconds that it was cut at, or the ID alone.

    Raises:
        LabelError: If the file is no such table, or a label is unknown.
    """
    files = _find_files(file.root)
    samples = []
    for place, row in _rows(file.path, _KINETICS_COLUMNS):
        name = row["youtube_id"]
        start, end = (_number(row[column], column, place) for column in ("time_start", "time_end"))
        full_name = f"{name}_{int(start):06d}_{int(end):06d}"
        path = files.get(full_name) or files.get(name) or file.root / f"{full_name}.mp4"
        samples.append(Sample(path, (file.label_ids.parse(row["label"], place),)))
    return samples


def read_multi_label(file: AnnotationFile) -> list[Sample]:
    """Read a table with `id` and `actions`, which are LABEL START END between semicolons.

    A label is a class of Charades (c000 to c156), a number or a name; times are seconds.

    Raises:
        LabelError: If the file is no such table, or a label is unknown.
    """
    files = _find_files(file.root)
    samples = []
    for place, row in _rows(file.path, _CHARADES_COLUMNS):
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
        _number(parts[1], "start of an action", place),
        _number(parts[2], "end of an action", place),
    )
    match = _CHARADES_CLASS.fullmatch(name)
    label_id = labels.number(int(match[1]), place) if match else labels.parse(name, place)
    return label_id, start, end


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the place of each row and its fields by column."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise LabelError(
                f"{path} has no column {' and no '.join(missing)}; expected a table with a header "
                f"that names {', '.join(columns)}."
            )
        line = reader.line_num + 1  # where a row begins: a quoted field may have several lines
        for row in reader:
            place = f"{path} line {line}"
            absent = [column for column in columns if row[column] is None]
            if absent:
                raise LabelError(f"{place} has no {absent[0]}; expected a field for each column.")
            yield place, {column: row[column].strip() for column in columns}
            line = reader.line_num + 1
    except csv.Error as exc:
        raise LabelError(
            f"{path} line {reader.line_num} is not CSV ({exc}); close every quotation mark and "
            "write one inside of a field twice."
        ) from exc


def _fields(line: str) -> list[str]:
    return [field.strip().strip('"') for field in line.split(",")]


def _number(text: str, what: str, place: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise LabelError(f"{place} has the {what} {text!r}; expected seconds.")
    return seconds


def _find_files(root: Path) -> dict[str, Path]:
    """Videos in a folder and in the folders below it, by their names without the suffix."""
    found: dict[str, Path] = {}
    folders = [(root, 0)]
    for folder, depth in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue  # every video of it will be told to be missing
        for entry in entries:
            if entry.is_dir():
                if depth < _MAX_DEPTH:
                    folders.append((Path(entry.path), depth + 1))
            elif entry.name.lower().endswith(_SUFFIXES):
                found.setdefault(Path(entry.name).stem, Path(entry.path))
    return found
