"""int8 and fp8: options, calibration, rounding, and the rewritten graph."""

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
from fakes import fake_manifest

from actionclip_deploy.errors import ExportError
from actionclip_deploy.export import quantization
from actionclip_deploy.export.golden import clips_of_video
from actionclip_deploy.export.graphs import plan_graphs
from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.export.quantization import (
    WEIGHT_LIMITS,
    Fp8Options,
    Int8Options,
    MagnitudeHistogram,
    block_names,
    exact_weight_range,
    find_products,
    find_videos,
    measure_thresholds,
    numbers_of,
    quantize,
    quantize_weight,
    read_calibration_clips,
    round_scales,
)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "both"}, "recipe is 'both'; it must be one of None, dynamic, static"),
        ({"weight_range": "half"}, "weight_range is 'half'; it must be one of reduced, full"),
        ({"recipe": "static"}, "The recipe static needs calibration videos, .*; give some, or"),
        ({"num_clips": 0}, "num_clips is 0; it must be 1 or more"),
        ({"max_drop": -0.1}, "max_drop is -0.1; it must be 0 to 100 points"),
        ({"max_drop": float("nan")}, "max_drop is nan; it must be 0 to 100 points"),
        ({"min_cosine": 1.0}, "min_cosine is 1.0; it must be between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Options(**options)


def test_a_rest_in_fp16_needs_the_recipe_of_gpus() -> None:
    with pytest.raises(ValueError, match=r"recipe dynamic is for CPUs .* give calibration videos"):
        Int8Options(rest="fp16")
    videos = (Path("video.mp4"),)
    assert Int8Options(calibration=videos, rest="fp16").rest == "fp16"
    assert Int8Options(calibration=videos).rest == "fp32"
    with pytest.raises(ValueError, match="rest is 'bf16'; it must be one of fp32, fp16"):
        Int8Options(calibration=videos, rest="bf16")  # type: ignore[arg-type]


def test_fp8_needs_calibration_videos() -> None:
    with pytest.raises(ValueError, match=r"fp8 needs calibration videos, .* or take the precision"):
        Fp8Options()
    options = Fp8Options(calibration=(Path("video.mp4"),))
    assert (options.precision, options.rest) == ("fp8", "fp16")
    assert (options.chosen_recipe, options.weight_range) == ("static", None)


def test_calibration_videos_choose_the_recipe_unless_it_is_named() -> None:
    videos = (Path("video.mp4"),)
    assert Int8Options().chosen_recipe == "dynamic"
    assert Int8Options(calibration=videos).chosen_recipe == "static"
    assert Int8Options(calibration=videos, recipe="dynamic").chosen_recipe == "dynamic"


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        ("x86_64", ["avx2", "avx512f"], "reduced"),
        ("x86_64", ["avx2", "avx512_vnni"], "full"),
        ("x86_64", ["avx2", "avx_vnni"], "full"),
        ("aarch64", ["asimd"], "full"),
        ("x86_64", [], "reduced"),
    ],
)
def test_full_weights_need_a_cpu_that_adds_without_saturation(
    architecture: str, flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"architecture": architecture, "cpu_flags": flags}
    monkeypatch.setattr(quantization, "describe_machine", lambda: machine)
    assert exact_weight_range() == expected
    Int8Options(weight_range="reduced").check_machine()
    if expected == "full":
        Int8Options(weight_range="full").check_machine()
    else:
        with pytest.raises(ValueError, match=r"this CPU has no VNNI.*take reduced weights, or"):
            Int8Options(weight_range="full").check_machine()


MANIFEST = fake_manifest()


@pytest.fixture
def folder(tmp_path: Path, rendered_video: Path) -> Path:
    """Six videos, two of them deeper; a text file among them."""
    (tmp_path / "b").mkdir()
    for name in ("c.mp4", "a.MP4", "b/d.mkv", "b/e.mp4", "f.mp4", "g.mp4"):
        shutil.copy(rendered_video, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def test_videos_are_found_below_folders_in_a_fixed_order(folder: Path) -> None:
    names = [p.relative_to(folder).as_posix() for p in find_videos([folder])]
    assert names == ["a.MP4", "b/d.mkv", "b/e.mp4", "c.mp4", "f.mp4", "g.mp4"]


def test_a_video_that_is_named_twice_counts_once(folder: Path) -> None:
    assert find_videos([folder / "c.mp4", folder]).count(folder / "c.mp4") == 1


def test_a_folder_without_videos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"holds no video, .*\.mp4.*name the files"):
        find_videos([tmp_path])


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"There is no .*nothing to calibrate with; give video"):
        find_videos([tmp_path / "nothing"])


def test_a_clip_is_what_a_user_of_the_bundle_would_get(folder: Path) -> None:
    read = read_calibration_clips([folder / "c.mp4"], MANIFEST, 1)
    np.testing.assert_array_equal(read.clips, clips_of_video(folder / "c.mp4", MANIFEST, 1))
    assert read.clips.shape == (1, 4, 32, 32, 3)
    assert (read.num_videos, read.failed) == (1, ())


@pytest.mark.parametrize(("num_clips", "num_videos"), [(2, 2), (6, 6), (7, 4), (15, 5)])
def test_there_are_as_many_clips_as_asked_for(
    num_clips: int, num_videos: int, folder: Path
) -> None:
    told: list[int] = []
    read = read_calibration_clips(find_videos([folder]), MANIFEST, num_clips, on_clip=told.append)
    assert len(read.clips) == num_clips
    assert read.num_videos == num_videos
    assert told[-1] == num_clips


def test_few_clips_come_from_all_over_the_list(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actionclip_deploy.export import quantization

    asked: list[str] = []

    def note(path: Path, manifest: object, num_clips: int, **_: object) -> np.ndarray:
        asked.append(path.name)
        return np.zeros((num_clips, 4, 32, 32, 3), np.uint8)

    monkeypatch.setattr(quantization, "clips_of_video", note)
    read_calibration_clips([Path(f"{n}.mp4") for n in range(101)], MANIFEST, 3)
    assert asked == ["0.mp4", "50.mp4", "100.mp4"]


def test_a_broken_video_is_told_and_another_takes_its_place(folder: Path) -> None:
    (folder / "a.MP4").write_bytes(b"broken")
    read = read_calibration_clips(find_videos([folder]), MANIFEST, 3)
    assert (len(read.clips), read.num_videos) == (3, 3)
    (sentence,) = read.failed
    assert "a.MP4" in sentence


def test_more_broken_videos_than_good_ones_are_an_error(folder: Path) -> None:
    for name in ("a.MP4", "c.mp4", "b/d.mkv", "f.mp4"):
        (folder / name).write_bytes(b"broken")
    message = r"4 of 6 calibration videos cannot be read, and at most half may fail; .*a\.MP4"
    with pytest.raises(ExportError, match=message):
        read_calibration_clips(find_videos([folder]), MANIFEST, 6)


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


# Every number that float8e4m3fn has from 0 on: 4 bits of exponent with a bias of 7, 3 of mantissa,
# and of the largest exponent all but the last, which is NaN.
FP8_NUMBERS = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]


def weights(dtype: Any = np.float32) -> np.ndarray:
    """Columns of very different sizes, the last one of zeros."""
    weight = np.random.default_rng(1).normal(size=(50, 3)) * [1, 10, 0.01]
    return np.column_stack([weight, np.zeros(50)]).astype(dtype)


@pytest.mark.parametrize("range_name", ["reduced", "full"])
def test_weights_round_to_the_nearest_step_of_their_own_output(range_name: Any) -> None:
    limit, weight = WEIGHT_LIMITS[range_name], weights()
    integers, scale = quantize_weight(weight, numbers_of("int8", range_name))
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(np.abs(integers).max(axis=0), [limit, limit, limit, 0])
    assert (np.abs(weight - integers * scale) <= scale / 2 * 1.0001).all()


def test_a_pair_of_products_of_reduced_weights_fits_into_16_bits_and_of_full_ones_does_not() -> (
    None
):
    # What vpmaddubsw adds on a CPU without VNNI: two products of uint8 and int8.
    fits = {name: 2 * 255 * limit <= 2**15 - 1 for name, limit in WEIGHT_LIMITS.items()}
    assert fits == {"reduced": True, "full": False}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_round_to_the_nearest_number_of_fp8(dtype: Any) -> None:
    assert FP8_NUMBERS[-1] == 448
    weight = weights(dtype)
    values, scale = quantize_weight(weight, numbers_of("fp8"))
    assert scale.dtype == dtype
    scaled = np.abs(weight.astype(np.float64) / scale.astype(np.float64))
    nearest = np.abs(scaled[..., np.newaxis] - FP8_NUMBERS).min(axis=-1)
    error = np.abs(np.abs(values.astype(np.float64)) - scaled)
    # A value that lies just beyond the largest number, since its scale was rounded, becomes that.
    np.testing.assert_allclose(error, nearest, atol=1e-5)
    assert (np.sign(values.astype(np.float32)) * np.sign(weight) >= 0).all()
    np.testing.assert_array_equal(values.astype(np.float32).max(axis=0)[3], 0)


def test_values_are_divided_by_the_scale_as_it_was_rounded() -> None:
    # This scale is 26.2 of the smallest steps of fp16, and so becomes 26: 63 of it are 62.5.
    weight = np.array([[1e-4], [0.99e-4]], np.float16)
    values, scale = quantize_weight(weight, numbers_of("int8", "reduced"))
    restored = values[1].astype(np.float64) * scale.astype(np.float64)
    assert abs(restored - weight[1]) <= scale / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_no_scale_is_zero(dtype: Any) -> None:
    scales = round_scales(np.array([0.0, 1e-12, 0.5]), np.dtype(dtype))
    assert scales.dtype == dtype
    assert (scales > 0).all()
    assert scales[0] == 1
    assert scales[2] == 0.5
