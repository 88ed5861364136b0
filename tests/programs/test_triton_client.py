"""NVIDIA's clients of Triton, HTTP and gRPC, unchanged, against a real server.

Both get the numbers of the Python API.
"""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_programs import Server, running_server
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton
from tritonclient.grpc import aio as triton_grpc_aio
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
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = ("--runtime", "onnxruntime", "--grpc-port", "0")
    with running_server(tiny_bundle, folder, *options) as server:
        yield server


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return server.url.removeprefix("http://")


@pytest.fixture
def grpc_client(server: Server) -> Iterator[Any]:
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        yield client


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


def grpc_input(client: Any, model: str, array: np.ndarray) -> Any:
    """An input as the model's own metadata describe it."""
    (described,) = client.get_model_metadata(model).inputs
    tensor = triton_grpc.InferInput(described.name, list(array.shape), described.datatype)
    return tensor.set_data_from_numpy(array)


def grpc_output(client: Any, model: str) -> str:
    (described,) = client.get_model_metadata(model).outputs
    return str(described.name)


def test_the_grpc_client_finds_what_the_http_client_finds(client: Any, grpc_client: Any) -> None:
    assert grpc_client.is_server_live()
    assert grpc_client.is_server_ready()
    assert grpc_client.get_server_metadata(as_json=True) == client.get_server_metadata()
    index = grpc_client.get_model_repository_index().models
    assert [(each.name, each.version, each.state) for each in index] == [
        (each["name"], each["version"], each["state"])
        for each in client.get_model_repository_index()
    ]
    for model in MODELS:
        assert grpc_client.is_model_ready(model)
        assert grpc_client.is_model_ready(model, "1")
        by_http, by_grpc = client.get_model_metadata(model), grpc_client.get_model_metadata(model)
        assert (by_grpc.name, by_grpc.versions, by_grpc.platform) == (
            by_http["name"],
            by_http["versions"],
            by_http["platform"],
        )
        for side in ("inputs", "outputs"):
            assert [(each.name, each.datatype, each.shape) for each in getattr(by_grpc, side)] == [
                (each["name"], each["datatype"], each["shape"]) for each in by_http[side]
            ]
        config, expected = (
            grpc_client.get_model_config(model).config,
            client.get_model_config(model),
        )
        assert config.max_batch_size == expected["max_batch_size"]
        assert list(config.input[0].dims) == expected["input"][0]["dims"]
    assert not grpc_client.is_model_ready("other")
    assert not grpc_client.is_model_ready("visual", "2")


@pytest.mark.parametrize("model", MODELS)
def test_the_grpc_client_gets_the_numbers_of_the_python_api(
    grpc_client: Any, runtime: Runtime, model: str
) -> None:
    array, name = make_array(runtime, model), grpc_output(grpc_client, model)
    result = grpc_client.infer(
        model,
        [grpc_input(grpc_client, model, array)],
        outputs=[triton_grpc.InferRequestedOutput(name)],
        request_id="7",
        timeout=30_000_000,
        client_timeout=60,
        parameters={"mine": 1},
    )
    output = result.as_numpy(name)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, run(runtime, model, array), rtol=0, atol=SAME_CALL)
    assert result.get_response().id == "7"


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_gives_the_numbers_of_the_python_api(
    grpc_client: Any, runtime: Runtime, model: str
) -> None:
    name, results = grpc_output(grpc_client, model), queue.SimpleQueue[Any]()
    arrays = [make_array(runtime, model, seed=seed) for seed in range(NUM_CLIENTS)]
    inputs = [grpc_input(grpc_client, model, array) for array in arrays]
    grpc_client.start_stream(lambda result, error: results.put((result, error)))
    for number, each in enumerate(inputs):
        grpc_client.async_stream_infer(model, [each], request_id=str(number))
    for number, array in enumerate(arrays):
        result, error = results.get(timeout=60)
        assert error is None
        assert result.get_response().id == str(number)
        assert result.get_response().parameters["triton_final_response"].bool_param
        np.testing.assert_allclose(
            result.as_numpy(name), run(runtime, model, array), rtol=0, atol=OTHER_ROWS_IN_THE_CALL
        )
    # One that is refused ends itself alone.
    grpc_client.async_stream_infer("other", [inputs[0]], request_id="wrong")
    _, error = results.get(timeout=60)
    assert "There is no model 'other'" in error.message()
    grpc_client.async_stream_infer(model, [inputs[0]], request_id="alone")
    result, _ = results.get(timeout=60)
    np.testing.assert_allclose(
        result.as_numpy(name), run(runtime, model, arrays[0]), rtol=0, atol=SAME_CALL
    )
    grpc_client.stop_stream()


def test_the_grpc_clients_asyncio_form_gets_the_same(
    server: Server, grpc_client: Any, runtime: Runtime
) -> None:
    arrays = [make_array(runtime, "clip", seed=seed) for seed in range(NUM_CLIENTS)]
    inputs = [grpc_input(grpc_client, "clip", array) for array in arrays]

    async def ask() -> list[np.ndarray]:
        async with triton_grpc_aio.InferenceServerClient(server.grpc_address) as asking:
            results = await asyncio.gather(*(asking.infer("clip", [each]) for each in inputs))
        return [result.as_numpy("video_embedding") for result in results]

    for array, output in zip(arrays, asyncio.run(ask()), strict=True):
        np.testing.assert_allclose(
            output, run(runtime, "clip", array), rtol=0, atol=OTHER_ROWS_IN_THE_CALL
        )


def test_refusals_over_grpc_are_those_of_http(
    client: Any, grpc_client: Any, runtime: Runtime
) -> None:
    array = make_array(runtime, "temporal")
    short = np.zeros((1, 2, 3), np.float32)

    def tensors(make: Callable[..., Any]) -> dict[str, Any]:
        def tensor(name: str, array: np.ndarray) -> Any:
            return make(name, list(array.shape), "FP32").set_data_from_numpy(array)

        return {
            "good": tensor("frame_features", array),
            "frames": tensor("frames", array),
            "short": tensor("frame_features", short),
        }

    by_http, by_grpc = tensors(triton.InferInput), tensors(triton_grpc.InferInput)
    for model, name, options, expected in (
        ("other", "good", {}, "StatusCode.NOT_FOUND"),
        ("temporal", "good", {"model_version": "3"}, "StatusCode.NOT_FOUND"),
        ("temporal", "frames", {}, "StatusCode.INVALID_ARGUMENT"),
        ("temporal", "short", {}, "StatusCode.INVALID_ARGUMENT"),
        ("temporal", "good", {"sequence_id": 5}, "StatusCode.INVALID_ARGUMENT"),
        ("temporal", "good", {"timeout": 10**12}, "StatusCode.INVALID_ARGUMENT"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.infer(model, [by_http[name]], **options)
        with pytest.raises(InferenceServerException) as refused_by_grpc:
            grpc_client.infer(model, [by_grpc[name]], **options)
        assert refused_by_grpc.value.message() == refused.value.message()
        assert refused_by_grpc.value.status() == expected
    with pytest.raises(InferenceServerException) as refused:
        grpc_client.load_model("visual")
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_health_is_told_to_whoever_asks_as_kubernetes_does(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watched = stub.Watch(health_pb2.HealthCheckRequest(service=name))
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            watched.cancel()
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
