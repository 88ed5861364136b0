from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.trt.build import BuildRequest, EngineBuilder
from actionclip_deploy.runtimes.trt.faults import Fault, find_faults, run_on_cpu
from actionclip_deploy.runtimes.trt.plan import BuildOptions, parse_profiles
from actionclip_deploy.runtimes.trt.rewrites import rewritten_model
from actionclip_deploy.runtimes.trt.runtime import verify_newest


def faults_of(bundle: Bundle) -> list[Fault]:
    request = BuildRequest(parse_profiles(["throughput"]), options=BuildOptions())
    EngineBuilder(bundle, "tensorrt").build(request)
    return find_faults(bundle, verify_newest(bundle, "tensorrt"))


def weights(model: onnx.ModelProto, text: str) -> bool:
    return any(text in tensor.name for tensor in model.graph.initializer)


def sees_frames(model: onnx.ModelProto) -> bool:
    return weights(model, "tower.")


def test_engines_that_agree_have_no_faults(tensorrt: Any, bundle: Bundle) -> None:
    assert faults_of(bundle) == []


@pytest.mark.parametrize("part", ["blocks.0", "last_block"])
def test_the_first_bad_block_is_named(tensorrt: Any, bundle: Bundle, part: str) -> None:
    tensorrt.state.faults = {"wrong in batches"}
    tensorrt.state.strikes = lambda model, _: weights(model, f"tower.{part}.")
    (fault,) = faults_of(bundle)
    assert (fault.graph, fault.finding.first_bad) == ("visual", part)
    assert f"The first bad part is {part}" in fault.in_words()
    assert not fault.finding.needs_company


def test_a_fault_of_the_temporal_layers_is_found_in_their_graph(
    tensorrt: Any, bundle: Bundle
) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: weights(model, "head.blocks.1.")
    (fault,) = faults_of(bundle)
    assert (fault.graph, fault.finding.first_bad) == ("temporal", "blocks.1")


def test_a_fault_of_two_blocks_together_is_told(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: (
        weights(model, "tower.blocks.0.") and weights(model, "tower.last_block.")
    )
    (fault,) = faults_of(bundle)
    assert fault.finding.needs_company
    assert "needs several parts together" in fault.in_words()


def test_the_smallest_batch_that_is_wrong_is_looked_at(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    tensorrt.state.faults = {"wrong in batches"}
    tensorrt.state.strikes = lambda model, _: sees_frames(model)
    (fault,) = faults_of(bundle)
    # Of one frame the row itself is right; five are the fewest that are verified besides.
    assert fault.rows == 5
    assert fault.finding.first_bad == "patch_embedding"
    assert fault.to_dict()["parts"][0]["what"] == "patch_embedding"


def test_a_form_that_the_reference_cannot_compute_is_told(bundle: Bundle) -> None:
    half = rewritten_model(bundle, "visual", "bf16")
    size = bundle.manifest.model.input_size
    with pytest.raises(EngineError, match=r"cannot compute this form .*engines remove"):
        run_on_cpu(half, {"frames": np.zeros((1, size, size, 3), np.uint8)})
