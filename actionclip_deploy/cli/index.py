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

from actionclip_deploy.archive import (
    VECTORS_NAME,
    ArchivedVideo,
    ArchiveWriter,
    is_archive,
)
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
    what_is_gone,
)
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.records import UnreadVideo, counted
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
    remove_gone_folders: Annotated[
        bool,
        typer.Option(
            "--remove-gone-folders",
            help="Remove videos whose own folder is gone or empty, too; they are kept otherwise, "
            "since a disk may not be mounted.",
        ),
    ] = False,
    reading: ReadingOptions = ReadingOptions(),  # noqa: B008 - only its fields are used
    engine: EngineOptions = EngineOptions(),  # noqa: B008 - only its fields are used
    no_verify: NoVerifyOption = False,
) -> None:
    """Embed the windows of videos into an archive, which `actionclip search` looks through.

    Videos that the archive has already and that did not change are passed over, changed ones are
    done again, and those of a given folder that are gone leave it. Each video is stored as a
    whole, so the same command goes on after an interruption. A video that fails is reported and
    noted in the archive. The exit code is 3 while one of the given videos has failed, in this run
    or before. The archive can be searched meanwhile.

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
    if not is_archive(output) and not any(map(os.path.lexists, found)):
        which = f"{found[0]} is not" if len(found) == 1 else f"None of the {len(found)} videos is"
        raise usage_error(f"{which} there; give video files, and folders of such.")
    with ExitStack() as stack:
        work: _Work
        if engine.is_ray:
            work = _on_ray(opened, grid, running, reading, engine, static, thumbnails)
            what = f"{running.runtime}, on Ray"
        else:
            runtime = stack.enter_context(running.open(opened))
            with wrong_arguments_are_usage_errors():
                encoder = VideoEncoder(
                    runtime,
                    region=reading.region,
                    decoder=reading.decoder,
                    max_pixels=reading.max_pixels,
                )
            what = runtime.describe().title
            work = partial(
                index_videos,
                encoder,
                grid=grid,
                thumbnails=thumbnails,
                num_workers=reading.workers,
            )
        model = archive_model(opened, what, grid, static_cosine=static, region=reading.region)
        writer = stack.enter_context(ArchiveWriter.open(output, model))
        known = writer.videos()
        changes = what_changed(known, found, retry_failed=retry_failed)
        todo = changes.todo
        _tell_damage(output, writer.damaged, todo)
        gone, unmounted = what_is_gone(known, folders, recursive=reading.recursive)
        if remove_gone_folders:
            gone, unmounted = [*gone, *unmounted], []
        elif unmounted:
            _tell_unmounted(output, unmounted)
        num_removed = writer.remove(gone)
        if thumbnails and changes.num_same:
            _tell_pictures(writer, todo)
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
                        failed.append(_unread(each.video))
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
    before = tuple(_unread(each) for each in changes.failed_before)
    record = IndexRecord(
        archive=str(output),
        num_added=num_done - len(failed),
        num_unchanged=changes.num_same,
        num_removed=num_removed,
        num_kept=len(unmounted),
        num_failed=len(failed),
        failed=tuple(failed),
        num_failed_before=len(before),
        failed_before=before,
        num_damaged=len(writer.damaged),
        num_undated=sum(
            video.error is None and video.recorded_seconds is None for video in now.values()
        ),
        num_windows_encoded=num_encoded,
        num_windows=num_windows,
        seconds=round(time.monotonic() - started, 3),
    )
    if as_json:
        print_json(record)
    else:
        _print(record, now.values(), is_new=not known)
    if failed or before:
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
        what = counted(num, "window")
        notes.print(f"Building the index of {what} for approximate search", highlight=False)

    try:
        with Archive.open(archive) as opened:
            opened.prepare_approximate(tell)
    except MissingExtraError as exc:
        print_warning(f"Searches of {archive} score all windows. {exc}")


def _unread(video: ArchivedVideo) -> UnreadVideo:
    return UnreadVideo(video=video.path, error=video.error or "")


def _tell_damage(archive: Path, damaged: Sequence[str], todo: Sequence[Path]) -> None:
    if not damaged:
        return
    given = set(map(str, todo))
    num_others = sum(name not in given for name in damaged)
    others = f"; those that are not given ({num_others}) are noted as failed"
    print_warning(
        f"The windows of {counted(len(damaged), 'video')} of {archive} are lost, since files in "
        f"{archive / VECTORS_NAME} are cut off or missing. What is given is done again"
        f"{others if num_others else ''}."
    )


def _tell_unmounted(archive: Path, videos: Sequence[str]) -> None:
    folders = list(dict.fromkeys(Path(name).parent for name in videos))
    which = folders[0] if len(folders) == 1 else f"{folders[0]} and {len(folders) - 1} more"
    print_warning(
        f"{archive} keeps what it has of folders that are gone or empty "
        f"({counted(len(videos), 'video')} of {which}), as where a disk is not mounted; if that "
        "is for good, add --remove-gone-folders."
    )


def _tell_pictures(writer: ArchiveWriter, todo: Sequence[Path]) -> None:
    """Say how many videos keep no pictures, since they are in the archive already."""
    done_again = set(map(str, todo))
    without = [name for name in writer.without_thumbnails() if name not in done_again]
    if without:
        notes.print(
            f"Of {counted(len(without), 'video')} that {writer.folder} has already no pictures "
            "were kept; to have them of all, make a new archive with --thumbnails.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _print(record: IndexRecord, videos: Iterable[ArchivedVideo], *, is_new: bool) -> None:
    minutes = sum(video.duration_seconds for video in videos if video.error is None) / 60
    length = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    before = (
        f"{record.num_failed_before} failed before (`actionclip inspect` lists them, and "
        "--retry-failed tries them again)"
    )
    parts = [
        f"{counted(record.num_added, 'video')} added",
        f"{record.num_unchanged} unchanged",
        *([f"{record.num_removed} removed"] if record.num_removed else []),
        *([f"{record.num_failed} failed"] if record.num_failed else []),
        *([before] if record.num_failed_before else []),
    ]
    results.print(
        f"{', '.join(parts)}; {escape(record.archive)} has "
        f"{counted(record.num_windows, 'window')} of {length} of video.",
        highlight=False,
    )
    if record.num_undated:
        notes.print(
            f"The time of recording is unknown of {counted(record.num_undated, 'video')}, since "
            "nothing in the name tells it; --from and --to leave out such videos.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if is_new and record.num_windows:
        notes.print(
            f'Search it with: actionclip search {record.archive} "what is to be seen"',
            highlight=False,
            markup=False,
        )
