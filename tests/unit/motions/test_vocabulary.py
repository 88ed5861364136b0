from __future__ import annotations

from itertools import product

import pytest

from actionclip_deploy.motions import (
    COLOURS,
    MOTIONS,
    ORDER_PAIRS,
    SHAPES,
    MotionLabel,
    all_labels,
    labels,
)
from actionclip_deploy.motions.vocabulary import check_label


def test_a_label_reads_as_a_phrase():
    assert str(MotionLabel("circle", "red", "moving left")) == "a red circle moving left"
    assert str(MotionLabel("star", "orange", "blinking")) == "an orange star blinking"


def test_every_combination_is_shown_once():
    assert set(all_labels()) == set(product(SHAPES, COLOURS, MOTIONS))
    assert len(all_labels()) == 8 * 8 * 14


def test_a_fifth_of_the_labels_is_held_out_and_no_label_is_in_both():
    train, held_out = set(labels("train")), set(labels("heldout"))
    assert train | held_out == set(all_labels())
    assert not train & held_out
    assert len(held_out) == len(all_labels()) // 5


def test_training_and_test_have_the_same_labels():
    assert labels("test") == labels("train")


def test_any_two_words_of_a_held_out_label_occur_together_in_training():
    train = labels("train")
    for label in labels("heldout"):
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert any(
                seen[first] == label[first] and seen[second] == label[second] for seen in train
            )


def test_order_pairs_name_each_motion_once():
    named = [motion for pair in ORDER_PAIRS for motion in pair]
    assert set(named) <= set(MOTIONS)
    assert len(named) == len(set(named)) == 10


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split is 'val'.*'heldout'"):
        labels("val")


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match=r"'pink' is not among .*'red'"):
        check_label(MotionLabel("circle", "pink", "growing"))
