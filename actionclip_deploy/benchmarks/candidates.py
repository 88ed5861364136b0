"""What one row of a benchmark runs, and how it is opened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BenchmarkError
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES

# Peers run the same weights in another way, to compare with.
PEERS = ("torch-compile", "onnxruntime-plain", "openvino")
RUNTIMES = ("torch", "onnxruntime", *ENGINE_RUNTIMES, *PEERS)
# These run the checkpoint and not the bundle's graphs, in fp32 whatever the bundle's precision.
FROM_CHECKPOINT = frozenset({"torch", "torch-compile", "onnxruntime-plain"})

_PATHS = ("bundle", "checkpoint", "base", "graphs", "cache")


@dataclass(frozen=True)
class RowSpec:
    """A line of the table before it is measured.

    Attributes:
        name: How it is called in the report.
        runtime: One of `RUNTIMES`.
        bundle: Folder of the bundle that it runs.
        checkpoint: The bundle's checkpoint, for those that run it.
        base: What supplied a tower of it, where there was one.
        execution_provider: For `onnxruntime`; `cpu` or `cuda` for torch.
        num_threads: Threads of one call on the CPU.
        num_frames: T.
        graphs: Folder of plain graphs, for `onnxruntime-plain`; `prepare` makes it.
        cache: Where `onnxruntime` keeps optimised graphs, a folder of this run alone, so that the
            first start is one; `prepare` names it.
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

    def prepare(self, folder: Path) -> RowSpec:
        """Make what this row needs beside the bundle; that is no part of its load time.

        Args:
            folder: A new folder of its own, which has to stay until the row is open.

        Raises:
            ActionClipError: If it cannot be made.
        """
        if self.runtime == "onnxruntime":
            return replace(self, cache=folder)
        if self.runtime != "onnxruntime-plain":
            return self
        from actionclip_deploy.benchmarks.plain_export import export_plain_in_a_process

        folder.mkdir()
        checkpoint = needed_checkpoint(self)
        export_plain_in_a_process(self.bundle, checkpoint, self.base, folder)
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
        if self.runtime in PEERS:
            from actionclip_deploy.benchmarks.peers import open_peer

            return open_peer(self, bundle)
        if self.runtime in ENGINE_RUNTIMES:
            # Engines take minutes to build, so they are those that `actionclip build` made.
            return open_runtime(bundle, self.runtime)
        from_checkpoint = self.runtime in FROM_CHECKPOINT
        return open_runtime(
            bundle,
            self.runtime,
            execution_provider=self.execution_provider,
            num_threads=self.num_threads,
            checkpoint=needed_checkpoint(self) if from_checkpoint else None,
            base=self.base if from_checkpoint else None,
            cache=self.cache or False,
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
