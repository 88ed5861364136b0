"""What can be a row of a benchmark, and how it is opened: our runtimes, and peers.

Peers run the same weights in other ways that a user might take, to compare with: the model under
torch.compile, and ONNX Runtime's defaults on what `torch.onnx.export` makes of the model as it is.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    BenchmarkError,
    InferenceError,
    RuntimeUnavailableError,
)
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.machine import is_cpu
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES

PEERS = ("torch-compile", "onnxruntime-plain")
RUNTIMES = ("torch", "onnxruntime", "openvino", *ENGINE_RUNTIMES, *PEERS)
# These run the checkpoint and not the bundle's graphs, in fp32 whatever the bundle's precision.
FROM_CHECKPOINT = frozenset({"torch", "torch-compile", "onnxruntime-plain"})

# These keep what they make of a graph, for a later start.
_CACHING = ("onnxruntime", "openvino")

_PATHS = ("bundle", "checkpoint", "base", "graphs", "cache")


@dataclass(frozen=True)
class RowSpec:
    """A line of the table before it is measured.

    Attributes:
        name: What the report calls it.
        runtime: One of `RUNTIMES`.
        bundle: Folder of the bundle that it runs.
        checkpoint: The bundle's checkpoint, for those that run it.
        base: What supplied a tower of it, where there was one.
        execution_provider: For `onnxruntime`; for torch and `openvino`, their device.
        num_threads: Threads of one call on the CPU.
        num_frames: T.
        graphs: Folder of plain graphs, for `onnxruntime-plain`; `prepare` makes it.
        cache: Where `onnxruntime` and `openvino` keep optimised graphs, a folder of this run
            alone, so that the first start is one; `prepare` names it.
        precision: For `openvino`, what it computes in; None for the precision of the graphs.
    """

    name: str
    runtime: str
    bundle: Path
    checkpoint: Path | None
    base: Path | None
    execution_provider: str
    num_threads: int
    num_frames: int
    graphs: Path | None = None
    cache: Path | None = None
    precision: str | None = None

    def prepare(self, folder: Path) -> RowSpec:
        """Make what this row needs besides the bundle, which is no part of its load time.

        Args:
            folder: A new folder of its own, which has to stay until the row is open.

        Raises:
            ActionClipError: If it cannot be made.
        """
        if self.runtime in _CACHING:
            return replace(self, cache=folder)
        if self.runtime != "onnxruntime-plain":
            return self
        folder.mkdir()
        words = (self.bundle, needed_checkpoint(self), self.base or "", folder)
        # In a process of its own, so that torch does not stay in the memory of this one.
        done = subprocess.run(
            [sys.executable, "-m", "actionclip_deploy.benchmarks.torch_peers", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeUnavailableError(
                f"torch.onnx.export of the model as it is failed ({last}); leave the "
                "onnxruntime-plain row out."
            )
        return replace(self, graphs=folder)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {k: str(v) if k in _PATHS and v else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RowSpec:
        """From what `to_dict` gave."""
        given: dict[str, Any] = {k: Path(v) if k in _PATHS and v else v for k, v in values.items()}
        return cls(**given)

    def open(self) -> Runtime:
        """Open the runtime.

        Raises:
            ActionClipError: If it cannot be had here.
        """
        bundle = Bundle.open(self.bundle)
        # Rows share the settings of a run, of which a GPU has no use for this one.
        num_threads = self.num_threads if is_cpu(self.execution_provider) else None
        if self.runtime == "torch-compile":
            from actionclip_deploy.benchmarks.torch_peers import CompiledTorchRuntime

            return CompiledTorchRuntime.from_bundle(
                bundle,
                needed_checkpoint(self),
                self.base,
                device=self.execution_provider,
                num_threads=num_threads,
            )
        if self.runtime == "onnxruntime-plain":
            return PlainOnnxRuntime(self, bundle)
        if self.runtime in ENGINE_RUNTIMES:
            # Engines take minutes to build, so they are those that `actionclip build` made.
            return open_runtime(bundle, self.runtime)
        from_checkpoint = self.runtime in FROM_CHECKPOINT
        by_device = self.runtime != "onnxruntime"
        return open_runtime(
            bundle,
            self.runtime,
            device=self.execution_provider if by_device else None,
            execution_provider=None if by_device else self.execution_provider,
            precision=self.precision,
            num_threads=num_threads,
            checkpoint=needed_checkpoint(self) if from_checkpoint else None,
            base=self.base if from_checkpoint else None,
            cache=self.cache or False,
            is_alone=True,
        )


def needed_checkpoint(spec: RowSpec) -> Path:
    """The checkpoint of a row that runs it.

    Raises:
        BenchmarkError: If none was given.
    """
    if spec.checkpoint is None:
        raise BenchmarkError(
            f"{spec.runtime} runs the checkpoint that the bundle was exported from, and none was "
            "given; give it with --checkpoint."
        )
    return spec.checkpoint


def _refuse_other_than_cpu(spec: RowSpec) -> None:
    if not is_cpu(spec.execution_provider):
        raise RuntimeUnavailableError(
            f"{spec.runtime} was asked for on {spec.execution_provider} and runs on the cpu alone; "
            "leave it out."
        )


class PlainOnnxRuntime(Runtime):
    """ONNX Runtime, every option but the threads at its default, on a plain export of the model."""

    def __init__(self, spec: RowSpec, bundle: Bundle) -> None:
        super().__init__(bundle.manifest)
        _refuse_other_than_cpu(spec)
        from actionclip_deploy.runtimes.ort import VERSION, GraphSession

        self._num_threads, self._version = spec.num_threads, VERSION
        assert spec.graphs is not None  # what prepare() gives
        self._sessions = {
            path.stem: GraphSession(path, num_threads=spec.num_threads)
            for path in spec.graphs.glob("*.onnx")
        }

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        versions = {"onnxruntime": self._version}
        return RuntimeInfo(
            "onnxruntime-plain", "CPUExecutionProvider", "fp32", self._num_threads, versions
        )

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        session = self._sessions.get(graph)
        if session is None:
            raise InferenceError(f"onnxruntime-plain has no {graph} graph; use another runtime.")
        return session.run(array)[0]
