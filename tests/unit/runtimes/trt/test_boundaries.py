from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_graphs import export_small, inputs_of, largest_difference, run_onnx

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.trt.faults import (
    find_boundaries,
    input_name,
    part_between,
)
from actionclip_deploy.runtimes.trt.rewrites import REWRITES

# A part in ONNX Runtime rounds where the whole graph, fused over the cut, may not. fp8 and int8
# may round to the number beside.
TOLERANCES = {"fp32": 2e-6, "fp16": 2e-3, "int8": 1e-5, "fp8": 3e-2}

VIT = ["patch_embedding", "blocks.0", "blocks.1", "last_block", "projection"]
PARTS = {
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
    *((variant, graph, precision) for variant, graph in PARTS for precision in ("fp32", "fp16")),
    ("meanp", "visual", "int8"),
    ("meanp", "visual", "fp8"),
]


@pytest.mark.parametrize(("variant", "graph", "precision"), CASES)
def test_a_graph_is_cut_behind_its_embedding_and_each_block(
    variant: str, graph: str, precision: str
) -> None:
    model = export_small(variant, graph, precision)
    boundaries = find_boundaries(model)
    assert [boundary.part for boundary in boundaries] == PARTS[variant, graph]
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
        assert largest_difference(value, run_onnx(head, inputs)) < TOLERANCES[precision]
        known[input_name(boundary)], before = value, boundary
    assert largest_difference(value, run_onnx(model, inputs)) < TOLERANCES[precision]


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
        assert [boundary.part for boundary in found] == PARTS[variant, graph]


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
