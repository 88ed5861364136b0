"""Metrics, traces and logs."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import running_app
from starlette.testclient import TestClient

from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.installation import install_command
from actionclip_deploy.serve.observability import JsonLines, json_logs, open_tracer


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path) as client:
        yield client


def numbers(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_a_video_is_counted_in_every_stage(client: TestClient) -> None:
    files = {"video": ("a.mp4", b"some pixels")}
    answer = client.post("/v1/classify", files=files, data={"labels": '["run", "walk"]'})
    assert answer.status_code == 200
    found = numbers(client)
    for stage in ("read", "decode_queue", "decode", "queue", "visual", "temporal", "score"):
        key = ("actionclip_stage_seconds_count", frozenset({("stage", stage)}))
        assert found[key] == 1, stage
    assert found["actionclip_clips_total", frozenset()] == 1
    assert found["actionclip_batch_clips_sum", frozenset({("work", "views")})] == 1
    assert found["actionclip_ready", frozenset()] == 1
    assert found["actionclip_queue_limit_clips", frozenset()] == 256
    (info,) = [labels for name, labels in found if name == "actionclip_info"]
    assert ("runtime", "fake") in info


def test_a_video_that_gives_no_frames_is_counted(client: TestClient) -> None:
    from actionclip_deploy.serve import refusals

    async def fail(*arguments: object, **options: object) -> None:
        raise refusals.video_unreadable("a.mp4 is empty; send a video.")

    client.service.pool.decode = fail  # type: ignore[attr-defined]
    files = {"video": ("a.mp4", b"")}
    assert client.post("/v1/embed", files=files).status_code == 422
    found = numbers(client)
    key = frozenset({("code", "video_unreadable")})
    assert found["actionclip_decode_failures_total", key] == 1
    assert found["actionclip_rejections_total", key] == 1


def test_the_version_of_a_bank_is_told_until_it_is_removed(client: TestClient) -> None:
    import time

    key = ("actionclip_bank_version", frozenset({("bank", "mine")}))
    client.put("/v1/labels/mine", json={"labels": ["run"]})
    for _ in range(1000):
        if client.get("/v1/labels/mine").json()["active"]:
            break
        time.sleep(0.01)
    assert numbers(client)[key] == 1
    client.delete("/v1/labels/mine")
    assert key not in numbers(client)


def test_stages_are_spans_below_each_other() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = open_tracer(enabled=True, exporter=exporter)
    with tracer.span("request", path="/v1/classify"), tracer.span("decode", video="a.mp4"):
        pass
    tracer.close()
    decode, request = exporter.get_finished_spans()
    assert (decode.name, request.name) == ("decode", "request")
    assert decode.parent is not None
    assert decode.parent.span_id == request.context.span_id
    assert dict(decode.attributes or {}) == {"video": "a.mp4"}


def test_a_request_is_a_span_below_that_of_its_sender(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    with running_app(tmp_path) as client:
        service = client.service  # type: ignore[attr-defined]
        tracer = open_tracer(enabled=True, exporter=exporter)
        service.tracer = tracer
        sender = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        files = {"video": ("a.mp4", b"some pixels")}
        data = {"labels": '["run", "walk"]'}
        client.post("/v1/classify", files=files, data=data, headers={"traceparent": sender})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    (request,) = [span for name, span in spans.items() if name.startswith("POST ")]
    assert request.name.endswith("/classify")
    assert f"{request.context.trace_id:032x}" in sender
    assert (request.attributes or {})["http.response.status_code"] == 200
    for name in ("labels", "decode", "encode", "score"):
        assert spans[name].parent == request.context, name


def test_without_tracing_a_span_is_nothing() -> None:
    tracer = open_tracer(enabled=False)
    with tracer.span("decode"):
        pass
    tracer.close()


def test_tracing_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("tracing"))):
        open_tracer(enabled=True)


def test_a_line_of_the_log_is_json_with_what_was_given() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelno": 20, "levelname": "INFO", "msg": "%s", "args": ('odd\n"text',)}
    )
    record.request_id = "a-1"
    line = JsonLines().format(record)
    assert "\n" not in line
    read = json.loads(line)
    assert read.items() >= {"message": 'odd\n"text', "request_id": "a-1", "level": "info"}.items()
    assert read["time"].endswith("+00:00")


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    assert "ValueError: why" in json.loads(JsonLines().format(record))["exception"]


def test_logs_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    with json_logs():
        logging.getLogger("some.module").info("hello")
    assert (root.handlers, root.level) == (before, level)
    assert json.loads(capsys.readouterr().err)["message"] == "hello"
