"""`actionclip serve`: score videos over HTTP."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actionclip_deploy.bundle import LABELS_FOLDER, Bundle
from actionclip_deploy.cli.output import (
    BaseOption,
    BundlePath,
    CheckpointOption,
    MaxPixelsOption,
    ProviderOption,
    ThreadsOption,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.watch import cameras_of, open_sink
from actionclip_deploy.errors import (
    ActionClipError,
    LabelBankError,
    LabelError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.files import read_text
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.serve.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from actionclip_deploy.serve.service import Service

_LOCAL = ("127.0.0.1", "::1", "localhost")
_MIB = 1024 * 1024
_USUAL = Limits()


def serve(
    bundle: BundlePath,
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            help="What executes the graphs: auto for the fastest that is verified here, "
            "onnxruntime, tensorrt, tensorrt-rtx or torch.",
        ),
    ] = "auto",
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels", metavar="NAME", help="Label bank to load; by default, all of the bundle."
        ),
    ] = None,
    watched: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            metavar="SOURCE",
            help="Camera, address or @cameras.toml to watch meanwhile, as `actionclip watch` takes "
            "them; repeatable.",
        ),
    ] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option(
            "--sink",
            metavar="SINK",
            help="Where events of --watch go, besides the page Live: FILE.jsonl, an https address, "
            "mqtt://HOST/TOPIC, clips:FOLDER, video:FILE.mp4; repeatable.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            envvar="ACTIONCLIP_ALLOWED_HOSTS",
            help="Another name by which it may be asked, as behind a proxy, or *.NAME; * takes "
            "every name, which lets web pages in.",
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Clips in one call of the runtime.")
    ] = 16,
    max_delay_ms: Annotated[
        float,
        typer.Option("--max-delay-ms", min=0, help="How long a clip may wait to fill a call."),
    ] = 5.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Clips that may wait; more are refused, 429.")
    ] = 256,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Decoding processes; by default, one per core."),
    ] = None,
    max_body_mib: Annotated[
        float, typer.Option("--max-body-mib", min=0.001, help="Largest body of a request.")
    ] = _USUAL.body_bytes / _MIB,
    max_duration: Annotated[
        float, typer.Option("--max-duration", min=0.1, help="Longest video, in seconds.")
    ] = _USUAL.duration_seconds,
    max_pixels: MaxPixelsOption = _USUAL.pixels,
    decode_seconds: Annotated[
        float, typer.Option("--decode-seconds", min=0.1, help="Longest decoding of a video.")
    ] = _USUAL.decode_seconds,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, help="Longest time until an answer, in seconds."),
    ] = _USUAL.request_seconds,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", metavar="FILE", help="Keys of which a client needs one, one a line."
        ),
    ] = None,
    save_labels: Annotated[
        bool, typer.Option("--save-labels", help="Write banks that are put into the bundle.")
    ] = False,
    drain_seconds: Annotated[
        float,
        typer.Option("--drain-seconds", min=0.1, help="To finish in what has begun, at the end."),
    ] = 30.0,
    spool: Annotated[
        Path | None,
        typer.Option(
            "--spool",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            writable=True,
            help="Where uploads lie while worked on.",
        ),
    ] = None,
    tracing: Annotated[
        bool,
        typer.Option("--tracing", help="Give spans to OpenTelemetry, set up by its environment."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the golden outputs before it is ready. Files are held against "
            "their sha256 in any case.",
        ),
    ] = True,
) -> None:
    """Serve a bundle over HTTP until SIGTERM, with a web page at /.

    One line on standard output says when requests are taken, where, and by what they are computed;
    logs are JSON on standard error. Everything that has begun is finished before it ends.

    With --watch it tells of events in cameras as well, on the page /live and in /v1/streams.
    """
    try:
        from actionclip_deploy.serve.app import listen
        from actionclip_deploy.serve.app import serve as run
        from actionclip_deploy.serve.observability import json_logs
        from actionclip_deploy.serve.service import Service
    except ImportError as exc:
        raise MissingExtraError("actionclip serve", "serve") from exc
    from actionclip_deploy.views import default_num_workers

    with _failures_are_told():
        opened = Bundle.open(bundle)
        _check_banks(opened, labels, save_labels=save_labels)
        with wrong_arguments_are_usage_errors():
            settings = ServerSettings(
                host=host,
                port=port,
                allowed_hosts=tuple(allowed_hosts or ()),
                max_batch=max_batch,
                max_delay_ms=max_delay_ms,
                queue=queue,
                workers=workers or default_num_workers(),
                labels=tuple(labels) if labels else None,
                save_labels=save_labels,
                api_keys=_read_keys(api_keys),
                drain_seconds=drain_seconds,
                verify=verify,
                spool_folder=spool,
                tracing=tracing,
                limits=Limits(
                    body_bytes=int(max_body_mib * _MIB),
                    pixels=max_pixels,
                    duration_seconds=max_duration,
                    decode_seconds=decode_seconds,
                    request_seconds=timeout,
                ),
            )
            cameras = cameras_of(watched or ())
        if sink and not cameras:
            raise usage_error("--sink is for the events of --watch; give sources to watch.")
        try:
            listening = listen(host, port)
        except RuntimeUnavailableError as exc:
            raise usage_error(exc) from exc
        with closing(listening), json_logs(), ExitStack() as stack:
            with wrong_arguments_are_usage_errors():
                running = open_runtime(
                    opened,
                    runtime,
                    execution_provider=execution_provider,
                    num_threads=threads,
                    checkpoint=checkpoint,
                    base=base,
                )
            if host not in _LOCAL and not settings.api_keys:
                print_warning(f"Who reaches {host} may use this server; give keys with --api-keys.")
            with wrong_arguments_are_usage_errors():
                sinks = [open_sink(text, stack) for text in sink or ()]
            service = _service_of(
                lambda: Service(opened, running, settings, cameras=cameras, sinks=sinks)
            )
            address = _address(listening.getsockname())
            run(service, listening, on_ready=lambda: _tell(service, address))


def _service_of(make: Callable[[], Service]) -> Service:
    """Make the service; what is wrong with cameras is wrong usage, and told before it serves."""
    try:
        return make()
    except (LabelError, LabelBankError, ValueError) as exc:
        # As the keys in a file of cameras are called.
        text = str(exc).replace("window_seconds", "window").replace("stride_seconds", "stride")
        raise usage_error(text) from exc


def _check_banks(bundle: Bundle, names: list[str] | None, *, save_labels: bool) -> None:
    """Refuse what cannot be served of the bundle's label banks, before anything is opened."""
    there = bundle.label_bank_names()
    for name in names or ():
        with wrong_arguments_are_usage_errors():
            bundle.label_bank_path(name)
        if name not in there:
            raise usage_error(
                f"The bundle {bundle.path} has no label bank {name!r} (there are: "
                f"{', '.join(there) or 'none'}); build it with `actionclip labels build`."
            )
    if save_labels:
        folder = bundle.path / LABELS_FOLDER
        folder = folder if folder.exists() else bundle.path
        if not os.access(folder, os.W_OK):
            raise usage_error(
                f"Label banks cannot be written to {folder}; make it writable, or leave out "
                "--save-labels."
            )


@contextmanager
def _failures_are_told() -> Iterator[None]:
    """End with one sentence, whatever it is that nobody foresaw."""
    try:
        yield
    except (ActionClipError, typer.BadParameter, typer.Exit):
        raise
    except Exception as exc:
        place = traceback.extract_tb(exc.__traceback__)[-1]
        raise RuntimeUnavailableError(
            f"The server failed ({type(exc).__name__}: {exc}, in {place.name} of "
            f"{Path(place.filename).name}, line {place.lineno}); see whether the bundle and the "
            "installation are whole (`actionclip verify`), and report it if they are."
        ) from exc


def _tell(service: Service, address: str) -> None:
    """Say in one line that requests are taken, where, by what they are computed, and the limits."""
    info, settings, limits = service.runtime.describe(), service.settings, service.limits
    engine = f", {info.engine}" if info.engine else ""
    verified = "verified" if service.verification is not None else "not verified"
    banks = ", ".join(
        f"{name} ({len(service.banks.get(name).bank.labels)} labels)"
        for name in service.banks.names()
    )
    vocabulary, knows = service.texts.vocabulary, ""
    if vocabulary is not None:
        total = len(vocabulary.is_known)
        knows = f"it knows {vocabulary.num_known:,} of {total:,} tokens alone; "
    num_streams = len(service.streams.names)
    noun = "camera" if num_streams == 1 else "cameras"
    watched = f"watching {num_streams} {noun} ({address}/live); " if num_streams else ""
    results.print(
        f"Serving {service.bundle.path.name} at {address}: {info.name} ({info.execution_provider}, "
        f"{info.precision}{engine}) {verified}; label banks: {banks or 'none'}; {knows}{watched}"
        f"limits: {limits.body_bytes / _MIB:g} MiB, {limits.duration_seconds:g} s and "
        f"{limits.decode_seconds:g} s of decoding a video, {limits.request_seconds:g} s a request, "
        f"{settings.queue} clips waiting, {settings.workers} decoding, "
        f"{len(settings.api_keys) or 'no'} keys.",
        highlight=False,
        markup=False,
    )
    results.file.flush()


def _address(name: tuple[object, ...]) -> str:
    host, port = str(name[0]), name[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _read_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    lines = read_text(path, "file of keys", usage_error).split("\n")
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise usage_error(f"{path} holds no key; write one on each line.")
    return keys
