"""Watching sources: many at a time, what is dropped, and banks that are swapped meanwhile."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import LabelBankError, LabelError, ThresholdWarning
from actionclip_deploy.labels import LabelBank, bank_for
from actionclip_deploy.motions import EndlessMotions
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.records import EventRecord
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import read_timeline
from actionclip_deploy.video.sources import parse_source
from actionclip_deploy.watch import (
    Camera,
    WatchedBank,
    Watcher,
    check_names,
    crop_region,
    follow_banks,
    read_cameras,
)

LABELS = ("opening a door", "closing a door", "running")

pytestmark = pytest.mark.filterwarnings("ignore::actionclip_deploy.errors.ThresholdWarning")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with open_runtime(bundle, "onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def bank(bundle: Bundle, runtime: Runtime) -> LabelBank:
    return bank_for(bundle, runtime, LABELS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two videos of 12 and 8 seconds at 8 frames a second."""
    import av

    paths = []
    for number, num_frames in enumerate((96, 64)):
        path = tmp_path_factory.mktemp("watched") / f"door{number}.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=8, options={"g": "20"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for step in range(num_frames):
                picture = np.full((48, 64, 3), 40 + 20 * number, np.uint8)
                picture[10:30, step % 40 : step % 40 + 16] = (220, 60 + step % 60, 30)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        paths.append(path)
    return paths


def camera(source: Path | str, name: str, **options: Any) -> Camera:
    return Camera(parse_source(str(source), name=name), **options)


def ignore(_: EventRecord) -> None:
    pass


@pytest.mark.parametrize("region", ["frame", "swscale"])
def test_windows_of_files_score_as_their_timelines(
    bundle: Bundle, runtime: Runtime, bank: LabelBank, videos: list[Path], region: Region
) -> None:
    """Bit for bit, though two sources share calls, threads read, and nothing is dropped."""
    found: dict[str, list[Float32Array]] = {"a": [], "b": []}
    cameras = [camera(path, name) for path, name in zip(videos, found, strict=True)]
    with Watcher(
        runtime,
        cameras,
        {"doors": WatchedBank.of(bank)},
        on_event=ignore,
        on_window=lambda name, _, scores: found[name].append(scores),
        region=region,
    ) as watcher:
        watcher.run(threading.Event())
        states = watcher.states()
    grid = WindowGrid.of_model(bundle.manifest)
    for path, state in zip(videos, states, strict=True):
        timeline = read_timeline(Recognizer(runtime, bank, region=region), path, grid)
        np.testing.assert_array_equal(np.stack(found[state.name]), timeline.scores)
        exact = read_timeline(Recognizer(runtime, bank), path, grid)
        assert np.array_equal(exact.scores, timeline.scores) == (region == "frame")
        np.testing.assert_allclose(exact.scores, timeline.scores, atol=0.02)
        assert state.state == "ended"
        assert state.windows == len(timeline.windows)
        assert state.windows_dropped == {"stale": 0}
        assert state.frames_encoded + state.frames_reused == state.grid_frames


def test_events_of_a_file_are_told_and_end_with_it(
    runtime: Runtime, bank: LabelBank, videos: list[Path]
) -> None:
    told: list[EventRecord] = []
    cameras = [
        camera(videos[0], "door", thresholds={**dict.fromkeys(LABELS, 2.0), "running": 1e-9})
    ]
    with Watcher(
        runtime, cameras, {"doors": WatchedBank.of(bank)}, on_event=told.append
    ) as watcher:
        watcher.run(threading.Event())
    assert [event.kind for event in told if event.kind != "update"] == ["new", "end"]
    assert {event.label for event in told} == {"running"}
    assert {event.source for event in told} == {"door"}
    assert (told[-1].start_seconds, told[-1].end_seconds) == (0.0, 12.0)


class SlowRuntime(FakeRuntime):
    """Takes its time for each frame, as a model does that is too large for its machine."""

    seconds_per_frame = 0.02

    def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
        if graph == "visual":
            time.sleep(self.seconds_per_frame * len(array))
        return super()._run(graph, array)


def fake_bank(runtime: FakeRuntime, labels: tuple[str, ...] = LABELS) -> LabelBank:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(1, len(labels), runtime.manifest.model.embedding_dim))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return LabelBank(
        name="doors",
        labels=labels,
        templates=("{}",),
        embeddings=embeddings.astype(np.float32),
        textual_sha256="0" * 64,
    )


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)


def run_for_a_while(watcher: Watcher, until: Callable[[], bool]) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=watcher.run, args=(stop,))
    thread.start()
    try:
        wait_for(until)
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


def test_what_is_live_is_dropped_where_the_model_is_too_slow_and_the_newest_wins() -> None:
    runtime = SlowRuntime(fake_manifest())
    cameras = [camera("test:?fps=100", "hall", window_seconds=0.08)]
    ends: list[float] = []
    with Watcher(
        runtime,
        cameras,
        {"doors": WatchedBank.of(fake_bank(runtime))},
        on_event=ignore,
        on_window=lambda _, end, __: ends.append(end),
        render=EndlessMotions(seed=0, size=40),
    ) as watcher:
        run_for_a_while(watcher, lambda: watcher.states()[0].windows_dropped["stale"] > 20)
        (state,) = watcher.states()
    assert state.windows > 1
    assert ends == sorted(ends)
    assert state.windows_dropped["stale"] > 0
    assert state.best is not None
    assert state.age_ms is not None
    assert watcher.snapshot("hall") is not None
    assert watcher.history("hall")[-1][1] in LABELS


def test_a_source_that_is_not_there_disturbs_no_other() -> None:
    runtime = FakeRuntime(fake_manifest())
    cameras = [
        camera("rtsp://127.0.0.1:9/nobody", "gone"),
        camera("test:?fps=50", "hall", window_seconds=0.2),
    ]
    with Watcher(
        runtime,
        cameras,
        {"doors": WatchedBank.of(fake_bank(runtime))},
        on_event=ignore,
        render=EndlessMotions(seed=0, size=40),
    ) as watcher:
        run_for_a_while(
            watcher,
            lambda: watcher.states()[1].windows > 10 and watcher.states()[0].state == "lost",
        )
        gone, hall = watcher.states()
    assert gone.last_error is not None
    assert gone.windows == 0
    assert hall.reconnects == 0


def test_a_file_that_cannot_be_read_is_told_and_the_others_go_on(
    runtime: Runtime, bank: LabelBank, videos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(videos[0].read_bytes()[:200])
    states = []
    with Watcher(
        runtime,
        [camera(broken, "broken"), camera(videos[1], "whole")],
        {"doors": WatchedBank.of(bank)},
        on_event=ignore,
        on_state=states.append,
    ) as watcher:
        watcher.run(threading.Event())
        found = {state.name: state for state in watcher.states()}
    assert found["broken"].state == "failed"
    assert "broken.mp4" in (found["broken"].last_error or "")
    assert found["whole"].state == "ended"
    assert found["whole"].windows > 0
    assert ("broken", "failed") in [(state.name, state.state) for state in states]


def test_a_bank_is_swapped_between_two_windows() -> None:
    runtime = FakeRuntime(fake_manifest())
    told: list[EventRecord] = []
    first, second = fake_bank(runtime), fake_bank(runtime, ("sleeping", "running"))
    with Watcher(
        runtime,
        [camera("test:?fps=50", "hall", window_seconds=0.2, thresholds=1e-12)],
        {"doors": WatchedBank.of(first, 1)},
        on_event=told.append,
        render=EndlessMotions(seed=0, size=40),
    ) as watcher:
        thread = threading.Thread(target=watcher.run, args=(stop := threading.Event(),))
        thread.start()
        wait_for(lambda: len({event.label for event in told}) == 3)
        watcher.set_bank("doors", WatchedBank.of(second, 2))
        wait_for(lambda: any(event.label == "sleeping" for event in told))
        stop.set()
        thread.join(20)
    ended = {event.label for event in told if event.end_reason == "labels"}
    assert ended == {"opening a door", "closing a door"}
    versions = [event.bank.version for event in told if event.label == "running"]
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


def test_a_bank_without_a_label_that_has_a_threshold_changes_nothing() -> None:
    runtime = FakeRuntime(fake_manifest())
    watcher = Watcher(
        runtime,
        [camera("test:", "hall", thresholds={"running": 0.5})],
        {"doors": WatchedBank.of(fake_bank(runtime), 1)},
        on_event=ignore,
        render=EndlessMotions(seed=0, size=40),
    )
    with pytest.raises(LabelError, match="'running'"):
        watcher.set_bank("doors", WatchedBank.of(fake_bank(runtime, ("sleeping", "eating")), 2))
    assert watcher.states()[0].bank.version == 1


def test_a_bank_that_is_built_anew_is_used_from_then_on(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    with open_runtime(bundle, "onnxruntime", num_threads=1) as runtime:
        LabelBank.build(bundle, runtime, LABELS, name="doors").save(bundle)
        watcher = Watcher(
            runtime,
            [camera("test:", "hall")],
            {"doors": WatchedBank.of(LabelBank.load(bundle, "doors"), 1)},
            on_event=ignore,
            render=EndlessMotions(seed=0, size=40),
        )
        with follow_banks(bundle, watcher, ["doors"]):
            LabelBank.build(bundle, runtime, ("sleeping",), name="doors").save(
                bundle, overwrite=True
            )
            wait_for(lambda: watcher.states()[0].bank.num_labels == 1)
        assert watcher.states()[0].bank.version == 2


def test_cameras_that_cannot_be_are_refused_before_anything_runs() -> None:
    runtime = FakeRuntime(fake_manifest())
    banks = {"doors": WatchedBank.of(fake_bank(runtime))}
    with pytest.raises(LabelBankError, match=r"'hall' .* 'others'; there is 'doors'"):
        Watcher(runtime, [camera("0", "hall", labels="others")], banks, on_event=ignore)
    with pytest.raises(ValueError, match="Two cameras are called 'hall'"):
        check_names([camera("test:", "hall"), camera("0", "hall")])
    with pytest.raises(ValueError, match="no source"):
        Watcher(runtime, [], banks, on_event=ignore)


# Regions


@pytest.mark.parametrize(
    ("region", "shape"),
    [
        (None, (40, 80)),
        ((0.25, 0.0, 0.75, 1.0), (40, 40)),
        ((0.0, 0.5, 1.0, 1.0), (20, 80)),
        ((0.999, 0.999, 1.0, 1.0), (1, 1)),
    ],
)
def test_a_region_is_cut_out(
    region: tuple[float, float, float, float] | None, shape: tuple[int, int]
) -> None:
    assert crop_region(np.zeros((40, 80, 3), np.uint8), region).shape[:2] == shape


@pytest.mark.parametrize("region", [(0.5, 0, 0.5, 1), (0, 0, 2, 1), (0, -1, 1, 1), (1, 0, 0, 1)])
def test_a_region_outside_of_the_frame_is_refused(region: Any) -> None:
    with pytest.raises(ValueError, match="shares of the frame"):
        camera("test:", "hall", region=region)


# The file of cameras

CAMERAS = """
[defaults]
window = 6
cooldown = 3

[[camera]]
name = "door"
source = "rtsp://user:${DOOR_PASSWORD}@192.0.2.7/stream"
labels = "doors"
region = [0.25, 0.0, 1.0, 1.0]
thresholds = { running = 0.7 }
groups = { door = ["opening a door", "closing a door"] }

[[camera]]
name = "hall"
source = "0"
window = 2.5
thresholds = 0.4
"""


def test_a_file_of_cameras_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR_PASSWORD", "s3cret")
    path = tmp_path / "cameras.toml"
    path.write_text(CAMERAS)
    door, hall = read_cameras(path)
    assert (door.name, door.labels, door.window_seconds) == ("door", "doors", 6)
    assert door.region == (0.25, 0.0, 1.0, 1.0)
    assert door.thresholds == {"running": 0.7}
    assert door.groups == {"door": ("opening a door", "closing a door")}
    assert "s3cret" in door.source.address
    assert "s3cret" not in repr(door)
    assert "s3cret" not in door.source.shown
    assert (hall.window_seconds, hall.cooldown_seconds, hall.thresholds) == (2.5, 3, 0.4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "camera"),
        ("camera = 1", "camera"),
        ('[[camera]]\nname = "a"', "source"),
        ('[[camera]]\nname = "a"\nsource = "0"\nwindwo = 3', "windwo"),
        ('[[camera]]\nname = "a"\nsource = "0"\nwindow = -1', "window"),
        ('[[camera]]\nname = "a/b"\nsource = "0"', "slash"),
        ('[[camera]]\nname = ""\nsource = "0"', "empty"),
        ('[[camera]]\nname = "a"\nsource = "0"\nregion = [0, 0, 3, 1]', "'a'.*shares"),
        ('[[camera]]\nname = "a"\nsource = "rtsp://${NOT_SET_ANYWHERE}@h/"', "NOT_SET_ANYWHERE"),
        ('[[camera]]\nname = "a"\nsource = "0"\n[[camera]]\nname = "a"\nsource = "1"', "Two cam"),
        ("[[camera", "not TOML"),
        ("[[camera]]\r\nname = '\0'\r\n", "line 2 holds a zero byte"),
    ],
)
def test_a_file_of_cameras_that_is_wrong_is_refused_by_its_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cameras(path)


def test_a_file_of_cameras_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_cameras(tmp_path / "none.toml")


def test_a_guess_of_a_threshold_is_warned_of() -> None:
    runtime = FakeRuntime(fake_manifest())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        Watcher(
            runtime,
            [camera("test:", "hall")],
            {"doors": WatchedBank.of(fake_bank(runtime))},
            on_event=ignore,
            render=EndlessMotions(seed=0, size=40),
        )
    assert any("is a guess" in str(warning.message) for warning in caught)
