from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.motions import (
    COLOURS,
    MOTIONS,
    NUM_FRAMES,
    ORDER_PAIRS,
    SHAPES,
    EndlessMotions,
    MotionLabel,
    all_labels,
    render_clip,
)
from actionclip_deploy.motions.rendering import (
    NOTHING,
    Path,
    all_captions,
    describe_moment,
    draw_path,
    draw_still,
    render_picture,
)
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


STILL = MotionLabel("square", "red", "standing still")
# What the names mean to a reader: which of red, green and blue are strong.
STRONG_CHANNELS = {
    "red": (1, 0, 0),
    "orange": (1, 0.5, 0),
    "yellow": (1, 1, 0),
    "green": (0, 1, 0),
    "cyan": (0, 1, 1),
    "blue": (0, 0, 1),
    "purple": (0.5, 0, 1),
    "white": (1, 1, 1),
}


# Where marks lie, in radii; the upper edge of a moon is bitten off.
MARKS = {"moon": (-0.64, 0.0)}


def redness(frames):
    pixels = frames.astype(float)
    return np.clip(pixels[..., 0] - pixels[..., 1:].max(-1) - 60, 0, None)  # (F, H, W)


def test_frames_are_rgb_of_the_size_asked_for():
    frames = render_clip(STILL, seed=0, num_frames=5, size=48)
    assert frames.shape == (5, 48, 48, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


def test_the_same_seed_gives_the_same_frames_and_another_others():
    first, again = render_clip(STILL, seed=7), render_clip(STILL, seed=7)
    np.testing.assert_array_equal(first, again)
    assert (render_clip(STILL, seed=8) != first).any()


@pytest.mark.parametrize("seed", range(10))
def test_a_frame_is_the_same_whichever_others_are_rendered(seed):
    label = all_labels()[seed * 80]
    whole = render_clip(label, seed=seed, size=32)
    part = render_clip(label, seed=seed, size=32, frame_indices=[22, 3, 3])
    np.testing.assert_array_equal(part, whole[[22, 3, 3]])


@pytest.mark.parametrize("label", all_labels()[::37], ids=str)
def test_every_kind_of_label_can_be_rendered(label):
    frames = render_clip(label, seed=1, size=48)
    assert frames.std() > 5


@pytest.mark.parametrize("colour", COLOURS)
def test_the_object_has_the_colour_of_its_label(colour):
    for seed in range(10):
        label = MotionLabel("square", colour, "standing still")
        frame = render_clip(label, seed=seed, frame_indices=[0])[0].reshape(-1, 3).astype(float)
        # The object is the brightest thing there is.
        brightest = frame[frame.max(-1) >= np.quantile(frame.max(-1), 0.97)].mean(0)
        expected = np.array(STRONG_CHANNELS[colour])
        distances = {
            other: np.linalg.norm(brightest / brightest.max() - strong)
            for other, strong in STRONG_CHANNELS.items()
        }
        assert np.linalg.norm(brightest / brightest.max() - expected) == min(distances.values())


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 1, -1), ("moving right", 1, 1), ("moving up", 0, -1), ("moving down", 0, 1)],
)
def test_the_object_moves_where_its_label_says(motion, axis, sign):
    for seed in range(20):
        first, last = redness(render_clip(MotionLabel("circle", "red", motion), seed=seed))[[0, -1]]
        places = [np.argwhere(frame > 0).mean(0) for frame in (first, last)]
        moved = (places[1] - places[0]) / 96
        assert 0.25 < moved[axis] * sign < 0.75
        assert abs(moved[1 - axis]) < 0.15  # the camera drifts


def test_a_clockwise_turn_is_clockwise_on_the_screen():
    # The widest part of a moon is opposite to its bite; its centre of mass points there.
    for seed in range(20):
        label = MotionLabel("moon", "red", "turning clockwise")
        frames = redness(render_clip(label, seed=seed)) > 0
        turns = []
        for frame in frames:
            rows, columns = np.nonzero(frame)
            spread = np.cov(columns, rows)
            turns.append(0.5 * np.arctan2(2 * spread[0, 1], spread[0, 0] - spread[1, 1]))
        # The long axis is known up to half a turn; on a screen y points down, so clockwise is up.
        turn = np.degrees(np.unwrap(turns, period=np.pi))
        assert 90 < turn[-1] - turn[0] < 180


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mark_goes_round_with_an_object_that_turns(shape):
    for seed in range(5):
        label = MotionLabel(shape, "white", "turning clockwise")
        frames = render_clip(label, seed=seed)
        rng = np.random.default_rng(seed)
        path = draw_path(label.motion, np.linspace(0, 1, 24, dtype=np.float32), rng)
        place = path.angle + np.arctan2(*reversed(MARKS.get(shape, (0, -0.6))))
        reach = path.radius * np.hypot(*MARKS.get(shape, (0, -0.6)))
        dark = []
        for frame, x, y, angle, far in zip(frames, path.x, path.y, place, reach, strict=True):
            # The camera drifts by up to 0.05 of the frame's side.
            row, column = (int(96 * (c + far * f(angle))) for c, f in ((y, np.sin), (x, np.cos)))
            near = frame[max(row - 6, 0) : row + 7, max(column - 6, 0) : column + 7]
            dark.append(near.max(-1).min() < 70)
        assert np.mean(dark) > 0.9


def test_shapes_differ_from_each_other():
    frames = [
        render_clip(MotionLabel(shape, "white", "growing"), seed=4, frame_indices=[23])[0] > 200
        for shape in SHAPES
    ]
    for number, first in enumerate(frames):
        for second in frames[:number]:
            union = (first | second).all(-1).sum()
            assert (first ^ second).all(-1).sum() > 0.1 * union


@pytest.mark.parametrize("kind", ["moving left", "growing", "turning clockwise"])
def test_backwards_motions_have_the_same_mean_frame(kind):
    # What is left to tell them apart is order alone.
    backwards = {
        "moving left": "moving right",
        "growing": "shrinking",
        "turning clockwise": "turning counterclockwise",
    }
    sums = []
    for motion in (kind, backwards[kind]):
        label = MotionLabel("square", "red", motion)
        clips = [render_clip(label, seed=seed, size=24).mean(0) for seed in range(300)]
        sums.append(np.mean(clips, axis=0))
    assert np.abs(sums[0] - sums[1]).max() < 3  # of 255; sampling error over 300 clips


def test_a_number_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"num_frames is 1 and size 96"):
        render_clip(STILL, seed=0, num_frames=1)
    with pytest.raises(ValueError, match=r"frame_indices is \[24\].*0 to 23"):
        render_clip(STILL, seed=0, frame_indices=[24])


def test_a_label_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="'walking' is not among"):
        render_clip(MotionLabel("square", "red", "walking"), seed=0)


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


def test_endless_motions_show_one_clip_after_the_other():
    motions = EndlessMotions(seed=5, num_frames=6, size=32)
    frames = np.stack([motions(number) for number in range(18)])
    assert frames.shape == (18, 32, 32, 3)
    labels = [motions.label_of(number) for number in range(18)]
    assert len({str(label) for label in labels[:6]}) == 1
    assert len({str(label) for label in labels}) == 3
    # The same again in any order, and others by another seed.
    assert (EndlessMotions(seed=5, num_frames=6, size=32)(11) == frames[11]).all()
    assert (EndlessMotions(seed=6, num_frames=6, size=32)(11) != frames[11]).any()
