"""Tests on a real GPU, `make test-gpu`; the one place where they are skipped.

Without a GPU they are skipped with the driver's reason; with FAIL_WITHOUT_GPU=1, which
`make test-gpu` sets, they fail instead, so that a run on a device cannot pass by doing nothing.
What is not installed (a TensorRT, ONNX Runtime for CUDA) skips its own file, and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from on_gpu import PRECISIONS

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.runtimes.machine import cuda_devices

VARIABLE = "FAIL_WITHOUT_GPU"


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The GPU, in words."""
    devices, why_none = cuda_devices()
    if devices:
        return devices[0]
    if os.environ.get(VARIABLE) == "1":
        pytest.fail(f"{VARIABLE} is 1 and there is no GPU: {why_none}")
    pytest.skip(f"needs an NVIDIA GPU, and {why_none}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of other runs are not found."""
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, rendered_video: Path) -> dict[str, Bundle]:
    """The default model in each precision, text in fp16 beside fp16."""
    from actionclip_deploy.export import Fp8Options, Int8Options, export_checkpoint

    folder = tmp_path_factory.mktemp("bundles")
    calibration = {"calibration": (rendered_video,), "num_clips": 2}
    options = {
        "fp32": {},
        "fp16": {"text_precision": "fp16"},
        "int8": {"int8": Int8Options(rest="fp16", **calibration)},  # type: ignore[arg-type]
        "fp8": {"fp8": Fp8Options(**calibration)},  # type: ignore[arg-type]
    }
    return {
        precision: export_checkpoint(
            "motions",
            folder / precision,
            precision=precision,
            **options[precision],  # type: ignore[arg-type]
        ).bundle
        for precision in PRECISIONS
    }
