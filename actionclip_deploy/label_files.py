"""Label and template files -> texts that know their lines.

What makes a label or a template a good one is checked in `prompts`; here a file is only read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actionclip_deploy.errors import LabelError

_MAX_FILE_BYTES = 16 << 20  # the largest label sets in use stay below 1 MB
_CSV_HEADER = ["id", "name"]


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


def read_label_file(path: Path) -> TextList:
    """Read the labels of a file in any of the formats that `prompts.read_labels` describes.

    Raises:
        LabelError: If the file cannot be read in its format, or its ids have gaps.
    """
    text = _read_text(path, "label")
    kind = _kind_of_file(path, text)
    if kind == "csv":
        return _text_list(path, "label", _csv_entries(path, text))
    if kind == "json":
        return _text_list(path, "label", _json_entries(path, _parse_json(path, text)))
    return _text_list(path, "label", _line_entries(path, text))


def read_template_file(path: Path) -> TextList:
    """Read the templates of a JSON list, or one from each line.

    Raises:
        LabelError: If the file cannot be read in its format.
    """
    text = _read_text(path, "template")
    if path.suffix.lower() != ".json":
        return _text_list(path, "template", _line_entries(path, text))
    data = _parse_json(path, text)
    if not isinstance(data, list):
        raise LabelError(f"{path} is not a JSON list; expected a list of templates.")
    return _text_list(path, "template", _json_entries(path, data))


def _read_text(path: Path, noun: str) -> str:
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_FILE_BYTES else b""
    except OSError as exc:
        raise LabelError(
            f"The {noun} file {path} cannot be read ({exc.strerror}); "
            "check the path and its permissions."
        ) from exc
    if size > _MAX_FILE_BYTES:
        raise LabelError(
            f"{path} has {size} bytes, more than any {noun} file has; give a file of {noun}s."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise LabelError(
            f"{path} line {line} is not UTF-8 (byte {exc.object[exc.start]:#04x}); "
            "save the file as UTF-8."
        ) from exc
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
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return [(f"{path} line {number}", line) for number, line in enumerate(lines, start=1)]


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
    if missing := [number for number in ids if number not in data]:
        raise LabelError(
            f"{path} has no id {missing[0]!r} among its {len(ids)} entries; expected an object "
            "from id to label, its ids counting from 0 without a gap."
        )
    return [(f"{path} id {number}", data[number]) for number in ids]
