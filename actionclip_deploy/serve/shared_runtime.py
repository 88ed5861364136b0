"""A runtime whose calls are made by the batcher's thread, between the calls for clips.

Text is embedded by it, in small batches, so that a bank of thousands of prompts that is being built
holds nobody up for longer than one of them takes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo

InThread = Callable[..., "Future[Any]"]


class SharedRuntime(Runtime):
    """Text graph only; its calls block, so it is for threads other than the event loop's.

    Args:
        runtime: What executes the graphs.
        in_thread: Calls something in the thread of the runtime.
    """

    def __init__(self, runtime: Runtime, in_thread: InThread) -> None:
        super().__init__(runtime.manifest)
        self._runtime = runtime
        self._in_thread = in_thread

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        return self._runtime.describe()

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        assert graph == "textual", graph
        output: Float32Array = self._in_thread(self._runtime.encode_text, array).result()
        return output
