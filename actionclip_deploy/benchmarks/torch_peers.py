"""What PyTorch itself offers to run the model faster or elsewhere: torch.compile, torch.onnx.

    python -m actionclip_deploy.benchmarks.torch_peers BUNDLE CHECKPOINT BASE FOLDER

exports what a user gets who calls `torch.onnx.export` on the model as it is: the graphs take raw
frames, normalise them, and run every token through every block. BASE is an empty word where there
is none.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.model import ActionClipNetwork
from actionclip_deploy.runtimes.base import RuntimeInfo
from actionclip_deploy.runtimes.pyt import TorchRuntime

_OPSET = 18  # the bundle's, so that the operators are the same


class CompiledTorchRuntime(TorchRuntime):
    """The reference under torch.compile, once per shape; compiling is part of the first call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compiled = torch.compile(super()._compute, dynamic=False)
        # Each batch size is compiled by itself; beyond the limit torch would go on uncompiled.
        torch._dynamo.config.recompile_limit = 256

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        return replace(super().describe(), name="torch-compile")

    def _compute(self, model: ActionClipNetwork, graph: GraphName, values: Tensor) -> Tensor:
        output: Tensor = self._compiled(model, graph, values)
        return output


class PlainTorchRuntime(TorchRuntime):
    """The reference, whose parts can be had as modules for `torch.onnx.export`."""

    def graph_module(self, graph: GraphName) -> nn.Module:
        """The part of the model that a graph stands for, raw frames in, nothing rewritten."""
        compute = self._compute
        assert self._model is not None
        model: ActionClipNetwork = self._model

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, values: Tensor) -> Tensor:
                return compute(self.model, graph, values)

        return Plain().eval()


def export_plain(bundle: Bundle, checkpoint: Path, base: Path | None, folder: Path) -> None:
    """Write `visual.onnx` and `temporal.onnx`, or `video.onnx` where frames are mixed."""
    manifest = bundle.manifest
    runtime = PlainTorchRuntime.from_bundle(bundle, checkpoint, base)
    with runtime:
        for graph, spec in manifest.graphs.items():
            if graph == "textual":
                continue
            dtype = getattr(torch, spec.input.dtype)
            example = torch.zeros(_example_shape(manifest, graph), dtype=dtype)
            batch = torch.export.Dim("batch", min=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                torch.onnx.export(
                    runtime.graph_module(graph),
                    (example,),
                    str(folder / f"{graph}.onnx"),
                    dynamic_shapes=({0: batch},),
                    opset_version=_OPSET,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )


def _example_shape(manifest: Manifest, graph: GraphName) -> list[int]:
    letters = {"N": 2, "B": 2, "T": manifest.model.num_frames}
    shape = manifest.graphs[graph].input.shape
    return [size if isinstance(size, int) else letters[size] for size in shape]


if __name__ == "__main__":
    given_bundle, given_checkpoint, given_base, given_folder = sys.argv[1:]
    export_plain(
        Bundle.open(Path(given_bundle)),
        Path(given_checkpoint),
        Path(given_base) if given_base else None,
        Path(given_folder),
    )
