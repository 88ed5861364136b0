"""Runs of `predict` and `embed` over many videos, into a folder of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rich.markup import escape

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import RunOptions
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    progress_bar,
    results,
    tells_when_interrupted,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import BatchSummaryRecord
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.scale.batch import BatchReader, BatchSettings, Scorer, score_here
from actionclip_deploy.scale.result_folder import ResultFolder, open_result_folder
from actionclip_deploy.scale.video_list import (
    LIST_SCHEMA,
    largest_first,
    list_videos_of,
    videos_in,
)

# Where standard error is not a terminal, such as a cluster's log, a line now and then.
_TELL_SECONDS = 30.0


def run_into_folder(
    bundle: Bundle,
    given: Sequence[str],
    settings: BatchSettings,
    running: RunOptions,
    bank_of: Callable[[Runtime], LabelBank] | None,
    *,
    output: Path,
    recursive: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> BatchSummaryRecord:
    """Score or embed videos into a folder.

    Args:
        bundle: The model.
        given: Folders, files, wildcards, prefixes, addresses and lists.
        settings: How videos are read and scored.
        running: The runtime.
        bank_of: Gives the labels; None for embeddings alone.
        output: The folder.
        recursive: Whether folders in folders are looked through.
        resume: Whether to go on with it.
        overwrite: Whether to replace it.
        as_json: Whether to print the summary as JSON.
    """
    videos = largest_first(list_videos_of(given, recursive=recursive))
    more = [field for field in videos.schema if field.name not in LIST_SCHEMA.names]
    with running.open(bundle) as runtime:
        bank = None if bank_of is None else bank_of(runtime)
        run = settings.run(bundle, bank)
        with wrong_arguments_are_usage_errors():
            ranker = settings.ranker(bundle.manifest, bank)
            scorer = Scorer(runtime, settings, run, ranker, more=more)
        opened = open_result_folder(
            output, run, scorer.schema, videos, resume=resume, overwrite=overwrite
        )
        with opened as folder, _progress(folder, quiet=as_json) as told:
            if len(folder.todo):
                with BatchReader(bundle.manifest, settings) as reader:
                    tables = score_here(videos_in(folder.todo), reader, scorer)
                    with closing(tables):
                        for table in tables:
                            told(folder.add(table))
    return _report(output, as_json=as_json)


@contextmanager
def _progress(folder: ResultFolder, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Give what is told how many videos are done: it shows the rate, failures and time left."""
    total, before = len(folder.videos), folder.num_before
    started = last = time.monotonic()
    done = 0

    def state() -> str:
        rate = done / max(1e-9, time.monotonic() - started)
        num_failed = folder.num_now - folder.counts["ok"]
        left = (total - before - done) / rate if rate else 0.0
        return f"{num_failed:,} failed, {rate:,.1f} a second, {_in_words(left)} left"

    def tell_interrupted() -> str:
        num_kept = before + folder.num_now
        return (
            f"{num_kept:,} of {total:,} videos are done, with their results in {folder.path}; the "
            "same command with --resume goes on."
        )

    with tells_when_interrupted(tell_interrupted), progress_bar(quiet=quiet) as bar:
        task = bar.add_task("Scoring videos", total=total, completed=before)

        def told(count: int) -> None:
            nonlocal done, last
            done += count
            bar.update(task, advance=count, description=f"Scoring videos ({state()})")
            if not quiet and not notes.is_terminal and time.monotonic() - last > _TELL_SECONDS:
                last = time.monotonic()
                notes.print(f"{before + done:,} of {total:,} videos: {state()}", highlight=False)

        yield told


def _in_words(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _report(output: Path, *, as_json: bool) -> BatchSummaryRecord:
    text = (output / "summary.json").read_text(encoding="utf-8")
    summary = BatchSummaryRecord.model_validate_json(text)
    if as_json:
        print_json(summary)
        return summary
    kinds = ", ".join(f"{num:,} {kind}" for kind, num in summary.failed.items())
    results.print(
        f"{summary.num_before + summary.num_now:,} of {summary.num_videos:,} videos are done "
        f"({summary.num_before:,} were before), {summary.num_failed:,} failed"
        f"{f' ({kinds})' if kinds else ''}; {summary.num_rows:,} rows are in "
        f"{escape(str(output))}.",
        highlight=False,
    )
    return summary
