"""ONNX Runtime on CUDA, in numpy, with the faults of the real one.

Tests import it by name: `from fake_cuda import FakeApi, FakeSession`.

- A copy to the device may not have arrived before the inputs are synchronised.
- Under a number, the first run is recorded: its shape, and where it read and wrote. Later runs
  replay it there, whatever they are given, and say nothing.
- A recording is known to the thread that made it alone, and fails if anything else calls CUDA
  meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np


class FakeOrtValue:
    """Memory on the device; `pending` is a copy to it that is still under way."""

    num_made = 0

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.pending: np.ndarray | None = None
        type(self).num_made += 1

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: tuple[int, ...], dtype: Any, device: str, number: int
    ) -> FakeOrtValue:
        assert (device, number) == ("cuda", 0)
        return cls(np.full(shape, 77, dtype))

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, number: int) -> FakeOrtValue:
        assert (device, number) == ("cuda", 0)
        return cls(array.copy())

    def update_inplace(self, array: np.ndarray) -> None:
        assert array.shape == self.memory.shape
        assert array.dtype == self.memory.dtype
        assert array.flags.c_contiguous
        self.pending = array.copy()

    def numpy(self) -> np.ndarray:
        return self.memory.copy()


class FakeRunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class FakeApi:
    """The names of the onnxruntime module that CUDA sessions use."""

    OrtValue = FakeOrtValue
    RunOptions = FakeRunOptions


class FakeBinding:
    def __init__(self) -> None:
        self.given: FakeOrtValue
        self.result: FakeOrtValue
        self.names: list[str] = []

    def bind_ortvalue_input(self, name: str, value: FakeOrtValue) -> None:
        self.names.append(name)
        self.given = value

    def bind_ortvalue_output(self, name: str, value: FakeOrtValue) -> None:
        self.names.append(name)
        self.result = value

    def synchronize_inputs(self) -> None:
        if self.given.pending is not None:
            self.given.memory[...] = self.given.pending
            self.given.pending = None

    def synchronize_outputs(self) -> None:
        pass


class FakeSession:
    """A session of one graph.

    Args:
        compute: What the graph computes.
        records: Whether it was opened with CUDA graphs.
        seconds: How long a run takes.

    Attributes:
        runs: Number of a graph, shape and thread of each run.
    """

    running = 0  # in the whole process

    def __init__(
        self,
        compute: Callable[[np.ndarray], np.ndarray],
        *,
        records: bool = True,
        seconds: float = 0.0,
    ) -> None:
        self.compute = compute
        self.records = records
        self.seconds = seconds
        self.recorded: dict[str, tuple[FakeOrtValue, FakeOrtValue, int]] = {}
        self.runs: list[tuple[str, tuple[int, ...], int]] = []
        self.released: list[int] = []

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: FakeRunOptions) -> None:
        FakeSession.running += 1
        try:
            self._run(binding, options.entries["gpu_graph_id"])
        finally:
            FakeSession.running -= 1

    def _run(self, binding: FakeBinding, number: str) -> None:
        thread = threading.get_ident()
        self.runs.append((number, binding.given.memory.shape, thread))
        given, result = binding.given, binding.result
        if self.records and number != "-1":
            assert number != "0", "reserved"
            if number in self.recorded:
                given, result, owner = self.recorded[number]
                assert owner == thread, "recorded by another thread"
            else:
                self.recorded[number] = (given, result, thread)
        time.sleep(self.seconds)
        if FakeSession.running > 1:
            raise RuntimeError("CUDA error 900: operation not permitted when stream is capturing")
        result.memory[...] = self.compute(given.memory)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class ReleasingSession(FakeSession):
    """A session of a version that can forget a recording."""

    def release_captured_graph(self, number: int) -> None:
        del self.recorded[str(number)]
        self.released.append(number)


class FakeDriver:
    """The CUDA driver's library, as far as it locks memory; `code` is what locking answers."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}
        self.contexts = 0  # that are pushed
        self.retained = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        self.retained -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts -= 1
        return 0

    def cuMemHostRegister_v2(self, address: Any, size: Any, flags: Any) -> int:  # noqa: N802
        assert self.contexts == 1
        assert flags.value == 1
        if not self.code:
            self.locked[address.value] = size.value
        return self.code

    def cuMemHostUnregister(self, address: Any) -> int:  # noqa: N802
        assert self.contexts == 1
        del self.locked[address.value]
        return 0
