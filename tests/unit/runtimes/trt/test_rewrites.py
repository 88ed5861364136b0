from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from small_graphs import (
    SMALL_GRAPHS,
    export_small,
    inputs_of,
    largest_difference,
    run_onnx,
)

from actionclip_deploy.runtimes.trt.rewrites import REWRITES

# Relative to the largest value of the original. fp32: sums in another order. fp16: other sums
# round otherwise, to 11 digits. fp8: a value beside the middle between two of its numbers, which
# are 6 % apart, may go to the other; int8 likewise. bf16 has 8 digits: in these models, where a
# score of attention is 16, it is off by 0.03 of the result.
TOLERANCES = {"fp32": 2e-6, "fp16": 2e-3, "int8": 1e-5, "fp8": 3e-2, "bf16": 6e-2}
BATCHES = (1, 2, 5)
ATTENTION_REWRITES = ("attention-form", "attention-scaled", "broken-fusion", "split-qkv")
QUANTISED = (("meanp", "visual", "int8"), ("meanp", "visual", "fp8"))


def cases(precisions: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Variant, graph and precision; text is fp32 whatever is asked for."""
    return [
        (variant, graph, precision)
        for variant, graph in SMALL_GRAPHS
        for precision in precisions
        if graph != "textual" or precision == "fp32"
    ]


def ops(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def signature(model: Any) -> list[bytes]:
    return [v.SerializeToString() for v in (*model.graph.input, *model.graph.output)]


def check_same_result(name: str, original: Any, tolerance: float) -> Any:
    before = original.SerializeToString()
    rewritten = REWRITES[name].apply(original)
    assert rewritten is not None
    assert original.SerializeToString() == before
    onnx.checker.check_model(rewritten, full_check=True)
    assert signature(rewritten) == signature(original)
    for rows in BATCHES:
        inputs = inputs_of(original, rows)
        given, wanted = run_onnx(rewritten, inputs), run_onnx(original, inputs)
        assert given.shape == wanted.shape
        assert largest_difference(given, wanted) < tolerance
    return rewritten


def test_the_table_is_in_the_order_in_which_a_repair_tries_them() -> None:
    assert list(REWRITES) == [
        "fp32-islands",
        "fp32-attention",
        "attention-form",
        "attention-scaled",
        "broken-fusion",
        "split-qkv",
        "bf16",
    ]
    for name, rewrite in REWRITES.items():
        assert rewrite.name == name
        assert re.fullmatch(r"[A-Z].*\.", str(rewrite.edit.__doc__).partition("\n")[0])


@pytest.mark.parametrize("name", ATTENTION_REWRITES)
@pytest.mark.parametrize(("variant", "graph", "precision"), [*cases(("fp32", "fp16")), *QUANTISED])
def test_another_form_of_attention_gives_the_same_result(
    variant: str, graph: str, precision: str, name: str
) -> None:
    original = export_small(variant, graph, precision)
    check_same_result(name, original, TOLERANCES[precision])


@pytest.mark.parametrize(
    ("variant", "graph", "precision"), [*cases(("fp16",)), ("meanp", "visual", "fp8")]
)
def test_attention_and_activations_in_fp32_give_the_same_result(
    variant: str, graph: str, precision: str
) -> None:
    original = export_small(variant, graph, precision)
    check_same_result("fp32-attention", original, TOLERANCES[precision])


def element_types(model: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    return types | {t.name: t.data_type for t in inferred.initializer}


@pytest.mark.parametrize("variant", ["meanp", "gelu"])
def test_only_products_with_weights_are_left_in_fp16(variant: str) -> None:
    rewritten = REWRITES["fp32-attention"].apply(export_small(variant, "visual", "fp16"))
    types = element_types(rewritten)
    halves = [n for n in rewritten.graph.node if types.get(n.input[0]) == TensorProto.FLOAT16]
    moves = {"Cast", "Reshape", "Transpose", "Split"}
    computing = [n for n in halves if n.op_type not in moves]
    # The levels of the pixels become -1 to 1, exactly, before the product of the patches.
    assert [n.op_type for n in computing[:3]] == ["Sub", "Mul", "MatMul"]
    assert {n.op_type for n in computing[3:]} == {"Gemm"}
    activations = [n for n in rewritten.graph.node if n.op_type in ("Sigmoid", "Erf", "Softmax")]
    assert len(activations) == 6  # a softmax and an activation function in each block
    assert all(types[node.input[0]] == TensorProto.FLOAT for node in activations)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_exported_graphs_have_their_islands_already(precision: str) -> None:
    assert REWRITES["fp32-islands"].apply(export_small("meanp", "visual", precision)) is None


def half_normaliser() -> Any:
    """LayerNorm, softmax and unit norm in fp16, as a graph of somebody else's has them."""
    width = 16

    def weights(name: str, values: np.ndarray) -> Any:
        return numpy_helper.from_array(values.astype(np.float16), name)

    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("LayerNormalization", ["half", "scale", "shift"], ["normed"], axis=-1),
        helper.make_node("Softmax", ["normed"], ["shares"], axis=-1),
        helper.make_node("ReduceL2", ["shares", "last"], ["norm"], keepdims=1),
        helper.make_node("Clip", ["norm", "least"], ["clipped"]),
        helper.make_node("Div", ["shares", "clipped"], ["unit"]),
        helper.make_node("Cast", ["unit"], ["y"], to=TensorProto.FLOAT),
    ]
    initializers = [
        weights("scale", np.linspace(0.5, 2, width)),
        weights("shift", np.linspace(-1, 1, width)),
        weights("least", np.asarray(1e-4)),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]
    shape = ["N", width]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_sums_over_many_values_in_fp16_become_islands_of_fp32() -> None:
    rewritten = check_same_result("fp32-islands", half_normaliser(), TOLERANCES["fp16"])
    types = element_types(rewritten)
    # The input was fp32 and the output is: nothing goes through fp16 on the way.
    assert TensorProto.FLOAT16 not in types.values()


def test_an_island_of_fp32_keeps_what_fp16_would_lose() -> None:
    model = half_normaliser()
    # Squares of these overflow fp16, where the largest number is 65504.
    x = {"x": np.linspace(-900, 900, 32, dtype=np.float32).reshape(2, 16)}
    rows = x["x"].astype(np.float64)
    normed = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    normed = normed * np.linspace(0.5, 2, 16) + np.linspace(-1, 1, 16)
    shares = np.exp(normed - normed.max(1, keepdims=True))
    wanted = shares / np.linalg.norm(shares, axis=1, keepdims=True)
    given = run_onnx(REWRITES["fp32-islands"].apply(model), x)
    assert largest_difference(given, wanted) < TOLERANCES["fp16"]


@pytest.mark.parametrize("name", ["fp32-attention", "bf16"])
@pytest.mark.parametrize("graph", ["visual", "textual"])
def test_a_graph_without_fp16_has_nothing_to_lift(graph: str, name: str) -> None:
    assert REWRITES[name].apply(export_small("meanp", graph)) is None


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("variant", ["meanp", "lstm", "conv1d"])
def test_a_head_without_attention_has_nothing_to_rewrite(variant: str, name: str) -> None:
    assert REWRITES[name].apply(export_small(variant, "temporal", "fp16")) is None


# ONNX Runtime's CPU has no bf16 (1.32: "could not find an implementation"): onnx's own reference
# computes the rewritten graph.
@pytest.mark.parametrize(
    ("variant", "graph"), [case for case in SMALL_GRAPHS if case[1] != "textual"]
)
def test_bf16_gives_nearly_the_same_result(variant: str, graph: str) -> None:
    original = export_small(variant, graph, "fp16")
    rewritten = REWRITES["bf16"].apply(original)
    onnx.checker.check_model(rewritten, full_check=True)
    assert signature(rewritten) == signature(original)
    assert ops(rewritten) == ops(original)
    for rows in (1, 2):
        inputs = inputs_of(original, rows)
        given = ReferenceEvaluator(rewritten).run(None, inputs)[0]
        assert largest_difference(given, run_onnx(original, inputs)) < TOLERANCES["bf16"]


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_nothing_stays_fp16_in_bf16_and_no_value_moves_by_more_than_its_rounding(
    precision: str,
) -> None:
    original = export_small("meanp", "visual", precision)
    rewritten = REWRITES["bf16"].apply(original)
    assert TensorProto.FLOAT16 not in element_types(rewritten).values()
    before = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    halves = [t for t in rewritten.graph.initializer if t.data_type == TensorProto.BFLOAT16]
    assert halves
    for tensor in halves:
        # A bf16 is the upper half of an fp32.
        bits = numpy_helper.to_array(tensor).view(np.uint16).astype(np.uint32) << 16
        exact = before[tensor.name].astype(np.float32)
        np.testing.assert_allclose(bits.view(np.float32), exact, rtol=2**-8)


def test_a_resnet_cannot_be_bf16_in_its_opset() -> None:
    assert REWRITES["bf16"].apply(export_small("resnet", "visual", "fp16")) is None


@pytest.mark.parametrize("name", ["attention-form", "attention-scaled", "broken-fusion"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_attention_of_a_resnet_is_rewritten_too(precision: str, name: str) -> None:
    original = export_small("resnet", "visual", precision)
    check_same_result(name, original, TOLERANCES[precision])


def test_heads_are_folded_into_products_of_three_dimensions() -> None:
    rewritten = REWRITES["attention-form"].apply(export_small("meanp", "visual"))
    shapes = onnx.shape_inference.infer_shapes(rewritten, data_prop=True).graph.value_info
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in shapes}
    products = [n for n in rewritten.graph.node if n.op_type == "MatMul"]
    assert [ranks[n.output[0]] for n in products[1:-1]] == [3] * 6


def test_scores_are_scaled_once_and_the_weights_not() -> None:
    original = export_small("meanp", "visual")
    rewritten = REWRITES["attention-scaled"].apply(original)
    assert ops(rewritten)["Mul"] == ops(original)["Mul"] + 3
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for model in (original, rewritten)
    )
    name = "tower.blocks.1.attention.in_projection.weight"
    assert name not in after
    np.testing.assert_array_equal(after[f"{name}.scaled"][:, :64], 8 * before[name][:, :64])
    np.testing.assert_array_equal(after[f"{name}.scaled"][:, 64:], before[name][:, 64:])


def test_no_product_with_one_query_is_left() -> None:
    original = export_small("meanp", "visual")
    rewritten = REWRITES["broken-fusion"].apply(original)
    shapes = onnx.shape_inference.infer_shapes(rewritten, data_prop=True).graph.value_info
    queries = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in shapes}
    scores = [
        producer.output[0]
        for producer in rewritten.graph.node
        if producer.op_type == "MatMul" and len(queries[producer.input[0]]) == 4
    ]
    # Five tokens in two blocks, one in the last: two products each.
    assert [queries[name][2] for name in scores] == [5, 5, 5, 5, 2, 2]


def test_no_two_of_query_key_and_value_share_their_rows() -> None:
    rewritten = REWRITES["split-qkv"].apply(export_small("meanp", "visual", "fp16"))
    assert ops(rewritten)["Split"] == 0
    rows: dict[str, list[str]] = {}
    for node in rewritten.graph.node:
        if node.op_type == "Gemm" and ".attention." in node.input[1]:
            rows.setdefault(node.input[0], []).append(node.input[1])
    # Each of 3 blocks has query, key, value and output.
    assert len(rows) == 12
    assert all(len(weights) == 1 for weights in rows.values())
