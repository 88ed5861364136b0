"""TensorRT and TensorRT for RTX on the GPU of this machine: build, audit, verify, run, refit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from on_gpu import PRECISIONS, clips, require_tensorrt

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES, EngineRuntime
from actionclip_deploy.runtimes.trt.build import BuildRequest, BuildResult, EngineBuilder
from actionclip_deploy.runtimes.trt.plan import BuildOptions, parse_profiles

# Of a GPU that TensorRT for RTX is not for, or a precision that a GPU has not.
REFUSALS = ("not supported", "unsupported", "no implementation")


@pytest.fixture(params=ENGINE_RUNTIMES)
def name(request: pytest.FixtureRequest) -> EngineRuntime:
    require_tensorrt(request.param)
    found: EngineRuntime = request.param
    return found


def build(bundle: Bundle, name: EngineRuntime, *, strip: bool = False) -> BuildResult:
    """Build, verify and audit; a GPU that this TensorRT or precision is not for is skipped."""
    request = BuildRequest(parse_profiles(()), options=BuildOptions(strip=strip))
    try:
        return EngineBuilder(bundle, name).build(request)
    except EngineError as exc:
        if any(
            words in str(exc) for words in ("not supported", "unsupported", "no implementation")
        ):
            pytest.skip(f"{name} refuses this GPU or precision: {exc}")
        raise


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_agree_with_pytorch_and_compute_in_their_precision(
    precision: str, name: EngineRuntime, bundles: dict[str, Bundle]
) -> None:
    result = build(bundles[precision], name)
    assert result.examined is not None
    result.examined.check()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_batches_of_any_size_give_what_onnxruntime_gives(
    cuda_graphs: bool, name: EngineRuntime, bundles: dict[str, Bundle]
) -> None:
    bundle = bundles["fp16"]
    build(bundle, name)
    with (
        open_runtime(bundle, name, cuda_graphs=cuda_graphs) as engines,
        open_runtime(bundle) as cpu,
    ):
        for count in (1, 3, 16, 40, 1, 3):
            given = clips(bundle, count)
            difference = np.abs(engines.encode_video(given) - cpu.encode_video(given)).max()
            assert difference < 2e-2, (count, difference)


def test_threads_get_their_own_results(name: EngineRuntime, bundles: dict[str, Bundle]) -> None:
    bundle = bundles["fp16"]
    build(bundle, name)
    with open_runtime(bundle, name, cuda_graphs=name == "tensorrt") as engines:
        inputs = [clips(bundle, count) for count in (1, 2, 3, 5, 8) * 8]
        alone = [engines.encode_video(given) for given in inputs]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(engines.encode_video, inputs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_stripped_engine_is_filled(name: EngineRuntime, bundles: dict[str, Bundle]) -> None:
    result = build(bundles["fp16"], name, strip=True)
    assert result.examined is not None
    assert result.examined.report.passed
    assert set(result.entry.record["refit_seconds"]) == set(bundles["fp16"].manifest.graphs)
