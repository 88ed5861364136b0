from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.export.quantization import (
    MagnitudeHistogram,
    find_products,
    measure_thresholds,
)
from actionclip_deploy.runtimes.onnx_graphs import read_model


def squared_error(values: np.ndarray, threshold: float) -> float:
    step = threshold / 127
    rounded = np.clip(np.rint(values / step), -127, 127) * step
    return float(((values - rounded) ** 2).mean())


def test_the_threshold_of_uniform_values_is_the_largest_of_them() -> None:
    histogram = MagnitudeHistogram()
    values = np.random.default_rng(1).uniform(-3, 3, 100_000).astype(np.float32)
    histogram.add(values)
    assert histogram.largest == np.abs(values).max()
    assert histogram.best_threshold() == pytest.approx(3, rel=0.02)


def test_a_single_outlier_is_cut_off_where_that_is_the_smaller_error() -> None:
    values = np.random.default_rng(1).normal(size=500_000).astype(np.float32)
    values[7] = 60.0
    histogram = MagnitudeHistogram()
    histogram.add(values)
    threshold = histogram.best_threshold()
    assert squared_error(values, threshold) < squared_error(values, 60.0) / 2
    # Against all thresholds in fine steps, on the values themselves.
    least = min(squared_error(values, t) for t in np.linspace(3, 60, 200))
    assert squared_error(values, threshold) < 1.1 * least


def test_the_order_of_the_parts_does_not_matter_much() -> None:
    generator = np.random.default_rng(2)
    parts = [generator.normal(size=20_000).astype(np.float32) * s for s in (0.1, 1, 5)]
    thresholds = []
    for order in ((0, 1, 2), (2, 1, 0)):
        histogram = MagnitudeHistogram()
        for place in order:
            histogram.add(parts[place])
        thresholds.append(histogram.best_threshold())
    assert thresholds[0] == pytest.approx(thresholds[1], rel=0.03)


@pytest.mark.parametrize("values", [np.zeros(5), np.zeros(0)])
def test_values_that_are_all_zero_have_a_threshold_to_divide_by(values: np.ndarray) -> None:
    histogram = MagnitudeHistogram()
    histogram.add(values.astype(np.float32))
    assert histogram.best_threshold() == 1.0


def test_values_in_fp16_count_as_they_do_in_fp32() -> None:
    values = np.random.default_rng(3).normal(size=10_000).astype(np.float16)
    histograms = [MagnitudeHistogram(), MagnitudeHistogram()]
    histograms[0].add(values)
    histograms[1].add(values.astype(np.float32))
    assert histograms[0].largest == histograms[1].largest == np.abs(values).max()
    assert histograms[0].best_threshold() == histograms[1].best_threshold()


def test_in_fp8_the_threshold_is_the_largest_magnitude_also_in_a_fp16_graph(
    small_model: Any, plan_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / "visual.onnx"
    write_graph(plan_of(small_model(), "visual", "fp16"), path)
    clips = np.random.default_rng(4).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    fp8 = measure_thresholds(path, clips, by_frame=True, precision="fp8")
    int8 = measure_thresholds(path, clips, by_frame=True)
    assert fp8.keys() == int8.keys() == {p.input for p in find_products(read_model(path))}
    # The first product takes rows of a LayerNorm of 64 values, none of which is beyond sqrt(64).
    assert 1 < fp8[next(iter(fp8))] <= 8
    assert all(fp8[name] >= int8[name] for name in fp8)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "prompt"), [("visual", "meanp"), ("video", "joint")])
def test_the_thresholds_are_of_every_product_and_nothing_is_left_behind(
    name: str, prompt: str, small_model: Any, plan_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.onnx"
    write_graph(plan_of(small_model(prompt), name), path)
    clips = np.random.default_rng(4).integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    done: list[int] = []
    thresholds = measure_thresholds(path, clips, by_frame=name == "visual", on_clip=done.append)
    assert thresholds.keys() == {p.input for p in find_products(read_model(path))}
    assert min(thresholds.values()) > 0
    assert done == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]
