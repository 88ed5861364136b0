"""Annotation lists: plain text with one video on a line."""

from __future__ import annotations

import re

from actionclip_deploy.errors import LabelError
from actionclip_deploy.train.annotation_files import AnnotationFile, Sample, numbered_lines
from actionclip_deploy.train.label_ids import LabelIds

_BLANKS = re.compile(r"\s+")


def read_original(file: AnnotationFile) -> list[Sample]:
    """Read lines `FOLDER NUM_FRAMES LABEL`; a folder holds the frames of a video as pictures.

    Raises:
        LabelError: If a line has another form, or its label is unknown.

    Source:
        sallymmx/ActionCLIP@31c34df datasets/datasets.py, Action_DATASETS.
    """
    samples = []
    for place, line in numbered_lines(file.path):
        rest, label_id = _take_label(line, place, file.label_ids, "FOLDER NUM_FRAMES LABEL")
        folder, count = ["", *rest.rsplit(maxsplit=1)][-2:]
        if not folder or not count.isdecimal() or not int(count):
            raise LabelError(
                f"{place} is {line!r}; expected FOLDER NUM_FRAMES LABEL, with a number of frames "
                "of 1 or more."
            )
        samples.append(
            Sample(
                path=file.root / folder,
                label_ids=(label_id,),
                num_frames=int(count),
                image_template=file.image_template,
                index_bias=file.index_bias,
            )
        )
    return samples


def is_original(line: str) -> bool:
    """Whether a line looks like one of the original's: two numbers after a name with no suffix."""
    match = re.fullmatch(r"(.+?)\s+\d+\s+\d+", line)
    return match is not None and "." not in match[1].replace("\\", "/").rsplit("/", 1)[-1]


def read_videos(file: AnnotationFile) -> list[Sample]:
    """Read lines `PATH LABEL`.

    Raises:
        LabelError: If a line has another form, or its label is unknown.
    """
    samples = []
    for place, line in numbered_lines(file.path):
        path, label_id = _take_label(line, place, file.label_ids, "PATH LABEL")
        samples.append(Sample(file.root / path, (label_id,)))
    return samples


def _take_label(line: str, place: str, labels: LabelIds, form: str) -> tuple[str, int]:
    """Split a line into what stands before its label, and the label's id.

    Labels and paths may both hold blanks: the longest end of the line that is a label is one.
    """
    breaks = [(match.start(), match.end()) for match in _BLANKS.finditer(line)]
    if not breaks:
        raise LabelError(f"{place} is {line!r}; expected {form}, with a blank between them.")
    last_start, last_end = breaks[-1]
    if not line[last_end:].isdecimal():
        for start, end in breaks:
            label_id = labels.find(line[end:])
            if label_id is not None:
                return line[:start], label_id
    return line[:last_start], labels.parse(line[last_end:], place)
