from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_manifest, write_fake_bundle
from pydantic import ValidationError

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, ShapeError
from actionclip_deploy.manifest import (
    SCHEMA_VERSION,
    GraphOrClip,
    Manifest,
    QuantizationSpec,
    TensorSpec,
)


def changed(**fields: Any) -> dict[str, Any]:
    return {**fake_manifest().model_dump(mode="json"), **fields}


def test_a_manifest_survives_json() -> None:
    manifest = fake_manifest()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.schema_version == SCHEMA_VERSION


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        fake_manifest().templates = ()  # type: ignore[misc]


@pytest.mark.parametrize("graphs", [(), ("visual", "textual"), ("visual", "temporal")])
def test_an_incomplete_set_of_graphs_is_refused(graphs: tuple[str, ...]) -> None:
    specs = fake_manifest().model_dump(mode="json")["graphs"]
    with pytest.raises(ValidationError, match="they must be visual, temporal and textual, or"):
        Manifest.model_validate(changed(graphs={name: specs[name] for name in graphs}))


def test_a_video_graph_stands_in_for_the_visual_and_temporal_ones() -> None:
    manifest = fake_manifest(visual_prompt="joint")
    assert sorted(Manifest.model_validate(manifest.model_dump()).graphs) == ["textual", "video"]


@pytest.mark.parametrize("file", ["visual.ort", "../visual.onnx", "a/visual.onnx", ".onnx", "x"])
def test_a_graph_is_an_onnx_file_in_the_top_folder(file: str) -> None:
    specs = fake_manifest().model_dump(mode="json")["graphs"]
    specs["visual"]["file"] = file
    with pytest.raises(ValidationError, match="String should match pattern"):
        Manifest.model_validate(changed(graphs=specs))


@pytest.mark.parametrize("visual_prompt", ["transf", "joint"])
def test_the_precision_is_that_of_the_graph_that_sees_the_frames(visual_prompt: str) -> None:
    manifest = fake_manifest(visual_prompt=visual_prompt)
    for name, graph in manifest.graphs.items():
        graphs = {**manifest.graphs, name: graph.model_copy(update={"precision": "fp16"})}
        expected = "fp16" if name in ("visual", "video") else "fp32"
        assert manifest.model_copy(update={"graphs": graphs}).precision() == expected


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "num_frames", 0),
        ("model", "input_size", 0),
        ("scores", "scale", 0.0),
        ("scores", "method", "cosine"),
        ("preprocessing", "interpolation", "nearest"),
    ],
)
def test_values_out_of_range_are_refused(part: str, field: str, value: object) -> None:
    data = changed()
    data[part][field] = value
    with pytest.raises(ValidationError, match=field):
        Manifest.model_validate(data)


IMPOSSIBLE_NUMBERS = [
    ("model", "num_frames", 10**30, "1 to 4,096"),
    ("model", "num_frames", -8, "1 to 4,096"),
    ("model", "max_frames", 10**30, "1 to 4,096"),
    ("model", "input_size", 10**9, "1 to 4,096"),
    ("model", "input_size", -224, "1 to 4,096"),
    ("model", "embedding_dim", 10**12, "1 to 16,384"),
    ("model", "context_length", 10**8, "1 to 8,192"),
    ("model", "num_macs", -1, "0 to 1,000"),
    ("model", "num_flops", 10**400, "0 to 1,000"),
    ("preprocessing", "resize_size", 10**9, "1 to 8,192"),
    ("preprocessing", "resize_size", -256, "1 to 8,192"),
    ("preprocessing", "resize_size", 31, "less than the 32 pixels of model.input_size"),
    ("preprocessing", "pixel_mean", [math.inf, 0, 0], "-10 to 10"),
    ("preprocessing", "pixel_std", [0, 1, 1], "0.001 to 10"),
    ("preprocessing", "pixel_std", [math.nan, 1, 1], "0.001 to 10"),
    ("scores", "scale", math.inf, "1e-05 to 100,000.0"),
    ("scores", "scale", math.nan, "1e-05 to 100,000.0"),
    ("scores", "scale", -100.0, "1e-05 to 100,000.0"),
    ("scores", "scale", 1e300, "1e-05 to 100,000.0"),
]


@pytest.mark.parametrize(("part", "field", "value", "allowed"), IMPOSSIBLE_NUMBERS)
def test_a_number_that_cannot_be_is_named_with_what_it_may_be(
    tmp_path: Path, part: str, field: str, value: object, allowed: str
) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_text())
    data[part][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError) as refused:
        Bundle.open(bundle.path)
    assert re.search(rf"{part}\.{field}(\.\d)? is .*{re.escape(allowed)}", str(refused.value))
    assert len(str(refused.value).replace(str(path), "")) < 250


@pytest.mark.parametrize(
    "change",
    [
        {"templates": ["{}" + "x" * 10**6]},
        {"templates": ["{}"] * 5000},
        {"licence": "x" * 10**6},
        {"schema_version": 1, "files": {"a": {"sha256": "0", "size_bytes": -1}}},
    ],
)
def test_texts_without_measure_are_refused_in_one_short_sentence(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match="does not describe a bundle: ") as refused:
        Bundle.open(bundle.path)
    assert len(str(refused.value).replace(str(path), "")) < 250


def test_a_manifest_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    with (bundle.path / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match=r"has 1073741824 bytes; a manifest has 16777216 at most"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_calibration_clips", -1),
        ("bound", math.inf),
        ("quantized_value", math.nan),
        ("golden_min_cosine", 7.0),
        ("golden_max_difference", math.inf),
        ("fp32_value", 1e300),
    ],
)
def test_a_record_of_quantisation_has_possible_numbers(field: str, value: float) -> None:
    record = {
        "recipe": "static",
        "weight_range": "full",
        "quantized_blocks": ["0"],
        "unquantized_blocks": [],
        "num_calibration_clips": 1,
        "accepted_by": "top1",
        "bound": 1.0,
        "fp32_value": 50.0,
        "quantized_value": 50.0,
        "golden_min_cosine": 1.0,
        "golden_max_difference": 0.0,
    }
    QuantizationSpec.model_validate(record)
    with pytest.raises(ValidationError, match=f"{field}\n.*must be from"):
        QuantizationSpec.model_validate({**record, field: value})


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_graph_without_its_record_is_refused(precision: str) -> None:
    specs = fake_manifest().model_dump(mode="json")["graphs"]
    specs["visual"]["precision"] = precision
    with pytest.raises(ValidationError, match="quantization and an int8 or fp8 graph of frames"):
        Manifest.model_validate(changed(graphs=specs))


# As version 0.1.0 wrote it.
OLD_RECORD = {
    "recipe": "static",
    "weight_range": "full",
    "int8_blocks": ["blocks.0"],
    "fp32_blocks": ["last_block"],
    "num_calibration_clips": 8,
    "accepted_by": "top1",
    "bound": 0.5,
    "fp32_value": 90.0,
    "int8_value": 89.75,
    "golden_min_cosine": 0.9995,
    "golden_max_difference": 0.02,
}


def test_the_record_of_an_older_int8_bundle_can_be_read() -> None:
    specs = fake_manifest().model_dump(mode="json")["graphs"]
    specs["visual"]["precision"] = "int8"
    manifest = Manifest.model_validate(changed(graphs=specs, quantization=OLD_RECORD))
    spec = manifest.quantization
    assert spec is not None
    assert (spec.quantized_blocks, spec.unquantized_blocks) == (("blocks.0",), ("last_block",))
    assert (spec.quantized_value, spec.unquantized_value) == (89.75, 90.0)
    assert spec.rest_precision == "fp32"
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_manifest_without_quantization_has_no_such_field() -> None:
    manifest = fake_manifest()
    assert "quantization" not in manifest.model_dump()
    assert "quantization" not in manifest.model_dump_json()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


NUM_TOKENS = 50


@pytest.mark.parametrize(
    ("graph", "array"),
    [
        ("visual", np.zeros((3, 32, 32, 3), np.uint8)),
        ("temporal", np.zeros((2, 7, 16), np.float32)),
        ("textual", np.zeros((2, 77), np.int32)),
        ("clip", np.zeros((1, 1, 32, 32, 3), np.uint8)),
        ("visual", np.zeros((3, 64, 32, 3), np.uint8)[:, ::2]),  # need not be contiguous
    ],
)
def test_what_a_graph_takes_is_let_through(graph: GraphOrClip, array: np.ndarray) -> None:
    fake_manifest().check_input(graph, array)
    fake_manifest().check_input(graph, array, num_tokens=NUM_TOKENS)


@pytest.mark.parametrize(
    ("graph", "array", "message"),
    [
        ("visual", [[1, 2]], r"frames is a list; expected a numpy array of shape \(N, 32, 32, 3\)"),
        ("visual", np.zeros((3, 32, 32, 3), np.int8), "dtype int8; expected .* dtype uint8"),
        ("visual", np.zeros((3, 31, 32, 3), np.uint8), r"shape \(3, 31, 32, 3\) and"),
        ("visual", np.zeros((0, 32, 32, 3), np.uint8), "none of its sizes zero"),
        ("visual", np.zeros((32, 32, 3), np.uint8), r"expected shape \(N, 32, 32, 3\)"),
        ("temporal", np.zeros((2, 0, 16), np.float32), "none of its sizes zero"),
        ("temporal", np.zeros((2, 7, 15), np.float32), r"expected shape \(B, T, 16\)"),
        ("temporal", np.zeros((2, 7, 16), ">f4"), "dtype >f4; expected .* dtype float32"),
        ("temporal", np.zeros((2, 78, 16), np.float32), "78 frames .* has positions for 77"),
        ("temporal", np.full((2, 7, 16), np.nan, np.float32), "not finite"),
        ("temporal", np.full((2, 7, 16), -np.inf, np.float32), "not finite"),
        ("clip", np.zeros((2, 78, 32, 32, 3), np.uint8), "78 frames .* has positions for 77"),
        ("clip", np.zeros((2, 32, 32, 3), np.uint8), r"expected shape \(B, T, 32, 32, 3\)"),
        ("textual", np.zeros((2, 7), np.int64), r"dtype int64; expected shape \(M, L\)"),
        ("textual", np.zeros((2, 78), np.int32), "78 columns .* takes at most 77"),
        ("textual", np.full((2, 7), 50, np.int32), "from 50 to 50; they must be from 0 to 49"),
        ("textual", np.full((2, 7), -1, np.int32), "from -1 to -1; they must be from 0 to 49"),
    ],
)
def test_what_a_graph_does_not_take_is_refused(
    graph: GraphOrClip, array: Any, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        fake_manifest().check_input(graph, array, num_tokens=NUM_TOKENS)


def test_values_are_looked_at_only_where_that_is_asked_for() -> None:
    manifest = fake_manifest()
    manifest.check_input("temporal", np.full((2, 7, 16), np.nan, np.float32))
    manifest.check_input("textual", np.full((2, 7), -1, np.int32))


def test_a_number_of_frames_that_is_fixed_is_the_only_one() -> None:
    manifest = fake_manifest(visual_prompt="transf_cls", fixed_num_frames=True, max_frames=4)
    assert manifest.input_spec("temporal").shape == ("B", 4, 16)
    manifest.check_input("temporal", np.zeros((2, 4, 16), np.float32))
    with pytest.raises(ShapeError, match=r"3 frames .*'transf_cls' takes exactly 4; sample that"):
        manifest.check_input("temporal", np.zeros((2, 3, 16), np.float32))


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, np.nan, 1e38])
def test_vectors_that_are_not_of_norm_1_are_refused(factor: float) -> None:
    spec = TensorSpec(name="a.npy", dtype="float32", shape=("V", 4))
    vectors = np.full((3, 4), 0.5, np.float32)
    spec.check(vectors, norm_tolerance=1e-2)
    vectors[1] *= factor
    spec.check(vectors)
    with pytest.raises(ShapeError, match=r"a\.npy holds vectors that are not of norm 1"):
        spec.check(vectors, norm_tolerance=1e-2)
