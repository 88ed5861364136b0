"""From the labels in an annotation file to ids."""

from __future__ import annotations

from collections.abc import Sequence

from actionclip_deploy.errors import LabelError
from actionclip_deploy.prompts import split_label


class LabelIds:
    """Finds ids by number or by name.

    Args:
        labels: C labels; the index of a label is its id.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._exact = {label: number for number, label in enumerate(labels)}
        self._folded: dict[str, int | None] = {}
        for number, label in enumerate(labels):
            key = split_label(label)
            # None where labels differ in nothing but case and word breaks.
            self._folded[key] = None if key in self._folded else number

    def find(self, text: str) -> int | None:
        """Id of a label by its name, written exactly so or with other case and word breaks."""
        exact = self._exact.get(text)
        return exact if exact is not None else self._folded.get(split_label(text))

    def parse(self, text: str, place: str) -> int:
        """Id of a label given as a number or as a name.

        Args:
            text: Such as "17" or "arm wrestling"; digits alone are a number.
            place: Where it stands, such as "train.txt line 3".

        Raises:
            LabelError: If there is no such label.
        """
        if text.isdecimal():
            return self.number(int(text), place)
        found = self.find(text)
        if found is None:
            raise LabelError(
                f"{place} has the label {text!r}, which is none of the {len(self._labels)} labels "
                f"({self._labels[0]!r}, ...); give the label file that belongs to this list."
            )
        return found

    def number(self, number: int, place: str, *, first: int = 0) -> int:
        """Id of a label given as a number.

        Args:
            number: The number.
            place: Where it stands.
            first: Number of the first label.

        Raises:
            LabelError: If there is no such label.
        """
        if not 0 <= number - first < len(self._labels):
            raise LabelError(
                f"{place} has the label {number}, and the {len(self._labels)} labels have the "
                f"numbers {first} to {len(self._labels) - 1 + first}; give the label file that "
                "belongs to this list."
            )
        return number - first

    def name(self, label_id: int) -> str:
        """The label of an id."""
        return self._labels[label_id]
