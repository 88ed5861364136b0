"""What holds for every sink, and lines of JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import fake_event
from full_disk import small_files

from actionclip_deploy.errors import FileWriteError, SinkError
from actionclip_deploy.records import EventRecord
from actionclip_deploy.sinks import JsonlSink, Sink, delivery, parse_sink

WAIT_SECONDS = 60.0


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pause is seconds, which a test cannot wait for.
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_SECONDS", 0.02)


class Gate(Sink):
    """A sink that waits until it is let go, and fails as often as it is told to."""

    kind = "gate"

    def __init__(self, num_failures: int = 0, error: Exception | None = None) -> None:
        super().__init__("gate")
        self.is_open = threading.Event()
        self.has_begun = threading.Event()
        self.num_left = num_failures
        self.error = error or OSError("no room")
        self.got: list[EventRecord] = []
        self._thread.start()

    def _deliver(self, event: EventRecord) -> None:
        self.has_begun.set()
        assert self.is_open.wait(WAIT_SECONDS)
        if self.num_left:
            self.num_left -= 1
            raise self.error
        self.got.append(event)
        self._note_sent()


def test_what_fails_is_tried_again_in_order_and_the_log_says_it_once(
    no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sink = Gate(num_failures=5)
    sink.is_open.set()
    events = [fake_event("update", number) for number in range(3)]
    for event in events:
        sink.send(event)
    wait_until(lambda: sink.stats.num_sent == 3)
    assert sink.got == events
    stats = sink.stats
    assert (stats.state, stats.num_failures, stats.dropped) == ("running", 5, {})
    assert stats.last_error == "no room"
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in told] == [
        "the sink gate fails, and is tried again",
        "the sink gate works again",
    ]
    sink.close()


def test_a_full_queue_drops_updates_first_and_never_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "MAX_WAITING_EVENTS", 3)  # not a thousand
    sink = Gate()
    sink.send(fake_event("new", 0))
    assert sink.has_begun.wait(WAIT_SECONDS)  # it waits with this one
    kinds = ["new", "update", "end", "new", "new"]
    for number, kind in enumerate(kinds, 1):
        sink.send(fake_event(kind, number))
    assert sink.stats.dropped == {"queue_full": 2}
    assert sink.stats.num_waiting == 4
    sink.is_open.set()
    sink.close()
    # The update goes, and then the oldest.
    assert [event.number for event in sink.got] == [0, 3, 4, 5]


def test_a_sink_that_fails_for_good_says_so_and_drops_what_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Gate(num_failures=1, error=SinkError("nobody is there", is_final=True))
    sink.is_open.set()
    sink.send(fake_event())
    wait_until(lambda: sink.stats.state == "failed")
    sink.send(fake_event())
    wait_until(lambda: sink.stats.dropped == {"failed": 2})
    assert "fails for good: nobody is there" in caplog.text
    sink.close()


def test_a_mistake_in_a_sink_ends_it_alone_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sink = Gate(num_failures=1, error=KeyError("a mistake"))
    sink.is_open.set()
    sink.send(fake_event())
    wait_until(lambda: sink.stats.state == "failed")
    assert "KeyError: 'a mistake'" in (sink.stats.last_error or "")
    sink.close()
    assert "Traceback" in caplog.text


def test_a_sink_that_hangs_is_closed_in_time_and_counts_what_it_leaves() -> None:
    sink = Gate()
    for number in range(3):
        sink.send(fake_event("update", number))
    sink.close(timeout_seconds=0.1)
    assert sink.stats.state == "closed"
    assert sink.stats.dropped == {"closed": 3}
    sink.send(fake_event())
    assert sink.stats.dropped == {"closed": 4}
    sink.is_open.set()


# Lines of JSON


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def test_each_message_is_a_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    sink = JsonlSink(path)
    for number in range(3):
        sink.send(fake_event("update", number))
        wait_until(lambda sent=number + 1: sink.stats.num_sent == sent)
        assert numbers(path) == list(range(number + 1))
    sink.close()
    again = JsonlSink(path)
    again.send(fake_event("update", 3))
    again.close()
    assert numbers(path) == [0, 1, 2, 3]


def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "events.jsonl", tmp_path / "events.1.jsonl"
    sink = JsonlSink(path)
    sink.send(fake_event())
    wait_until(lambda: sink.stats.num_sent == 1)
    path.rename(old)
    sink.send(fake_event("update", 1))
    sink.close()
    assert (numbers(old), numbers(path)) == ([0], [1])


def test_a_line_that_a_killed_program_began_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "ne')
    sink = JsonlSink(path)
    sink.send(fake_event())
    sink.close()
    first, second = path.read_text().splitlines()
    assert first == '{"kind": "ne'
    assert json.loads(second)["kind"] == "new"


def test_a_full_disk_leaves_no_half_line_and_the_line_comes_when_there_is_room(
    tmp_path: Path, no_pauses: None
) -> None:
    path = tmp_path / "events.jsonl"
    length = len(fake_event().to_json()) + 1
    sink = JsonlSink(path)
    with small_files(length + length // 2):
        sink.send(fake_event("new", 0))
        sink.send(fake_event("new", 1))
        wait_until(lambda: sink.stats.num_failures >= 2)
        assert numbers(path) == [0]
        assert path.stat().st_size == length
    wait_until(lambda: sink.stats.num_sent == 2)
    sink.close()
    assert numbers(path) == [0, 1]
    assert "make room there" in (sink.stats.last_error or "")


def test_standard_output_gets_lines_and_its_end_ends_the_sink() -> None:
    program = (
        "import time\n"
        "from actionclip_deploy.sinks import parse_sink\n"
        "from fakes import fake_event\n"
        "sink = parse_sink('-')\n"
        "for number in range(100_000):\n"
        "    sink.send(fake_event('update', number))\n"
        "    if sink.stats.state == 'failed': break\n"
        "    time.sleep(0.01)\n"
        "sink.close()\n"
        "raise SystemExit(0 if sink.stats.state == 'failed' else 1)\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert process.stdout is not None
    assert [json.loads(process.stdout.readline())["number"] for _ in range(3)] == [0, 1, 2]
    process.stdout.close()
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert b"nobody reads the standard output" in errors
    assert process.returncode in (0, 120)  # 120 where the interpreter could not flush at its end


def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match="cannot be written"):
        JsonlSink(tmp_path / "file" / "events.jsonl")


# The command line's words


def test_words_that_are_no_sink_are_refused_without_their_secrets() -> None:
    with pytest.raises(ValueError, match=r"'events.txt' is not a sink; expected '-', FILE.jsonl"):
        parse_sink("events.txt")
    with pytest.raises(ValueError, match="is not a sink") as caught:
        parse_sink("ftp://me:geheim@host/x")
    assert "geheim" not in str(caught.value)
    for text in ("clips:", "video:", "video:a.avi", ""):
        with pytest.raises(ValueError, match="is not a sink"):
            parse_sink(text)


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ValueError, match="needs the environment variable HOOK, which is not set"):
        parse_sink("https://host/${HOOK}", environ={})


def test_names_in_files_and_topics_are_plain_and_stay_apart() -> None:
    assert delivery.slug("door-1") == "door-1"
    texts = ["a/b", "a b", "a_b", "../..", "", "走る", "läuft", "x" * 200, "x" * 201]
    slugs = [delivery.slug(text) for text in texts]
    assert len(set(slugs)) == len(texts)
    assert all(slug and set(slug) <= set(map(chr, range(45, 123))) for slug in slugs)
    assert all("/" not in slug and "." not in slug and len(slug) < 80 for slug in slugs)
