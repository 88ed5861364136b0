"""How large activations become on real clips, and where it is best to cut them off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.export.quantization import input_types
from actionclip_deploy.export.rounding import ACTIVATION_LIMIT
from actionclip_deploy.export.sessions import GraphSession, write_with_outputs
from actionclip_deploy.runtimes.onnx_graphs import read_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from actionclip_deploy.manifest import QuantizedPrecision

_NUM_BINS = 2048  # even
_NUM_CANDIDATES = 128
_SMALLEST_SHARE = 0.05  # of the largest magnitude, that a threshold may be


class MagnitudeHistogram:
    """Counts of the magnitudes of all values seen; its range doubles when a larger one comes.

    Attributes:
        largest: The largest magnitude so far.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self._range = 0.0
        self._counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Count values of any shape and type."""
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0.0:
            self._counts[0] += magnitudes.size
            return
        self.largest = max(self.largest, largest)
        self._range = self._range or largest
        while largest > self._range:
            self._range *= 2
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([pairs, np.zeros(_NUM_BINS // 2, np.int64)])
        bins = (magnitudes * np.float32(_NUM_BINS / self._range)).astype(np.int64)
        self._counts += np.bincount(bins.clip(max=_NUM_BINS - 1), minlength=_NUM_BINS)

    def best_threshold(self) -> float:
        """The magnitude to cut off at for int8, by the mean squared error of rounding and cutting.

        It is the largest magnitude where that is best; 1 where every value was 0.
        """
        if self.largest == 0.0:
            return 1.0
        centres = (np.arange(_NUM_BINS) + 0.5) * (self._range / _NUM_BINS)
        best, least = self.largest, np.inf
        for share in np.linspace(1.0, _SMALLEST_SHARE, _NUM_CANDIDATES):
            threshold = self.largest * share
            step = threshold / ACTIVATION_LIMIT
            rounded = np.rint(centres / step).clip(max=ACTIVATION_LIMIT) * step
            error = float(((centres - rounded) ** 2) @ self._counts)
            if error < least:
                best, least = threshold, error
        return float(best)


def measure_thresholds(
    path: Path,
    clips: NDArray[np.uint8],
    *,
    by_frame: bool,
    precision: QuantizedPrecision = "int8",
    on_clip: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Find the threshold of the input of each product that can be quantised.

    The activations of one clip at a time are in memory.

    Args:
        path: The fp32 or fp16 graph; a file beside it is written and removed.
        clips: Shape (C, T, S, S, 3).
        by_frame: Whether the graph takes frames and not clips.
        precision: What is rounded to. In int8 the steps are as wide for small values as for large
            ones, so outliers are cut off; in fp8 they are not, and the threshold is the largest
            magnitude.
        on_clip: Called with the number of clips that are done.

    Returns:
        By the name of the input.
    """
    types = input_types(read_model(path))
    names = list(types)
    with_outputs = path.with_name(f"{path.stem}-activations.onnx")
    histograms = {name: MagnitudeHistogram() for name in names}
    try:
        write_with_outputs(path, with_outputs, types)
        session = GraphSession(with_outputs, names)
        for done, clip in enumerate(clips, 1):
            arrays: list[NDArray[Any]] = session.run(clip if by_frame else clip[np.newaxis])
            for name, array in zip(names, arrays, strict=True):
                histograms[name].add(array)
            if on_clip is not None:
                on_clip(done)
    finally:
        with_outputs.unlink(missing_ok=True)
    if precision == "fp8":
        return {name: histogram.largest or 1.0 for name, histogram in histograms.items()}
    return {name: histogram.best_threshold() for name, histogram in histograms.items()}
