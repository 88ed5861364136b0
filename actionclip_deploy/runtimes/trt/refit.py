"""Filling a stripped engine with the weights of another fine-tune of the same architecture."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.messages import MessageLog

# Smaller tensors hold colours and scales, by which an engine is built.
_MIN_WEIGHT_SIZE = 16


def structure_hash(path: Path) -> str:
    """What a graph computes, whatever its weights: one hash for all fine-tunes of a model.

    Tensors with fewer values than any bias has, and those of integers, count with their values:
    an engine is built by them.

    Raises:
        EngineError: If the file cannot be read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, EOFError) as exc:
        raise EngineError(f"{path} cannot be read ({exc}); export the bundle again.") from exc
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            for name in ("raw_data", "float_data", "external_data", "int32_data"):
                tensor.ClearField(name)
            tensor.data_location = onnx.TensorProto.DEFAULT
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _is_weight(tensor: Any) -> bool:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    size = 1
    for dim in tensor.dims:
        size *= dim
    return tensor.data_type in floats and size >= _MIN_WEIGHT_SIZE


def refit_plan(api: Api, plan: bytes, model: Path) -> bytes:
    """Fill a stripped engine with weights.

    Args:
        api: The TensorRT that built it.
        plan: The serialized engine without its weights.
        model: The ONNX file with the weights.

    Returns:
        The serialized engine with them.

    Raises:
        EngineError: If the engine cannot be loaded, or the weights are not all of its.
    """
    trt = api.trt
    log = MessageLog(trt)
    runtime = trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{api.title} cannot load the stripped engine ({log.text()}); build it again with "
            "`actionclip build --strip --rebuild`."
        )
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_file(str(model)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refit_error(api, model, "; ".join(errors) or log.text())
    missing = list(refitter.get_missing_weights())
    if missing:
        raise _refit_error(api, model, f"it lacks {len(missing)} weights, first {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise _refit_error(api, model, log.text())
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(config))


def _refit_error(api: Api, model: Path, why: str) -> EngineError:
    return EngineError(
        f"{api.title} cannot fill the stripped engine with the weights of {model.name}: {why}; "
        "build without --strip."
    )
