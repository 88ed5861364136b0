"""Labels and templates: reading them from files, checking them, and filling prompts.

A label is used as it is written. The original cleans nothing either: "ApplyEyeMakeup" is one word
to it. `split_label` offers the other way for those who want it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from actionclip_deploy.errors import LabelError
from actionclip_deploy.label_files import TextList, read_label_file, read_template_file

TEMPLATES: tuple[str, ...] = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)
"""The original's templates in its order; the paper counts 18, its code has these 16.

Source: sallymmx/ActionCLIP@31c34df utils/Text_Prompt.py.
"""

LABEL_ONLY: tuple[str, ...] = ("{}",)
"""The label without a sentence around it: the paper's "only label", table 3."""

PLACEHOLDER = "{}"


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Read a label file: CSV, plain text or JSON.

    - CSV: header `id,name`, then one row for each label.
    - Plain text: one label on each line.
    - JSON: a list of labels, or an object from id to label such as `{"0": "abseiling"}`.

    The suffix says which one it is (.csv, .txt, .json); under any other suffix, and for a .txt
    with the CSV header, the content does. Text is UTF-8, with or without a byte-order mark; empty
    lines at the end are no labels. The index of a label is its id: ids count from 0 without a
    gap, in a CSV in the order of the rows.

    Args:
        path: The file.

    Returns:
        C labels exactly as written, in a tuple that also knows their lines, so that an error
        which comes up later, such as a prompt that is too long, can name the line.

    Raises:
        LabelError: If the file cannot be read as described, or `check_labels` refuses a label;
            the message names the file and the line.
    """
    return check_labels(read_label_file(Path(path)))


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Read a template file: plain text with one template on each line, or a JSON list.

    Args:
        path: The file; JSON if its suffix is .json, otherwise plain text.

    Returns:
        K templates exactly as written, in a tuple that also knows their lines.

    Raises:
        LabelError: If the file cannot be read as described, or `check_templates` refuses a
            template; the message names the file and the line.
    """
    return check_templates(read_template_file(Path(path)))


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Refuse labels that cannot be told apart or are no text.

    Args:
        labels: C labels.

    Returns:
        The labels, unchanged.

    Raises:
        LabelError: If there are none, or one is not a string, is empty, holds a control character
            (a line break or a tab, for example), or reads to the text encoder like another: it
            sees neither upper case nor the number of spaces.
    """
    checked = _check_texts(labels, "label")
    _refuse_repeats(checked, "label", [" ".join(label.split()).lower() for label in checked])
    return checked


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Refuse templates that have no one place for the label.

    Args:
        templates: K templates.

    Returns:
        The templates, unchanged.

    Raises:
        LabelError: If there are none, or one is not a string, holds a control character, is given
            twice, or has not exactly one `{}`.
    """
    checked = _check_texts(templates, "template")
    for index, template in enumerate(checked):
        if template.count(PLACEHOLDER) != 1:
            raise LabelError(
                f"{describe_text(checked, index, 'template')} has {PLACEHOLDER} "
                f"{template.count(PLACEHOLDER)} times; expected it exactly once, where the label "
                "goes."
            )
    _refuse_repeats(checked, "template", checked)
    return checked


def describe_text(texts: Sequence[str], index: int, noun: str) -> str:
    """Name one label or template for an error message, by its line where it came from a file.

    Args:
        texts: All of them.
        index: Which one, from 0.
        noun: "label" or "template".

    Returns:
        Such as "labels.csv line 3 (label 'archery')" or "label 2 ('archery')", counted from 1.
    """
    text = str(texts[index])
    short = repr(text if len(text) <= 60 else f"{text[:57]}...")
    if isinstance(texts, TextList):
        return f"{texts.places[index]} ({noun} {short})"
    return f"{noun} {index + 1} ({short})"


def fill_prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Fill every template with every label.

    Args:
        labels: C labels.
        templates: K templates with one `{}` each; other braces stay as they are.

    Returns:
        K * C prompts, template-major: prompt k * C + c is template k with label c.

    Source:
        sallymmx/ActionCLIP@31c34df utils/Text_Prompt.py, text_prompt: the order.
    """
    return [template.replace(PLACEHOLDER, label) for template in templates for label in labels]


def split_label(label: str) -> str:
    """Split a label that is written as one word: "ApplyEyeMakeup" gives "apply eye makeup".

    Nothing calls this unasked. The original feeds labels as they are written, and splitting them
    changes its zero-shot results on sets such as UCF-101, where they are written this way.

    Args:
        label: A label in camel case or with underscores; any other is only lower-cased.

    Returns:
        The words in lower case with single spaces between them.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").split()).lower()


def split_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Split every label with `split_label`; labels of a file still know their lines.

    Raises:
        LabelError: If two labels are the same once they are split.
    """
    words = map(split_label, labels)
    return check_labels(
        TextList(words, labels.places) if isinstance(labels, TextList) else tuple(words)
    )


def _check_texts(texts: Sequence[str], noun: str) -> tuple[str, ...]:
    if isinstance(texts, str) or len(texts) == 0:
        raise LabelError(f"The {noun}s are {texts!r}; expected a sequence of at least one {noun}.")
    checked = texts if isinstance(texts, tuple) else tuple(texts)
    for index, text in enumerate(checked):
        where = describe_text(checked, index, noun)
        if not isinstance(text, str):
            raise LabelError(f"{where} is not a string; give every {noun} as a string.")
        if not text.strip():
            raise LabelError(f"{where} is empty; give every {noun} a text, or remove it.")
        if stray := [char for char in text if unicodedata.category(char) in ("Cc", "Cs")]:
            raise LabelError(
                f"{where} holds the control character U+{ord(stray[0]):04X}; write every {noun} "
                "as one line of plain text."
            )
    return checked


def _refuse_repeats(texts: Sequence[str], noun: str, keys: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        if first.setdefault(key, index) != index:
            raise LabelError(
                f"{describe_text(texts, index, noun)} repeats "
                f"{describe_text(texts, first[key], noun)}; give every {noun} once."
            )
