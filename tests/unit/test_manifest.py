from __future__ import annotations

from typing import Any

import pytest
from fakes import fake_manifest
from pydantic import ValidationError

from actionclip_deploy.manifest import SCHEMA_VERSION, Manifest


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
