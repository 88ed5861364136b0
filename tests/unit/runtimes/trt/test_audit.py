"""What an engine computes in, from what TensorRT's engine inspector tells of it.

The layers are written by hand in the forms of TensorRT 10 (NVIDIA/TensorRT#4020 and #4397 show
both ways of writing a type, and the layers of Myelin) and 11 (docs.nvidia.com, TensorRT 11.0.0,
"Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from actionclip_deploy.errors import BundleError, EngineError
from actionclip_deploy.runtimes.base import Audit, GraphProduct, ProductPrecision
from actionclip_deploy.runtimes.onnx_graphs import read_model
from actionclip_deploy.runtimes.trt.audit import (
    audit,
    find_products,
    kernel_precision,
    read_layers,
)

FP16_GEMM = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1"
TF32_GEMM = "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64"
FP32_GEMM = "ampere_sgemm_128x64_nn"


def layer_10(
    name: str,
    kind: str,
    inputs: str,
    outputs: str | None = None,
    *,
    tactic: str = "",
    nodes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A layer of version 10; `inputs` are types with commas between."""

    def tensors(words: str) -> list[dict[str, Any]]:
        return [
            {"Name": f"t{i}", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": word}
            for i, word in enumerate(words.split(","))
        ]

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": tensors(inputs),
        "Outputs": tensors(outputs or inputs.partition(",")[0]),
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def layer_11(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The same layer as version 11 writes it."""
    layer = layer_10(*arguments, **options)
    for tensor in (*layer["Inputs"], *layer["Outputs"]):
        tensor["DataType"] = tensor.pop("Format/Datatype")
        tensor["Format"] = "Row major linear (kLINEAR)"
    return layer


def engine(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["frames", "frame_features"]})


def product(node: str, precision: ProductPrecision = "fp16", num_macs: int = 100) -> GraphProduct:
    return GraphProduct(node, "MatMul", num_macs, precision)


def audit_one(*layers: dict[str, Any], asked: ProductPrecision = "fp16") -> Audit:
    return audit(engine(*layers), [product("matmul", asked)])


@pytest.mark.parametrize("layer", [layer_10, layer_11])
def test_an_engine_that_computes_what_was_asked_for_passes(layer: Any) -> None:
    found = audit(
        engine(
            layer("a+b_myl0_1", "gemm", "Half", tactic=FP16_GEMM, nodes=("a", "add", "b")),
            layer("_gemm_mha_v2_myl0_2", "kgen", "Half,Half", nodes=("q", "softmax", "v")),
            layer("head_myl0_3", "gemm", "Float", tactic=FP32_GEMM, nodes=("head",)),
        ),
        [product(name) for name in "abqv"] + [product("head", "fp32")],
    )
    found.check()
    assert found.asked() == found.computed() == {"fp32": 0.2, "fp16": 0.8}
    assert found.unknown_share() == 0.0
    assert found.record().other_than_asked == ()


@pytest.mark.parametrize("layer", [layer_10, layer_11])
def test_an_engine_that_is_silently_fp32_is_refused(layer: Any) -> None:
    found = audit(
        engine(
            layer("a", "gemm", "Float", tactic=FP32_GEMM, nodes=("a",)),
            layer("b", "gemm", "Float", nodes=("b",)),
        ),
        [product("a", num_macs=300), product("b")],
    )
    with pytest.raises(EngineError, match=r"computes 100% of its arithmetic in another precision"):
        found.check()
    with pytest.raises(EngineError, match=r"a \(fp16\) by the layer a in fp32, and 1 more"):
        found.check()
    assert found.computed() == {"fp32": 1.0}


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_a_quantised_product_that_falls_back_is_refused(asked: ProductPrecision) -> None:
    kept = {"int8": "Int8", "fp8": "FP8"}[asked]
    found = audit(
        engine(
            layer_10("a_myl0_1", "gemm", kept, "Half", nodes=("q", "dq", "a")),
            layer_10("b_myl0_2", "gemm", "Half", tactic=FP16_GEMM, nodes=("b",)),
        ),
        [product("a", asked), product("b", asked)],
    )
    with pytest.raises(EngineError, match=rf"50% .* b \({asked}\) by the layer b_myl0_2 in fp16"):
        found.check()
    assert found.computed() == {asked: 0.5, "fp16": 0.5}


def test_tf32_is_not_fp32() -> None:
    found = audit_one(layer_10("matmul", "gemm", "Float", tactic=TF32_GEMM), asked="fp32")
    with pytest.raises(EngineError, match=r"matmul \(fp32\) by the layer matmul in tf32"):
        found.check()


def test_a_few_per_cent_in_another_precision_are_taken() -> None:
    layers = [
        layer_10("a", "gemm", "Half", tactic=FP16_GEMM, nodes=("a",)),
        layer_10("b", "gemm", "Float", tactic=FP32_GEMM, nodes=("b",)),
    ]
    products = [product("a", num_macs=960), product("b", num_macs=40)]
    found = audit(engine(*layers), products)
    found.check()
    assert [row.node for row in found.record().other_than_asked] == ["b"]


def test_arithmetic_that_no_layer_names_is_never_passed_over() -> None:
    found = audit(
        engine(layer_10("a", "gemm", "Half", tactic=FP16_GEMM, nodes=("a",))),
        [product("a", num_macs=700), product("lost", num_macs=300)],
    )
    with pytest.raises(EngineError, match=r"30% of the engine's arithmetic cannot be told"):
        found.check()
    with pytest.raises(EngineError, match=r"lost \(fp16\) by no layer that names it"):
        found.check()
    assert found.unknown_share() == 0.3


def test_an_engine_built_without_details_cannot_be_told() -> None:
    # Without detailed profiling verbosity the layers are names.
    with pytest.raises(EngineError, match="100% of the engine's arithmetic cannot be told"):
        audit(json.dumps({"Layers": ["matmul_myl0_1"]}), [product("matmul")]).check()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"Layers": [{"LayerType": "gemm"}]}'])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="gave no list of layers"):
        audit(text, [product("matmul")])


def test_the_kernel_is_believed_before_the_inputs() -> None:
    # Casts on both sides, fused into the product.
    layer = layer_10("__myl_Fused_myl0_1", "gemm", "Float", tactic=FP16_GEMM, nodes=("matmul",))
    audit_one(layer).check()


@pytest.mark.parametrize(
    ("inputs", "outputs", "nodes", "computed"),
    [
        ("Half", "Float", ("matmul", "node__to_copy_1"), "fp16"),
        ("Float", "Half", ("matmul",), None),  # rounded before or after
        ("Float", "Float", ("matmul", "node__to_copy_1"), None),
        ("Float,Half", "Half", ("matmul",), None),
        ("Int8,Half", "Half", ("matmul",), "int8"),  # with a residual
        ("Half,Int8", "Half", ("matmul",), None),
        ("Half,Int32,Bool,Int64", "Half", ("matmul",), "fp16"),  # with indices and a mask
        ("UInt8", "Half", ("matmul",), None),
        ("BFloat16", "BFloat16", ("matmul",), "bf16"),
        ("Row major linear FP16 format", "Half", ("matmul",), "fp16"),
        ("Row major linear FP32", "Row major linear FP32", ("matmul",), "fp32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "Half", ("matmul",), "int8"),
    ],
)
def test_inputs_tell_where_the_kernel_does_not(
    inputs: str, outputs: str, nodes: tuple[str, ...], computed: str | None
) -> None:
    found = audit_one(layer_10("fused_myl0_1", "gemm", inputs, outputs, nodes=nodes))
    assert found.products[0].precision == computed


def test_a_cast_beside_an_fp32_product_rounds_nothing_of_it() -> None:
    # As that of the indices of the end of a prompt.
    layer = layer_10("__myl_CastGather_myl0_1", "kgen", "Float,Int32", nodes=("matmul", "cast"))
    audit_one(layer, asked="fp32").check()


def test_layers_that_move_the_numbers_of_a_product_are_not_it() -> None:
    found = audit_one(
        layer_10("weights", "Constant", "Float", nodes=("matmul",)),
        layer_10("Reformatting CopyNode", "Reformat", "Float", "Half", nodes=("matmul",)),
        layer_10("__myl_Move_myl0_1", "kgen", "Float", nodes=("matmul",)),
        layer_10("matmul_myl0_2", "gemm", "Half", tactic=FP16_GEMM, nodes=("matmul",)),
    )
    assert found.products[0].layers == ("matmul_myl0_2",)
    found.check()


def test_a_product_that_a_general_kernel_computes_is_found() -> None:
    found = audit_one(layer_10("__myl_MulSum_myl0_1", "kgen", "Half", nodes=("matmul",)))
    assert found.computed() == {"fp16": 1.0}


def test_layers_that_disagree_about_a_product_leave_it_unknown() -> None:
    found = audit_one(
        layer_10("matmul.0", "gemm", "Half", tactic=FP16_GEMM, nodes=("matmul",)),
        layer_10("matmul.1", "gemm", "Float", tactic=FP32_GEMM, nodes=("matmul",)),
    )
    assert found.products[0].precision is None


def test_without_metadata_a_layer_is_found_by_its_name() -> None:
    # Myelin writes a dot as an underscore, and joins what it computes at once.
    name = "/blocks_3/key/MatMul+/blocks_3/query/MatMul_myl0_79"
    found = audit(
        engine(layer_10(name, "gemm", "Half", tactic=FP16_GEMM)),
        [product("/blocks.3/key/MatMul"), product("/blocks.3/query/MatMul")],
    )
    assert found.computed() == {"fp16": 1.0}
    joined = engine(layer_10("conv + relu", "CaskConvolution", "Half"))
    assert audit(joined, [product("conv")]).computed() == {"fp16": 1.0}


def test_a_node_whose_name_begins_like_another_is_not_taken_for_it() -> None:
    found = audit_one(layer_10("matmul_10", "gemm", "Half", tactic=FP16_GEMM, nodes=("matmul_10",)))
    assert found.unknown_share() == 1.0


def test_a_graph_without_arithmetic_has_nothing_to_audit() -> None:
    found = audit(engine(layer_10("copy", "Reformat", "Half")), [])
    found.check()
    assert found.record().num_macs == 0


# Names of kernels as they occur in the logs of NVIDIA/TensorRT#4397 and #2206 of wenet, in
# NVIDIA/TransformerEngine#1391, and in the documentation of CUTLASS.
@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        (FP16_GEMM, "fp16"),
        (TF32_GEMM, "tf32"),
        (FP32_GEMM, "fp32"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x32", "fp16"),
        ("sm50_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize64x64x8", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize", "int8"),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_by_fusion_tactic", "int8"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", "bf16"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128", "fp8"),
        ("sm50_xmma_cublas_gemvx_f16f16_f32", "fp16"),
        ("ampere_h16816gemm_256x128_ldg8_nn_v1", "fp16"),
        ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_relu_f2f_stages_32x5_tn", "fp16"),
        ("turing_fp16_s1688gemm_fp16_128x128_ldg8_relu_f2f_tn", "fp16"),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_nn_align8", "bf16"),
        ("ampere_s1688gemm_128x128_ldg4_nn", "tf32"),
        ("volta_scudnn_128x64_sliced1x2_ldg4_relu_exp_large_nhwc_tn_v1", "fp32"),
        ("_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a", None),
        ("__myl_AddCast_0xbf16ff9f104bbb1655f32f32e4bb83ab", None),
        ("", None),
    ],
)
def test_the_name_of_a_kernel_tells_what_it_multiplies_in(
    tactic: str, precision: str | None
) -> None:
    assert kernel_precision(tactic) == precision


def test_a_layer_is_read_the_same_from_both_forms() -> None:
    arguments = ("matmul", "gemm", "Half,Float")
    (ten,) = read_layers(engine(layer_10(*arguments, nodes=("a", "b"))))
    (eleven,) = read_layers(
        json.dumps({"Layers": [layer_11(*arguments, nodes=("a", "b"))], "I/O Tensors": []})
    )
    assert ten == eleven
    assert (ten.nodes, ten.input_types, ten.output_types) == (
        frozenset("ab"),
        ("fp16", "fp32"),
        ("fp16",),
    )


# tests/data/README.md: image 64, patch 16, width 128, 2 layers, D = 64; T = 8.
WIDTH, DIM, PATCHES, FRAMES = 128, 64, 16, 8
TOKENS = PATCHES + 1


def read_products(path: Path, input_shape: tuple[int, ...]) -> tuple[GraphProduct, ...]:
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
        GraphProduct("conv", "Conv", 2 * 6 * 16 * 9, "fp32"),
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
        GraphProduct("both", "MatMul", 3 * 8 * 8 * 5, precision),
        GraphProduct("weights alone", "MatMul", 3 * 8 * 8 * 5, "fp32"),
    )


def test_dynamic_int8_is_seen_as_int8() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["in"], ["rows", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["rows", "weight", "zero"], ["sums"], name="integers"),
        helper.make_node("Cast", ["sums"], ["out"], to=TensorProto.FLOAT),
    ]
    weight = numpy_helper.from_array(np.zeros((8, 5), np.int8), "weight")
    products = find_products(graph_of(nodes, weight), (1, 3, 8, 8))
    assert products == (GraphProduct("integers", "MatMulInteger", 3 * 8 * 8 * 5, "int8"),)


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
        GraphProduct("lstm", "LSTM", 7 * 3 * 16 * (8 + 4), "fp32"),
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
