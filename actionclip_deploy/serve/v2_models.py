"""The models of /v2: the bundle's graphs, and `clip` for whole clips; what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.checks import input_shape
from actionclip_deploy.serve.execution import GraphOrClip
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.v2_refusals import unknown_version

# A bundle does not change while it is served, so each model has one version.
VERSION = "1"

_DATATYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}


@dataclass(frozen=True)
class Tensor:
    """What goes in or comes out.

    Attributes:
        name: As in the graph.
        dtype: Of numpy, in the byte order of this machine.
        shape: -1 stands for any positive number; the first size is that of the batch.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name of its type."""
        return _DATATYPES[self.dtype.name]

    @property
    def metadata(self) -> dict[str, Any]:
        """As the protocol describes it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @property
    def config(self) -> dict[str, Any]:
        """As Triton's model configuration describes it, which leaves out the batch."""
        return {
            "name": self.name,
            "data_type": f"TYPE_{self.datatype}",
            "dims": list(self.shape[1:]),
        }


@dataclass(frozen=True)
class Model:
    """One graph, or `clip`."""

    name: GraphOrClip
    input: Tensor
    output: Tensor


def models_of(service: Service) -> dict[str, Model]:
    """All models, by name."""
    return {name: _model(service, name) for name in service.graph_names}


def find_model(models: dict[str, Model], name: str, version: str) -> Model:
    """The model that a path names.

    Raises:
        RequestRefusedError: If there is none of that name and version (404).
    """
    if name not in models:
        raise refusals.unknown_model(name, list(models))
    if version != VERSION:
        raise unknown_version(name, version, VERSION)
    return models[name]


def metadata(service: Service, model: Model) -> dict[str, Any]:
    """What the protocol tells of a model."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": _platform(service),
        "inputs": [model.input.metadata],
        "outputs": [model.output.metadata],
    }


def config(service: Service, model: Model) -> dict[str, Any]:
    """What Triton tells of how a model is run, as far as it has a meaning here."""
    settings = service.settings
    return {
        "name": model.name,
        "platform": _platform(service),
        "backend": service.runtime.describe().name,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": int(service.limits.rows),
        "input": [model.input.config],
        "output": [model.output.config],
        "dynamic_batching": {"max_queue_delay_microseconds": round(settings.max_delay_ms * 1000)},
    }


def _model(service: Service, name: GraphOrClip) -> Model:
    manifest = service.manifest
    shape = tuple(_size(size) for size in input_shape(manifest, name))
    if name == "clip":
        width = manifest.model.embedding_dim
        return Model(
            name,
            Tensor("frames", np.dtype(np.uint8), shape),
            Tensor("video_embedding", np.dtype(np.float32), (-1, width)),
        )
    given, output = manifest.graphs[name].input, manifest.graphs[name].output
    return Model(
        name,
        Tensor(given.name, np.dtype(given.dtype), shape),
        Tensor(output.name, np.dtype(output.dtype), tuple(map(_size, output.shape))),
    )


def _size(size: int | str) -> int:
    return size if isinstance(size, int) else -1


def _platform(service: Service) -> str:
    """`onnxruntime_onnx` is a name of Triton's; it has none for PyTorch as it runs here."""
    names = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
    name = service.runtime.describe().name
    return names.get(name, name)
