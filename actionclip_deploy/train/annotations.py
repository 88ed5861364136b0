"""Annotation files -> samples: which videos there are, and what each of them shows.

    original      lines `FOLDER NUM_FRAMES LABEL`; a folder holds the frames as pictures
    videos        lines `PATH LABEL`
    kinetics      CSV with label, youtube_id, time_start, time_end
    ucf101        trainlist01.txt or testlist01.txt, or the folder that holds them
    hmdb51        the folder of ACTION_test_split1.txt and its like, or one of these files
    multi-label   CSV as Charades has it: id and actions, "c092 11.90 21.20;c147 0.00 12.60"

A label is a number from 0 or a name of the label file, whose case and word breaks may differ:
"ApplyEyeMakeup" finds "apply eye makeup". Paths may hold blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from actionclip_deploy.errors import LabelError
from actionclip_deploy.evaluate.annotations import (
    is_kinetics,
    is_multi_label,
    read_kinetics,
    read_multi_label,
)
from actionclip_deploy.train.annotation_files import (
    AnnotationFile,
    Sample,
    Subset,
    numbered_lines,
)
from actionclip_deploy.train.annotation_lists import is_original, read_original, read_videos
from actionclip_deploy.train.annotation_splits import (
    HMDB_FILE,
    UCF_FILE,
    read_hmdb51,
    read_ucf101,
)
from actionclip_deploy.train.label_ids import LabelIds

__all__ = ["FORMATS", "Sample", "Subset", "detect_format", "read_annotations"]

_READERS: dict[str, Callable[[AnnotationFile], list[Sample]]] = {
    "original": read_original,
    "videos": read_videos,
    "kinetics": read_kinetics,
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
    "multi-label": read_multi_label,
}
FORMATS = ("auto", *_READERS)


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

    Whether they exist is another question: see `screening`. The seconds in Kinetics are those of
    the recordings that its videos were cut from, and serve to find a video's file alone.

    Args:
        path: The file; for UCF-101 and HMDB-51 also the folder of all splits.
        labels: C labels.
        format: One of `FORMATS`; "auto" goes by names, header and first line.
        root: Folder that paths start from; None for the one of the file.
        subset: "train" or "test", where there are both.
        split: Which split, where there are several.
        intervals: Of a multi-label file, whether each interval in which an action is shown is a
            sample, instead of each video with all that it shows.
        image_template: File name of a frame, where a video is a folder of pictures.
        index_bias: Number of the first frame there.

    Returns:
        The samples in the order of the file.

    Raises:
        LabelError: If the file is not what it is said to be, lists no video, or has a label that
            there is not; names the line.
        ValueError: If `format` or `subset` is not allowed.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}.")
    if subset not in ("train", "test"):
        raise ValueError(f"subset is {subset!r}; it must be train or test.")
    chosen = detect_format(path) if format == "auto" else format
    samples = _READERS[chosen](
        AnnotationFile(
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


def detect_format(path: Path) -> str:
    """Tell the format of an annotation file by names, header and first line.

    Args:
        path: The file or folder.

    Raises:
        LabelError: If it cannot be read, is empty, or is a folder of other files.
    """
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    if any(HMDB_FILE.fullmatch(name) for name in names):
        return "hmdb51"
    if any(UCF_FILE.fullmatch(name) for name in names):
        return "ucf101"
    if path.is_dir():
        raise LabelError(
            f"The folder {path} holds splits neither of UCF-101 (trainlist01.txt) nor of HMDB-51 "
            "(ACTION_test_split1.txt); give an annotation file."
        )
    for _, line in numbered_lines(path):
        if is_kinetics(line):
            return "kinetics"
        if is_multi_label(line):
            return "multi-label"
        return "original" if is_original(line) else "videos"
    raise LabelError(f"The annotation file {path} is empty; expected one video on each line.")
