"""`actionclip watch`: events in live sources, as they happen."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    READING,
    WINDOWS,
    BundlePath,
    JsonOption,
    LabelOptions,
    MaxPixelsOption,
    MethodOption,
    NoVerifyOption,
    ResizeOption,
    RunOptions,
    StillOption,
    WindowOptions,
    warn_of_one_label,
)
from actionclip_deploy.cli.output import (
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    notes,
    print_error,
    print_json_line,
    print_warning,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import ArgumentError, LabelBankError, ThresholdWarning, VideoError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.motions import EndlessMotions
from actionclip_deploy.records import EventRecord, StreamRecord, clock_text, printable
from actionclip_deploy.sinks import Sink, SinkStats, frames_to, parse_sink
from actionclip_deploy.video import MAX_PIXELS
from actionclip_deploy.video.live import SourceState
from actionclip_deploy.video.sources import Source, expand_sources
from actionclip_deploy.watch import (
    Camera,
    WatchedBank,
    Watcher,
    check_names,
    follow_banks,
    read_cameras,
)

_CAMERAS_FILE = "@"
_AGAIN = "the same command watches again."
_NOTHING_WATCHED = "nothing was watched yet; repeat the command."


def watch(
    bundle: BundlePath,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Cameras (0, /dev/video0), addresses (rtsp, http, rtmp, udp ...), files, - for a "
            "pipe, screen, test:, or @cameras.toml.",
        ),
    ],
    labels: LabelOptions,
    running: RunOptions,
    windows: WindowOptions,
    sink: Annotated[
        list[str] | None,
        typer.Option(
            "--sink",
            metavar="SINK",
            help="Where events go, besides the terminal: FILE.jsonl, an https address, "
            "mqtt://HOST/TOPIC, clips:FOLDER, video:FILE.mp4; repeatable.",
        ),
    ] = None,
    cooldown: Annotated[
        float,
        typer.Option(
            "--cooldown",
            metavar="SECONDS",
            min=0.0,
            help="After an event, no other of its label for so long.",
            rich_help_panel=WINDOWS,
        ),
    ] = 0.0,
    still: StillOption = 0.0,
    realtime: Annotated[
        bool,
        typer.Option(
            "--realtime",
            help="Give files as fast as they are to be shown, no faster.",
            rich_help_panel=READING,
        ),
    ] = False,
    stop_after: Annotated[
        float | None,
        typer.Option(
            "--stop-after", metavar="SECONDS", min=0.0, help="End after so long; else at Ctrl-C."
        ),
    ] = None,
    method: MethodOption = None,
    resize: ResizeOption = "frame",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what happens in live sources: events with label, start and end.

    Many sources share the calls of the model, and none waits for another. A source that is lost is
    opened again, for ever; ${NAME} in an address is taken from the environment, and secrets are
    shown nowhere. With --json, each event is printed as an object on a line of its own.

    A label bank that is built anew meanwhile is used from then on. At Ctrl-C (exit code 130) and
    SIGTERM (0), events that are open end, and what goes to sinks is written. The exit code is 3 if
    a file or pipe could not be read, or a sink gave up events or files.

    Example:
        actionclip watch bundle rtsp://camera.example/door --labels mine
        actionclip watch bundle @cameras.toml --sink events.jsonl
    """
    opened = Bundle.open(bundle, verify=not no_verify)
    labels.sentences()  # what is wrong with them is told before a model is loaded
    chosen = labels.choose(opened)
    with wrong_arguments_are_usage_errors():
        cameras = cameras_of(sources, windows, still, cooldown)
    failed: set[str] = set()
    num_begun = 0
    is_live = {camera.name: camera.source.is_live for camera in cameras}

    def tell(event: EventRecord) -> None:
        nonlocal num_begun
        num_begun += event.kind == "new"
        _tell(event, sinks, is_live, as_json=as_json)

    with ExitStack() as stack:
        stack.enter_context(tells_when_interrupted(lambda: _NOTHING_WATCHED))
        stack.enter_context(_log_is_printed())
        runtime = stack.enter_context(running.open(opened))
        bank = labels.bank(opened, runtime, chosen, quiet=as_json)
        warn_of_one_label(bank, bank.method_for(method, opened.manifest.scores.method))
        banks = {bank.name: WatchedBank.of(bank)}
        for camera in cameras:
            if camera.labels is not None and camera.labels not in banks:
                banks[camera.labels] = WatchedBank.of(LabelBank.load(opened, camera.labels))
        with wrong_arguments_are_usage_errors():
            sinks = [open_sink(text, stack) for text in sink or ()]
        watcher = _watcher_of(
            lambda: Watcher(
                runtime,
                cameras,
                banks,
                on_event=tell,
                on_frame=frames_to(sinks, is_live),
                on_state=lambda state: _tell_state(state, failed, quiet=as_json),
                method=method,
                region=resize,
                realtime=realtime,
                max_pixels=max_pixels,
                render=EndlessMotions(seed=0),
            )
        )
        stop = threading.Event()
        if stop_after is not None:
            timer = threading.Timer(stop_after, stop.set)
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        kept = [name for name in banks if name in opened.label_bank_names()]
        stack.enter_context(follow_banks(opened, watcher, kept))
        if not as_json:
            notes.print(_introduction(cameras, watcher), highlight=False)
        try:
            with (
                tells_when_interrupted(lambda: f"{_done(watcher, num_begun, sinks)}; {_AGAIN}"),
                _signals_set(stop) as ended_by,
            ):
                watcher.run(stop)
        finally:
            watcher.close()
            if not as_json:
                notes.print(_state_table(watcher.states()))
    # The sinks are closed by now, and their files written.
    done = _done(watcher, num_begun, sinks)
    is_interrupted = signal.SIGINT in ended_by
    if not (as_json or is_interrupted):
        text = f"{done[:1].upper()}{done[1:]}."
        notes.print(text, highlight=False, markup=False, soft_wrap=True)
    for each in sinks:
        if each.stats.num_lost:
            failed.add(each.name)
            print_error(
                f"The sink {each.name} gave up {each.stats.num_lost:,} of its events or files: "
                f"{each.stats.last_error or 'they came faster than it takes them'}"
            )
    if is_interrupted:
        print_error(f"Interrupted: {done}; {_AGAIN}")
        raise typer.Exit(EXIT_INTERRUPTED)
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[list[int]]:
    """Let the first SIGINT or SIGTERM set an event; a second one ends the program at once.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def take(signum: int, _: object) -> None:
        came.append(signum)
        stop.set()
        restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    # Where Ctrl-C is ignored, as under nohup, it stays so.
    found = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    before = {each: handler for each, handler in found.items() if handler is not signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, take)
        yield came
    finally:
        restore()


def _done(watcher: Watcher, num_begun: int, sinks: Sequence[Sink]) -> str:
    """What was done, in words that begin a sentence."""
    states = watcher.states()
    text = (
        f"scored {_number(sum(state.windows for state in states), 'window')} of "
        f"{_number(len(states), 'source')} and told of {_number(num_begun, 'event')}"
    )
    return "; ".join([text, *(_delivered(sink.stats) for sink in sinks)])


def _delivered(stats: SinkStats) -> str:
    noun = "file" if stats.kind in ("clips", "video") else "message"
    text = f"{_number(stats.num_sent, noun)} went to {stats.name}"
    if stats.kind == "webhook" and stats.num_waiting:
        text += f" ({stats.num_waiting:,} waiting for the next run)"
    return text


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cameras_of(
    sources: Sequence[str],
    windows: WindowOptions,
    still: float = 0.0,
    cooldown: float = 0.0,
) -> list[Camera]:
    """The cameras of a command line: those of files as they say, the others by its options."""
    window, stride = windows.window_seconds, windows.stride_seconds
    threshold = windows.threshold
    cameras: list[Camera] = []
    plain = [text for text in sources if not text.startswith(_CAMERAS_FILE)]
    try:
        for text in sources:
            if text.startswith(_CAMERAS_FILE):
                cameras += [
                    replace(
                        camera,
                        window_seconds=camera.window_seconds or window,
                        stride_seconds=camera.stride_seconds or stride,
                        thresholds=threshold if camera.thresholds is None else camera.thresholds,
                    )
                    for camera in read_cameras(Path(text.removeprefix(_CAMERAS_FILE)))
                ]
        for source in _in_short(expand_sources(plain)):
            cameras.append(
                Camera(
                    source,
                    window_seconds=window,
                    stride_seconds=stride,
                    thresholds=threshold,
                    still=still,
                    cooldown_seconds=cooldown,
                )
            )
        check_names(cameras)
    except VideoError as exc:
        raise usage_error(exc) from exc
    return cameras


def _in_short(sources: Sequence[Source]) -> list[Source]:
    """Call files by the last part of their paths, where that tells them apart."""
    counts = Counter(Path(source.name).name for source in sources)
    return [
        replace(source, name=Path(source.name).name)
        if source.kind == "file" and counts[Path(source.name).name] == 1
        else source
        for source in sources
    ]


class _Warnings(logging.Handler):
    """Prints what the library logs as the warnings of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        # What is lost is told by `_tell_state`.
        if record.levelno >= logging.WARNING and not record.name.endswith(".live"):
            print_warning(record.getMessage())


@contextmanager
def _log_is_printed() -> Iterator[None]:
    logger, handler = logging.getLogger("actionclip_deploy"), _Warnings()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def open_sink(text: str, stack: ExitStack) -> Sink:
    """Open a sink until the end of a stack."""
    opened = parse_sink(text)
    stack.callback(opened.close)
    return opened


def _watcher_of(make: Callable[[], Watcher]) -> Watcher:
    """Make a watcher; what is wrong with windows and thresholds is told by the options' names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        try:
            watcher = make()
        except (ArgumentError, LabelBankError):
            raise  # told by its option
        except ValueError as exc:
            raise usage_error(exc) from exc
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print_warning(text.replace("give thresholds that were", "give a --threshold that was"))
    return watcher


def _clock(event: EventRecord, *, is_live: bool) -> str:
    """When it began or ended: the time of day, or of a file, the time in it."""
    if is_live:
        return ((event.end_time if event.kind == "end" else event.start_time) or "")[11:19]
    seconds = event.end_seconds if event.kind == "end" else event.start_seconds
    return f"{clock_text(seconds or 0.0):>8}"


def _tell(
    event: EventRecord, sinks: Sequence[Sink], is_live: Mapping[str, bool], *, as_json: bool
) -> None:
    for each in sinks:
        each.send(event)
    if as_json:
        print_json_line(event)
    elif event.kind != "update":
        clock = _clock(event, is_live=is_live[event.source])
        length = ""
        if event.kind == "end" and event.end_seconds is not None:
            length = f", {event.end_seconds - event.start_seconds:.1f} s"
        what = "begins" if event.kind == "new" else "ends"
        results.print(
            f"{clock}  {_shown(event.source)}  [bold]{_shown(event.label)}[/] {what} "
            f"({event.mean:.2f}{length})",
            highlight=False,
        )


def _tell_state(state: SourceState, failed: set[str], *, quiet: bool) -> None:
    if state.state == "failed":
        failed.add(state.name)
        print_error(state.last_error or f"{state.name} cannot be read.")
    elif state.state == "lost":
        print_warning(f"{state.name}: {state.last_error}")
    elif state.state == "running" and state.reconnects and not quiet:
        notes.print(f"{_shown(state.name)} is back.", highlight=False)


def _introduction(cameras: Sequence[Camera], watcher: Watcher) -> str:
    state = watcher.states()[0]
    names = ", ".join(_shown(camera.name) for camera in cameras[:5])
    more = f" and {len(cameras) - 5} more" if len(cameras) > 5 else ""
    return (
        f"Watching {names}{more}: windows of {state.window_seconds:g} s, one every "
        f"{state.stride_seconds:g} s. Ctrl-C ends it."
    )


def _state_table(states: Sequence[StreamRecord]) -> Table:
    table = Table(title="times are UTC; age is that of a frame at its answer", title_justify="left")
    for heading in ("source", "state", "frames", "windows", "dropped", "lost", "age ms, p50 / p95"):
        is_text = heading in ("source", "state")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for state in states:
        ages = state.age_ms
        age = "" if ages is None else f"{ages['p50']:.0f} / {ages['p95']:.0f}"
        table.add_row(
            _shown(state.name),
            state.state,
            f"{state.frames:,}",
            f"{state.windows:,}",
            f"{sum(state.windows_dropped.values()):,}",
            f"{state.reconnects:,}",
            age,
        )
    return table


def _shown(text: str) -> str:
    return escape(printable(text, kept=""))
