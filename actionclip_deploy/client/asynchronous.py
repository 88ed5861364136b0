"""`AsyncClient`: asks a server from an event loop of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from actionclip_deploy.client import operations
from actionclip_deploy.client.answers import (
    BankState,
    RefusedVideo,
    ServerEmbeddings,
    ServerPrediction,
)
from actionclip_deploy.client.exchange import Attempt, Outcome, Result, Steps
from actionclip_deploy.client.operations import OnProgress
from actionclip_deploy.client.settings import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    make_connection,
    make_headers,
)
from actionclip_deploy.client.uploads import Videos
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views

if TYPE_CHECKING:
    import httpx


class AsyncClient:
    """`Client` for asyncio: the same methods with the same arguments, to be awaited.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (result,) = await client.classify("video.mp4", "mine")
            print(result.predictions[0])

    Args:
        base_url: Address of the server, such as http://127.0.0.1:8000.
        api_key: One of the server's keys; None where it has none.
        timeout_seconds: Of one method with its retries.
        max_retries: Attempts after the first one.
        transport: What carries requests instead of the network, for tests.

    Raises:
        MissingExtraError: If httpx is not installed.
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        from actionclip_deploy.client import sending

        self._connection = make_connection(base_url, timeout_seconds, max_retries)
        self._send = sending.send_async
        self._http = sending.open_async_client(base_url, make_headers(api_key), transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def classify(
        self,
        videos: Videos,
        labels: str | Sequence[str],
        *,
        top_k: int = 5,
        views: Views | str = "1x1",
        templates: Sequence[str] | None = None,
        multi_label: bool = False,
        per_template: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[ServerPrediction | RefusedVideo, ...]:
        """As `Client.classify`."""
        return await self._run(
            operations.classify(
                self._connection,
                videos,
                labels,
                top_k=top_k,
                views=views,
                templates=templates,
                multi_label=multi_label,
                per_template=per_template,
                timeout_seconds=timeout_seconds,
            )
        )

    async def embed(
        self,
        videos: Videos,
        *,
        views: Views | str = "1x1",
        timeout_seconds: float | None = None,
    ) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
        """As `Client.embed`."""
        return await self._run(
            operations.embed(self._connection, videos, views=views, timeout_seconds=timeout_seconds)
        )

    async def embed_texts(
        self, texts: Sequence[str], *, timeout_seconds: float | None = None
    ) -> Float32Array:
        """Embed prompts as they are: unit norm, float32, shape (M, D)."""
        return await self._run(
            operations.embed_texts(self._connection, texts, timeout_seconds=timeout_seconds)
        )

    async def list_banks(self) -> tuple[BankState, ...]:
        """All label banks of the server, by name, without their labels."""
        return await self._run(operations.list_banks(self._connection))

    async def get_bank(self, name: str) -> BankState:
        """One label bank, with its labels, its last versions and its build."""
        return await self._run(operations.get_bank(self._connection, name))

    async def put_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        timeout_seconds: float = 600.0,
    ) -> BankState:
        """As `Client.put_bank`."""
        return await self._run(
            operations.put_bank(
                self._connection,
                name,
                labels,
                templates,
                wait=wait,
                on_progress=on_progress,
                timeout_seconds=timeout_seconds,
            )
        )

    async def delete_bank(self, name: str) -> None:
        """Remove a label bank from the server, or end its build."""
        await self._run(operations.delete_bank(self._connection, name))

    async def diff(self, name: str, old: int, new: int | None = None) -> LabelBankDiff:
        """What changed from one version of a bank to another; None is the active one."""
        return await self._run(operations.diff(self._connection, name, old, new))

    async def info(self) -> dict[str, Any]:
        """What runs: version, bundle, model, runtime, batching, banks, limits."""
        return await self._run(operations.info(self._connection))

    async def is_ready(self) -> bool:
        """Whether there is a server that takes requests at this moment."""
        return await self._run(operations.is_ready(self._connection))

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """As `Client.wait_until_ready`."""
        await self._run(operations.wait_until_ready(self._connection, timeout_seconds))

    async def _run(self, steps: Steps[Result]) -> Result:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if isinstance(step, Attempt):
                outcome = await self._send(self._http, step)
            else:
                await asyncio.sleep(step.seconds)
                outcome = None
