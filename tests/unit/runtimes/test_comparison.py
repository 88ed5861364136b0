from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fakes import fake_manifest

from actionclip_deploy.manifest import Manifest, QuantizationSpec
from actionclip_deploy.runtimes.parity import TOLERANCES, compare, failed, tolerance_of


def rows(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


REFERENCE = rows([1, 0], [0, 1], [0.6, 0.8])


def test_equal_outputs_agree() -> None:
    result = compare("visual", REFERENCE, REFERENCE, 1e-4, 0.99999)
    assert result.passed
    assert (result.what, result.batch_size, result.error) == ("visual", 3, None)
    assert result.max_abs_difference == 0
    assert result.min_cosine == pytest.approx(1)
    assert result.top1_agreement is None
    assert result.top5_agreement is None


def test_the_largest_difference_and_the_smallest_cosine_are_told() -> None:
    output = REFERENCE.copy()
    output[1] = [0.5, 1]
    result = compare("visual", output, REFERENCE, 1.0, 0.9)
    assert result.max_abs_difference == 0.5
    assert result.min_cosine == pytest.approx(1 / math.sqrt(1.25))  # of (0.5, 1) and (0, 1)
    assert not result.passed
    assert result.in_words() == (
        "max abs difference 0.5, allowed 1; min cosine 0.8944272, allowed 0.9"
    )


def test_a_difference_over_the_tolerance_disagrees_whatever_the_cosine() -> None:
    # Twice as long and in the same direction, as where a normalisation is left out.
    result = compare("visual", 2 * REFERENCE, REFERENCE, 0.1, 0.99999)
    assert result.min_cosine == pytest.approx(1)
    assert not result.passed


def test_another_direction_disagrees_whatever_the_difference() -> None:
    output = rows([1, 0], [0, 1], [0.8, 0.6])
    assert not compare("visual", output, REFERENCE, 0.3, 0.99).passed
    assert compare("visual", output, REFERENCE, 0.3, 0.9).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_agree(value: float) -> None:
    output = REFERENCE.copy()
    output[2, 1] = value
    result = compare("visual", output, REFERENCE, math.inf, -2.0)
    assert not result.passed
    assert result.in_words() == "1 of 6 values are NaN or infinite"
    assert math.isnan(result.min_cosine)
    assert math.isnan(result.max_abs_difference)


def test_rows_of_zeros_agree_with_nothing() -> None:
    result = compare("visual", np.zeros_like(REFERENCE), REFERENCE, 2.0, 0.0)
    assert result.min_cosine == -1
    assert not result.passed


@pytest.mark.parametrize("shape", [(1, 2), (3, 3), (3, 1), (2,)])
def test_another_shape_never_agrees(shape: tuple[int, ...]) -> None:
    result = compare("temporal", np.zeros(shape, np.float32), REFERENCE, 10.0)
    assert not result.passed
    assert result.in_words() == f"the output has shape {shape}, expected (3, 2)"


def test_a_run_that_failed_never_agrees() -> None:
    result = failed("textual", 3, "out of memory")
    assert not result.passed
    assert result.in_words() == "out of memory"


def test_the_first_label_has_to_agree() -> None:
    reference = rows([0.7, 0.2, 0.1], [0.1, 0.2, 0.7])
    output = rows([0.7, 0.2, 0.1], [0.1, 0.5, 0.4])
    result = compare("scores", output, reference, 0.35, labels=True)
    assert result.max_abs_difference == pytest.approx(0.3)
    assert result.top1_agreement == 0.5
    assert result.top5_agreement == 1.0  # all three labels are in both lists
    assert not result.passed
    assert "the first label agrees for 50% of the clips" in result.in_words()


def test_labels_that_rounding_decides_between_may_change_places() -> None:
    reference = rows([0.4000, 0.3995, 0.2005])
    output = rows([0.3996, 0.3999, 0.2005])
    assert compare("scores", output, reference, 1e-3, labels=True).passed
    # The same exchange between labels that are further apart than the tolerance.
    result = compare("scores", output, reference, 4e-4, labels=True)
    assert result.top1_agreement == 0.0
    assert not result.passed


def test_the_first_five_labels_are_compared_as_sets() -> None:
    reference = rows([9, 8, 7, 6, 5, 4, 3, 2])
    output = rows([5, 6, 7, 8, 3, 4, 9, 2])  # first five: 6, 3, 2, 1, 0 -> 6 is not among them
    result = compare("scores", output, reference, 0.5, labels=True)
    assert result.top5_agreement == pytest.approx(4 / 5)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_fewer_than_five_labels_are_compared(num_labels: int) -> None:
    reference = rows([1, 0][:num_labels])
    result = compare("scores", reference, reference, 1e-3, labels=True)
    assert (result.top1_agreement, result.top5_agreement) == (1.0, 1.0)


def test_tolerances_are_those_promised() -> None:
    assert TOLERANCES["fp32"].difference == 1e-4
    assert TOLERANCES["fp32"].min_cosine == 0.99999
    assert TOLERANCES["fp16"].min_cosine == 0.9999
    for narrow, wide in zip(
        vars(TOLERANCES["fp32"]).values(), vars(TOLERANCES["fp16"]).values(), strict=True
    ):
        assert narrow != wide


def int8_manifest(precision: str = "int8", **measured: float) -> Manifest:
    manifest = fake_manifest()
    visual = manifest.graphs["visual"].model_copy(update={"precision": precision})
    spec = QuantizationSpec(
        recipe="dynamic",
        weight_range="reduced",
        quantized_blocks=("blocks.0",),
        unquantized_blocks=(),
        num_calibration_clips=0,
        accepted_by="cosine",
        bound=0.999,
        unquantized_value=None,
        quantized_value=0.9995,
        golden_min_cosine=measured.get("cosine", 0.9995),
        golden_max_difference=measured.get("difference", 0.03),
    )
    graphs = {**manifest.graphs, "visual": visual}
    return manifest.model_copy(update={"graphs": graphs, "quantization": spec})


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_graph_may_be_twice_as_far_off_as_at_its_export(precision: str) -> None:
    tolerance = tolerance_of(int8_manifest(precision), "visual")
    assert tolerance.min_cosine == pytest.approx(0.999, abs=1e-7)
    assert tolerance.min_cosine <= 0.999
    assert tolerance.difference == tolerance.row == pytest.approx(0.06)


def test_an_int8_graph_need_not_be_better_than_fp16() -> None:
    tolerance = tolerance_of(int8_manifest(cosine=1.0, difference=0.0), "visual")
    assert (tolerance.min_cosine, tolerance.difference) == (0.9999, 0.02)


def test_the_other_graphs_of_an_int8_bundle_are_judged_as_fp32() -> None:
    assert tolerance_of(int8_manifest(), "temporal") == TOLERANCES["fp32"]
    assert tolerance_of(fake_manifest(), "visual") == TOLERANCES["fp32"]


def test_saturation_as_measured_without_vnni_is_beyond_the_tolerance() -> None:
    """A ViT-B/32 with full weights: 0.99995 with VNNI, 0.981 without; reduced, 0.99988 in both."""
    full, reduced = int8_manifest(cosine=0.99995), int8_manifest(cosine=0.999875)
    assert tolerance_of(full, "visual").min_cosine > 0.981
    assert tolerance_of(reduced, "visual").min_cosine < 0.999878


def test_the_margin_is_the_smallest_lead_of_the_right_label() -> None:
    reference = rows([0.7, 0.2, 0.1], [0.1, 0.5, 0.4])
    output = rows([0.6, 0.3, 0.1], [0.1, 0.4, 0.5])
    result = compare("scores", output, reference, 0.5, labels=True)
    assert result.margin == pytest.approx(-0.1)  # 0.4 of the right one, 0.5 of another
    assert compare("visual", output, reference, 0.5).margin is None


def test_a_single_label_has_no_margin() -> None:
    assert compare("scores", rows([1]), rows([1]), 0.5, labels=True).margin is None
