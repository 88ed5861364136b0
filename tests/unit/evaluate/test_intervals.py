"""Annotated intervals, and what events are worth against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actionclip_deploy.errors import LabelError
from actionclip_deploy.evaluate.intervals import read_intervals

LABELS = ("Long jump", "Baseball Pitch", "yoga, hot")


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _read(path: Path, **options: Any) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """What stands in a file, as plain values; paths from its folder."""
    root = options.get("root", path if path.is_dir() else path.parent)
    return [
        (
            video.path.relative_to(root).as_posix(),
            [(each.label, each.start_seconds, each.end_seconds) for each in video.intervals],
        )
        for video in read_intervals(path, LABELS, **options)
    ]


# Files.


ROWS = 'a.mp4,long jump,0,1.5\nb/c d.mkv,BaseballPitch,2,3\na.mp4,"yoga, hot",1,4e0\nd.mp4,,,\n'
SHOWN = [
    ("a.mp4", [("Long jump", 0.0, 1.5), ("yoga, hot", 1.0, 4.0)]),
    ("b/c d.mkv", [("Baseball Pitch", 2.0, 3.0)]),
    ("d.mp4", []),
]


def test_a_table_may_have_a_header_or_none(tmp_path: Path) -> None:
    bare = _write(tmp_path, "bare.csv", ROWS)
    headed = _write(tmp_path, "headed.csv", "\ufeffvideo,label,start,end\n" + ROWS)
    assert _read(bare) == _read(headed) == SHOWN


def test_a_header_may_have_other_columns_and_another_order(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.csv", "note,end,start,label,video\nx,2,1,1,a.mp4\n")
    assert _read(path) == [("a.mp4", [("Baseball Pitch", 1.0, 2.0)])]


def test_a_name_without_a_suffix_is_looked_for_in_the_root(tmp_path: Path) -> None:
    for name in ("deep/down/one.webm", "v_two.mkv"):
        _write(tmp_path / "videos", name, "")
    rows = "".join(f"{name},0,1,2\n" for name in ("one", "two", "three"))
    path = _write(tmp_path, "a.csv", rows)
    found = _read(path, root=tmp_path / "videos")
    assert [name for name, _ in found] == ["deep/down/one.webm", "v_two.mkv", "three.mp4"]


def _activitynet(**videos: tuple[str, list[tuple[str, float, float]]]) -> str:
    database = {
        name: {
            "duration": 60.0,
            "subset": subset,
            "annotations": [
                {"segment": [start, end], "label": label} for label, start, end in all_
            ],
        }
        for name, (subset, all_) in videos.items()
    }
    whole = {"version": "VERSION 1.3", "taxonomy": [{"nodeId": 0}], "database": database}
    return json.dumps(whole, indent=1)


def test_activitynet_is_read_by_subset(tmp_path: Path) -> None:
    first, second = ("Long jump", 0.5, 2.0), ("Baseball Pitch", 3.0, 4.0)
    validation = {"b": ("validation", [first, second]), "c": ("validation", [])}
    text = _activitynet(a=("training", [first]), t=("testing", []), **validation)
    path = _write(tmp_path, "activity_net.json", text)
    # The release has no annotations for testing.
    assert _read(path) == [("b.mp4", [first, second]), ("c.mp4", [])]
    assert _read(path, subset="train") == [("a.mp4", [first])]


def test_activitynets_form_may_have_annotations_for_testing(tmp_path: Path) -> None:
    one = ("Long jump", 0.5, 2.0)
    text = _activitynet(a=("Test", [one]), b=("Validation", [one]))
    path = _write(tmp_path, "thumos14.json", text)
    assert [name for name, _ in _read(path)] == ["a.mp4"]
    assert [name for name, _ in _read(path, subset="train")] == ["b.mp4"]


def test_a_folder_of_thumos_has_a_file_for_each_class(tmp_path: Path) -> None:
    _write(tmp_path, "BaseballPitch_test.txt", "video_test_0000324  0.2 1.1\nv2 3.0  4.5\n")
    _write(tmp_path, "LongJump_test.txt", "v2 1 2\n")
    _write(tmp_path, "LongJump_val.txt", "v3 1 2\n")
    _write(tmp_path, "Ambiguous_test.txt", "v2 7 8\n")
    _write(tmp_path, "detclasslist.txt", "7 BaseballPitch\n")
    assert _read(tmp_path) == [
        ("video_test_0000324.mp4", [("Baseball Pitch", 0.2, 1.1)]),
        ("v2.mp4", [("Baseball Pitch", 3.0, 4.5), ("Long jump", 1.0, 2.0)]),
    ]
    assert _read(tmp_path, subset="train") == [("v3.mp4", [("Long jump", 1.0, 2.0)])]
    assert _read(tmp_path / "LongJump_test.txt") == [("v2.mp4", [("Long jump", 1.0, 2.0)])]


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ("Long jump,2,2", "from 2 to 2 seconds.*end after its start"),
        ("Long jump,3,2.5", "from 3 to 2.5 seconds"),
        ("Long jump,-1,2", "from -1 to 2 seconds.*start at 0"),
        ("Long jump,nan,2", "start of an interval 'nan'; expected seconds"),
        ("Long jump,1,inf", "end of an interval 'inf'; expected seconds"),
        ("Long jump,1,2 s", "end of an interval '2 s'; expected seconds"),
        ("High jump,1,2", "label 'High jump', which is not one of the 3"),
        ("3,1,2", "label 3, and the 3 labels have the numbers 0 to 2"),
        ("Long jump,1", "has no end"),
        ("yoga, hot,1,2", "more fields than video,label,start,end.*quotation marks"),
    ],
)
def test_a_wrong_interval_is_refused_with_its_line(
    tmp_path: Path, interval: str, message: str
) -> None:
    path = _write(tmp_path, "a.csv", f"a.mp4,0,1,2\n\nb.mp4,{interval}\n")
    with pytest.raises(LabelError, match=f"a\\.csv line 3 .*{message}"):
        read_intervals(path, LABELS)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ('{"segment": [2, 1], "label": "yoga, hot"}', "from 2 to 1 seconds"),
        ('{"segment": [NaN, 1], "label": "yoga, hot"}', "'nan'; expected seconds"),
        ('{"segment": [-1, 1], "label": "yoga, hot"}', "start at 0"),
        ('{"segment": [0, true], "label": "yoga, hot"}', "'True'; expected seconds"),
        ('{"segment": [0, 1], "label": "yoga {"}', "label 'yoga {', which is not one"),
        ('{"segment": [0], "label": "yoga, hot"}', "list of start and end"),
        ('{"segment": [0, 1], "label": 2}', "expected a text"),
        ('{"segment": [0, 1], "label": "", "label": "a"}', "'label' twice"),
    ],
)
def test_a_wrong_annotation_of_activitynet_is_refused_with_its_line(
    tmp_path: Path, annotation: str, message: str
) -> None:
    text = '{"version": "\\"}{",\n"database": {"a":\n {"subset": "testing", "annotations": [\n'
    good = '{"segment": [0, 1],\n "label": "Long jump"}'
    path = _write(tmp_path, "a.json", f"{text}{good},\n{annotation}]}}}}}}\n")
    with pytest.raises(LabelError, match=rf"a\.json line 6 .*{message}"):
        read_intervals(path, LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"database": []}', 'no object "database"'),
        ('{"taxonomy": {}}', 'no object "database"'),
        ('{"database": {"a": {"subset": "testing"}}}', "line 1 has no list .*for the video 'a'"),
        ('{"database": {"a": 3}}', "no list of objects"),
        ('{"database": {\n"a": \n', "line 3 is not JSON"),
        ('{"database": {}}', "lists no video"),
        ('{"a":' + "[" * 100_000, "cannot be read as JSON"),
        ('{"a": ' + "1" * 5_000 + "}", "cannot be read as JSON|no object"),
    ],
)
def test_what_is_not_a_file_of_activitynet_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(LabelError, match=f"a\\.json.*{message}"):
        read_intervals(_write(tmp_path, "a.json", text), LABELS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("LongJump_test.txt", "v1 1 2\nv2 1\n", r"line 2 is 'v2 1'; expected VIDEO START END"),
        ("LongJump_test.txt", "v1 1 2\n\nv2 2 1\n", r"line 3 .*from 2 to 1 seconds"),
        ("HighJump_test.txt", "v1 1 2\n", r"HighJump_test.txt has the label 'HighJump'"),
    ],
)
def test_a_wrong_line_of_thumos_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(LabelError, match=message):
        read_intervals(_write(tmp_path, name, text), LABELS)


def test_folders_and_arguments_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="no file named as those of THUMOS"):
        read_intervals(tmp_path, LABELS)
    path = _write(tmp_path, "LongJump_val.txt", "v 1 2\n")
    with pytest.raises(LabelError, match=r"no Class_test\.txt"):
        read_intervals(tmp_path, LABELS)
    with pytest.raises(LabelError, match="named as the files of THUMOS"):
        read_intervals(_write(tmp_path, "a.txt", "v 1 2\n"), LABELS, format="thumos")
    with pytest.raises(ValueError, match="auto, activitynet, thumos, csv"):
        read_intervals(path, LABELS, format="json")
    with pytest.raises(ValueError, match="train or test"):
        read_intervals(path, LABELS, subset="val")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match=r"empty\.csv is empty"):
        read_intervals(_write(tmp_path, "empty.csv", "\n"), LABELS)
    with pytest.raises(LabelError, match="line 1 names no video"):
        read_intervals(_write(tmp_path, "b.csv", ",0,1,2\n"), LABELS)
