"""A memory of what torch traced: one graph is traced once in a run of the tests.

Tracing is nearly all of an export, most tests that export do so for another reason than the trace,
and the same small models come up again and again. `tests/conftest.py` puts `TraceMemory.export`
in the place of `torch.onnx.export`; all of our own code runs as it does elsewhere.

What torch gave is kept under a key of everything that it depends on, in files, so that the
processes of pytest-xdist share it. A module that the key cannot describe is traced as ever, and a
test whose subject is the trace itself asks for the fixture `traced_anew`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from made_once import locked
from torch.onnx import ONNXProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

# Larger models come up once in a run, and would fill the folder of the tests.
MAX_BYTES = 100_000_000
# What their type and their text tell all about.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)


class _UnknownError(Exception):
    """A value of which the key does not know what it would do to a trace."""


_from_torchlib = ONNXRegistry.from_torchlib


@functools.cache
def onnx_registry(opset_version: int) -> Any:
    """What torch knows to write as ONNX, which it reads out of its sources anew for each graph.

    That is a fifth of the trace of a small model.
    """
    return _from_torchlib(opset_version=opset_version)


class TraceMemory:
    """Traces by the key of their inputs.

    Args:
        folder: Where they lie; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._trace: Callable[..., Any] = torch.onnx.export
        self.is_used = True
        self.num_traced = self.num_found = 0

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `torch.onnx.export` does, or give what it gave for the same."""
        key = trace_key(args, kwargs) if self.is_used else None
        if key is None:
            self.num_traced += 1
            return self._trace(*args, **kwargs)
        path = self._folder / f"{key}.onnx"
        with locked(path):  # who wants the same meanwhile waits for it
            if path.exists():
                self.num_found += 1
                # Anew each time: what is given is changed by whom it is given to.
                return ONNXProgram(onnx_ir.serde.deserialize_model(onnx.load(path)), None)
            self.num_traced += 1
            program = self._trace(*args, **kwargs)
            if program is not None:
                self._keep(program, path)
            return program

    def _keep(self, program: ONNXProgram, path: Path) -> None:
        weights = [value.const_value for value in program.model.graph.initializers.values()]
        if sum(tensor.nbytes for tensor in weights if tensor is not None) > MAX_BYTES:
            return
        content = onnx_ir.serde.serialize_model(program.model).SerializeToString()
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)


def trace_key(args: Any, kwargs: Any) -> str | None:
    """The hash of everything that a trace depends on; None if that cannot be told."""
    content = hashlib.sha256()
    settings = (torch.__version__, torch.get_default_dtype(), torch.is_grad_enabled())
    try:
        _Key(content.update).add((settings, args, kwargs))
    except _UnknownError:
        return None
    return content.hexdigest()


class _Key:
    """Writes values so that different ones give different bytes."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        # That two names are one tensor, or one module, is a part of a graph.
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # whose ids must not be given to others

    def add(self, value: Any) -> None:
        if value is None or isinstance(value, _PLAIN):
            self._tell(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, list)):
            self._tell(type(value).__name__, str(len(value)))
            for item in value:
                self.add(item)
        elif isinstance(value, dict):
            self._tell("dict", str(len(value)))
            for name, item in value.items():  # in their order, which is that of the graph
                self.add(name)
                self.add(item)
        elif isinstance(value, torch.export.Dim):
            self._tell("Dim", f"{value.__name__} {value.min} {value.max}")
        elif isinstance(value, (torch.Tensor, torch.nn.Module)):
            self._add_once(value)
        elif callable(value) and "<" not in getattr(value, "__qualname__", "<"):
            # By its name: no function of a module changes while the tests run.
            self._tell("callable", f"{value.__module__}.{value.__qualname__}")
        else:
            raise _UnknownError(value)

    def _add_once(self, value: Any) -> None:
        if id(value) in self._seen:
            self._tell("seen", str(self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, torch.Tensor):
            self._add_tensor(value)
        else:
            self._add_module(value)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _UnknownError(tensor)
        self._tell("tensor", f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}")
        self._tell("grad", str(tensor.requires_grad))
        flat = tensor.detach().contiguous().flatten()
        self._write(memoryview(flat.view(torch.uint8).numpy()))

    def _add_module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        if "<" in kind.__qualname__:  # of a function: its name does not tell its code
            raise _UnknownError(kind)
        self._tell("module", f"{kind.__module__}.{kind.__qualname__}")
        for name, value in vars(module).items():
            self.add(name)
            self.add(sorted(value) if isinstance(value, set) else value)  # of names

    def _tell(self, kind: str, text: str) -> None:
        self._write(f"{kind}:{len(text)}:{text};".encode())
