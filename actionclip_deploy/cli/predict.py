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
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    BaseOption,
    BundlePath,
    CheckpointOption,
    JsonOption,
    LabelOption,
    MaxPixelsOption,
    NoVerifyOption,
    OverwriteOption,
    ProviderOption,
    RuntimeOption,
    ThreadsOption,
    UnknownWordsOption,
    find_videos,
    given_texts,
    names_a_file,
    progress_bar,
    report_videos,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.result_files import (
    TABLE_SUFFIXES,
    check_result_path,
    label_table,
    open_result_file,
)
from actionclip_deploy.cli.timeline import TimelineOptions, predict_timelines
from actionclip_deploy.errors import VideoWarning
from actionclip_deploy.files import sha256_of
from actionclip_deploy.labels import LabelBank, bank_for
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.recognizer import Prediction, Recognizer
from actionclip_deploy.records import RunRecord, VideoRecord
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.machine import check_num_threads
from actionclip_deploy.sampling import Views
from actionclip_deploy.video import MAX_PIXELS, Decoder


def predict(
    bundle: BundlePath,
    videos: Annotated[
        list[Path],
        typer.Argument(metavar="VIDEO...", help="Video files, and folders of video files."),
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="NAME|FILE",
            help="A label bank of the bundle, or a file of labels; by default the only bank.",
        ),
    ] = None,
    own_labels: LabelOption = None,
    allow_unknown_words: UnknownWordsOption = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Labels per video.")] = 5,
    views: Annotated[
        str, typer.Option("--views", help="Clips x crops per video; the paper's best is 10x3.")
    ] = "1x1",
    method: Annotated[
        ScoreMethod | None,
        typer.Option(
            "--scores",
            help="The original's template-softmax, mean-embedding, or independent (multi-label).",
        ),
    ] = None,
    region: Annotated[
        Region,
        typer.Option("--resize", help="frame (exact), or crop: resize only what the crop keeps."),
    ] = "frame",
    runtime: RuntimeOption = "onnxruntime",
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    decoder: Annotated[
        Decoder,
        typer.Option("--decoder", help="What decodes: software, or nvdec of an NVIDIA GPU."),
    ] = "software",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    decode_threads: Annotated[
        int | None,
        typer.Option(
            "--decode-threads", min=1, help="Videos read at a time; by default, one per core."
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Look through the folders in a folder as well.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write results to a file: .jsonl, a line as each video ends; .csv or .parquet, a "
            "row for each label.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --output where a run was interrupted.")
    ] = False,
    overwrite: OverwriteOption = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the sampled frames and top labels."),
    ] = None,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline", help="Of long videos: find when labels hold, with start and end."
        ),
    ] = False,
    window: Annotated[
        float | None,
        typer.Option(
            "--window",
            metavar="SECONDS",
            help="Of a timeline: length of a window; by default that of the training clips, if "
            "known, or half a second for each frame.",
        ),
    ] = None,
    stride: Annotated[
        float | None,
        typer.Option(
            "--stride",
            metavar="SECONDS",
            help="Of a timeline: from one window to the next; by default window / frames.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Of a timeline: score at which a label holds; by default the label bank's.",
        ),
    ] = None,
    still: Annotated[
        float,
        typer.Option(
            "--still",
            min=0.0,
            max=255.0,
            help="Of a timeline: mean difference to the last encoded frame, 0 to 255, up to "
            "which a frame is not encoded; 0 changes no score.",
        ),
    ] = 0.0,
    matrix: Annotated[
        Path | None,
        typer.Option(
            "--matrix",
            metavar="FILE.npz|.parquet",
            help="Of a timeline: write the scores of all labels in each window.",
        ),
    ] = None,
    subtitles: Annotated[
        Path | None,
        typer.Option(
            "--subtitles", metavar="FILE.vtt|.srt", help="Of a timeline: write it as subtitles."
        ),
    ] = None,
    annotated: Annotated[
        Path | None,
        typer.Option(
            "--annotated",
            metavar="FILE.mp4",
            help="Of a timeline: write a copy of the video with its labels.",
        ),
    ] = None,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rank labels for videos: those of a label bank, of a file, or given one by one.

    Labels that are not in a bank are embedded once and kept in the cache. A name that is both a
    bank's and a file's is the bank's; ./NAME is the file's.

    A video that fails is reported in its place and the others go on; the exit code is then 3.
    With --json, one object per video is printed, each on a line of its own. Of a folder, the
    files with the suffix of a video are scored, sorted by name.
    """
    if output is None and (resume or overwrite):
        raise usage_error("--resume and --overwrite are about --output, which was not given.")
    if plot is not None:
        # Before the work, so that a missing package or folder is not found out after it.
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
    check_result_path(output, TABLE_SUFFIXES)
    over_time = TimelineOptions(window, stride, threshold, still, matrix, subtitles, annotated)
    over_time.check_alone(is_asked=timeline)
    if timeline and views != "1x1":
        raise usage_error("--views is not for --timeline, whose windows are one clip each.")
    opened = Bundle.open(bundle, verify=not no_verify)
    chosen = choose_labels(opened, labels, own_labels)
    found = find_videos(videos, recursive=recursive)
    with wrong_arguments_are_usage_errors():
        check_num_threads("--decode-threads", decode_threads)
        asked = Views.parse(views)
        running = open_runtime(
            opened,
            runtime,
            execution_provider=execution_provider,
            num_threads=threads,
            checkpoint=checkpoint,
            base=base,
        )
    drawn: list[Prediction] | None = None if plot is None else []
    with running:
        with progress_bar(quiet=as_json) as bar:
            task = bar.add_task("Embedding labels", total=None, visible=False)
            bank = bank_for(
                opened,
                running,
                chosen,
                allow_unknown_words=allow_unknown_words,
                progress=lambda done, total: bar.update(
                    task, completed=done, total=total, visible=True
                ),
            )
        with wrong_arguments_are_usage_errors():
            recognizer = Recognizer(
                running,
                bank,
                views=asked,
                top_k=top_k,
                method=method,
                region=region,
                decoder=decoder,
                max_pixels=max_pixels,
            )
        if timeline:
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
            records = _predict_all(recognizer, found, decode_threads, drawn)
            with closing(records):
                num_failed = report_videos(records, num_videos=len(found), as_json=as_json)
        else:
            run = _describe_run(opened, recognizer)
            with open_result_file(
                output, run, resume=resume, overwrite=overwrite, finish=label_table(output)
            ) as file:
                todo = [video for video in found if str(video) not in file.done]
                records = _predict_all(recognizer, todo, decode_threads, drawn)
                with closing(records):
                    num_done = len(found) - len(todo)
                    report_videos(
                        map(file.add, records),
                        num_videos=len(found),
                        num_done=num_done,
                        as_json=as_json,
                        shows_table=False,
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


def choose_labels(
    bundle: Bundle, labels: str | None, own: Sequence[str] | None
) -> LabelBank | tuple[str, ...]:
    """What to choose from; found out before anything is opened."""
    texts = given_texts(labels, own)
    if texts is not None:
        return texts
    if labels is None:
        return LabelBank.load(bundle, _only_bank(bundle))
    if labels not in bundle.label_bank_names() and names_a_file(labels):
        return read_labels(Path(labels))
    return LabelBank.load(bundle, labels)


def _only_bank(bundle: Bundle) -> str:
    names = bundle.label_bank_names()
    if len(names) == 1:
        return names[0]
    if not names:
        raise usage_error(
            f"{bundle.path} has no label bank; give labels with --labels FILE or --label TEXT, or "
            f"build one with `actionclip labels build {bundle.path} --labels FILE --name NAME`."
        )
    raise usage_error(
        f"{bundle.path} has the label banks {', '.join(names)}; choose with --labels."
    )


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
