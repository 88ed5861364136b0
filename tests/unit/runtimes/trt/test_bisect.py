from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_graphs import export_small, inputs_of, run_onnx

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.parity import TOLERANCES, Comparison
from actionclip_deploy.runtimes.trt.faults import find_first_bad_part

PARTS = ["patch_embedding", "blocks.0", "blocks.1", "last_block", "projection"]
Run = Callable[[Any, Mapping[str, np.ndarray]], np.ndarray]


def run(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return run_onnx(model, dict(inputs))


def wrong_where(blocks: Collection[str], change: Callable[[np.ndarray], np.ndarray]) -> Run:
    """Computes a graph, and changes its result where the graph has all of some blocks."""

    def run_wrongly(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        names = [tensor.name for tensor in model.graph.initializer]
        output = run(model, inputs)
        there = all(any(f"{block}.mlp" in name for name in names) for block in blocks)
        return change(output) if there else output

    return run_wrongly


def add_noise(values: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    return values + 0.2 * np.abs(values).max() * noise


def bisect(candidate: Run, precision: str = "fp16", **options: Any) -> Any:
    model = export_small("meanp", "visual", precision)
    tolerance = TOLERANCES[precision]  # type: ignore[index]
    return find_first_bad_part(
        model, run, candidate, inputs_of(model, 5), tolerance=tolerance, **options
    )


def test_parts_that_are_all_right_are_said_to_be() -> None:
    finding = bisect(run)
    assert finding.first_bad is None
    assert not finding.needs_company
    assert [row.what for row in finding.parts] == PARTS
    assert [row.what for row in finding.heads] == PARTS[1:]
    assert all(row.max_abs_difference == 0 for row in finding.parts)
    assert "Each of the 5 parts of the graph is right by itself, and so is" in finding.in_words()


@pytest.mark.parametrize("block", ["blocks.0", "blocks.1", "last_block"])
def test_the_first_bad_block_is_named_and_nothing_behind_it_is_run(block: str) -> None:
    finding = bisect(wrong_where([block], add_noise))
    assert finding.first_bad == block
    assert not finding.needs_company
    assert [row.what for row in finding.parts] == PARTS[: PARTS.index(block) + 1]
    assert [row.passed for row in finding.parts][:-1] == [True] * PARTS.index(block)
    assert finding.heads == ()
    assert f"first bad part is {block}: max abs difference" in finding.in_words()


def test_a_wrong_weight_is_found_in_its_block() -> None:
    def candidate(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        changed = onnx.load_from_string(model.SerializeToString())
        for tensor in changed.graph.initializer:
            if tensor.name == "tower.blocks.1.attention.out_projection.weight":
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(values[::-1].copy(), tensor.name))
        return run(changed, inputs)

    assert bisect(candidate).first_bad == "blocks.1"


def test_a_later_part_gets_what_the_reference_gives_it() -> None:
    # Wrong in the first block by less than the tolerance: were it carried on, the next would not
    # be exact.
    finding = bisect(wrong_where(["blocks.0"], lambda values: values * 1.001))
    differences = [row.max_abs_difference for row in finding.parts]
    assert differences[1] == pytest.approx(1e-3, rel=1e-2)
    assert differences[2:] == [0, 0, 0]


def test_blocks_that_are_wrong_only_together_are_found_in_the_growing_graph() -> None:
    finding = bisect(wrong_where(["blocks.0", "blocks.1"], add_noise))
    assert [row.passed for row in finding.parts] == [True] * 5
    assert [(row.what, row.passed) for row in finding.heads] == [
        ("blocks.0", True),
        ("blocks.1", False),
    ]
    assert finding.first_bad == "blocks.1"
    assert finding.needs_company
    assert "from its beginning to blocks.1 is not" in finding.in_words()
    assert "needs several parts together" in finding.in_words()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: np.full_like(values, np.nan), r"1600 of 1600 values are NaN or infinite"),
        (lambda values: values[:1], r"the output has shape \(1, 64\), expected \(25, 64\)"),
    ],
)
def test_what_cannot_be_compared_is_bad_and_says_why(change: Any, words: str) -> None:
    finding = bisect(wrong_where(["blocks.0"], change))
    assert finding.first_bad == "blocks.0"
    assert re.search(words, finding.in_words())


def test_rows_that_change_places_are_bad() -> None:
    finding = bisect(lambda model, inputs: run(model, inputs)[::-1])
    assert finding.first_bad == "patch_embedding"


def test_text_and_frames_over_time_are_bisected_as_well() -> None:
    for variant, graph in (("meanp", "textual"), ("transf", "temporal"), ("shift", "video")):
        model = export_small(variant, graph)
        candidate = wrong_where(["blocks.1"], add_noise)
        finding = find_first_bad_part(
            model, run, candidate, inputs_of(model, 2), tolerance=TOLERANCES["fp32"]
        )
        assert finding.first_bad == "blocks.1"


def test_each_comparison_is_told_as_it_is_made() -> None:
    told: list[Comparison] = []
    finding = bisect(wrong_where(["blocks.1"], add_noise), on_result=told.append)
    assert told == list(finding.parts)


def test_a_reference_that_is_not_finite_is_no_fault_of_an_engine() -> None:
    def overflowing(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.full_like(run(model, inputs), np.inf)

    model = export_small("meanp", "visual")
    with pytest.raises(EngineError, match=r"patch_embedding gives .*--precision fp32"):
        find_first_bad_part(
            model, overflowing, run, inputs_of(model, 1), tolerance=TOLERANCES["fp32"]
        )
