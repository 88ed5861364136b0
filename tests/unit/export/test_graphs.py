from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from actionclip_deploy.export.graphs import plan_graphs
from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.model import VISUAL_PROMPTS

SIZES = (1, 2, 5)
SIZE = 32
# fp32 on both sides, in another order of additions; features are of the size of 1.
TOLERANCE = 1e-5
# What 11 bits of mantissa may turn an output by.
MIN_COSINE = 0.9999


def frames(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8)


def features(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=(*shape, 32)).astype(np.float32)


def tokens(num_prompts: int, length: int) -> np.ndarray:
    """Prompts of several lengths: ids below 49, one 49 that ends them, padding."""
    rng = np.random.default_rng(num_prompts * length)
    rows = rng.integers(1, 49, (num_prompts, length), dtype=np.int32)
    for row, end in zip(rows, rng.integers(0, length, num_prompts), strict=True):
        row[end] = 49
        row[end + 1 :] = 0
    return rows


def close(given: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, wanted, rtol=0, atol=tolerance)


def cosines(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    a, b = given.astype(np.float64), wanted.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_visual_graph_gives_the_models_frame_features(
    quick_gelu: bool, precision: str, small_model, graph_of, reference
) -> None:
    model = small_model(quick_gelu=quick_gelu)
    run = graph_of(model, "visual", precision)
    for size in SIZES:
        given, wanted = run(frames(size)), reference(model, "visual", frames(size))
        if precision == "fp32":
            close(given, wanted)
        assert cosines(given, wanted).min() > MIN_COSINE


@pytest.fixture(scope="module")
def resnet(small_model):
    """A ResNet whose batch normalisation does something, and whose blocks add something."""
    model = small_model(vision_layers=(2, 1, 1, 1), vision_width=16, patch_size=None)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_visual_graph_of_a_resnet_gives_the_models_frame_features(
    precision: str, resnet, graph_of, reference
) -> None:
    run = graph_of(resnet, "visual", precision)
    for size in SIZES:
        given, wanted = run(frames(size)), reference(resnet, "visual", frames(size))
        if precision == "fp32":
            close(given, wanted, TOLERANCE * np.abs(wanted).max())
        assert cosines(given, wanted).min() > MIN_COSINE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("visual_prompt", ["meanp", "lstm", "conv1d", "transf"])
def test_the_temporal_graph_gives_the_models_embeddings_at_any_number_of_frames(
    visual_prompt: str, precision: str, small_model, graph_of, reference
) -> None:
    model = small_model(visual_prompt)
    run = graph_of(model, "temporal", precision)
    for num_clips in SIZES:
        for num_frames in (*SIZES, 12):
            given = run(features(num_clips, num_frames))
            wanted = reference(model, "temporal", features(num_clips, num_frames))
            if precision == "fp32":
                close(given, wanted)
            assert cosines(given, wanted).min() > MIN_COSINE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_temporal_graph_of_transf_cls_takes_its_own_number_of_frames(
    precision: str, small_model, graph_of, reference, tmp_path: Path
) -> None:
    model = small_model("transf_cls", embed_dim=32)
    run = graph_of(model, "temporal", precision)
    for num_clips in SIZES:
        wanted = reference(model, "temporal", features(num_clips, 4))
        assert cosines(run(features(num_clips, 4)), wanted).min() > MIN_COSINE
        if precision == "fp32":
            close(run(features(num_clips, 4)), wanted)
    (given,) = onnx.load(tmp_path / "temporal.onnx").graph.input
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["B", 4, 32]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("prompt", ["shift", "shift+transf", "shift+lstm", "shift+conv1d"])
def test_the_video_graph_of_shift_gives_the_models_embeddings_at_any_number_of_frames(
    prompt: str, precision: str, small_model, graph_of, reference
) -> None:
    model = small_model(prompt)
    run = graph_of(model, "video", precision)
    for num_clips in SIZES:
        for num_frames in SIZES:
            clips = frames(num_clips, num_frames)
            given, wanted = run(clips), reference(model, "video", clips)
            if precision == "fp32":
                close(given, wanted)
            assert cosines(given, wanted).min() > MIN_COSINE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_video_graph_of_joint_gives_the_models_embeddings(
    precision: str, small_model, graph_of, reference
) -> None:
    model = small_model("joint")
    run = graph_of(model, "video", precision)
    for num_clips in SIZES:
        given, wanted = run(frames(num_clips, 4)), reference(model, "video", frames(num_clips, 4))
        if precision == "fp32":
            close(given, wanted)
        assert cosines(given, wanted).min() > MIN_COSINE


@pytest.fixture(scope="module")
def textual(small_model, pixels, open_onnx, tmp_path_factory: pytest.TempPathFactory):
    """A model with its textual graph in ONNX Runtime."""
    model = small_model()
    path = tmp_path_factory.mktemp("textual") / "textual.onnx"
    # Asked for fp16, so that the tests below also show that text stays fp32.
    write_graph(plan_graphs(model, pixels, "fp16")[-1], path)
    return model, open_onnx(path), onnx.load(path)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("num_prompts", SIZES)
def test_the_textual_graph_gives_the_models_embeddings_at_any_length(
    num_prompts: int, length: int, textual, reference
) -> None:
    model, run, _ = textual
    prompts = tokens(num_prompts, length)
    close(run(prompts), reference(model, "textual", prompts))


def test_padding_changes_no_text_embedding(textual) -> None:
    _, run, _ = textual
    prompts = tokens(5, 7)
    close(run(np.pad(prompts, ((0, 0), (0, 5)))), run(prompts))


def test_of_two_ends_of_text_the_first_counts(textual, reference) -> None:
    model, run, _ = textual
    prompts = np.array([[3, 49, 7, 49, 0], [3, 49, 7, 11, 49]], np.int32)
    close(run(prompts), reference(model, "textual", prompts))
    close(run(prompts)[:1], run(prompts)[1:])


def test_the_textual_graph_is_finite_and_fp32_in_an_fp16_bundle(textual) -> None:
    arrays = [onnx.numpy_helper.to_array(value) for value in textual[2].graph.initializer]
    assert all(np.isfinite(array).all() for array in arrays)
    assert not any(array.dtype == np.float16 for array in arrays)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_visual_graph_has_one_node_for_each_norm_and_no_arithmetic_on_shapes(
    precision: str, small_model, plan_of, tmp_path: Path
) -> None:
    write_graph(plan_of(small_model(), "visual", precision), tmp_path / "visual.onnx")
    graph = onnx.load(tmp_path / "visual.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    # Two blocks with two each, one before and one after.
    assert counts["LayerNormalization"] == 6
    assert not {"Shape", "Attention", "ReduceMean", "Pow"} & counts.keys()
    # TensorRT takes uint8 into a cast and into nothing else.
    assert [node.op_type for node in graph.node if "frames" in node.input] == ["Cast"]


def test_in_fp16_only_products_are_fp16(small_model, plan_of, tmp_path: Path) -> None:
    write_graph(plan_of(small_model("transf"), "temporal", "fp16"), tmp_path / "temporal.onnx")
    graph = onnx.load(tmp_path / "temporal.onnx").graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    types |= {value.name: value.data_type for value in graph.initializer}
    found: dict[str, set[int]] = {}
    for node in graph.node:
        found.setdefault(node.op_type, set()).add(types[node.output[0]])
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert found["Gemm"] == found["MatMul"] == {half}
    for op_type in ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Div"):
        assert found[op_type] == {single}, op_type


@pytest.mark.parametrize(
    ("name", "prompt"), [("visual", "meanp"), ("video", "joint"), ("textual", "meanp")]
)
def test_the_last_projection_is_fp32_in_fp16_and_no_matrix_product(
    name: str, prompt: str, small_model, plan_of, tmp_path: Path
) -> None:
    """TensorRT for RTX refuses a graph with a single fp32 matrix product on RTX 20."""
    write_graph(plan_of(small_model(prompt), name, "fp16"), tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx").graph
    types = {value.name: value.data_type for value in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    assert {types[node.input[0]] for node in products} == {onnx.TensorProto.FLOAT16}
    (convolution,) = (node for node in graph.node if node.op_type == "Conv")
    assert convolution.input[1].endswith("projection.weight")
    assert types[convolution.input[1]] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("visual_prompt", VISUAL_PROMPTS)
def test_a_bundle_has_the_graphs_that_its_visual_prompt_needs(
    visual_prompt: str, small_model, pixels
) -> None:
    plans = plan_graphs(small_model(visual_prompt), pixels, "fp16")
    mixing = visual_prompt in ("joint", "shift")
    names = ["video", "textual"] if mixing else ["visual", "temporal", "textual"]
    assert [plan.name for plan in plans] == names
    half = {"video", "visual"} | ({"temporal"} if visual_prompt.startswith("transf") else set())
    assert {plan.name for plan in plans if plan.precision == "fp16"} == half & set(names)


def test_a_position_table_of_one_row_fixes_the_number_of_frames(
    small_model, plan_of, graph_of, reference
) -> None:
    model = small_model("transf", rows=1, num_frames=1)
    assert plan_of(model, "temporal").input.shape == ("B", 1, 32)
    run = graph_of(model, "temporal")
    close(run(features(3, 1)), reference(model, "temporal", features(3, 1)))
