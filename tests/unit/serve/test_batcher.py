"""The queue before the runtime, with arithmetic in the place of a runtime."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

import pytest

from actionclip_deploy.errors import InferenceError, RequestRefusedError
from actionclip_deploy.serve import batcher as batcher_module
from actionclip_deploy.serve.batcher import Batcher, CallOutput

TIMEOUT_SECONDS = 60.0  # of a busy machine; nothing waits so long where all is right


class Doubler:
    """Doubles numbers; waits for `gate` before each call, and fails for 13."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, group: Hashable, payloads: Sequence[Any]) -> list[int]:
        self.calls.append(list(payloads))
        assert self.gate.wait(TIMEOUT_SECONDS)
        if 13 in payloads:
            raise InferenceError("13 brings bad luck.")
        return [2 * payload for payload in payloads]


def run_batcher(
    use: Callable[[Batcher, Doubler], Awaitable[Any]], **options: Any
) -> tuple[Any, Doubler]:
    """Use a batcher, then drain it."""

    async def run() -> Any:
        given = {"max_batch": 4, "max_delay_seconds": 0.01, "max_waiting": 8}
        batcher = Batcher(doubler, **{**given, **options})
        batcher.start()
        try:
            return await asyncio.wait_for(use(batcher, doubler), TIMEOUT_SECONDS)
        finally:
            doubler.gate.set()
            await batcher.drain(TIMEOUT_SECONDS)

    doubler = Doubler()
    return asyncio.run(run()), doubler


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def submit_all(
    batcher: Batcher, numbers: Sequence[int], **options: Any
) -> list[asyncio.Task[CallOutput]]:
    return [asyncio.ensure_future(batcher.submit("g", n, **options)) for n in numbers]


def test_each_gets_its_own_output() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> list[int]:
        answers = await asyncio.gather(*submit_all(batcher, range(8)))
        return [answer.output for answer in answers]

    outputs, doubler = run_batcher(use)
    assert outputs == [0, 2, 4, 6, 8, 10, 12, 14]
    assert sorted(n for call in doubler.calls for n in call) == list(range(8))


def test_a_full_call_does_not_wait_for_the_delay() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> list[int]:
        answers = await asyncio.gather(*submit_all(batcher, range(4)))
        return [answer.batch_size for answer in answers]

    sizes, doubler = run_batcher(use, max_delay_seconds=3600.0)
    assert sizes == [4, 4, 4, 4]
    assert doubler.calls == [[0, 1, 2, 3]]


def test_a_call_is_made_at_once_where_more_would_not_be_better() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> None:
        await batcher.submit("g", 1)

    _, doubler = run_batcher(use, max_delay_seconds=3600.0, best_batch=1)
    assert doubler.calls == [[1]]


def test_a_call_that_does_not_fill_is_made_after_the_delay() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> CallOutput:
        return await batcher.submit("g", 1)

    answer, doubler = run_batcher(use, max_delay_seconds=0.05)
    assert answer.output == 2
    assert answer.queue_seconds >= 0.05
    assert doubler.calls == [[1]]


def test_what_waits_while_a_call_runs_shares_the_next() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> None:
        doubler.gate.clear()
        first = submit_all(batcher, [1])
        await until(lambda: doubler.calls == [[1]])
        rest = submit_all(batcher, [2, 3, 4])
        await until(lambda: batcher.num_waiting == 3)
        doubler.gate.set()
        await asyncio.gather(*first, *rest)

    _, doubler = run_batcher(use, best_batch=1)
    assert doubler.calls == [[1], [2, 3, 4]]


def test_a_call_holds_no_more_clips_than_the_largest_may() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> list[int]:
        answers = await asyncio.gather(*submit_all(batcher, [1, 2, 3], size=2))
        return [answer.batch_size for answer in answers]

    sizes, doubler = run_batcher(use)
    assert doubler.calls == [[1, 2], [3]]
    assert sizes == [4, 4, 2]


def test_work_that_is_larger_than_a_call_has_one_for_itself() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> CallOutput:
        big, _ = await asyncio.gather(batcher.submit("g", 1, size=30), batcher.submit("g", 2))
        return big

    big, doubler = run_batcher(use, max_waiting=64)
    assert big.output == 2
    assert doubler.calls == [[1], [2]]


def test_groups_do_not_share_calls() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*(batcher.submit(n % 2, n) for n in range(4)))

    _, doubler = run_batcher(use)
    assert sorted(doubler.calls) == [[0, 2], [1, 3]]


def test_calls_are_not_shared_where_rows_depend_on_each_other() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*submit_all(batcher, [1, 2, 3]))

    _, doubler = run_batcher(use, shares_calls=False, max_delay_seconds=3600.0)
    assert doubler.calls == [[1], [2], [3]]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> RequestRefusedError:
        doubler.gate.clear()
        running = submit_all(batcher, [0])
        await until(lambda: bool(doubler.calls))
        waiting = submit_all(batcher, range(1, 9))
        await until(lambda: batcher.num_waiting == 8)
        with pytest.raises(RequestRefusedError, match="8 clips wait and 8 may") as caught:
            await batcher.submit("g", 9)
        doubler.gate.set()
        await asyncio.gather(*running, *waiting)
        return caught.value

    error, doubler = run_batcher(use, best_batch=1)
    assert (error.status, error.code) == (429, "queue_full")
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0
    assert 9 not in [n for call in doubler.calls for n in call]


def test_the_time_to_come_back_follows_the_measured_rate() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> tuple[float, float]:
        doubler.gate.clear()
        slow = submit_all(batcher, [1])
        await until(lambda: bool(doubler.calls))
        await asyncio.sleep(0.2)
        doubler.gate.set()
        await asyncio.gather(*slow)
        doubler.gate.clear()
        more = submit_all(batcher, [2])
        await until(lambda: len(doubler.calls) == 2)
        more += submit_all(batcher, range(3, 8))
        await until(lambda: batcher.num_waiting == 5)
        times = batcher.seconds_per_clip, batcher.retry_after_seconds
        doubler.gate.set()
        await asyncio.gather(*more)
        return times

    (per_clip, retry_after), _ = run_batcher(use, best_batch=1)
    assert per_clip >= 0.2  # one clip took that long
    assert retry_after == pytest.approx(5 * per_clip)


def test_cancelled_work_leaves_the_queue_and_is_never_computed() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> int:
        doubler.gate.clear()
        first = submit_all(batcher, [1])
        await until(lambda: bool(doubler.calls))
        second, third = submit_all(batcher, [2, 3])
        await until(lambda: batcher.num_waiting == 2)
        second.cancel()
        await asyncio.wait([second])
        num_waiting = batcher.num_waiting
        doubler.gate.set()
        await asyncio.gather(*first, third)
        return num_waiting

    num_waiting, doubler = run_batcher(use, best_batch=1)
    assert num_waiting == 1
    assert doubler.calls == [[1], [3]]


def test_work_whose_deadline_passes_is_refused_and_never_computed() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> RequestRefusedError:
        doubler.gate.clear()
        first = submit_all(batcher, [1])
        await until(lambda: bool(doubler.calls))
        deadline = asyncio.get_running_loop().time() + 0.05
        with pytest.raises(RequestRefusedError, match="not done within its time") as caught:
            await batcher.submit("g", 2, deadline=deadline)
        doubler.gate.set()
        await asyncio.gather(*first)
        return caught.value

    error, doubler = run_batcher(use, best_batch=1)
    assert error.status == 504
    assert doubler.calls == [[1]]


def test_a_near_deadline_makes_a_call_that_would_have_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So long before the deadline that a busy machine does not miss it.
    monkeypatch.setattr(batcher_module, "_MARGIN_SECONDS", 59.0)

    async def use(batcher: Batcher, doubler: Doubler) -> CallOutput:
        return await batcher.submit("g", 1, deadline=asyncio.get_running_loop().time() + 59.5)

    answer, _ = run_batcher(use, max_delay_seconds=3600.0)
    assert answer.output == 2


def test_a_failure_is_that_of_who_caused_it_alone() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> list[Any]:
        tasks = submit_all(batcher, [1, 13, 2, 3])
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    outcomes, _ = run_batcher(use)
    assert [getattr(outcome, "output", None) for outcome in outcomes] == [2, None, 4, 6]
    assert isinstance(outcomes[1], InferenceError)


def test_a_drain_finishes_what_is_there_and_refuses_what_comes() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> tuple[list[int], bool]:
        doubler.gate.clear()
        tasks = submit_all(batcher, range(6))
        await until(lambda: bool(doubler.calls))
        draining = asyncio.ensure_future(batcher.drain(TIMEOUT_SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefusedError, match="is ending"):
            await batcher.submit("g", 7)
        doubler.gate.set()
        answers = await asyncio.gather(*tasks)
        return [answer.output for answer in answers], await draining

    (outputs, is_done), _ = run_batcher(use)
    assert outputs == [0, 2, 4, 6, 8, 10]
    assert is_done


def test_a_drain_that_takes_too_long_refuses_what_still_waits() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> tuple[bool, list[Any]]:
        doubler.gate.clear()
        running = submit_all(batcher, [1])
        await until(lambda: bool(doubler.calls))
        waiting = submit_all(batcher, [2])
        await asyncio.sleep(0)
        is_done = await batcher.drain(0.05)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        running[0].cancel()
        return is_done, outcomes

    (is_done, outcomes), _ = run_batcher(use, best_batch=1)
    assert not is_done
    assert [outcome.status for outcome in outcomes] == [503]


def test_other_work_runs_in_the_same_thread_between_calls() -> None:
    names = []

    async def use(batcher: Batcher, doubler: Doubler) -> None:
        name = batcher.in_thread(lambda: threading.current_thread().name)
        names.append(await asyncio.wrap_future(name))

    run_batcher(use)
    assert names[0].startswith("actionclip-runtime")


def test_each_call_is_reported() -> None:
    reported: list[tuple[Hashable, int]] = []

    async def use(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*submit_all(batcher, range(4)))

    run_batcher(use, on_call=lambda *call: reported.append(call[:2]))
    assert reported == [("g", 4)]


def test_many_who_come_and_go_all_get_their_own_answer() -> None:
    async def use(batcher: Batcher, doubler: Doubler) -> list[tuple[int, Any]]:
        async def one(n: int) -> tuple[int, Any]:
            await asyncio.sleep((n * 7919 % 50) / 5000)
            task = asyncio.ensure_future(batcher.submit(n % 3, n, size=n % 5 + 1))
            if n % 11 == 0:
                await asyncio.sleep(0.001)
                task.cancel()
            return n, (await asyncio.gather(task, return_exceptions=True))[0]

        return list(await asyncio.gather(*(one(n) for n in range(14, 514))))

    outcomes, _ = run_batcher(use, max_waiting=10_000)
    for n, outcome in outcomes:
        if isinstance(outcome, CallOutput):
            assert outcome.output == 2 * n
        else:
            assert n % 11 == 0
            assert isinstance(outcome, asyncio.CancelledError)
