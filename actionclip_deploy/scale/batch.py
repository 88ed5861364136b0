"""What is done to each of many videos: fetched, decoded, encoded, scored, put into a row.

    with BatchReader(manifest, settings) as reader:
        for rows in Scorer(runtime, settings, run, ranker).tables(reader.read_all(videos)):
            ...  # Arrow tables of the schema

Engines schedule these steps: `score_here` in this process and its decoding processes, `ray_data`
on the machines of a cluster. Each step of a video takes its failure along to the row.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Coroutine, Generator, Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.command_records import BatchRunRecord
from actionclip_deploy.errors import ArgumentError, MissingExtraError, RequestRefusedError
from actionclip_deploy.files import sha256_of
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import Manifest, ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import Ranker
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.sampling import Views
from actionclip_deploy.scale.result_folder import result_schema, run_sha256
from actionclip_deploy.scale.storage import (
    FailedFetchError,
    Failure,
    FetchRoom,
    ListedVideo,
    fetched,
)
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob, DecodePool
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.video import MAX_PIXELS
from actionclip_deploy.views import (
    ReadingStoppedError,
    ViewFrames,
    default_num_workers,
    encode_views,
    work_ahead,
)

try:
    import pyarrow as pa
except ImportError as exc:
    raise MissingExtraError("A table of results", "parquet") from exc

GIB = 1024**3
# Threads that fetch while as many as decode wait for their process.
_FETCHERS = 4
_ROWS_PER_TABLE = 64
_TABLE_SECONDS = 2.0
_START_SECONDS = 120.0
_STEP_SECONDS = 0.2
_SETTLE_SECONDS = 0.05
# What a server bounds for each client has no bound here but time and memory.
_NO_BOUND, _NO_BOUND_SECONDS = 10**9, 1e7

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class BatchSettings:
    """How each video is read and scored.

    Attributes:
        views: Clips and crops per video.
        top_k: Labels of a row; 0 for none, where embeddings alone are wanted.
        method: How scores are made; None takes the manifest's.
        region: See `Recognizer`.
        max_pixels: Of a frame; a video with larger ones fails.
        embeddings: Whether rows have the embeddings of the views.
        decode_seconds: Most time that decoding one video may take.
        decode_memory_bytes: Most memory that a process may take for it.
        fetch_bytes: Most bytes of fetched files that lie on a machine at a time, for each process
            that fetches.
        num_workers: Decoding processes of this machine; None takes one per core, at most 8.
    """

    views: Views = field(default_factory=Views)
    top_k: int = 5
    method: ScoreMethod | None = None
    region: Region = "frame"
    max_pixels: int = MAX_PIXELS
    embeddings: bool = False
    decode_seconds: float = 120.0
    decode_memory_bytes: int = 2 * GIB
    fetch_bytes: int = 8 * GIB
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("decode_seconds", "decode_memory_bytes", "fetch_bytes", "max_pixels"):
            if not getattr(self, name) > 0:
                raise ArgumentError(
                    name, f"is {getattr(self, name)}; it must be a positive number."
                )

    def run(self, bundle: Bundle, bank: LabelBank | None) -> BatchRunRecord:
        """What a row depends on but for its video."""
        manifest = bundle.manifest
        return BatchRunRecord(
            kind="embed" if bank is None else "predict",
            bundle_sha256=sha256_of((bundle.path / "manifest.json").read_bytes()),
            bank=None if bank is None or bank.is_adhoc else bank.name,
            bank_sha256=None if bank is None else bank.sha256,
            views=str(self.views),
            scores=None if bank is None else bank.method_for(self.method, manifest.scores.method),
            resize=self.region,
            top_k=None if bank is None else self.top_k,
            embeddings=self.embeddings,
            max_pixels=self.max_pixels,
        )

    def ranker(self, manifest: Manifest, bank: LabelBank | None) -> Ranker | None:
        """What scores embeddings; None without labels."""
        if bank is None:
            return None
        method = bank.method_for(self.method, manifest.scores.method)
        return Ranker(bank, method, manifest.scores.scale, self.top_k)


@dataclass(frozen=True, eq=False)
class ReadVideo(ViewFrames):
    """The views of one video of a list, or why there are none.

    Attributes:
        video: Of the list.
        failure: None where there are views.
        warnings: Damage that was found.
        seconds: By stage.
    """

    video: ListedVideo
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failed(cls, video: ListedVideo, failure: Failure, seconds: dict[str, float]) -> ReadVideo:
        """A video that gave no frames."""
        pixels, views = np.empty((0, 0, 0, 3), np.uint8), np.empty((0, 0), np.int64)
        return cls(pixels, views, video, failure, seconds=seconds)


class BatchReader:
    """Fetches and decodes videos, in processes that may die; a context manager.

    Args:
        manifest: Of the model's bundle.
        settings: Limits, views, and how many processes.

    Raises:
        RuntimeUnavailableError: If a decoding process does not start, on entering the block.
    """

    def __init__(self, manifest: Manifest, settings: BatchSettings) -> None:
        self._settings = settings
        self._num_workers = settings.num_workers or default_num_workers()
        self._room = FetchRoom(settings.fetch_bytes)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="actionclip-decode", daemon=True)
        limits = Limits(
            duration_seconds=_NO_BOUND_SECONDS,
            frames=_NO_BOUND,
            waiting_decodes=_NO_BOUND,
            views=settings.views.num_views,
            pixels=settings.max_pixels,
            decode_seconds=settings.decode_seconds,
            decode_memory_bytes=settings.decode_memory_bytes,
        )
        self._pool = DecodePool(manifest, limits, num_workers=self._num_workers)

    def __enter__(self) -> BatchReader:
        self._thread.start()
        try:
            self._wait(self._pool.start(), _START_SECONDS)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._wait(self._pool.stop(), None)
        # The loop is told of the pipes of processes that have ended only now.
        self._wait(asyncio.sleep(_SETTLE_SECONDS), None)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def read_all(self, videos: Iterable[ListedVideo]) -> Generator[ReadVideo, None, None]:
        """Read videos in their order, several at a time and some ahead."""
        num_threads = self._num_workers + _FETCHERS
        return work_ahead(videos, self.read, num_workers=num_threads, max_ahead=2 * num_threads)

    def read(self, video: ListedVideo, stop: Event | None = None) -> ReadVideo:
        """Fetch and decode one video.

        Raises:
            FileWriteError: If there is no room on the disk.
        """
        seconds = {}
        started = time.perf_counter()
        try:
            with fetched(video, self._room, stop=stop) as path:
                seconds["fetch"] = time.perf_counter() - started
                job = DecodeJob(path, video.uri, self._settings.views, region=self._settings.region)
                decoded = self._decode(job, stop)
        except FailedFetchError as exc:
            seconds["fetch"] = time.perf_counter() - started
            return ReadVideo.failed(video, exc.failure, seconds)
        except RequestRefusedError as exc:
            return ReadVideo.failed(video, _failure(exc), seconds)
        seconds["decode"] = decoded.timings_ms["total"] / 1000
        return ReadVideo(
            decoded.pixels, decoded.views, video, warnings=decoded.warnings, seconds=seconds
        )

    def _decode(self, job: DecodeJob, stop: Event | None) -> Decoded:
        decoding = asyncio.run_coroutine_threadsafe(self._pool.decode(job), self._loop)
        while True:
            try:
                return decoding.result(_STEP_SECONDS)
            except FutureTimeoutError:
                if stop is not None and stop.is_set():
                    decoding.cancel()
                    raise ReadingStoppedError from None

    def _wait(self, work: Coroutine[Any, Any, ResultT], seconds: float | None) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)


def _failure(refusal: RequestRefusedError) -> Failure:
    """A refusal in the words of whoever has a list of videos, and not a server to ask."""
    found = str(refusal).partition(";")[0]
    if refusal.limit == "time":
        return Failure("timed_out", f"{found}; raise it (--decode-seconds), or cut the video.")
    if refusal.limit == "memory":
        found = found.replace("The server had", "There was")
        return Failure("out_of_memory", f"{found}; raise the limit (--decode-mib), or resume.")
    if refusal.limit == "crash":
        return Failure("decoder_crashed", f"{found}; convert it, to H.264 for instance.")
    if refusal.code == "video_too_large":
        return Failure("video_too_large", f"{found}; raise --max-pixels, or make it smaller.")
    return Failure("video_unreadable", str(refusal))


class Scorer:
    """Encodes what was read, in calls that videos share, and puts it into rows.

    Args:
        runtime: An open runtime.
        settings: Of the run.
        run: What the rows share.
        ranker: None for embeddings alone.
        more: Fields of the list of videos, besides ours.
        node: The machine, as rows name it.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: BatchSettings,
        run: BatchRunRecord,
        ranker: Ranker | None,
        *,
        more: Iterable[Any] = (),
        node: str | None = None,
    ) -> None:
        info, model = runtime.describe(), runtime.manifest.model
        self.schema = result_schema(run, embedding_dim=model.embedding_dim, more=tuple(more))
        self._runtime = runtime
        self._settings = settings
        self._ranker = ranker
        self._sizes = CallSizes.of_videos(model)
        self._shared = {
            "bundle_sha256": run.bundle_sha256,
            "bank_sha256": run.bank_sha256,
            "run_sha256": run_sha256(run),
            "runtime": info.title,
            "node": node or platform.node(),
        }

    def tables(self, reads: Iterable[ReadVideo]) -> Iterator[pa.Table]:
        """Rows in tables, as soon as some have come."""
        waiting: list[dict[str, Any]] = []
        begun = time.monotonic()
        for row in self.rows(reads):
            waiting.append(row)
            if len(waiting) >= _ROWS_PER_TABLE or time.monotonic() - begun > _TABLE_SECONDS:
                yield pa.Table.from_pylist(waiting, schema=self.schema)
                waiting, begun = [], time.monotonic()
        if waiting:
            yield pa.Table.from_pylist(waiting, schema=self.schema)

    def rows(self, reads: Iterable[ReadVideo]) -> Iterator[dict[str, Any]]:
        """A row for each video, in their order.

        Raises:
            InferenceError: If the runtime fails.
        """
        for encoded in encode_views(self._runtime, reads, sizes=self._sizes):
            read = encoded.work
            row = self._about(read)
            if read.failure is None:
                row["seconds"]["encode"] = sum(encoded.seconds.values())
                self._score(row, encoded.embeddings)
            yield row

    def _about(self, read: ReadVideo) -> dict[str, Any]:
        video, failure = read.video, read.failure
        return {
            "uri": video.uri,
            "etag": video.etag,
            "size": video.size_bytes,
            "status": "ok" if failure is None else "failed",
            "error_class": None if failure is None else failure.kind,
            "error": None if failure is None else failure.message,
            "warnings": list(read.warnings),
            "seconds": dict(read.seconds),
            **self._shared,
            **video.columns,
        }

    def _score(self, row: dict[str, Any], embeddings: Any) -> None:
        if self._settings.embeddings:
            row["embeddings"] = list(embeddings)
        if self._ranker is None:
            return
        started = time.perf_counter()
        ranking = self._ranker.rank(embeddings)
        row["labels"] = [best.label for best in ranking.predictions]
        row["scores"] = [best.score for best in ranking.predictions]
        row["is_unknown"] = None if ranking.answer is None else ranking.answer.label is None
        row["seconds"]["score"] = time.perf_counter() - started


def score_here(
    videos: Iterable[ListedVideo], reader: BatchReader, scorer: Scorer
) -> Generator[pa.Table, None, None]:
    """Score videos in this process; gives tables of rows as they come."""
    with closing(reader.read_all(videos)) as reads:
        yield from scorer.tables(reads)
