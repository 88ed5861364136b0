"""Small models, and their graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from actionclip_deploy.export.graphs import GraphPlan
    from actionclip_deploy.export.layers import PixelStatistics
    from actionclip_deploy.model import ActionClipNetwork

NUM_FRAMES = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="session")
def pixels() -> PixelStatistics:
    """Statistics that differ by channel and from CLIP's."""
    from actionclip_deploy.export.layers import PixelStatistics

    return PixelStatistics(MEAN, STD)


@pytest.fixture(scope="session")
def small_model() -> Callable[..., ActionClipNetwork]:
    """Builds a seeded model of two small blocks in each part; T = 4."""
    from actionclip_deploy.model import ModelConfig, build_model

    sizes: dict[str, Any] = {
        "backbone": "small",
        "embed_dim": 32,
        "input_size": 32,
        "vision_layers": 2,
        "vision_width": 64,
        "vision_head_width": 32,
        "patch_size": 16,
        "context_length": 12,
        "vocab_size": 50,
        "text_width": 64,
        "text_heads": 2,
        "text_layers": 2,
        "prompt_layers": 2,
    }

    def build(visual_prompt: str = "meanp", *, rows: int | None = None, **fields: Any) -> Any:
        num_frames = fields.pop("num_frames", NUM_FRAMES)
        config = ModelConfig(**{**sizes, **fields}).with_visual_prompt(
            visual_prompt, num_frames=num_frames, position_rows=rows
        )
        return build_model(config, seed=5)

    return build


@pytest.fixture
def plan_of(pixels: PixelStatistics) -> Callable[..., GraphPlan]:
    """The plan of one graph of a model."""
    from actionclip_deploy.export.graphs import plan_graphs

    def find(model: ActionClipNetwork, name: str, precision: str = "fp32") -> GraphPlan:
        plans = plan_graphs(model, pixels, precision, precision)
        return next(plan for plan in plans if plan.name == name)

    return find


@pytest.fixture
def graph_of(
    tmp_path: Path, plan_of: Callable[..., GraphPlan]
) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
    """Exports one graph of a model and gives a function that runs it in ONNX Runtime."""
    from actionclip_deploy.export.onnx_files import write_graph

    def export(model: ActionClipNetwork, name: str, precision: str = "fp32") -> Any:
        path = tmp_path / f"{name}.onnx"
        write_graph(plan_of(model, name, precision), path)
        return open_graph(path)

    return export


def open_graph(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    return lambda array: session.run(None, {value.name: array})[0]


@pytest.fixture(scope="session")
def open_onnx() -> Callable[[Path], Callable[[np.ndarray], np.ndarray]]:
    """Gives a function that runs an ONNX file in ONNX Runtime."""
    return open_graph


@pytest.fixture(scope="session")
def reference(
    pixels: PixelStatistics,
) -> Callable[[ActionClipNetwork, str, np.ndarray], np.ndarray]:
    """What the model itself gives for the input of a graph: nothing folded, nothing left out."""
    import torch

    def run(model: ActionClipNetwork, name: str, array: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(array)
        with torch.inference_mode():
            if name == "temporal":
                return model.encode_clips(values).numpy()
            if name == "textual":
                return model.encode_text(values).numpy()
            scaled = (values / 255 - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
            moved = scaled.movedim(-1, -3)
            encode = model.encode_frames if name == "visual" else model.encode_video
            return encode(moved).numpy()

    return run
