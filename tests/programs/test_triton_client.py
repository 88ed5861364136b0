"""NVIDIA's client of Triton, unchanged, against a real server: the numbers of the Python API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving_programs import running_server
from tritonclient import http as triton
from tritonclient.http import aio as triton_aio
from tritonclient.utils import InferenceServerException

from actionclip_deploy import Bundle, open_runtime
from actionclip_deploy.runtimes.base import Runtime

# A request that has a call for itself is computed by the same kernels with the same threads.
SAME_CALL = 0.0
# Matrices of other sizes are summed in another order; values are of about 1.
OTHER_ROWS_IN_THE_CALL = 1e-5
NUM_CLIENTS = 8


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with running_server(tiny_bundle, folder, "--runtime", "onnxruntime") as server:
        yield server.url.removeprefix("http://")


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with triton.InferenceServerClient(url, concurrency=NUM_CLIENTS) as client:
        yield client


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with open_runtime(Bundle.open(tiny_bundle), "onnxruntime", num_threads=1) as runtime:
        yield runtime


def make_array(runtime: Runtime, model: str, *, seed: int = 0) -> np.ndarray:
    rng, spec = np.random.default_rng(seed), runtime.manifest.model
    frame = (spec.input_size, spec.input_size, 3)
    if model == "visual":
        return rng.integers(0, 256, (3, *frame), np.uint8)
    if model == "temporal":
        shape = (2, spec.num_frames, spec.embedding_dim)
        return rng.normal(size=shape).astype(np.float32)
    if model == "textual":
        # The start token, some words, the end token, and padding.
        tokens = np.zeros((3, 8), np.int32)
        tokens[:, 0], tokens[:, 1:5] = 49406, rng.integers(1, 49000, (3, 4))
        tokens[:, 5] = 49407
        return tokens
    return rng.integers(0, 256, (2, spec.num_frames, *frame), np.uint8)


def run(runtime: Runtime, model: str, array: np.ndarray) -> np.ndarray:
    methods = {
        "visual": runtime.encode_frames,
        "temporal": runtime.encode_clips,
        "textual": runtime.encode_text,
        "clip": runtime.encode_video,
    }
    return methods[model](array)


def make_input(client: Any, model: str, array: np.ndarray, *, is_binary: bool = True) -> Any:
    """An input as the model's own metadata describe it."""
    (described,) = client.get_model_metadata(model)["inputs"]
    tensor = triton.InferInput(described["name"], list(array.shape), described["datatype"])
    return tensor.set_data_from_numpy(array, binary_data=is_binary)


def output_name(client: Any, model: str) -> str:
    (described,) = client.get_model_metadata(model)["outputs"]
    name: str = described["name"]
    return name


MODELS = ["visual", "temporal", "textual", "clip"]


def test_the_client_finds_a_server_that_is_ready_with_all_models(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "actionclip-deploy"
    index = client.get_model_repository_index()
    assert sorted(each["name"] for each in index) == sorted(MODELS)
    for model in MODELS:
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("visual", "2")


@pytest.mark.parametrize("model", MODELS)
def test_metadata_are_the_manifests(client: Any, runtime: Runtime, model: str) -> None:
    metadata = client.get_model_metadata(model, "1")
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "onnxruntime_onnx"
    (output,) = metadata["outputs"]
    assert output["shape"] == [-1, runtime.manifest.model.embedding_dim]
    assert client.get_model_config(model)["input"][0]["dims"] == metadata["inputs"][0]["shape"][1:]
    if model == "clip":
        return
    graph = runtime.manifest.graphs[model]
    (given,) = metadata["inputs"]
    assert given["name"] == graph.input.name
    assert given["shape"] == [n if isinstance(n, int) else -1 for n in graph.input.shape]
    assert output["name"] == graph.output.name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_binary", [False, True])
def test_the_client_gets_the_numbers_of_the_python_api(
    client: Any, runtime: Runtime, model: str, is_binary: bool
) -> None:
    array, name = make_array(runtime, model), output_name(client, model)
    asked = triton.InferRequestedOutput(name, binary_data=is_binary)
    result = client.infer(
        model,
        [make_input(client, model, array, is_binary=is_binary)],
        outputs=[asked],
        request_id="7",
    )
    output = result.as_numpy(name)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, run(runtime, model, array), rtol=0, atol=SAME_CALL)
    assert result.get_response()["id"] == "7"
    assert ("data" in result.get_output(name)) == (not is_binary)


@pytest.mark.parametrize("model", MODELS)
def test_the_clients_defaults_are_understood(client: Any, runtime: Runtime, model: str) -> None:
    array = make_array(runtime, model)
    result = client.infer(
        model, [make_input(client, model, array)], timeout=30_000_000, parameters={"mine": 1}
    )
    np.testing.assert_allclose(
        result.as_numpy(output_name(client, model)),
        run(runtime, model, array),
        rtol=0,
        atol=SAME_CALL,
    )


@pytest.mark.parametrize("model", MODELS)
def test_requests_at_the_same_time_get_their_own_numbers(
    client: Any, runtime: Runtime, model: str
) -> None:
    # An answer that is not read yet keeps its connection, so everything else is asked before.
    name = output_name(client, model)
    arrays = [make_array(runtime, model, seed=seed) for seed in range(NUM_CLIENTS)]
    inputs = [make_input(client, model, array) for array in arrays]
    waiting = [client.async_infer(model, [each]) for each in inputs]
    for array, each in zip(arrays, waiting, strict=True):
        np.testing.assert_allclose(
            each.get_result().as_numpy(name),
            run(runtime, model, array),
            rtol=0,
            atol=OTHER_ROWS_IN_THE_CALL,
        )


def test_the_clients_asyncio_form_gets_the_same(url: str, client: Any, runtime: Runtime) -> None:
    arrays = [make_array(runtime, "clip", seed=seed) for seed in range(NUM_CLIENTS)]
    inputs = [make_input(client, "clip", array) for array in arrays]

    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(url) as asking:
            requests = [asking.infer("clip", [each]) for each in inputs]
            results = await asyncio.gather(*requests)
        return [result.as_numpy("video_embedding") for result in results]

    for array, output in zip(arrays, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(
            output, run(runtime, "clip", array), rtol=0, atol=OTHER_ROWS_IN_THE_CALL
        )


def test_frames_then_clips_are_whole_clips(client: Any, runtime: Runtime) -> None:
    clips = make_array(runtime, "clip")
    frames = clips.reshape(-1, *clips.shape[2:])
    visual = client.infer("visual", [make_input(client, "visual", frames)])
    features = visual.as_numpy("frame_features").reshape(*clips.shape[:2], -1)
    temporal = client.infer("temporal", [make_input(client, "temporal", features)])
    whole = client.infer("clip", [make_input(client, "clip", clips)])
    np.testing.assert_allclose(
        temporal.as_numpy("video_embedding"),
        whole.as_numpy("video_embedding"),
        rtol=0,
        atol=SAME_CALL,
    )


def test_refusals_reach_the_caller_as_our_sentences(client: Any, runtime: Runtime) -> None:
    array = make_array(runtime, "temporal")
    good = make_input(client, "temporal", array)
    frames = triton.InferInput("frames", list(array.shape), "FP32").set_data_from_numpy(array)
    short = triton.InferInput("frame_features", [1, 2, 3], "FP32")
    short.set_data_from_numpy(np.zeros((1, 2, 3), np.float32))
    other = triton.InferRequestedOutput("logits")
    for arguments, options, status, expected in (
        (("other", [good]), {}, "404", "There is no model 'other'; the models are clip, temporal,"),
        (("temporal", [good]), {"model_version": "3"}, "404", "no version '3'; ask for 1"),
        (("temporal", [frames]), {}, "400", "takes one, 'frame_features'."),
        (("temporal", [short]), {}, "400", "dtype float32; expected shape (B, T, "),
        (("temporal", [good]), {"outputs": [other]}, "400", "gives one, 'video_embedding'."),
        (("temporal", [good]), {"sequence_id": 5}, "400", "the extension for sequences"),
        (
            ("temporal", [good]),
            {"request_compression_algorithm": "gzip"},
            "415",
            "compressed ('gzip')",
        ),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.infer(*arguments, **options)
        assert refused.value.status() == status
        assert expected in refused.value.message()
    with pytest.raises(InferenceServerException, match=r"see /openapi\.json"):
        client.load_model("visual")


def test_a_plain_client_without_binary_data_gets_the_same(url: str, runtime: Runtime) -> None:
    array = make_array(runtime, "textual")
    tensor = {"name": "tokens", "shape": array.shape, "datatype": "INT32", "data": array.tolist()}
    response = httpx.post(
        f"http://{url}/v2/models/textual/infer",
        content=json.dumps({"inputs": [tensor]}),
        trust_env=False,
        timeout=300,
    )
    (output,) = response.json()["outputs"]
    np.testing.assert_allclose(
        np.array(output["data"], np.float32).reshape(output["shape"]),
        run(runtime, "textual", array),
        rtol=0,
        atol=SAME_CALL,
    )
