from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.motions import COLOURS, SHAPES, MotionLabel, all_labels, render_clip
from actionclip_deploy.motions.rendering import draw_path

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
