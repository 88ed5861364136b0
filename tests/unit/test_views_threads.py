"""Threads that work ahead, with work that waits for the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from threading import Event

import pytest

from actionclip_deploy.views import default_num_workers, work_ahead


def names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actionclip-read")]


def test_results_come_in_the_order_of_the_items_however_long_each_takes() -> None:
    def work(item: int, stop: Event) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    results = work_ahead(range(40), work, num_workers=4, max_ahead=6)
    assert list(results) == [item * item for item in range(40)]
    assert names() == []


def test_work_is_done_while_nobody_asks_for_it() -> None:
    done = threading.Semaphore(0)

    def work(item: int, stop: Event) -> int:
        done.release()
        return item

    results = work_ahead(range(10), work, num_workers=2, max_ahead=5)
    assert next(results) == 0
    # Without another result being taken, all that the bound allows is done; and no more.
    assert all(done.acquire(timeout=10) for _ in range(5))
    assert not done.acquire(timeout=0.05)
    results.close()


def test_two_threads_work_at_a_time() -> None:
    both = threading.Barrier(2, timeout=10)  # breaks if the second never comes

    def work(item: int, stop: Event) -> int:
        both.wait()
        return item

    assert list(work_ahead(range(4), work, num_workers=2, max_ahead=4)) == [0, 1, 2, 3]


def test_an_error_comes_in_the_place_of_its_result_and_ends_the_work() -> None:
    def work(item: int, stop: Event) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    results = work_ahead(range(100), work, num_workers=2, max_ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(results)
    assert names() == []


def test_an_error_of_the_items_ends_the_work() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("folder is gone")

    with pytest.raises(OSError, match="folder is gone"):
        list(work_ahead(items(), lambda item, _: item, num_workers=1, max_ahead=3))
    assert names() == []


def test_closing_tells_work_under_way_to_stop_and_drops_the_rest() -> None:
    begun: list[int] = []

    def work(item: int, stop: Event) -> int:
        begun.append(item)
        if item:
            assert stop.wait(timeout=10)
        return item

    results = work_ahead(range(100), work, num_workers=2, max_ahead=50)
    assert next(results) == 0
    while len(begun) < 3:
        time.sleep(0.001)
    results.close()
    assert names() == []
    assert len(begun) == 3


def test_there_is_at_least_one_worker_by_default() -> None:
    assert 1 <= default_num_workers() <= 8
