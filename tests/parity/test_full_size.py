"""Full-size models with random weights, from a checkpoint to a verified bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden, verify

# Exact counts of the original's model, and the MACs that the paper prints, rounded to 0.01 G.
PARAMETERS = {"ViT-B-32": 170_231_041, "ViT-B-16": 168_574_465}
MACS = {"ViT-B-32": 35.44, "ViT-B-16": 140.78}


@pytest.fixture(scope="module", params=list(PARAMETERS))
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / f"{backbone.lower()}-8f.pt"
    config = ModelConfig.from_open_clip(backbone, visual_prompt="transf", num_frames=8)
    save_original_checkpoint(build_model(config, seed=0), path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_full_size_export_passes_verify(
    precision: str, backbone: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "bundle", precision=precision)
    assert result.report.passed
    bundle = Bundle.open(tmp_path / "bundle", check_hashes=True)
    manifest = bundle.manifest
    assert (manifest.model.backbone, manifest.precision()) == (backbone, precision)
    assert manifest.model.num_parameters["total"] == PARAMETERS[backbone]
    assert round(manifest.model.num_macs / 1e9, 2) == MACS[backbone]
    with OrtRuntime(bundle) as runtime:
        verify(runtime, Golden.load(bundle), batch_sizes=(1, 3)).check()
