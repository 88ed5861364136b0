"""/v2 from outside: the Open Inference Protocol, with the runtime in numpy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest
from serving import make_service, running_app
from starlette.testclient import TestClient

from actionclip_deploy import __version__
from actionclip_deploy.errors import InferenceError
from actionclip_deploy.serve.app import create_app

HEADER = "Inference-Header-Content-Length"
SIZE, WIDTH, NUM_FRAMES = 32, 16, 4

INPUTS = {
    "visual": ("frames", "UINT8", [-1, SIZE, SIZE, 3]),
    "temporal": ("frame_features", "FP32", [-1, -1, WIDTH]),
    "textual": ("tokens", "INT32", [-1, -1]),
    "clip": ("frames", "UINT8", [-1, -1, SIZE, SIZE, 3]),
}
OUTPUTS = {
    "visual": "frame_features",
    "temporal": "video_embedding",
    "textual": "text_embedding",
    "clip": "video_embedding",
}
MODELS = sorted(INPUTS)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path) as client:
        yield client


def make_array(model: str, num_rows: int = 2) -> np.ndarray:
    rng = np.random.default_rng(num_rows)
    if model == "visual":
        return rng.integers(0, 256, (num_rows, SIZE, SIZE, 3), np.uint8)
    if model == "temporal":
        return rng.normal(size=(num_rows, NUM_FRAMES, WIDTH)).astype(np.float32)
    if model == "textual":
        return rng.integers(0, 200, (num_rows, 7), np.int32)
    return rng.integers(0, 256, (num_rows, NUM_FRAMES, SIZE, SIZE, 3), np.uint8)


def expected_output(model: str, array: np.ndarray) -> np.ndarray:
    runtime = FakeRuntime(fake_manifest())
    run = {
        "visual": runtime.encode_frames,
        "temporal": runtime.encode_clips,
        "textual": runtime.encode_text,
        "clip": runtime.encode_video,
    }[model]
    return run(array)


def json_request(model: str, array: np.ndarray, **fields: Any) -> dict[str, Any]:
    name, datatype, _ = INPUTS[model]
    tensor = {"name": name, "shape": array.shape, "datatype": datatype}
    return {"inputs": [{**tensor, "data": array.ravel().tolist()}], **fields}


def binary_request(
    model: str, array: np.ndarray, *, padding: int = 0, **fields: Any
) -> tuple[bytes, dict[str, str]]:
    """A body and its headers; `padding` spaces end the JSON, which shifts the tensor."""
    name, datatype, _ = INPUTS[model]
    parameters = {"binary_data_size": array.nbytes}
    tensor = {"name": name, "shape": array.shape, "datatype": datatype, "parameters": parameters}
    head = json.dumps({"inputs": [tensor], **fields}).encode() + b" " * padding
    return head + array.tobytes(), {HEADER: str(len(head))}


def infer(client: TestClient, model: str, request: Any, headers: Any = None) -> Any:
    given = {"content": request} if isinstance(request, bytes) else {"json": request}
    return client.post(f"/v2/models/{model}/infer", headers=headers, **given)


def read_json_output(model: str, response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    (output,) = response.json()["outputs"]
    assert output["name"] == OUTPUTS[model]
    assert output["datatype"] == "FP32"
    assert "parameters" not in output
    return np.array(output["data"], np.float32).reshape(output["shape"])


def read_binary_output(model: str, response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    size = int(response.headers[HEADER])
    (output,) = json.loads(response.content[:size])["outputs"]
    assert output["name"] == OUTPUTS[model]
    assert "data" not in output
    assert output["parameters"] == {"binary_data_size": len(response.content) - size}
    return np.frombuffer(response.content[size:], "<f4").reshape(output["shape"])


def sentence(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: str = response.json()["error"]
    assert error.endswith(".")
    return error


def test_the_server_says_what_it_is_and_that_it_lives_and_is_ready(client: TestClient) -> None:
    server = client.get("/v2").json()
    assert server["name"] == "actionclip-deploy"
    assert server["version"] == __version__
    assert server["extensions"] == ["binary_tensor_data", "model_configuration"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_a_server_that_is_told_to_end_is_not_ready_and_runs_nothing(client: TestClient) -> None:
    client.service.begin_stop()  # type: ignore[attr-defined]
    response = client.get("/v2/health/ready")
    assert response.status_code == 400
    assert response.json() == {"ready": False}
    assert client.get("/v2/health/live").status_code == 200
    refused = infer(client, "temporal", json_request("temporal", make_array("temporal")))
    assert "ending" in sentence(refused, 503)
    assert refused.headers["retry-after"] == "5"
    assert "ending" in sentence(client.get("/v2/models/temporal/ready"), 503)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_a_model_says_what_goes_in_and_out(client: TestClient, model: str, version: str) -> None:
    name, datatype, shape = INPUTS[model]
    answer = client.get(f"/v2/models/{model}{version}").json()
    assert answer == {
        "name": model,
        "versions": ["1"],
        "platform": "fake",
        "inputs": [{"name": name, "datatype": datatype, "shape": shape}],
        "outputs": [{"name": OUTPUTS[model], "datatype": "FP32", "shape": [-1, WIDTH]}],
    }
    ready = client.get(f"/v2/models/{model}{version}/ready")
    assert ready.json() == {"name": model, "ready": True}
    config = client.get(f"/v2/models/{model}{version}/config").json()
    assert config["max_batch_size"] == 1024
    assert config["input"] == [{"name": name, "data_type": f"TYPE_{datatype}", "dims": shape[1:]}]
    assert config["output"] == [{"name": OUTPUTS[model], "data_type": "TYPE_FP32", "dims": [WIDTH]}]
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 1000}


def test_a_model_of_fixed_length_says_its_number_of_frames(tmp_path: Path) -> None:
    from fakes import write_fake_bundle

    write_fake_bundle(tmp_path / "bundle", fixed_num_frames=True)
    service = make_service_of(tmp_path / "bundle")
    with TestClient(create_app(service)) as client:
        assert client.get("/v2/models/clip").json()["inputs"][0]["shape"][1] == NUM_FRAMES
        array = make_array("clip")[:, :3]
        error = sentence(infer(client, "clip", json_request("clip", array)), 400)
    assert error == (
        "frames has shape (2, 3, 32, 32, 3) and dtype uint8; expected shape (B, 4, 32, 32, 3) and "
        "dtype uint8, none of its sizes zero."
    )


def make_service_of(bundle: Path) -> Any:
    from actionclip_deploy.bundle import Bundle
    from actionclip_deploy.serve.service import Service
    from actionclip_deploy.serve.settings import ServerSettings

    opened = Bundle.open(bundle)
    settings = ServerSettings(
        verify=False, allowed_hosts=("testserver",), workers=1, max_batch=4, max_delay_ms=1.0
    )
    return Service(opened, FakeRuntime(opened.manifest), settings)


def test_frames_that_are_mixed_have_a_video_model(tmp_path: Path) -> None:
    from fakes import write_fake_bundle

    write_fake_bundle(tmp_path / "bundle", visual_prompt="joint")
    service = make_service_of(tmp_path / "bundle")
    array = make_array("clip")
    with TestClient(create_app(service)) as client:
        index = client.post("/v2/repository/index").json()
        assert [each["name"] for each in index] == ["clip", "textual", "video"]
        outputs = [
            read_json_output("clip", infer(client, model, json_request("clip", array)))
            for model in ("video", "clip")
        ]
        error = sentence(infer(client, "visual", json_request("visual", array)), 404)
    runtime = FakeRuntime(fake_manifest(visual_prompt="joint"))
    for output in outputs:
        np.testing.assert_array_equal(output, runtime.encode_video(array))
    assert error == "There is no model 'visual'; the models are clip, textual, video."


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}'])
def test_the_index_lists_all_models(client: TestClient, body: bytes) -> None:
    answer = client.post("/v2/repository/index", content=body).json()
    assert answer == [
        {"name": model, "version": "1", "state": "READY", "reason": ""} for model in MODELS
    ]


def test_an_index_that_asks_for_nonsense_is_refused(client: TestClient) -> None:
    answer = client.post("/v2/repository/index", content=b'{"ready": "perhaps"}')
    assert "ready: Input should be a valid boolean" in sentence(answer, 400)
    answer = client.post("/v2/repository/index", content=b" " * 70_000)
    assert "65,536 bytes of JSON" in sentence(answer, 413)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_numbers_in_json_give_what_the_runtime_gives(
    client: TestClient, model: str, num_rows: int
) -> None:
    array = make_array(model, num_rows)
    flat = json_request(model, array)
    nested = json_request(model, array)
    nested["inputs"][0]["data"] = array.tolist()
    for request in (flat, nested):
        output = read_json_output(model, infer(client, model, request))
        np.testing.assert_array_equal(output, expected_output(model, array))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_binary_data_give_what_the_runtime_gives(
    client: TestClient, model: str, padding: int
) -> None:
    array = make_array(model, 3)
    asked = {"parameters": {"binary_data_output": True}}
    body, headers = binary_request(model, array, padding=padding, **asked)
    response = infer(client, model, body, headers)
    np.testing.assert_array_equal(
        read_binary_output(model, response), expected_output(model, array)
    )
    assert response.headers["content-type"] == "application/octet-stream"


def test_each_output_may_be_asked_for_in_its_own_form(client: TestClient) -> None:
    array = make_array("temporal")
    expected = expected_output("temporal", array)
    name = OUTPUTS["temporal"]
    for for_all, for_one, is_binary in (
        (None, None, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
        (None, True, True),
    ):
        output: dict[str, Any] = {"name": name}
        if for_one is not None:
            output["parameters"] = {"binary_data": for_one}
        asked: dict[str, Any] = {"outputs": [output]}
        if for_all is not None:
            asked["parameters"] = {"binary_data_output": for_all}
        response = infer(client, "temporal", json_request("temporal", array, **asked))
        read = read_binary_output if is_binary else read_json_output
        np.testing.assert_array_equal(read("temporal", response), expected)


def test_an_answer_names_its_model_and_has_the_requests_id(client: TestClient) -> None:
    request = json_request("textual", make_array("textual"), id="größe 7")
    answer = client.post("/v2/models/textual/versions/1/infer", json=request).json()
    assert answer["id"] == "größe 7"
    assert answer["model_name"] == "textual"
    assert answer["model_version"] == "1"
    del request["id"]
    assert "id" not in infer(client, "textual", request).json()


def test_large_json_is_the_same_as_small(client: TestClient) -> None:
    array = make_array("temporal", 1024)  # 1.3 MB of JSON in, 16,384 numbers out
    response = infer(client, "temporal", json_request("temporal", array))
    np.testing.assert_array_equal(
        read_json_output("temporal", response), expected_output("temporal", array)
    )


def test_what_extensions_add_has_no_effect(client: TestClient) -> None:
    array = make_array("textual")
    request = json_request(
        "textual", array, parameters={"priority": 2, "mine": "x", "timeout": 0}, extra=[1]
    )
    output = read_json_output("textual", infer(client, "textual", request))
    np.testing.assert_array_equal(output, expected_output("textual", array))


def test_requests_share_calls_and_keep_their_rows(tmp_path: Path) -> None:
    # As one call begins while nothing waits, the others wait for it and share the next.
    arrays = [make_array("temporal", num_rows)[:1] for num_rows in range(1, 9)]

    async def ask() -> list[Any]:
        service = make_service(tmp_path, max_batch=16, max_delay_ms=200.0)
        await service.start()
        service.runtime.calls.clear()
        transport = httpx2.ASGITransport(create_app(service, manages_service=False))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            requests = [
                client.post("/v2/models/temporal/infer", json=json_request("temporal", array))
                for array in arrays
            ]
            responses = await asyncio.gather(*requests)
        await service.stop()
        assert len(service.runtime.calls) < len(arrays)
        assert sum(shape[0] for _, shape in service.runtime.calls) == len(arrays)
        return responses

    for array, response in zip(arrays, asyncio.run(ask()), strict=True):
        np.testing.assert_array_equal(
            read_json_output("temporal", response), expected_output("temporal", array)
        )


def test_an_unknown_version_or_route_is_refused_in_the_protocols_form(client: TestClient) -> None:
    error = sentence(client.get("/v2/models/visual/versions/2"), 404)
    assert error == "The model visual has no version '2'; ask for 1, or for none."
    assert "no model 'other'" in sentence(client.get("/v2/models/other/ready"), 404)
    assert "/openapi.json" in sentence(client.post("/v2/repository/models/visual/load"), 404)
    assert "GET /v2/models/visual/infer" in sentence(client.get("/v2/models/visual/infer"), 405)
    assert "x-request-id" in client.get("/v2/models/other").headers
    # /v1 keeps its own form.
    assert client.get("/v1/labels/other").json()["error"]["code"] == "unknown_bank"


def test_a_server_with_keys_lets_nobody_else_run_a_model(tmp_path: Path) -> None:
    request = json_request("textual", make_array("textual"))
    with running_app(tmp_path, api_keys=("secret",)) as client:
        assert "Bearer KEY" in sentence(infer(client, "textual", request), 401)
        allowed = infer(client, "textual", request, {"authorization": "Bearer secret"})
        assert allowed.status_code == 200
        assert client.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_compressed_bodies_are_refused(client: TestClient, encoding: str) -> None:
    response = infer(client, "textual", b"{}", {"content-encoding": encoding})
    assert f"compressed ('{encoding}')" in sentence(response, 415)


def test_the_time_of_a_request_is_in_microseconds(tmp_path: Path) -> None:
    class Slow(FakeRuntime):
        is_slow = False

        def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
            if self.is_slow:
                import time

                time.sleep(0.3)
            return super()._run(graph, array)

    with running_app(tmp_path, runtime=Slow) as client:
        client.service.runtime.is_slow = True  # type: ignore[attr-defined]
        request = json_request("textual", make_array("textual"), parameters={"timeout": 50_000})
        assert "was not done within its time" in sentence(infer(client, "textual", request), 504)
        request["parameters"]["timeout"] = 20_000_000
        assert infer(client, "textual", request).status_code == 200
        request["parameters"]["timeout"] = 60_000_001
        error = sentence(infer(client, "textual", request), 400)
        assert error == (
            "The timeout is 60000001 microseconds and may be 60000000; ask for less, or for none."
        )


def test_a_runtime_that_fails_is_an_error_of_the_server(tmp_path: Path) -> None:
    class Failing(FakeRuntime):
        def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
            if len(array) == 3:
                raise InferenceError("out of memory, secret path")
            return super()._run(graph, array)

    with running_app(tmp_path, runtime=Failing) as client:
        request = json_request("textual", make_array("textual", 3))
        error = sentence(infer(client, "textual", request), 500)
        assert "secret" not in error
        assert infer(client, "textual", json_request("textual", make_array("textual"))).is_success


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize(("model", "status"), [("temporal", 400), ("textual", 500)])
def test_an_output_without_numbers_is_refused(
    tmp_path: Path, model: str, status: int, is_binary: bool
) -> None:
    class Overflowing(FakeRuntime):
        def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
            output = super()._run(graph, array)
            if len(array) == 3:
                output[1, 2] = np.nan
            return output

    asked = {"parameters": {"binary_data_output": is_binary}}
    with running_app(tmp_path, runtime=Overflowing) as client:
        request = json_request(model, make_array(model, 3), **asked)
        error = sentence(infer(client, model, request), status)
    assert ("so large that temporal gives no numbers" in error) == (model == "temporal")


def test_bodies_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    limits = {"field_bytes": 2000, "rows": 2, "body_bytes": 50_000}
    array = make_array("visual", 3)
    with running_app(tmp_path, limits=limits) as client:
        asked = infer(client, "visual", json_request("visual", array))
        assert "more than 2,000 bytes of JSON" in sentence(asked, 413)
        body, headers = binary_request("visual", array)
        assert "has 3 rows and may have 2" in sentence(infer(client, "visual", body, headers), 413)
        body, headers = binary_request("visual", array, padding=2000)
        asked = infer(client, "visual", body, headers)
        assert "more than 2,000 bytes of JSON" in sentence(asked, 413)
        body, headers = binary_request("visual", make_array("visual", 20))
        error = sentence(infer(client, "visual", body, headers), 413)
        assert "more than 50,000 bytes" in error


def test_bodies_share_a_memory_that_is_bounded(tmp_path: Path) -> None:
    body, headers = binary_request("visual", make_array("visual", 3))

    async def upload(is_held: asyncio.Event) -> Any:
        yield body[:-1]
        await is_held.wait()
        yield body[-1:]

    async def ask() -> tuple[Any, list[Any], Any]:
        service = make_service(tmp_path, limits={"body_bytes": len(body)})
        await service.start()
        transport = httpx2.ASGITransport(create_app(service, manages_service=False))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            url, is_held = "/v2/models/visual/infer", asyncio.Event()
            held = [
                asyncio.ensure_future(client.post(url, content=upload(is_held), headers=headers))
                for _ in range(8)
            ]
            while service.metrics.registry.get_sample_value("actionclip_requests_in_flight") < 8:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            refused = await client.post(url, content=body, headers=headers)
            is_held.set()
            done = await asyncio.gather(*held)
            after = await client.post(url, content=body, headers=headers)
        await service.stop()
        return refused, done, after

    refused, done, after = asyncio.run(ask())
    assert "The tensors of all requests together may take" in sentence(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert [response.status_code for response in [*done, after]] == [200] * 9


def test_the_openapi_document_has_the_routes_in_one_piece(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    route = document["paths"]["/v2/models/{name}/versions/{version}/infer"]["post"]
    names = {parameter["name"] for parameter in route["parameters"]}
    assert names == {"name", "version"}
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["inputs"]["items"]["properties"]["shape"]["maxItems"] == 8
    assert "$ref" not in json.dumps(body)
    assert "$defs" not in json.dumps(body)
    statuses = {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(route["responses"]) == statuses
    assert set(route["responses"]["200"]["content"]) == {
        "application/json",
        "application/octet-stream",
    }
    error = route["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
    assert error == "#/components/schemas/ErrorAnswerV2"
