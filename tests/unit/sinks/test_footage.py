"""Pictures, clips and annotated copies of what cameras show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_event
from full_disk import small_files
from numpy.typing import NDArray
from PIL import Image

from actionclip_deploy.events import utc_text
from actionclip_deploy.sinks import delivery, parse_sink
from actionclip_deploy.sinks.footage import ClipSink, VideoSink
from actionclip_deploy.video import VideoReader

WAIT_SECONDS = 60.0
WALL = 1_800_000_000.0
FPS = 8
GRAY_TOLERANCE = 4  # of H.264


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


@dataclass(frozen=True)
class FakeFrame:
    pts_seconds: float
    wall_seconds: float
    session: int = 0
    level: int = 100
    width: int = 128
    height: int = 72

    def to_rgb(self) -> NDArray[np.uint8]:
        return np.full((self.height, self.width, 3), self.level, np.uint8)


def level_at(seconds: float) -> int:
    """A gray that tells the time."""
    return 20 + int(seconds * FPS) % 200


def show(sink: Any, start: float, end: float, *, source: str = "door", **changes: Any) -> None:
    """Give the frames from a time to another, each of which waits for room."""
    for number in range(round(start * FPS), round(end * FPS)):
        seconds = number / FPS
        frame = FakeFrame(seconds, WALL + seconds, level=level_at(seconds), **changes)
        sink.frame(source, frame, may_wait=True)


def event(kind: str, start: float, end: float | None = None, **changes: Any) -> Any:
    given = {"start_seconds": start, "start_time": utc_text(WALL + start), **changes}
    if end is not None:
        given |= {"end_seconds": end, "end_time": utc_text(WALL + end)}
    return fake_event(kind, **given)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def levels_in(path: Path) -> list[int]:
    with VideoReader(path) as reader:
        return [int(f.mean()) for f in reader.read(np.arange(reader.num_frames)).frames]


def near(levels: list[int], start: float, end: float) -> bool:
    """Whether frames are those of a time, the first of them at most a second before it."""
    last = round(end * FPS)
    first = last - len(levels) + 1
    if not start - 1 <= first / FPS <= start:
        return False
    wanted = [level_at(number / FPS) for number in range(first, last + 1)]
    return bool(np.abs(np.subtract(levels, wanted)).max() <= GRAY_TOLERANCE)


def test_an_event_gives_a_picture_at_once_and_a_clip_with_the_seconds_around_it(
    tmp_path: Path,
) -> None:
    sink = ClipSink(tmp_path, seconds_before=2, seconds_after=3)
    show(sink, 0, 10)
    sink.send(event("new", 6.0))
    wait_until(lambda: len(files(tmp_path, ".jpg")) == 1)
    show(sink, 10, 14)
    sink.send(event("update", 6.0))
    sink.send(event("end", 6.0, 12.0))
    show(sink, 14, 14.5)
    assert files(tmp_path, ".mp4") == []  # the seconds after it are not over
    show(sink, 14.5, 16)
    wait_until(lambda: sink.stats.num_sent == 2)
    (clip,), (picture,) = files(tmp_path, ".mp4"), files(tmp_path, ".jpg")
    assert near(levels_in(clip), 4.0, 15.0)
    with Image.open(picture) as shown:
        assert abs(float(np.asarray(shown).mean()) - level_at(7.0)) <= GRAY_TOLERANCE
    assert clip.name == "20270115T080006000Z_run_1800000000000-000000-0123456789.mp4"
    assert clip.parent == tmp_path / "door"
    sink.close()


def test_a_long_event_gives_its_beginning(tmp_path: Path) -> None:
    sink = ClipSink(tmp_path, seconds_before=1, seconds_after=1, max_seconds=4)
    show(sink, 0, 5)
    sink.send(event("new", 3.0))
    show(sink, 5, 8)
    wait_until(lambda: sink.stats.num_sent == 2)
    sink.send(event("end", 3.0, 8.0))
    sink.close()
    (clip,) = files(tmp_path, ".mp4")
    assert near(levels_in(clip), 2.0, 7.0)


def test_a_source_that_connects_anew_or_ends_leaves_the_clip_of_what_it_showed(
    tmp_path: Path,
) -> None:
    sink = ClipSink(tmp_path, seconds_before=1, seconds_after=5)
    show(sink, 0, 6)
    sink.send(event("new", 3.0, id="one"))
    show(sink, 20, 30, session=1, width=96)
    sink.send(event("end", 3.0, 5.5, id="one"))
    wait_until(lambda: len(files(tmp_path, "one.mp4")) == 1)
    sink.send(event("new", 26.0, id="two"))
    sink.close()  # in the middle of an event
    assert near(levels_in(files(tmp_path, "one.mp4")[0]), 2.0, 5.875)
    assert near(levels_in(files(tmp_path, "two.mp4")[0]), 25.0, 29.875)
    assert sink.stats.dropped == {}


def test_cameras_are_told_apart_and_one_without_frames_has_no_clip(tmp_path: Path) -> None:
    sink = ClipSink(tmp_path, seconds_before=1, seconds_after=0.5)
    show(sink, 0, 20, source="yard")
    show(sink, 0, 20)
    sink.send(event("new", 18.0, id="a", source="yard"))
    sink.send(event("end", 18.0, 19.0, id="a", source="yard"))
    sink.send(event("new", 18.0, id="b", source="nowhere"))
    wait_until(lambda: len(files(tmp_path / "yard", ".mp4")) == 1)
    sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"yard"}
    assert all(
        ring.num_bytes <= 20_000 for rings in sink._rings.values() for ring in rings.values()
    )
    assert sink.stats.dropped == {"no_frames": 1}


def test_a_full_disk_is_told_and_the_clip_comes_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pause is seconds, which a test cannot wait for.
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0.01)
    sink = ClipSink(tmp_path, seconds_before=1, seconds_after=1)
    show(sink, 0, 6)
    sink.send(event("new", 3.0))
    wait_until(lambda: sink.stats.num_sent == 1)
    with small_files(200):
        sink.send(event("end", 3.0, 4.0))
        wait_until(lambda: sink.stats.num_failures == 1)
        assert files(tmp_path, ".mp4") == []
        assert sink.stats.state == "failing"
    show(sink, 6, 8)
    wait_until(lambda: sink.stats.num_sent == 2)
    sink.close()
    assert len(files(tmp_path, ".mp4")) == 1


def test_a_picture_that_finds_no_room_holds_up_no_clip(tmp_path: Path) -> None:
    sink = ClipSink(tmp_path, seconds_before=1, seconds_after=1)
    show(sink, 0, 6)
    with small_files(20):
        sink.send(event("new", 3.0))
        wait_until(lambda: sink.stats.dropped == {"unwritten": 1})
    sink.send(event("end", 3.0, 4.0))
    wait_until(lambda: sink.stats.num_sent == 1)
    sink.close()
    assert [path.suffix for path in (tmp_path / "door").iterdir()] == [".mp4"]


def test_a_camera_is_never_held_up_and_frames_too_many_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open = threading.Event()

    class Slow(FakeFrame):
        def to_rgb(self) -> NDArray[np.uint8]:
            assert is_open.wait(WAIT_SECONDS)
            return super().to_rgb()

    sink = ClipSink(tmp_path)
    for number in range(100):
        sink.frame("door", Slow(number / FPS, WALL + number / FPS))
    dropped = sink.stats.dropped["frames"]
    assert 100 - delivery.MAX_WAITING_FRAMES - 1 <= dropped <= 100 - delivery.MAX_WAITING_FRAMES
    is_open.set()
    sink.close()


def test_more_frames_than_a_clip_has_are_left_out_where_they_are_read(tmp_path: Path) -> None:
    sink = ClipSink(tmp_path, frames_per_second=8)
    taken = []

    class Counted(FakeFrame):
        def to_rgb(self) -> NDArray[np.uint8]:
            taken.append(self.pts_seconds)
            return super().to_rgb()

    for number in range(75):  # three seconds at 25 a second
        sink.frame("door", Counted(number / 25, WALL + number / 25), may_wait=True)
    sink.close()
    assert 23 <= len(taken) <= 25
    assert np.diff(taken).min() >= 1 / 8 - 1 / 25 - 1e-9


def test_an_annotated_copy_shows_the_label_while_its_event_is_open(tmp_path: Path) -> None:
    path = tmp_path / "copy.mp4"
    sink = parse_sink(f"video:{path}")
    still: dict[str, Any] = {"width": 320, "height": 240}
    for number in range(24):
        if number == 8:
            sink.send(event("new", 1.0))
        if number == 16:
            sink.send(event("end", 1.0, 2.0))
        frame = FakeFrame(number / 8, WALL + number / 8, **still)
        sink.frame("door", frame, may_wait=True)
    sink.close()
    with VideoReader(path) as reader:
        assert reader.num_frames == 24
        frames = reader.read(np.arange(24)).frames
    is_marked = [int(np.ptp(frame[180:].astype(int))) > 150 for frame in frames]
    assert is_marked == [8 <= number < 16 for number in range(24)]


def test_several_sources_have_a_file_each_or_all_but_the_first_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both, one = VideoSink(tmp_path / "{source}.mp4"), VideoSink(tmp_path / "one.mp4")
    for sink in (both, one):
        show(sink, 0, 1)
        show(sink, 0, 1, source="yard")
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"door.mp4", "yard.mp4", "one.mp4"}
    assert one.stats.dropped == {"frames": FPS}
    assert both.stats.num_sent == 2
    assert "write {source} into its name: of yard nothing is written" in caplog.text


def test_seconds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds_before is -1; it must be from 0 to 300"):
        ClipSink(tmp_path, seconds_before=-1)
