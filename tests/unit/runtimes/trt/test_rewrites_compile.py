"""Rewritten graphs in the compiler of TensorRT for RTX, which needs no GPU: they compile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from small_graphs import NUM_FRAMES, NUM_TOKENS, export_small

from actionclip_deploy.runtimes.trt.rewrites import REWRITES

trt = pytest.importorskip("tensorrt_rtx")

SIZES = {"T": NUM_FRAMES, "L": NUM_TOKENS}
ROWS = (1, 4, 8)


class Log(trt.ILogger):  # type: ignore[misc, name-defined]
    """Keeps all that the compiler says."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(str(message))


def compile_graph(model: Any, folder: Path, target: str = "SM86") -> list[str]:
    """The names of the layers that a graph became, with 1 to 8 rows."""
    path = folder / "graph.onnx"
    onnx.save(model, path)
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), [
        str(parser.get_error(place)) for place in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        shapes = [
            tuple(d.dim_value or SIZES.get(d.dim_param, rows) for d in dimensions) for rows in ROWS
        ]
        profile.set_shape(value.name, *shapes)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.lines[-5:]
    (listed,) = (line for line in log.lines if line.startswith("Layers:"))
    return re.findall(r"^Name: (\S+), LayerType", listed, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in REWRITES if name != "fp32-islands"])
def test_the_fp16_visual_graph_compiles_in_each_form(name: str, tmp_path: Path) -> None:
    assert compile_graph(REWRITES[name].apply(export_small("meanp", "visual", "fp16")), tmp_path)


@pytest.mark.parametrize(
    "name", ["attention-form", "attention-scaled", "broken-fusion", "split-qkv"]
)
@pytest.mark.parametrize(
    ("variant", "graph", "precision"),
    [("meanp", "textual", "fp32"), ("transf", "temporal", "fp16"), ("shift", "video", "fp16")],
)
def test_other_graphs_compile_with_another_form_of_attention(
    variant: str, graph: str, precision: str, name: str, tmp_path: Path
) -> None:
    model = REWRITES[name].apply(export_small(variant, graph, precision))
    assert compile_graph(model, tmp_path)


@pytest.mark.parametrize("name", ["split-qkv", "attention-scaled"])
@pytest.mark.parametrize(("precision", "target"), [("int8", "SM86"), ("fp8", "SM89")])
def test_quantised_graphs_compile_with_other_weights(
    precision: str, target: str, name: str, tmp_path: Path
) -> None:
    model = REWRITES[name].apply(export_small("meanp", "visual", precision))
    assert compile_graph(model, tmp_path, target)


# What the names of layers tell: an attention that became one kernel is `_gemm_mha_v2...`, or
# `_gemv_mha_v1...` where it has one query, as in the last block of a ViT-B/32; a product that was
# made of several has their names with + in between. A version that names them otherwise fails the
# first of the two assertions.
@pytest.mark.parametrize("target", ["SM86", "SM120"])
@pytest.mark.parametrize(("variant", "num_blocks"), [("meanp", 3), ("wide", 2)])
def test_no_attention_becomes_one_kernel(
    variant: str, num_blocks: int, target: str, tmp_path: Path
) -> None:
    original = export_small(variant, "visual", "fp16")
    fused = [x for x in compile_graph(original, tmp_path, target) if "_mha_" in x]
    assert len(fused) == num_blocks
    rewritten = REWRITES["broken-fusion"].apply(original)
    assert not [x for x in compile_graph(rewritten, tmp_path, target) if "_mha_" in x]


def test_query_key_and_value_are_not_fused_again(tmp_path: Path) -> None:
    original = export_small("meanp", "visual", "fp16")
    assert len([x for x in compile_graph(original, tmp_path) if "+" in x]) == 3
    rewritten = REWRITES["split-qkv"].apply(original)
    assert not [x for x in compile_graph(rewritten, tmp_path) if "+" in x]
