from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.errors import LabelError
from actionclip_deploy.prompts import (
    LABEL_ONLY,
    TEMPLATES,
    check_labels,
    check_templates,
    describe_text,
    fill_prompts,
    read_labels,
    split_label,
    split_labels,
)


def test_the_original_templates_are_sixteen_and_can_be_used() -> None:
    assert len(TEMPLATES) == 16
    assert check_templates(TEMPLATES) == TEMPLATES
    assert TEMPLATES[7] == LABEL_ONLY[0]


def test_prompts_come_template_by_template() -> None:
    prompts = fill_prompts(("run", "jump", "sit"), ("a {}", "{}!"))
    assert prompts == ["a run", "a jump", "a sit", "run!", "jump!", "sit!"]


@pytest.mark.parametrize("template", ["{0} {}", "{name} {}", "{{ {} }}", "} {} {", "{}%s\\1"])
def test_other_braces_of_a_template_stay_as_they_are(template: str) -> None:
    (checked,) = check_templates([template])
    before, _, after = template.partition("{}")
    assert fill_prompts(("run",), (checked,)) == [f"{before}run{after}"]


def test_braces_of_a_label_stay_as_they_are() -> None:
    assert fill_prompts(("run {}", "\\1 {x}"), ("a {}",)) == ["a run {}", "a \\1 {x}"]


def test_labels_are_returned_unchanged() -> None:
    labels = [" ApplyEyeMakeup", "brush_hair ", "Köln's é"]
    assert check_labels(labels) == tuple(labels)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ("run", "labels are 'run'; expected a sequence"),
        ((), "labels are \\(\\); expected a sequence"),
        (("run", ""), r"label 2 \(''\) is empty"),
        (("run", " \u2003"), r"label 2 .* is empty"),
        (("run", 3), r"label 2 \('3'\) is not a string"),
        (("run", "jump", "run"), r"label 3 \('run'\) repeats label 1 \('run'\)"),
        (("Horse Riding", "horse  riding"), r"label 2 .* repeats label 1"),
        (("a\tb",), r"label 1 .* holds the control character U\+0009"),
        (("x" * 200, ""), r"label 2"),
    ],
)
def test_labels_that_cannot_be_told_apart_or_are_no_text_are_refused(
    labels: tuple[str, ...], match: str
) -> None:
    with pytest.raises(LabelError, match=match):
        check_labels(labels)


@pytest.mark.parametrize(
    ("templates", "match"),
    [
        ("a {}", "templates are 'a {}'; expected a sequence"),
        ((), "expected a sequence of at least one template"),
        (("a {}", "a"), r"template 2 \('a'\) has {} 0 times; expected it exactly once"),
        (("{} {}",), r"template 1 .* has {} 2 times"),
        (("{ }",), r"template 1 .* has {} 0 times"),
        (("a {}", "a {}"), r"template 2 .* repeats template 1"),
        ((None,), r"template 1 .* is not a string"),
    ],
)
def test_templates_without_one_place_for_the_label_are_refused(
    templates: tuple[str, ...], match: str
) -> None:
    with pytest.raises(LabelError, match=match):
        check_templates(templates)


def test_a_long_label_is_shortened_where_it_is_named() -> None:
    named = describe_text(("x" * 200,), 0, "label")
    assert named == f"label 1 ('{'x' * 57}...')"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("TaiChi", "tai chi"),
        ("HandstandPushups", "handstand pushups"),
        ("brush_hair", "brush hair"),
        ("BMX", "bmx"),
        ("BMXRiding", "bmx riding"),
        ("Run100mSprint", "run100m sprint"),
        ("Applying sunscreen", "applying sunscreen"),
        ("air drumming", "air drumming"),
    ],
)
def test_a_label_written_as_one_word_can_be_split(label: str, words: str) -> None:
    assert split_label(label) == words


def test_split_labels_keep_the_lines_that_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("ApplyEyeMakeup\nArchery\n")
    labels = split_labels(read_labels(path))
    assert labels == ("apply eye makeup", "archery")
    assert "line 2" in describe_text(labels, 1, "label")
    assert split_labels(["PlayingGuitar"]) == ("playing guitar",)


def test_labels_that_are_one_once_split_are_refused() -> None:
    with pytest.raises(LabelError, match="apply makeup"):
        split_labels(["ApplyMakeup", "apply_makeup"])
