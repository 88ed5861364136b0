from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.graphs import plan_graphs
from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.export.quantization import block_names, find_products, quantize
from actionclip_deploy.runtimes.onnx_graphs import opset_of, read_model, write_model

# 7 bits of weights and 8 of activations through two blocks of random weights.
MIN_COSINE = 0.995
THRESHOLD = 8.0


@pytest.fixture(scope="module")
def exported(small_model: Any, pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 visual graph of a model with biases: the exporter leaves out those of zeros."""
    model = small_model()
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=generator)
    plan = next(p for p in plan_graphs(model, pixels, "fp32") if p.name == "visual")
    path = tmp_path_factory.mktemp("fp32") / "visual.onnx"
    write_graph(plan, path)
    return path


@pytest.fixture
def fp32_path(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path))


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


# fp8 keeps 4 bits of a weight and of an activation.
MIN_COSINE_FP8 = 0.99


@pytest.fixture(scope="module")
def fp16_path(small_model: Any, pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The visual graph of a model in fp16."""
    plan = next(p for p in plan_graphs(small_model(), pixels, "fp16") if p.name == "visual")
    path = tmp_path_factory.mktemp("fp16") / "visual.onnx"
    write_graph(plan, path)
    return path


def rewritten(path: Path, recipe: str, blocks: Any, **options: Any) -> Any:
    model = read_model(path)
    thresholds = {product.input: THRESHOLD for product in find_products(model)}
    options = {"weight_range": "reduced", "thresholds": thresholds, **options}
    return quantize(model, blocks=blocks, recipe=recipe, **options)


def ops(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_the_products_are_those_of_the_blocks_and_no_others(fp32_path: Path) -> None:
    products = find_products(read_model(fp32_path))
    assert block_names(products) == ("blocks.0", "last_block")
    # In, out, up and down; the last block has its query apart from key and value.
    assert Counter(p.block for p in products) == {"blocks.0": 4, "last_block": 5}
    weights = {p.weight for p in products}
    assert not {w for w in weights if "embedding" in w or "projection" in w.split(".")[1]}


def test_a_tower_without_blocks_is_refused() -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "resnet", [], []))
    with pytest.raises(ExportError, match=r"no transformer blocks.*--precision fp32 or fp16"):
        find_products(model)


@pytest.mark.parametrize("recipe", ["dynamic", "static"])
def test_all_blocks_in_int8_give_nearly_the_same_features(
    recipe: str, fp32_path: Path, frames: np.ndarray, open_onnx: Callable[[Path], Any]
) -> None:
    target = fp32_path.with_name("int8.onnx")
    write_model(rewritten(fp32_path, recipe, ["blocks.0", "last_block"]), target)
    onnx.checker.check_model(str(target), full_check=True)
    expected, output = open_onnx(fp32_path)(frames), open_onnx(target)(frames)
    assert min_cosine(expected, output) > MIN_COSINE
    assert not np.array_equal(expected, output)


@pytest.mark.parametrize("recipe", ["dynamic", "static"])
def test_no_block_in_int8_is_the_same_graph(
    recipe: str, fp32_path: Path, frames: np.ndarray, open_onnx: Callable[[Path], Any]
) -> None:
    target = fp32_path.with_name("int8.onnx")
    write_model(rewritten(fp32_path, recipe, []), target)
    np.testing.assert_array_equal(open_onnx(target)(frames), open_onnx(fp32_path)(frames))


def test_only_the_chosen_block_is_rewritten(fp32_path: Path) -> None:
    before, after = read_model(fp32_path), rewritten(fp32_path, "dynamic", ["blocks.0"])
    assert ops(after)["MatMulInteger"] == 4
    assert ops(after)["Gemm"] == ops(before)["Gemm"] - 4
    names = {tensor.name for tensor in after.graph.initializer}
    assert "tower.blocks.0.mlp.up.weight" not in names
    assert "tower.blocks.0.mlp.up.weight.int8" in names
    assert "tower.last_block.mlp.up.weight" in names


def test_the_static_recipe_is_signed_and_symmetric_as_tensorrt_wants_it(fp32_path: Path) -> None:
    model = rewritten(fp32_path, "static", ["blocks.0", "last_block"])
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert ops(model)["QuantizeLinear"] == 9
    for node in pairs:
        zero = tensors[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    # One scale for activations, one for each output of a weight.
    assert {tensors[n.input[1]].ndim for n in pairs if n.op_type == "QuantizeLinear"} == {0}
    assert tensors["tower.blocks.0.mlp.up.weight.scale"].shape == (256,)
    assert tensors["tower.blocks.0.mlp.up.weight.scale"].dtype == np.float32
    scale = tensors[next(n for n in pairs if n.op_type == "QuantizeLinear").input[1]]
    assert scale == pytest.approx(THRESHOLD / 127)
    assert not {"DynamicQuantizeLinear", "MatMulInteger"} & ops(model).keys()


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 448), ("int8", 127)])
def test_between_fp16_all_of_the_static_recipe_is_fp16(
    precision: str, limit: int, fp16_path: Path, tmp_path: Path
) -> None:
    model = rewritten(fp16_path, "static", ["blocks.0", "last_block"], precision=precision)
    target = tmp_path / "quantised.onnx"
    write_model(model, target)
    # Scales in fp16 came into ONNX with this opset; shapes and types are checked against it.
    onnx.checker.check_model(str(target), full_check=True)
    assert opset_of(read_model(target)) == 19
    assert opset_of(read_model(fp16_path)) == 18
    tensors = {t.name: t for t in model.graph.initializer}
    stored = {"fp8": onnx.TensorProto.FLOAT8E4M3FN, "int8": onnx.TensorProto.INT8}[precision]
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[1]].data_type == onnx.TensorProto.FLOAT16
            zero = tensors[node.input[2]]
            assert zero.data_type == stored
            assert not onnx.numpy_helper.to_array(zero).astype(np.float32).any()
    weight = "tower.blocks.0.mlp.up.weight"
    assert tensors[f"{weight}.{precision}"].data_type == stored
    assert list(tensors[f"{weight}.scale"].dims) == [256]
    scale = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    rounded = float(onnx.numpy_helper.to_array(tensors[scale]))
    assert rounded == pytest.approx(THRESHOLD / limit, rel=1e-3)
    assert ops(model)["QuantizeLinear"] == 9
    assert ops(model)["Reshape"] == ops(read_model(fp16_path))["Reshape"]


@pytest.mark.parametrize(("precision", "least"), [("fp8", MIN_COSINE_FP8), ("int8", MIN_COSINE)])
def test_all_blocks_quantised_between_fp16_give_nearly_the_same_features(
    precision: str,
    least: float,
    fp16_path: Path,
    frames: np.ndarray,
    tmp_path: Path,
    open_onnx: Callable[[Path], Any],
) -> None:
    target = tmp_path / "quantised.onnx"
    blocks = ["blocks.0", "last_block"]
    write_model(rewritten(fp16_path, "static", blocks, precision=precision), target)
    expected, output = open_onnx(fp16_path)(frames), open_onnx(target)(frames)
    assert min_cosine(expected, output) > least
    assert not np.array_equal(expected, output)


def test_a_fp8_graph_computes_what_rounding_by_hand_gives(
    tmp_path: Path, open_onnx: Callable[[Path], Any]
) -> None:
    """Rows that fp8 has, one between two of its numbers, and one beyond the largest of them."""
    helper = onnx.helper
    weight = np.array([[1.0, -7.0], [2.0, 0.0]], np.float16)  # scales 1/224 and 1/64
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["rows"], to=onnx.TensorProto.FLOAT16),
                helper.make_node("MatMul", ["rows", "tower.last_block.w"], ["product"]),
                helper.make_node("Cast", ["product"], ["y"], to=onnx.TensorProto.FLOAT),
            ],
            "one",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 2])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])],
            [onnx.numpy_helper.from_array(weight, "tower.last_block.w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    quantised = quantize(
        model,
        blocks=["last_block"],
        recipe="static",
        thresholds={"rows": 448.0},  # a scale of 1
        precision="fp8",
    )
    write_model(quantised, tmp_path / "one.onnx")
    rows = np.array([[1.0, 1.0], [17.0, 0.0], [1000.0, 0.0]], np.float32)
    output = open_onnx(tmp_path / "one.onnx")(rows)
    # 17 lies between 16 and 18, and becomes the one whose last digit in binary is 0.
    expected = [[3.0, -7.0], [16.0, -112.0], [448.0, -3136.0]]
    np.testing.assert_allclose(output, expected, rtol=2e-3)


@pytest.mark.parametrize("recipe", ["dynamic", "static"])
def test_onnx_runtime_computes_every_rewritten_product_in_int8(
    recipe: str, fp32_path: Path, tmp_path: Path
) -> None:
    """Fails where a bias keeps a product from being fused, which costs all of the speed."""
    import onnxruntime as ort

    target, optimized = tmp_path / "int8.onnx", tmp_path / "optimized.onnx"
    assert all(product.bias for product in find_products(read_model(fp32_path)))
    write_model(rewritten(fp32_path, recipe, ["blocks.0", "last_block"]), target)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    counts = ops(onnx.load(str(optimized)))
    fused = {"dynamic": "DynamicQuantizeMatMul", "static": "MatMulIntegerToFloat"}[recipe]
    assert counts[fused] == 9
    assert not counts["Gemm"]
    assert not counts["DequantizeLinear"]


def test_the_same_graph_gives_the_same_bytes(fp32_path: Path) -> None:
    paths = [fp32_path.with_name(f"{number}.onnx") for number in range(2)]
    for path in paths:
        write_model(rewritten(fp32_path, "dynamic", ["blocks.0"]), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_weights_that_do_not_fit_lie_beside_the_graph(
    fp32_path: Path, frames: np.ndarray, open_onnx: Callable[[Path], Any]
) -> None:
    inside, beside = fp32_path.with_name("inside.onnx"), fp32_path.with_name("beside.onnx")
    model = rewritten(fp32_path, "dynamic", ["blocks.0"])
    write_model(model, inside)
    write_model(model, beside, max_embedded_bytes=1000)
    assert fp32_path.with_name("beside.onnx.data").stat().st_size > beside.stat().st_size
    np.testing.assert_array_equal(open_onnx(beside)(frames), open_onnx(inside)(frames))
