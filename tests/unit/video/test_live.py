"""Frames of sources, one after the other: files, pipes, what is rendered; clocks and waits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rendering import moving_pictures, render
from stream_servers import transport_stream

from actionclip_deploy.errors import FrameSizeError, VideoError
from actionclip_deploy.motions import EndlessMotions
from actionclip_deploy.video import LiveFrame, LiveReader, SourceState, VideoReader, parse_source
from actionclip_deploy.video.live import Backoff, StreamClock
from actionclip_deploy.video.pixels import FrameConverter, read_clock, stamp_clock


def frames_of(text: str | Path, **options: Any) -> list[LiveFrame]:
    return list(LiveReader(parse_source(str(text)), **options).frames(threading.Event()))


def assert_same_frames(frames: list[LiveFrame], path: Path) -> None:
    with VideoReader(path) as reader:
        clip = reader.read(list(range(reader.num_frames)))
    assert len(frames) == clip.num_frames
    np.testing.assert_array_equal([frame.to_rgb() for frame in frames], clip.frames)
    np.testing.assert_allclose([f.pts_seconds for f in frames], clip.pts_seconds, atol=1e-9)
    assert {(frame.width, frame.height) for frame in frames} == {(clip.width, clip.height)}


def test_a_file_gives_the_frames_of_a_video_reader_to_who_is_slow(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=30)
    states: list[SourceState] = []
    reader = LiveReader(parse_source(str(path)), on_state=states.append)
    frames = []
    for frame in reader.frames(threading.Event()):
        time.sleep(0.02)
        frames.append(frame)
    assert_same_frames(frames, path)
    assert [state.state for state in states] == ["opening", "running", "ended"]
    assert reader.state.frames == 30
    assert {frame.session for frame in frames} == {0}
    shown = [frame.wall_seconds - frame.pts_seconds for frame in frames]
    # One anchor, though 0.4 s or more lie between these. The middle ones, for a thread may be held
    # up between reading one clock and the other.
    assert abs(np.median(shown[-10:]) - np.median(shown[:10])) < 0.2


def test_nothing_is_converted_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    convert = FrameConverter.convert
    monkeypatch.setattr(
        FrameConverter, "convert", lambda *given: converted.append(1) or convert(*given)
    )
    frames = frames_of(render(tmp_path / "a.mp4", num_frames=12))
    assert not converted
    frames[7].to_rgb()
    assert len(converted) == 1


def test_any_threads_may_convert_frames(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", pictures=moving_pictures(40, 320, 240))
    frames = frames_of(path)
    with ThreadPoolExecutor(8) as pool:
        pixels = list(pool.map(LiveFrame.to_rgb, frames * 3))
    expected = [frame.to_rgb() for frame in frames]
    assert all((a == b).all() for a, b in zip(pixels, expected * 3, strict=True))


def test_who_leaves_early_leaves_nothing_running(tmp_path: Path) -> None:
    reader = LiveReader(parse_source(str(render(tmp_path / "left.mp4", num_frames=90))))
    frames = reader.frames(threading.Event())
    next(frames)
    frames.close()
    assert reader.state.state == "ended"
    for thread in threading.enumerate():
        if "left.mp4" in thread.name:
            thread.join(20)
            assert not thread.is_alive()


def test_frames_that_nobody_holds_are_let_go(tmp_path: Path) -> None:
    held: list[weakref.ref[LiveFrame]] = []
    source = parse_source(str(render(tmp_path / "a.mp4", num_frames=30)))
    for frame in LiveReader(source).frames(threading.Event()):
        held.append(weakref.ref(frame))
        assert sum(ref() is not None for ref in held) <= 2


def test_a_clock_that_starts_again_in_a_file_begins_a_session(tmp_path: Path) -> None:
    part = transport_stream(tmp_path / "a.ts", moving_pictures(40)).read_bytes()
    (tmp_path / "b.ts").write_bytes(part + part)
    frames = frames_of(tmp_path / "b.ts")
    assert [frame.session for frame in frames] == [0] * 40 + [1] * 40
    for session in (0, 1):
        times = [f.pts_seconds for f in frames if f.session == session]
        assert (np.diff(times) > 0).all()


def test_realtime_gives_a_file_in_its_own_pace_and_stops_at_once(tmp_path: Path) -> None:
    path = render(tmp_path / "a.mp4", num_frames=4, b_frames=0, pts=[0, 5, 10, 25_000])
    reader = LiveReader(parse_source(str(path)), realtime=True)
    stop = threading.Event()
    frames = reader.frames(stop)
    start = time.monotonic()
    for number in range(3):
        next(frames)
        assert time.monotonic() - start >= 0.2 * number - 0.01
    # The next is due in 1000 seconds.
    threading.Timer(0.1, stop.set).start()
    assert next(frames, None) is None


def test_a_file_that_cannot_be_read_fails_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    reader = LiveReader(parse_source(str(tmp_path / "a.mp4")))
    with pytest.raises(VideoError, match="is not a video in a format"):
        next(reader.frames(threading.Event()))
    assert reader.state.state == "failed"
    assert "is not a video" in str(reader.state.last_error)


def test_frames_that_are_too_large_are_refused(tmp_path: Path) -> None:
    path = transport_stream(tmp_path / "a.ts", moving_pictures(4))
    with pytest.raises(FrameSizeError, match="frames of 96 x 64 and they may have 5,000 pixels"):
        frames_of(path, max_pixels=5000)
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(path.read_bytes(),)).start()
    with pytest.raises(FrameSizeError, match="96 x 64"):
        frames_of(tmp_path / "pipe", max_pixels=5000)


def test_a_pipe_gives_all_frames_to_its_end(tmp_path: Path) -> None:
    path = transport_stream(tmp_path / "a.ts", moving_pictures(40))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(path.read_bytes(),))
    writer.start()
    assert_same_frames(frames_of(tmp_path / "pipe"), path)
    writer.join()


def test_a_dash_is_the_standard_input(tmp_path: Path) -> None:
    program = (
        "import threading; from actionclip_deploy.video import LiveReader, parse_source; "
        "print(len(list(LiveReader(parse_source('-')).frames(threading.Event()))))"
    )
    path = transport_stream(tmp_path / "a.ts", moving_pictures(11))
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", program], stdin=file, capture_output=True, text=True, check=True
        )
    assert done.stdout == "11\n"


def test_what_comes_through_a_pipe_and_is_no_video_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"no video" * 99,)).start()
    with pytest.raises(VideoError, match="no video in a form that is taken here"):
        frames_of(tmp_path / "pipe")


@pytest.mark.parametrize("is_opened", [False, True])
def test_a_pipe_that_stays_open_and_silent_is_let_go(tmp_path: Path, is_opened: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR) if is_opened else None
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    source = parse_source(str(tmp_path / "pipe"))
    assert list(LiveReader(source).frames(stop)) == []
    if writer is not None:
        os.close(writer)


def test_rendered_motions_go_on_and_carry_the_time_in_their_pixels() -> None:
    source = parse_source("test:clock?fps=50")
    frames, late = [], []
    stop = threading.Event()
    for frame in LiveReader(source, render=EndlessMotions(seed=3)).frames(stop):
        pixels = frame.to_rgb()
        assert pixels.shape == (frame.height, frame.width, 3)
        late.append(frame.wall_seconds - read_clock(pixels, now=time.time()))
        frames.append(frame)
        if len(frames) == 30:
            stop.set()
    # Shown when they were rendered, by both ways to tell; a busy machine may hold some up.
    assert abs(np.median(late)) < 0.5
    assert (np.diff([frame.pts_seconds for frame in frames]) > 0).all()
    assert len({frame.to_rgb().tobytes() for frame in frames}) == 30


def test_a_source_that_shows_little_is_not_taken_for_silent() -> None:
    # Much longer in all than it may take to open.
    reader = LiveReader(
        parse_source("test:?fps=4"), open_timeout_seconds=0.05, render=EndlessMotions(size=16)
    )
    stop = threading.Event()
    for number, _ in enumerate(reader.frames(stop)):
        if number == 9:
            stop.set()
    assert reader.state.reconnects == 0


def test_a_test_source_needs_something_to_render() -> None:
    with pytest.raises(ValueError, match=r"motions\.EndlessMotions"):
        LiveReader(parse_source("test:"))


@pytest.mark.parametrize("name", ["max_pixels", "open_timeout_seconds", "read_timeout_seconds"])
def test_limits_are_numbers_above_0(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be"):
        LiveReader(parse_source("0"), **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (480, 640), (16, 64), (33, 101)])
def test_a_clock_in_pixels_is_read_as_it_was_written(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 90, np.uint8)
    for seconds in (0.0, 1_796_026_490.117, 4_294_967.295, 1e9):
        stamped = stamp_clock(pixels, seconds)
        assert read_clock(stamped, now=seconds + 3) == pytest.approx(seconds, abs=0.0011)
    assert (pixels == 90).all()


def test_a_clock_in_pixels_survives_encoding(tmp_path: Path) -> None:
    pictures = [stamp_clock(p, 1e9 + n / 7) for n, p in enumerate(moving_pictures(20))]
    path = render(tmp_path / "a.mp4", pictures=pictures, options={"crf": "30"})
    for number, frame in enumerate(frames_of(path)):
        read = read_clock(frame.to_rgb(), now=1e9)
        assert read == pytest.approx(1e9 + number / 7, abs=0.0011)


def test_a_frame_too_small_for_a_clock_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 64 x 16 or more"):
        stamp_clock(np.zeros((16, 32, 3), np.uint8), 0)


# Clocks. Arrivals are by a clock that begins anywhere, here at 1000.


def placed(
    clock: StreamClock, times: list[tuple[float | None, float]]
) -> list[tuple[float | None, float]]:
    found = []
    for pts, arrival in times:
        pts_seconds = clock.place(pts, arrival)
        found.append((pts_seconds, clock.shown_at(pts_seconds or 0.0)))
    return found


def test_a_steady_stream_keeps_its_times() -> None:
    times: list[tuple[float | None, float]] = [(n / 25, 1000 + n / 25) for n in range(100)]
    found = placed(StreamClock(), times)
    assert [pts for pts, _ in found] == [pts for pts, _ in times]
    np.testing.assert_allclose([wall for _, wall in found], [a for _, a in times])


def test_a_backlog_at_the_start_does_not_make_frames_younger_than_they_are() -> None:
    # Shown from 1000 on, one each 0.1 s; the first 12 come at once at 1001.2, as RTSP's do.
    times: list[tuple[float | None, float]] = [
        (n / 10, max(1000 + n / 10, 1001.2)) for n in range(40)
    ]
    walls = [wall for _, wall in placed(StreamClock(), times)]
    np.testing.assert_allclose(walls[12:], [1000 + n / 10 for n in range(12, 40)])


def test_bursts_of_hls_are_placed_by_their_own_clock() -> None:
    # Segments of 2 seconds come as a whole when their last frame has been shown.
    times: list[tuple[float | None, float]] = [
        (n / 10, 1000 + 2.0 * (n // 20 + 1)) for n in range(400)
    ]
    found = placed(StreamClock(), times)
    assert [pts for pts, _ in found] == [pts for pts, _ in times]
    spread = [wall - n / 10 for n, (_, wall) in enumerate(found)]
    assert max(spread[20:]) - min(spread[20:]) < 1e-9


def test_a_stall_moves_nothing() -> None:
    times: list[tuple[float | None, float]] = [
        (n / 10, 1000 + n / 10 + (3.0 if 100 <= n < 110 else 0.0)) for n in range(200)
    ]
    walls = [wall for _, wall in placed(StreamClock(), times)]
    np.testing.assert_allclose(walls, [1000 + n / 10 for n in range(200)])


@pytest.mark.parametrize("rate", [0.99, 1.01])
def test_a_clock_that_goes_wrong_is_anchored_anew(rate: float) -> None:
    times: list[tuple[float | None, float]] = [(n / 2 * rate, 1000 + n / 2) for n in range(1200)]
    found = placed(StreamClock(), times)
    late = [arrival - wall for (_, arrival), (_, wall) in zip(times, found, strict=True)]
    assert max(map(abs, late)) < 0.5 + 0.01 * 31  # the drift, and what comes to it in a window
    assert max(map(abs, late)) > 0.4


def test_frames_without_a_time_or_with_an_earlier_one_go_by_their_arrival() -> None:
    clock = StreamClock()
    times: list[tuple[float | None, float]] = [(n / 10, 1000 + n / 10) for n in range(20)]
    times += [(None, 1002.0), (1.95, 1002.1), (None, 1002.2), (2.3, 1002.3)]
    pts = [pts for pts, _ in placed(clock, times)]
    assert (np.diff(np.array(pts, float)) > 0).all()
    assert pts[20:] == pytest.approx([2.0, 2.1, 2.2, 2.3], abs=0.03)


def test_a_source_without_any_times_has_those_of_its_arrivals() -> None:
    arrivals = [1000 + n / 5 for n in range(50)]
    clock = StreamClock(frame_seconds=0.04)
    found = [clock.place(None, arrival) for arrival in arrivals]
    np.testing.assert_allclose(found, [n / 5 for n in range(50)], atol=1e-6)


@pytest.mark.parametrize("pts", [3.0, 5000.0, 0.0])
def test_a_clock_that_jumps_asks_for_a_new_session(pts: float) -> None:
    clock = StreamClock()
    assert [clock.place(n / 10, 1000 + n / 10) for n in range(50)]
    assert clock.place(pts, 1005.0) is None
    assert StreamClock().place(pts, 1005.0) == pts


def test_a_pause_that_is_as_long_by_both_clocks_is_no_jump() -> None:
    clock = StreamClock()
    clock.place(0.0, 1000.0)
    assert clock.place(60.0, 1060.0) == 60.0
    file = StreamClock(is_live=False, follows_arrival=False)
    file.place(0.0, 1000.0)
    assert file.place(60.0, 1000.1) == 60.0


class Chance(random.Random):
    """Chance that always gives the middle, or the end that is asked for."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self._part = part

    def uniform(self, a: float, b: float) -> float:
        return a + self._part * (b - a)


def test_waits_double_up_to_half_a_minute_and_begin_anew_after_health() -> None:
    backoff = Backoff(rng=Chance(0.5))
    assert [backoff.next_seconds(0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.next_seconds(9.9) == 30
    assert backoff.next_seconds(10.0) == 1
    assert [backoff.next_seconds(0) for _ in range(2000)][-1] == 30


def test_waits_differ_by_a_fifth_at_most() -> None:
    assert Backoff(rng=Chance(0)).next_seconds(0) == pytest.approx(0.8)
    assert Backoff(rng=Chance(1)).next_seconds(0) == pytest.approx(1.2)
    late = Backoff(rng=Chance(1))
    assert max(late.next_seconds(0) for _ in range(9)) == 30
