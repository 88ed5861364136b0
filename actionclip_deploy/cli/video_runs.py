"""Runs of `predict` and `embed` over many videos, into a folder of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import EngineOptions, RunOptions
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import BatchSummaryRecord
from actionclip_deploy.errors import VideoError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.evaluate import Evaluation, measure_outcomes
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import FailedVideo, Recognizer
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.scale.batch import BatchReader, BatchSettings, Scorer, score_here
from actionclip_deploy.scale.result_folder import (
    ResultFolder,
    check_result_folder,
    open_result_folder,
    result_schema,
)
from actionclip_deploy.scale.storage import describe_all
from actionclip_deploy.scale.video_list import (
    LIST_SCHEMA,
    largest_first,
    list_videos_of,
    table_of,
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
    engine: EngineOptions,
    rows_per_file: int,
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
        engine: Which machines do it.
        rows_per_file: Most rows of a part file.
        output: The folder.
        recursive: Whether folders in folders are looked through.
        resume: Whether to go on with it.
        overwrite: Whether to replace it.
        as_json: Whether to print the summary as JSON.
    """
    check_result_folder(output, resume=resume, overwrite=overwrite)
    videos = largest_first(list_videos_of(given, recursive=recursive))
    more = [field for field in videos.schema if field.name not in LIST_SCHEMA.names]
    with ExitStack() as stack:
        if engine.is_ray:
            bank = None if bank_of is None else bank_on_driver(bundle, bank_of)
        else:
            runtime = stack.enter_context(running.open(bundle, prefer="throughput"))
            bank = None if bank_of is None else bank_of(runtime)
        run = settings.run(bundle, bank)
        with wrong_arguments_are_usage_errors():
            ranker = settings.ranker(bundle.manifest, bank)
            dim = bundle.manifest.model.embedding_dim
            schema = result_schema(run, embedding_dim=dim, more=more)
        folder = stack.enter_context(
            open_result_folder(
                output,
                run,
                schema,
                videos,
                resume=resume,
                overwrite=overwrite,
                engine=engine.engine,
                rows_per_file=rows_per_file,
            )
        )
        told = stack.enter_context(_progress(folder, quiet=as_json))
        if len(folder.todo):
            if engine.is_ray:
                tables = rows_on_ray(bundle, bank, settings, running, engine, folder.left)
            else:
                scorer = Scorer(runtime, settings, run, ranker, more=more)
                reader = stack.enter_context(BatchReader(bundle.manifest, settings))
                tables = score_here(videos_in(folder.todo), reader, scorer)
            with closing(tables):
                for table in tables:
                    told(folder.add(table))
    return _report(output, as_json=as_json)


def bank_on_driver(bundle: Bundle, bank_of: Callable[[Runtime], LabelBank]) -> LabelBank:
    """The labels of a run on a cluster, by a runtime that is let go of again."""
    with open_runtime(bundle, "onnxruntime", device="cpu") as runtime:
        return bank_of(runtime)


def rows_on_ray(
    bundle: Bundle,
    bank: LabelBank | None,
    settings: BatchSettings,
    running: RunOptions,
    engine: EngineOptions,
    left: Callable[[], Any],
) -> Generator[Any, None, None]:
    """Tables of rows from a cluster, see `ray_data.score_on_ray`."""
    from actionclip_deploy.scale import ray_data

    ray_data.connect(engine.address)
    plan = ray_data.plan_on_ray(
        bundle, bank, settings, runtime=running.asked("throughput"), num_actors=engine.actors
    )
    yield from ray_data.score_on_ray(left, plan)


def evaluate_on_ray(
    bundle: Bundle,
    recognizer: Recognizer,
    samples: Sequence[Sample],
    running: RunOptions,
    engine: EngineOptions,
    *,
    on_video: Callable[[FailedVideo | None], None],
) -> Evaluation:
    """Measure annotated videos that a cluster scores; nothing is kept of them.

    Args:
        bundle: The model.
        recognizer: How videos are scored; the runtime of rows is that of its nodes.
        samples: Whole video files, under paths that each node knows.
        running: The runtime that nodes open.
        engine: The cluster.
        on_video: Called after each video, with the failure or None.
    """
    if any(each.image_template or each.start_seconds is not None for each in samples):
        raise usage_error(
            "--engine ray takes whole video files, and the annotations name folders of frames or "
            "parts of videos; leave it out."
        )
    labels = recognizer.bank.labels
    settings = BatchSettings(
        views=recognizer.views,
        top_k=len(labels),
        method=recognizer.method,
        max_pixels=recognizer.max_pixels,
    )
    uris = [str(each.path.absolute()) for each in samples]
    rows: dict[str, dict[str, Any]] = {}

    def left() -> Any:
        missing = [uri for uri in dict.fromkeys(uris) if uri not in rows]
        return largest_first(table_of(list(describe_all(missing))))

    place = {label: index for index, label in enumerate(labels)}

    def outcomes() -> Iterator[tuple[Sample, Float32Array | FailedVideo]]:
        tables = rows_on_ray(bundle, recognizer.bank, settings, running, engine, left)
        with closing(tables):
            for table in tables:
                for row in table.select(["uri", "error", "labels", "scores"]).to_pylist():
                    if row["uri"] not in rows:
                        error = row["error"] and VideoError(row["error"])
                        on_video(FailedVideo(Path(row["uri"]), error) if error else None)
                    rows[row["uri"]] = row
        for sample, uri in zip(samples, uris, strict=True):
            row = rows[uri]
            if row["error"]:
                yield sample, FailedVideo(sample.path, VideoError(row["error"]))
                continue
            scores = np.empty(len(labels), np.float32)
            scores[[place[label] for label in row["labels"]]] = row["scores"]
            yield sample, scores

    return measure_outcomes(
        outcomes(),
        recognizer.bank,
        runtime=recognizer.runtime.describe(),
        views=recognizer.views,
        method=recognizer.method,
    )


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
