"""int8 towers of full size beside PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy.export import Int8Options, export_checkpoint
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden, verify_bundle

MIN_COSINE = 0.999


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backbone", ["ViT-B-32", "ViT-B-16"])
def test_a_full_size_tower_in_int8_keeps_its_cosine(
    backbone: str, rendered_video: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / f"{backbone.lower()}-8f.pt"
    config = ModelConfig.from_open_clip(backbone, visual_prompt="transf", num_frames=8)
    save_original_checkpoint(build_model(config, seed=0), checkpoint)
    for options in (Int8Options(), Int8Options(calibration=(rendered_video,), num_clips=8)):
        bundle = export_checkpoint(
            checkpoint, tmp_path / "bundle", precision="int8", int8=options, overwrite=True
        ).bundle
        spec = bundle.manifest.quantization
        assert spec is not None
        assert spec.unquantized_blocks == ()
        # Weights of one byte and not of four, but for patches, projection and positions.
        assert bundle.manifest.files["visual.onnx"].size_bytes < 100e6
        golden = Golden.load(bundle)
        assert golden.frame_features is not None
        with OrtRuntime(bundle) as runtime:
            verify_bundle(bundle, runtime).check()
            features = runtime.encode_frames(golden.frames[0])
        wanted = golden.frame_features[0]
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(wanted, axis=1)
        assert ((features * wanted).sum(axis=1) / norms).min() >= MIN_COSINE
