"""One process that decodes, as the server has it: questions, answers, shared memory, its end."""

from __future__ import annotations

import asyncio
import json
import math
import mmap
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import RuntimeUnavailableError
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.serve.settings import Limits

_START_SECONDS = 60.0
_END_SECONDS = 1.0
_ANSWER_BYTES = 4 * 1024 * 1024


class EndedError(Exception):
    """The process ended before it answered."""


@dataclass(eq=False)
class DecodeProcess:
    """One decoding process and the memory that it shares with the server.

    Attributes:
        process: The process.
        shared: Where it writes pixels.
        ended: Done once the process has ended; gives its exit code.
    """

    process: asyncio.subprocess.Process
    shared: mmap.mmap
    ended: asyncio.Task[int] = field(repr=False)

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
        except (asyncio.TimeoutError, EndedError) as exc:
            await opened.kill()
            raise RuntimeUnavailableError(
                f"A decoding process did not start (exit code {process.returncode}); look above "
                "for what it says, and try `actionclip doctor`."
            ) from exc
        return opened

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Give it a job and wait for its answer.

        Raises:
            EndedError: If it ends instead.
        """
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

    def pixels(self, shape: list[int]) -> NDArray[np.uint8]:
        """A copy of what it wrote, before its next job writes over it.

        Raises:
            ValueError: If no such shape fits into the memory that is shared.
        """
        written = np.frombuffer(self.shared, np.uint8)[: math.prod(shape)]
        pixels: NDArray[np.uint8] = written.reshape(shape).copy()
        return pixels

    async def kill(self) -> int:
        """End it; gives its exit code, negative for a signal."""
        if self.process.returncode is None:
            self.process.kill()
        return await self.ended
