"""Labels and templates: reading them from files, checking them, and filling prompts.

A label is used as it is written. The original cleans nothing either: "ApplyEyeMakeup" is one word
to it. `split_label` offers the other way for those who want it.

Two labels are the same if the text encoder reads the same: `clean_prompt` is that one form, for
files, lists, requests and banks alike.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from actionclip_deploy.errors import LabelError
from actionclip_deploy.files import read_text

_CSV_HEADER = ["id", "name"]

# A label after its number, as in classInd.txt of UCF-101 and, with a letter, in Charades; or before
# it, as in lists made of a dictionary.
_NUMBERED = (
    re.compile(
        r"(?P<letter>c(?=\d{3}\s))?(?P<number>\d{1,5})(?P<gap>[.:)]?\s+|\s*[,;]\s*)(?P<name>\S.*)"
    ),
    re.compile(
        r"(?P<name>.*[^\s,;])(?P<gap>\s+|\s*[,;]\s*)(?P<letter>c(?=\d{3}$))?(?P<number>\d{1,5})"
    ),
)
# Fewer lines that count, such as "1 person" and "2 persons", may be labels as well.
_MIN_NUMBERED = 10
_MOST_LINES = 0.9  # with numbers; the others have lost theirs
_WAYS_OUT = (
    "write the labels without numbers if these are ids, or as CSV with the header id,name if they "
    "are part of the labels."
)

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


class TextList(tuple[str, ...]):
    """Labels or templates that remember where in a file each of them stands.

    It is a tuple of strings and compares as one; the places serve error messages.

    Attributes:
        places: Where each entry stands, such as "labels.csv line 3".
    """

    places: tuple[str, ...]

    def __new__(cls, texts: Iterable[str], places: Iterable[str] = ()) -> TextList:
        """Pair texts with their places; only copies and unpickling leave the places out."""
        self = super().__new__(cls, texts)
        self.places = tuple(places)
        return self


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Read a label file: CSV, plain text or JSON.

    - CSV: header `id,name`, then one row for each label.
    - Plain text: one label on each line; numbers before them that count from 0 or 1 are ids.
    - JSON: a list of labels, or an object from id to label such as `{"0": "abseiling"}`, or from
      label to id.

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
    return check_labels(_read_label_file(Path(path)))


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
    return check_templates(_read_template_file(Path(path)))


def check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Refuse labels that cannot be told apart or are no text.

    Args:
        labels: C labels.

    Returns:
        The labels, unchanged.

    Raises:
        LabelError: If there are none, or one is not a string, is empty, holds a control character
            (a line break or a tab, for example), or reads to the text encoder like another, as
            `clean_prompt` shows: "café" in two Unicode forms, "someone's" with two quotes.
    """
    checked = check_texts(labels, "label")
    _refuse_repeats(checked, "label")
    return checked


def check_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Refuse templates that have no one place for the label.

    Args:
        templates: K templates.

    Returns:
        The templates, unchanged.

    Raises:
        LabelError: If there are none, or one is not a string, holds a control character, is given
            twice, or has not exactly one `{}`.
    """
    checked = check_texts(templates, "template")
    for index, template in enumerate(checked):
        if template.count(PLACEHOLDER) != 1:
            raise LabelError(
                f"{describe_text(checked, index, 'template')} has {PLACEHOLDER} "
                f"{template.count(PLACEHOLDER)} times; expected it exactly once, where the label "
                "goes."
            )
    _refuse_repeats(checked, "template")
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


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as CLIP does before it looks at words: the form in which texts are compared.

    Source:
        openai/CLIP@d05afc4 clip/simple_tokenizer.py, basic_clean and whitespace_clean.
    """
    return _repair(prompt).lower()


def match_texts(given: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Place among `known` of each text, compared as the text encoder reads them; None for none."""
    places = {clean_prompt(text): place for place, text in enumerate(known)}
    return [places.get(clean_prompt(text)) for text in given]


# ftfy takes some 30 us, and the labels of a bank are looked at by each request.
@lru_cache(maxsize=4096)
def _repair(text: str) -> str:
    """Clean a text but for its case."""
    # Nothing is to be cleaned in plain ASCII, which most labels are, and ftfy's import is a tenth
    # of the package's.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def split_label(label: str) -> str:
    """Split a label that is written as one word: "ApplyEyeMakeup" gives "apply eye makeup".

    Nothing calls this unasked. The original feeds labels as they are written, and splitting them
    changes its zero-shot results on sets such as UCF-101, where they are written this way.

    Args:
        label: A label in camel case or with underscores; any other is only lower-cased.

    Returns:
        The words in lower case with single spaces between them.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", _repair(label))
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


def check_texts(texts: Iterable[str], noun: str) -> tuple[str, ...]:
    """Refuse texts that are none, or not one line of text each.

    Args:
        texts: One or more.
        noun: What one of them is called in messages.

    Raises:
        LabelError: If there are none, or one is not a string, is empty, or holds a control
            character.
    """
    checked = _as_tuple(texts, noun)
    if not checked:
        raise LabelError(f"The {noun}s are {texts!r}; expected a sequence of at least one {noun}.")
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


def _as_tuple(texts: Iterable[str], noun: str) -> tuple[str, ...]:
    if isinstance(texts, tuple):
        return texts
    # Of a set nobody knows the order, which gives the ids; of a mapping, which side is meant.
    if not isinstance(texts, str | bytes | Mapping | Set):
        with suppress(TypeError):  # no iterable, or an array without dimensions
            return tuple(texts)
    given = repr(texts)
    given = given if len(given) <= 60 else f"{given[:57]}..."
    kind = "" if isinstance(texts, str) else f" ({type(texts).__name__})"
    raise LabelError(
        f"The {noun}s are {given}{kind}; expected a sequence of at least one {noun}, such as a "
        "list of strings."
    )


def _refuse_repeats(texts: Sequence[str], noun: str) -> None:
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        key = clean_prompt(text)
        if not key:
            raise LabelError(
                f"{describe_text(texts, index, noun)} is empty to the text encoder, which leaves "
                f"out characters without a shape; give every {noun} a text, or remove it."
            )
        if (other := first.setdefault(key, index)) != index:
            seen = "" if text == texts[other] else f"; the text encoder reads both as {key!r}"
            raise LabelError(
                f"{describe_text(texts, index, noun)} repeats "
                f"{describe_text(texts, other, noun)}{seen}. Give every {noun} once."
            )


# Below, files become texts that know their lines; what makes a good label is decided above.


def _read_label_file(path: Path) -> TextList:
    text = _read_text(path, "label")
    kind = _kind_of_file(path, text)
    if kind == "csv":
        return _text_list(path, "label", _csv_entries(path, text))
    if kind == "json":
        return _text_list(path, "label", _json_entries(path, _parse_json(path, text)))
    return _text_list(path, "label", _without_numbers(_line_entries(path, text)))


def _read_template_file(path: Path) -> TextList:
    text = _read_text(path, "template")
    if path.suffix.lower() != ".json":
        return _text_list(path, "template", _line_entries(path, text))
    data = _parse_json(path, text)
    if not isinstance(data, list):
        raise LabelError(f"{path} is not a JSON list; expected a list of templates.")
    return _text_list(path, "template", _json_entries(path, data))


def _read_text(path: Path, noun: str) -> str:
    text = read_text(path, f"{noun} file", LabelError)
    if not text.strip():
        raise LabelError(f"The {noun} file {path} is empty; expected at least one {noun}.")
    return text


def _kind_of_file(path: Path, text: str) -> str:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".json"):
        return suffix[1:]
    if text.splitlines()[0].replace('"', "").split(",") == _CSV_HEADER:
        return "csv"
    return "json" if suffix != ".txt" and text.lstrip()[0] in "[{" else "text"


def _text_list(path: Path, noun: str, entries: list[tuple[str, str]]) -> TextList:
    """Pair (place, text) entries up; a file that has none is refused."""
    if not entries:
        raise LabelError(f"The {noun} file {path} is empty; expected at least one {noun}.")
    return TextList((text for _, text in entries), (place for place, _ in entries))


def _line_entries(path: Path, text: str) -> list[tuple[str, str]]:
    # Not splitlines(), which would break a line at characters such as U+2028 as well.
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return [(f"{path} line {number}", line) for number, line in enumerate(lines, start=1)]


def _without_numbers(entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Take the numbers off lines such as "12 Biking" or "c011 Closing a box", and sort by them.

    Only numbers that count are ids: "100 metres" and "200 metres" are labels, and so are "take 1"
    and "take 2", which nothing else tells apart.

    Raises:
        LabelError: If numbers look like ids, and some are missing or given twice; or if too few
            lines have them to be sure.
    """
    for form in _NUMBERED:
        found = [form.fullmatch(text) for _, text in entries]
        lines = [match for match in found if match]
        numbers = [int(match["number"]) for match in lines]
        if len(lines) < max(1, _MOST_LINES * len(found)) or _repeated(
            [clean_prompt(match["name"]) for match in lines]
        ):
            continue
        are_many = len(lines) >= _MIN_NUMBERED
        are_ids = any(match["letter"] or "\t" in match["gap"] for match in lines)
        if len(lines) < len(found):
            if are_many and not _repeated(numbers):
                place, text = entries[found.index(None)]
                raise LabelError(f"{place} ({text!r}) has no number as the others; {_WAYS_OUT}")
            continue
        first = min(numbers)
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        if first <= 1 and [numbers[index] for index in order] == [
            first + index for index in range(len(order))
        ]:
            if are_many or are_ids:
                return [(entries[index][0], lines[index]["name"]) for index in order]
            raise LabelError(f"{entries[0][0]} and the others have numbers that count; {_WAYS_OUT}")
        repeated = _repeated(numbers)
        if repeated and are_many and max(numbers) - first + 1 == len(set(numbers)):
            raise LabelError(
                f"{entries[repeated[0]][0]} has the number {numbers[repeated[0]]} again; give each "
                "label a number of its own, or none."
            )
        if any(match["letter"] for match in lines) or (are_many and not repeated):
            wanted = next(number for number in range(first > 0, 100_000) if number not in numbers)
            raise LabelError(
                f"{entries[order[-1]][0]} has the number {max(numbers)}, and none has the number "
                f"{wanted}; {_WAYS_OUT}"
            )
    return entries


def _repeated(values: Sequence[object]) -> list[int]:
    """Places of the values that were there before."""
    seen: set[object] = set()
    places = []
    for place, value in enumerate(values):
        if value in seen:
            places.append(place)
        seen.add(value)
    return places


def _csv_entries(path: Path, text: str) -> list[tuple[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    entries: list[tuple[str, str]] = []
    try:
        header = next(reader)
        if [field.strip() for field in header] != _CSV_HEADER:
            raise LabelError(f"{path} line 1 is {','.join(header)!r}; expected the header id,name.")
        line = reader.line_num + 1  # where a row begins: a quoted name may go over several lines
        for row in reader:
            if row:
                entries.append(
                    (f"{path} line {line}", _csv_name(f"{path} line {line}", row, len(entries)))
                )
            line = reader.line_num + 1
    except csv.Error as exc:
        raise LabelError(
            f"{path} line {reader.line_num} is not CSV ({exc}); close every quotation mark and "
            "write one inside of a name twice."
        ) from exc
    return entries


def _csv_name(place: str, row: list[str], expected_id: int) -> str:
    if len(row) != len(_CSV_HEADER):
        raise LabelError(
            f"{place} has {len(row)} fields; expected an id and a name, with quotation marks "
            "around a name that holds a comma."
        )
    if row[0].strip() != str(expected_id):
        raise LabelError(
            f"{place} has the id {row[0]!r}; expected {expected_id}: ids count from 0 in the order "
            "of the rows, because a score is found by its index."
        )
    return row[1]


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as exc:
        raise LabelError(f"{path} cannot be read as JSON ({exc}); correct it.") from exc


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("an object has the same key twice")
    return dict(pairs)


def _json_entries(path: Path, data: Any) -> list[tuple[str, str]]:
    if isinstance(data, list):
        return [(f"{path} entry {number}", text) for number, text in enumerate(data, start=1)]
    if not isinstance(data, dict):
        raise LabelError(
            f"{path} holds neither a JSON list of labels nor an object from id to label; "
            "write one of the two."
        )
    ids = [str(number) for number in range(len(data))]
    if sorted(map(str, data.values())) == sorted(ids) and "0" not in data:
        # From label to id, as Something-Something's labels.json.
        by_id = {str(number): label for label, number in data.items()}
        return [(f"{path} id {number}", by_id[number]) for number in ids]
    if missing := [number for number in ids if number not in data]:
        raise LabelError(
            f"{path} has no id {missing[0]!r} among its {len(ids)} entries; expected an object "
            "from id to label, its ids counting from 0 without a gap."
        )
    return [(f"{path} id {number}", data[number]) for number in ids]
