from __future__ import annotations

import pytest

from actionclip_deploy.runtimes.machine import version_numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.3.0", (10, 3, 0)),
        ("11.4.0.106", (11, 4, 0, 106)),
        ("6.1 to 6.2.x", (6, 1)),
        ("7.2.x", (7, 2)),
        ("6.2.1+b38", (6, 2, 1)),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_a_version_is_the_numbers_that_it_begins_with(text: str, expected: tuple[int, ...]) -> None:
    assert version_numbers(text) == expected
