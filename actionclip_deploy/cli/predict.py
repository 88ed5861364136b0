"""`actionclip predict`: rank labels for videos."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    BaseOption,
    BundlePath,
    CheckpointOption,
    JsonOption,
    ProviderOption,
    RuntimeOption,
    ThreadsOption,
    print_error,
    print_json_line,
    print_warning,
    progress_bar,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import VideoWarning
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.sampling import Views


def predict(
    bundle: BundlePath,
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="NAME", help="Label bank; by default the only one there is."
        ),
    ] = None,
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
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the sampled frames and top labels."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score videos against a label bank.

    A video that fails is reported in its place and the others go on; the exit code is then 3.
    With --json, one object per video is printed, each on a line of its own.
    """
    if plot is not None:
        # Before the work, so that a missing package or folder is not found out after it.
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
    opened = Bundle.open(bundle)
    bank = LabelBank.load(opened, labels or _only_bank(opened))
    with wrong_arguments_are_usage_errors():
        running = open_runtime(
            opened,
            runtime,
            execution_provider=execution_provider,
            num_threads=threads,
            checkpoint=checkpoint,
            base=base,
        )
        recognizer = Recognizer(
            running, bank, views=Views.parse(views), top_k=top_k, method=method, region=region
        )
    outcomes = []
    with running:
        for outcome in _predict_with_progress(recognizer, videos, quiet=as_json):
            outcomes.append(outcome)
            if as_json:
                print_json_line(_to_dict(outcome, running, bank))
    if not as_json:
        _print_table(outcomes)
    predictions = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
    if plot is not None and predictions:
        from actionclip_deploy.cli.plot import plot_predictions

        plot_predictions(predictions, plot)
    if len(predictions) < len(outcomes):
        raise typer.Exit(EXIT_SOME_FAILED)


def _only_bank(bundle: Bundle) -> str:
    names = bundle.label_bank_names()
    if len(names) == 1:
        return names[0]
    if not names:
        raise usage_error(
            f"{bundle.path} has no label bank; build one with "
            f"`actionclip labels build {bundle.path} --labels FILE --name NAME`."
        )
    raise usage_error(
        f"{bundle.path} has the label banks {', '.join(names)}; choose with --labels."
    )


def _predict_with_progress(
    recognizer: Recognizer, videos: list[Path], *, quiet: bool
) -> Iterator[Prediction | FailedVideo]:
    with progress_bar(quiet=quiet or len(videos) == 1) as bar:
        for video in bar.track(videos, description="Scoring videos"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", VideoWarning)
                outcome = next(recognizer.predict_all([video]))
            for warning in caught:
                print_warning(warning.message)
            if isinstance(outcome, FailedVideo):
                print_error(outcome.error)
            yield outcome


def _to_dict(
    outcome: Prediction | FailedVideo, runtime: Runtime, bank: LabelBank
) -> dict[str, Any]:
    if isinstance(outcome, FailedVideo):
        return {"video": str(outcome.video), "error": str(outcome.error)}
    return {
        "video": str(outcome.video),
        "predictions": [asdict(prediction) for prediction in outcome.predictions],
        "frames": {
            "num_clips": len(outcome.frame_indices),
            "indices": outcome.frame_indices.ravel().tolist(),
            "pts_seconds": outcome.pts_seconds.ravel().round(6).tolist(),
        },
        "runtime": asdict(runtime.describe()),
        "bank": {
            "name": bank.name,
            "num_labels": len(bank.labels),
            "num_templates": len(bank.templates),
            "textual_sha256": bank.textual_sha256,
        },
        "timings_ms": outcome.timings_ms,
    }


def _print_table(outcomes: list[Prediction | FailedVideo]) -> None:
    table = Table()
    for heading in ("video", "label", "score"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for outcome in outcomes:
        if isinstance(outcome, FailedVideo):
            table.add_row(escape(outcome.video.name), "[red]failed[/]", "", end_section=True)
            continue
        for rank, best in enumerate(outcome.predictions):
            table.add_row(
                escape(outcome.video.name) if rank == 0 else "",
                escape(best.label),
                f"{best.score:.4f}",
                end_section=rank == len(outcome.predictions) - 1,
            )
    results.print(table)
