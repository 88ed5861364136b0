"""Annotation files in the formats that people have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actionclip_deploy.errors import AnnotationWarning, LabelError
from actionclip_deploy.evaluate.annotations import (
    FORMATS,
    Sample,
    detect_format,
    labels_of_folders,
    read_annotations,
)

LABELS = ("abseiling", "arm wrestling", "yoga")


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_originals_list_names_folders_of_frames(tmp_path: Path) -> None:
    path = _write(tmp_path, "val.txt", "abseiling/0347Z_000095 300 0\nyoga/my clip 12 2\n")

    samples = read_annotations(path, LABELS, root="frames", image_template="f{:06d}.png")

    assert samples == [
        Sample(
            Path("frames/abseiling/0347Z_000095"),
            (0,),
            num_frames=300,
            image_template="f{:06d}.png",
            index_bias=1,
        ),
        Sample(
            Path("frames/yoga/my clip"),
            (2,),
            num_frames=12,
            image_template="f{:06d}.png",
            index_bias=1,
        ),
    ]


def test_a_label_of_the_originals_list_may_be_a_name(tmp_path: Path) -> None:
    path = _write(tmp_path, "val.txt", "clips/a 30 arm wrestling\n")

    (sample,) = read_annotations(path, LABELS, format="original")

    assert sample.path == tmp_path / "clips" / "a"
    assert (sample.num_frames, sample.label_ids) == (30, (1,))
    assert sample.image_template == "img_{:05d}.jpg"


@pytest.mark.parametrize("line", ["clips/a many 0", "clips/a 0 0", "30 0"])
def test_a_line_of_the_originals_list_needs_a_number_of_frames(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path, "val.txt", f"clips/b 4 1\n{line}\n")

    with pytest.raises(LabelError, match=r"val\.txt line 2 .*FOLDER NUM_FRAMES LABEL"):
        read_annotations(path, LABELS, format="original")


@pytest.mark.parametrize(
    ("line", "video", "label"),
    [
        ("a.mp4 0", "a.mp4", 0),
        ("my holiday 2024.mp4 2", "my holiday 2024.mp4", 2),
        ("clips/a b.mp4 arm wrestling", "clips/a b.mp4", 1),
        ("clips/a.mp4\tArm_Wrestling", "clips/a.mp4", 1),
        ("arm wrestling/yoga.mp4 yoga", "arm wrestling/yoga.mp4", 2),
        ("/data/a.mp4 1", "/data/a.mp4", 1),
    ],
)
def test_a_video_list_takes_blanks_in_paths_and_labels(
    tmp_path: Path, line: str, video: str, label: int
) -> None:
    path = _write(tmp_path, "list.txt", f"{line}\n\n")

    (sample,) = read_annotations(path, LABELS)

    assert sample == Sample(tmp_path / video, (label,))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a.mp4", "expected PATH LABEL"),
        ("a.mp4 3", "the label 3, and the 3 labels have the numbers 0 to 2"),
        ("a.mp4 juggling", "the label 'juggling', which is not one of the 3 labels"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = _write(tmp_path, "list.txt", f"b.mp4 1\n{line}\n")

    with pytest.raises(LabelError, match=rf"list\.txt line 2 .*{problem}"):
        read_annotations(path, LABELS)


def test_kinetics_finds_files_by_their_names_in_the_folders_of_labels(tmp_path: Path) -> None:
    table = (
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        '"arm wrestling",-abc_DEF012,19,29,train,0\n'
        "yoga,plainname_1,0,10,train,1\n"
        "abseiling,notthere_42,5,15,train,0\n"
    )
    path = _write(tmp_path, "train.csv", table)
    videos = tmp_path / "videos"
    _touch(
        videos / "arm wrestling" / "-abc_DEF012_000019_000029.mp4",
        videos / "train" / "yoga" / "plainname_1.mkv",
    )

    samples = read_annotations(path, LABELS, root=videos)

    assert samples == [
        Sample(videos / "arm wrestling" / "-abc_DEF012_000019_000029.mp4", (1,)),
        Sample(videos / "train" / "yoga" / "plainname_1.mkv", (2,)),
        Sample(videos / "notthere_42_000005_000015.mp4", (0,)),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("yoga,x,a,10,train", "line 2 has the time_start 'a'; expected seconds"),
        ("juggling,x,0,10,train", "line 2 has the label 'juggling'"),
        ("yoga,x", "line 2 has no time_start"),
        ('"yoga,x,0,10,train', "is not CSV"),
    ],
)
def test_a_wrong_row_of_kinetics_is_named(tmp_path: Path, row: str, problem: str) -> None:
    path = _write(tmp_path, "k.csv", f"label,youtube_id,time_start,time_end,split\n{row}\n")

    with pytest.raises(LabelError, match=problem):
        read_annotations(path, LABELS)


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "k.csv", "label,youtube_id\nyoga,x\n")

    with pytest.raises(LabelError, match="has no column time_start and no time_end"):
        read_annotations(path, LABELS, format="kinetics")


UCF_LABELS = ("ApplyEyeMakeup", "ApplyLipstick")


def test_ucf_101_numbers_count_from_one(tmp_path: Path) -> None:
    path = _write(tmp_path, "trainlist01.txt", "ApplyLipstick/v_ApplyLipstick_g08_c01.avi 2\r\n")

    (sample,) = read_annotations(path, UCF_LABELS, root="ucf")

    assert sample == Sample(Path("ucf/ApplyLipstick/v_ApplyLipstick_g08_c01.avi"), (1,))


def test_ucf_101_test_lists_have_no_numbers(tmp_path: Path) -> None:
    _write(tmp_path, "classInd.txt", "1 ApplyEyeMakeup\n2 ApplyLipstick\n")
    _write(tmp_path, "trainlist02.txt", "ApplyEyeMakeup/v_1.avi 1\n")
    _write(tmp_path, "testlist02.txt", "ApplyLipstick/v_2.avi\n")

    by_words = read_annotations(tmp_path, ("makeup", "lipstick"), subset="test", split=2)
    by_name = read_annotations(tmp_path / "testlist02.txt", ("apply eye makeup", "apply lipstick"))

    assert by_words == by_name == [Sample(tmp_path / "ApplyLipstick/v_2.avi", (1,))]


def test_ucf_101_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "trainlist01.txt", "ApplyLipstick/v_2.avi 2\n")

    with pytest.raises(LabelError, match=r"line 1 gives the class ApplyLipstick the number 2"):
        read_annotations(path, UCF_LABELS[::-1])


@pytest.mark.parametrize("line", ["v_2.avi 2", "ApplyLipstick/v_2.avi two", "ApplyLipstick/v_2"])
def test_a_wrong_line_of_ucf_101_is_named(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path, "trainlist01.txt", f"{line}\n")

    with pytest.raises(LabelError, match=r"line 1 .*expected CLASS/VIDEO\.avi"):
        read_annotations(path, UCF_LABELS)


def test_a_class_of_ucf_101_without_number_or_name_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "testlist01.txt", "Archery/v_3.avi\n")

    with pytest.raises(LabelError, match="the label 'Archery', which is not one"):
        read_annotations(path, UCF_LABELS)


def _hmdb_folder(folder: Path) -> Path:
    _write(folder, "brush_hair_test_split1.txt", "a #1.avi 1 \nb.avi 2 \nc.avi 0 \n")
    _write(folder, "cartwheel_test_split1.txt", "d.avi 2 \ne.avi 1 \n")
    _write(folder, "cartwheel_test_split2.txt", "d.avi 1 \n")
    return folder


def test_hmdb_51_splits_into_training_and_test(tmp_path: Path) -> None:
    folder, labels = _hmdb_folder(tmp_path), ("brush hair", "cartwheel")

    training = read_annotations(folder, labels, root="hmdb")
    test = read_annotations(folder, labels, root="hmdb", subset="test")

    assert training == [
        Sample(Path("hmdb/brush_hair/a #1.avi"), (0,)),
        Sample(Path("hmdb/cartwheel/e.avi"), (1,)),
    ]
    assert test == [
        Sample(Path("hmdb/brush_hair/b.avi"), (0,)),
        Sample(Path("hmdb/cartwheel/d.avi"), (1,)),
    ]


def test_one_file_of_hmdb_51_is_enough(tmp_path: Path) -> None:
    path = _hmdb_folder(tmp_path) / "cartwheel_test_split2.txt"

    assert len(read_annotations(path, ("brush hair", "cartwheel"))) == 1


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("cartwheel_test_split1.txt", "d.avi 3\n", r"line 1 .*1 \(training\), 2 \(test\) or 0"),
        ("juggling_test_split1.txt", "d.avi 1\n", "the label 'juggling'"),
        ("cartwheel.txt", "d.avi 1\n", r"expected ACTION_test_split1\.txt"),
    ],
)
def test_a_wrong_file_of_hmdb_51_is_named(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    path = _write(tmp_path, name, text)

    with pytest.raises(LabelError, match=problem):
        read_annotations(path, ("cartwheel",), format="hmdb51")


def test_a_split_that_hmdb_51_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"has no ACTION_test_split3\.txt"):
        read_annotations(_hmdb_folder(tmp_path), ("brush hair", "cartwheel"), split=3)


CHARADES = (
    "id,subject,script,actions,length\n"
    '46GP8,HR43,"A person cooks,\nand leaves.",'
    "c002 0.00 12.60;c001 11.90 21.20;c002 15.00 16.00,24.8\n"
    "N11GT,0KZ7,A person reads.,,18.0\n"
)


def test_charades_gives_all_labels_of_a_video(tmp_path: Path) -> None:
    path = _write(tmp_path, "charades.csv", CHARADES)
    _touch(tmp_path / "46GP8.avi")

    samples = read_annotations(path, LABELS)

    assert samples == [
        Sample(tmp_path / "46GP8.avi", (1, 2)),
        Sample(tmp_path / "N11GT.mp4", ()),
    ]


def test_charades_gives_single_intervals_on_request(tmp_path: Path) -> None:
    path = _write(tmp_path, "charades.csv", CHARADES)

    samples = read_annotations(path, LABELS, intervals=True)

    assert [(s.label_ids, s.start_seconds, s.end_seconds) for s in samples] == [
        ((2,), 0.0, 12.6),
        ((1,), 11.9, 21.2),
        ((2,), 15.0, 16.0),
    ]


@pytest.mark.parametrize(
    ("actions", "problem"),
    [
        ("c157 0 1", "line 2 has the label 157"),
        ("c001", "the action 'c001'; expected LABEL START END"),
        ("c001 0 later", "the end of an action 'later'; expected seconds"),
    ],
)
def test_a_wrong_action_is_named(tmp_path: Path, actions: str, problem: str) -> None:
    path = _write(tmp_path, "charades.csv", f"id,actions\nX,{actions}\n")

    with pytest.raises(LabelError, match=problem):
        read_annotations(path, LABELS)


def test_actions_may_be_named(tmp_path: Path) -> None:
    path = _write(tmp_path, "own.csv", "id,actions\nX,arm wrestling 0 2;yoga 1 2\n")

    (sample,) = read_annotations(path, LABELS)

    assert sample.label_ids == (1, 2)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("val.txt", "abseiling/0347Z_000095 300 0\n", "original"),
        ("val.txt", "\n/data/v.x/clip 300 0\n", "original"),
        ("val.txt", "holiday 2024 1.mp4 0\n", "videos"),
        ("val.txt", "a.mp4 30 0\n", "videos"),
        ("val.csv", "label,youtube_id,time_start,time_end,split\n", "kinetics"),
        ("val.csv", "id,subject,actions\n", "multi-label"),
        ("testlist03.txt", "Archery/v_3.avi\n", "ucf101"),
        ("brush_hair_test_split1.txt", "a.avi 1\n", "hmdb51"),
    ],
)
def test_formats_are_told_apart(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert detect_format(_write(tmp_path, name, text)) == expected
    assert expected in FORMATS


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path, "list.txt", text)

    with pytest.raises(LabelError, match="is empty"):
        read_annotations(path, LABELS)
    with pytest.raises(LabelError, match="lists no video"):
        read_annotations(path, LABELS, format="videos")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"gone\.txt cannot be read"):
        read_annotations(tmp_path / "gone.txt", LABELS)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a.mp4 0\nb\xff.mp4 1\n")

    with pytest.raises(LabelError, match=r"list\.txt line 2 is not UTF-8 \(byte 0xff\)"):
        read_annotations(path, LABELS)


KINETICS_HEADER, CHARADES_HEADER = "label,youtube_id,time_start,time_end", "id,actions"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("header", "good"),
    [
        ("a.mp4 0", "b.mp4 1"),
        (KINETICS_HEADER, "run,abc,0,10"),
        (CHARADES_HEADER, "abc,c000 1.0 2.0"),
    ],
)
@pytest.mark.parametrize(
    ("bad", "told"),
    [(b"c\xff.mp4 1", r"is not UTF-8 \(byte 0xff\)"), (b"c\0.mp4 1", "holds a zero byte")],
)
def test_a_line_that_is_no_text_is_named_in_every_format_and_after_every_kind_of_line(
    end: str, header: str, good: str, bad: bytes, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(end.encode().join([header.encode(), good.encode(), b"", bad, b""]))
    with pytest.raises(LabelError, match=rf"list\.csv line 4 {told}"):
        read_annotations(path, LABELS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("header", ["a.mp4 0", KINETICS_HEADER, CHARADES_HEADER])
def test_a_list_of_a_wide_encoding_is_named_with_what_to_do(
    encoding: str, header: str, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(f"{header}\nx\n".encode(encoding))
    with pytest.raises(LabelError, match=r"is UTF-(16|32).E, and not UTF-8; save it as UTF-8, for"):
        read_annotations(path, LABELS)


def test_a_list_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    for format in ("auto", "videos", "kinetics"):
        with pytest.raises(LabelError, match="is not a file but a pipe"):
            read_annotations(tmp_path / "list.txt", LABELS, format=format)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"neither of UCF-101 \(trainlist01\.txt\) nor of HMDB-51"):
        read_annotations(tmp_path, LABELS)


def test_unknown_formats_and_subsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format is 'csv'; it must be one of auto, original"):
        read_annotations(tmp_path, LABELS, format="csv")
    with pytest.raises(ValueError, match="subset is 'val'; it must be train or test"):
        read_annotations(tmp_path, LABELS, subset="val")  # type: ignore[arg-type]


def test_every_class_of_the_distributed_splits_is_found_in_the_label_files(
    shared: Path, tmp_path: Path
) -> None:
    from actionclip_deploy.prompts import read_labels

    for name, own in (("hmdb_51_labels.csv", "mmaction2_hmdb51_label_map.txt"),):
        labels = read_labels(shared / "labels" / name)
        actions = (shared / "labels" / own).read_text().split()
        for action in actions:
            _write(tmp_path, f"{action}_test_split1.txt", "a.avi 1\n")

        samples = read_annotations(tmp_path, labels)

        found = {sample.path.parent.name: sample.label_ids[0] for sample in samples}
        assert sorted(found.values()) == list(range(len(labels)))
        assert all(labels[i].replace(" ", "_") == action for action, i in found.items())


ODD = ("run", "mission 3", "caf\u00e9 dance", "brushing someone's teeth", "drinking, smoking", "3")


@pytest.mark.parametrize(
    ("line", "video", "label"),
    [
        ("my clips/a b.mp4 mission 3", "my clips/a b.mp4", 1),
        ("my clips/a b.mp4   Mission_3\r", "my clips/a b.mp4", 1),
        ("my clips/a b\tmission 3", "my clips/a b", 1),
        ("a.mp4\t\tmission 3", "a.mp4", 1),
        ("a b.mp4,mission 3", "a b.mp4", 1),
        ("a b.mp4 , 1", "a b.mp4", 1),
        ('"a, b.mp4","mission 3"', "a, b.mp4", 1),
        ("a.mp4 drinking, smoking", "a.mp4", 4),
        ("a.mp4,drinking, smoking", "a.mp4", 4),
        ("a, b.mp4 drinking, smoking", "a, b.mp4", 4),
        ("a.mp4 cafe\u0301 dance", "a.mp4", 2),
        ("a.mp4 caf&eacute; dance", "a.mp4", 2),
        ("a.mp4 caf\u00c3\u00a9 dance", "a.mp4", 2),
        ("a.mp4 Cafe\u0301_Dance", "a.mp4", 2),
        ("a.mp4 brushing someone\u2019s teeth", "a.mp4", 3),
        ("a.mp4 \ufeffrun", "a.mp4", 0),
        ("a.mp4 \uff52\uff55\uff4e", "a.mp4", 0),
    ],
)
def test_lines_as_they_are_found_are_read_right(
    tmp_path: Path, line: str, video: str, label: int
) -> None:
    path = _write(tmp_path, "list.txt", f"{line}\n")

    assert read_annotations(path, ODD[:5]) == [Sample(tmp_path / video, (label,))]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        # The end of the path is no part of the label, nor the label's start one of the path.
        ("a b.mp4 mission 4", "the label 'mission 4', which is not one of"),
        ("a.mp4 2 1", "the label '2 1', which is not one of"),
        ("clips/a mission 3", "may be 'mission 3' or the number 3; write a tab"),
        ("a.mp4 3", "is the name of label 5 and the number of label 3 "),
        ("7 run", "a label after its number; expected PATH LABEL"),
        ("c006 run", "a label after its number; expected PATH LABEL"),
        ("a.mp4 99999999999999999999", "which is not one of"),
        ("a.mp4\0 run", "holds a zero byte"),
    ],
)
def test_lines_that_may_be_read_in_two_ways_are_refused(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = _write(tmp_path, "list.txt", f"b.mp4 run\n{line}\n")

    with pytest.raises(LabelError, match=rf"list\.txt line 2 .*{problem}"):
        read_annotations(path, ODD)


def test_a_name_that_two_labels_have_but_for_their_case_names_both(tmp_path: Path) -> None:
    path = _write(tmp_path, "list.txt", "a.mp4 push_up\n")

    with pytest.raises(LabelError, match=r"may be label 0 \('PushUp'\) or label 1 \('push up'\)"):
        read_annotations(path, ("PushUp", "push up"))


@pytest.mark.parametrize(
    ("line", "folder", "frames", "label"),
    [
        ("clips/v1.0 take 300 0", "clips/v1.0 take", 300, 0),
        ("clips/a 30 mission 3", "clips/a", 30, 1),
        ("my clip\t30\tmission 3", "my clip", 30, 1),
        ("my clip 30 2", "my clip", 30, 2),
    ],
)
def test_frame_folders_with_dots_and_labels_with_numbers(
    tmp_path: Path, line: str, folder: str, frames: int, label: int
) -> None:
    path = _write(tmp_path, "list.txt", f"x 4 0\n{line}\n")

    sample = read_annotations(path, ODD[:5])[1]

    assert (sample.path, sample.num_frames) == (tmp_path / folder, frames)
    assert sample.label_ids == (label,)


UCF_LINES = (
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi {}\nApplyLipstick/v_ApplyLipstick_g01_c01.avi {}\n"
)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("labels", [UCF_LABELS, ("apply eye makeup", "apply lipstick", "archery")])
def test_numbers_of_ucf_101_under_another_name_count_from_where_its_folders_say(
    tmp_path: Path, first: int, labels: tuple[str, ...]
) -> None:
    path = _write(tmp_path, "mine.txt", UCF_LINES.format(first, first + 1))

    assert [sample.label_ids for sample in read_annotations(path, labels)] == [(0,), (1,)]


def test_numbers_of_ucf_101_that_may_count_from_both_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.txt", UCF_LINES.format(1, 2))

    with pytest.raises(LabelError, match=r"mine\.txt line 1 .*count from 1 or from 0; .*ucf101"):
        read_annotations(path, ("eyes", "lips", "bow"))
    numbered = read_annotations(path, ("eyes", "lips", "bow"), format="ucf101")
    assert [sample.label_ids for sample in numbered] == [(0,), (1,)]


def test_a_number_that_its_folder_contradicts_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.txt", "yoga/a.mp4 2\nyoga/b.mp4 0\n")

    with pytest.raises(LabelError, match=r"line 2 has the number 0 .*'abseiling'.* 'yoga'"):
        read_annotations(path, LABELS)


def test_a_test_list_of_ucf_101_under_another_name_is_known(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.txt", "ApplyLipstick/v_ApplyLipstick_g01_c01.avi\n")

    assert read_annotations(path, UCF_LABELS)[0].label_ids == (1,)


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (
            "1 ApplyEyeMakeup\n2 ApplyEyeMakeup\n",
            "line 2 gives ApplyEyeMakeup the number 2",
        ),
        ("1 ApplyEyeMakeup\n1 Archery\n", "line 2 gives Archery the number of ApplyEyeMakeup, 1"),
        ("2\tApplyEyeMakeup\n1  ApplyLipstick\n", "the number 1, and classInd.txt the number 2"),
    ],
)
def test_classes_of_ucf_101_that_contradict_are_refused(
    tmp_path: Path, classes: str, problem: str
) -> None:
    _write(tmp_path, "classInd.txt", classes)
    path = _write(tmp_path, "trainlist01.txt", "ApplyEyeMakeup/v_1.avi 1\n")

    with pytest.raises(LabelError, match=problem):
        read_annotations(path, UCF_LABELS)


def test_byte_order_marks_and_windows_ends_of_joined_lists_are_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path, "list.txt", "\ufeffa.mp4 0\r\n\ufeffb.mp4 1\r\n")

    assert read_annotations(path, LABELS) == [
        Sample(tmp_path / "a.mp4", (0,)),
        Sample(tmp_path / "b.mp4", (1,)),
    ]


@pytest.mark.parametrize("template", ["img.jpg", "img_{x}.jpg", "img_{}_{}.jpg", "img_{:q}.jpg"])
def test_a_template_without_the_frames_number_is_refused(tmp_path: Path, template: str) -> None:
    path = _write(tmp_path, "val.txt", "a 3 0\n")
    with pytest.raises(ValueError, match="it must have the number of the frame in it"):
        read_annotations(path, LABELS, image_template=template)


def test_empty_lines_of_a_table_count(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end\n"
    path = _write(tmp_path, "k.csv", f'\n{header}\n"yo\nga",a,0,1\n\nyoga,b,zero,1\n')
    with pytest.raises(LabelError, match=r"k\.csv line 4 has the label 'yo\\nga'"):
        read_annotations(path, LABELS)
    path = _write(tmp_path, "k.csv", f"\n{header}\nyoga,a,0,1\n\nyoga,b,zero,1\n")
    with pytest.raises(LabelError, match=r"k\.csv line 6 has the time_start 'zero'"):
        read_annotations(path, LABELS)


# A folder of videos for each label


FOLDERS = ("abseiling/a.mp4", "arm_wrestling/b.MKV", "arm_wrestling/a.mp4", "Yoga/.hidden.mp4")


def test_the_folder_of_a_video_names_its_label(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in FOLDERS), tmp_path / "Yoga/c.avi")
    _write(tmp_path, "labels.csv", "id,name\n0,abseiling\n")  # which belongs there
    expected = [("Yoga/c.avi", 2), ("abseiling/a.mp4", 0), ("arm_wrestling/a.mp4", 1)]
    expected.append(("arm_wrestling/b.MKV", 1))
    assert detect_format(tmp_path) == "folders"
    samples = read_annotations(tmp_path, LABELS)
    assert samples == [Sample(tmp_path / name, (label,)) for name, label in expected]
    assert read_annotations(tmp_path, LABELS, format="folders", subset="test") == samples


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("apply_eye_makeup", "Apply Eye Makeup"),
        ("apply eye makeup", "apply_eye_makeup"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_names_of_folders_are_found_in_other_forms(tmp_path: Path, folder: str, label: str) -> None:
    _touch(tmp_path / folder / "a.mp4")
    (sample,) = read_annotations(tmp_path, ["other", label])
    assert sample.label_ids == (1,)


def test_folders_that_are_no_label_are_refused_by_name(tmp_path: Path) -> None:
    _touch(*(tmp_path / name / "a.mp4" for name in ("yoga", "skiing", "1", "train")))
    with pytest.raises(LabelError, match=r"videos in '1', 'skiing', 'train', which are not among"):
        read_annotations(tmp_path, LABELS)
    for name in ("1", "train"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    with pytest.raises(LabelError, match=r"'skiing', which is not among the 3 labels \('abse"):
        read_annotations(tmp_path, LABELS)


def test_what_is_no_video_of_a_label_is_left_out_and_named(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in FOLDERS))
    _touch(tmp_path / "stray.mp4", tmp_path / "abseiling/notes.txt", tmp_path / "readme.txt")
    _touch(tmp_path / "abseiling/deep/b.mp4")
    with pytest.warns(AnnotationWarning) as caught:
        samples = read_annotations(tmp_path, LABELS)
    assert len(samples) == 3
    (warning,) = caught
    assert str(warning.message).endswith(
        "left out: 'Yoga/', 'abseiling/deep', 'abseiling/notes.txt', 'stray.mp4'."
    )


def test_a_folder_without_videos_says_what_was_expected(tmp_path: Path) -> None:
    _touch(tmp_path / "yoga" / "frame.jpg")
    with pytest.raises(LabelError, match=r"No folder in .* holds videos.*folder of videos for"):
        read_annotations(tmp_path, LABELS)
    with pytest.raises(LabelError, match="cannot be read"):
        read_annotations(tmp_path / "none", LABELS, format="folders")
    with pytest.raises(LabelError, match="no folder of videos for each label"):
        read_annotations(tmp_path / "yoga", LABELS)
    with pytest.raises(ValueError, match="holds the videos itself; leave it out"):
        read_annotations(tmp_path, LABELS, root=tmp_path)


def test_folders_give_labels_with_blanks_for_underscores(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in FOLDERS))
    assert labels_of_folders(tmp_path) == ("abseiling", "arm wrestling")  # Yoga has no video
    with pytest.raises(LabelError, match="holds videos"):
        labels_of_folders(tmp_path / "Yoga")
