"""A real `actionclip serve` in a process of its own, and what tests read of it from outside.

Tests import it by name: `from serving_programs import running_server`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from typer.testing import CliRunner

from actionclip_deploy.cli import app

START_SECONDS = 300.0  # on a machine that does much else
END_SECONDS = 120.0
POLL_SECONDS = 0.02
KIB = 1024


@dataclass(frozen=True)
class Server:
    """A server that takes requests.

    Attributes:
        process: `actionclip serve`.
        url: Where it listens.
        line: What it printed once it was ready.
        log_path: Its standard error.
        spool: Where its uploads lie meanwhile.
    """

    process: subprocess.Popen[str]
    url: str
    line: str
    log_path: Path
    spool: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    @property
    def grpc_address(self) -> str:
        """Where it listens for gRPC, if it was told to."""
        found = re.search(r" and by gRPC at (\S+:\d+): ", self.line)
        assert found is not None, self.line
        return found[1]

    @contextmanager
    def client(self, **options: Any) -> Iterator[httpx.Client]:
        """A client of it."""
        with httpx.Client(base_url=self.url, timeout=120.0, trust_env=False, **options) as client:
            yield client

    def connect(self, *, timeout_seconds: float = 120.0) -> socket.socket:
        """A bare connection to it."""
        return socket.create_connection(self.address, timeout=timeout_seconds)

    def logs(self) -> list[dict[str, Any]]:
        """Its log so far; each line has to be a JSON object."""
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def worker_ids(self) -> list[int]:
        """Its decoding processes."""
        return children_of(self.process.pid)

    def cpu_seconds(self) -> float:
        """What it has computed so far, decoding processes apart: no other process changes it."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """A number of /metrics, by its name with its labels if it has some."""
        text = httpx.get(f"{self.url}/metrics", timeout=120.0, trust_env=False).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def end(self) -> int:
        """Tell it to end and wait for that; gives its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


@contextmanager
def running_server(bundle: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Start a server and end it at the end of the block.

    Args:
        bundle: What it serves.
        folder: For its log and its uploads.
        options: More of its command line.
    """
    spool, log_path = folder / "spool", folder / "serve.log"
    spool.mkdir(parents=True)
    command = [sys.executable, "-m", "actionclip_deploy.cli", "serve", str(bundle)]
    command += ["--port", "0", "--threads", "1", "--spool", str(spool), *options]
    with (
        log_path.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = _first_line(process, log_path)
            found = re.search(r"http://\S+:\d+", line)
            assert found is not None, line
            yield Server(process, found[0], line, log_path, spool)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(END_SECONDS)
        finally:
            process.kill()


def bundle_with_bank(bundle: Path, folder: Path, name: str, labels: Sequence[str]) -> Path:
    """A copy of a bundle, with a label bank that the command line built."""
    copy = folder / bundle.name
    shutil.copytree(bundle, copy)
    listed = folder / f"{name}.txt"
    listed.write_text("\n".join(labels))
    arguments = ["labels", "build", str(copy), "--labels", str(listed), "--name", name]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return copy


@contextmanager
def costs_at_most(server: Server, times: float, *, num_bytes: int) -> Iterator[None]:
    """Check what the server computes in the block, whatever else the machine does meanwhile.

    Args:
        server: Which answers somebody in the block.
        times: Of the seconds of CPU that reading JSON of `num_bytes` takes here.
        num_bytes: Of what is answered.
    """
    text = f"[{','.join(['1234567'] * (num_bytes // 8))}]"
    begun = time.process_time()
    json.loads(text)
    seconds = time.process_time() - begun
    begun = server.cpu_seconds()
    yield
    assert server.cpu_seconds() - begun < times * seconds


def until(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Wait for something that has to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(POLL_SECONDS)


def children_of(process_id: int) -> list[int]:
    """The processes that a process started and that have not ended."""
    path = Path(f"/proc/{process_id}/task")
    ids = [int(each) for task in path.iterdir() for each in (task / "children").read_text().split()]
    return [each for each in ids if is_running(each)]


def is_running(process_id: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def memory_bytes(process_id: int, field: str = "VmRSS") -> int:
    """Memory of a process as Linux counts it: `VmRSS` now, `VmHWM` its peak."""
    text = Path(f"/proc/{process_id}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * KIB


def _first_line(process: subprocess.Popen[str], log_path: Path) -> str:
    assert process.stdout is not None
    end = time.monotonic() + START_SECONDS
    line = process.stdout.readline()  # a process that ends closes it, which gives an empty one
    assert line.startswith("Serving "), log_path.read_text()
    assert time.monotonic() < end
    return line
