"""What every runtime does: execute the graphs of one bundle on numpy arrays.

A runtime implements `_run`. What comes in and what goes out is checked here, once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import InferenceError, ShapeError
from actionclip_deploy.manifest import GraphName, Manifest

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class RuntimeInfo:
    """What really runs: for reports, `--json` output and logs.

    Attributes:
        name: Name of the runtime, as `open_runtime` takes it.
        execution_provider: ONNX Runtime's term; for the other runtimes, their device.
        precision: Precision of the graph that does nearly all the work.
        num_threads: Threads of one call on a CPU; None where the runtime decides.
        versions: Versions of the libraries that run.
        engine: Name of the engine, as `actionclip engines list` prints it; None where the graphs
            themselves run.
    """

    name: str
    execution_provider: str
    precision: str
    num_threads: int | None
    versions: dict[str, str] = field(default_factory=dict)
    engine: str | None = None


class Runtime(ABC):
    """Executes the graphs of a bundle; a context manager that frees them at the end.

    Letters: N frames, B clips, T frames per clip, S the input size, M prompts, L tokens,
    D the embedding width.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def frames_are_independent(self) -> bool:
        """Whether frames can be encoded apart from their clip (false for joint and shift)."""
        return "video" not in self.manifest.graphs

    @property
    def calls_can_be_shared(self) -> bool:
        """Whether a row gives the same output whatever else is in its call.

        Not where a dynamic int8 graph scales its activations by all that is in the call.
        """
        quantization = self.manifest.quantization
        return quantization is None or quantization.recipe != "dynamic"

    def encode_frames(self, frames: NDArray[np.uint8]) -> Float32Array:
        """Encode frames one by one.

        Args:
            frames: RGB, uint8, shape (N, S, S, 3).

        Returns:
            Frame features before normalisation, float32, shape (N, D).

        Raises:
            ShapeError: If the frames have another shape or dtype, or the model mixes the frames
                of a clip inside its backbone.
            InferenceError: If the runtime fails.
        """
        if not self.frames_are_independent:
            raise ShapeError(
                f"The visual prompt {self.manifest.model.visual_prompt!r} mixes the frames of a "
                "clip, so frames cannot be encoded one by one; call encode_video with whole clips."
            )
        self.manifest.check_input("visual", frames)
        return self._execute("visual", frames)

    def encode_clips(self, features: Float32Array) -> Float32Array:
        """Fuse the frame features of clips.

        Args:
            features: float32, shape (B, T, D).

        Returns:
            Video embeddings of unit norm, float32, shape (B, D).

        Raises:
            ShapeError: If the features have another shape or dtype, or T is one that the visual
                prompt does not take.
            InferenceError: If the runtime fails.
        """
        if not self.frames_are_independent:
            raise ShapeError(
                f"The visual prompt {self.manifest.model.visual_prompt!r} has no frame features "
                "to fuse; call encode_video with whole clips."
            )
        self.manifest.check_input("temporal", features)
        return self._execute("temporal", features)

    def encode_video(self, frames: NDArray[np.uint8]) -> Float32Array:
        """Encode whole clips, whatever the visual prompt.

        Args:
            frames: RGB, uint8, shape (B, T, S, S, 3).

        Returns:
            Video embeddings of unit norm, float32, shape (B, D).

        Raises:
            ShapeError: If the frames have another shape or dtype, or T is one that the visual
                prompt does not take.
            InferenceError: If the runtime fails.
        """
        self.manifest.check_input("clip", frames)
        if not self.frames_are_independent:
            return self._execute("video", frames)
        features = self.encode_frames(frames.reshape(-1, *frames.shape[2:]))
        return self.encode_clips(features.reshape(*frames.shape[:2], -1))

    def encode_text(self, tokens: NDArray[np.int32]) -> Float32Array:
        """Encode prompts.

        Args:
            tokens: Token ids padded with 0, int32, shape (M, L), L at most the context length.

        Returns:
            Text embeddings of unit norm, float32, shape (M, D).

        Raises:
            ShapeError: If the tokens have another shape or dtype, or are longer than the context.
            InferenceError: If the runtime fails.
        """
        self.manifest.check_input("textual", tokens)
        return self._execute("textual", tokens)

    @property
    def has_device(self) -> bool:
        """Whether the graphs are executed in memory other than the host's."""
        return False

    def copy_to_device(self, array: Array) -> None:  # noqa: B027 - on a CPU there is nothing to do
        """Copy an array to where the graphs are executed, and wait; for measuring."""

    @abstractmethod
    def describe(self) -> RuntimeInfo:
        """What really runs."""

    @abstractmethod
    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        """Execute one graph on a checked array."""

    def close(self) -> None:  # noqa: B027 - a runtime without resources has nothing to free
        """Free what the runtime holds; it cannot be used afterwards."""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _execute(self, graph: GraphName, array: Array) -> Float32Array:
        output = self._run(graph, array)
        expected = (len(array), self.manifest.model.embedding_dim)
        if output.shape != expected or output.dtype != np.float32:
            raise InferenceError(
                f"The {graph} graph gave shape {output.shape} and dtype {output.dtype}; expected "
                f"{expected} and float32 for {len(array)} rows: export the bundle again."
            )
        return output
