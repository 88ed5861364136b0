"""A bundle's repository in a real Triton core, and any server beside the golden data.

The core is NVIDIA's own; its ONNX Runtime backend is not there, and Python stands in for it. So
configs, batching, queues, warm-up, versions and both protocols are shown, and not the options of
that backend, TensorRT, or a GPU.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_programs import bundle_with_bank, running_server
from triton_core import REASON, Triton, find_triton, running_triton
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.scale.triton_repository import RepositoryOptions, write_repository
from actionclip_deploy.scoring import score

needs_triton = pytest.mark.skipif(find_triton() is None, reason=REASON)
NUM_REQUESTS = 64
LABELS = ["run", "walk", "sit"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_bank(tiny_bundle, tmp_path_factory.mktemp("bank"), "mine", LABELS)


@pytest.fixture(scope="module")
def triton(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    # Long enough that requests which are sent together are there together.
    options = RepositoryOptions(max_batch=8, max_delay_ms=200)
    write_repository(Bundle.open(bundle), folder / "repository", options)
    with running_triton(folder / "repository", folder) as triton:
        yield triton


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["triton", *map(str, words)], env={"COLUMNS": "160"})


@needs_triton
def test_triton_computes_what_pytorch_computed_over_http_and_grpc(
    triton: Triton, bundle: Path
) -> None:
    result = run(bundle, "--verify", triton.http, "--verify", triton.grpc)
    assert result.exit_code == 0, result.output
    assert f"{triton.http} computes what PyTorch computed." in result.output
    assert f"{triton.grpc} computes what PyTorch computed." in result.output


@needs_triton
def test_requests_that_come_together_share_calls(triton: Triton, bundle: Path) -> None:
    golden = Golden.load(Bundle.open(bundle))
    address = triton.grpc.removeprefix("grpc://")
    with triton_grpc.InferenceServerClient(address) as client:
        before = _counts(client)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for number in range(NUM_REQUESTS):
            clip = golden.frames[[number % len(golden.frames)]]
            tensor = triton_grpc.InferInput("frames", list(clip.shape), "UINT8")
            tensor.set_data_from_numpy(clip)
            client.async_infer(
                "clip",
                [tensor],
                lambda result, error: answers.put((result, error)),
                request_id=str(number),
            )
        for _ in range(NUM_REQUESTS):
            result, error = answers.get(timeout=60)
            assert error is None
            row = int(result.get_response().id) % len(golden.frames)
            expected = golden.video_embeddings[[row]]
            np.testing.assert_allclose(result.as_numpy("video_embedding"), expected, atol=1e-5)
        after = _counts(client)
    inferences, executions = after[0] - before[0], after[1] - before[1]
    assert inferences == NUM_REQUESTS
    assert executions <= NUM_REQUESTS // 4, f"{executions} calls"


def _counts(client: Any) -> tuple[int, int]:
    (stats,) = client.get_inference_statistics("clip").model_stats
    return stats.inference_count, stats.execution_count


@needs_triton
def test_a_label_bank_answers_with_its_labels(triton: Triton, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    golden, bank = Golden.load(opened), LabelBank.load(opened, "mine")
    spec = opened.manifest.scores
    expected = score(spec.method, golden.video_embeddings, bank.embeddings, scale=spec.scale)
    with triton_http.InferenceServerClient(triton.http.removeprefix("http://")) as client:
        shape = list(golden.video_embeddings.shape)
        tensor = triton_http.InferInput("video_embedding", shape, "FP32")
        tensor.set_data_from_numpy(golden.video_embeddings)
        plain = client.infer("scores_mine", [tensor]).as_numpy("scores")
        named = client.infer(
            "scores_mine",
            [tensor],
            outputs=[triton_http.InferRequestedOutput("scores", class_count=1)],
        ).as_numpy("scores")
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    words = [each.decode().split(":")[-1] for each in named.ravel()]
    assert words == [LABELS[best] for best in expected.argmax(axis=1)]


@needs_triton
def test_the_python_backend_gives_the_same(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    written = run(bundle, "--output", repository, "--runtime", "python", "--prefix", "mine_")
    assert written.exit_code == 0, written.output
    with running_triton(repository, tmp_path) as triton:
        result = run(bundle, "--verify", triton.grpc, "--prefix", "mine_", "--json")
        assert result.exit_code == 0, result.output
        (report,) = json.loads(result.stdout)
        assert report["passed"]
        assert report["runtime"]["name"] == "triton"


@needs_triton
def test_whole_clips_of_plans_are_asked_of_both_models(bundle: Path, tmp_path: Path) -> None:
    # Plans cannot run here: their program for whole clips is put beside the graphs.
    opened = Bundle.open(bundle)
    write_repository(opened, tmp_path / "repository", RepositoryOptions(max_batch=1))
    plans = {"": dict.fromkeys(opened.manifest.graphs, b"")}
    options = RepositoryOptions(max_batch=1, runtime="tensorrt", plans=plans)
    write_repository(opened, tmp_path / "plans", options)
    shutil.rmtree(tmp_path / "repository" / "clip")
    shutil.copytree(tmp_path / "plans" / "clip", tmp_path / "repository" / "clip")
    with running_triton(tmp_path / "repository", tmp_path) as triton:
        result = run(bundle, "--verify", triton.grpc)
        assert result.exit_code == 0, result.output


def test_our_own_server_is_verified_over_http_and_grpc(bundle: Path, tmp_path: Path) -> None:
    with running_server(bundle, tmp_path, "--runtime", "onnxruntime", "--grpc-port", "0") as server:
        urls = ("--verify", server.url, "--verify", f"grpc://{server.grpc_address}")
        result = run(bundle, *urls, "--json")
        assert result.exit_code == 0, result.output
        reports = json.loads(result.stdout)
        assert [each["passed"] for each in reports] == [True, True]
        assert [each["runtime"]["execution_provider"] for each in reports] == ["http", "grpc"]
        missing = run(bundle, "--verify", server.url, "--prefix", "other_")
        assert missing.exit_code == 1
        assert "no model 'other_" in " ".join(missing.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give either --output REPOSITORY or --verify URL."),
        (("--output", "a", "--verify", "http://a"), "Give either --output"),
        (("--output", "a", "--runtime", "torch"), "--runtime is 'torch'; it must be one of"),
        (("--output", "a", "--device", "tpu"), "--device is 'tpu'; it must be one of"),
        (("--output", "a", "--prefix", "../x"), "--prefix is '../x'; it may have letters"),
        (("--verify", "127.0.0.1:8000"), "give http://HOST:PORT or grpc://HOST:PORT"),
    ],
)
def test_wrong_options_are_told(words: tuple[str, ...], message: str, bundle: Path) -> None:
    result = run(bundle, *words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_told(scheme: str, bundle: Path) -> None:
    result = run(bundle, "--verify", f"{scheme}://127.0.0.1:1")
    assert result.exit_code == 1
    assert f"The server at {scheme}://127.0.0.1:1 cannot be described" in " ".join(
        result.stderr.split()
    )
