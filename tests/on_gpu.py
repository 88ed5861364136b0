"""What the tests in `tests/gpu` share."""

from __future__ import annotations

import numpy as np
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.runtimes.trt.api import EngineRuntime, load_api

PRECISIONS = ("fp32", "fp16", "int8", "fp8")


def require_tensorrt(name: EngineRuntime) -> None:
    """Skip the test where a TensorRT is not installed; one that does not load is a failure."""
    try:
        load_api(name)
    except MissingExtraError as exc:
        pytest.skip(str(exc))


def clips(bundle: Bundle, count: int) -> np.ndarray:
    """Random clips of a bundle's shape, uint8."""
    model = bundle.manifest.model
    shape = (count, model.num_frames, model.input_size, model.input_size, 3)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)
