"""What every runtime does: execute the graphs of one bundle on numpy arrays.

A runtime implements `_run`. What comes in and what goes out is checked here, once for all of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import EngineError, InferenceError, ShapeError
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.records import RuntimeInfo as RuntimeInfo

if TYPE_CHECKING:  # who recognises needs none of them, and they take a while to import
    from actionclip_deploy.command_records import AuditRecord

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]

ProductPrecision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8"]
PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)

# What the fastest runtime is fastest at: one clip alone, or many, several in a call.
Preference = Literal["latency", "throughput"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)

_WARM_UP_CALLS, _TIMED_CALLS = 3, 11  # of `median_latency_ms`


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

    def precision_of(self, graph: GraphName) -> ProductPrecision:
        """What a graph is computed in: its own precision, unless another was asked for."""
        return self.manifest.graphs[graph].precision

    def audit(self) -> Mapping[GraphName, Audit]:
        """What the products of each graph are really computed in; empty where nothing tells."""
        return {}

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


def median_latency_ms(runtime: Runtime) -> float:
    """Median time of one clip from host memory to its embedding, in ms."""
    model = runtime.manifest.model
    shape = (1, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    times = []
    for _ in range(_WARM_UP_CALLS + _TIMED_CALLS):
        started = time.perf_counter()
        runtime.encode_video(frames)
        times.append((time.perf_counter() - started) * 1000)
    return float(np.median(times[_WARM_UP_CALLS:]))


# The precision that is really computed in
#
# A runtime that opens a graph without an error may compute it in another type than was asked for.
# So each product of the graph is looked for in what is executed.

# Of all arithmetic. TensorRT may fold or move a small product, such as one with a constant.
MAX_OTHER_SHARE = 0.05
MAX_UNKNOWN_SHARE = 0.2


@dataclass(frozen=True)
class GraphProduct:
    """One node of a graph that multiplies and adds."""

    node: str  # its name in the graph
    op_type: str  # `MatMul`, `Gemm`, `Conv` or `LSTM`, and those on integers
    num_macs: int  # multiply-accumulates at the given shape of the input
    # What the graph asks for: the type of its operands; where both are dequantised, the type that
    # they were quantised to.
    precision: ProductPrecision


@dataclass(frozen=True)
class AuditedProduct:
    """A product of the graph, and what a runtime made of it."""

    product: GraphProduct  # what the graph asks for
    layers: tuple[str, ...]  # names of the layers that compute it
    precision: ProductPrecision | None  # what they compute it in; None where that is not clear


@dataclass(frozen=True)
class Audit:
    """The arithmetic that a graph asks for, and what is done in its place.

    Attributes:
        products: All of the graph, in its order.
        num_layers: Of what executes it.
        subject: What executes it, in messages.
        remedy: What to do where it cannot be told what is computed.
        other_remedy: What to do where something else is computed than was asked for.
    """

    products: tuple[AuditedProduct, ...]
    num_layers: int
    subject: str = "The engine"
    remedy: str = "build it with another version of TensorRT"
    other_remedy: str = "export a bundle of a precision that this GPU has"

    def asked(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that the graph asks for, 0 to 1."""
        return self._shares(lambda audited: audited.product.precision)

    def computed(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that is computed in, 0 to 1."""
        return self._shares(lambda audited: audited.precision)

    def unknown_share(self) -> float:
        """Share of the arithmetic whose precision is not clear, 0 to 1."""
        return self._share(audited for audited in self.products if audited.precision is None)

    def why_refused(self) -> str | None:
        """Why something else is computed than the graph asks for; None where it does."""
        unknown = [audited for audited in self.products if audited.precision is None]
        others = [
            audited
            for audited in self.products
            if audited.precision not in (None, audited.product.precision)
        ]
        if self._share(others) > MAX_OTHER_SHARE:
            return (
                f"{self.subject} computes {self._share(others):.0%} of its arithmetic in another "
                f"precision than its graph asks for: {_largest(others)}; {self.remedy}, or "
                f"{self.other_remedy}."
            )
        if self._share(unknown) > MAX_UNKNOWN_SHARE:
            return (
                f"The precision of {self._share(unknown):.0%} of {self._subject}'s "
                f"arithmetic cannot be told from its {self.num_layers} layers, and "
                f"{MAX_UNKNOWN_SHARE:.0%} is the limit: {_largest(unknown)}; {self.remedy}."
            )
        return None

    def check(self) -> None:
        """Raise `EngineError` where something else is computed than was asked for."""
        if why := self.why_refused():
            raise EngineError(why)

    def record(self) -> AuditRecord:
        """As it leaves the program, and as the record of an engine keeps it."""
        from actionclip_deploy.command_records import AuditRecord, OtherPrecision

        return AuditRecord(
            num_macs=sum(audited.product.num_macs for audited in self.products),
            num_layers=self.num_layers,
            asked={str(kind): share for kind, share in self.asked().items()},
            computed={str(kind): share for kind, share in self.computed().items()},
            unknown=self.unknown_share(),
            other_than_asked=tuple(
                OtherPrecision(
                    node=audited.product.node,
                    asked=audited.product.precision,
                    computed=audited.precision,
                    layers=tuple(audited.layers),
                )
                for audited in self.products
                if audited.precision != audited.product.precision
            ),
        )

    @property
    def _subject(self) -> str:
        """Within a sentence."""
        return self.subject[0].lower() + self.subject[1:]

    def _shares(
        self, precision_of: Callable[[AuditedProduct], ProductPrecision | None]
    ) -> dict[ProductPrecision, float]:
        shares = {
            precision: self._share(a for a in self.products if precision_of(a) == precision)
            for precision in PRECISIONS
        }
        return {precision: share for precision, share in shares.items() if share}

    def _share(self, some: Iterable[AuditedProduct]) -> float:
        total = sum(audited.product.num_macs for audited in self.products)
        return sum(audited.product.num_macs for audited in some) / total if total else 0.0


def _largest(some: Sequence[AuditedProduct]) -> str:
    """The largest of some products with what is known of it, and how many others there are."""
    first = max(some, key=lambda audited: audited.product.num_macs)
    layers = f"the layer {first.layers[0]}" if first.layers else "no layer that names it"
    computed = f" in {first.precision}" if first.precision else ""
    others = f", and {len(some) - 1} more" if len(some) > 1 else ""
    return f"{first.product.node} ({first.product.precision}) by {layers}{computed}{others}"
