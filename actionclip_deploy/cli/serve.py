"""`actionclip serve`: score videos over HTTP."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actionclip_deploy.bundle import LABELS_FOLDER, Bundle
from actionclip_deploy.cli.classify import read_api_keys
from actionclip_deploy.cli.options import (
    RUNNING,
    BundlePath,
    LabelOnlyOption,
    LabelOption,
    MaxPixelsOption,
    RunOptions,
    TemplateOption,
    TemplatesOption,
    UnknownWordsOption,
    WindowOptions,
    given_templates,
    given_texts,
)
from actionclip_deploy.cli.output import (
    EXIT_INTERRUPTED,
    print_error,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verb import OptionGroup
from actionclip_deploy.cli.watch import cameras_of, open_sink
from actionclip_deploy.errors import (
    ActionClipError,
    ArchiveError,
    ArgumentError,
    LabelBankError,
    LabelError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.labels import LabelBank, bank_for, named_labels
from actionclip_deploy.records import counted
from actionclip_deploy.search import Archive
from actionclip_deploy.serve.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from actionclip_deploy.serve.service import Service

_LOCAL = ("127.0.0.1", "::1", "localhost")
_MIB = 1024 * 1024
_USUAL = Limits()
_OF_CAMERAS = ("window_seconds", "stride_seconds", "still")
_OWN_NAME = "labels"  # of the bank of --label


_LIMITS = "Limits"
_CALLS = "Calls and processes"
_ACCESS = "Who may ask"
_BANKS = "Label banks"
_CAMERAS = "Cameras"
_ARCHIVE = "Archive"


@dataclass(frozen=True)
class ServedLabels(OptionGroup):
    """As `LabelOptions`, of several banks."""

    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            metavar="NAME|FILE",
            help="A label bank's name, or a file of labels, which is served under the file's "
            "name; repeatable. By default, all banks of the bundle.",
        ),
    ] = None
    label: LabelOption = None
    templates: TemplatesOption = None
    template: TemplateOption = None
    label_only: LabelOnlyOption = False
    allow_unknown_words: UnknownWordsOption = False

    def choose(self, bundle: Bundle) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
        """Names of the bundle's banks to load, None for all; and other labels, by a name.

        Raises:
            typer.BadParameter: If two have one name, or one cannot be the name of a bank.
            LabelChoiceError: If there is no such bank and no such file.
        """
        texts = given_texts(self.labels, self.label)
        if texts is not None:
            return (), {_OWN_NAME: texts}
        if self.labels is None:
            return None, {}
        names: list[str] = []
        own: dict[str, Any] = {}
        for given in self.labels:
            found = named_labels(bundle, given)
            name = found if isinstance(found, str) else Path(given).stem
            if name in names or name in own:
                raise usage_error(f"--labels has two banks of the name {name}; rename one file.")
            if isinstance(found, str):
                names.append(name)
            else:
                with wrong_arguments_are_usage_errors():
                    bundle.label_bank_path(name)
                own[name] = found
        return tuple(names), own


def serve(
    bundle: BundlePath,
    labels: ServedLabels,
    running: RunOptions,
    watched: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            metavar="SOURCE",
            help="Camera, address or @cameras.toml to watch meanwhile, as `actionclip watch` takes "
            "them; repeatable.",
            rich_help_panel=_CAMERAS,
        ),
    ] = None,
    sink: Annotated[
        list[str] | None,
        typer.Option(
            "--sink",
            metavar="SINK",
            help="Where events of --watch go, besides the page Live: FILE.jsonl, an https address, "
            "mqtt://HOST/TOPIC, clips:FOLDER, video:FILE.mp4; repeatable.",
            rich_help_panel=_CAMERAS,
        ),
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(
            "--archive",
            metavar="ARCHIVE",
            help="Folder that `actionclip index` made, to be searched on the page Search and in "
            "/v1/search. Its videos are served to whoever may ask.",
            rich_help_panel=_ARCHIVE,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="0 takes a free one.")
    ] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            "--grpc-port",
            min=0,
            max=65535,
            metavar="N",
            help="Serve the inference protocol over gRPC as well, at this port (extra grpc).",
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            envvar="ACTIONCLIP_ALLOWED_HOSTS",
            help="Another name by which it may be asked, as behind a proxy, or *.NAME; * takes "
            "every name, which lets web pages in.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            metavar="FILE",
            help="Keys of which a client needs one, one a line.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(
            "--max-batch",
            min=1,
            metavar="N",
            help="Clips in one call of the runtime.",
            rich_help_panel=_CALLS,
        ),
    ] = 16,
    max_delay_ms: Annotated[
        float,
        typer.Option(
            "--max-delay-ms",
            min=0,
            metavar="MS",
            help="How long a clip may wait to fill a call.",
            rich_help_panel=_CALLS,
        ),
    ] = 5.0,
    queue: Annotated[
        int,
        typer.Option(
            "--queue",
            min=1,
            metavar="N",
            help="Clips that may wait; more are refused, 429.",
            rich_help_panel=_CALLS,
        ),
    ] = 256,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Videos decoded at a time, each in a process; by default, one per core.",
            rich_help_panel=_CALLS,
        ),
    ] = None,
    max_body_mib: Annotated[
        float,
        typer.Option(
            "--max-body-mib",
            min=0.001,
            max=1024 * 1024,
            metavar="MIB",
            help="Largest body of a request.",
            rich_help_panel=_LIMITS,
        ),
    ] = _USUAL.body_bytes / _MIB,
    max_duration: Annotated[
        float,
        typer.Option(
            "--max-duration",
            min=0.1,
            metavar="SECONDS",
            help="Longest video.",
            rich_help_panel=_LIMITS,
        ),
    ] = _USUAL.duration_seconds,
    max_pixels: MaxPixelsOption = _USUAL.pixels,
    decode_seconds: Annotated[
        float,
        typer.Option(
            "--decode-seconds",
            min=0.1,
            metavar="SECONDS",
            help="Longest decoding of a video.",
            rich_help_panel=_LIMITS,
        ),
    ] = _USUAL.decode_seconds,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            metavar="SECONDS",
            help="Longest time until an answer.",
            rich_help_panel=_LIMITS,
        ),
    ] = _USUAL.request_seconds,
    save_labels: Annotated[
        bool,
        typer.Option(
            "--save-labels",
            help="Write banks that are put into the bundle.",
            rich_help_panel=_BANKS,
        ),
    ] = False,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            min=0.1,
            metavar="SECONDS",
            help="To finish in what has begun, at the end.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
    spool: Annotated[
        Path | None,
        typer.Option(
            "--spool",
            metavar="DIR",
            exists=True,
            file_okay=False,
            writable=True,
            help="Where uploads lie while worked on.",
            rich_help_panel=_CALLS,
        ),
    ] = None,
    tracing: Annotated[
        bool,
        typer.Option(
            "--tracing",
            help="Give spans to OpenTelemetry, set up by its environment.",
            rich_help_panel=_CALLS,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the golden outputs before it is ready. Files are held against "
            "their sha256 in any case.",
            rich_help_panel=RUNNING,
        ),
    ] = True,
) -> None:
    """Serve a bundle over HTTP until SIGTERM, with a web page at /.

    One line on standard output says when requests are taken, where, and by what they are computed;
    logs are JSON on standard error. Everything that has begun is finished before it ends.

    With --watch it tells of events in cameras as well, on the page /live and in /v1/streams; with
    --archive it finds moments of recordings by words, on the page /search and in /v1/search.

    Example:
        actionclip serve bundle --labels mine --port 8000
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
        templates = given_templates(labels.templates, labels.template, labels.label_only)
        names, own = labels.choose(opened)
        if templates is not None:  # of a bank too, some alone may be chosen
            own |= dict.fromkeys(opened.label_bank_names() if names is None else names)
            names = ()
        if save_labels:
            _check_writable(opened)
        searched = None if archive is None else _open_archive(archive, opened)
        with wrong_arguments_are_usage_errors():
            settings = ServerSettings(
                host=host,
                port=port,
                grpc_port=grpc_port,
                allowed_hosts=tuple(allowed_hosts or ()),
                max_batch=max_batch,
                max_delay_ms=max_delay_ms,
                queue=queue,
                workers=workers or default_num_workers(),
                labels=names,
                save_labels=save_labels,
                api_keys=read_api_keys(api_keys),
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
            cameras = cameras_of(watched or (), WindowOptions())
        if sink and not cameras:
            raise usage_error("--sink is for the events of --watch; give sources to watch.")
        try:
            listening = listen(host, port)
            if grpc_port:  # told now, and taken once the model is open
                listen(host, grpc_port).close()
        except RuntimeUnavailableError as exc:
            raise usage_error(exc) from exc
        with closing(listening), json_logs(), ExitStack() as stack:
            runtime = running.open(opened, prefer="throughput")
            if host not in _LOCAL and not settings.api_keys:
                print_warning(f"Who reaches {host} may use this server; give keys with --api-keys.")

            def make(name: str, texts: Any) -> LabelBank:
                bank = bank_for(
                    opened,
                    runtime,
                    name if texts is None else texts,
                    templates=templates,
                    allow_unknown_words=labels.allow_unknown_words,
                )
                return replace(bank, name=name)

            makers = [partial(make, name, texts) for name, texts in own.items()]
            # What is wrong with cameras and their labels is told before anything is served.
            made = [each() for each in makers] if cameras else []
            if made:
                makers = [partial(_same, bank) for bank in made]
            with wrong_arguments_are_usage_errors():
                sinks = [open_sink(text, stack) for text in sink or ()]
            service = _service_of(
                lambda: Service(
                    opened,
                    runtime,
                    settings,
                    make_banks=makers,
                    cameras=cameras,
                    watched_banks=made,
                    sinks=sinks,
                    archive=searched,
                )
            )
            address = _address(listening.getsockname())
            ended_by = run(service, listening, on_ready=partial(_tell, service, address))
        if ended_by == signal.SIGINT:
            print_error(
                "Interrupted: no more requests are taken, and those that had begun were finished; "
                "the same command serves again."
            )
            raise typer.Exit(EXIT_INTERRUPTED)


def _open_archive(folder: Path, bundle: Bundle) -> Archive:
    """The archive, if the bundle's texts can be looked for in it."""
    try:
        archive = Archive.open(folder)
        archive.check_bundle(bundle)
    except ArchiveError as exc:
        raise usage_error(exc) from exc
    return archive


def _same(bank: LabelBank) -> LabelBank:
    return bank


def _service_of(make: Callable[[], Service]) -> Service:
    """Make the service; what is wrong with cameras is wrong usage, and told before it serves."""
    try:
        return make()
    except ArgumentError as exc:
        if exc.argument not in _OF_CAMERAS:  # an option of this command, which the error names
            raise
        text = str(exc)  # as the keys in a file of cameras are called
        for name in _OF_CAMERAS:
            text = text.replace(name, name.removesuffix("_seconds"))
        raise usage_error(text) from exc
    except (LabelError, LabelBankError, ValueError) as exc:
        raise usage_error(exc) from exc


def _check_writable(bundle: Bundle) -> None:
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
    except (ActionClipError, ArgumentError, typer.BadParameter, typer.Exit):
        raise
    except Exception as exc:
        place = traceback.extract_tb(exc.__traceback__)[-1]
        raise RuntimeUnavailableError(
            f"The server failed ({type(exc).__name__}: {exc}, in {place.name} of "
            f"{Path(place.filename).name}, line {place.lineno}); see whether the bundle and the "
            "installation are whole (`actionclip verify`), and report it if they are."
        ) from exc


def _tell(service: Service, address: str, grpc_address: str | None) -> None:
    """Say in one line that requests are taken, where, by what they are computed, and the limits."""
    info, settings, limits = service.runtime.describe(), service.settings, service.limits
    engine = f", {info.engine}" if info.engine else ""
    verified = "verified" if service.verification is not None else "not verified"
    banks = ", ".join(
        f"{name} ({counted(len(service.banks.get(name).bank.labels), 'label')})"
        for name in service.banks.names()
    )
    vocabulary, knows = service.texts.vocabulary, ""
    if vocabulary is not None:
        total = len(vocabulary.is_known)
        knows = f"it knows {vocabulary.num_known:,} of {total:,} tokens alone; "
    by_grpc = "" if grpc_address is None else f" and by gRPC at {grpc_address}"
    num_streams = len(service.streams.names)
    watched = f"watching {counted(num_streams, 'camera')} ({address}/live); " if num_streams else ""
    searched = ""
    if service.has_archive:
        archive = service.archive
        searched = (
            f"searching {counted(archive.num_windows, 'window')} of {archive.name} "
            f"({address}/search); "
        )
    results.print(
        f"Serving {service.bundle.path.name} at {address}{by_grpc}: "
        f"{info.name} ({info.execution_provider}, {info.precision}{engine}) {verified}; "
        f"label banks: {banks or 'none'}; {knows}{watched}{searched}"
        f"limits: {limits.body_bytes / _MIB:g} MiB, {limits.duration_seconds:g} s and "
        f"{limits.decode_seconds:g} s of decoding a video, {limits.request_seconds:g} s a request, "
        f"{settings.queue} clips waiting, {settings.workers} decoding, "
        f"{counted(len(settings.api_keys), 'key') if settings.api_keys else 'no keys'}.",
        highlight=False,
        markup=False,
    )
    results.file.flush()


def _address(name: tuple[object, ...]) -> str:
    host, port = str(name[0]), name[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
