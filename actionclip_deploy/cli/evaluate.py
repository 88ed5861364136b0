"""`actionclip evaluate`: accuracy on annotated videos, in any runtime."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    BaseOption,
    CheckpointOption,
    JsonOption,
    NoVerifyOption,
    ProviderOption,
    ThreadsOption,
    UnknownWordsOption,
    check_suffix,
    print_error,
    print_json,
    print_warning,
    progress_bar,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import MissingExtraError, VideoWarning
from actionclip_deploy.evaluate.annotations import (
    FORMATS,
    Sample,
    Subset,
    read_annotations,
    score_method_of,
)
from actionclip_deploy.evaluate.evaluate import Evaluation
from actionclip_deploy.evaluate.evaluate import evaluate as run_evaluation
from actionclip_deploy.files import write_text
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.prompts import LABEL_ONLY, read_labels, read_templates
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.records import json_text
from actionclip_deploy.runtimes import open_runtime
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
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="CSV (id,name), text or JSON file, or the name of a label bank of the bundle.",
        ),
    ],
    annotation_format: Annotated[
        str, typer.Option("--format", help=f"Of the annotations: {', '.join(FORMATS)}.")
    ] = "auto",
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Folder that the videos' paths start from."),
    ] = None,
    subset: Annotated[
        Subset, typer.Option("--subset", help="Of annotations that have both.")
    ] = "test",
    split: Annotated[
        int, typer.Option("--split", min=1, help="Of annotations that have several.")
    ] = 1,
    image_template: Annotated[
        str, typer.Option("--image-template", help="File name of a frame, for folders of them.")
    ] = "img_{:05d}.jpg",
    index_bias: Annotated[
        int, typer.Option("--index-bias", min=0, help="Number of the first frame there.")
    ] = 1,
    templates: Annotated[
        Path | None,
        typer.Option("--templates", metavar="FILE", help="By default, the model's own."),
    ] = None,
    label_only: Annotated[
        bool, typer.Option("--label-only", help="Use the bare label as the only template.")
    ] = False,
    views: Annotated[
        str, typer.Option("--views", help="Clips x crops per video; the paper's best is 10x3.")
    ] = "1x1",
    method: Annotated[
        ScoreMethod | None,
        typer.Option(
            "--scores",
            help="By default the model's, or independent where videos have several labels.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", help="onnxruntime (of a bundle) or torch; by default what fits the model."
        ),
    ] = None,
    execution_provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    family: Annotated[
        str, typer.Option("--family", help="A checkpoint's format; auto finds out.")
    ] = "auto",
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", min=1, help="T of a checkpoint, if it is silent.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the confusion matrix."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE.json",
            help="Write everything, also the confusion matrix and each video's prediction.",
        ),
    ] = None,
    allow_unknown_words: UnknownWordsOption = False,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on annotated videos, the way that videos are recognised.

    Labels need not be those that the model was trained with. A video that fails is reported and
    counts neither as right nor as wrong; the exit code is then 3.
    """
    _check_outputs(plot, output)
    if templates is not None and label_only:
        raise usage_error("--templates and --label-only exclude each other; give one.")
    if Path(model).is_dir() and (family != "auto" or num_frames is not None):
        raise usage_error(
            f"--family and --num-frames say how a checkpoint is read, and {model} is a folder, "
            "whose manifest says both; leave them out, or give the checkpoint."
        )
    with ExitStack() as stack:
        with wrong_arguments_are_usage_errors():
            parsed_views = Views.parse(views)
            chosen = LABEL_ONLY if label_only else read_templates(templates) if templates else None
            bundle, running = stack.enter_context(
                _open_bundle(
                    Bundle.open(model, verify=not no_verify),
                    runtime,
                    execution_provider,
                    threads,
                    checkpoint,
                    base,
                )
                if Path(model).is_dir()
                else _open_checkpoint(
                    model,
                    runtime,
                    execution_provider,
                    threads,
                    checkpoint,
                    base,
                    family,
                    num_frames,
                )
            )
            bank = _load_bank(bundle, labels, chosen)
            names = bank.labels if bank is not None else read_labels(labels)
            samples = read_annotations(
                annotations,
                names,
                format=annotation_format,
                root=root,
                subset=subset,
                split=split,
                image_template=image_template,
                index_bias=index_bias,
            )
            default_method = score_method_of(samples)
            if default_method == "independent" and plot is not None:
                raise usage_error("--plot needs videos of one label each; leave it out.")
            bank = bank or _build_bank(
                bundle,
                running,
                names,
                chosen,
                quiet=as_json,
                allow_unknown_words=allow_unknown_words,
            )
            recognizer = Recognizer(
                running,
                bank,
                views=parsed_views,
                top_k=1,
                method=method or default_method,
            )
        evaluation = evaluate_with_progress(recognizer, samples, quiet=as_json)
    asked = {"model": model, "annotations": str(annotations), "labels": labels}
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


@contextmanager
def _open_bundle(
    bundle: Bundle,
    runtime: str | None,
    execution_provider: str,
    threads: int | None,
    checkpoint: Path | None,
    base: Path | None,
) -> Iterator[tuple[Bundle, Runtime]]:
    opened = open_runtime(
        bundle,
        runtime or "onnxruntime",
        execution_provider=execution_provider,
        num_threads=threads,
        checkpoint=checkpoint,
        base=base,
    )
    with opened:
        yield bundle, opened


def _open_checkpoint(
    model: str,
    runtime: str | None,
    device: str,
    threads: int | None,
    checkpoint: Path | None,
    base: Path | None,
    family: str,
    num_frames: int | None,
) -> AbstractContextManager[tuple[Bundle, Runtime]]:
    if runtime not in (None, "torch"):
        raise usage_error(
            f"--runtime is {runtime}, and a checkpoint runs in torch alone; leave it out, or "
            f"export {model} and give the bundle."
        )
    if checkpoint is not None:
        raise usage_error("--checkpoint goes with a bundle; a checkpoint was given already.")
    try:
        from actionclip_deploy.export.pipeline import open_checkpoint
    except ImportError as exc:
        raise MissingExtraError("actionclip evaluate on a checkpoint", "export") from exc
    return open_checkpoint(
        model,
        family=family,
        num_frames=num_frames,
        base=base,
        device=device,
        num_threads=threads,
    )


def _load_bank(bundle: Bundle, labels: str, templates: Sequence[str] | None) -> LabelBank | None:
    """The bank of this name, which comes before a file of that name; None for a file."""
    if labels not in bundle.label_bank_names():
        return None
    if templates is not None:
        raise usage_error(f"The label bank {labels} has its own templates; leave them out.")
    return LabelBank.load(bundle, labels)


def _build_bank(
    bundle: Bundle,
    runtime: Runtime,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    *,
    quiet: bool,
    allow_unknown_words: bool,
) -> LabelBank:
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("Embedding prompts", total=None)
        return LabelBank.build(
            bundle,
            runtime,
            labels,
            name="evaluation",
            templates=templates,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            allow_unknown_words=allow_unknown_words,
        )


def evaluate_with_progress(
    recognizer: Recognizer, samples: Sequence[Sample], *, quiet: bool
) -> Evaluation:
    """Score annotated videos, with a progress bar; warnings and failures are told at once."""
    with (
        warnings.catch_warnings(record=True) as caught,
        progress_bar(quiet=quiet) as bar,
    ):
        warnings.simplefilter("always", VideoWarning)
        task = bar.add_task("Scoring videos", total=len(samples))

        def on_video(outcome: Prediction | FailedVideo) -> None:
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
