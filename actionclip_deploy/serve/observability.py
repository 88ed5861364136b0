"""What can be seen of a server from outside: metrics for Prometheus, logs as JSON, traces."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import extract
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.records import printable

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_CLIPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class ServerMetrics:
    """The numbers of one server, in a registry of their own; times are in seconds."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="actionclip", registry=registry)
        gauge = partial(Gauge, namespace="actionclip", registry=registry)
        histogram = partial(Histogram, namespace="actionclip", registry=registry)
        self.requests = counter(
            "requests",
            "Requests answered, by route and status; 499 is a client that went away.",
            ["route", "method", "status"],
        )
        self.request_seconds = histogram(
            "request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
        )
        self.in_flight = gauge("requests_in_flight", "Requests that are worked on.")
        self.stage_seconds = histogram(
            "stage_seconds",
            "Time of a video by stage: read, labels, decode_queue, decode, queue, graphs, score.",
            ["stage"],
            buckets=_SECONDS,
        )
        self.batch_clips = histogram(
            "batch_clips",
            "Clips in a call of the runtime, by what is computed.",
            ["work"],
            buckets=_CLIPS,
        )
        self.batch_seconds = histogram(
            "batch_seconds",
            "Time of a call of the runtime, by what is computed.",
            ["work"],
            buckets=_SECONDS,
        )
        self.rejections = counter(
            "rejections", "Requests that were refused, by the code in the error.", ["code"]
        )
        self.decode_failures = counter(
            "decode_failures", "Videos that gave no frames, by the code in the error.", ["code"]
        )
        self.clips = counter("clips", "Clips that were embedded for videos.")
        self.queue_clips = gauge("queue_clips", "Clips that wait for the runtime.")
        self.queue_limit_clips = gauge("queue_limit_clips", "Clips that may wait for it.")
        self.decode_queue = gauge("decode_queue", "Videos that wait for a process.")
        self.decode_workers = gauge("decode_workers", "Decoding processes that are there.")
        self.decode_replaced = gauge(
            "decode_workers_replaced", "Decoding processes that ended and were replaced."
        )
        self.is_ready = gauge("ready", "1 once verified and warm, until told to end.")
        self.bank_version = gauge("bank_version", "Version of a label bank.", ["bank"])
        self.info = gauge(
            "info",
            "Always 1; what runs is in the labels.",
            ["version", "runtime", "execution_provider", "precision", "engine"],
        )

    def forget_bank(self, name: str) -> None:
        """Leave out a bank that was removed."""
        with suppress(KeyError):
            self.bank_version.remove(name)

    def render(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class JsonLines(JsonFormatter):
    """One JSON object a line: time (UTC), level, logger, message, and what was given as `extra`."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            timestamp="time",
            # uvicorn's: the message once more.
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Write levels in small letters, as most collectors do, and control characters escaped."""
        shown = {
            key: printable(value) if isinstance(value, str) else value
            for key, value in log_data.items()
        }
        return {**shown, "level": str(log_data["level"]).lower()}


@contextmanager
def json_logs(*, level: int = logging.INFO) -> Iterator[None]:
    """Let all loggers of this process write JSON to standard error, until the end of the block."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    before, level_before = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(level)
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level_before)


class Tracer:
    """Gives spans to OpenTelemetry, whose API does nothing by itself.

    Args:
        provider: Where spans go; None leads nowhere, even where the process has a provider.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._provider = provider or trace.NoOpTracerProvider()
        self._tracer = self._provider.get_tracer("actionclip_deploy.serve")

    def span(self, name: str, **attributes: Any) -> AbstractContextManager[Any]:
        """Count a block as a span, below the one that it is in."""
        return self._tracer.start_as_current_span(name, attributes=attributes)

    @contextmanager
    def request(
        self, method: str, headers: Mapping[bytes, bytes], request_id: str
    ) -> Iterator[Callable[[str, int], None]]:
        """Count a request as a span, below the one that its sender names in `traceparent`.

        Gives what is to be told of its route and status.
        """
        names = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        attributes = {"http.request.method": method, "actionclip.request_id": request_id}
        with self._tracer.start_as_current_span(
            method, context=extract(names), kind=trace.SpanKind.SERVER, attributes=attributes
        ) as span:

            def finish(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)

            yield finish

    def close(self) -> None:
        """Send what has not been sent."""
        shutdown = getattr(self._provider, "shutdown", None)  # the SDK's; the API has none
        if shutdown is not None:
            shutdown()


def open_tracer(*, enabled: bool, exporter: Any = None) -> Tracer:
    """The tracer that the settings ask for.

    Args:
        enabled: Whether spans go anywhere.
        exporter: Where they go; None for OTLP, which OpenTelemetry's own environment variables
            configure, such as OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises:
        MissingExtraError: If OpenTelemetry's SDK is not installed.
    """
    if not enabled:
        return Tracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise MissingExtraError("Tracing", "tracing") from exc
    provider = TracerProvider(resource=Resource.create({"service.name": "actionclip"}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return Tracer(provider)
