"""What PyTorch itself offers to run the model faster or elsewhere: torch.compile, torch.onnx."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actionclip_deploy.manifest import GraphName
from actionclip_deploy.model import ActionCLIP
from actionclip_deploy.runtimes.base import RuntimeInfo
from actionclip_deploy.runtimes.pyt import TorchRuntime


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

    def _compute(self, model: ActionCLIP, graph: GraphName, values: Tensor) -> Tensor:
        output: Tensor = self._compiled(model, graph, values)
        return output


class PlainTorchRuntime(TorchRuntime):
    """The reference, whose parts can be had as modules for `torch.onnx.export`."""

    def graph_module(self, graph: GraphName) -> nn.Module:
        """The part of the model that a graph stands for, raw frames in, nothing rewritten."""
        compute = self._compute
        assert self._model is not None
        model: ActionCLIP = self._model

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, values: Tensor) -> Tensor:
                return compute(self.model, graph, values)

        return Plain().eval()
