"""A real Triton core, where there is one: that of the package nvidia-pytriton.

It has no backend but the Python one, in which `scale/triton_model.py` stands in for that of ONNX
Runtime: configs are loaded as they are in production. Tests import it by name:
`from triton_core import find_triton, running_triton`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "actionclip_deploy" / "scale" / "triton_model.py"
# Its pins disagree with those of the tests, so it has an environment of its own.
REASON = (
    "no Triton core: python -m venv .venv-triton && .venv-triton/bin/pip install "
    "nvidia-pytriton==0.7.0 onnxruntime, or name such an environment with TRITON_VENV"
)
START_SECONDS = 120.0


@dataclass(frozen=True)
class Triton:
    """A Triton that is ready."""

    http: str
    grpc: str
    log_path: Path


def find_triton() -> Path | None:
    """The folder of tritonserver in its environment; None where there is none."""
    environment = Path(os.environ.get("TRITON_VENV", ROOT / ".venv-triton"))
    found = environment.glob("lib/python*/site-packages/pytriton/tritonserver")
    return next(found, None)


@contextmanager
def running_triton(repository: Path, folder: Path) -> Iterator[Triton]:
    """Start Triton on a repository and end it at the end of the block."""
    server = find_triton()
    assert server is not None, REASON
    packages = server.parents[1]
    backends = folder / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    version = packages.parent.name.removeprefix("python")
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    for name in ("onnxruntime", "openvino"):
        (backends / name).mkdir()
        shutil.copyfile(STAND_IN, backends / name / "model.py")
    http, grpc = (_free_port() for _ in range(2))
    python = (packages.parents[2] / "bin" / "python").resolve()
    environment = {
        **os.environ,
        "PATH": f"{packages.parents[2] / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{python.parents[1] / 'lib'}",
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "model-repository": repository,
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
        "strict-model-config": "true",
    }
    command = [str(server / "bin" / "tritonserver"), *(f"--{k}={v}" for k, v in options.items())]
    log_path = folder / "triton.log"
    with (
        log_path.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{http}", log_path)
            yield Triton(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}", log_path)
            process.terminate()
            process.wait(START_SECONDS)
        finally:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < end, log_path.read_text()
        try:
            if httpx.get(f"{url}/v2/health/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
