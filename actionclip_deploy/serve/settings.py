"""What can be set about the server. Limits are on by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from actionclip_deploy.runtimes.call_sizes import SERVER_CLIPS_PER_CALL

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What one request, one video or one client may take; nothing here can be switched off.

    Attributes:
        body_bytes: Of a request, all its files together.
        body_seconds: Until a body has to be there as a whole.
        spool_bytes: Of the files of all requests together, on disk.
        field_bytes: Of what is not a file: JSON, or the fields of a form together.
        requests: Worked on at a time; more are refused.
        videos: Per request.
        duration_seconds: Of a video.
        pixels: Of a frame, width x height.
        frames: Of a video.
        decode_seconds: Of one video; the process that takes longer is killed.
        decode_memory_bytes: What a decoding process may take beyond its start.
        waiting_decodes: Videos that wait for a process; more are refused.
        views: Of a video, clips x crops.
        labels: Brought along by a request.
        prompts: Labels x templates, brought along by a request.
        bank_labels: Of a label bank that is put.
        bank_prompts: Labels x templates of a label bank that is put, each of which is kept.
        templates: Of a request or a bank.
        text_characters: Of a label or template.
        banks: Label banks there may be at a time.
        bank_bytes: Of the embeddings of all label banks together, those being built too.
        rows: Rows of a tensor in one request of the inference protocol.
        request_seconds: Longest time until an answer; also what a request without its own gets.
    """

    body_bytes: int = 64 * _MIB
    body_seconds: float = 30.0
    spool_bytes: int = 4096 * _MIB
    field_bytes: int = 8 * _MIB
    requests: int = 256
    videos: int = 16
    duration_seconds: float = 600.0
    pixels: int = 4096 * 2304
    frames: int = 36_000
    decode_seconds: float = 20.0
    decode_memory_bytes: int = 1024 * _MIB
    waiting_decodes: int = 256
    views: int = 30
    labels: int = 256
    prompts: int = 4096
    bank_labels: int = 10_000
    bank_prompts: int = 200_000
    templates: int = 64
    text_characters: int = 1000
    banks: int = 64
    bank_bytes: int = 2048 * _MIB
    rows: int = 1024
    request_seconds: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_positive(each.name, getattr(self, each.name))


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        max_batch: Clips in one call of the runtime.
        max_delay_ms: How long a clip may wait for others to fill a call.
        queue: Clips that may wait; more are refused with 429.
        workers: Processes that decode.
        labels: Label banks of the bundle to load; None loads all of them.
        save_labels: Whether banks that are put are written into the bundle as well.
        api_keys: Keys of which a client must give one; empty lets everyone in.
        drain_seconds: How long a server that was told to end finishes what it has.
        verify: Whether the runtime is compared with the golden data before the server is ready.
        spool_folder: Where uploads lie while they are worked on; None for the system's folder
            of temporary files.
        tracing: Whether spans are given to OpenTelemetry, which the environment configures.
        limits: What a request may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = SERVER_CLIPS_PER_CALL
    max_delay_ms: float = 5.0
    queue: int = 256
    workers: int = 2
    labels: tuple[str, ...] | None = None
    save_labels: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    drain_seconds: float = 30.0
    verify: bool = True
    spool_folder: Path | None = None
    tracing: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "workers", "drain_seconds"):
            _check_positive(name, getattr(self, name))
        if not (math.isfinite(self.max_delay_ms) and self.max_delay_ms >= 0):
            raise ValueError(f"max_delay_ms is {self.max_delay_ms}; it must be 0 or more.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535.")
        if self.queue < self.max_batch:
            raise ValueError(
                f"queue is {self.queue} and max_batch {self.max_batch}; "
                "the queue must hold one full batch or more."
            )
        if any(not key.isascii() or not key.strip() for key in self.api_keys):
            raise ValueError("An API key is empty or not ASCII; give keys of ASCII characters.")


def _check_positive(name: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {number}; it must be a positive number.")
