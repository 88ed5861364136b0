from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.motions import MOTIONS, NUM_FRAMES, ORDER_PAIRS
from actionclip_deploy.motions.rendering import Path, draw_path, draw_still
from actionclip_deploy.sampling import sample_segments

NUM_DRAWS = 200
SAMPLED = sample_segments(NUM_FRAMES, 8)
FIELDS = ("x", "y", "radius", "angle", "visible")


def draws(motion: str, num_frames: int = NUM_FRAMES) -> list[Path]:
    times = np.linspace(0, 1, num_frames, dtype=np.float32)
    return [draw_path(motion, times, np.random.default_rng(seed)) for seed in range(NUM_DRAWS)]


@pytest.mark.parametrize(("first", "second"), ORDER_PAIRS)
def test_the_second_of_an_order_pair_is_the_first_played_backwards(first, second):
    for forwards, backwards in zip(draws(first), draws(second), strict=True):
        for field in FIELDS:
            np.testing.assert_allclose(
                getattr(backwards, field), getattr(forwards, field)[::-1], atol=1e-5
            )


@pytest.mark.parametrize(
    ("motion", "field", "sign"),
    [
        ("moving left", "x", -1),
        ("moving right", "x", 1),
        ("moving up", "y", -1),  # y points down
        ("moving down", "y", 1),
        ("growing", "radius", 1),
        ("shrinking", "radius", -1),
        ("turning clockwise", "angle", 1),  # as y points down
        ("turning counterclockwise", "angle", -1),
    ],
)
def test_a_motion_changes_what_it_names_steadily_and_nothing_else(motion, field, sign):
    for path in draws(motion):
        assert (np.diff(getattr(path, field)) * sign > 0).all()
        for other in FIELDS:
            if other != field:
                assert np.ptp(getattr(path, other)) == 0


@pytest.mark.parametrize(("motion", "sign"), [("speeding up", 1), ("slowing down", -1)])
def test_steps_become_longer_when_speeding_up(motion, sign):
    for path in draws(motion):
        steps = np.hypot(np.diff(path.x), np.diff(path.y))
        assert (np.diff(steps) * sign > 0).all()


def test_a_bouncing_object_touches_one_floor_at_least_twice():
    for path in draws("bouncing", num_frames=1000):
        is_touch = (path.y[1:-1] > path.y[:-2]) & (path.y[1:-1] >= path.y[2:])
        floors = path.y[1:-1][is_touch]
        assert len(floors) >= 2
        assert np.ptp(floors) < 0.01


def test_an_orbiting_object_keeps_its_distance_and_goes_round():
    for path in draws("orbiting", num_frames=360):
        steps = np.hypot(np.diff(path.x), np.diff(path.y))
        assert np.ptp(steps) < 1e-4  # even steps on a curve that turns by as much each time
        heading = np.unwrap(np.arctan2(np.diff(path.y), np.diff(path.x)))
        assert abs(heading[-1] - heading[0]) > 0.85 * 2 * np.pi


def test_an_object_that_stands_still_does_nothing():
    for path in draws("standing still"):
        assert all(np.ptp(getattr(path, field)) == 0 for field in FIELDS)
        assert path.visible.all()


def test_eight_sampled_frames_show_a_blinking_object_both_lit_and_dark():
    for path in draws("blinking"):
        assert 2 <= path.visible[SAMPLED].sum() <= 6


def test_sampled_frames_lie_alike_from_either_end():
    np.testing.assert_array_equal(SAMPLED, NUM_FRAMES - 1 - SAMPLED[::-1])


def test_a_turn_of_less_than_half_a_circle_goes_over_the_top():
    for path in draws("turning clockwise"):
        turn = np.degrees(path.angle)
        assert 90 < turn[-1] - turn[0] < 180
        # The mark, upright at 0, is on the left before it is on the right.
        assert np.sin(path.angle[0]) < np.sin(path.angle[-1])
        assert np.abs(turn[[0, -1]]).max() < 150


def test_single_moments_cover_what_motions_show():
    still = [draw_still(np.random.default_rng(seed)) for seed in range(2000)]
    # The ends of the longest ways, where little of the object's place is left to be told.
    slack = {"x": 0.06, "y": 0.06, "radius": 0.005}
    for motion in MOTIONS:
        for path in draws(motion):
            for field, allowed in slack.items():
                values = [getattr(moment, field)[0] for moment in still]
                assert getattr(path, field).min() > min(values) - allowed
                assert getattr(path, field).max() < max(values) + allowed
    assert {float(moment.visible[0]) for moment in still} == {0.0, 1.0}


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_object_stays_in_the_frame(motion):
    # Up to the little that an antialiased edge or a wide orbit may lose.
    for path in draws(motion):
        for centre in (path.x, path.y):
            assert (centre - path.radius).min() > -0.03
            assert (centre + path.radius).max() < 1.03
