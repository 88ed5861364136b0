"""Annotation files as text, and what each says about a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actionclip_deploy.errors import LabelError
from actionclip_deploy.train.label_ids import LabelIds

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


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file and how it is to be read; see `annotations.read_annotations`.

    Attributes:
        path: The file or folder.
        root: Folder that paths start from.
        label_ids: Finds labels.
        subset: Which of two is wanted, where it has both.
        split: Which split is wanted, where it has several.
        intervals: Whether each interval is a sample.
        image_template: File name of a frame.
        index_bias: Number of the first frame.
    """

    path: Path
    root: Path
    label_ids: LabelIds
    subset: Subset
    split: int
    intervals: bool
    image_template: str
    index_bias: int


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Give the place, such as "train.txt line 3", and the text of each line that is not empty.

    Raises:
        LabelError: If the file cannot be read.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path} line {number}", line.strip()


def read_text(path: Path) -> str:
    r"""Read an annotation file; lines end with "\n" whatever they end with in the file.

    Raises:
        LabelError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise LabelError(
            f"The annotation file {path} cannot be read ({exc.strerror}); "
            "check the path and its permissions."
        ) from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise LabelError(
            f"{path} line {line} is not UTF-8 (byte {exc.object[exc.start]:#04x}); "
            "give a list of videos in plain text."
        ) from exc
