"""What Prometheus reads at /metrics. Names begin with `actionclip_`; times are in seconds."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

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
