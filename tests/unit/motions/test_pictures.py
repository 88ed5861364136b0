from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.motions.rendering import (
    NOTHING,
    Path,
    all_captions,
    describe_moment,
    render_picture,
)


def moment(**values: float) -> Path:
    fields = {"x": 0.4, "y": 0.4, "radius": 0.2, "angle": 0.0, "visible": 1.0, **values}
    return Path(**{name: np.array([value], np.float32) for name, value in fields.items()})


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({}, {}),
        ({"radius": 0.3, "x": 0.9}, {1: "a huge star", 4: "a star, far right"}),
        ({"radius": 0.1, "y": 0.9}, {1: "a tiny star", 3: "a star, bottom"}),
        ({"angle": np.pi / 2, "y": 0.1}, {2: "a star pointing right", 3: "a star, top"}),
        ({"angle": np.pi + 0.2}, {2: "a star pointing down"}),
        ({"angle": -np.pi / 2, "x": 0.1}, {2: "a star pointing left", 4: "a star, far left"}),
        ({"angle": 2 * np.pi}, {}),
    ],
)
def test_captions_say_colour_size_direction_and_place(values, changed):
    usual = (
        "an orange star",
        "a small star",
        "a star pointing up",
        "a star, upper",
        "a star, left",
    )
    captions = describe_moment("star", "orange", moment(**values))
    assert captions == tuple(changed.get(place, text) for place, text in enumerate(usual))
    assert set(captions) <= set(all_captions())


def test_an_object_that_is_not_seen_is_nothing():
    assert describe_moment("star", "orange", moment(visible=0.0)) == (NOTHING,)


def test_the_mark_is_where_the_caption_points():
    checked = 0
    for seed in range(60):
        frames, path = render_picture("circle", "white", seed=seed)
        captions = describe_moment("circle", "white", path)
        if captions == (NOTHING,) or not (0.3 < path.x[0] < 0.7 and 0.3 < path.y[0] < 0.7):
            continue
        rows, columns = np.indices(frames.shape[1:3])
        right, down = columns - 96 * path.x[0], rows - 96 * path.y[0]
        # Inside of the circle, whatever the camera does, the mark alone is dark.
        inside = np.hypot(right, down) < 0.75 * 96 * path.radius[0]
        dark = (frames[0].max(-1) < 60) & inside
        across, along = {"up": (0, -1), "right": (1, 0), "down": (0, 1), "left": (-1, 0)}[
            captions[2].removeprefix("a circle pointing ")
        ]
        assert (right * across + down * along)[dark].mean() > 0
        checked += 1
    assert checked > 10


def test_captions_are_all_different():
    captions = all_captions()
    assert len(set(captions)) == len(captions) == 8 * (8 + 4 * 4) + 1
