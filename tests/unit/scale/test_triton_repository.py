"""Model repositories of Triton: their graphs, configs, versions and folders, without a Triton."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tiny_graphs import temporal, textual, visual, write_tiny_bundle
from tritonclient.grpc import model_config_pb2

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import ArgumentError, BundleError, EngineError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import QuantizationSpec
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.scale import triton_repository
from actionclip_deploy.scale.triton_repository import RepositoryOptions, write_repository
from actionclip_deploy.scoring import SCORE_METHODS, score

# Of one graph beside the arithmetic by hand, whose order of sums is another.
FUSED = 1e-6
# Of a score: its cosines are float32 in one and float64 in the other, times a scale of 100.
SCORES = 1e-5
LABELS = ("run", "walk", "sit and wait")


def make_bundle(folder: Path, **options: Any) -> Bundle:
    """A bundle of small graphs with golden data that are computed by hand."""
    bundle = write_tiny_bundle(folder, **options)
    manifest = bundle.manifest
    model = manifest.model
    rng = np.random.default_rng(3)
    size = model.input_size
    frames = rng.integers(0, 256, (3, model.num_frames, size, size, 3), np.uint8)
    features = visual(frames.reshape(-1, size, size, 3)).reshape(3, model.num_frames, -1)
    is_mixed = "video" in manifest.graphs
    embeddings = temporal(features)
    if is_mixed:  # which takes the mean of the pixels of all frames
        embeddings = temporal(visual(frames.mean(axis=1, keepdims=True)[:, 0])[:, np.newaxis])
    tokens = rng.integers(1, 50, (len(manifest.templates) * len(LABELS), 4)).astype(np.int32)
    texts = textual(tokens).astype(np.float32)
    videos = embeddings.astype(np.float32)
    scores = score(
        manifest.scores.method,
        videos,
        texts.reshape(len(manifest.templates), len(LABELS), -1),
        scale=manifest.scores.scale,
    )
    golden = Golden(
        frames,
        None if is_mixed else features.astype(np.float32),
        videos,
        tokens,
        texts,
        scores,
        labels=LABELS,
        origin="random",
    )
    golden.save(folder)
    rewrite(bundle, manifest)
    return Bundle.open(folder)


def rewrite(bundle: Bundle, manifest: Any) -> Bundle:
    files = hash_files(bundle.path)
    write_manifest(bundle.path, manifest.model_copy(update={"files": files}))
    return Bundle.open(bundle.path)


def config_of(repository: Path, name: str) -> Any:
    text = (repository / name / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def run(path: Path, array: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (output,) = session.run(None, {given.name: array})
    return np.asarray(output)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def repository(bundle: Bundle, tmp_path: Path) -> Path:
    write_repository(bundle, tmp_path / "repository", RepositoryOptions(max_batch=8))
    return tmp_path / "repository"


def test_one_graph_of_whole_clips_gives_what_the_two_give(bundle: Bundle, repository: Path) -> None:
    path, golden = repository / "clip" / "1" / "model.onnx", Golden.load(bundle)
    onnx.checker.check_model(str(path), full_check=True)
    for rows in (1, 2, 3):
        output = run(path, golden.frames[:rows])
        np.testing.assert_allclose(output, golden.video_embeddings[:rows], atol=FUSED, rtol=0)
    # Another number of frames than the model was trained with.
    clips = np.concatenate([golden.frames, golden.frames[:, ::-1]], axis=1)
    np.testing.assert_allclose(run(path, clips), golden.video_embeddings, atol=FUSED, rtol=0)


def test_frames_that_are_mixed_have_their_graph_for_whole_clips(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", visual_prompt="joint")
    write_repository(bundle, tmp_path / "repository", RepositoryOptions())
    names = {each.name for each in (tmp_path / "repository").iterdir() if each.is_dir()}
    assert names == {"clip", "textual"}
    golden, path = Golden.load(bundle), tmp_path / "repository" / "clip" / "1" / "model.onnx"
    np.testing.assert_allclose(
        run(path, golden.frames), golden.video_embeddings, atol=FUSED, rtol=0
    )


def test_configs_say_what_goes_in_and_out_and_how_calls_are_shared(
    bundle: Bundle, repository: Path
) -> None:
    size, width = bundle.manifest.model.input_size, bundle.manifest.model.embedding_dim
    num_frames = bundle.manifest.model.num_frames
    expected = {
        "visual": (8 * num_frames, [size, size, 3], "TYPE_UINT8"),
        "temporal": (8, [-1, width], "TYPE_FP32"),
        "clip": (8, [-1, size, size, 3], "TYPE_UINT8"),
        "textual": (16, [-1], "TYPE_INT32"),
    }
    for name, (rows, dims, kind) in expected.items():
        config = config_of(repository, name)
        assert config.name == name
        assert config.backend == "onnxruntime"
        assert config.max_batch_size == rows
        assert list(config.input[0].dims) == dims
        assert config.input[0].data_type == model_config_pb2.DataType.Value(kind)
        assert list(config.output[0].dims) == [width]
        assert not config.dynamic_batching.preferred_batch_size
        policy = config.dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 256
        assert policy.default_timeout_microseconds == 60_000_000
        assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        (warm_up,) = config.model_warmup
        (given,) = warm_up.inputs
        assert given == config.input[0].name
        assert config.instance_group[0].count == 1
        path = repository / name / "1" / config.default_model_filename
        (graph_input,) = onnx.load(str(path)).graph.input
        assert graph_input.name == given


def test_a_misspelt_field_would_be_refused(repository: Path) -> None:
    text = (repository / "clip" / "config.pbtxt").read_text()
    with pytest.raises(text_format.ParseError, match="max_batch_siz"):
        text_format.Parse(
            text.replace("max_batch_size", "max_batch_siz"), model_config_pb2.ModelConfig()
        )


def test_configs_say_what_they_were_made_of(bundle: Bundle, repository: Path) -> None:
    parameters = config_of(repository, "visual").parameters
    given = {key: value.string_value for key, value in parameters.items()}
    assert given["actionclip_graph_sha256"] == bundle.manifest.files["visual.onnx"].sha256
    assert given["actionclip_checkpoint_sha256"] == bundle.manifest.source.sha256
    assert len(given["actionclip_bundle_sha256"]) == 64
    assert given["actionclip_precision"] == "fp32"


def test_rows_that_depend_on_each_other_are_in_a_call_of_their_own(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    graphs = dict(bundle.manifest.graphs)
    graphs["visual"] = graphs["visual"].model_copy(update={"precision": "int8"})
    quantization = QuantizationSpec(
        recipe="dynamic",
        weight_range="reduced",
        quantized_blocks=("0",),
        unquantized_blocks=(),
        num_calibration_clips=1,
        accepted_by="cosine",
        bound=0.99,
        unquantized_value=None,
        quantized_value=0.999,
        golden_min_cosine=0.999,
        golden_max_difference=0.01,
    )
    update = {"graphs": graphs, "quantization": quantization}
    bundle = rewrite(bundle, bundle.manifest.model_copy(update=update))
    write_repository(bundle, tmp_path / "repository", RepositoryOptions())
    for name, dims in (("visual", [-1, 32, 32, 3]), ("clip", [-1, -1, 32, 32, 3])):
        config = config_of(tmp_path / "repository", name)
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        assert list(config.input[0].dims) == dims
    assert config_of(tmp_path / "repository", "temporal").max_batch_size == 16


@pytest.mark.parametrize("method", SCORE_METHODS)
def test_a_label_bank_is_a_graph_of_the_same_scores(method: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    spec = bundle.manifest.scores.model_copy(update={"method": method})
    bundle = rewrite(bundle, bundle.manifest.model_copy(update={"scores": spec}))
    golden = Golden.load(bundle)
    shape = (len(bundle.manifest.templates), len(LABELS), -1)
    bank = LabelBank(
        name="mine",
        labels=LABELS,
        templates=bundle.manifest.templates,
        embeddings=golden.text_embeddings.reshape(shape),
        textual_sha256=bundle.textual_sha256,
        encoder_checked=True,
    )
    bank.save(bundle)
    write_repository(bundle, tmp_path / "repository", RepositoryOptions())
    path = tmp_path / "repository" / "scores_mine" / "1" / "model.onnx"
    expected = score(method, golden.video_embeddings, bank.embeddings, scale=spec.scale)
    np.testing.assert_allclose(run(path, golden.video_embeddings), expected, atol=SCORES, rtol=0)
    labels = (tmp_path / "repository" / "scores_mine" / "labels.txt").read_text()
    assert labels.splitlines() == list(LABELS)
    config = config_of(tmp_path / "repository", "scores_mine")
    assert config.output[0].label_filename == "labels.txt"
    assert config.parameters["actionclip_score_method"].string_value == method


def test_a_repository_that_is_there_stays(bundle: Bundle, repository: Path) -> None:
    before = sorted(repository.rglob("*"))
    with pytest.raises(BundleError, match="exists already"):
        write_repository(bundle, repository, RepositoryOptions())
    assert sorted(repository.rglob("*")) == before


def test_a_repository_appears_whole_or_not_at_all(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise BundleError("no")

    monkeypatch.setattr(triton_repository, "check_model", fail)
    with pytest.raises(BundleError, match="no"):
        write_repository(bundle, tmp_path / "repository", RepositoryOptions())
    assert list(tmp_path.iterdir()) == []


def test_another_bundle_is_the_next_version_and_the_same_one_stays_what_it_was(
    bundle: Bundle, repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle.path, tmp_path / "other")
    other = Bundle.open(tmp_path / "other")
    source = other.manifest.source.model_copy(update={"sha256": "1" * 64})
    other = rewrite(other, other.manifest.model_copy(update={"source": source}))
    options = RepositoryOptions(max_batch=8)
    assert write_repository(other, repository, options, adds_version=True)["clip"] == 2
    assert {each.name for each in (repository / "clip").iterdir()} == {"1", "2", "config.pbtxt"}
    assert config_of(repository, "clip").version_policy.latest.num_versions == 1
    assert write_repository(bundle, repository, options, adds_version=True)["clip"] == 1
    smaller = make_bundle(tmp_path / "smaller", input_size=16)
    with pytest.raises(BundleError, match="has another input than this bundle"):
        write_repository(smaller, repository, options, adds_version=True)
    with pytest.raises(BundleError, match=r"no actionclip\.json|no repository"):
        write_repository(bundle, bundle.path, options, adds_version=True)


def test_plans_are_chosen_by_the_gpu(bundle: Bundle, tmp_path: Path) -> None:
    plans = {
        capability: {graph: f"{graph} {capability}".encode() for graph in bundle.manifest.graphs}
        for capability in ("8.7", "9.0", "")
    }
    options = RepositoryOptions(runtime="tensorrt", plans=plans, prefix="mine_")
    write_repository(bundle, tmp_path / "repository", options)
    config = config_of(tmp_path / "repository", "mine_visual")
    assert config.backend == "tensorrt"
    assert dict(config.cc_model_filenames) == {"8.7": "model_8_7.plan", "9.0": "model_9_0.plan"}
    folder = tmp_path / "repository" / "mine_visual" / "1"
    assert (folder / "model_8_7.plan").read_bytes() == b"visual 8.7"
    assert (folder / "model.plan").read_bytes() == b"visual "
    # Plans are of two graphs, so a program asks them both for a whole clip.
    clip = config_of(tmp_path / "repository", "mine_clip")
    assert clip.backend == "python"
    assert clip.parameters["visual_model"].string_value == "mine_visual"
    assert (tmp_path / "repository" / "mine_clip" / "1" / "model.py").is_file()


def test_without_engines_there_is_no_repository_for_tensorrt() -> None:
    with pytest.raises(EngineError, match="no engines of this bundle"):
        RepositoryOptions(runtime="tensorrt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "torch"}, "must be one of onnxruntime, openvino, tensorrt, python"),
        ({"max_batch": 0}, "must be a positive number"),
        ({"max_delay_ms": float("nan")}, "must be 0 or more"),
        ({"prefix": "a/b"}, "letters, digits"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        RepositoryOptions(**options)
