"""int8 towers: full-size ones beside PyTorch, and what TensorRT makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export import Int8Options, export_checkpoint
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint
from actionclip_deploy.runtimes.golden import Golden
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import verify_bundle

MIN_COSINE = 0.999


@pytest.fixture(scope="module")
def static_bundle(
    tiny_checkpoints: dict[str, Path],
    rendered_video: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """The tiny model in int8, by the recipe that TensorRT takes."""
    output = tmp_path_factory.mktemp("bundles") / "static"
    options = Int8Options(calibration=(rendered_video,), num_clips=4, weight_range="reduced")
    return export_checkpoint(
        tiny_checkpoints["Transf"], output, precision="int8", int8=options
    ).bundle


def test_tensorrt_rtx_compiles_the_static_recipe_without_a_gpu(static_bundle: Bundle) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which brings a compiler")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(static_bundle.graph_path("visual")))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    quantized = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    spec = static_bundle.manifest.quantization
    assert spec is not None
    assert len(quantized) == 4 * len(spec.quantized_blocks) + 1  # the last has its query apart
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    size = static_bundle.manifest.model.input_size
    profile = builder.create_optimization_profile()
    profile.set_shape("frames", *((n, size, size, 3) for n in (1, 8, 32)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


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
