"""`actionclip predict --timeline`: when labels hold in long videos."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import WINDOWS, StillOption, WindowOptions
from actionclip_deploy.cli.output import (
    print_error,
    print_json_line,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
)
from actionclip_deploy.cli.result_files import (
    MATRIX_SUFFIXES,
    TABLE_SUFFIXES,
    check_result_path,
    event_table,
    open_result_file,
    write_score_matrix,
)
from actionclip_deploy.errors import ArgumentError, ThresholdWarning, VideoError, VideoWarning
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.files import sha256_of
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.records import (
    ErrorRecord,
    TimelineRecord,
    TimelineRunRecord,
    clock_text,
    counted,
    printable,
)
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import (
    SUBTITLE_SUFFIXES,
    Timeline,
    read_timeline,
)


@dataclass(frozen=True)
class TimelineOptions(WindowOptions):
    """When labels hold in long videos."""

    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="Of long videos: find when labels hold, with start and end.",
            rich_help_panel=WINDOWS,
        ),
    ] = False
    still: StillOption = 0.0
    matrix: Annotated[
        Path | None,
        typer.Option(
            "--matrix",
            metavar="FILE.npz",
            help="Write the scores of all labels in each window; .npz or .parquet.",
            rich_help_panel=WINDOWS,
        ),
    ] = None
    subtitles: Annotated[
        Path | None,
        typer.Option(
            "--subtitles",
            metavar="FILE.vtt",
            help="Write the timeline as subtitles; .vtt or .srt.",
            rich_help_panel=WINDOWS,
        ),
    ] = None

    annotated: Annotated[
        Path | None,
        typer.Option(
            "--annotated",
            metavar="FILE.mp4",
            help="Write a copy of the video with its labels.",
            rich_help_panel=WINDOWS,
        ),
    ] = None

    def check_alone(self) -> None:
        """Refuse options of a timeline where none is asked for, and files of other formats.

        Raises:
            typer.BadParameter: If there are such.
        """
        given = {
            "--window": self.window_seconds,
            "--stride": self.stride_seconds,
            "--threshold": self.threshold,
            "--still": self.still or None,
            "--matrix": self.matrix,
            "--subtitles": self.subtitles,
            "--annotated": self.annotated,
        }
        names = [name for name, value in given.items() if value is not None]
        if names and not self.timeline:
            raise usage_error(f"{names[0]} is about --timeline, which was not given; add it.")
        check_result_path(self.matrix, MATRIX_SUFFIXES, "--matrix")
        check_result_path(self.subtitles, SUBTITLE_SUFFIXES, "--subtitles")
        check_result_path(self.annotated, (".mp4",), "--annotated")


def predict_timelines(
    bundle: Bundle,
    recognizer: Recognizer,
    videos: Sequence[Path],
    options: TimelineOptions,
    *,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Find events in each of some videos, print them and write what was asked for.

    Returns:
        How many videos failed.
    """
    check_result_path(output, TABLE_SUFFIXES)
    pictures = {
        "--plot": plot,
        "--matrix": options.matrix,
        "--subtitles": options.subtitles,
        "--annotated": options.annotated,
    }
    of_one = [name for name, path in pictures.items() if path is not None]
    if of_one and len(videos) != 1:
        raise usage_error(
            f"{of_one[0]} is of one video, and {len(videos)} were given; give one, or leave "
            f"{of_one[0]} out."
        )
    try:
        window, stride = recognizer.bank.grid_for(options.window_seconds, options.stride_seconds)
        options = replace(options, window_seconds=window, stride_seconds=stride)
        grid = options.grid(bundle.manifest)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ThresholdWarning)
            watched = WatchedLabels.of(
                recognizer.bank, recognizer.method, thresholds=options.threshold
            )
    except ArgumentError:
        raise  # told by its option
    except ValueError as exc:
        raise usage_error(str(exc).replace("thresholds", "--threshold")) from exc
    for warning in caught:
        print_warning(
            str(warning.message).replace("give thresholds that were", "give a --threshold that was")
        )
    if (
        options.window_seconds is None
        and bundle.manifest.model.clip_seconds is None
        and not as_json
    ):
        print_warning(
            f"The model does not say how long the clips of its training were; windows are "
            f"{grid.window_seconds:g} seconds long. Of Kinetics, which most checkpoints were "
            "trained on, they are 10 (--window 10)."
        )

    def write(timeline: Timeline) -> None:
        if options.matrix is not None:
            write_score_matrix(options.matrix, timeline)
        if options.subtitles is not None:
            timeline.save_subtitles(options.subtitles)
        if options.annotated is not None:
            timeline.save_annotated(options.annotated)
        if plot is not None:
            timeline.plot(plot)

    def score_all(todo: Sequence[Path]) -> Iterator[TimelineRecord]:
        return _score_all(recognizer, todo, grid, watched, options.still, write, quiet=as_json)

    if output is None:
        with closing(score_all(videos)) as records:  # type: ignore[type-var]
            return _report(records, as_json=as_json, shows_events=True)
    run = _describe_run(bundle, recognizer, grid, options)
    with open_result_file(
        output, run, resume=resume, overwrite=overwrite, finish=event_table(output)
    ) as file:
        todo = [video for video in videos if str(video) not in file.done]
        told = tells_when_interrupted(lambda: file.tell(videos, output, overwrite=overwrite))
        with told, closing(score_all(todo)) as records:  # type: ignore[type-var]
            _report(map(file.add, records), as_json=as_json, shows_events=False)
        num_failed = file.num_failed(videos)
    if not as_json:
        results.print(
            f"{len(videos) - num_failed} of {len(videos)} videos scored, {num_failed} failed "
            f"({len(videos) - len(todo)} were done before); results are in {escape(str(output))}."
        )
    return num_failed


def _score_all(
    recognizer: Recognizer,
    videos: Sequence[Path],
    grid: WindowGrid,
    watched: WatchedLabels,
    still: float,
    write: Callable[[Timeline], None],
    *,
    quiet: bool,
) -> Iterator[TimelineRecord]:
    for video in videos:
        with progress_bar(quiet=quiet) as bar:
            task = bar.add_task(escape(printable(video.name, kept="")), total=None)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VideoWarning)  # they are in the record
                    timeline = read_timeline(
                        recognizer,
                        video,
                        grid,
                        watched=watched,
                        still=still,
                        progress=partial(_advance, bar, task),
                    )
            except VideoError as exc:
                error = ErrorRecord(status=None, code="video_unreadable", message=str(exc))
                yield TimelineRecord(video=str(video), name=video.name, error=error)
                continue
        write(timeline)
        yield timeline.record()


def _advance(bar: Progress, task: TaskID, done: float, total: float) -> None:
    bar.update(task, completed=round(done), total=max(1, round(total)))


def _report(records: Iterator[TimelineRecord], *, as_json: bool, shows_events: bool) -> int:
    num_failed = 0
    for record in records:
        for warning in record.warnings:
            print_warning(warning)
        if record.error is not None:
            num_failed += 1
            print_error(record.error.message)
        if as_json:
            print_json_line(record)
        elif shows_events and record.error is None:
            results.print(_event_table(record))
    return num_failed


def _event_table(record: TimelineRecord) -> Table:
    length = clock_text(record.duration_seconds or 0.0)
    windows = counted(record.num_windows or 0, "window")
    title = f"{escape(printable(record.name, kept=''))}, {length}, {windows}"
    table = Table(title=title, title_justify="left")
    for heading in ("from", "to", "label", "mean", "peak"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for event in record.events or ():
        table.add_row(
            clock_text(event.start_seconds),
            clock_text(event.end_seconds),
            escape(printable(event.label, kept="")),
            f"{event.mean:.3f}",
            f"{event.peak:.3f}",
        )
    if not record.events:
        table.add_row("", "", "no label held", "", "")
    return table


def _describe_run(
    bundle: Bundle, recognizer: Recognizer, grid: WindowGrid, options: TimelineOptions
) -> TimelineRunRecord:
    """All that a result depends on but for its video and the versions of libraries."""
    bank, info = recognizer.bank, recognizer.runtime.describe()
    return TimelineRunRecord(
        bundle_sha256=sha256_of((bundle.path / "manifest.json").read_bytes()),
        bank=None if bank.is_adhoc else bank.name,
        bank_sha256=bank.sha256,
        window_seconds=grid.window_seconds,
        stride_seconds=grid.stride_seconds,
        threshold=options.threshold,
        still=options.still,
        scores=recognizer.method,
        resize=recognizer.region,
        decoder=recognizer.decoder,
        runtime=info.name,
        execution_provider=info.execution_provider,
        precision=info.precision,
    )
