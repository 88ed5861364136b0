"""What Prometheus reads at /metrics. Names begin with `actionclip_`; times are in seconds."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from actionclip_deploy.errors import MissingExtraError

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_CLIPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "actionclip_requests",
            "Requests answered, by route and status; 499 is a client that went away.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "actionclip_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "actionclip_requests_in_flight", "Requests that are worked on.", registry=registry
        )
        self.stage_seconds = Histogram(
            "actionclip_stage_seconds",
            "Time of a video by stage: read, labels, decode_queue, decode, queue, graphs, score.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_clips = Histogram(
            "actionclip_batch_clips",
            "Clips in a call of the runtime, by what is computed.",
            ["work"],
            buckets=_CLIPS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "actionclip_batch_seconds",
            "Time of a call of the runtime, by what is computed.",
            ["work"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "actionclip_rejections",
            "Requests that were refused, by the code in the error.",
            ["code"],
            registry=registry,
        )
        self.decode_failures = Counter(
            "actionclip_decode_failures",
            "Videos that gave no frames, by the code in the error.",
            ["code"],
            registry=registry,
        )
        self.clips = Counter(
            "actionclip_clips", "Clips that were embedded for videos.", registry=registry
        )
        self.queue_clips = self._gauge("queue_clips", "Clips that wait for the runtime.")
        self.queue_limit_clips = self._gauge("queue_limit_clips", "Clips that may wait for it.")
        self.decode_queue = self._gauge("decode_queue", "Videos that wait for a process.")
        self.decode_workers = self._gauge("decode_workers", "Decoding processes that are there.")
        self.decode_replaced = self._gauge(
            "decode_workers_replaced", "Decoding processes that ended and were replaced."
        )
        self.is_ready = self._gauge("ready", "1 once verified and warm, until told to end.")
        self.bank_version = Gauge(
            "actionclip_bank_version", "Version of a label bank.", ["bank"], registry=registry
        )
        self.info = Gauge(
            "actionclip_info",
            "Always 1; what runs is in the labels.",
            ["version", "runtime", "execution_provider", "precision", "engine"],
            registry=registry,
        )

    def forget_bank(self, name: str) -> None:
        """Leave out a bank that was removed."""
        with suppress(KeyError):
            self.bank_version.remove(name)

    def render(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"actionclip_{name}", text, registry=self.registry)


# Logs as JSON, one object on each line.


# What a record has besides what was given as `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's, the message once more
}


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextmanager
def json_logs(*, level: int = logging.INFO) -> Iterator[None]:
    """Let all loggers of this process write JSON to standard error, until the end of the block."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    before, level_before = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(level)
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level_before)


# Spans for OpenTelemetry, where it is installed and asked for; nothing otherwise.
#
# Where spans go is configured by OpenTelemetry's own environment variables, such as
# OTEL_EXPORTER_OTLP_ENDPOINT.


class Tracer:
    """Gives spans; this one gives none."""

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[None]:  # noqa: ARG002
        """Count a block as a span, below the one that it is in."""
        yield

    @contextmanager
    def request(
        self,
        method: str,  # noqa: ARG002
        headers: Mapping[bytes, bytes],  # noqa: ARG002
        request_id: str,  # noqa: ARG002
    ) -> Iterator[Callable[[str, int], None]]:
        """Count a request as a span, below the one that its sender names in `traceparent`.

        Gives what is to be told of its route and status.
        """
        yield lambda *_: None

    def close(self) -> None:
        """Send what has not been sent."""


class OpenTelemetryTracer(Tracer):
    """Gives spans to OpenTelemetry.

    Args:
        exporter: Where spans go; None for the OTLP exporter that the environment configures.

    Raises:
        MissingExtraError: If OpenTelemetry is not installed.
    """

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                    OTLPSpanExporter,
                )

                exporter = OTLPSpanExporter()
        except ImportError as exc:
            raise MissingExtraError("Tracing", "tracing") from exc
        resource = Resource.create({"service.name": "actionclip"})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("actionclip_deploy.serve")

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[None]:
        """Count a block as a span, below the one that it is in."""
        with self._tracer.start_as_current_span(name, attributes=attributes):
            yield

    @contextmanager
    def request(
        self, method: str, headers: Mapping[bytes, bytes], request_id: str
    ) -> Iterator[Callable[[str, int], None]]:
        """Count a request as a span, below the one that its sender names in `traceparent`."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        names = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        attributes = {"http.request.method": method, "actionclip.request_id": request_id}
        with self._tracer.start_as_current_span(
            method, context=extract(names), kind=SpanKind.SERVER, attributes=attributes
        ) as span:

            def finish(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)

            yield finish

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def open_tracer(*, enabled: bool) -> Tracer:
    """The tracer that the settings ask for."""
    return OpenTelemetryTracer() if enabled else Tracer()
