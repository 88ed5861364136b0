"""What tests of the server share: a service without graphs, and videos that take no decoder.

Tests import it by name: `from serving import running_app`.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fakes import FakeRuntime, write_fake_bundle
from starlette.testclient import TestClient

from actionclip_deploy.archive import ArchivedVideo, ArchiveModel, ArchiveWriter
from actionclip_deploy.indexing import recording_time
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.search import Archive
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
    archive: Path | None = None,
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
        archive=None if archive is None else Archive.open(archive),
    )
    if fake_pool:
        model = service.manifest.model
        service.pool = FakePool(model.num_frames, model.input_size)  # type: ignore[assignment]
    return service


# A start that says MP4, and bytes of which each part can be told from the others.
MP4_BYTES = b"\0\0\0\x18ftypisom" + bytes(range(256)) * 40
SHOWN = {"yard/20261130_181500.mp4": "run", "door/1.mp4": "walk"}
WINDOWS = 20  # of each video, of 4 seconds, one every half second; the tenth shows the text


def text_embeddings(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Of texts as labels, the mean over the templates by its definition, unit norm."""
    bundle = write_fake_bundle(folder / "for_banks")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), texts, name="texts")
    mean = bank.embeddings.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def archive_model(folder: Path) -> ArchiveModel:
    """What archives of the service's bundle note of it."""
    bundle = write_fake_bundle(folder / "for_banks")
    width = bundle.manifest.model.embedding_dim
    hashes = (bundle.visual_sha256, bundle.textual_sha256)
    return ArchiveModel(str(bundle.path), *hashes, width, 4.0, 0.5, "fake", 2.0)


def put_video(
    writer: ArchiveWriter, path: Path, shown: np.ndarray, *, picture: bytes | None = None
) -> np.ndarray:
    """Put a video that shows an embedding while its tenth window lasts; gives those of all windows.

    The windows around it show as much of it as they overlap.
    """
    rows = np.random.default_rng(list(os.fsencode(path.name))).standard_normal(
        (WINDOWS, len(shown))
    )
    rows -= (rows @ shown)[:, np.newaxis] * shown  # nothing of it elsewhere
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    share = np.clip(1 - np.abs(np.arange(WINDOWS) - 9) / 8, 0, 1)[:, np.newaxis]
    rows = share * shown + np.sqrt(1 - share**2) * rows
    starts = 0.5 * np.arange(WINDOWS)
    state = path.stat()
    video = ArchivedVideo(
        path=str(path),
        folder=path.parent.name,
        size_bytes=state.st_size,
        modified_ns=state.st_mtime_ns,
        recorded_seconds=recording_time(path),
        duration_seconds=float(starts[-1] + 4),
    )
    spans = np.stack([starts, starts + 4], axis=1)
    writer.put(video, spans, rows, [] if picture is None else [(0, picture)])
    return rows


def write_archive(
    folder: Path,
    *,
    shown: Mapping[str, str] = SHOWN,
    content: bytes = MP4_BYTES,
    picture: bytes | None = b"a picture",
) -> Path:
    """An archive of videos in `recordings`, by the text that each of them shows.

    Args:
        folder: Of both.
        shown: Texts by the names of files.
        content: Of each file.
        picture: That is kept of all windows of the first video.
    """
    embeddings = text_embeddings(folder, list(shown.values()))
    with ArchiveWriter.open(folder / "archive", archive_model(folder)) as writer:
        for number, name in enumerate(shown):
            path = folder / "recordings" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            put_video(writer, path, embeddings[number], picture=None if number else picture)
    return folder / "archive"


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
