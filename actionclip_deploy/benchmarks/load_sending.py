"""Sends the requests of a load measurement, and compares each answer with the one without load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from actionclip_deploy.benchmarks.load import ANSWERED, Outcome
from actionclip_deploy.benchmarks.load_requests import LoadRequest, ReadAnswer, read_answer
from actionclip_deploy.errors import BenchmarkError, MissingExtraError

try:
    import httpx
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark --url", "client") from exc

# Of a score, or of a value of an embedding. A call with other clips in it may round otherwise: in
# fp16 a cosine by 5e-4, which the scale of 100 and the softmax make 0.0125 of a score.
TOLERANCE = 0.05
# By so much an answer may be nearer to another request's: answers to noise differ by little.
_SLACK = 1e-3
# A pool of httpx looks at all of its connections for each request, so there are several pools.
_CONNECTIONS_PER_POOL = 8


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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in self._pools:
            await pool.aclose()

    async def learn_answers(self) -> None:
        """Send every request once, alone, and keep its answer; this warms the server up, too.

        Raises:
            BenchmarkError: If one is not answered; says what the server said.
        """
        for index, request in enumerate(self._requests):
            try:
                response = await asyncio.wait_for(self._post(request), self._timeout_seconds)
            except (httpx.HTTPError, asyncio.TimeoutError) as exc:
                raise BenchmarkError(
                    f"The server did not answer a first request ({str(exc) or 'time is up'}); see "
                    "that it runs, or give more time with --timeout."
                ) from exc
            if response.status_code != 200:
                raise BenchmarkError(
                    f"The server refused a first request with status {response.status_code}: "
                    f"{_sentence(response)}"
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
            response = await asyncio.wait_for(
                self._post(self._requests[index]), self._timeout_seconds
            )
        except asyncio.TimeoutError:
            return Outcome("timeout")
        except httpx.HTTPError:
            return Outcome("connection")
        if response.status_code != 200:
            return Outcome(f"{response.status_code} {_code(response)}".strip())
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
        self._num_under_way[place] += 1
        try:
            return await self._pools[place].post(
                request.path, content=request.body, headers=request.headers
            )
        finally:
            self._num_under_way[place] -= 1


def _distance(answer: ReadAnswer, expected: ReadAnswer | None) -> float:
    if expected is None or answer.values.shape != expected.values.shape:
        return float("inf")
    return float(np.abs(answer.values - expected.values).max(initial=0.0))


def _code(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return "" if isinstance(error, str) else str(error["code"])
    except (ValueError, TypeError, KeyError):
        return ""


def _sentence(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return error if isinstance(error, str) else str(error["message"])
    except (ValueError, TypeError, KeyError):
        return "it says no more; check the address."
