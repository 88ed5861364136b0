"""The exported graphs, on ONNX Runtime, against the original implementation's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from actionclip_deploy.export.graphs import GraphPlan, VideoGraph, VisualGraph, plan_graphs
from actionclip_deploy.export.layers import PixelStatistics
from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.manifest import TensorSpec
from actionclip_deploy.model import (
    PIXEL_MEAN,
    PIXEL_STD,
    ActionClipNetwork,
    build_model,
    load_checkpoint,
)

# fp32 on both sides, by other kernels; features are of the size of 1.
TOLERANCE = 1e-4
# What 11 bits of mantissa may turn an output by.
MIN_COSINE = 0.9999
SCALE = 100.0

Run = Callable[[np.ndarray], np.ndarray]
CLIP_PIXELS = PixelStatistics(PIXEL_MEAN, PIXEL_STD)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def close(given: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(given, wanted, rtol=0, atol=TOLERANCE)


def min_cosine(given: np.ndarray, wanted: np.ndarray) -> float:
    return float((unit(given.astype(np.float64)) * unit(wanted.astype(np.float64))).sum(-1).min())


def probabilities(video: np.ndarray, text: np.ndarray, num_templates: int) -> np.ndarray:
    """Softmax over labels per template, then the mean over templates."""
    logits = (SCALE * video @ text.T).reshape(len(video), num_templates, -1).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=1)


def open_graph(path: Path) -> Run:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    return lambda array: session.run(None, {value.name: array})[0]


def export(model: ActionClipNetwork, name: str, folder: Path) -> Run:
    plan = next(p for p in plan_graphs(model, CLIP_PIXELS, "fp32") if p.name == name)
    write_graph(plan, folder / f"{name}.onnx")
    return open_graph(folder / f"{name}.onnx")


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path, tiny_fp16_bundle: Path) -> dict[tuple[str, str], Run]:
    """Graphs of the tiny Transf checkpoint, by precision and name."""
    return {
        (precision, name): open_graph(folder / f"{name}.onnx")
        for precision, folder in (("fp32", tiny_bundle), ("fp16", tiny_fp16_bundle))
        for name in ("visual", "temporal", "textual")
    }


def run_whole_way(
    graphs: dict[tuple[str, str], Run], precision: str, expected: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame features, video embeddings and scores of the golden uint8 frames."""
    frames = expected["frames_u8"]
    features = graphs[precision, "visual"](frames.reshape(-1, *frames.shape[2:]))
    features = features.reshape(*frames.shape[:2], -1)
    video = graphs[precision, "temporal"](features)
    text = graphs[precision, "textual"](expected["tokens"])
    return features, video, probabilities(video, text, int(expected["num_templates"]))


def test_fp32_graphs_give_the_originals_features_embeddings_and_scores(
    graphs: dict[tuple[str, str], Run], expected: dict[str, np.ndarray]
) -> None:
    features, video, scores = run_whole_way(graphs, "fp32", expected)
    close(features, expected["frame_features_u8"])
    close(video, unit(expected["video_features_u8_Transf"]))
    close(scores, expected["probabilities_u8_Transf"])


def test_fp16_graphs_give_the_originals_directions_and_first_labels(
    graphs: dict[tuple[str, str], Run], expected: dict[str, np.ndarray]
) -> None:
    features, video, scores = run_whole_way(graphs, "fp16", expected)
    assert min_cosine(features, expected["frame_features_u8"]) > MIN_COSINE
    assert min_cosine(video, expected["video_features_u8_Transf"]) > MIN_COSINE
    wanted = expected["probabilities_u8_Transf"].argmax(axis=1)
    np.testing.assert_array_equal(scores.argmax(axis=1), wanted)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("length", [77, 24])
def test_the_textual_graph_gives_the_originals_embeddings_at_any_length(
    length: int,
    precision: str,
    graphs: dict[tuple[str, str], Run],
    expected: dict[str, np.ndarray],
) -> None:
    assert (expected["tokens"][:, length:] == 0).all()
    text = graphs[precision, "textual"](expected["tokens"][:, :length])
    close(text, unit(expected["text_features"]))


@pytest.mark.parametrize("num_frames", [1, 4, 16])
def test_the_temporal_graph_gives_the_originals_embeddings_at_other_numbers_of_frames(
    num_frames: int, graphs: dict[tuple[str, str], Run], expected: dict[str, np.ndarray]
) -> None:
    features = expected[f"transf_T{num_frames}_in"]
    wanted = unit(expected[f"transf_T{num_frames}_out"])
    close(graphs["fp32", "temporal"](features), wanted)
    assert min_cosine(graphs["fp16", "temporal"](features), wanted) > MIN_COSINE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_temporal_graph_of_transf_gives_the_originals_embeddings(
    precision: str, graphs: dict[tuple[str, str], Run], expected: dict[str, np.ndarray]
) -> None:
    video = graphs[precision, "temporal"](expected["frame_features"])
    assert min_cosine(video, expected["video_features_Transf"]) > MIN_COSINE
    text = graphs[precision, "textual"](expected["tokens"])
    scores = probabilities(video, text, int(expected["num_templates"]))
    wanted = expected["probabilities_Transf"]
    np.testing.assert_array_equal(scores.argmax(axis=1), wanted.argmax(axis=1))
    if precision == "fp32":
        close(video, unit(expected["video_features_Transf"]))
        close(scores, wanted)


def check_head(run: Run, head: str, expected: dict[str, np.ndarray]) -> None:
    video = run(expected["frame_features"])
    close(video, unit(expected[f"video_features_{head}"]))
    text, num_templates = unit(expected["text_features"]), int(expected["num_templates"])
    close(probabilities(video, text, num_templates), expected[f"probabilities_{head}"])


@pytest.mark.parametrize("head", ["meanP", "LSTM", "Conv_1D"])
def test_the_temporal_graph_of_other_heads_gives_the_originals_embeddings(
    head: str,
    tiny_checkpoints: dict[str, Path],
    expected: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    model = load_checkpoint(tiny_checkpoints[head]).model
    check_head(export(model, "temporal", tmp_path), head, expected)


def test_the_temporal_graph_of_transf_cls_gives_the_originals_embeddings(
    shared: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = torch.load(shared / "golden/tiny_Transf.pt", weights_only=True)
    head = torch.load(shared / "golden/head_Transf_cls.pt", weights_only=True)
    weights["fusion_model_state_dict"] = head.get("fusion_model_state_dict", head)
    torch.save(weights, tmp_path / "tiny_Transf_cls_8f.pt")
    model = load_checkpoint(tmp_path / "tiny_Transf_cls_8f.pt").model
    check_head(export(model, "temporal", tmp_path), "Transf_cls", expected)


class NormalisedPatches(torch.nn.Module):
    """Takes the place of a patch embedding, for golden pixels that no uint8 frame has."""

    def __init__(self, visual: Any, bias: torch.Tensor) -> None:
        super().__init__()
        self.conv = visual.conv1
        self.register_buffer("bias", bias.float())
        self.width = self.conv.out_channels

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv(pixels.flatten(0, -4)).flatten(2).transpose(1, 2)
        # The bias of raw frames is in the position table.
        return patches - self.bias


def export_from_pixels(
    module: torch.nn.Module,
    model: ActionClipNetwork,
    name: str,
    folder: Path,
    letters: tuple[str, ...],
) -> Run:
    (plan,) = (p for p in plan_graphs(model, CLIP_PIXELS, "fp32") if p.name == name)
    module.tower.embedding = NormalisedPatches(model.towers.visual, module.tower.embedding.bias)
    pixels = TensorSpec(name="pixels", dtype="float32", shape=(*letters, 3, 64, 64))
    path = folder / f"{name}.onnx"
    write_graph(GraphPlan(plan.name, "fp32", pixels, plan.output, lambda: module), path)
    return open_graph(path)


def test_the_visual_graph_gives_the_originals_features_of_golden_pixels(
    tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = load_checkpoint(tiny_checkpoints["meanP"]).model
    graph = VisualGraph(model, CLIP_PIXELS, torch.float32)
    run = export_from_pixels(graph, model, "visual", tmp_path, ("N",))
    pixels = expected["pixels"]
    close(run(pixels.reshape(-1, *pixels.shape[2:])).reshape(2, 8, -1), expected["frame_features"])


def test_the_video_graph_of_shift_gives_the_originals_embeddings_of_golden_pixels(
    tiny_checkpoints: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    loaded = load_checkpoint(tiny_checkpoints["meanP"]).model
    model = build_model(loaded.config.with_visual_prompt("shift", num_frames=8))
    model.towers.load_state_dict(loaded.towers.state_dict())
    graph = VideoGraph(model, CLIP_PIXELS, torch.float32)
    run = export_from_pixels(graph, model, "video", tmp_path, ("B", "T"))
    video = run(expected["pixels"])
    close(video, unit(expected["video_features_tsm"]))
    close(video, unit(expected["frame_features_tsm"].mean(axis=1)))
