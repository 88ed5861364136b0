"""`actionclip evaluate`: accuracy on annotated videos, in any runtime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    ANNOTATIONS,
    AnnotationOptions,
    FamilyOption,
    JsonOption,
    LabelOptions,
    MethodOption,
    NoVerifyOption,
    NumFramesOption,
    PlotOption,
    RunOptions,
    ViewsOption,
    use_device,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    check_suffix,
    print_error,
    print_json,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import MissingExtraError, VideoWarning
from actionclip_deploy.evaluate.annotations import Sample, score_method_of
from actionclip_deploy.evaluate.evaluate import Evaluation
from actionclip_deploy.evaluate.evaluate import evaluate as run_evaluation
from actionclip_deploy.files import write_text
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.records import json_text
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import Views

_LISTED_LABELS = 10


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_CHECKPOINT",
            help="A bundle; or a checkpoint, open_clip:MODEL/TAG or motions, which PyTorch runs.",
        ),
    ],
    annotations: Annotated[
        Path,
        typer.Argument(metavar="ANNOTATIONS", help="List of videos, or the folder of a split."),
    ],
    labels: LabelOptions,
    running: RunOptions,
    annotated: AnnotationOptions,
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
    family: FamilyOption = "auto",
    num_frames: NumFramesOption = None,
    plot: PlotOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="Write everything, also the confusion matrix and each video's prediction.",
        ),
    ] = None,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on annotated videos, the way that videos are recognised.

    Labels need not be those that the model was trained with. A video that fails is reported and
    counts neither as right nor as wrong; the exit code is then 3. A checkpoint runs in PyTorch.

    Example:
        actionclip evaluate bundle list.txt --labels labels.csv --views 10x3
        actionclip evaluate model.pt list.txt --labels labels.csv --device cuda
    """
    _check_outputs(plot, output)
    labels.sentences()  # what is wrong with them is told before a model is loaded
    if Path(model).is_dir() and (family != "auto" or num_frames is not None):
        raise usage_error(
            f"--family and --num-frames say how a checkpoint is read, and {model} is a folder, "
            "whose manifest says both; leave them out, or give the checkpoint."
        )
    parsed_views = Views.parse(views)
    with ExitStack() as stack:
        with wrong_arguments_are_usage_errors():
            if Path(model).is_dir():
                bundle = Bundle.open(model, verify=not no_verify)
                chosen = labels.choose(bundle)
                runtime = stack.enter_context(running.open(bundle))
            else:
                chosen = labels.without_banks(model)
                opened = _open_checkpoint(model, running, family, num_frames)
                bundle, runtime = stack.enter_context(opened)
            samples = annotated.read(
                annotations,
                chosen.labels if isinstance(chosen, LabelBank) else chosen,
                image_template=image_template,
                index_bias=index_bias,
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
            )
        evaluation = evaluate_with_progress(recognizer, samples, quiet=as_json)
    asked = {
        "model": model,
        "annotations": str(annotations),
        "labels": labels.labels or (", ".join(labels.label) if labels.label else bank.name),
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
    if output is not None and not output.parent.is_dir():
        raise usage_error(
            f"--output is {output}, but {output.parent} is not a folder; make it first."
        )


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


def evaluate_with_progress(
    recognizer: Recognizer, samples: Sequence[Sample], *, quiet: bool
) -> Evaluation:
    """Score annotated videos, with a progress bar; warnings and failures are told at once."""
    num_scored = 0
    with (
        warnings.catch_warnings(record=True) as caught,
        tells_when_interrupted(
            lambda: (
                f"{num_scored} of {len(samples)} videos were scored, of which nothing is kept; "
                "begin again, with fewer videos or --views for a quicker answer."
            )
        ),
        progress_bar(quiet=quiet) as bar,
    ):
        warnings.simplefilter("always", VideoWarning)
        task = bar.add_task("Scoring videos", total=len(samples))

        def on_video(outcome: Prediction | FailedVideo) -> None:
            nonlocal num_scored
            num_scored += 1
            bar.advance(task)
            for warning in caught:
                print_warning(warning.message)
            caught.clear()
            if isinstance(outcome, FailedVideo):
                print_error(outcome.error)

        return run_evaluation(recognizer, samples, on_video=on_video)


def _report(
    evaluation: Evaluation,
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
    confusion = evaluation.metrics.confusion
    if plot is not None and confusion is not None:
        from actionclip_deploy.cli.plot import plot_confusion

        plot_confusion(confusion, evaluation.labels, plot)
    if as_json:
        print_json(evaluation.summary().model_copy(update=asked))
    else:
        results.print(_summary_table(evaluation))
        results.print(_label_table(evaluation))


def _summary_table(evaluation: Evaluation) -> Table:
    metrics, info = evaluation.metrics, evaluation.runtime
    low, high = metrics.top1_interval
    table = Table(
        title=f"{info.name} ({info.execution_provider}, {info.precision}), "
        f"{evaluation.views} views, {evaluation.method}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("top-1", f"{metrics.top1:.2%} ({low:.2%} to {high:.2%} with 95% confidence)")
    table.add_row("top-5", f"{metrics.top5:.2%}")
    table.add_row("mean of labels", f"{metrics.mean_class_accuracy:.2%}")
    table.add_row("mAP", f"{metrics.mean_average_precision:.2%}")
    table.add_row("videos", f"{metrics.num_videos:,}")
    table.add_row("failed", f"{len(evaluation.failed):,}")
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
