"""The program of a decoding process: `python -m actionclip_deploy.serve.decode_worker`.

It reads one job on each line of standard input, as JSON, and answers each by a line. Pixels go
into a file of memory that it shares with the server, whose descriptor it was started with. A
hostile file can do no more than end this process: its memory is limited, and it is killed when a
job takes too long, by the server or by its own alarm.
"""

from __future__ import annotations

import importlib
import json
import mmap
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import (
    FrameSizeError,
    RequestRefusedError,
    VideoError,
    VideoMemoryError,
    VideoWarning,
)
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.video import Clip, VideoReader
from actionclip_deploy.video.border import foreign_errors
from actionclip_deploy.views import Stopwatch, VideoFrames, ViewReader

# The server's own limit comes first; the alarm is for when the server is gone.
_ALARM_MARGIN_SECONDS = 5.0
_MAX_WARNINGS = 10
# Of the memory that a process may take: one that keeps more between jobs is replaced. After
# hundreds of 4K videos it was 3%.
_WORN_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class ArrayFrames:
    """Frames that came as an array, RGB, uint8, (N, H, W, 3), in the place of a `VideoReader`."""

    frames: NDArray[np.uint8]

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.frames)

    @property
    def pts_seconds(self) -> NDArray[np.float64]:
        """Not known: NaN, shape (N,)."""
        return np.full(len(self.frames), np.nan)

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Frames by their numbers."""
        return Clip(self.frames[indices], indices, self.pts_seconds[indices])


class DecodeWorker:
    """Does jobs, one at a time; pixels are written into `shared`."""

    def __init__(self, manifest: Manifest, limits: Limits, shared: mmap.mmap) -> None:
        self._manifest = manifest
        self._limits = limits
        self._shared = shared

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Decode one video; gives what the answer's line holds, a refusal where there is one."""
        try:
            return self._decode(job)
        except RequestRefusedError as exc:
            return {"status": exc.status, "code": exc.code, "error": str(exc)}
        except FrameSizeError as exc:
            message = f"{str(exc).partition(';')[0]}; send it smaller."
            return self._refusal(413, "video_too_large", message, job)
        except (MemoryError, VideoMemoryError):
            limit = self._limits.decode_memory_bytes
            message = (
                f"Decoding {job['name']} takes more than {limit:,} bytes of memory, which is the "
                "limit; send smaller frames."
            )
            # In a process that did other jobs before, it may be those that took the memory.
            refusal = self._refusal(413, "video_too_large", message, job)
            return {**refusal, "is_out_of_memory": True}
        except VideoError as exc:
            return self._refusal(422, "video_unreadable", str(exc), job)

    def _refusal(self, status: int, code: str, message: str, job: dict[str, Any]) -> dict[str, Any]:
        # The file has the server's name here, which means nothing to who sent it.
        message = message.replace(str(job["path"]), str(job["name"]))
        return {"status": status, "code": code, "error": message}

    def _decode(self, job: dict[str, Any]) -> dict[str, Any]:
        path, name = Path(job["path"]), str(job["name"])
        stopwatch, found = Stopwatch(), list[VideoWarning]()
        reader = ViewReader(self._manifest, Views.parse(job["views"]), job["region"])
        if job["kind"] == "frames":
            # Of the server alone, whose packages others that decode need not have.
            from actionclip_deploy.serve.uploads import read_frames_file

            with foreign_errors(path):  # a client that leaves takes its upload along
                frames = read_frames_file(path, name)
            self._check(name, frames.shape, 0.0)
            read = reader.read(ArrayFrames(frames), path, stopwatch)
        else:
            with stopwatch.stage("open"):
                video = VideoReader(path, max_pixels=self._limits.pixels, on_warning=found.append)
            with video:
                shape = (video.num_frames, video.height, video.width)
                self._check(name, shape, video.duration_seconds)
                read = reader.read(video, path, stopwatch)
        warnings = [str(warning).replace(str(path), name) for warning in found[:_MAX_WARNINGS]]
        return self._answer(read, stopwatch, warnings)

    def _check(self, name: str, shape: Sequence[int], duration_seconds: float) -> None:
        num_frames, height, width = shape[:3]
        limits = self._limits
        if width * height > limits.pixels:
            raise refusals.video_too_large(
                f"{name} has frames of {width} x {height} and they may have {limits.pixels:,} "
                "pixels; send it smaller."
            )
        if num_frames > limits.frames:
            raise refusals.video_too_large(
                f"{name} has {num_frames:,} frames and may have {limits.frames:,}; "
                "send a part of it."
            )
        if duration_seconds > limits.duration_seconds:
            raise refusals.video_too_large(
                f"{name} lasts {duration_seconds:,.1f} seconds and may last "
                f"{limits.duration_seconds:g}; send a part of it."
            )

    def _answer(
        self, read: VideoFrames, stopwatch: Stopwatch, warnings: list[str]
    ) -> dict[str, Any]:
        pixels = np.ascontiguousarray(read.pixels).reshape(-1)
        np.frombuffer(self._shared, np.uint8)[: pixels.size] = pixels
        times_are_known = bool(np.isfinite(read.pts_seconds).all())
        return {
            "shape": read.pixels.shape,
            "views": read.views.tolist(),
            "indices": read.indices.tolist(),
            "pts_seconds": read.pts_seconds.tolist() if times_are_known else None,
            "timings_ms": stopwatch.timings_ms(),
            "warnings": warnings,
        }


def limit_process(memory_bytes: int) -> None:
    """Bound the memory of this process, beyond what it has now, and what it may leave behind."""
    limit = _address_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _address_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def serve(
    worker: DecodeWorker, lines: TextIO, answers: TextIO, *, seconds: float, memory_bytes: int
) -> None:
    """Do the jobs of the lines, and answer each with a line, until there are no more.

    An answer says `is_worn` once this process has kept so much of its memory that the next video
    might not find enough.

    The first answer says that the process is ready. SIGALRM, which nothing handles, ends it some
    time after a job has taken longer than `seconds`.
    """
    worn_bytes = _address_bytes() + int(_WORN_SHARE * memory_bytes)
    _write(answers, {"is_ready": True})
    for line in lines:
        signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_MARGIN_SECONDS)
        answer = worker.do(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _write(answers, {**answer, "is_worn": _address_bytes() > worn_bytes})


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main() -> None:
    """Serve jobs on standard input; the argument is JSON: manifest, limits, descriptor, bytes."""
    given = json.loads(sys.argv[1])
    # Who interrupts the server at a terminal interrupts its children as well; it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    manifest = Manifest.model_validate(json.loads(sys.stdin.readline()))
    limits = Limits(**given["limits"])
    shared = mmap.mmap(given["descriptor"], given["shared_bytes"])
    for name in ("av", "PIL.Image"):  # before memory is limited; otherwise at their first use
        importlib.import_module(name)
    limit_process(limits.decode_memory_bytes)
    serve(
        DecodeWorker(manifest, limits, shared),
        sys.stdin,
        sys.stdout,
        seconds=limits.decode_seconds,
        memory_bytes=limits.decode_memory_bytes,
    )


if __name__ == "__main__":
    main()
