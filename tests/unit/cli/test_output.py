"""What the verbs print for people."""

from __future__ import annotations

import pytest

from actionclip_deploy.cli.output import tell_apart

LONG = "a_very_long_name_of_a_camera_in_the_hall_of_the_building"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/a.mp4"], ["a.mp4"]),
        (["x/a.mp4", "y/b.mp4"], ["a.mp4", "b.mp4"]),
        (["x/a.mp4", "y/a.mp4", "x/b.mp4"], ["x/a.mp4", "y/a.mp4", "b.mp4"]),
        (["x/s/a.mp4", "y/s/a.mp4"], ["x/s/a.mp4", "y/s/a.mp4"]),
        (["a.mp4", "y/a.mp4"], ["a.mp4", "y/a.mp4"]),
        (["/a.mp4", "a.mp4"], ["/a.mp4", "a.mp4"]),
        (["a\x1b[1m.mp4"], [r"a\x1b[1m.mp4"]),
        ([f"{LONG}.mp4"], ["a_very_long_n…e_building.mp4"]),
    ],
)
def test_equal_names_are_told_apart_by_their_folders(paths: list[str], expected: list[str]) -> None:
    named = tell_apart(paths, width=len("a_very_long_n…e_building.mp4"))
    assert [named[path] for path in paths] == expected


@pytest.mark.parametrize(
    "paths",
    [
        [f"{LONG}_{number:03}_{LONG}.mp4" for number in range(120)],
        [f"{number}/{LONG}/{LONG}/clip.mp4" for number in range(12)],
        [f"{LONG}/{number}/{LONG}/clip.mp4" for number in range(12)],
    ],
)
def test_long_names_are_cut_and_still_differ(paths: list[str]) -> None:
    named = tell_apart(paths, width=30)
    assert len(set(named.values())) == len(paths)
    assert all(len(name) <= 30 for name in named.values())


def test_names_that_no_cut_tells_apart_are_whole() -> None:
    paths = [f"{LONG}/{a}{LONG}{b}/{LONG}/clip.mp4" for a in "xy" for b in "12"]
    whole = {path: path.removeprefix(f"{LONG}/") for path in paths}
    assert tell_apart(paths, width=20) == whole
    paths = [f"{'a' * number}.mp4" for number in range(40, 200)]
    assert len(set(tell_apart(paths, width=20).values())) == len(paths)


def test_the_same_path_twice_has_one_name() -> None:
    assert tell_apart(["x/a.mp4", "x/a.mp4"], width=20) == {"x/a.mp4": "a.mp4"}
