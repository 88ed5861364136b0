"""Processes that decode: a bounded number of them, killed when they take too long, and replaced.

Decoders are the part of a server that a hostile file can crash, hang or fill memory with, so none
runs in the server itself. Each process does one job at a time; jobs wait in a bounded queue.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import mmap
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import RequestRefusedError, RuntimeUnavailableError
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.views import ViewFrames

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0
_END_SECONDS = 1.0
_BACKOFF_SECONDS = 1.0
_ANSWER_BYTES = 4 * 1024 * 1024
# A job whose process ended is given to another one once: the process may have been killed by
# someone who has nothing to do with the job.
_ATTEMPTS = 2
_NEWEST = 0.2  # weight of the newest job in the measured time of one


@dataclass(frozen=True)
class DecodeJob:
    """What is to be decoded."""

    path: Path  # a video file, or a .npy file of frames
    name: str  # what its sender calls it; errors name it so
    views: Views  # clips and crops to take
    kind: Literal["video", "frames"] = "video"  # which of the two it is
    region: Region = "frame"  # see `preprocess.preprocess_frames`


@dataclass(frozen=True, eq=False)
class Decoded(ViewFrames):
    """The views of one video, as a process decoded them."""

    indices: NDArray[np.int64]  # frames of each clip, 0-based, shape (num_clips, T)
    # Their presentation times, shape (num_clips, T); None where not known.
    pts_seconds: NDArray[np.float64] | None
    timings_ms: dict[str, float]  # by stage: open, read, preprocess, total
    warnings: tuple[str, ...]  # damage that was found
    wait_seconds: float  # until a process was free


@dataclass(eq=False)
class _Entry:
    job: DecodeJob
    future: asyncio.Future[Decoded]
    entered: float
    attempts: int = 0
    memory_attempts: int = 0  # in processes that had done other jobs before
    is_waiting: bool = False

    def finish(self, outcome: Decoded | RequestRefusedError) -> None:
        if self.future.done():  # nobody waits for it any more
            return
        if isinstance(outcome, RequestRefusedError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class DecodePool:
    """Decodes videos in other processes, as a manifest says and within limits."""

    def __init__(self, manifest: Manifest, limits: Limits, *, num_workers: int) -> None:
        self.num_workers = num_workers
        self.num_replaced = 0
        self.num_waiting = 0  # videos, for a process
        self._manifest = manifest
        self._limits = limits
        # Entries that nobody waits for any more stay in it, and are not counted.
        self._waiting: asyncio.Queue[_Entry] = asyncio.Queue()
        self._slots: list[asyncio.Task[None]] = []
        self._processes: list[DecodeProcess] = []
        self._seconds_per_job = 0.1

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the processes that are there now."""
        return tuple(each.process.pid for each in self._processes)

    @property
    def retry_after_seconds(self) -> float:
        """When what waits now will have been decoded, by the measured rate."""
        return self.num_waiting * self._seconds_per_job / self.num_workers

    async def start(self) -> None:
        """Start the processes.

        Raises:
            RuntimeUnavailableError: If one does not start.
        """
        opening = [self._open() for _ in range(self.num_workers)]
        for process in await asyncio.gather(*opening):
            self._slots.append(asyncio.ensure_future(self._keep(process)))

    async def stop(self) -> None:
        """End the processes; jobs that are under way or wait are refused."""
        for slot in self._slots:
            slot.cancel()
        if self._slots:
            await asyncio.wait(self._slots)
        for process in list(self._processes):
            await self._end(process)
        while not self._waiting.empty():
            self._waiting.get_nowait().finish(refusals.shutting_down())

    async def decode(self, job: DecodeJob, *, deadline: float | None = None) -> Decoded:
        """Decode one video; cancelling this takes it out of the queue.

        Args:
            job: The video.
            deadline: When it has to be done, by the event loop's clock.

        Raises:
            RequestRefusedError: If too many wait (429), the video gives no frames (422), takes
                more than it may (413), or the deadline passes (504).
        """
        if self.num_waiting >= self._limits.waiting_decodes:
            raise refusals.queue_full(
                f"{self.num_waiting} videos wait to be decoded, which is the limit; "
                "try again after the time in Retry-After.",
                retry_after_seconds=self.retry_after_seconds,
            )
        loop = asyncio.get_running_loop()
        entry = _Entry(job, loop.create_future(), loop.time())
        self._put(entry)
        try:
            left = None if deadline is None else deadline - loop.time()
            return await asyncio.wait_for(entry.future, left)
        except asyncio.TimeoutError:
            raise refusals.deadline() from None
        finally:
            self._take(entry)

    def _put(self, entry: _Entry) -> None:
        entry.is_waiting = True
        self.num_waiting += 1
        self._waiting.put_nowait(entry)

    def _take(self, entry: _Entry) -> None:
        """Count it no longer among those that wait."""
        self.num_waiting -= entry.is_waiting
        entry.is_waiting = False

    async def _open(self) -> DecodeProcess:
        process = await DecodeProcess.open(self._manifest, self._limits)
        self._processes.append(process)
        return process

    async def _end(self, process: DecodeProcess) -> int:
        self._processes.remove(process)
        return await process.kill()

    async def _keep(self, process: DecodeProcess) -> None:
        """Keep one process at work, and have another one in its place once it ends."""
        while True:
            await self._work_with(process)
            was_worn = process.is_worn and process.process.returncode is None
            code = await self._end(process)
            self.num_replaced += 1
            if was_worn:
                logger.info("A decoding process has kept much memory and is replaced.")
            else:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                logger.warning("A decoding process ended (%s) and is replaced.", how)
            process = await self._reopen()

    async def _reopen(self) -> DecodeProcess:
        while True:
            try:
                return await self._open()
            except (RuntimeUnavailableError, OSError) as exc:
                logger.error("A decoding process cannot be replaced yet: %s", exc)
                await asyncio.sleep(_BACKOFF_SECONDS)

    async def _work_with(self, process: DecodeProcess) -> None:
        """Give jobs to a process until it has ended, or has to be."""
        while True:
            next_entry = asyncio.ensure_future(self._waiting.get())
            try:
                await asyncio.wait({next_entry, process.ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not next_entry.done():
                    next_entry.cancel()
            if not next_entry.done() or next_entry.cancelled():
                return
            entry = next_entry.result()
            self._take(entry)
            if not entry.future.done() and not await self._try(process, entry):
                return

    async def _try(self, process: DecodeProcess, entry: _Entry) -> bool:
        """Do one job; gives whether the process can go on."""
        job, clock = entry.job, asyncio.get_running_loop().time
        started = clock()
        entry.attempts += 1
        wait = started - entry.entered
        try:
            outcome = await asyncio.wait_for(process.decode(job, wait), self._limits.decode_seconds)
        except asyncio.TimeoutError:
            entry.finish(
                refusals.video_too_large(
                    f"Decoding {job.name} took more than {self._limits.decode_seconds:g} seconds, "
                    "which is the limit; send a part of it, or smaller frames.",
                    limit="time",
                )
            )
            return False
        except OutOfMemoryError as exc:
            return self._retry_elsewhere(process, entry, exc.refusal)
        except EndedError:
            self._try_again(process, entry)
            return False
        except asyncio.CancelledError:  # by `stop`
            entry.finish(refusals.shutting_down())
            raise
        self._seconds_per_job += _NEWEST * (clock() - started - self._seconds_per_job)
        entry.finish(outcome)
        return not process.is_worn

    def _retry_elsewhere(
        self, process: DecodeProcess, entry: _Entry, refusal: RequestRefusedError
    ) -> bool:
        """Believe a fresh process that a video takes too much memory; replace any other."""
        if process.num_jobs == 1:
            entry.finish(refusal)
            return not process.is_worn
        process.is_worn = True
        entry.memory_attempts += 1
        if entry.memory_attempts > self.num_workers:
            entry.finish(refusals.decoder_out_of_memory(entry.job.name))
        elif not entry.future.done():
            entry.attempts -= 1
            self._put(entry)
        return False

    def _try_again(self, process: DecodeProcess, entry: _Entry) -> None:
        if entry.attempts < _ATTEMPTS and not entry.future.done():
            self._put(entry)
            return
        if process.process.returncode == -signal.SIGKILL:  # as the system does without memory
            entry.finish(refusals.decoder_out_of_memory(entry.job.name))
            return
        entry.finish(
            refusals.video_unreadable(
                f"{entry.job.name} made the decoder crash {entry.attempts} times, so it was given "
                "up; convert it, to H.264 for instance, and send that.",
                limit="crash",
            )
        )


class EndedError(Exception):
    """The process ended before it answered."""


class OutOfMemoryError(Exception):
    """The process had not enough memory for a video; holds what a fresh one would refuse it by."""

    def __init__(self, refusal: RequestRefusedError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass(eq=False)
class DecodeProcess:
    """One decoding process and the memory that it shares with the server."""

    process: asyncio.subprocess.Process
    shared: mmap.mmap  # where it writes pixels
    # Done once the process has ended; gives its exit code.
    ended: asyncio.Task[int] = field(repr=False)
    num_jobs: int = 0
    is_worn: bool = False  # whether it has kept so much memory that it is to be replaced

    @classmethod
    async def open(cls, manifest: Manifest, limits: Limits) -> DecodeProcess:
        """Start one and wait until it is ready.

        Raises:
            RuntimeUnavailableError: If it does not start.
        """
        model = manifest.model
        size = limits.views * model.num_frames * model.input_size**2 * 3
        descriptor = os.memfd_create("actionclip-frames")
        try:
            os.ftruncate(descriptor, size)  # pages are there once they are written to
            shared = mmap.mmap(descriptor, size)
            given = {"limits": asdict(limits), "descriptor": descriptor, "shared_bytes": size}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "actionclip_deploy.serve.decode_worker"),
                json.dumps(given),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(descriptor,),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                limit=_ANSWER_BYTES,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        opened = cls(process, shared, asyncio.ensure_future(process.wait()))
        first = opened.ask(json.loads(manifest.model_dump_json()))
        try:
            await asyncio.wait_for(first, _START_SECONDS)
        except asyncio.CancelledError:  # the server ends while a process is replaced
            await opened.kill()
            raise
        except (asyncio.TimeoutError, EndedError) as exc:
            await opened.kill()
            raise RuntimeUnavailableError(
                f"A decoding process did not start (exit code {process.returncode}); look above "
                "for what it says, and try `actionclip doctor`."
            ) from exc
        return opened

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Write a line and wait for the one that answers it; an `EndedError` if it ends instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = b""
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            await self.process.stdin.drain()
            line = await self.process.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
        # ValueError: a line that is too long, cut off, or what a video made it write.
        except (ConnectionError, ValueError) as exc:
            if not line.endswith(b"\n"):
                # `kill` would reap one that is just ending, and lose its exit code to asyncio.
                await asyncio.wait({self.ended}, timeout=_END_SECONDS)
            raise EndedError from exc
        return answer

    async def decode(self, job: DecodeJob, wait_seconds: float) -> Decoded | RequestRefusedError:
        """Decode one video; what is answered is not believed: a video may have taken over.

        Raises:
            EndedError: If it ends, or what it says is no answer, so that it has to end.
            OutOfMemoryError: If it has not enough memory.
        """
        self.num_jobs += 1
        answer = await self.ask({**asdict(job), "path": str(job.path), "views": str(job.views)})
        try:
            self.is_worn = bool(answer["is_worn"])
            if "error" in answer:
                is_out_of_memory = bool(answer.get("is_out_of_memory"))
                refusal = RequestRefusedError(
                    answer["error"],
                    status=answer["status"],
                    code=answer["code"],
                    limit="memory" if is_out_of_memory else None,
                )
                if is_out_of_memory:
                    raise OutOfMemoryError(refusal)
                return refusal
            shape, pts = answer["shape"], answer["pts_seconds"]
            written = np.frombuffer(self.shared, np.uint8)[: math.prod(shape)]
            return Decoded(
                pixels=written.reshape(shape).copy(),  # the next job writes over it
                views=np.array(answer["views"], np.int64),
                indices=np.array(answer["indices"], np.int64),
                pts_seconds=None if pts is None else np.array(pts, np.float64),
                timings_ms=answer["timings_ms"],
                warnings=tuple(answer["warnings"]),
                wait_seconds=wait_seconds,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise EndedError from exc

    async def kill(self) -> int:
        """End it; gives its exit code, negative for a signal."""
        if self.process.returncode is None:
            self.process.kill()
        return await self.ended
