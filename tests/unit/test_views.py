"""Full calls across jobs, against encoding each row alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from actionclip_deploy.views import Job, encode_in_full_calls

COUNTS = [3, 0, 1, 12, 5, 0, 4]


def rows_of(owner: int, count: int) -> np.ndarray:
    return np.arange(count * 2, dtype=np.uint8).reshape(count, 2) + np.uint8(10 * owner)


def jobs(counts: list[int]) -> Iterator[Job[int]]:
    for owner, count in enumerate(counts):
        rows = rows_of(owner, count)
        yield Job(owner, count, lambda start, stop, rows=rows: rows[start:stop])


class Encoder:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.sizes.append(len(rows))
        return rows.astype(np.float32) * 3


@pytest.mark.parametrize("rows_per_call", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("shares_calls", [True, False])
def test_each_job_gets_the_outputs_of_its_own_rows(rows_per_call: int, shares_calls: bool) -> None:
    encoder = Encoder()
    done = list(
        encode_in_full_calls(
            jobs(COUNTS), encoder, rows_per_call=rows_per_call, shares_calls=shares_calls
        )
    )
    assert [job.owner for job in done] == list(range(len(COUNTS)))
    for job, count in zip(done, COUNTS, strict=True):
        if count:
            np.testing.assert_array_equal(job.output(), rows_of(job.owner, count) * np.float32(3))
    assert max(encoder.sizes) <= rows_per_call
    assert sum(encoder.sizes) == sum(COUNTS)


def test_calls_are_full_but_for_the_last() -> None:
    encoder = Encoder()
    list(encode_in_full_calls(jobs(COUNTS), encoder, rows_per_call=4))
    assert encoder.sizes == [4] * 6 + [1]


def test_calls_that_are_not_shared_end_with_their_job() -> None:
    encoder = Encoder()
    list(encode_in_full_calls(jobs([3, 9, 4]), encoder, rows_per_call=4, shares_calls=False))
    assert encoder.sizes == [3, 4, 4, 1, 4]


def test_no_more_jobs_are_drawn_than_fill_a_call() -> None:
    drawn = []

    def watched() -> Iterator[Job[int]]:
        for job in jobs([2] * 10):
            drawn.append(job.owner)
            yield job

    done = encode_in_full_calls(watched(), Encoder(), rows_per_call=4)
    assert next(done).owner == 0
    assert drawn == [0, 1]


def test_the_time_of_a_call_is_shared_out_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    first, second = encode_in_full_calls(jobs([1, 3]), Encoder(), rows_per_call=4)
    assert (first.seconds, second.seconds) == (2.0, 6.0)
