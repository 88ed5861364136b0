"""The numbers of int8 and fp8: what values are divided by, and what they are rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes  # comes with onnx
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from actionclip_deploy.manifest import QuantizedPrecision, WeightRange

# Largest magnitude of a weight. CPUs without VNNI add pairs of products of uint8 and int8 in 16
# bits, and saturate: 2 x 255 x 127 does not fit, 2 x 255 x 64 does.
WEIGHT_LIMITS: dict[WeightRange, int] = {"reduced": 64, "full": 127}
ACTIVATION_LIMIT = 127
# The largest number of float8e4m3fn. It has 4 bits of mantissa for small numbers as for large
# ones, so that nothing is gained by cutting off outliers.
FP8_LIMIT = 448


@dataclass(frozen=True)
class Numbers:
    """What values are rounded to.

    Attributes:
        name: Goes into the names of rounded values.
        dtype: numpy's type.
        weight_limit: The largest magnitude of a weight.
        activation_limit: The largest magnitude of an activation, after which it saturates.
    """

    name: QuantizedPrecision
    dtype: np.dtype[Any]
    weight_limit: int
    activation_limit: int


def numbers_of(precision: QuantizedPrecision, weight_range: WeightRange | None = None) -> Numbers:
    """What a precision rounds to; the range of weights is for int8, by default `reduced`."""
    if precision == "fp8":
        return Numbers("fp8", np.dtype(ml_dtypes.float8_e4m3fn), FP8_LIMIT, FP8_LIMIT)
    limit = WEIGHT_LIMITS[weight_range or "reduced"]
    return Numbers("int8", np.dtype(np.int8), limit, ACTIVATION_LIMIT)


def quantize_weight(
    weight: NDArray[np.floating[Any]], numbers: Numbers
) -> tuple[NDArray[Any], NDArray[np.floating[Any]]]:
    """Round a weight, with a scale for each output.

    Args:
        weight: fp32 or fp16, shape (inputs, outputs).
        numbers: What to round to.

    Returns:
        Rounded values of the same shape, and scales (outputs,) in the weight's type; weight is
        about values x scales.
    """
    limit, given = numbers.weight_limit, weight.astype(np.float32)
    scale = round_scales(np.abs(given).max(axis=0) / limit, weight.dtype)
    values = (given / scale.astype(np.float32)).clip(-limit, limit)
    if numbers.dtype == np.int8:
        values = np.rint(values)
    return values.astype(numbers.dtype), scale


def round_scales(
    scales: NDArray[np.floating[Any]], dtype: np.dtype[Any]
) -> NDArray[np.floating[Any]]:
    """Scales in the type that a graph computes in, none of them zero."""
    rounded = np.asarray(scales, np.float32).astype(dtype)
    smallest = np.finfo(dtype).smallest_subnormal
    return np.where(scales > 0, np.maximum(rounded, smallest), np.ones((), dtype))
