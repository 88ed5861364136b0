"""Which part of a graph is wrong: over the fake TensorRT, by itself, and the cuts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_graphs import export_small, inputs_of, largest_difference, run_onnx

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.parity import TOLERANCES, Comparison
from actionclip_deploy.runtimes.trt.build import BuildRequest, EngineBuilder
from actionclip_deploy.runtimes.trt.faults import (
    Fault,
    find_boundaries,
    find_faults,
    find_first_bad_part,
    input_name,
    part_between,
    run_on_cpu,
)
from actionclip_deploy.runtimes.trt.plan import BuildOptions, parse_profiles
from actionclip_deploy.runtimes.trt.rewrites import REWRITES, rewritten_model
from actionclip_deploy.runtimes.trt.runtime import verify_newest


def faults_of(bundle: Bundle) -> list[Fault]:
    request = BuildRequest(parse_profiles(["throughput"]), options=BuildOptions())
    EngineBuilder(bundle, "tensorrt").build(request)
    return find_faults(bundle, verify_newest(bundle, "tensorrt"))


def weights(model: onnx.ModelProto, text: str) -> bool:
    return any(text in tensor.name for tensor in model.graph.initializer)


def sees_frames(model: onnx.ModelProto) -> bool:
    return weights(model, "tower.")


def test_engines_that_agree_have_no_faults(tensorrt: Any, bundle: Bundle) -> None:
    assert faults_of(bundle) == []


@pytest.mark.parametrize("part", ["blocks.0", "last_block"])
def test_the_first_bad_block_is_named(tensorrt: Any, bundle: Bundle, part: str) -> None:
    tensorrt.state.faults = {"wrong in batches"}
    tensorrt.state.strikes = lambda model, _: weights(model, f"tower.{part}.")
    (fault,) = faults_of(bundle)
    assert (fault.graph, fault.finding.first_bad) == ("visual", part)
    assert f"The first bad part is {part}" in fault.in_words()
    assert not fault.finding.needs_company


def test_a_fault_of_the_temporal_layers_is_found_in_their_graph(
    tensorrt: Any, bundle: Bundle
) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: weights(model, "head.blocks.1.")
    (fault,) = faults_of(bundle)
    assert (fault.graph, fault.finding.first_bad) == ("temporal", "blocks.1")


def test_a_fault_of_two_blocks_together_is_told(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: (
        weights(model, "tower.blocks.0.") and weights(model, "tower.last_block.")
    )
    (fault,) = faults_of(bundle)
    assert fault.finding.needs_company
    assert "needs several parts together" in fault.in_words()


def test_the_smallest_batch_that_is_wrong_is_looked_at(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    tensorrt.state.faults = {"wrong in batches"}
    tensorrt.state.strikes = lambda model, _: sees_frames(model)
    (fault,) = faults_of(bundle)
    # Of one frame the row itself is right; five are the fewest that are verified besides.
    assert fault.rows == 5
    assert fault.finding.first_bad == "patch_embedding"
    assert fault.record().parts[0].what == "patch_embedding"


def test_a_form_that_the_reference_cannot_compute_is_told(bundle: Bundle) -> None:
    half = rewritten_model(bundle, "visual", "bf16")
    size = bundle.manifest.model.input_size
    with pytest.raises(EngineError, match=r"cannot compute this form .*engines remove"):
        run_on_cpu(half, {"frames": np.zeros((1, size, size, 3), np.uint8)})


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
    assert [row.what for row in finding.parts] == VIT
    assert [row.what for row in finding.heads] == VIT[1:]
    assert all(row.max_abs_difference == 0 for row in finding.parts)
    assert "Each of the 5 parts of the graph is right by itself, and so is" in finding.in_words()


@pytest.mark.parametrize("block", ["blocks.0", "blocks.1", "last_block"])
def test_the_first_bad_block_is_named_and_nothing_behind_it_is_run(block: str) -> None:
    finding = bisect(wrong_where([block], add_noise))
    assert finding.first_bad == block
    assert not finding.needs_company
    assert [row.what for row in finding.parts] == VIT[: VIT.index(block) + 1]
    assert [row.passed for row in finding.parts][:-1] == [True] * VIT.index(block)
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


# A part in ONNX Runtime rounds where the whole graph, fused over the cut, may not. fp8 and int8
# may round to the number beside.
CUT_TOLERANCES = {"fp32": 2e-6, "fp16": 2e-3, "int8": 1e-5, "fp8": 3e-2}

VIT = ["patch_embedding", "blocks.0", "blocks.1", "last_block", "projection"]
PARTS_OF = {
    ("meanp", "visual"): VIT,
    ("gelu", "visual"): VIT,
    ("joint", "video"): VIT,
    ("shift", "video"): VIT,
    ("meanp", "textual"): ["token_embedding", *VIT[1:]],
    ("transf", "temporal"): ["blocks.0", "blocks.1", "head"],
    ("transf_cls", "temporal"): ["layers.0", "last_layer", "head"],
    ("lstm", "temporal"): ["head"],
    ("conv1d", "temporal"): ["head"],
    ("meanp", "temporal"): ["head"],
    # A stem of three convolutions, a ReLU behind each, a pool, and the stages' five blocks.
    ("resnet", "visual"): [f"body.{place}" for place in (0, 2, 4, 7, 8, 9, 10, 11)]
    + ["projection"],
}
CASES = [
    *((variant, graph, precision) for variant, graph in PARTS_OF for precision in ("fp32", "fp16")),
    ("meanp", "visual", "int8"),
    ("meanp", "visual", "fp8"),
]


@pytest.mark.parametrize(("variant", "graph", "precision"), CASES)
def test_a_graph_is_cut_behind_its_embedding_and_each_block(
    variant: str, graph: str, precision: str
) -> None:
    model = export_small(variant, graph, precision)
    boundaries = find_boundaries(model)
    assert [boundary.part for boundary in boundaries] == PARTS_OF[variant, graph]
    assert boundaries[-1].value == model.graph.output[0].name


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("variant", "graph", "precision"), CASES)
def test_the_parts_one_after_the_other_give_what_the_graph_gives(
    variant: str, graph: str, precision: str, rows: int
) -> None:
    model = export_small(variant, graph, precision)
    inputs = inputs_of(model, rows)
    known, before = dict(inputs), None
    for boundary in find_boundaries(model):
        part = part_between(model, before, boundary)
        onnx.checker.check_model(part, full_check=True)
        value = run_onnx(part, {v.name: known[v.name] for v in part.graph.input})
        head = part_between(model, None, boundary)
        onnx.checker.check_model(head, full_check=True)
        assert value.dtype == np.float32
        assert largest_difference(value, run_onnx(head, inputs)) < CUT_TOLERANCES[precision]
        known[input_name(boundary)], before = value, boundary
    assert largest_difference(value, run_onnx(model, inputs)) < CUT_TOLERANCES[precision]


def weights_of(model: Any) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("variant", ["meanp", "shift"])
def test_a_part_has_the_products_of_its_block_and_no_others(variant: str) -> None:
    graph = "visual" if variant == "meanp" else "video"
    model = export_small(variant, graph, "fp16")
    boundaries = find_boundaries(model)
    products = {
        name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv")
        for name in node.input[1:2]
        if name in weights_of(model)
    }
    seen: set[str] = set()
    for before, after in zip((None, *boundaries), boundaries, strict=False):
        mine = products & weights_of(part_between(model, before, after))
        if after.part in ("blocks.0", "blocks.1", "last_block"):
            assert mine == {name for name in products if f".{after.part}." in name}
        assert mine
        assert not mine & seen
        seen |= mine
    assert seen == products


def test_a_block_of_a_text_takes_the_tokens_as_well() -> None:
    model = export_small("meanp", "textual")
    embedding, first, second, *_ = find_boundaries(model)
    part = part_between(model, first, second)
    assert [value.name for value in part.graph.input] == [input_name(first), "tokens"]
    assert [v.name for v in part_between(model, None, embedding).graph.input] == ["tokens"]


def test_a_cut_in_fp16_is_fp32_outside() -> None:
    model = export_small("resnet", "visual", "fp16")
    first, second, *_ = find_boundaries(model)
    part = part_between(model, first, second)
    values = [*part.graph.input, *part.graph.output]
    assert {v.type.tensor_type.elem_type for v in values} == {TensorProto.FLOAT}
    types = {tensor.data_type for tensor in part.graph.initializer}
    assert types == {TensorProto.FLOAT16}


@pytest.mark.parametrize("name", REWRITES)
def test_rewritten_graphs_have_the_same_parts(name: str) -> None:
    for variant, graph in (("meanp", "visual"), ("transf", "temporal"), ("transf_cls", "temporal")):
        rewritten = REWRITES[name].apply(export_small(variant, graph, "fp16"))
        if rewritten is None:  # what is fp32 already
            assert name == "fp32-islands"
            continue
        found = find_boundaries(rewritten)
        assert [boundary.part for boundary in found] == PARTS_OF[variant, graph]


def test_a_block_that_gives_two_values_cannot_be_cut() -> None:
    # The block goes on in its state as well as in its output.
    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(np.ones(shape, np.float32), name)

    lstm = ["x", "head.blocks.0.weight", "head.blocks.0.recurrence"]
    nodes = [
        helper.make_node("LSTM", lstm, ["", "hidden", "cell"], hidden_size=4),
        helper.make_node("MatMul", ["hidden", "head.blocks.1.weight"], ["next"]),
        helper.make_node("Add", ["next", "cell"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "B", 4])],
        [
            weight(lstm[1], 1, 16, 4),
            weight(lstm[2], 1, 16, 4),
            weight("head.blocks.1.weight", 4, 4),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    with pytest.raises(EngineError, match=r"blocks.0 of this graph gives more than one value"):
        find_boundaries(model)
