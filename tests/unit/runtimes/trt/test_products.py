"""The arithmetic of a graph, against what the sizes of the model say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from actionclip_deploy.errors import BundleError, EngineError
from actionclip_deploy.runtimes.onnx_graphs import read_model
from actionclip_deploy.runtimes.trt.audit import Product, find_products

# tests/data/README.md: image 64, patch 16, width 128, 2 layers, D = 64; T = 8.
WIDTH, DIM, PATCHES, FRAMES = 128, 64, 16, 8
TOKENS = PATCHES + 1


def read_products(path: Path, input_shape: tuple[int, ...]) -> tuple[Product, ...]:
    return find_products(read_model(path, weights=False), input_shape)


def block_macs(queries: int, keys: int, width: int) -> int:
    """Of a transformer block whose queries may be fewer than its keys and values."""
    projections = queries * width * width + 2 * keys * width * width + queries * width * width
    return projections + 2 * queries * keys * width + 2 * queries * width * 4 * width


def test_the_products_of_a_vit_are_those_that_its_sizes_give(tiny_bundle: Path) -> None:
    products = read_products(tiny_bundle / "visual.onnx", (1, 64, 64, 3))
    embedding = PATCHES * 3 * 16 * 16 * WIDTH
    # The last block computes one query alone; keys and values are of all tokens.
    blocks = block_macs(TOKENS, TOKENS, WIDTH) + block_macs(1, TOKENS, WIDTH)
    assert sum(p.num_macs for p in products) == embedding + blocks + WIDTH * DIM
    assert {p.precision for p in products} == {"fp32"}
    assert len({p.node for p in products}) == len(products)


def test_the_products_of_a_batch_are_as_many_times_as_it_has_rows(tiny_bundle: Path) -> None:
    one = read_products(tiny_bundle / "visual.onnx", (1, 64, 64, 3))
    five = read_products(tiny_bundle / "visual.onnx", (5, 64, 64, 3))
    assert [p.num_macs for p in five] == [5 * p.num_macs for p in one]


def test_the_products_of_the_temporal_and_textual_graphs_are_counted(tiny_bundle: Path) -> None:
    temporal = read_products(tiny_bundle / "temporal.onnx", (1, FRAMES, DIM))
    # Six blocks as wide as the embedding.
    assert sum(p.num_macs for p in temporal) == 6 * block_macs(FRAMES, FRAMES, DIM)
    textual = read_products(tiny_bundle / "textual.onnx", (1, 10))
    assert sum(p.num_macs for p in textual) == (
        block_macs(10, 10, 64) + block_macs(1, 10, 64) + 64 * DIM
    )


def test_an_fp16_graph_asks_for_fp16_but_for_its_last_projection(tiny_fp16_bundle: Path) -> None:
    products = read_products(tiny_fp16_bundle / "visual.onnx", (1, 64, 64, 3))
    wide = [p for p in products if p.precision != "fp16"]
    assert [(p.precision, p.num_macs) for p in wide] == [("fp32", WIDTH * DIM)]


def graph_of(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def test_a_convolution_counts_its_window_and_its_groups() -> None:
    weight = numpy_helper.from_array(np.zeros((6, 1, 3, 3), np.float32), "weight")
    node = helper.make_node(
        "Conv", ["in", "weight"], ["out"], name="conv", group=3, pads=[1, 1, 1, 1], strides=[2, 2]
    )
    # 6 channels of 4 x 4, each of a window of 3 x 3 over one channel.
    assert find_products(graph_of([node], weight), (2, 3, 8, 8)) == (
        Product("conv", "Conv", 2 * 6 * 16 * 9, "fp32"),
    )


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(TensorProto.INT8, "int8"), (TensorProto.FLOAT8E4M3FN, "fp8")],
)
def test_a_product_of_dequantised_operands_is_of_their_quantised_type(
    kind: int, precision: str
) -> None:
    def pair(name: str, source: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", "scale", "zero"], [f"{name}.dq"]),
        ]

    nodes = [
        *pair("rows", "in"),
        *pair("weights", "weight"),
        helper.make_node("Transpose", ["weights.dq"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows.dq", "turned"], ["both"], name="both"),
        helper.make_node("MatMul", ["in", "turned"], ["out"], name="weights alone"),
    ]
    products = find_products(
        graph_of(
            nodes,
            numpy_helper.from_array(np.zeros((5, 8), np.float32), "weight"),
            numpy_helper.from_array(np.float32(1), "scale"),
            helper.make_tensor("zero", kind, [], [0]),
        ),
        (1, 3, 8, 8),
    )
    assert products == (
        Product("both", "MatMul", 3 * 8 * 8 * 5, precision),
        Product("weights alone", "MatMul", 3 * 8 * 8 * 5, "fp32"),
    )


def test_dynamic_int8_is_seen_as_int8() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["in"], ["rows", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["rows", "weight", "zero"], ["sums"], name="integers"),
        helper.make_node("Cast", ["sums"], ["out"], to=TensorProto.FLOAT),
    ]
    weight = numpy_helper.from_array(np.zeros((8, 5), np.int8), "weight")
    products = find_products(graph_of(nodes, weight), (1, 3, 8, 8))
    assert products == (Product("integers", "MatMulInteger", 3 * 8 * 8 * 5, "int8"),)


def test_an_lstm_counts_both_of_its_matrices_at_each_step() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["in", "last"], ["rows"], keepdims=0),
        helper.make_node("LSTM", ["rows", "W", "R"], ["out"], name="lstm", hidden_size=4),
    ]
    weights = [
        numpy_helper.from_array(np.array([3]), "last"),
        numpy_helper.from_array(np.zeros((1, 16, 8), np.float32), "W"),
        numpy_helper.from_array(np.zeros((1, 16, 4), np.float32), "R"),
    ]
    # Rows (7, 3, 8): 7 steps of 3 sequences.
    assert find_products(graph_of(nodes, *weights), (7, 3, 8, 8)) == (
        Product("lstm", "LSTM", 7 * 3 * 16 * (8 + 4), "fp32"),
    )


def test_the_graph_is_left_as_it_is(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "temporal.onnx")
    before = model.SerializeToString(deterministic=True)
    find_products(model, (1, FRAMES, DIM))
    assert model.SerializeToString(deterministic=True) == before


def test_a_shape_of_another_rank_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"the first of 4 dimensions, and the shape \(1, 8\)"):
        read_products(tiny_bundle / "visual.onnx", (1, 8))


def test_shapes_that_stay_unknown_are_said() -> None:
    nodes = [
        helper.make_node("NonZero", ["in"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["turned", "numbers"], ["out"]),
    ]
    with pytest.raises(EngineError, match="The shape of out cannot be derived"):
        find_products(graph_of(nodes), (1, 3, 8, 8))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.onnx cannot be read"):
        read_products(tmp_path / "missing.onnx", (1,))
    (tmp_path / "empty.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BundleError, match=r"empty\.onnx cannot be read"):
        read_products(tmp_path / "empty.onnx", (1,))
