"""What quantising does to the features of a graph: of each block alone, and of several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.export.quantization import block_names, find_products, quantize
from actionclip_deploy.export.sessions import GraphSession
from actionclip_deploy.runtimes.onnx_graphs import read_model, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from actionclip_deploy.export.quantization_options import QuantizationOptions


@dataclass(frozen=True)
class FeatureError:
    """How far features are from a reference: those of the unquantised graph, or PyTorch's.

    Attributes:
        sqnr_db: Signal to quantization noise: 10 log10 of the mean square of the features over
            the mean square of their error, decibels; infinite without any error.
        min_cosine: Over rows.
        max_difference: Over all values, relative to the largest magnitude of a feature.
    """

    sqnr_db: float
    min_cosine: float
    max_difference: float


@dataclass(frozen=True)
class BlockSensitivity:
    """What quantising one block alone does to the features.

    Attributes:
        block: Its name.
        error: Of the features.
    """

    block: str
    error: FeatureError


def feature_error(features: NDArray[np.float32], reference: NDArray[np.float32]) -> FeatureError:
    """Compare features with a reference, both of shape (rows, D)."""
    given, wanted = features.astype(np.float64), reference.astype(np.float64)
    noise, signal = float(((given - wanted) ** 2).mean()), float((wanted**2).mean())
    norms = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (given * wanted).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return FeatureError(
        sqnr_db=10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf,
        min_cosine=float(cosines.min()),
        max_difference=float(np.abs(given - wanted).max() / max(np.abs(wanted).max(), 1e-30)),
    )


class QuantizedWriter:
    """Writes quantised forms of one graph, and tells what they do to its features.

    Args:
        source: The fp32 or fp16 graph.
        probe: Clips, shape (C, T, S, S, 3).
        by_frame: Whether the graph takes frames and not clips.
        options: The precision, how activations are scaled, and how large a weight may become.
        thresholds: For the static recipe.
    """

    def __init__(
        self,
        source: Path,
        probe: NDArray[np.uint8],
        *,
        by_frame: bool,
        options: QuantizationOptions,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self._model = read_model(source)
        self._probe = probe
        self._by_frame = by_frame
        self._options = options
        self._thresholds = thresholds
        self.blocks = block_names(find_products(self._model))
        self._reference = self._features(source)

    def write(self, target: Path, blocks: Collection[str]) -> None:
        """Write the graph with these blocks quantised."""
        model = quantize(
            self._model,
            blocks=blocks,
            recipe=self._options.chosen_recipe,
            weight_range=self._options.chosen_weight_range,
            thresholds=self._thresholds,
            precision=self._options.precision,
        )
        write_model(model, target)

    def error_of(self, path: Path) -> FeatureError:
        """Compare the features of a written graph with the unquantised one's, on the probe."""
        return feature_error(self._features(path), self._reference)

    def sensitivities(
        self, scratch: Path, on_block: Callable[[int], None] | None = None
    ) -> tuple[BlockSensitivity, ...]:
        """Measure each block alone, the others unquantised.

        Args:
            scratch: A folder for the graphs that are tried.
            on_block: Called with the number of blocks that are done.

        Returns:
            In the order of the tower.
        """
        path = scratch / "one-block.onnx"
        measured = []
        for done, block in enumerate(self.blocks, 1):
            self.write(path, [block])
            measured.append(BlockSensitivity(block, self.error_of(path)))
            if on_block is not None:
                on_block(done)
        path.unlink()
        return tuple(measured)

    def _features(self, path: Path) -> NDArray[np.float32]:
        """Features of the probe, a clip a call: the dynamic recipe scales the rows of a call."""
        session = GraphSession(path)
        rows = [session.run(c if self._by_frame else c[np.newaxis])[0] for c in self._probe]
        return np.concatenate(rows)
