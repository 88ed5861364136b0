"""A server under load, in a time that passes only where something waits for it."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from serving import npy_bytes

from actionclip_deploy.benchmarks.charts import draw_load
from actionclip_deploy.benchmarks.load import (
    ANSWERED,
    LoadPlan,
    LoadReport,
    LoadRequest,
    LoadResult,
    LoadSettings,
    Measured,
    Outcome,
    Sample,
    Sender,
    infer_request,
    make_requests,
    measure_load,
    poisson_arrivals,
    read_answer,
    run_closed_loop,
    run_open_loop,
    summarise,
)
from actionclip_deploy.benchmarks.report import write_report
from actionclip_deploy.errors import BenchmarkError

Result = TypeVar("Result")

URL = "http://server.test"
INFO = {
    "model": {"backbone": "fake", "num_frames": 4, "input_size": 8, "embedding_dim": 16},
    "runtime": {"name": "fake", "execution_provider": "numpy", "precision": "fp32"},
}


class _SkippingSelector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Where a loop would wait, its time is moved on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen any more"
        self.now += timeout
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is a number; what runs takes no time in it."""

    def __init__(self) -> None:
        self._skipping = _SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


def run(work: Coroutine[Any, Any, Result]) -> Result:
    loop = _VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class OneAtATime:
    """A server that takes so long for a request, and does one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self.received: list[tuple[int, float]] = []

    async def send(self, number: int) -> Outcome:
        self.received.append((number, asyncio.get_running_loop().time()))
        async with self._lock:
            await asyncio.sleep(self._seconds)
        return Outcome(ANSWERED, batch_size=1)


def test_arrivals_are_poisson_and_the_seed_decides_them() -> None:
    times = poisson_arrivals(50.0, 200.0, (0, 1))
    gaps = np.diff(times, prepend=0.0)
    assert (gaps > 0).all()
    assert times[-1] <= 200.0
    # 10,000 of them: the mean of exponential gaps is within 3 % with a chance of 99.7 %, and
    # their standard deviation is as large as their mean.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    counts = np.histogram(times, bins=200, range=(0, 200))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.35)
    np.testing.assert_array_equal(times, poisson_arrivals(50.0, 200.0, (0, 1)))
    assert not np.array_equal(times, poisson_arrivals(50.0, 200.0, (1, 1)))


def test_requests_are_sent_when_they_are_due_whatever_the_server_does() -> None:
    async def measure() -> Any:
        server = OneAtATime(1.0)
        samples = await run_open_loop(server.send, np.array([0.25, 0.5, 0.75, 5.0]))
        return server.received, samples

    received, samples = run(measure())
    assert received == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 5.0)]
    assert [sample.due for sample in samples] == [0.25, 0.5, 0.75, 5.0]
    assert [sample.ended for sample in samples] == [1.25, 2.25, 3.25, 6.0]
    # The wait for those before counts: from when each was due.
    assert [sample.latency_seconds for sample in samples] == [1.0, 1.75, 2.5, 1.0]
    assert all(sample.lag_seconds == 0.0 for sample in samples)


def test_a_generator_that_is_late_counts_from_the_schedule_and_tells_its_lag() -> None:
    async def measure() -> Any:
        loop = asyncio.get_running_loop()

        async def send(_: int) -> Outcome:
            loop._skipping.now += 0.5  # type: ignore[attr-defined]  # busy, and blocks the loop
            return Outcome(ANSWERED)

        return await run_open_loop(send, np.array([1.0, 1.125]))

    first, second = run(measure())
    assert (first.due, first.started, first.ended) == (1.0, 1.0, 1.5)
    assert (second.due, second.started, second.ended) == (1.125, 1.5, 2.0)
    assert second.latency_seconds == 0.875
    assert second.lag_seconds == 0.375
    result = summarise([first, second], seconds=2.0, slo_ms=1000, offered_per_second=1.0)
    assert result.lag_ms == 375.0


def test_clients_of_a_closed_loop_wait_for_their_answers() -> None:
    async def measure() -> Any:
        server = OneAtATime(0.25)
        return server, await run_closed_loop(server.send, 2, 1.0)

    server, samples = run(measure())
    # Two are under way at any time; the server does four a second, and what has begun ends.
    assert server.received == [(0, 0.0), (1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75)]
    assert [sample.ended for sample in samples] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert [sample.latency_seconds for sample in samples] == [0.25, 0.5, 0.5, 0.5, 0.5]
    result = summarise(samples, seconds=1.0, slo_ms=400, num_clients=2)
    assert result.seconds == 1.25
    assert result.answered_per_second == 4.0
    assert result.goodput_per_second == 0.8


def sample(due: float, latency: float, kind: str = ANSWERED, **more: Any) -> Sample:
    return Sample(due, due, due + latency, Outcome(kind, **more))


def test_the_numbers_of_a_rate_are_those_of_its_samples() -> None:
    samples = [
        *(sample(0.5, 0.1, batch_size=2), sample(1.0, 0.2, batch_size=4)),
        sample(1.5, 2.5, is_wrong=True),
        *(sample(2.0, 0.05, "429 queue_full"), sample(2.5, 0.05, "429 queue_full")),
        sample(3.0, 30.0, "timeout"),
    ]
    result = summarise(samples, seconds=4.0, slo_ms=200, offered_per_second=1.5)
    assert (result.num_sent, result.num_answered, result.num_wrong) == (6, 3, 1)
    assert result.errors == {"429 queue_full": 2, "timeout": 1}
    assert result.error_rate == 0.5
    assert result.answered_per_second == 0.75
    assert result.goodput_per_second == 0.5
    assert result.share_in_time == pytest.approx(2 / 6)
    assert result.mean_batch_size == 3.0
    latency = result.latency_ms
    assert latency is not None
    assert latency.num_requests == 3
    assert (latency.p50, latency.maximum) == (pytest.approx(200), pytest.approx(2500))
    assert latency.p90 is latency.p95 is latency.p99 is None


def test_answers_that_come_long_after_the_sending_do_not_look_like_throughput() -> None:
    # 100 requests in a second, of a server that does 10 a second.
    samples = [sample(n / 100, (n + 1) / 10 - n / 100) for n in range(100)]
    result = summarise(samples, seconds=1.0, slo_ms=1000, offered_per_second=100.0)
    assert result.answered_per_second == pytest.approx(10.0)
    # Number n waits (n + 1) / 10 - n / 100: up to n = 10 that is a second at most.
    assert result.goodput_per_second == pytest.approx(11 / 1.1)
    assert result.latency_ms is not None
    assert result.latency_ms.p99 is not None


def test_nothing_answered_gives_no_latency() -> None:
    result = summarise([sample(0.1, 1, "timeout")], seconds=1, slo_ms=1, offered_per_second=1)
    assert result.latency_ms is None
    assert result.mean_batch_size is None
    assert result.error_rate == 1.0


def test_rates_double_until_the_server_does_not_follow() -> None:
    steps: list[str] = []

    async def measure() -> Measured:
        server = OneAtATime(0.05)  # 20 a second
        plan = LoadPlan(duration_seconds=20.0, slo_ms=1000.0)
        return await measure_load(server.send, plan, on_step=steps.append)

    measured = run(measure())
    rates = [result.offered_per_second for result in measured.open_loop]
    assert rates == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert all(result.share_in_time > 0.9 for result in measured.open_loop[:-1])
    assert measured.open_loop[-1].answered_per_second == pytest.approx(20.0, rel=0.01)
    assert measured.stopped_because is not None
    assert "at 32 requests per second" in measured.stopped_because
    assert "within 1000 ms, fewer than 90%" in measured.stopped_because
    assert steps[-1] == "32 requests per second"
    assert measured.closed_loop is None


def test_given_rates_are_all_measured_after_the_clients() -> None:
    async def measure() -> Measured:
        server = OneAtATime(0.5)
        plan = LoadPlan(rates=(8.0, 1.0), num_clients=4, duration_seconds=10.0, slo_ms=100.0)
        return await measure_load(server.send, plan)

    measured = run(measure())
    assert [result.offered_per_second for result in measured.open_loop] == [8.0, 1.0]
    assert measured.closed_loop is not None
    assert measured.closed_loop.answered_per_second == pytest.approx(2.0)
    assert measured.stopped_because is None

    async def clients_alone() -> Measured:
        return await measure_load(OneAtATime(0.5).send, LoadPlan(num_clients=1))

    assert run(clients_alone()).open_loop == ()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"duration_seconds": 0.0}, "duration_seconds is 0.0"),
        ({"slo_ms": float("nan")}, "slo_ms is nan"),
        ({"rates": (1.0, -2.0)}, "The rates are 1, -2"),
        ({"num_clients": 0}, "num_clients is 0"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadPlan(**plan)


# What is sent, and what comes back.


def answer(*scores: float, batch_size: int | None = 3) -> httpx.Response:
    result = {"predictions": [{"label": "a", "score": score} for score in scores]}
    body = {"results": [{**result, "batch_size": batch_size}]}
    return httpx.Response(200, text=json.dumps(body))  # which can hold NaN, unlike httpx's JSON


def refused(status: int, code: str) -> httpx.Response:
    error = {"code": code, "message": f"It is {code}; do something.", "request_id": "1"}
    return httpx.Response(status, json={"error": error})


async def use_sender(
    handler: Callable[[httpx.Request], Any], use: Callable[[Sender], Awaitable[Result]], **more: Any
) -> Result:
    requests = [LoadRequest("/v1/classify", {"x-number": str(n)}, b"body") for n in range(2)]
    options = {"headers": {"authorization": "Bearer k"}, "connections": 4, "timeout_seconds": 2.0}
    transport = httpx.MockTransport(handler)
    async with Sender(URL, requests, transport=transport, **{**options, **more}) as sender:
        return await use(sender)


def test_outcomes_name_what_went_wrong() -> None:
    first = iter([answer(0.5), answer(0.5)])
    later = iter(
        [
            answer(0.5),
            answer(0.5004),
            answer(0.4),
            answer(0.5, 0.5),
            httpx.Response(200, text="no JSON"),
            refused(429, "queue_full"),
            httpx.Response(502, text="a proxy"),
            httpx.ReadError("it broke"),
        ]
    )

    def handler(_: httpx.Request) -> httpx.Response:
        given = next(first, None) or next(later)
        if isinstance(given, Exception):
            raise given
        return given

    async def use(sender: Sender) -> list[Outcome]:
        await sender.learn_answers()
        return [await sender.send(number) for number in range(8)]

    outcomes = run(use_sender(handler, use))
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [*[ANSWERED] * 5, "429 queue_full", "502", "connection"]
    assert [outcome.is_wrong for outcome in outcomes[:5]] == [False, False, True, True, True]
    assert outcomes[0].batch_size == 3


def test_an_answer_to_another_request_is_wrong_however_near_it_is() -> None:
    given = iter([answer(0.5), answer(0.51), answer(0.5005), answer(0.5), answer(float("nan"))])

    async def use(sender: Sender) -> list[Outcome]:
        await sender.learn_answers()
        return [await sender.send(number) for number in (0, 1, 0)]

    outcomes = run(use_sender(lambda _: next(given), use))
    assert [outcome.is_wrong for outcome in outcomes] == [False, True, True]


def test_requests_take_turns_carry_the_key_and_are_not_repeated() -> None:
    seen: list[tuple[str, str, bytes]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        headers = request.headers
        seen.append((headers["x-number"], headers["authorization"], request.content))
        return refused(503, "not_ready")

    async def use(sender: Sender) -> None:
        for number in range(3):
            assert (await sender.send(number)).kind == "503 not_ready"

    run(use_sender(handler, use))
    assert seen == [(number, "Bearer k", b"body") for number in ("0", "1", "0")]


def test_a_request_that_takes_too_long_is_given_up() -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(1000)
        return answer(0.5)

    async def use(sender: Sender) -> list[Sample]:
        return await run_open_loop(sender.send, np.array([0.0, 1.0]))

    first, second = run(use_sender(handler, use))
    assert first.outcome.kind == second.outcome.kind == "timeout"
    assert (first.ended, second.ended) == (2.0, 3.0)


def test_open_loop_over_http_counts_the_wait_for_a_connection() -> None:
    async def measure() -> list[Sample]:
        # Two connections, each taken for a second by a request.
        connections = asyncio.Semaphore(2)

        async def handler(_: httpx.Request) -> httpx.Response:
            async with connections:
                await asyncio.sleep(1.0)
            return answer(0.5)

        async def use(sender: Sender) -> list[Sample]:
            return await run_open_loop(sender.send, np.array([0.0, 0.0, 0.5]))

        return await use_sender(handler, use, timeout_seconds=60.0)

    assert [each.latency_seconds for each in run(measure())] == [1.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (refused(404, "unknown_bank"), "with status 404: It is unknown_bank; do something"),
        (httpx.Response(500, text="oh"), "with status 500: it says no more; check the address"),
        (httpx.Response(200, json={"hello": 1}), "otherwise than `actionclip serve` does"),
        (httpx.ConnectError("no route"), "did not answer a first request (no route)"),
    ],
)
def test_a_server_that_does_not_answer_rightly_is_not_measured(
    given: httpx.Response | Exception, message: str
) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.raises(BenchmarkError) as caught:
        run(use_sender(handler, Sender.learn_answers))
    assert message in str(caught.value)


def test_videos_are_sent_as_the_bytes_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"the bytes of a video")
    (made,) = make_requests("video", INFO, labels="mine", videos=[tmp_path / "a.mp4"])
    assert made.path == "/v1/classify"
    assert made.headers["content-type"].startswith("multipart/form-data; boundary=")
    for part in (b"the bytes of a video", b'name="video"; filename="a.mp4"', b"mine"):
        assert made.body.count(part) == 1
    with pytest.raises(BenchmarkError, match=r"none\.mp4 cannot be read"):
        make_requests("video", INFO, labels="mine", videos=[tmp_path / "none.mp4"])
    with pytest.raises(BenchmarkError, match="give one with --video"):
        make_requests("video", INFO, labels="mine")


def test_frames_and_embeddings_are_sent_as_arrays_and_differ() -> None:
    frames = make_requests("frames", INFO, labels=["a", "b"])
    embeddings = make_requests("embeddings", INFO, labels=["a", "b"])
    assert b'name="frames"' in frames[0].body
    assert b'name="embeddings"' in embeddings[0].body
    assert b'["a", "b"]' in embeddings[0].body
    for made in (frames, embeddings):
        assert len({each.body.split(b"NUMPY")[1] for each in made}) == len(made) == 8
    start = embeddings[0].body.index(b"\x93NUMPY")
    size = len(npy_bytes(np.zeros((1, 16), np.float32)))
    with_values = embeddings[0].body[start : start + size]
    vector = np.frombuffer(with_values[-64:], np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)


def test_tensors_are_sent_in_the_binary_form_of_the_inference_protocol() -> None:
    clip = np.arange(1 * 4 * 8 * 8 * 3, dtype=np.uint8).reshape(1, 4, 8, 8, 3)
    made = infer_request(clip, "frames")
    assert made.path == "/v2/models/clip/infer"
    length = int(made.headers["inference-header-content-length"])
    header = json.loads(made.body[:length])
    assert header["inputs"] == [
        {
            "name": "frames",
            "shape": [1, 4, 8, 8, 3],
            "datatype": "UINT8",
            "parameters": {"binary_data_size": 768},
        }
    ]
    assert made.body[length:] == clip.tobytes()
    several = make_requests("tensors", INFO, labels="none")
    assert len({each.body for each in several}) == 8


def test_an_answer_in_binary_form_is_read_as_numbers() -> None:
    values = np.array([[0.25, -1.5]], np.float32)
    header = b'{"outputs": []}'
    headers = httpx.Headers({"Inference-Header-Content-Length": str(len(header))})
    read = read_answer(headers, header + values.tobytes())
    np.testing.assert_array_equal(read.values, [0.25, -1.5])
    assert read.batch_size is None


def make_report(results: tuple[LoadResult, ...], closed: LoadResult | None) -> LoadReport:
    return LoadReport(
        created="2025-01-01T00:00:00+00:00",
        commit=None,
        url=URL,
        is_local=False,
        server=INFO,
        settings=LoadSettings(
            **{"mode": "video", "labels": "mine", "num_bodies": 1, "mean_body_bytes": 9.0},
            **{"duration_seconds": 10.0, "slo_ms": 500.0, "timeout_seconds": 30.0},
            connections=8,
            seed=0,
        ),
        machine={},
        versions={},
        open_loop=results,
        closed_loop=closed,
        stopped_because=None,
    )


def test_a_report_is_written_as_json_and_drawn(tmp_path: Path) -> None:
    few = summarise([sample(0, 0.1)], seconds=1, slo_ms=500, offered_per_second=1)
    many = summarise([sample(0, 0.1)] * 200, seconds=1, slo_ms=500, offered_per_second=2)
    none = summarise([sample(0, 1, "timeout")], seconds=1, slo_ms=500, offered_per_second=4)
    closed = summarise([sample(0, 0.1)], seconds=1, slo_ms=500, num_clients=1)
    for number, report in enumerate(
        (
            make_report((few, many, none), closed),
            make_report((), closed),
            make_report((none,), None),
        )
    ):
        write_report(report, tmp_path / "l.json")
        assert LoadReport.model_validate_json((tmp_path / "l.json").read_text()) == report
        draw_load(report, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
