"""Spans for OpenTelemetry, where it is installed and asked for; nothing otherwise.

Where spans go is configured by OpenTelemetry's own environment variables, such as
OTEL_EXPORTER_OTLP_ENDPOINT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from actionclip_deploy.errors import MissingExtraError


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
