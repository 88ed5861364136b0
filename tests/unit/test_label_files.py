from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest

from actionclip_deploy.errors import LabelError
from actionclip_deploy.prompts import (
    check_labels,
    clean_prompt,
    describe_text,
    read_labels,
    read_templates,
)

NAMES = ("brush hair", "pull-up", "say 'hi'")

# Counted by hand or published with the set; the files hold as many labels as their data set.
NUM_LABELS = {
    "activitynet_1.3_labels.csv": 200,
    "charades_v1_classes.txt": 157,
    "hmdb_51_labels.csv": 51,
    "k400-index2cls.json": 400,
    "k600_zeroshot160_split1.csv": 160,
    "k600_zeroshot160_split2.csv": 160,
    "k600_zeroshot160_split3.csv": 160,
    "kinetics_400_alpha.txt": 400,
    "kinetics_400_labels.csv": 400,
    "kinetics_600_labels.csv": 600,
    "mmaction2_hmdb51_label_map.txt": 51,
    "mmaction2_kinetics_label_map_k400.txt": 400,
    "mmaction2_kinetics_label_map_k600.txt": 600,
    "mmaction2_kinetics_label_map_k700.txt": 700,
    "mmaction2_mit_label_map.txt": 339,
    "mmaction2_sthv2_label_map.txt": 174,
    "mmaction2_ucf101_label_map.txt": 101,
    "ssv2_labels.csv": 174,
    "ucf_101_labels.csv": 101,
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(LabelError) as caught:
        read_labels(path)
    return str(caught.value)


def test_every_public_label_file_loads_with_the_count_of_its_data_set(shared: Path) -> None:
    counts = {path.name: len(read_labels(path)) for path in (shared / "labels").iterdir()}
    assert counts == NUM_LABELS


def test_public_files_of_the_same_set_agree(shared: Path) -> None:
    folder = shared / "labels"
    assert (
        read_labels(folder / "kinetics_400_labels.csv")
        == read_labels(folder / "k400-index2cls.json")
        == read_labels(folder / "mmaction2_kinetics_label_map_k400.txt")
    )


def test_our_copy_of_the_kinetics_400_names_equals_the_published_list(
    shared: Path, kinetics_400: tuple[str, ...]
) -> None:
    assert kinetics_400 == read_labels(shared / "labels" / "kinetics_400_labels.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", "id,name\n0,brush hair\n1,pull-up\n2,say 'hi'\n"),
        ("labels.csv", "id,name\r\n0,brush hair\r\n1,pull-up\r\n2,say 'hi'"),
        ("labels.csv", '"id","name"\n0,"brush hair"\n1,"pull-up"\n2,"say \'hi\'"\n\n'),
        ("labels.CSV", "\ufeffid,name\n0,brush hair\n1,pull-up\n2,say 'hi'\n"),
        ("labels.txt", "id,name\n0,brush hair\n1,pull-up\n2,say 'hi'\n"),
        ("labels", '"id","name"\n0,brush hair\n1,pull-up\n2,say \'hi\'\n'),
        ("labels.txt", "brush hair\npull-up\nsay 'hi'"),
        ("labels.txt", "\ufeffbrush hair\r\npull-up\r\nsay 'hi'\r\n\r\n"),
        ("labels.txt", "brush hair\rpull-up\rsay 'hi'\r"),
        ("labels.list", "brush hair\npull-up\nsay 'hi'\n"),
        ("labels.json", '["brush hair", "pull-up", "say \'hi\'"]'),
        ("labels.json", '\ufeff{"0": "brush hair", "1": "pull-up", "2": "say \'hi\'"}'),
        ("labels", '{"2": "say \'hi\'", "1": "pull-up", "0": "brush hair"}'),
    ],
)
def test_each_format_gives_the_labels_in_the_order_of_their_ids(
    tmp_path: Path, name: str, content: str
) -> None:
    assert read_labels(write(tmp_path, name, content)) == NAMES


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ('0,"Lunge, forward"', "Lunge, forward"),
        ('0,"the ""moon walk"""', 'the "moon walk"'),
        ("0,  ApplyEye_Makeup ", "  ApplyEye_Makeup "),
        ("0,跳远 élan 🏃", "跳远 élan 🏃"),
    ],
)
def test_a_csv_name_is_taken_as_it_is_written(tmp_path: Path, row: str, label: str) -> None:
    assert read_labels(write(tmp_path, "labels.csv", f"id,name\n{row}\n")) == (label,)


def test_a_line_of_text_is_taken_as_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "labels.txt", "c000 Holding, clothes \n[unknown]\n{other}\u2028x\n")
    assert read_labels(path) == ("c000 Holding, clothes ", "[unknown]", "{other}\u2028x")


@pytest.mark.parametrize(
    ("name", "content", "where", "why"),
    [
        ("a.csv", "id,label\n0,run\n", "line 1", "expected the header id,name"),
        ("a.csv", "0,run\n1,jump\n", "line 1", "expected the header id,name"),
        ("a.csv", "id;name\n0;run\n", "line 1", "expected the header id,name"),
        ("a.csv", "id,name\n1,run\n2,jump\n", "line 2", "has the id '1'; expected 0"),
        ("a.csv", "id,name\n0,run\n\n2,jump\n", "line 4", "has the id '2'; expected 1"),
        ("a.csv", "id,name\n0,run\n0,jump\n", "line 3", "has the id '0'; expected 1"),
        ("a.csv", "id,name\n0,run\nx,jump\n", "line 3", "has the id 'x'; expected 1"),
        ("a.csv", "id,name\n0,run, fast\n", "line 2", "has 3 fields"),
        ("a.csv", "id,name\n0\n", "line 2", "has 1 fields"),
        ("a.csv", 'id,name\n0,"run\n', "line 2", "close every quotation mark"),
        ("a.csv", "id,name\n0,run\n1,\n", "line 3", "is empty"),
        ("a.csv", 'id,name\n0,"a\nb"\n1,run\n', "line 2", "control character U+000A"),
        ("a.csv", "id,name\n0,run\n1,jump\n2,run\n", "line 4", "repeats"),
        ("a.txt", "run\njump\nrun\n", "line 3", "repeats"),
        ("a.txt", "run\n\njump\n", "line 2", "is empty"),
        ("a.txt", "run\n   \njump\n", "line 2", "is empty"),
        ("a.txt", "0\trun\n7\tjump\n", "line 1", "control character U+0009"),
        ("a.txt", "ru\0n\n", "line 1", "holds a zero byte"),
        ("a.csv", b"id,name\r0,run\r1,l\xe9ap\r", "line 3", "not UTF-8 (byte 0xe9)"),
        ("a.txt", b"run\nl\xe9ap\n", "line 2", "not UTF-8 (byte 0xe9)"),
        ("a.txt", b"\xef\xbb\xbfrun\njump\nl\xe9ap\n", "line 3", "not UTF-8 (byte 0xe9)"),
        ("a.txt", "run".encode("utf-16"), "a.txt", "is UTF-16LE, and not UTF-8; save it as UTF-8"),
        ("a.json", '["run", "jump", "run"]', "entry 3", "repeats"),
        ("a.json", '["run", ""]', "entry 2", "is empty"),
        ("a.json", '["run", 7]', "entry 2", "is not a string"),
        ("a.json", '["run", null]', "entry 2", "is not a string"),
        ("a.json", '["\\ud83d run"]', "entry 1", "control character U+D83D"),
        ("a.json", '{"0": "run", "1": ""}', "id 1", "is empty"),
        ("a.json", '{"0": "run", "2": "jump"}', "a.json", "has no id '1' among its 2 entries"),
        ("a.json", '{"run": 0, "jump": 2}', "a.json", "has no id '0'"),
        ("a.json", '{"0": "run", "0": "jump"}', "a.json", "the same key twice"),
        ("a.json", '"run"', "a.json", "neither a JSON list"),
        ("a.json", '["run",', "a.json", "cannot be read as JSON"),
        ("a.json", "[" * 100_000, "a.json", "cannot be read as JSON"),
        ("a.json", "[]", "a.json", "is empty"),
        ("a.csv", "id,name\n", "a.csv", "is empty"),
        ("a.txt", "", "a.txt", "is empty"),
        ("a.txt", " \r\n\n", "a.txt", "is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_line(
    tmp_path: Path, name: str, content: str | bytes, where: str, why: str
) -> None:
    path = write(tmp_path, name, content)
    message = refusal(path)
    assert str(path) in message
    assert where in message
    assert why in message


def test_a_repeated_label_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "run\njump\nrun\n")
    assert refusal(path).startswith(f"{path} line 3 (label 'run') repeats {path} line 1 (label")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.txt")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.txt")
    assert "labels.txt is not a file but a pipe" in refusal(tmp_path / "labels.txt")
    with pytest.raises(LabelError, match=r"labels\.txt is not a file but a pipe"):
        read_templates(tmp_path / "labels.txt")


def test_templates_of_another_encoding_are_told_as_labels_are(tmp_path: Path) -> None:
    path = write(tmp_path, "t.txt", "a video of {}\n".encode("utf-32"))
    with pytest.raises(LabelError, match="is UTF-32LE, and not UTF-8; save it as UTF-8"):
        read_templates(path)
    path = write(tmp_path, "t.txt", b"a video of {}\rl\xe9ap {}\r")
    with pytest.raises(LabelError, match=r"t\.txt line 2 is not UTF-8 \(byte 0xe9\)"):
        read_templates(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "run\n")
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_a_file_too_large_for_labels_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path, "video.mp4", "")
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert "and so many has no label file" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("templates.txt", "a video of {}\r\n{}, filmed\r\n"),
        ("templates", "a video of {}\n{}, filmed"),
        ("templates.json", json.dumps(["a video of {}", "{}, filmed"])),
    ],
)
def test_templates_are_read_from_text_and_json(tmp_path: Path, name: str, content: str) -> None:
    assert read_templates(write(tmp_path, name, content)) == ("a video of {}", "{}, filmed")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.txt", "a {}\na video\n", "t.txt line 2 .*has {} 0 times"),
        ("t.txt", "{} and {}\n", "t.txt line 1 .*has {} 2 times"),
        ("t.txt", "a {}\n\nb {}\n", "t.txt line 2 .*is empty"),
        ("t.txt", "a {}\na {}\n", "t.txt line 2 .*repeats"),
        ("t.txt", "", "template file .*t.txt is empty"),
        ("t.json", '{"0": "a {}"}', "expected a list of templates"),
        ("t.json", '["a {}", 3]', "t.json entry 2 .*is not a string"),
    ],
)
def test_a_template_file_that_cannot_be_used_is_refused_by_line(
    tmp_path: Path, name: str, content: str, match: str
) -> None:
    with pytest.raises(LabelError, match=match):
        read_templates(write(tmp_path, name, content))


def test_labels_of_a_file_still_know_their_lines_after_a_copy(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, "a.csv", "id,name\n0,run\n1,jump\n"))
    for copied in (labels, copy.deepcopy(labels), pickle.loads(pickle.dumps(labels))):
        assert copied == ("run", "jump")
        assert describe_text(copied, 1, "label").endswith("a.csv line 3 (label 'jump')")


ALIKE = {
    "quotes": ("brushing someone's teeth", "brushing someone\u2019s teeth"),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "full width": ("\uff21\uff22\uff23 run", "abc run"),
    "ligature": ("\ufb01re fighting", "fire fighting"),
    "mojibake": ("caf\u00c3\u00a9", "caf\u00e9"),
    "entities": ("rock &amp; roll", "rock & roll"),
    "entities twice": ("rock &amp;amp; roll", "rock & roll"),
    "spaces": ("jump  rope", "Jump rope"),
    "byte order mark": ("jump\ufeff rope", "jump rope"),
    "soft hyphen and other blanks": ("jump\u00a0rope", "jump rope"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_labels_that_the_text_encoder_reads_alike_are_refused(kind: str, tmp_path: Path) -> None:
    first, second = ALIKE[kind]
    message = refusal(write(tmp_path, "labels.txt", f"run\n{first}\n{second}\n"))
    assert "labels.txt line 3" in message
    assert "labels.txt line 2" in message
    with pytest.raises(LabelError, match=r"label 2 .* repeats label 1"):
        check_labels([first, second])


@pytest.mark.parametrize("name", ["full.txt", "lig.txt", "mojibake.txt", "nfd.txt", "quotes.txt"])
def test_reported_pairs_of_labels_are_refused(shared: Path, name: str) -> None:
    assert "line 2" in refusal(shared / "cases" / "labels" / name)


def test_a_label_of_nothing_that_has_a_shape_is_refused() -> None:
    with pytest.raises(LabelError, match=r"label 2 .* empty to the text encoder"):
        check_labels(["run", "\ufeff"])


def test_plain_ascii_is_cleaned_as_by_the_library() -> None:
    import ftfy

    texts = ["a  b", " Run ", "x<y", 'say "hi"', "100%", "a`b", "...", "-- a", "a/b\\c", "~^_{}[]|"]
    for text in texts:
        assert clean_prompt(text) == " ".join(ftfy.fix_text(text).split()).lower()


def numbered(names: list[str], first: int, form: str = "{} {}") -> str:
    return "\n".join(form.format(number, name) for number, name in enumerate(names, first)) + "\n"


TWELVE = [f"Sport{letter}" for letter in "abcdefghijkl"]


@pytest.mark.parametrize(
    "content",
    [
        numbered(TWELVE, 1),
        numbered(TWELVE, 0),
        numbered(TWELVE, 1).replace("\n", "\r\n"),
        numbered(TWELVE, 1, "{}\t{}"),
        numbered(TWELVE, 0, "c{:03d} {}"),
        "\n".join(reversed(numbered(TWELVE, 1).splitlines())),
        numbered(TWELVE, 1, "{}. {}"),
        numbered(TWELVE, 1, "{},{}"),
        numbered(TWELVE, 1, "{}    {}"),
        "".join(f"{name} {number}\n" for number, name in enumerate(TWELVE)),
        "".join(f"{name}, {number}\n" for number, name in enumerate(TWELVE, 1)),
    ],
    ids=[
        *("from 1", "from 0", "Windows", "tabs", "Charades", "in another order", "points"),
        *("commas", "blanks", "after", "after commas"),
    ],
)
def test_numbers_before_labels_are_their_ids(tmp_path: Path, content: str) -> None:
    assert read_labels(write(tmp_path, "classInd.txt", content)) == tuple(TWELVE)


def test_a_tab_after_the_number_leaves_no_doubt(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "a.txt", "0\trun\n1\tjump\n")) == ("run", "jump")


def test_charades_classes_have_no_numbers(shared: Path) -> None:
    labels = read_labels(shared / "labels" / "charades_v1_classes.txt")
    assert labels[0] == "Holding some clothes"
    assert not any(label.startswith("c1") for label in labels)


@pytest.mark.parametrize(
    "lines",
    [
        ["100 metres", "200 metres", "400 metres"],
        ["1 person walks", "people run"],
        ["3 pointer", "2 pointer", "a dunk"],
        ["take 1", "take 2", "take 3"],
        [f"level {number}" for number in range(1, 13)],
        ["mission 3", "run", "jump"],
    ],
)
def test_numbers_that_do_not_count_are_part_of_the_label(tmp_path: Path, lines: list[str]) -> None:
    assert read_labels(write(tmp_path, "labels.txt", "\n".join(lines))) == tuple(lines)


def test_few_labels_with_numbers_that_count_are_not_guessed_at(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "labels.txt", "1 person\n2 persons\n"))
    assert "labels.txt line 1" in message
    assert "id,name" in message


def test_a_number_that_two_labels_have_is_refused(tmp_path: Path) -> None:
    lines = numbered(TWELVE, 1) + "5 Again\n"
    assert "line 13 has the number 5 again" in refusal(write(tmp_path, "labels.txt", lines))


def test_an_object_from_label_to_id_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "labels.json", '{"throw": "1", "catch": "0", "hold": 2}')
    assert read_labels(path) == ("catch", "throw", "hold")


def test_byte_order_marks_of_joined_files_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "labels.txt", "\ufeffrun\n\ufeffjump\n")
    assert read_labels(path) == ("run", "jump")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (numbered(TWELVE, 1).replace("5 Sporte\n", ""), "line 11 .* none has the number 5"),
        (numbered(TWELVE, 1).replace("5 Sporte", "Sporte"), r"line 5 \('Sporte'\) has no number"),
        (numbered(TWELVE, 17), "line 12 has the number 28, and none has the number 1"),
        ("c003 run\nc007 jump\n", "line 2 has the number 7, and none has the number 1"),
        ("run 0\njump 1\n", "line 1 and the others have numbers that count"),
    ],
    ids=["gap", "a line without", "from 17", "part of Charades", "few"],
)
def test_numbers_that_are_nearly_ids_are_refused(tmp_path: Path, lines: str, problem: str) -> None:
    with pytest.raises(LabelError, match=rf"labels\.txt {problem}.*id,name"):
        read_labels(write(tmp_path, "labels.txt", lines))
