"""Windows over time: which frames they are made of, what is encoded, and what a timeline says."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest
from hypothesis import given
from hypothesis import strategies as st

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ThresholdWarning, VideoError
from actionclip_deploy.labels import LabelBank, bank_for
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.records import clock_text
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.stream import (
    GridPoint,
    GridSelector,
    Window,
    WindowBuilder,
    WindowGrid,
    encode_windows,
    preparation,
)
from actionclip_deploy.timeline import FileGrid, mean_over_windows, read_timeline
from actionclip_deploy.video import VideoReader
from actionclip_deploy.video.memory import ArrayVideo
from actionclip_deploy.views import FeatureCache, ViewFrames, encode_views

T = 8


class OfTimes:
    """A video of which only the times are known."""

    def __init__(self, seconds: np.ndarray, fps: float) -> None:
        self.pts_seconds = seconds
        self.num_frames = len(seconds)
        self.duration_seconds = float(np.ptp(seconds)) + 1 / fps

    def read_in_order(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices.tolist():
            yield index, np.full((4, 4, 3), index % 256, np.uint8)


def steady(num_frames: int, fps: float, start: float = 0.0) -> OfTimes:
    return OfTimes(start + np.arange(num_frames) / fps, fps)


def frames_by_window(video: OfTimes, grid: WindowGrid) -> dict[float, list[int]]:
    """The frames of each window by its start."""
    found = FileGrid.of(video, grid)
    numbers = {point.number: point.frame for point in found.points if point.run == 0}
    starts = range(0, max(numbers) - grid.num_frames + 2, grid.stride_steps)
    return {
        start * found.grid.step_seconds: [numbers[start + i] for i in range(grid.num_frames)]
        for start in starts
    }


# The grid


@pytest.mark.parametrize("fps", [2, 8, 10, 24, 30, 60, 30000 / 1001])
@pytest.mark.parametrize("start", [0.0, 1.4, 95441.5])
@pytest.mark.parametrize("stride", [1, 3, 8, 11])
def test_windows_take_the_frames_that_the_same_cut_would(
    fps: float, start: float, stride: int
) -> None:
    """Where a grid step is a whole number of frames; W is chosen so that it is."""
    frames_per_step = 1 if fps < 8 else round(fps / 2)
    grid = WindowGrid(T * frames_per_step / fps, T, stride)
    num_frames = 5 * T * frames_per_step + 3
    video = steady(num_frames, fps, start)
    rounded = OfTimes(np.round(video.pts_seconds, 3), fps)  # as Matroska does
    for times in (video, rounded):
        found = frames_by_window(times, grid)
        assert len(found) == (num_frames // frames_per_step - T) // stride + 1
        for number, frames in enumerate(found.values()):
            first = number * stride * frames_per_step
            expected = first + sample_segments(T * frames_per_step, T)
            assert frames == expected.tolist()


@pytest.mark.parametrize("num_frames", [1, 3, 8, 19, 100, 101, 119])
def test_a_video_shorter_than_a_window_is_one_window_of_all(num_frames: int) -> None:
    found = FileGrid.of(steady(num_frames, 30), WindowGrid(4.0, T))
    assert [point.frame for point in found.points] == sample_segments(num_frames, T).tolist()
    assert found.grid.window_seconds == pytest.approx(num_frames / 30)


@pytest.mark.parametrize("fps", [25, 23.976, 15, 50])
def test_elsewhere_frames_are_at_most_neighbours_of_those_of_the_cut(fps: float) -> None:
    grid = WindowGrid(4.0, T)
    found = frames_by_window(steady(int(20 * fps), fps), grid)
    for start, frames in found.items():
        first = int(np.ceil(start * fps - 1e-9))
        cut = first + sample_segments(int(np.ceil((start + 4) * fps - 1e-9)) - first, T)
        assert np.abs(np.array(frames) - cut).max() <= 1
    assert frames_by_window(steady(200, 25), grid)[0.0] == sample_segments(100, T).tolist()


def test_a_frame_stands_until_the_next_one_comes() -> None:
    """A recording of a screen: 1 frame a second, then none for 3 seconds, then 20 a second."""
    seconds = np.concatenate([np.arange(4.0), 7.0 + np.arange(0, 40) / 20])
    points = FileGrid.of(OfTimes(seconds, 20), WindowGrid(4.0, T)).points
    assert {point.run for point in points} == {0}
    by_time = {round((point.number + 0.5) * 0.5, 2): point.frame for point in points}
    assert by_time[3.25] == by_time[5.25] == by_time[6.75] == 3
    assert by_time[7.25] == 4 + 4  # 0.25 s at 20 a second, of which 4.5 are half shown


def test_a_frame_that_comes_too_late_begins_a_new_run() -> None:
    seconds = np.concatenate([np.arange(100) / 10, 1000 + np.arange(100) / 10])
    found = FileGrid.of(OfTimes(seconds, 10), WindowGrid(4.0, T))
    runs = [[p for p in found.points if p.run == run] for run in (0, 1)]
    assert [len(points) for points in runs] == [20, 20]
    assert runs[1][0].start_seconds == 1000
    assert max(point.frame for point in runs[0]) < 100 <= min(point.frame for point in runs[1])


def test_a_clock_that_starts_again_goes_on() -> None:
    seconds = np.concatenate([np.arange(50) / 10, np.arange(50) / 10])
    video = OfTimes(seconds, 10)
    video.duration_seconds = 10.0
    found = FileGrid.of(video, WindowGrid(4.0, T))
    whole = FileGrid.of(steady(100, 10), WindowGrid(4.0, T))
    assert [p.frame for p in found.points] == [p.frame for p in whole.points]


def test_points_between_windows_are_left_out() -> None:
    found = FileGrid.of(steady(1000, 10), WindowGrid(4.0, T, stride_steps=20))
    assert {point.number % 20 for point in found.points} == set(range(T))


@given(
    steps=st.lists(st.floats(0.001, 3.0), min_size=1, max_size=80),
    window=st.floats(0.2, 10),
)
def test_each_point_has_one_frame_and_frames_ascend(steps: list[float], window: float) -> None:
    selector = GridSelector[int](WindowGrid(window, T), max_gap_seconds=1.0)
    seconds = np.cumsum(steps)
    points = [p for i, at in enumerate(seconds) for p in selector.push(float(at), i)]
    points += selector.end()
    for before, after in itertools.pairwise(points):
        if after.run == before.run:
            assert after.number == before.number + 1
            assert after.frame >= before.frame
        else:
            assert after.number == 0
            assert after.frame > before.frame
    for point in points:
        at = point.start_seconds + (point.number + 0.5) * window / T
        assert seconds[point.frame] <= at


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_seconds": 0.0}, "window_seconds is 0"),
        ({"window_seconds": float("nan")}, "window_seconds is nan"),
        ({"window_seconds": 1e9}, "at most 3600"),
        ({"stride_seconds": 0.3}, "start at multiples of 1 seconds, so give 1,"),
        ({"stride_seconds": 2.3}, "give 2 or 3,"),
        ({"stride_seconds": -1.0}, "stride_seconds is -1"),
        ({"stride_seconds": float("inf")}, "stride_seconds is inf"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowGrid.of_model(fake_manifest(), **{"window_seconds": 4.0, **arguments})


def test_the_window_of_a_model_is_as_long_as_its_training_clips() -> None:
    manifest = fake_manifest()
    assert WindowGrid.of_model(manifest).window_seconds == manifest.model.num_frames / 2
    model = manifest.model.model_copy(update={"clip_seconds": 10.0})
    trained = manifest.model_copy(update={"model": model})
    assert WindowGrid.of_model(trained).window_seconds == 10.0
    assert WindowGrid.of_model(trained, window_seconds=3.0).window_seconds == 3.0
    assert "clip_seconds" not in manifest.model.model_dump()
    assert trained.model.model_dump()["clip_seconds"] == 10.0


# Windows


def point(number: int, pixels: np.ndarray, run: int = 0) -> GridPoint[np.ndarray]:
    return GridPoint(run, number, 0.0, pixels)


def picture(value: int) -> np.ndarray:
    return np.full((6, 6, 3), value, np.uint8)


def test_windows_are_made_of_the_frames_in_a_row() -> None:
    builder = WindowBuilder(WindowGrid(3.0, 3, stride_steps=2), "door")
    for number in range(8):
        builder.add(point(number, picture(10 * number)))
    work = builder.take()
    assert work is not None
    assert [w.start_seconds for w in work.windows] == [0.0, 2.0, 4.0]
    assert [w.end_seconds for w in work.windows] == [3.0, 5.0, 7.0]
    assert work.pixels[work.views][:, :, 0, 0, 0].tolist() == [
        [0, 10, 20],
        [20, 30, 40],
        [40, 50, 60],
    ]
    assert builder.take() is None
    builder.add(point(8, picture(80)))
    work = builder.take()
    assert work is not None
    assert work.pixels[work.views][0, :, 0, 0, 0].tolist() == [60, 70, 80]
    assert work.keys is not None
    assert {source for source, _ in cast(list[tuple[str, int]], work.keys)} == {"door"}


def test_a_new_run_voids_the_windows_that_had_begun() -> None:
    builder = WindowBuilder(WindowGrid(4.0, 4, stride_steps=1))
    for number in range(6):
        builder.add(point(number, picture(number)))
    builder.add(point(0, picture(9), run=1))
    assert builder.counts.num_windows == 3
    assert builder.counts.num_voided == 3  # that began at the points 3, 4 and 5
    work = builder.take()
    assert work is not None
    assert len(work.windows) == 3


def test_the_newest_windows_are_taken_and_the_others_dropped() -> None:
    builder = WindowBuilder(WindowGrid(2.0, 2))
    for number in range(6):
        builder.add(point(number, picture(number)))
    work = builder.take(newest=1)
    assert work is not None
    assert [window.number for window in work.windows] == [4]
    assert builder.take() is None


@pytest.mark.parametrize(("still", "num_reused"), [(0.0, 2), (3.0, 4)])
def test_frames_that_stand_still_are_encoded_once(still: float, num_reused: int) -> None:
    builder = WindowBuilder(WindowGrid(4.0, 4), still=still)
    # The fifth is 2 from the one before and 3 from the one that was encoded; the last is 4 from it.
    for number, value in enumerate([50, 50, 51, 51, 53, 54]):
        builder.add(point(number, picture(value)))
    work = builder.take()
    assert work is not None
    assert builder.counts.num_reused == num_reused
    assert len(work.pixels) == 6 - num_reused
    if still:
        assert work.pixels[work.views][-1, :, 0, 0, 0].tolist() == [50, 50, 50, 54]


@pytest.mark.parametrize("still", [-1.0, 256.0, float("nan")])
def test_a_threshold_of_stillness_that_cannot_be_is_refused(still: float) -> None:
    with pytest.raises(ValueError, match="still is"):
        WindowBuilder(WindowGrid(4.0, 4), still=still)


@pytest.mark.parametrize("stride", [1, 2, 5, 8, 12])
def test_each_frame_is_encoded_once(stride: int) -> None:
    """T / k times fewer frames than windows that are recomputed."""
    manifest = fake_manifest()
    num_frames = manifest.model.num_frames
    grid = WindowGrid(float(num_frames), num_frames, stride)
    builder = WindowBuilder(grid)
    rng = np.random.default_rng(0)
    size = manifest.model.input_size
    works = []
    runtime = FakeRuntime(manifest)
    for number in range(100):
        if grid.is_used(number):
            builder.add(point(number, rng.integers(0, 256, (size, size, 3), np.uint8)))
        if number % 10 == 9 and (work := builder.take()) is not None:
            works.append(work)
    encoded = list(encode_windows(runtime, works, cache=FeatureCache(200)))
    num_windows = sum(len(each.work.windows) for each in encoded)
    rows = sum(shape[0] for name, shape in runtime.calls if name == "visual")
    assert num_windows == (100 - num_frames) // stride + 1
    last = (num_windows - 1) * stride + num_frames
    assert rows == sum(grid.is_used(number) for number in range(last))


def test_a_step_has_the_mean_of_the_windows_over_it() -> None:
    grid = WindowGrid(4.0, 4, stride_steps=2)
    windows = [Window(0, n, 2.0 * n, 2.0 * n + 4) for n in range(3)]
    windows += [Window(1, n, 100 + 2.0 * n, 104 + 2.0 * n) for n in range(2)]
    scores = np.array([[1.0], [3.0], [5.0], [7.0], [9.0]])
    starts, means = mean_over_windows(tuple(windows), scores, grid)
    assert starts.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 103, 104, 105]
    assert means[:, 0].tolist() == [1, 1, 2, 2, 4, 4, 5, 5, 7, 7, 8, 8, 9, 9]


def test_steps_between_windows_are_left_out() -> None:
    grid = WindowGrid(2.0, 2, stride_steps=5)
    windows = tuple(Window(0, n, 5.0 * n, 5.0 * n + 2) for n in range(2))
    starts, means = mean_over_windows(windows, np.array([[1.0], [2.0]]), grid)
    assert starts.tolist() == [0, 1, 5, 6]
    assert means[:, 0].tolist() == [1, 1, 2, 2]
    assert mean_over_windows((), np.empty((0, 3)), grid)[1].shape == (0, 3)


# Timelines


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with open_runtime(bundle, "onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def bank(bundle: Bundle, runtime: Runtime) -> LabelBank:
    return bank_for(bundle, runtime, ("opening a door", "closing a door", "running"))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 s at 8 frames a second in which a square moves, stands, and moves again."""
    import av

    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"g": "20", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for step in range(160):
            picture = np.full((48, 64, 3), 40, np.uint8)
            place = step % 40 if step < 60 or step >= 100 else 20
            picture[10:30, place : place + 16] = (220, 60 + step % 60, 30)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("stride", [1, 3])
def test_a_window_is_what_predict_gives_for_the_same_cut(
    bundle: Bundle, runtime: Runtime, bank: LabelBank, long_video: Path, stride: int
) -> None:
    """Bit for bit, each window by itself: other code reads the frames, and nothing is shared."""
    recognizer = Recognizer(runtime, bank)
    num_frames = bundle.manifest.model.num_frames
    grid = WindowGrid(4.0, num_frames, stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        timeline = read_timeline(recognizer, long_video, grid)
    frames_per_window = 32
    assert (
        len(timeline.windows) == (160 * num_frames // frames_per_window - num_frames) // stride + 1
    )
    with VideoReader(long_video) as reader:
        for window, scores in zip(timeline.windows, timeline.scores, strict=True):
            first = round(window.start_seconds * 8)
            cut = reader.read(np.arange(first, first + frames_per_window)).frames
            expected = recognizer.predict(ArrayVideo(cut))
            np.testing.assert_array_equal(scores, expected.scores)


def test_a_short_video_gives_what_predict_gives(
    runtime: Runtime, bank: LabelBank, rendered_video: Path
) -> None:
    recognizer = Recognizer(runtime, bank)
    with pytest.warns(ThresholdWarning):
        timeline = read_timeline(recognizer, str(rendered_video), WindowGrid(10.0, T))
    (scores,) = timeline.scores
    np.testing.assert_array_equal(scores, recognizer.predict(rendered_video).scores)
    assert timeline.windows[0].end_seconds == pytest.approx(4.0)


def test_a_timeline_says_when_labels_held(
    runtime: Runtime, bank: LabelBank, long_video: Path
) -> None:
    from actionclip_deploy.events import WatchedLabels

    recognizer = Recognizer(runtime, bank)
    watched = WatchedLabels.of(bank, recognizer.method, thresholds=1e-6)
    told = []
    timeline = read_timeline(
        recognizer,
        long_video,
        WindowGrid(4.0, T),
        watched=watched,
        progress=lambda done, total: told.append((done, total)),
    )
    # Each score is above so low a threshold, so each label holds all the time.
    assert [event.label for event in timeline.events] == list(bank.labels)
    for event in timeline.events:
        assert (event.start_seconds, event.end_seconds) == (0.0, 20.0)
    assert told[-1] == (20.0, 20.0)
    record = json.loads(timeline.to_json())
    assert record["num_windows"] == 33
    assert record["num_frames"] == 40
    assert record["events"][0]["label"] == "opening a door"
    assert record["window_seconds"] == 4.0
    assert record["stride_seconds"] == 0.5
    assert record["bank"]["num_labels"] == 3
    assert "0:00.0 - 0:20.0  running" in str(timeline)
    _, steps = timeline.step_scores()
    assert steps.shape == (40, 3)
    np.testing.assert_allclose(steps.sum(axis=1), 1, atol=1e-6)
    table = timeline.to_dataframe()
    assert table["end_seconds"].tolist() == [20.0] * 3


def test_frames_that_stand_still_change_no_score(
    runtime: Runtime, bank: LabelBank, tmp_path: Path
) -> None:
    import av

    path = tmp_path / "still.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for step in range(96):
            picture = np.full((48, 64, 3), 40 + 30 * (step // 24), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    recognizer = Recognizer(runtime, bank)
    with pytest.warns(ThresholdWarning):
        timeline = read_timeline(recognizer, path, WindowGrid(4.0, T))
    assert timeline.counts.num_frames == 24
    assert timeline.counts.num_reused == 20
    with VideoReader(path) as reader:
        for window, scores in zip(timeline.windows, timeline.scores, strict=True):
            first = round(window.start_seconds * 8)
            cut = reader.read(np.arange(first, first + 32)).frames
            np.testing.assert_array_equal(scores, recognizer.predict(ArrayVideo(cut)).scores)


def test_frames_in_memory_have_no_timeline(runtime: Runtime, bank: LabelBank) -> None:
    frames = ArrayVideo(np.zeros((20, 32, 32, 3), np.uint8))
    with pytest.raises(VideoError, match="without times"):
        read_timeline(Recognizer(runtime, bank), frames, WindowGrid(4.0, T))


def test_damage_that_is_found_late_gives_the_timeline_of_what_can_be_decoded(
    runtime: Runtime, bank: LabelBank, long_video: Path, tmp_path: Path
) -> None:
    data = bytearray(long_video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    recognizer = Recognizer(runtime, bank)
    grid = WindowGrid(4.0, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timeline = read_timeline(recognizer, damaged, grid)
        with VideoReader(damaged) as reader:
            clip = reader.read(np.arange(reader.num_frames))
            clip = reader.read(np.arange(reader.num_frames))
            found = FileGrid.of(reader, grid)
    assert timeline.warnings
    prepare = preparation(runtime.manifest)
    frames = [prepare(clip.frames[p.frame]) for p in found.points]
    for window, scores in zip(timeline.windows, timeline.scores, strict=True):
        clips = np.stack(frames[window.number : window.number + T])[np.newaxis]
        works = encode_views(
            runtime,
            [ViewFrames.of_clips(clips)],
            sizes=CallSizes.of_windows(runtime.manifest.model),
        )
        (encoded,) = works
        expected = recognizer.ranker.rank(encoded.embeddings).scores
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00.0"), (2.54, "0:02.5"), (59.96, "1:00.0"), (61, "1:01.0"), (3723.5, "1:02:03.5")],
)
def test_times_are_written_as_people_do(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
