from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.onnx_files import check_graph, write_graph
from actionclip_deploy.manifest import TensorSpec


def test_the_weights_lie_in_the_file(small_model, plan_of, tmp_path: Path) -> None:
    write_graph(plan_of(small_model(), "visual"), tmp_path / "visual.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["visual.onnx"]


def test_large_weights_lie_beside_the_file_under_its_name(
    small_model, plan_of, open_onnx, tmp_path: Path
) -> None:
    model = small_model("transf")
    clips = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    (tmp_path / "inside").mkdir()
    write_graph(plan_of(model, "temporal"), tmp_path / "inside/temporal.onnx")
    for name in ("visual", "temporal"):
        write_graph(plan_of(model, name), tmp_path / f"{name}.onnx", max_embedded_bytes=10_000)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["temporal.onnx", "temporal.onnx.data", "visual.onnx", "visual.onnx.data"]
    assert (tmp_path / "temporal.onnx").stat().st_size < 50_000
    paths = [tmp_path / "temporal.onnx", tmp_path / "inside/temporal.onnx"]
    outside, inside = (open_onnx(path) for path in paths)
    np.testing.assert_array_equal(outside(clips), inside(clips))
    # What torch wrote, with its weights put back in by onnx, is what our own writer wrote.
    theirs, ours = (onnx.load(path).graph for path in paths)
    assert theirs.node == ours.node
    assert [value.name for value in theirs.initializer] == [v.name for v in ours.initializer]
    for one, other in zip(theirs.initializer, ours.initializer, strict=True):
        assert (one.name, one.dims, one.data_type) == (other.name, other.dims, other.data_type)
        assert one.raw_data == other.raw_data


@pytest.mark.usefixtures("traced_anew")
def test_the_same_model_gives_the_same_bytes(small_model, plan_of, tmp_path: Path) -> None:
    paths = [tmp_path / f"temporal{i}.onnx" for i in (1, 2)]
    for path in paths:
        write_graph(plan_of(small_model("transf"), "temporal"), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second


@pytest.mark.usefixtures("traced_anew")
def test_nothing_in_the_file_tells_where_it_was_made(small_model, plan_of, tmp_path: Path) -> None:
    path = tmp_path / "temporal.onnx"
    write_graph(plan_of(small_model("transf"), "temporal"), path)
    content = path.read_bytes()
    for word in (b".py", b"stack_trace", b"site-packages", str(Path.home()).encode() + b"/"):
        assert word not in content
    model = onnx.load(path)
    graph = model.graph
    parts = [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output]
    assert not any(part.doc_string or len(part.metadata_props) for part in parts)


@pytest.mark.usefixtures("traced_anew")
def test_nothing_is_printed(
    small_model, plan_of, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog
) -> None:
    write_graph(plan_of(small_model("transf"), "temporal"), tmp_path / "temporal.onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_an_output_that_differs_from_the_plan_is_an_error(
    small_model, plan_of, tmp_path: Path
) -> None:
    plan = plan_of(small_model(), "temporal")
    wrong = TensorSpec(name="video_embedding", dtype="float32", shape=("B", 33))
    with pytest.raises(ExportError, match=r"temporal graph came out with the outputs .*'B', 32"):
        write_graph(replace(plan, output=wrong), tmp_path / "temporal.onnx")


def test_a_module_that_fixes_a_dimension_is_an_error(small_model, plan_of, tmp_path: Path) -> None:
    class Stubborn(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            # torch exports this without a word, for two frames.
            return frames.float().mean((1, 2)) if frames.shape[0] == 2 else frames.float()[:, 0, 0]

    plan = replace(plan_of(small_model(), "visual"), build=Stubborn)
    with pytest.raises(ExportError, match=r"visual graph came out with the inputs .*\[2, 32, 32"):
        write_graph(plan, tmp_path / "visual.onnx")


def test_a_module_that_torch_cannot_export_is_an_error(
    small_model, plan_of, tmp_path: Path
) -> None:
    class Moody(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            pixels = frames.float()
            return pixels.mean((1, 2)) if pixels.sum() > 0 else pixels.amax((1, 2))

    plan = replace(plan_of(small_model(), "visual"), build=Moody)
    with pytest.raises(ExportError, match=r"torch .* cannot export the visual graph \(.+\)"):
        write_graph(plan, tmp_path / "visual.onnx")


def test_a_file_that_is_not_valid_onnx_is_an_error(small_model, plan_of, tmp_path: Path) -> None:
    plan = plan_of(small_model(), "temporal")
    path = tmp_path / "temporal.onnx"
    write_graph(plan, path)
    model = onnx.load(path)
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, path)
    with pytest.raises(ExportError, match="temporal graph is not valid ONNX"):
        check_graph(plan, path)
