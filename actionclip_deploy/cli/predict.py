"""`actionclip predict`: rank labels for videos."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    FOLDERS,
    BundlePath,
    FolderOptions,
    JsonOption,
    LabelOptions,
    MethodOption,
    NoVerifyOption,
    OverwriteOption,
    PlotOption,
    ReadingOptions,
    ResumeOption,
    RunOptions,
    TopKOption,
    VideosArgument,
    ViewsOption,
    warn_of_one_label,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    report_videos,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.result_files import (
    TABLE_SUFFIXES,
    check_result_path,
    is_result_folder,
    label_table,
    open_result_file,
)
from actionclip_deploy.cli.timeline import TimelineOptions, predict_timelines
from actionclip_deploy.errors import VideoWarning
from actionclip_deploy.files import sha256_of
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import Prediction, Recognizer
from actionclip_deploy.records import RunRecord, VideoRecord
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import Views


def predict(
    context: typer.Context,
    bundle: BundlePath,
    videos: VideosArgument,
    labels: LabelOptions,
    running: RunOptions,
    top_k: TopKOption = 5,
    views: ViewsOption = "1x1",
    method: MethodOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="Write results to a file: .jsonl, a line as each video ends; .csv or .parquet, a "
            "row for each label. Or into a folder, a name without a suffix: Parquet files with a "
            "row for each of many videos.",
        ),
    ] = None,
    as_json: JsonOption = False,
    reading: ReadingOptions = ReadingOptions(),  # noqa: B008 - only its fields are used
    many: FolderOptions = FolderOptions(),  # noqa: B008 - only its fields are used
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="Keep the embeddings of each video as well.",
            rich_help_panel=FOLDERS,
        ),
    ] = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    plot: PlotOption = None,
    no_verify: NoVerifyOption = False,
    over_time: TimelineOptions = TimelineOptions(),  # noqa: B008 - only its fields are used
) -> None:
    """Rank labels for videos: those of a label bank, of a file, or given one by one.

    Labels that are not in a bank are embedded once and kept in the cache. A name that is both a
    bank's and a file's is the bank's; ./NAME is the file's.

    A video that fails is reported in its place and the others go on; the exit code is then 3.
    With --json, one object per video is printed, each on a line of its own. Of a folder, the
    files with the suffix of a video are scored, sorted by name.

    Into a folder of results go videos of any number, from lists and storage as well, the largest
    first. With --resume, what is missing is done, and what failed by chance is tried again.

    Example:
        actionclip predict bundle video.mp4 --label "archery" --label "bowling"
        actionclip predict bundle videos/ --labels labels.csv -o results.jsonl
        actionclip predict bundle s3://bucket/videos/ --labels labels.csv -o results
        actionclip predict bundle long.mp4 --labels labels.csv --timeline
    """
    if output is None and (resume or overwrite):
        raise usage_error("--resume and --overwrite are about --output, which was not given.")
    if plot is not None:
        # Before the work, so that a missing package or folder is not found out after it.
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
    in_folder = is_result_folder(output)
    many.check(context, in_folder=in_folder)
    if not in_folder:
        check_result_path(output, TABLE_SUFFIXES)
    over_time.check_alone()
    if over_time.timeline and views != "1x1":
        raise usage_error("--views is not for --timeline, whose windows are one clip each.")
    opened = Bundle.open(bundle, verify=not no_verify)
    labels.sentences()  # what is wrong with them is told before a model is loaded
    chosen = labels.choose(opened)
    asked = Views.parse(views)
    if in_folder:
        assert output is not None
        settings = many.settings(reading, asked, top_k=top_k, method=method, embeddings=embeddings)
        from actionclip_deploy.cli.video_runs import run_into_folder

        def bank_of(runtime: Runtime) -> LabelBank:
            bank = labels.bank(opened, runtime, chosen, quiet=as_json)
            warn_of_one_label(bank, bank.method_for(method, opened.manifest.scores.method))
            return bank

        summary = run_into_folder(
            opened,
            videos,
            settings,
            running,
            bank_of,
            engine=many,
            rows_per_file=many.rows_per_file,
            output=output,
            recursive=reading.recursive,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )
        if summary.num_failed:
            raise typer.Exit(EXIT_SOME_FAILED)
        return
    found = reading.find_local(videos)
    drawn: list[Prediction] | None = None if plot is None else []
    with running.open(opened, prefer="latency" if len(found) == 1 else "throughput") as runtime:
        bank = labels.bank(opened, runtime, chosen, quiet=as_json)
        warn_of_one_label(bank, bank.method_for(method, opened.manifest.scores.method))
        with wrong_arguments_are_usage_errors():
            recognizer = Recognizer(
                runtime,
                bank,
                views=asked,
                top_k=top_k,
                method=method,
                region=reading.region,
                decoder=reading.decoder,
                max_pixels=reading.max_pixels,
                reuse=reading.reuse,
            )
        if over_time.timeline:
            num_failed = predict_timelines(
                opened,
                recognizer,
                found,
                over_time,
                output=output,
                resume=resume,
                overwrite=overwrite,
                plot=plot,
                as_json=as_json,
            )
        elif output is None:
            records = _predict_all(recognizer, found, reading.workers, drawn)
            with closing(records):
                num_failed = report_videos(
                    records,
                    num_videos=len(found),
                    as_json=as_json,
                    tell=lambda num: (
                        f"{num} of {len(found)} videos were scored; with --output "
                        "FILE.jsonl results are kept, and --resume goes on."
                    ),
                )
        else:
            run = _describe_run(opened, recognizer)
            with open_result_file(
                output, run, resume=resume, overwrite=overwrite, finish=label_table(output)
            ) as file:
                todo = [video for video in found if str(video) not in file.done]
                records = _predict_all(recognizer, todo, reading.workers, drawn)
                with closing(records):
                    num_done = len(found) - len(todo)
                    report_videos(
                        map(file.add, records),
                        num_videos=len(found),
                        num_done=num_done,
                        as_json=as_json,
                        shows_table=False,
                        tell=lambda _: file.tell(found, output, overwrite=overwrite),
                    )
                num_failed = file.num_failed(found)
            if not as_json:
                results.print(
                    f"{len(found) - num_failed} of {len(found)} videos scored, {num_failed} failed "
                    f"({num_done} were done before); results are in {escape(str(output))}."
                )
    if plot is not None and drawn:
        from actionclip_deploy.cli.plot import plot_predictions

        plot_predictions(drawn, plot)
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _predict_all(
    recognizer: Recognizer,
    videos: Sequence[Path],
    num_workers: int | None,
    drawn: list[Prediction] | None,
) -> Generator[VideoRecord, None, None]:
    """Score videos; warnings about one are in its record. Keeps predictions that are drawn."""
    with closing(recognizer.predict_all(videos, num_workers=num_workers)) as outcomes:
        while True:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", VideoWarning)
                outcome = next(outcomes, None)
            if outcome is None:
                return
            if drawn is not None and isinstance(outcome, Prediction):
                drawn.append(outcome)
            damage = [str(warning.message) for warning in caught]
            yield recognizer.record(outcome, damage=damage)


def _describe_run(bundle: Bundle, recognizer: Recognizer) -> RunRecord:
    """All that a result depends on but for its video and the versions of libraries."""
    bank, info = recognizer.bank, recognizer.runtime.describe()
    manifest = (bundle.path / "manifest.json").read_bytes()
    return RunRecord(
        bundle_sha256=sha256_of(manifest),
        bank=None if bank.is_adhoc else bank.name,
        bank_sha256=bank.sha256,
        views=str(recognizer.views),
        scores=recognizer.method,
        resize=recognizer.region,
        top_k=recognizer.top_k,
        decoder=recognizer.decoder,
        runtime=info.name,
        execution_provider=info.execution_provider,
        precision=info.precision,
    )
