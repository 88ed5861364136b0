"""A server under load: goodput and latency at growing rates of requests, `actionclip load`.

In an open loop the next request does not wait for the last answer, as strangers do not either, and
latency counts from the moment at which a request was due. A generator that waits for answers sends
less when the server is slow, and so leaves out the very requests that would have been late.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from actionclip_deploy import motions
from actionclip_deploy.benchmarks.report import PERCENTILES, ReportPart, percentile_if_known
from actionclip_deploy.benchmarks.runner import describe_surroundings
from actionclip_deploy.client import uploads
from actionclip_deploy.errors import ArgumentError, BenchmarkError, MissingExtraError
from actionclip_deploy.files import opening_may_wait

try:
    import httpx
except ImportError as exc:
    raise MissingExtraError("actionclip load", "client") from exc

Mode = Literal["video", "frames", "tensors", "embeddings"]
MODES: tuple[Mode, ...] = get_args(Mode)

ANSWERED = "answered"
MIN_SHARE_IN_TIME = 0.9
MAX_RATE = 2.0**14
_MAXIMA = {"duration_seconds": 86_400, "slo_ms": 3_600_000}  # arrivals are drawn beforehand
_REST_SECONDS = 1.0  # between two rates

_LOCAL = ("127.0.0.1", "::1", "localhost")
_NUM_RENDERED = 4  # videos, where none is given
_NUM_BODIES = 8  # of arrays, which nobody gave
_FRAME_SHAPE = (240, 320, 3)  # H, W and RGB of what stands for a camera's frames
_TENSOR_MODEL = "clip"
HEADER_LENGTH = "inference-header-content-length"

# Of a score, or of a value of an embedding. A call with other clips in it may round otherwise: in
# fp16 a cosine by 5e-4, which the scale of 100 and the softmax make 0.0125 of a score.
TOLERANCE = 0.05
# By so much an answer may be nearer to another request's: answers to noise differ by little.
_SLACK = 1e-3
# A pool of httpx looks at all of its connections for each request, so there are several pools.
_CONNECTIONS_PER_POOL = 8


# The report.


class LatencyMs(ReportPart):
    """Latencies of the requests that were answered, in ms, from when each was due.

    A percentile is null where there are too few of them: p99 needs 100.
    """

    num_requests: int
    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    maximum: float


class LoadResult(ReportPart):
    """What the server did at one rate, or for so many clients."""

    offered_per_second: float | None = Field(
        description="requests that arrive per second, on average; null in a closed loop"
    )
    num_clients: int | None = Field(description="of a closed loop; null in an open one")
    seconds: float = Field(
        description="in which requests were sent; in a closed loop, until the last answer"
    )
    num_sent: int
    num_answered: int
    num_wrong: int = Field(
        description="answers that differ from the one to the same request without load"
    )
    errors: dict[str, int] = Field(
        description="requests without an answer: by status and code, `timeout`, `connection`"
    )
    error_rate: float = Field(description="share of those that were sent, 0 to 1")
    answered_per_second: float = Field(
        description="over `seconds`, or until the last answer where that is longer"
    )
    goodput_per_second: float = Field(
        description="answered within `slo_ms`, over `seconds` or until the last of them"
    )
    share_in_time: float = Field(description="answered within `slo_ms`, of those sent, 0 to 1")
    latency_ms: LatencyMs | None = Field(description="null where nothing was answered")
    mean_batch_size: float | None = Field(
        description="clips in a call of the runtime, averaged over answers; null where they do "
        "not tell"
    )
    lag_ms: float = Field(description="by how much the generator was late: p99, or the maximum")


class LoadSettings(ReportPart):
    """What was asked for."""

    mode: Mode
    labels: str = Field(description="the label bank, or how many labels each request brings")
    num_bodies: int = Field(description="different requests, which take turns")
    mean_body_bytes: float
    duration_seconds: float
    slo_ms: float
    timeout_seconds: float
    connections: int
    seed: int


class LoadReport(ReportPart):
    """Everything that one run of `actionclip load` found out."""

    version: Literal[1] = 1
    created: str = Field(description="UTC, ISO 8601")
    commit: str | None = Field(description="of the toolkit's checkout; null where it is installed")
    url: str
    is_local: bool = Field(description="whether the server shared this machine")
    server: dict[str, Any] = Field(description="what /v1/info told")
    settings: LoadSettings
    machine: dict[str, Any] = Field(description="where the load came from")
    versions: dict[str, str]
    open_loop: tuple[LoadResult, ...]
    closed_loop: LoadResult | None
    stopped_because: str | None = Field(description="why no higher rate was tried")


# What is measured, from the plan to the numbers of each rate.


@dataclass(frozen=True)
class LoadPlan:
    """What is measured."""

    # Requests per second. Without any they double from 1 up to the first at which fewer than 9 of
    # 10 requests are answered within `slo_ms`: what was refused, failed or came late is too much
    # then, whichever of the three it was.
    rates: tuple[float, ...] = ()
    # Of the closed loop; None leaves it out. With clients and no rates the open loop is left out.
    num_clients: int | None = None
    duration_seconds: float = 10.0  # of each measurement
    slo_ms: float = 1000.0  # within which an answer is of use
    seed: int = 0  # of the arrivals, and of the arrays that are sent

    def __post_init__(self) -> None:
        for name in ("duration_seconds", "slo_ms"):
            value, most = getattr(self, name), _MAXIMA[name]
            if not 0 < value <= most:
                raise ArgumentError(name, f"is {value}; it must be positive, and {most:,} at most.")
        if not all(0 < rate <= MAX_RATE for rate in self.rates):
            raise ValueError(
                f"The rates are {', '.join(f'{rate:g}' for rate in self.rates)}; each must be "
                f"above 0 and at most {MAX_RATE:g} per second."
            )
        if self.num_clients is not None and self.num_clients < 1:
            raise ArgumentError("num_clients", f"is {self.num_clients}; it must be 1 or more.")


@dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    kind: str  # `ANSWERED`; otherwise why not: status and code, `timeout`, or `connection`
    batch_size: int | None = None  # clips in its call of the runtime, where the answer tells
    is_wrong: bool = False  # whether the answer differs from the one that was given without load


@dataclass(frozen=True)
class RequestTiming:
    """One request; times in seconds since the measurement began."""

    due: float  # when it had to be sent; in a closed loop, when it was
    started: float  # when it was sent
    ended: float  # when its answer was there, or it was given up
    outcome: Outcome

    @property
    def latency_seconds(self) -> float:
        """From when it was due."""
        return self.ended - self.due

    @property
    def lag_seconds(self) -> float:
        """How late it was sent, which is the generator's own fault."""
        return self.started - self.due


# Sends the request of a number, and never raises for what the server does.
Send = Callable[[int], Awaitable[Outcome]]
Tell = Callable[[str], None]


class Measured(NamedTuple):
    """The part of a report that was measured."""

    open_loop: tuple[LoadResult, ...]
    closed_loop: LoadResult | None
    stopped_because: str | None


def run_load(
    url: str,
    info: dict[str, Any],
    plan: LoadPlan,
    *,
    labels: str | Sequence[str],
    templates: Sequence[str] | None = None,
    allow_unknown_words: bool = False,
    mode: Mode = "video",
    videos: Sequence[Path] = (),
    api_key: str | None = None,
    connections: int = 512,
    timeout_seconds: float = 30.0,
    on_step: Tell = lambda _: None,
) -> LoadReport:
    """Put a server under load.

    Args:
        url: Address of the server.
        info: What it told at /v1/info.
        plan: What is measured.
        labels: Name of a bank, or labels that each request brings along.
        templates: As of `Client.classify`.
        allow_unknown_words: As of `Client.classify`.
        mode: What is sent, see `make_requests`.
        videos: Files for the mode `video`; without any, some are rendered.
        api_key: The server's key.
        connections: Requests that may be under way; more wait, and their time counts.
        timeout_seconds: After which a request is given up.
        on_step: Called with a short sentence when a step begins.

    Raises:
        BenchmarkError: If a first request is not answered, or a video cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="actionclip-load-") as folder:
        if mode == "video" and not videos:
            videos = _render_videos(Path(folder))
        requests = make_requests(
            mode,
            info,
            labels=labels,
            templates=templates,
            allow_unknown_words=allow_unknown_words,
            videos=videos,
            seed=plan.seed,
        )

    async def measure() -> Measured:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        async with Sender(
            url,
            requests,
            headers=headers,
            connections=connections,
            timeout_seconds=timeout_seconds,
        ) as sender:
            await sender.learn_answers()
            return await measure_load(sender.send, plan, on_step=on_step)

    measured = asyncio.run(measure())
    surroundings = describe_surroundings()
    return LoadReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=surroundings["commit"],
        url=url,
        is_local=urlsplit(url).hostname in _LOCAL,
        server=info,
        settings=LoadSettings(
            mode=mode,
            labels=labels if isinstance(labels, str) else f"{len(labels)} labels",
            num_bodies=len(requests),
            mean_body_bytes=sum(len(each.body) for each in requests) / len(requests),
            duration_seconds=plan.duration_seconds,
            slo_ms=plan.slo_ms,
            timeout_seconds=timeout_seconds,
            connections=connections,
            seed=plan.seed,
        ),
        machine=surroundings["machine"],
        versions=surroundings["versions"],
        **measured._asdict(),
    )


def _render_videos(folder: Path) -> list[Path]:
    every = motions.labels("test")
    chosen = every[:: len(every) // _NUM_RENDERED][:_NUM_RENDERED]
    return [
        motions.write_video(folder / f"{seed}.mp4", motions.render_clip(label, seed=seed))
        for seed, label in enumerate(chosen)
    ]


async def measure_load(send: Send, plan: LoadPlan, *, on_step: Tell = lambda _: None) -> Measured:
    """Measure what a plan says, with requests that `send` sends."""
    closed = None
    if plan.num_clients is not None:
        on_step(f"{plan.num_clients} clients, one request after the other")
        samples = await run_closed_loop(send, plan.num_clients, plan.duration_seconds)
        closed = summarise(
            samples,
            seconds=plan.duration_seconds,
            slo_ms=plan.slo_ms,
            num_clients=plan.num_clients,
        )
    results: list[LoadResult] = []
    why = None
    doubles = not plan.rates and plan.num_clients is None
    todo = [1.0] if doubles else list(plan.rates)
    for rate in todo:  # which grows meanwhile
        on_step(f"{rate:g} requests per second")
        # The rate is in the seed: its arrivals are the same whichever rates come before it.
        seed = (plan.seed, round(rate * 1000))
        samples = await run_open_loop(send, poisson_arrivals(rate, plan.duration_seconds, seed))
        await asyncio.sleep(_REST_SECONDS)
        results.append(
            summarise(
                samples,
                seconds=plan.duration_seconds,
                slo_ms=plan.slo_ms,
                offered_per_second=rate,
            )
        )
        if doubles:
            why = _why_stop(rate, results[-1].share_in_time, plan.slo_ms)
            if why is None:
                todo.append(2 * rate)
    return Measured(tuple(results), closed, why)


def _why_stop(rate: float, share_in_time: float, slo_ms: float) -> str | None:
    if share_in_time < MIN_SHARE_IN_TIME:
        return (
            f"at {rate:g} requests per second {share_in_time:.0%} were answered within "
            f"{slo_ms:g} ms, fewer than {MIN_SHARE_IN_TIME:.0%}"
        )
    return f"{MAX_RATE:g} requests per second is the highest rate" if rate >= MAX_RATE else None


def poisson_arrivals(
    rate: float, duration_seconds: float, seed: Sequence[int]
) -> NDArray[np.float64]:
    """Times at which requests arrive that know nothing of each other.

    Args:
        rate: Requests per second, on average.
        duration_seconds: None is later than that.
        seed: The same seed gives the same times.

    Returns:
        Seconds in ascending order; how many there are is random too.
    """
    rng = np.random.default_rng(list(seed))
    expected = rate * duration_seconds
    times = np.empty(0)
    last = 0.0
    while last <= duration_seconds:
        # Nearly always enough at the first try: five standard deviations more than expected.
        more = last + rng.exponential(1 / rate, int(expected + 5 * expected**0.5) + 5).cumsum()
        times = np.concatenate([times, more])
        last = float(times[-1])
    return times[times <= duration_seconds]


async def run_open_loop(send: Send, arrivals: NDArray[np.float64]) -> list[RequestTiming]:
    """Send a request at each arrival and wait for all answers.

    Args:
        send: Sends one, in a time that it bounds itself.
        arrivals: Seconds from now, ascending.

    Returns:
        A sample for each arrival, in their order.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def one(index: int, due: float) -> RequestTiming:
        started = loop.time() - begin
        outcome = await send(index)
        return RequestTiming(due, started, loop.time() - begin, outcome)

    tasks = []
    try:
        for index, due in enumerate(arrivals.tolist()):
            # Also where it is late: the loop has to have its turn between two requests.
            await asyncio.sleep(max(0.0, begin + due - loop.time()))
            tasks.append(asyncio.ensure_future(one(index, due)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def run_closed_loop(
    send: Send, num_clients: int, duration_seconds: float
) -> list[RequestTiming]:
    """Let clients send one request after the other, each as soon as its last one is over.

    No request begins after `duration_seconds`; those that have begun are waited for.

    Returns:
        A sample for each request, in the order of their ends.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    samples: list[RequestTiming] = []
    num_sent = 0

    async def client() -> None:
        nonlocal num_sent
        while (started := loop.time() - begin) < duration_seconds:
            index, num_sent = num_sent, num_sent + 1
            outcome = await send(index)
            samples.append(RequestTiming(started, started, loop.time() - begin, outcome))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return samples


def summarise(
    samples: Sequence[RequestTiming],
    *,
    seconds: float,
    slo_ms: float,
    offered_per_second: float | None = None,
    num_clients: int | None = None,
) -> LoadResult:
    """The numbers of one rate, from the samples of all requests that were sent in `seconds`.

    Either `offered_per_second` of an open loop or `num_clients` of a closed one is given.
    """
    answered = [each for each in samples if each.outcome.kind == ANSWERED]
    errors = Counter(each.outcome.kind for each in samples if each.outcome.kind != ANSWERED)
    if num_clients is not None:
        seconds = max([seconds, *(each.ended for each in samples)])
    in_time = [each for each in answered if each.latency_seconds * 1000 <= slo_ms]
    sizes = [each.outcome.batch_size for each in answered if each.outcome.batch_size is not None]
    return LoadResult(
        offered_per_second=offered_per_second,
        num_clients=num_clients,
        seconds=seconds,
        num_sent=len(samples),
        num_answered=len(answered),
        num_wrong=sum(each.outcome.is_wrong for each in answered),
        errors=dict(errors.most_common()),
        error_rate=1 - len(answered) / len(samples) if samples else 0.0,
        answered_per_second=_per_second(answered, seconds),
        goodput_per_second=_per_second(in_time, seconds),
        share_in_time=len(in_time) / len(samples) if samples else 1.0,
        latency_ms=_latencies([each.latency_seconds * 1000 for each in answered]),
        mean_batch_size=float(np.mean(sizes)) if sizes else None,
        lag_ms=_lag_ms(samples),
    )


def _per_second(samples: Sequence[RequestTiming], seconds: float) -> float:
    return len(samples) / max([seconds, *(each.ended for each in samples)])


def _latencies(latencies_ms: Sequence[float]) -> LatencyMs | None:
    if not latencies_ms:
        return None
    values = np.asarray(latencies_ms)
    found = {name: percentile_if_known(values, of) for name, of in PERCENTILES.items()}
    median = found.pop("median")
    assert median is not None
    return LatencyMs(
        num_requests=len(values),
        mean=float(values.mean()),
        p50=median,
        **found,
        maximum=float(values.max()),
    )


def _lag_ms(samples: Sequence[RequestTiming]) -> float:
    if not samples:
        return 0.0
    lags = np.array([each.lag_seconds * 1000 for each in samples])
    return float(np.percentile(lags, 99) if len(lags) >= 100 else lags.max())


# What is sent, made once; and what is compared of an answer.


@dataclass(frozen=True)
class LoadRequest:
    """A request, as bytes; the path follows the server's address."""

    path: str
    headers: dict[str, str]
    body: bytes


class ReadAnswer(NamedTuple):
    """What is compared of an answer."""

    values: NDArray[np.float64]  # the best scores, or the embedding
    batch_size: int | None  # clips in its call of the runtime; None where it does not tell


def make_requests(
    mode: Mode,
    info: dict[str, Any],
    *,
    labels: str | Sequence[str],
    templates: Sequence[str] | None = None,
    allow_unknown_words: bool = False,
    videos: Sequence[Path] = (),
    input_name: str = "frames",
    seed: int = 0,
) -> list[LoadRequest]:
    """Different requests of one kind, to be sent in turn.

    Args:
        mode: `video` uploads files; `frames` uploads arrays of frames, which take no decoding;
            `tensors` sends clips as the model takes them to /v2; `embeddings` is scoring alone.
        info: What the server told of itself.
        labels: Name of a bank, or labels that each request brings along.
        templates: As of `Client.classify`.
        allow_unknown_words: As of `Client.classify`.
        videos: Files for `video`.
        input_name: Of the input of the model `clip`, for `tensors`.
        seed: Of the arrays.

    Raises:
        BenchmarkError: If there are no files for `video`, or one cannot be read.
    """
    fields = {"labels": labels if isinstance(labels, str) else json.dumps(list(labels))}
    if templates is not None:
        fields["templates"] = json.dumps(list(templates))
    if allow_unknown_words:  # an older server does not know the field
        fields["allow_unknown_words"] = "true"
    if mode == "video":
        if not videos:
            raise BenchmarkError("There is no video to send; give one with --video.")
        return [_classify(_read(path), path.name, fields) for path in videos]
    rng = np.random.default_rng(seed)
    model = info["model"]
    num_frames, size, width = model["num_frames"], model["input_size"], model["embedding_dim"]
    made = []
    for _ in range(_NUM_BODIES):
        if mode == "frames":
            given = rng.integers(0, 256, (num_frames, *_FRAME_SHAPE), np.uint8)
            made.append(_classify(given, "frames.npy", fields))
        elif mode == "embeddings":
            vector = rng.standard_normal((1, width)).astype(np.float32)
            vector /= np.linalg.norm(vector)
            made.append(_classify(vector, "embeddings.npy", fields))
        else:
            clip = rng.integers(0, 256, (1, num_frames, size, size, 3), np.uint8)
            made.append(infer_request(clip, input_name))
    return made


def infer_request(clip: NDArray[np.uint8], input_name: str) -> LoadRequest:
    """A clip, uint8 (B, T, S, S, 3), in the inference protocol's binary form."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": input_name,
                    "shape": list(clip.shape),
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": clip.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return LoadRequest(f"/v2/models/{_TENSOR_MODEL}/infer", headers, header + clip.tobytes())


def _classify(video: bytes | NDArray[Any], name: str, fields: dict[str, str]) -> LoadRequest:
    (part,) = uploads(video)
    assert isinstance(part.source, bytes)
    request = httpx.Request(
        "POST",
        "http://localhost/v1/classify",
        data=fields,
        files={part.field: (name, part.source, "application/octet-stream")},
    )
    headers = {"content-type": request.headers["content-type"]}
    return LoadRequest("/v1/classify", headers, request.read())


def _read(path: Path) -> bytes:
    try:
        if opening_may_wait(path):
            raise BenchmarkError(f"{path} is a pipe, a socket or a device; give a video's file.")
        return path.read_bytes()
    except OSError as exc:
        raise BenchmarkError(
            f"{path} cannot be read ({exc.strerror}); give a video that exists."
        ) from exc


def read_answer(headers: httpx.Headers, body: bytes) -> ReadAnswer:
    """What is compared of an answer.

    Raises:
        ValueError: If it is not as the server answers.
    """
    length = headers.get(HEADER_LENGTH)
    try:
        if length is not None:
            values = np.frombuffer(body[int(length) :], np.float32).astype(np.float64)
            return ReadAnswer(values, None)
        (result,) = json.loads(body)["results"]
        scores = [each["score"] for each in result["predictions"]]
        # 0 is an answer that took no call.
        return ReadAnswer(np.array(scores, np.float64), result.get("batch_size") or None)
    except (KeyError, TypeError) as exc:
        raise ValueError(f"the answer has no {exc}") from exc


class Sender:
    """Sends requests in turn, without retries; an asynchronous context manager.

    Args:
        url: Address of the server.
        requests: What is sent: number i sends request i modulo their number.
        headers: Of every request, such as its key.
        connections: Requests that may be under way; more wait, and their time counts.
        timeout_seconds: After which a request is given up.
        transport: What carries requests instead of the network, for tests.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[LoadRequest],
        *,
        headers: dict[str, str],
        connections: int,
        timeout_seconds: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._requests = requests
        self._expected: list[ReadAnswer | None] = [None] * len(requests)
        self._timeout_seconds = timeout_seconds
        certificates = httpx.create_ssl_context()  # read from disk once, not for each pool
        num_pools = -(-connections // _CONNECTIONS_PER_POOL)
        per_pool = -(-connections // num_pools)
        self._pools = [
            httpx.AsyncClient(
                base_url=url,
                headers=headers,
                transport=transport,
                verify=certificates,
                timeout=None,
                limits=httpx.Limits(max_connections=per_pool, max_keepalive_connections=per_pool),
            )
            for _ in range(num_pools)
        ]
        self._num_under_way = [0] * num_pools

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in self._pools:
            await pool.aclose()

    async def learn_answers(self) -> None:
        """Send every request once, alone, and keep its answer; this warms the server up, too.

        Raises:
            BenchmarkError: If one is not answered; says what the server said.
        """
        for index, request in enumerate(self._requests):
            try:
                response = await self._post(request)
            except (httpx.HTTPError, asyncio.TimeoutError) as exc:
                raise BenchmarkError(
                    f"The server did not answer a first request ({str(exc) or 'time is up'}); see "
                    "that it runs, or give more time with --timeout."
                ) from exc
            if response.status_code != 200:
                raise BenchmarkError(
                    f"The server refused a first request with status {response.status_code}: "
                    f"{_error_field(response, 'message') or 'it says no more; check the address.'}"
                )
            try:
                self._expected[index] = read_answer(response.headers, response.content)
            except ValueError as exc:
                raise BenchmarkError(
                    f"The server answered a first request otherwise than `actionclip serve` does "
                    f"({exc}); check the address."
                ) from exc

    async def send(self, number: int) -> Outcome:
        """Send one request; what goes wrong is an outcome, too."""
        index = number % len(self._requests)
        try:
            response = await self._post(self._requests[index])
        except asyncio.TimeoutError:
            return Outcome("timeout")
        except httpx.HTTPError:
            return Outcome("connection")
        if response.status_code != 200:
            return Outcome(f"{response.status_code} {_error_field(response, 'code')}".strip())
        try:
            answer = read_answer(response.headers, response.content)
        except ValueError:
            return Outcome(ANSWERED, is_wrong=True)
        return Outcome(ANSWERED, answer.batch_size, self._is_wrong(index, answer))

    def _is_wrong(self, index: int, answer: ReadAnswer) -> bool:
        """Whether it is not what was answered without load, or rather another request's."""
        if self._expected[index] is None:
            return False
        distances = [_distance(answer, each) for each in self._expected]
        return not distances[index] <= min(TOLERANCE, min(distances) + _SLACK)  # NaN is wrong

    async def _post(self, request: LoadRequest) -> httpx.Response:
        place = self._num_under_way.index(min(self._num_under_way))
        sent = self._pools[place].post(request.path, content=request.body, headers=request.headers)
        self._num_under_way[place] += 1
        try:
            # Not httpx's own timeout: that one begins anew with each part of an answer.
            return await asyncio.wait_for(sent, self._timeout_seconds)
        finally:
            self._num_under_way[place] -= 1


def _distance(answer: ReadAnswer, expected: ReadAnswer | None) -> float:
    if expected is None or answer.values.shape != expected.values.shape:
        return float("inf")
    return float(np.abs(answer.values - expected.values).max(initial=0.0))


def _error_field(response: httpx.Response, name: Literal["code", "message"]) -> str:
    """What a refusal says, which in /v2 is its message alone; empty where it is none of ours."""
    try:
        error = response.json()["error"]
        if isinstance(error, str):
            return error if name == "message" else ""
        return str(error[name])
    except (ValueError, TypeError, KeyError):
        return ""
