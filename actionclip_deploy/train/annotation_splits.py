"""The splits of UCF-101 and HMDB-51, in the files that their authors distribute."""

from __future__ import annotations

import re
from pathlib import Path

from actionclip_deploy.errors import LabelError
from actionclip_deploy.train.annotation_files import (
    AnnotationFile,
    Sample,
    Subset,
    numbered_lines,
)
from actionclip_deploy.train.label_ids import LabelIds

UCF_FILE = re.compile(r"(train|test)list\d+\.txt")
HMDB_FILE = re.compile(r"(.+)_test_split(\d+)\.txt")

_UCF_CLASSES = "classInd.txt"
_UCF_LINE = re.compile(r"(([^/]+)/.+\.avi)(?:\s+(\d+))?")
# What HMDB-51 says of a video: 1 for training, 2 for test, 0 for neither.
_HMDB_USES: dict[str, Subset | None] = {"1": "train", "2": "test", "0": None}


def read_ucf101(file: AnnotationFile) -> list[Sample]:
    """Read lines `Class/v_Class_g08_c01.avi 1`, or without the number as the test lists are.

    Numbers count from 1. Where a line has none, classInd.txt beside the list has them, if it is
    there; a label of the same name has to have the same number.

    Raises:
        LabelError: If a line has another form, its label is unknown, or name and number disagree.
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
        label_id = _ucf_label(class_name, stated, place, file.label_ids)
        samples.append(Sample(file.root / name, (label_id,)))
    return samples


def _read_class_numbers(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    numbers = {}
    for place, line in numbered_lines(path):
        number, _, name = line.partition(" ")
        if not number.isdecimal() or not name.strip():
            raise LabelError(f"{place} is {line!r}; expected a number and a class.")
        numbers[name.strip()] = int(number)
    return numbers


def _ucf_label(class_name: str, number: int | None, place: str, labels: LabelIds) -> int:
    named = labels.find(class_name)
    if number is None:
        return labels.parse(class_name, place) if named is None else named
    label_id = labels.number(number, place, first=1)
    if named not in (None, label_id):
        raise LabelError(
            f"{place} gives the class {class_name} the number {number}, which is the label "
            f"{labels.name(label_id)!r}; give labels in the order of classInd.txt."
        )
    return label_id


def read_hmdb51(file: AnnotationFile) -> list[Sample]:
    """Read lines `name.avi 1` of ACTION_test_split1.txt; the videos are in a folder ACTION.

    Raises:
        LabelError: If a line has another form, or an action is no label.
    """
    samples = []
    for path in _hmdb_files(file):
        match = HMDB_FILE.fullmatch(path.name)
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


def _hmdb_files(file: AnnotationFile) -> list[Path]:
    if not file.path.is_dir():
        return [file.path]
    found = sorted(file.path.glob(f"*_test_split{file.split}.txt"))
    if not found:
        raise LabelError(
            f"The folder {file.path} has no ACTION_test_split{file.split}.txt; give the folder of "
            "the splits of HMDB-51, and a split that it has."
        )
    return found
