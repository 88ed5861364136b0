"""What can be seen of a server from outside: metrics for Prometheus, logs as JSON, traces."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import extract
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.records import StreamRecord, printable
from actionclip_deploy.sinks import SinkStats

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_STREAM_STATES = ("opening", "running", "lost", "ended", "failed")
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
        self.search_seconds = histogram(
            "search_seconds",
            "Time of a search of the archive, once its words are embedded and others are done.",
            buckets=_SECONDS,
        )
        self.search_windows = counter(
            "search_windows", "Windows that searches have looked among, scored or by an index."
        )
        self.archive_videos = gauge("archive_videos", "Videos of the archive that have windows.")
        self.archive_windows = gauge("archive_windows", "Windows of the archive.")
        self.info = gauge(
            "info",
            "Always 1; what runs is in the labels.",
            ["version", "runtime", "execution_provider", "precision", "engine"],
        )

        self.stream_batch_windows = histogram(
            "stream_batch_windows", "Windows of all cameras in a call.", buckets=_CLIPS
        )
        self._stream_age_seconds = histogram(
            "stream_age_seconds",
            "From the newest frame of a window to its scores, by camera.",
            ["stream"],
            buckets=_SECONDS,
        )

    def observe_age(self, stream: str, seconds: float) -> None:
        """Count the age of a frame at its answer; clocks may differ, so it may be below 0."""
        self._stream_age_seconds.labels(stream).observe(max(0.0, seconds))

    def watch(
        self,
        states: Callable[[], Sequence[StreamRecord]],
        sinks: Callable[[], Sequence[SinkStats]],
    ) -> None:
        """Give the numbers of cameras and sinks as they are whenever all are read."""
        self.registry.register(_Streams(states, sinks))

    def forget_bank(self, name: str) -> None:
        """Leave out a bank that was removed."""
        with suppress(KeyError):
            self.bank_version.remove(name)

    def render(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class _Streams(Collector):
    """Numbers that are counted elsewhere: of cameras, and of where their events go."""

    def __init__(
        self,
        states: Callable[[], Sequence[StreamRecord]],
        sinks: Callable[[], Sequence[SinkStats]],
    ) -> None:
        self._states, self._sinks = states, sinks

    def describe(self) -> Iterator[Metric]:
        """Nothing: it is asked before there is anything to tell."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All families; those without samples are there as well."""
        yield from self._of_streams(self._states())
        yield from self._of_sinks(self._sinks())

    def _of_streams(self, streams: Sequence[StreamRecord]) -> Iterator[Metric]:
        counts: dict[str, tuple[str, Callable[[StreamRecord], int]]] = {
            "frames": ("Frames that were decoded.", lambda each: each.frames),
            "grid_frames": ("Of these, that windows are made of.", lambda each: each.grid_frames),
            "frames_encoded": ("That the visual graph saw.", lambda each: each.frames_encoded),
            "frames_reused": (
                "For which the feature of the frame before was taken.",
                lambda each: each.frames_reused,
            ),
            "windows": ("Windows that were scored.", lambda each: each.windows),
            "windows_voided": (
                "Windows that had begun when a gap came.",
                lambda each: each.windows_voided,
            ),
            "reconnects": (
                "How often frames came again after it was lost.",
                lambda each: each.reconnects,
            ),
        }
        for name, (help_text, of) in counts.items():
            family = CounterMetricFamily(f"actionclip_stream_{name}", help_text, labels=["stream"])
            for each in streams:
                family.add_metric([each.name], of(each))
            yield family
        dropped = CounterMetricFamily(
            "actionclip_stream_windows_dropped",
            "Windows that were not scored, by reason.",
            labels=["stream", "reason"],
        )
        state = GaugeMetricFamily(
            "actionclip_stream_state", "1 for the state that it is in.", labels=["stream", "state"]
        )
        for each in streams:
            for reason, number in each.windows_dropped.items():
                dropped.add_metric([each.name, reason], number)
            for name in _STREAM_STATES:
                state.add_metric([each.name, name], each.state == name)
        yield from (dropped, state)

    def _of_sinks(self, sinks: Sequence[SinkStats]) -> Iterator[Metric]:
        labels = ["sink", "kind"]
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        sent = counter("actionclip_sink_sent", "Events that arrived.", labels=labels)
        failures = counter("actionclip_sink_failures", "Attempts that failed.", labels=labels)
        dropped = counter(
            "actionclip_sink_dropped",
            "Events and frames that were given up, by reason.",
            labels=[*labels, "reason"],
        )
        waiting = gauge("actionclip_sink_waiting", "Events that wait.", labels=labels)
        works = gauge("actionclip_sink_works", "1 unless its last try failed.", labels=labels)
        for number, each in enumerate(sinks):
            # Two webhooks of one host have one name, since the rest may be secret.
            is_twice = [other.name for other in sinks].count(each.name) > 1
            values = [f"{each.name} {number + 1}" if is_twice else each.name, each.kind]
            sent.add_metric(values, each.num_sent)
            failures.add_metric(values, each.num_failures)
            waiting.add_metric(values, each.num_waiting)
            works.add_metric(values, each.state == "running")
            for reason, dropped_number in each.dropped.items():
                dropped.add_metric([*values, reason], dropped_number)
        yield from (sent, failures, dropped, waiting, works)


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
