"""What tests of the server share: a service without graphs, and videos that take no decoder.

Tests import it by name: `from serving import running_app`.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fakes import FakeRuntime, write_fake_bundle
from starlette.testclient import TestClient

from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.settings import Limits, ServerSettings
from actionclip_deploy.sinks import Sink
from actionclip_deploy.watch import Camera

Result = TypeVar("Result")


class FakePool:
    """Stands in for the decoding processes: a file's bytes are the seed of its pixels."""

    num_waiting = 0
    num_replaced = 0
    process_ids = ()

    def __init__(self, num_frames: int, size: int, *, delay_seconds: float = 0.0) -> None:
        self._shape = (num_frames, size, size, 3)
        self.delay_seconds = delay_seconds

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def decode(self, job: DecodeJob, *, deadline: float | None = None) -> Decoded:
        rng = np.random.default_rng(list(job.path.read_bytes()))
        await asyncio.sleep(self.delay_seconds)
        num_views = job.views.num_views
        num_frames = self._shape[0]
        indices = np.tile(sample_segments(20, num_frames), (job.views.num_clips, 1))
        return Decoded(
            pixels=rng.integers(0, 256, self._shape, np.uint8),
            views=np.tile(np.arange(num_frames), (num_views, 1)),
            indices=indices,
            pts_seconds=indices / 10,
            timings_ms={"open": 0.0, "read": 0.0, "preprocess": 0.0, "total": 0.0},
            warnings=(),
            wait_seconds=0.0,
        )


def make_service(
    folder: Path,
    *,
    runtime: Callable[[Any], Runtime] = FakeRuntime,
    fake_pool: bool = True,
    banks: Sequence[LabelBank] = (),
    limits: dict[str, Any] | None = None,
    known: str | None = None,
    source_file: str = "fake.pt",
    cameras: Sequence[Camera] = (),
    sinks: Sequence[Sink] = (),
    **settings: Any,
) -> Service:
    """A service of a bundle without graphs, that is not verified; not started yet.

    With `known`, its text encoder was trained on those words alone.
    """
    bundle = write_fake_bundle(folder / "bundle", known=known, source_file=source_file)
    for bank in banks:
        bank.save(bundle)
    given = {"verify": False, "workers": 1, "max_batch": 4, "max_delay_ms": 1.0}
    given["allowed_hosts"] = ("testserver",)  # which starlette's client asks for
    service = Service(
        bundle,
        runtime(bundle.manifest),
        ServerSettings(**{**given, **settings}, limits=Limits(**(limits or {}))),
        cameras=cameras,
        sinks=sinks,
    )
    if fake_pool:
        model = service.manifest.model
        service.pool = FakePool(model.num_frames, model.input_size)  # type: ignore[assignment]
    return service


@contextmanager
def running_app(folder: Path, **options: Any) -> Iterator[TestClient]:
    """A client of the application, in this process; `client.service` is its service."""
    service = make_service(folder, **options)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.service = service  # type: ignore[attr-defined]
        yield client


def run_service(
    folder: Path, use: Callable[[Service], Awaitable[Result]], **options: Any
) -> Result:
    """Start a service, use it, stop it."""

    async def run() -> Result:
        service = make_service(folder, **options)
        await service.start()
        try:
            return await use(service)
        finally:
            await service.stop()

    return asyncio.run(run())


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def error_of(response: Any) -> dict[str, str]:
    """The error in a refusal's body, whose form is checked."""
    (key,) = response.json()
    assert key == "error"
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert response.headers["x-request-id"] == error["request_id"]
    assert error["message"]
    return error
