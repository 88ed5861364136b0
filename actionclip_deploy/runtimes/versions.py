"""Comparing versions by the numbers that they begin with."""

from __future__ import annotations

import re


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to be compared.

    `10.3.0` gives (10, 3, 0), `6.1 to 6.2.x` gives (6, 1), `7.2.x` gives (7, 2), and a text that
    begins with no number gives ().
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
