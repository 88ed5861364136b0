"""What can be set about the server. Limits are on by default."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path

from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.runtimes.call_sizes import SERVER_CLIPS_PER_CALL
from actionclip_deploy.runtimes.machine import check_num_threads, check_seconds

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What one request, one video or one client may take; nothing here can be switched off."""

    body_bytes: int = 64 * _MIB  # of a request, all its files together
    body_seconds: float = 30.0  # until a body has to be there as a whole
    spool_bytes: int = 4096 * _MIB  # of the files of all requests together, on disk
    field_bytes: int = 8 * _MIB  # of what is not a file: JSON, or the fields of a form together
    requests: int = 256  # worked on at a time; more are refused
    videos: int = 16  # per request
    duration_seconds: float = 600.0  # of a video
    pixels: int = 4096 * 2304  # of a frame, width x height
    frames: int = 36_000  # of a video
    decode_seconds: float = 20.0  # of one video; the process that takes longer is killed
    decode_memory_bytes: int = 1024 * _MIB  # what a decoding process may take beyond its start
    waiting_decodes: int = 256  # videos that wait for a process; more are refused
    views: int = 30  # of a video, clips x crops
    labels: int = 256  # brought along by a request
    prompts: int = 4096  # labels x templates, brought along by a request
    bank_labels: int = 10_000  # of a label bank that is put
    # Labels x templates of a label bank that is put, each of which is kept.
    bank_prompts: int = 200_000
    templates: int = 64  # of a request or a bank
    text_characters: int = 1000  # of a label or template
    banks: int = 64  # label banks there may be at a time
    # Of the embeddings of all label banks together, those being built too.
    bank_bytes: int = 2048 * _MIB
    rows: int = 1024  # rows of a tensor in one request of the inference protocol
    event_clients: int = 64  # that are told of events as they come, at a time
    moments: int = 500  # of the answer to a search
    search_texts: int = 16  # what a search leaves out, and the names that it looks among, of each
    waiting_searches: int = 64  # of which one is done at a time; more are refused
    archive_files: int = 64  # videos of the archive that are sent at a time
    grpc_streams: int = 32  # of requests, or of states of health, that are open at a time
    # Longest time until an answer; also what a request without its own gets.
    request_seconds: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_positive(each.name, getattr(self, each.name))


_MAX_DELAY_MS = 60_000.0


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # port to listen on; 0 takes a free one
    grpc_port: int | None = None  # where gRPC is served as well; 0 takes a free one
    # Other names by which it may be asked, `*.NAME` for all below one; `*` takes every name.
    allowed_hosts: tuple[str, ...] = ()
    max_batch: int = SERVER_CLIPS_PER_CALL  # clips in one call of the runtime
    max_delay_ms: float = 5.0  # how long a clip may wait for others to fill a call
    queue: int = 256  # clips that may wait; more are refused with 429
    workers: int = 2  # processes that decode
    # Label banks of the bundle to load; None loads all of them.
    labels: tuple[str, ...] | None = None
    save_labels: bool = False  # whether banks that are put are written into the bundle as well
    # Keys of which a client must give one; empty lets everyone in.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    drain_seconds: float = 30.0  # how long a server that was told to end finishes what it has
    # Whether the runtime is compared with the golden data before the server is ready.
    verify: bool = True
    # Where uploads lie while they are worked on; None for the system's folder of temporary files.
    spool_folder: Path | None = None
    # Whether spans are given to OpenTelemetry, which the environment configures.
    tracing: bool = False
    limits: Limits = field(default_factory=Limits)  # what a request may take

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "workers", "drain_seconds"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.max_delay_ms <= _MAX_DELAY_MS:
            raise ArgumentError(
                "max_delay_ms",
                f"is {self.max_delay_ms}; it must be 0 or more, and {_MAX_DELAY_MS:,.0f} at most.",
            )
        for name in ("port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ArgumentError(name, f"is {port}; it must be from 0 to 65535.")
        check_num_threads("workers", self.workers)
        for host in self.allowed_hosts:
            if host != "*" and normal_host(host.removeprefix("*.")) is None:
                raise ArgumentError(
                    "allowed_hosts",
                    f"has {host!r}; give a name such as videos.example.org or an "
                    "address alone, without http:// and port, or * for every name.",
                )
        if self.queue < self.max_batch:
            raise ArgumentError(
                "queue",
                f"is {self.queue} and max_batch {self.max_batch}; "
                "the queue must hold one full batch or more.",
            )
        if any(not key.isascii() or not key.strip() for key in self.api_keys):
            raise ValueError("An API key is empty or not ASCII; give keys of ASCII characters.")


_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,253}[a-z0-9_])?")


def normal_host(host: str) -> str | None:
    """A name or address of a machine in the one form that is compared; None if it is neither."""
    host = host.lower().removesuffix(".")
    try:
        return str(ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return host if _HOST_NAME.fullmatch(host) else None


def _check_positive(name: str, number: float) -> None:
    if name.endswith("_seconds"):
        check_seconds(name, number)
    if not (math.isfinite(number) and number > 0):
        raise ArgumentError(name, f"is {number}; it must be a positive number.")
