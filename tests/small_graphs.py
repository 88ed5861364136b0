"""Exported graphs of small models with several heads, in which attention decides the result.

Tests import it by name: `from small_graphs import export_small`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

NUM_FRAMES, NUM_TOKENS = 4, 7
_VOCABULARY = 50

# What is exported: the visual prompt or another variant, and the graph.
SMALL_GRAPHS = (
    ("meanp", "visual"),
    ("gelu", "visual"),
    ("transf", "temporal"),
    ("transf_cls", "temporal"),
    ("joint", "video"),
    ("shift", "video"),
    ("meanp", "textual"),
)


def small_model(variant: str) -> Any:
    """A seeded model of three blocks of two heads: a visual prompt, `gelu` or `resnet`.

    `wide` has the sizes of a ViT-B/32 in two blocks, since they decide which kernels are chosen.
    """
    import torch

    from actionclip_deploy.model import ModelConfig, build_model

    fields: dict[str, Any] = {
        "backbone": "small",
        "embed_dim": 32,
        "input_size": 32,
        "vision_layers": 3,
        "vision_width": 64,
        "vision_head_width": 32,
        "patch_size": 16,
        "context_length": 12,
        "vocab_size": _VOCABULARY,
        "text_width": 64,
        "text_heads": 2,
        "text_layers": 3,
        "prompt_layers": 2,
    }
    if variant == "gelu":
        fields["quick_gelu"] = False
    if variant == "resnet":
        fields |= {"vision_layers": (2, 1, 1, 1), "vision_width": 16, "patch_size": None}
    if variant == "wide":
        fields |= {"vision_layers": 2, "vision_width": 768, "vision_head_width": 64}
        fields |= {"input_size": 224, "patch_size": 32}
    prompt = "meanp" if variant in ("gelu", "resnet", "wide") else variant
    config = ModelConfig(**fields).with_visual_prompt(
        prompt, num_frames=NUM_FRAMES, position_rows=None
    )
    model = build_model(config, seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # the exporter leaves out biases of zeros
            parameter.data.normal_(std=0.1, generator=generator)
        elif "attn" in name or "attention" in name:
            parameter.data.mul_(3)
    return model


@cache
def _exported(variant: str, graph: str, precision: str) -> bytes:
    from actionclip_deploy.export.graphs import plan_graphs
    from actionclip_deploy.export.layers import PixelStatistics
    from actionclip_deploy.export.onnx_files import write_graph

    pixels = PixelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    plans = plan_graphs(small_model(variant), pixels, precision, precision)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(next(plan for plan in plans if plan.name == graph), path)
        return path.read_bytes()


def export_small(variant: str, graph: str, precision: str = "fp32") -> Any:
    """One graph as an `onnx.ModelProto`; `int8` is static, between fp32; `fp8` between fp16."""
    from actionclip_deploy.export.quantization import find_products, quantize

    if precision not in ("int8", "fp8"):
        return onnx.load_from_string(_exported(variant, graph, precision))
    rest = "fp32" if precision == "int8" else "fp16"
    model = onnx.load_from_string(_exported(variant, graph, rest))
    products = find_products(model)
    return quantize(
        model,
        blocks={product.block for product in products},
        recipe="static",
        weight_range="full" if precision == "int8" else None,
        thresholds={product.input: 8.0 for product in products},
        precision=precision,  # type: ignore[arg-type]
    )


def inputs_of(model: Any, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of a graph; `rows` of them in its first dimension."""
    generator = np.random.default_rng(rows)
    sizes = {"T": NUM_FRAMES, "L": NUM_TOKENS}
    arrays = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or sizes.get(d.dim_param, rows) for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.float32:
            arrays[value.name] = generator.normal(size=shape).astype(np.float32)
        else:
            highest = 256 if dtype == np.uint8 else _VOCABULARY
            arrays[value.name] = generator.integers(0, highest, shape).astype(dtype)
    return arrays


def run_onnx(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a graph in ONNX Runtime, on one thread of the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output: np.ndarray = session.run(None, inputs)[0]
    return output


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the largest absolute value of the second."""
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())
