"""ONNX Runtime's CUDA provider on the GPU of this machine."""

from __future__ import annotations

import numpy as np
import pytest
from on_gpu import clips

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.ort import available_providers, why_unavailable
from actionclip_deploy.runtimes.parity import Golden, verify


@pytest.fixture(scope="module", autouse=True)
def cuda_provider() -> None:
    """Skip where this ONNX Runtime is not the one for CUDA; one that does not load fails."""
    if "CUDAExecutionProvider" not in available_providers():
        pytest.skip("this onnxruntime is not the one for CUDA; install onnxruntime-gpu")
    assert why_unavailable("CUDAExecutionProvider") is None


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_graph_agrees_with_pytorch(
    precision: str, cuda_graphs: bool, bundles: dict[str, Bundle]
) -> None:
    bundle = bundles[precision]
    with open_runtime(bundle, execution_provider="cuda", cuda_graphs=cuda_graphs) as runtime:
        verify(runtime, Golden.load(bundle)).check()


def test_replayed_work_follows_the_input(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["fp16"]
    with (
        open_runtime(bundle, execution_provider="cuda", cuda_graphs=True) as replayed,
        open_runtime(bundle, execution_provider="cuda") as plain,
    ):
        for count in (1, 3, 16, 40, 1, 3):
            given = clips(bundle, count)
            np.testing.assert_allclose(
                replayed.encode_video(given), plain.encode_video(given), atol=5e-3
            )
