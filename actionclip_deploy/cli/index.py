"""`actionclip index`: the windows of videos are embedded once, to be searched by words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from actionclip_deploy.archive import ArchivedVideo, ArchiveWriter
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    WINDOWS,
    BundlePath,
    EngineOptions,
    GridOptions,
    JsonOption,
    NoVerifyOption,
    ReadingOptions,
    RunOptions,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    notes,
    print_error,
    print_json,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import IndexRecord
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.indexing import (
    STATIC_COSINE,
    IndexedVideo,
    archive_model,
    index_videos,
    what_changed,
)
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.records import UnreadVideo
from actionclip_deploy.search import APPROXIMATE_WINDOWS, Archive
from actionclip_deploy.stream import WindowGrid

# From this share of unused rows on, the vectors are written anew at the end.
_COMPACT_SHARE = 0.25


def index(
    context: typer.Context,
    bundle: BundlePath,
    videos: Annotated[
        list[Path],
        typer.Argument(metavar="VIDEO...", help="Video files, and folders of video files."),
    ],
    running: RunOptions,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="ARCHIVE", help="Folder of the archive, new or there already."
        ),
    ],
    as_json: JsonOption = False,
    windows: GridOptions = GridOptions(),  # noqa: B008 - only its fields are used
    thumbnails: Annotated[
        bool,
        typer.Option("--thumbnails", help="Keep a picture of each stored window."),
    ] = False,
    static: Annotated[
        float,
        typer.Option(
            "--static",
            min=0.5,
            max=2.0,
            metavar="COSINE",
            help="Windows this near to the last stored one are stored with it; 2 for none.",
            rich_help_panel=WINDOWS,
        ),
    ] = STATIC_COSINE,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try videos again that failed and did not change."),
    ] = False,
    reading: ReadingOptions = ReadingOptions(),  # noqa: B008 - only its fields are used
    engine: EngineOptions = EngineOptions(),  # noqa: B008 - only its fields are used
    no_verify: NoVerifyOption = False,
) -> None:
    """Embed the windows of videos into an archive, which `actionclip search` looks through.

    Videos that the archive has already and that did not change are passed over, changed ones are
    done again, and those of a given folder that are gone leave it. Each video is stored as a
    whole, so the same command goes on after an interruption. A video that fails is reported and
    noted in the archive, and the exit code is then 3. The archive can be searched meanwhile.

    Example:
        actionclip index bundle recordings/ --output archive --recursive
    """
    engine.check_engine(context)
    if engine.is_ray and reading.decoder != "software":
        raise usage_error(
            f"--decoder is {reading.decoder}, and --engine ray decodes on CPUs; leave it out."
        )
    opened = Bundle.open(bundle, verify=not no_verify)
    with wrong_arguments_are_usage_errors():
        grid = windows.grid(opened.manifest)
    started = time.monotonic()
    folders = [path for path in videos if path.is_dir()]
    found = reading.find(videos)
    with ExitStack() as stack:
        work: _Work
        if engine.is_ray:
            work = _on_ray(opened, grid, running, reading, engine, static, thumbnails)
            encoder: VideoEncoder | str = f"{running.runtime}, on Ray"
        else:
            runtime = stack.enter_context(running.open(opened))
            with wrong_arguments_are_usage_errors():
                encoder = VideoEncoder(
                    runtime,
                    region=reading.region,
                    decoder=reading.decoder,
                    max_pixels=reading.max_pixels,
                )
            work = partial(
                index_videos,
                encoder,
                grid=grid,
                thumbnails=thumbnails,
                num_workers=reading.workers,
            )
        model = archive_model(opened, encoder, grid, static_cosine=static)
        writer = stack.enter_context(ArchiveWriter.open(output, model))
        known = writer.videos()
        todo, num_same = what_changed(known, found, retry_failed=retry_failed)
        gone = _gone(known, folders, recursive=reading.recursive)
        num_removed = writer.remove(gone)
        failed: list[UnreadVideo] = []
        num_encoded = num_done = 0

        def tell() -> str:
            return (
                f"{num_done} of {len(todo)} videos are in {output} as a whole; the same "
                "command goes on."
            )

        with tells_when_interrupted(tell), progress_bar(quiet=as_json) as bar:
            task = bar.add_task("Indexing videos", total=len(todo))
            with closing(work(writer, todo)) as indexed:
                for each in indexed:
                    for warning in each.warnings:
                        print_warning(warning)
                    if each.video.error is not None:
                        failed.append(UnreadVideo(video=each.video.path, error=each.video.error))
                        print_error(each.video.error)
                    num_encoded += each.num_windows
                    num_done += 1
                    bar.advance(task)
        now = writer.videos()
        num_windows = sum(video.num_windows for video in now.values())
        if writer.num_unused_rows() > _COMPACT_SHARE * max(1, num_windows):
            writer.compact()
    if num_windows >= APPROXIMATE_WINDOWS:
        _prepare_approximate(output)
    record = IndexRecord(
        archive=str(output),
        num_added=num_done - len(failed),
        num_unchanged=num_same,
        num_removed=num_removed,
        num_failed=len(failed),
        failed=tuple(failed),
        num_windows_encoded=num_encoded,
        num_windows=num_windows,
        seconds=round(time.monotonic() - started, 3),
    )
    if as_json:
        print_json(record)
    else:
        _print(record, now.values(), is_new=not known)
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


_Work = Callable[[ArchiveWriter, Sequence[Path]], Generator[IndexedVideo, None, None]]


def _on_ray(
    bundle: Bundle,
    grid: WindowGrid,
    running: RunOptions,
    reading: ReadingOptions,
    engine: EngineOptions,
    static_cosine: float,
    thumbnails: bool,
) -> _Work:
    """As `index_videos`, on a cluster, which is connected to where there are videos to encode."""
    from actionclip_deploy.scale import ray_data

    def work(writer: ArchiveWriter, videos: Sequence[Path]) -> Generator[IndexedVideo, None, None]:
        if not videos:
            return
        ray_data.connect(engine.address)
        plan = ray_data.plan_index_on_ray(
            bundle,
            grid,
            static_cosine=static_cosine,
            thumbnails=thumbnails,
            region=reading.region,
            max_pixels=reading.max_pixels,
            runtime=running.asked("throughput"),
            num_actors=engine.actors,
        )
        with closing(ray_data.encode_on_ray(videos, plan)) as encoded:
            for each in encoded:
                yield each.store(writer)

    return work


def _prepare_approximate(archive: Path) -> None:
    """Build what `search` takes in an archive of this size, so that no search has to wait."""

    def tell(num: int) -> None:
        notes.print(
            f"Building the index of {num:,} windows for approximate search", highlight=False
        )

    try:
        with Archive.open(archive) as opened:
            opened.prepare_approximate(tell)
    except MissingExtraError as exc:
        print_warning(f"Searches of {archive} score all windows. {exc}")


def _gone(
    known: dict[str, ArchivedVideo], folders: Sequence[Path], *, recursive: bool
) -> list[str]:
    """Videos of the archive that lay in one of the given folders and do no longer."""
    roots = [Path(os.path.abspath(folder)) for folder in folders]  # noqa: PTH100 - links stay
    gone = []
    for name in known:
        path = Path(name)
        is_inside = any(
            root in path.parents if recursive else root == path.parent for root in roots
        )
        if is_inside and not path.exists():
            gone.append(name)
    return gone


def _print(record: IndexRecord, videos: Iterable[ArchivedVideo], *, is_new: bool) -> None:
    minutes = sum(video.duration_seconds for video in videos) / 60
    length = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    parts = [
        f"{record.num_added} videos added",
        f"{record.num_unchanged} unchanged",
        *([f"{record.num_removed} removed"] if record.num_removed else []),
        *([f"{record.num_failed} failed"] if record.num_failed else []),
    ]
    results.print(
        f"{', '.join(parts)}; {escape(record.archive)} has {record.num_windows:,} windows of "
        f"{length} of video.",
        highlight=False,
    )
    if is_new and record.num_windows:
        notes.print(
            f'Search it with: actionclip search {record.archive} "what is to be seen"',
            highlight=False,
            markup=False,
        )
