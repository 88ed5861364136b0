from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actionclip_deploy.export.quantization import (
    WEIGHT_LIMITS,
    numbers_of,
    quantize_weight,
    round_scales,
)

# Every number that float8e4m3fn has from 0 on: 4 bits of exponent with a bias of 7, 3 of mantissa,
# and of the largest exponent all but the last, which is NaN.
FP8_NUMBERS = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]


def weights(dtype: Any = np.float32) -> np.ndarray:
    """Columns of very different sizes, the last one of zeros."""
    weight = np.random.default_rng(1).normal(size=(50, 3)) * [1, 10, 0.01]
    return np.column_stack([weight, np.zeros(50)]).astype(dtype)


@pytest.mark.parametrize("range_name", ["reduced", "full"])
def test_weights_round_to_the_nearest_step_of_their_own_output(range_name: Any) -> None:
    limit, weight = WEIGHT_LIMITS[range_name], weights()
    integers, scale = quantize_weight(weight, numbers_of("int8", range_name))
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(np.abs(integers).max(axis=0), [limit, limit, limit, 0])
    assert (np.abs(weight - integers * scale) <= scale / 2 * 1.0001).all()


def test_a_pair_of_products_of_reduced_weights_fits_into_16_bits_and_of_full_ones_does_not() -> (
    None
):
    # What vpmaddubsw adds on a CPU without VNNI: two products of uint8 and int8.
    fits = {name: 2 * 255 * limit <= 2**15 - 1 for name, limit in WEIGHT_LIMITS.items()}
    assert fits == {"reduced": True, "full": False}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_round_to_the_nearest_number_of_fp8(dtype: Any) -> None:
    assert FP8_NUMBERS[-1] == 448
    weight = weights(dtype)
    values, scale = quantize_weight(weight, numbers_of("fp8"))
    assert scale.dtype == dtype
    scaled = np.abs(weight.astype(np.float64) / scale.astype(np.float64))
    nearest = np.abs(scaled[..., np.newaxis] - FP8_NUMBERS).min(axis=-1)
    error = np.abs(np.abs(values.astype(np.float64)) - scaled)
    # A value that lies just beyond the largest number, since its scale was rounded, becomes that.
    np.testing.assert_allclose(error, nearest, atol=1e-5)
    assert (np.sign(values.astype(np.float32)) * np.sign(weight) >= 0).all()
    np.testing.assert_array_equal(values.astype(np.float32).max(axis=0)[3], 0)


def test_values_are_divided_by_the_scale_as_it_was_rounded() -> None:
    # This scale is 26.2 of the smallest steps of fp16, and so becomes 26: 63 of it are 62.5.
    weight = np.array([[1e-4], [0.99e-4]], np.float16)
    values, scale = quantize_weight(weight, numbers_of("int8", "reduced"))
    restored = values[1].astype(np.float64) * scale.astype(np.float64)
    assert abs(restored - weight[1]) <= scale / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_no_scale_is_zero(dtype: Any) -> None:
    scales = round_scales(np.array([0.0, 1e-12, 0.5]), np.dtype(dtype))
    assert scales.dtype == dtype
    assert (scales > 0).all()
    assert scales[0] == 1
    assert scales[2] == 0.5
