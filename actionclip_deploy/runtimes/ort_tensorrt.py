"""ONNX Runtime's TensorRT provider: its options for each graph of a bundle, and its limits.

What it does not tell, and what is done about it here:

- It names a cached engine after the graph's file and tensors, not after its weights, so a new
  fine-tune of the same model would be answered for by the old engine. So each graph has a folder
  of its own, named by the sha256 of its files and by everything else that an engine depends on.
  Source: microsoft/onnxruntime issue 6455, TRTGenerateId.
- A shape outside of those seen before builds the engine anew, for minutes. So the shapes are told
  beforehand, and larger batches are cut. Only one profile is of use: it runs the first of several.
  Source: issues 22822 and 23965.
- Precision flags do nothing good: TensorRT 11 has none, and the graph says the precision.
- Its CUDA graphs give the first input's result for every later one. They stay off.
  Source: issue 20050.
- It is linked to one major version of TensorRT and loads no other. Source: issue 32278.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import InferenceError
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.runtimes.cache_entries import NotCachedError, Source, check_source, key_of
from actionclip_deploy.runtimes.graph_cache import GraphCache
from actionclip_deploy.runtimes.machine import (
    find_gpus,
    find_tensorrt,
    library_version,
    linked_by_onnxruntime,
    why_provider_lacks_tensorrt,
)
from actionclip_deploy.runtimes.trt.plan import Profile, ShapeRange, shape_ranges

logger = logging.getLogger(__name__)

TENSORRT = "TensorrtExecutionProvider"
FOLDER_NAME = "onnxruntime-tensorrt"

# In clips: the latency profile and the throughput profile of engines in one.
_PROFILE = Profile("onnxruntime", 1, 8, 8)


class OrtEngines:
    """What the provider is told about the graphs of a bundle.

    Args:
        bundle: The bundle.
        cache: Where optimised graphs are kept; engines are kept beside it. None for nowhere.
        onnxruntime: Version of ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, cache: GraphCache | None, onnxruntime: str) -> None:
        self._bundle = bundle
        self._folder = None if cache is None else cache.folder.parent / FOLDER_NAME
        self._onnxruntime = onnxruntime

    def options(self, graph: GraphName) -> dict[str, str]:
        """Provider options of a session of a graph."""
        shapes = engine_shapes(self._bundle.manifest, graph)
        name = self._bundle.manifest.graphs[graph].input.name
        options = {
            "trt_layer_norm_fp32_fallback": "0",
            "trt_profile_min_shapes": _in_words(name, shapes.min),
            "trt_profile_opt_shapes": _in_words(name, shapes.opt),
            "trt_profile_max_shapes": _in_words(name, shapes.max),
        }
        folder = self._engine_folder(graph, shapes)
        if folder is not None:
            options |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
        return options

    def rows_per_call(self, graph: GraphName, shape: tuple[int, ...]) -> int:
        """How many rows to give a graph at a time.

        Args:
            graph: One of the bundle's.
            shape: Of the whole input.

        Raises:
            InferenceError: If the engine is not built for what is in a row.
        """
        shapes = engine_shapes(self._bundle.manifest, graph)
        for given, low, high in zip(shape[1:], shapes.min[1:], shapes.max[1:], strict=True):
            if not low <= given <= high:
                raise InferenceError(
                    f"The {graph} graph was given an input of shape {shape}, and its engine is "
                    f"built for rows from {shapes.min[1:]} to {shapes.max[1:]}; sample as many "
                    "frames as the model was trained with, or use another execution provider."
                )
        return shapes.max[0]

    def _engine_folder(self, graph: GraphName, shapes: ShapeRange) -> Path | None:
        """The folder of a graph's engine, made; None where there is none, which is logged."""
        if self._folder is None:
            return None
        source = Source.of(self._bundle, graph)
        made_by = {
            "onnxruntime": self._onnxruntime,
            "tensorrt": _loaded_tensorrt(),
            "gpus": " ".join(find_gpus().in_words()),
            "shapes": str(shapes.to_list()),
        }
        folder = self._folder / key_of(source, made_by)
        try:
            # An altered file would lay its engine where that of the manifest's file belongs.
            check_source(source)
            GraphCache(self._folder).check_folder()
            folder.mkdir(exist_ok=True, mode=0o700)
        except (OSError, NotCachedError) as exc:
            logger.warning("the engine of %s is not kept in %s: %s", source.name, folder, exc)
            return None
        return folder


def engine_shapes(manifest: Manifest, graph: GraphName) -> ShapeRange:
    """The smallest, preferred and largest input that the engine of a graph is built for."""
    (shapes,) = shape_ranges(manifest, graph, (_PROFILE,), manifest.model.num_frames)
    return shapes


def explain_tensorrt(provider: str) -> str | None:
    """Why the TensorRT provider cannot work with the TensorRT that is here.

    Args:
        provider: The provider that was asked for.

    Returns:
        One sentence; None for other providers, and where nothing speaks against it.
    """
    if provider != TENSORRT:
        return None
    return why_provider_lacks_tensorrt(linked_by_onnxruntime(), find_tensorrt())


def _in_words(name: str, shape: tuple[int, ...]) -> str:
    """A shape as the provider takes it: `frames:8x224x224x3`."""
    return f"{name}:{'x'.join(map(str, shape))}"


def _loaded_tensorrt() -> str:
    """Version of the library that the provider has loaded."""
    linked = linked_by_onnxruntime()
    try:
        return library_version(ctypes.CDLL(linked).getInferLibVersion()) if linked else "unknown"
    except (OSError, AttributeError):
        return "unknown"
