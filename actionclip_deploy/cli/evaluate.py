"""`actionclip evaluate`: accuracy on annotated videos, in any runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    ANNOTATIONS,
    WINDOWS,
    AnnotationOptions,
    EngineOptions,
    FamilyOption,
    JsonOption,
    LabelOptions,
    MaxPixelsOption,
    MethodOption,
    NoVerifyOption,
    NumFramesOption,
    PlotOption,
    ReuseOption,
    RunOptions,
    ViewsOption,
    WindowOptions,
    use_device,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    check_suffix,
    given_options,
    print_error,
    print_json,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import MissingExtraError, ThresholdWarning, VideoWarning
from actionclip_deploy.evaluate.annotations import (
    Sample,
    detect_format,
    labels_of_folders,
    score_method_of,
)
from actionclip_deploy.evaluate.evaluate import Evaluation
from actionclip_deploy.evaluate.evaluate import evaluate as run_evaluation
from actionclip_deploy.evaluate.intervals import AnnotatedVideo, read_intervals
from actionclip_deploy.evaluate.timelines import TimelineEvaluation, evaluate_timelines
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.files import write_text
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.published import require_checkpoint
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.records import LabelEvents, json_text
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import Views
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import Timeline
from actionclip_deploy.video import MAX_PIXELS

_LISTED_LABELS = 10


def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_CHECKPOINT",
            help="A bundle; or a checkpoint, open_clip:MODEL/TAG or motions, which PyTorch runs.",
        ),
    ],
    annotations: Annotated[
        Path,
        typer.Argument(
            metavar="ANNOTATIONS",
            help="List of videos, the folder of a split, or one with a folder for each label.",
        ),
    ],
    labels: LabelOptions,
    running: RunOptions,
    annotated: AnnotationOptions,
    windows: WindowOptions,
    views: ViewsOption = "1x1",
    method: MethodOption = None,
    image_template: Annotated[
        str,
        typer.Option(
            "--image-template",
            metavar="NAME",
            help="File name of a frame, for folders of them.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = "img_{:05d}.jpg",
    index_bias: Annotated[
        int,
        typer.Option(
            "--index-bias",
            min=0,
            metavar="N",
            help="Number of the first frame there.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = 1,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    reuse: ReuseOption = True,
    family: FamilyOption = "auto",
    num_frames: NumFramesOption = None,
    plot: PlotOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="Write everything, also the confusion matrix and each video's prediction, or its "
            "events.",
        ),
    ] = None,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="Find events in long videos, and measure them against annotated intervals.",
            rich_help_panel=WINDOWS,
        ),
    ] = False,
    min_seconds: Annotated[
        float | None,
        typer.Option(
            "--min-seconds",
            min=0,
            metavar="SECONDS",
            help="Length of the shortest event; by default two strides.",
            rich_help_panel=WINDOWS,
        ),
    ] = None,
    many: EngineOptions = EngineOptions(),  # noqa: B008 - only its fields are used
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on annotated videos, the way that videos are recognised.

    Labels need not be those that the model was trained with. A video that fails is reported and
    counts neither as right nor as wrong; the exit code is then 3. A checkpoint runs in PyTorch.
    Of a folder with a folder of videos for each label, the labels are by default their names.

    With --timeline, ANNOTATIONS say when long videos show what: ActivityNet's JSON, THUMOS's text
    files or their folder, or CSV with video,label,start,end.

    Example:
        actionclip evaluate bundle list.txt --labels labels.csv --views 10x3
        actionclip evaluate model.pt list.txt --labels labels.csv --device cuda
    """
    _check_outputs(plot, output)
    _check_kind(context, timeline=timeline)
    many.check_engine(context)
    if many.is_ray and (timeline or not Path(model).is_dir()):
        what = "--timeline" if timeline else "a checkpoint"
        raise usage_error(f"--engine ray does not go with {what}; leave it out, or give a bundle.")
    labels.sentences()  # what is wrong with them is told before a model is loaded
    require_checkpoint(model)
    if Path(model).is_dir() and (family != "auto" or num_frames is not None):
        raise usage_error(
            f"--family and --num-frames say how a checkpoint is read, and {model} is a folder, "
            "whose manifest says both; leave them out, or give the checkpoint."
        )
    parsed_views = Views.parse(views)
    with ExitStack() as stack:
        with wrong_arguments_are_usage_errors():
            folder = None if timeline else annotations
            if Path(model).is_dir():
                bundle = Bundle.open(model, verify=not no_verify)
                chosen = _labels_of_folders(labels, bundle, folder) or labels.choose(bundle)
                runtime = stack.enter_context(running.open(bundle, prefer="throughput"))
            else:
                chosen = _labels_of_folders(labels, None, folder) or labels.without_banks(model)
                opened = _open_checkpoint(model, running, family, num_frames)
                bundle, runtime = stack.enter_context(opened)
            names = chosen.labels if isinstance(chosen, LabelBank) else chosen
            samples: list[Sample] = []
            videos: list[AnnotatedVideo] = []
            if timeline:
                videos = read_intervals(
                    annotations,
                    names,
                    format=annotated.annotation_format,
                    root=annotated.root,
                    subset=annotated.subset,
                )
            else:
                samples = annotated.read(
                    annotations, names, image_template=image_template, index_bias=index_bias
                )
            default_method = score_method_of(samples)
            if default_method == "independent" and plot is not None:
                raise usage_error("--plot needs videos of one label each; leave it out.")
            bank = labels.bank(bundle, runtime, chosen, quiet=as_json)
            recognizer = Recognizer(
                runtime,
                bank,
                views=parsed_views,
                top_k=1,
                method=method or default_method,
                max_pixels=max_pixels,
                reuse=reuse,
            )
            grid = windows.grid(bundle.manifest)
        evaluation: Evaluation | TimelineEvaluation
        if timeline:
            evaluation = _evaluate_timelines(
                recognizer,
                videos,
                grid,
                windows.threshold,
                min_seconds,
                running.num_threads,
                quiet=as_json,
            )
        elif many.is_ray:
            from actionclip_deploy.cli.video_runs import evaluate_on_ray

            with _outcomes_are_told(len(samples), quiet=as_json) as on_video:
                evaluation = evaluate_on_ray(
                    bundle, recognizer, samples, running, many, on_video=on_video
                )
        else:
            evaluation = evaluate_with_progress(recognizer, samples, quiet=as_json)
    asked = {
        "model": model,
        "annotations": str(annotations),
        "labels": labels.labels
        or ", ".join(labels.label or ())
        or (chosen.name if isinstance(chosen, LabelBank) else str(annotations)),
    }
    _report(evaluation, asked, plot=plot, output=output, as_json=as_json)
    if evaluation.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _check_outputs(plot: Path | None, output: Path | None) -> None:
    """Before the work, so that a missing package or folder is not found out after it."""
    if plot is not None:
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
    check_suffix("--output", output, ".json")
    if output is not None and output.is_dir():
        raise usage_error(f"--output is {output}, which is a folder; give a file in it.")
    if output is not None and not output.parent.is_dir():
        raise usage_error(
            f"--output is {output}, but {output.parent} is not a folder; make it first."
        )


# What says nothing of long videos, and what says nothing of any other.
_OF_CLIPS = ("split", "image_template", "index_bias", "views", "plot")
_OF_TIMELINES = ("window_seconds", "stride_seconds", "threshold", "min_seconds")


def _check_kind(context: typer.Context, *, timeline: bool) -> None:
    given = given_options(context)
    for name in _OF_CLIPS if timeline else _OF_TIMELINES:
        if name in given:
            wrong = "does not go with --timeline" if timeline else "goes with --timeline alone"
            raise usage_error(f"{given[name]} {wrong}; leave it out.")


def _open_checkpoint(
    model: str, running: RunOptions, family: str, num_frames: int | None
) -> AbstractContextManager[tuple[Bundle, Runtime]]:
    if running.runtime not in ("auto", "torch"):
        raise usage_error(
            f"--runtime is {running.runtime}, and a checkpoint runs in torch alone; leave it out, "
            f"or export {model} and give the bundle."
        )
    if running.execution_provider is not None:
        raise usage_error(
            "--execution-provider is ONNX Runtime's, and a checkpoint runs in torch alone; give "
            "--device instead."
        )
    if running.checkpoint is not None:
        raise usage_error("--checkpoint goes with a bundle; a checkpoint was given already.")
    try:
        from actionclip_deploy.export.pipeline import open_checkpoint
    except ImportError as exc:
        raise MissingExtraError("actionclip evaluate on a checkpoint", "export") from exc
    return open_checkpoint(
        model,
        family=family,
        num_frames=num_frames,
        base=running.base,
        device=use_device(running.device) or "cpu",
        num_threads=running.num_threads,
    )


def _labels_of_folders(
    labels: LabelOptions, bundle: Bundle | None, folder: Path | None
) -> tuple[str, ...] | None:
    """The labels that folders of videos are named after, where no labels and no bank are there.

    Args:
        labels: What was given.
        bundle: None for a checkpoint, which has no banks.
        folder: The annotations; None for intervals, which no folders are named after.
    """
    has_others = labels.labels is not None or labels.label
    if has_others or (bundle is not None and bundle.label_bank_names()):
        return None
    if folder is not None and folder.is_dir() and detect_format(folder) == "folders":
        return labels_of_folders(folder)
    return None


def evaluate_with_progress(
    recognizer: Recognizer, samples: Sequence[Sample], *, quiet: bool
) -> Evaluation:
    """Score annotated videos, with a progress bar; warnings and failures are told at once."""
    with _outcomes_are_told(len(samples), quiet=quiet) as on_video:
        return run_evaluation(recognizer, samples, on_video=on_video)


def _evaluate_timelines(
    recognizer: Recognizer,
    videos: Sequence[AnnotatedVideo],
    grid: WindowGrid,
    threshold: float | None,
    min_seconds: float | None,
    threads: int | None,
    *,
    quiet: bool,
) -> TimelineEvaluation:
    with wrong_arguments_are_usage_errors(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        watched = WatchedLabels.of(recognizer.bank, recognizer.method, thresholds=threshold)
    for warning in caught:
        print_warning(warning.message)
    with _outcomes_are_told(len(videos), quiet=quiet) as on_video:
        return evaluate_timelines(
            recognizer,
            videos,
            grid,
            watched=watched,
            min_seconds=min_seconds,
            num_threads=threads,
            on_video=on_video,
        )


@contextmanager
def _outcomes_are_told(
    num_videos: int, *, quiet: bool
) -> Iterator[Callable[[Prediction | Timeline | FailedVideo | None], None]]:
    """Give what is called after each video: it moves a bar, and tells warnings and failures."""
    num_scored = 0
    with (
        warnings.catch_warnings(record=True) as caught,
        tells_when_interrupted(
            lambda: (
                f"{num_scored} of {num_videos} videos were scored, of which nothing is kept; "
                "begin again, with fewer videos or --views for a quicker answer."
            )
        ),
        progress_bar(quiet=quiet) as bar,
    ):
        warnings.simplefilter("always", VideoWarning)
        task = bar.add_task("Scoring videos", total=num_videos)

        def on_video(outcome: Prediction | Timeline | FailedVideo | None) -> None:
            nonlocal num_scored
            num_scored += 1
            bar.advance(task)
            for warning in caught:
                print_warning(warning.message)
            caught.clear()
            if isinstance(outcome, FailedVideo):
                print_error(outcome.error)

        yield on_video


def _report(
    evaluation: Evaluation | TimelineEvaluation,
    asked: dict[str, str],
    *,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write and print what was measured, and in the JSON what was asked for."""
    if output is not None:
        whole = evaluation.record().model_copy(update=asked).to_dict()
        write_text(output, json_text(whole) + "\n")
    if isinstance(evaluation, Evaluation) and plot is not None:
        confusion = evaluation.metrics.confusion
        if confusion is not None:
            from actionclip_deploy.cli.plot import plot_confusion

            plot_confusion(confusion, evaluation.labels, plot)
    if as_json:
        print_json(evaluation.summary().model_copy(update=asked))
    elif isinstance(evaluation, TimelineEvaluation):
        results.print(_timeline_table(evaluation))
        results.print(_events_table(evaluation))
    else:
        results.print(_summary_table(evaluation))
        results.print(_label_table(evaluation))


def _summary_table(evaluation: Evaluation) -> Table:
    metrics, info = evaluation.metrics, evaluation.runtime
    low, high = metrics.top1_interval
    table = Table(
        title=f"{info.title}, {evaluation.views} views, {evaluation.method}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("top-1", f"{metrics.top1:.2%} ({low:.2%} to {high:.2%} with 95% confidence)")
    table.add_row("top-5", f"{metrics.top5:.2%}")
    table.add_row("mean of labels", f"{metrics.mean_class_accuracy:.2%}")
    table.add_row("mAP", f"{metrics.mean_average_precision:.2%}")
    table.add_row("videos", f"{metrics.num_videos:,}")
    table.add_row("failed", f"{len(evaluation.failed):,}")
    if evaluation.num_frames_reused:
        table.add_row("frames encoded", f"{evaluation.num_frames_encoded:,}")
        table.add_row("frames reused", f"{evaluation.num_frames_reused:,}")
    table.add_row("labels", f"{len(evaluation.labels):,}")
    return table


def _label_table(evaluation: Evaluation) -> Table:
    """The labels that were recognised least, worst first."""
    rows = [row for row in evaluation.metrics.per_class(evaluation.labels) if row["num_videos"]]
    rows.sort(key=lambda row: row["accuracy"])
    table = Table(title=f"Labels by accuracy, lowest first, of {len(rows)}", title_justify="left")
    for heading in ("label", "videos", "accuracy", "AP"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for row in rows[:_LISTED_LABELS]:
        table.add_row(
            escape(row["label"]),
            str(row["num_videos"]),
            f"{row['accuracy']:.1%}",
            f"{row['average_precision']:.1%}",
        )
    return table


def _timeline_table(evaluation: TimelineEvaluation) -> Table:
    record, info = evaluation.summary(), evaluation.scoring.runtime
    table = Table(
        title=f"{info.title}, {record.scores}",
        title_justify="left",
        show_header=False,
    )
    num_found = record.num_intervals - record.num_missed
    num_right = record.num_events - record.num_false
    rows: list[tuple[str, float | None, str]] = [
        ("mAP, tIoU 0.3 to 0.7", record.thumos_map, "{:.2%}"),
        ("mAP, tIoU 0.5 to 0.95", record.activitynet_map, "{:.2%}"),
        ("mAP, tIoU 0.5", record.map_at["0.5"], "{:.2%}"),
        ("mAP of steps", record.frame_map, "{:.2%}"),
        (
            "false alarms an hour",
            record.false_alarms_per_hour,
            f"{{:.1f}} ({record.num_false:,} of {record.num_events:,} events)",
        ),
        ("missed", record.miss_rate, f"{{:.2%}} ({record.num_missed:,} intervals)"),
        ("events per interval", record.events_per_found, f"{{:.2f}} ({num_right:,}/{num_found:,})"),
        ("delay, median", record.delay_p50_seconds, "{:.2f} s"),
        ("delay, 95 %", record.delay_p95_seconds, "{:.2f} s"),
        ("windows", record.window_seconds, f"{{:g}} s, every {record.stride_seconds:g} s"),
        ("threshold", record.threshold, "{:g}"),
        ("videos", record.hours * 60, f"{record.num_videos:,} of {{:,.1f}} minutes together"),
        ("failed", record.num_failed, "{:,}"),
        ("intervals", record.num_intervals, f"{{:,}} of {record.num_shown_labels:,} labels"),
        ("labels", record.num_labels, "{:,}"),
    ]
    for name, value, form in rows:
        table.add_row(name, "none" if value is None else form.format(value))
    return table


def _events_table(evaluation: TimelineEvaluation) -> Table:
    """The labels whose events were ranked worst."""
    labels = evaluation.metrics.per_label(evaluation.timelines[0].watched.names)
    shown = sorted((each for each in labels if each.thumos_ap is not None), key=_by_precision)
    table = Table(title=f"Labels by AP, lowest first, of {len(shown)}", title_justify="left")
    for heading in ("label", "intervals", "AP", "missed", "false"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for each in shown[:_LISTED_LABELS]:
        table.add_row(
            escape(each.label),
            str(each.num_intervals),
            f"{each.thumos_ap:.1%}",
            str(each.num_missed),
            str(each.num_false),
        )
    others = sum(each.num_false for each in labels if each.thumos_ap is None)
    if others:
        table.caption = f"{others:,} more false alarms are of labels that no interval has."
    return table


def _by_precision(label: LabelEvents) -> float:
    return label.thumos_ap or 0.0
