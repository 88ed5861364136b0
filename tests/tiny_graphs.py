"""Bundles of real ONNX graphs, small enough to compute by hand.

Tests import it by name: `from tiny_graphs import write_tiny_bundle`.

    visual    mean over the pixels of each colour, times WEIGHTS          (N, S, S, 3) -> (N, D)
    temporal  mean over the frames, unit norm                             (B, T, D) -> (B, D)
    textual   sum of the rows of VOCABULARY that the tokens name, unit norm   (M, L) -> (M, D)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fakes import fake_manifest
from onnx import TensorProto, helper, numpy_helper

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.manifest import GraphName, TensorSpec

_generator = np.random.default_rng(7)
WEIGHTS = _generator.normal(size=(3, 16)).astype(np.float32) / 255
VOCABULARY = _generator.normal(size=(50, 16)).astype(np.float32)
VOCABULARY[0] = 0  # padding


def visual(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float64).mean(axis=(1, 2)) @ WEIGHTS.astype(np.float64)


def temporal(features: np.ndarray) -> np.ndarray:
    return _unit_norm(features.astype(np.float64).mean(axis=1))


def textual(tokens: np.ndarray) -> np.ndarray:
    return _unit_norm(VOCABULARY.astype(np.float64)[tokens].sum(axis=1))


def _unit_norm(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _numbers(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values), name)


_UNIT_NORM = [
    helper.make_node("ReduceL2", ["sum", "last"], ["norm"], keepdims=1),
    helper.make_node("Div", ["sum", "norm"], ["out"]),
]
_NODES: dict[str, list[Any]] = {
    "visual": [
        helper.make_node("Cast", ["in"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "middle"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["out"]),
    ],
    "temporal": [
        helper.make_node("ReduceMean", ["in", "second"], ["sum"], keepdims=0),
        *_UNIT_NORM,
    ],
    "textual": [
        helper.make_node("Gather", ["vocabulary", "in"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "second"], ["sum"], keepdims=0),
        *_UNIT_NORM,
    ],
}
_NODES["video"] = [
    helper.make_node("Cast", ["in"], ["floats"], to=TensorProto.FLOAT),
    helper.make_node("ReduceMean", ["floats", "inner"], ["mean"], keepdims=0),
    helper.make_node("MatMul", ["mean", "weights"], ["sum"]),
    *_UNIT_NORM,
]
_INITIALIZERS = {
    "visual": [_numbers("middle", 1, 2), numpy_helper.from_array(WEIGHTS, "weights")],
    "temporal": [_numbers("second", 1), _numbers("last", -1)],
    "textual": [
        numpy_helper.from_array(VOCABULARY, "vocabulary"),
        _numbers("second", 1),
        _numbers("last", -1),
    ],
    "video": [
        _numbers("inner", 1, 2, 3),
        _numbers("last", -1),
        numpy_helper.from_array(WEIGHTS, "weights"),
    ],
}
_TYPES = {
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT,
}


def tiny_model(graph: GraphName, given: TensorSpec, result: TensorSpec) -> onnx.ModelProto:
    """The graph with its input and output named as the manifest names them."""

    def renamed(node: Any) -> Any:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        names = {"in": given.name, "out": result.name}
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        return copy

    model = helper.make_model(
        helper.make_graph(
            [renamed(node) for node in _NODES[graph]],
            graph,
            [helper.make_tensor_value_info(given.name, _TYPES[given.dtype], given.shape)],
            [helper.make_tensor_value_info(result.name, _TYPES[result.dtype], result.shape)],
            _INITIALIZERS[graph],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def write_tiny_bundle(
    folder: Path, *, change: Callable[[str, Any], Any] | None = None, **manifest: Any
) -> Bundle:
    """Write a bundle of small graphs and open it.

    Args:
        folder: Where; made if it is not there.
        change: Given a graph's name and ONNX model, gives the model or the bytes to write instead.
        manifest: Arguments of `fake_manifest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = fake_manifest(**manifest)
    for name, spec in description.graphs.items():
        model: Any = tiny_model(name, spec.input, spec.output)
        if change is not None:
            model = change(name, model)
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / spec.file).write_bytes(content)
    write_manifest(folder, description.model_copy(update={"files": hash_files(folder)}))
    return Bundle.open(folder)
