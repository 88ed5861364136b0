"""The parent's side of the rows: a process for each, asked one at a time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.errors import BenchmarkError

_END_SECONDS = 10


class RowHandle(Protocol):
    """A row that can be asked to measure; see `worker.Worker` for what it can be asked."""

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            BenchmarkError: If the row cannot do it, or its process has ended.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


OpenRow = Callable[[RowSpec], RowHandle]


class RowProcess:
    """A row in a process of its own.

    Args:
        spec: What it runs; it is opened by `ask("open", **spec.to_dict())`.
    """

    def __init__(self, spec: RowSpec) -> None:
        self._name = spec.name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actionclip_deploy.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            BenchmarkError: With the row's own sentence; or with the last line that it printed, if
                its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(self._why_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it ends by itself when there is nothing more to read."""
        if self._process.stdin is not None:
            # Of a process that has ended, what could not be written is still there to be flushed.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        last = lines[-1].strip() if lines else "it printed nothing"
        how = f"signal {-code}, as where memory runs out" if code < 0 else f"code {code}"
        return (
            f"The process of the row {self._name} ended with {how} ({last}); leave the row out, "
            "or give smaller batches if memory ran out."
        )
