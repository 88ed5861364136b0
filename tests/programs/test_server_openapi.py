"""What the server's OpenAPI document says, held against what it answers to generated requests."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
from fakes import FakeRuntime, write_fake_bundle
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import error_of, running_app, write_archive
from threaded_server import ThreadedServer

from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import GraphName

EXAMPLES_PER_ROUTE = 80
ANSWER_SECONDS = 120.0
# What a route may answer when nothing is wrong with the server: too late, or not at this time.
NOT_NOW = {503, 504}
WIDTH = 16


def nothing_failed(context: Any, response: Any, case: Any) -> None:
    assert response.status_code < 500 or response.status_code in NOT_NOW, response.text


CHECKS = [
    nothing_failed,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]


class SafeRuntime(FakeRuntime):
    """Gives numbers for black frames and tokens of 0 as well, whose norm is 0."""

    def _run(self, graph: GraphName, array: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(super()._run(graph, array), nan=WIDTH**-0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    """One whose runtime is in numpy, and whose decoding processes are real."""
    folder = tmp_path_factory.mktemp("openapi")
    bundle = write_fake_bundle(folder / "for_banks")
    runtime = FakeRuntime(bundle.manifest)
    banks = [LabelBank.build(bundle, runtime, ["run", "walk"], name=name) for name in ("0", "mine")]
    options = {"runtime": SafeRuntime, "banks": banks, "fake_pool": False}
    options["archive"] = write_archive(folder)
    with ThreadedServer(folder, **options) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: ThreadedServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_to_generated_requests_are_as_the_document_says(
    schema: Any, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()
    failures = {}
    for operation in operations_of(schema):
        try:
            check_operation(operation, mode, statuses)
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # there is nothing that could be wrong in it
        except FailureGroup as exc:
            failures[operation.label] = str(exc)
    assert not failures, "\n\n".join(failures.values())
    assert {200, 202, 404} <= set(statuses) if mode is GenerationMode.POSITIVE else statuses[422]


def operations_of(schema: Any) -> list[Any]:
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 10
    return found


def check_operation(operation: Any, mode: GenerationMode, statuses: Counter[int]) -> None:
    @hypothesis.settings(
        max_examples=EXAMPLES_PER_ROUTE,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call_and_validate(checks=CHECKS, timeout=ANSWER_SECONDS)
        statuses[response.status_code] += 1

    check()


def test_what_nobody_foresaw_is_answered_in_the_form_of_a_refusal(tmp_path: Path) -> None:
    class BrokenRuntime(FakeRuntime):
        def _run(self, graph: GraphName, array: np.ndarray) -> np.ndarray:
            return np.full((len(array), WIDTH), np.nan, np.float32)

    with running_app(tmp_path, runtime=BrokenRuntime) as client:
        answer = client.post("/v1/embed", json={"texts": ["run"]})
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "failed"
        assert client.get("/healthz").status_code == 200


EMBEDDING = [1.0] + [0.0] * (WIDTH - 1)
TOKENS = {"name": "tokens", "shape": [1, 3], "datatype": "INT32", "data": [1, 2, 3]}
# Route, name in its path, request, status; requests with `data` are forms and get a video.
GOOD: list[tuple[str, str, dict[str, Any], int]] = [
    (
        "POST /v1/classify",
        "",
        {"data": {"labels": "mine", "per_template": "true", "return_frames": "true"}},
        200,
    ),
    (
        "POST /v1/classify",
        "",
        {"json": {"labels": ["a", "b"], "multi_label": True, "embeddings": [[EMBEDDING]]}},
        200,
    ),
    ("POST /v1/embed", "", {"data": {"views": "2x3"}}, 200),
    ("POST /v1/embed", "", {"json": {"texts": ["run"]}}, 200),
    ("PUT /v1/labels/{name}", "good", {"json": {"labels": ["run", "walk"]}}, 202),
    ("PUT /v1/labels/{name}", "good", {"json": {"labels": ["walk", "sit", "run"]}}, 202),
    ("GET /v1/labels", "", {}, 200),
    ("GET /v1/labels/{name}", "good", {}, 200),
    ("GET /v1/labels/{name}/diff", "good", {"params": {"old": 1, "new": 2}}, 200),
    ("DELETE /v1/labels/{name}", "good", {}, 204),
    ("GET /v1/streams", "", {}, 200),
    ("GET /v1/archive", "", {}, 200),
    ("POST /v1/search", "", {"json": {"text": "run", "without": ["walk"], "top": 3}}, 200),
    ("POST /v1/search", "", {"json": {"like": {"video": "1.mp4", "seconds": 5}}}, 200),
    ("GET /v1/archive/videos/{video_id}", "1", {}, 200),
    ("GET /v1/archive/videos/{video_id}", "1", {"headers": {"range": "bytes=0-9"}}, 206),
    ("GET /v1/archive/videos/{video_id}", "1", {"headers": {"range": "bytes=99999-"}}, 416),
    ("GET /v1/archive/thumbnails/{video_id}/{window}", "1", {}, 200),
    ("GET /v1/info", "", {}, 200),
    ("GET /metrics", "", {}, 200),
    ("GET /v2", "", {}, 200),
    ("GET /v2/models/{name}", "clip", {}, 200),
    ("POST /v2/models/{name}/infer", "textual", {"json": {"inputs": [TOKENS]}}, 200),
    ("POST /v2/repository/index", "", {"json": {}}, 200),
]


def test_good_answers_are_as_the_document_says(
    server: ThreadedServer, schema: Any, rendered_video: Path
) -> None:
    banks = server.service.banks
    video = {"video": ("a.mp4", rendered_video.read_bytes())}
    with httpx.Client(base_url=server.url, timeout=ANSWER_SECONDS, trust_env=False) as client:
        for route, name, given, status in GOOD:
            method, path = route.split()
            files = {"files": video} if "data" in given else {}
            names = dict.fromkeys(re.findall(r"{(\w+)}", path), name)
            request = client.build_request(method, path.format(**names), **given, **files)
            request.read()
            response = client.send(request)
            assert response.status_code == status, f"{route}: {response.text}"
            case = schema[path][method].Case(path_parameters=names)
            case.validate_response(response, checks=CHECKS[:-1])
            while banks.building_names():
                time.sleep(0.01)
