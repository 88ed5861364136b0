"""`actionclip export`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.output import (
    BaseOption,
    JsonOption,
    OverwriteOption,
    notes,
    print_json,
    print_warning,
    progress_bar,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verify import report_table
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.evaluate.annotations import FORMATS, Sample, read_annotations
from actionclip_deploy.evaluate.evaluate import Evaluation, score_method_of
from actionclip_deploy.evaluate.evaluate import evaluate as run_evaluation
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import (
    QUANTIZED_PRECISIONS,
    Precision,
    QuantizedPrecision,
    RestPrecision,
)
from actionclip_deploy.prompts import LABEL_ONLY, read_labels, read_templates
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.runtimes import open_runtime

if TYPE_CHECKING:
    from actionclip_deploy.export import ExportResult, Quantization
    from actionclip_deploy.export.quantization import QuantizationOptions


# What an export in int8 or fp8 is told, what it is judged by, and what it prints.


RecipeChoice = Literal["auto", "dynamic", "static"]
WeightChoice = Literal["auto", "reduced", "full"]

RestChoice = Literal["fp32", "fp16"]

RecipeOption: TypeAlias = Annotated[
    RecipeChoice,
    typer.Option(
        "--int8-recipe",
        help="dynamic, for CPUs; static, for TensorRT too; auto: static with --calibration.",
    ),
]
WeightsOption: TypeAlias = Annotated[
    WeightChoice,
    typer.Option(
        "--int8-weights",
        help="reduced is right on every CPU; full needs VNNI on x86; auto asks this machine.",
    ),
]
RestOption: TypeAlias = Annotated[
    RestChoice,
    typer.Option(
        "--int8-rest",
        help="Of the products that do not become int8: fp32, for CPUs; fp16, for GPUs.",
    ),
]
CalibrationOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="VIDEOS",
        help="A video, or a folder of them, to calibrate int8 or fp8 on; repeatable.",
    ),
]
ClipsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--calibration-clips", min=1, help="Clips that are taken from them; by default 32."
    ),
]
EvaluateOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--evaluate",
        metavar="ANNOTATIONS",
        help="Annotated videos, as `actionclip evaluate` takes them, on which it is judged.",
    ),
]
EvaluateLabelsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE", help="Labels of --evaluate: CSV, text or JSON."),
]
EvaluateRootOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="Folder that the paths of --evaluate start from."),
]
EvaluateFormatOption: TypeAlias = Annotated[
    str, typer.Option("--format", help=f"Of --evaluate: {', '.join(FORMATS)}.")
]
MaxDropOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-drop", help="Points of top-1 that it may cost on --evaluate; by default 0.5."
    ),
]


class TopOne:
    """Measures the top-1 of bundles on the same annotated videos."""

    def __init__(self, samples: Sequence[Sample], labels: Sequence[str], bar: Progress) -> None:
        self._samples = samples
        self._labels = labels
        self._bar = bar
        self._failed: set[Path] = set()
        self._bank: LabelBank | None = None  # text is fp32 in every trial, and so the same

    def __call__(self, bundle: Bundle) -> float:
        """Top-1 in percent."""
        # A graph on trial is run once and thrown away, and so is no matter for the cache.
        with open_runtime(bundle, cache=False) as runtime:
            if self._bank is None or self._bank.textual_sha256 != bundle.textual_sha256:
                self._bank = LabelBank.build(bundle, runtime, self._labels, name="evaluation")
            method = score_method_of(self._samples)
            recognizer = Recognizer(runtime, self._bank, top_k=1, method=method)
            evaluation = self._evaluate(recognizer)
        return 100 * float(evaluation.metrics.top1)

    def _evaluate(self, recognizer: Recognizer) -> Evaluation:
        task = self._bar.add_task("Measuring top-1", total=len(self._samples))

        def on_video(outcome: Prediction | FailedVideo) -> None:
            self._bar.advance(task)
            # Each is told once, and not again for every choice of blocks.
            if isinstance(outcome, FailedVideo) and outcome.video not in self._failed:
                self._failed.add(outcome.video)
                print_warning(outcome.error)

        try:
            return run_evaluation(recognizer, self._samples, on_video=on_video)
        finally:
            self._bar.remove_task(task)


@contextmanager
def quantization_options(
    precision: QuantizedPrecision,
    *,
    recipe: RecipeChoice,
    weights: WeightChoice,
    rest: RestChoice,
    calibration: Sequence[Path] | None,
    num_clips: int | None,
    evaluate: Path | None,
    labels: Path | None,
    root: Path | None,
    annotation_format: str,
    max_drop: float | None,
    quiet: bool,
) -> Iterator[QuantizationOptions]:
    """Read what the graph is judged on, and show progress while the block runs.

    Raises:
        typer.BadParameter: If options do not go together.
        LabelError: If labels or annotations cannot be read.
    """
    from actionclip_deploy.export.quantization import Fp8Options, Int8Options, exact_weight_range

    _check_together(calibration, num_clips, evaluate, labels, root, max_drop)
    with progress_bar(quiet=quiet) as bar:
        measure = None
        if evaluate is not None and labels is not None:
            names = read_labels(labels)
            samples = read_annotations(
                evaluate, names, format=annotation_format, root=root, subset="test"
            )
            measure = TopOne(samples, names, bar)
        given: dict[str, Any] = {"num_clips": num_clips, "max_drop": max_drop}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"measure_top1": measure, "on_progress": _Tasks(bar)}
        given |= {"calibration": tuple(calibration or ())}
        if precision == "fp8":
            yield Fp8Options(**given)
            return
        yield Int8Options(
            recipe=None if recipe == "auto" else recipe,
            weight_range=exact_weight_range() if weights == "auto" else weights,
            rest=rest,
            **given,
        )


def refuse_options(precision: str, wanted: str, **given: object) -> None:
    """Refuse options that say something about another precision than is asked for.

    Args:
        wanted: The precisions that the options are for, in words.
        given: The values of the options; those that an option has by default say nothing.
    """
    for name, value in given.items():
        if value not in (None, "auto", "reduced", "fp32") and value != []:
            raise usage_error(
                f"--{name.replace('_', '-')} is for --precision {wanted} and the precision is "
                f"{precision}; leave it out or ask for {wanted}."
            )


def print_quantization(quantization: Quantization) -> None:
    """Print the sensitivity of each block, and what was decided."""
    for sentence in quantization.failed_videos:
        print_warning(sentence)
    spec = quantization.spec
    precision, rest = quantization.precision, spec.rest_precision
    form = f"{spec.recipe}, {spec.weight_range} weights" if spec.weight_range else spec.recipe
    title = f"Each block alone in {precision} ({form}) against {rest}"
    table = Table(title=title, title_justify="left")
    for heading in ("block", "SQNR, dB", "min cosine", "max difference", "becomes"):
        left = heading in ("block", "becomes")
        table.add_column(heading, justify="left" if left else "right")
    for row in quantization.sensitivities:
        sqnr = row.error.sqnr_db
        table.add_row(
            row.block,
            f"{sqnr:.1f}" if math.isfinite(sqnr) else "exact",
            f"{row.error.min_cosine:.6f}",
            f"{row.error.max_difference:.1e}",
            rest if row.block in spec.unquantized_blocks else precision,
        )
    results.print(table)
    results.print(_verdict(quantization), highlight=False)


def _verdict(quantization: Quantization) -> str:
    spec = quantization.spec
    rest, precision = spec.rest_precision, quantization.precision
    kept = ", ".join(spec.unquantized_blocks) or "none"
    if spec.unquantized_value is None:
        measured = f"features' cosine to {rest} {spec.quantized_value:.6f}, bound {spec.bound}"
    else:
        measured = (
            f"top-1 {spec.unquantized_value:.2f}% in {rest} and {spec.quantized_value:.2f}% in "
            f"{precision}, largest drop {spec.bound} points"
        )
    return f"Blocks that stay {rest}: {kept}. Accepted: {measured}."


def _check_together(
    calibration: Sequence[Path] | None,
    num_clips: int | None,
    evaluate: Path | None,
    labels: Path | None,
    root: Path | None,
    max_drop: float | None,
) -> None:
    if num_clips is not None and not calibration:
        raise usage_error("--calibration-clips needs --calibration VIDEOS to take clips from.")
    if evaluate is None:
        for name, value in (("max-drop", max_drop), ("labels", labels), ("root", root)):
            if value is not None:
                raise usage_error(
                    f"--{name} needs --evaluate ANNOTATIONS, the videos that it is judged on; "
                    f"give it or leave --{name} out."
                )
    elif labels is None:
        raise usage_error(
            "--evaluate needs --labels FILE, the labels that its videos are of, as `actionclip "
            "evaluate` does."
        )


class _Tasks:
    """Shows the progress of one task after the other."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self._tasks:
            self._tasks[task] = self._bar.add_task(task, total=total)
        self._bar.update(self._tasks[task], completed=done)
        if done == total:
            self._bar.remove_task(self._tasks.pop(task))


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint file, open_clip:MODEL/TAG for weights of open_clip, or motions, the "
            "default model that comes with the package.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder of the new bundle.")
    ],
    family: Annotated[
        str, typer.Option("--family", help="Whose format it is; auto finds out from the keys.")
    ] = "auto",
    num_frames: Annotated[
        int | None,
        typer.Option(
            "--num-frames",
            min=1,
            help="Frames per clip, T; by default from the position table or the file's name.",
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option("--precision", help="Of the graphs of frames; all outputs are fp32."),
    ] = "fp32",
    text_precision: Annotated[
        RestPrecision,
        typer.Option(
            "--text-precision",
            help="Of the textual graph, which runs once per label; fp16 for RTX 20 and small "
            "devices.",
        ),
    ] = "fp32",
    base: BaseOption = None,
    visual_prompt: Annotated[
        str | None,
        typer.Option(
            "--visual-prompt",
            help="How time enters, where the checkpoint does not tell; by default meanp.",
        ),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option("--templates", help="File of templates; by default the family's own."),
    ] = None,
    label_only: Annotated[
        bool, typer.Option("--label-only", help="Use the bare label as the only template.")
    ] = False,
    golden_videos: Annotated[
        list[Path] | None,
        typer.Option(
            "--golden-video",
            help="A real video for the golden inputs, repeatable; else frames are rendered.",
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", help="Of the weights, for the manifest.")
    ] = None,
    int8_recipe: RecipeOption = "auto",
    int8_weights: WeightsOption = "reduced",
    int8_rest: RestOption = "fp32",
    calibration: CalibrationOption = None,
    calibration_clips: ClipsOption = None,
    evaluate: EvaluateOption = None,
    labels: EvaluateLabelsOption = None,
    root: EvaluateRootOption = None,
    annotation_format: EvaluateFormatOption = "auto",
    max_drop: MaxDropOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs that is proven to compute the same.

    The bundle appears under its name only after every graph, and the whole way from frames to
    scores, has agreed with PyTorch; otherwise nothing is left behind. In int8 and
    fp8, blocks of the visual tower that hurt too much stay as they were, one after the other,
    until the bound is kept: with --evaluate the drop of top-1, else the cosine of features to
    those without quantising, 0.999 in int8 and 0.99 in fp8.
    """
    try:
        from actionclip_deploy.export import export_checkpoint
    except ImportError as exc:
        raise MissingExtraError("actionclip export", "export") from exc

    if templates is not None and label_only:
        raise usage_error("--templates and --label-only exclude each other; give one.")
    chosen = LABEL_ONLY if label_only else read_templates(templates) if templates else None
    asked: AbstractContextManager[QuantizationOptions | None] = nullcontext()
    if precision != "int8":
        refuse_options(
            precision,
            "int8",
            int8_recipe=int8_recipe,
            int8_weights=int8_weights,
            int8_rest=int8_rest,
        )
    if precision == "int8" or precision == "fp8":
        asked = quantization_options(
            precision,
            recipe=int8_recipe,
            weights=int8_weights,
            rest=int8_rest,
            calibration=calibration,
            num_clips=calibration_clips,
            evaluate=evaluate,
            labels=labels,
            root=root,
            annotation_format=annotation_format,
            max_drop=max_drop,
            quiet=as_json,
        )
    else:
        refuse_options(
            precision,
            "int8 or fp8",
            calibration=calibration,
            calibration_clips=calibration_clips,
            evaluate=evaluate,
            labels=labels,
            root=root,
            format=annotation_format,
            max_drop=max_drop,
        )
    with wrong_arguments_are_usage_errors(), asked as options, _steps(precision) as on_step:
        given: dict[str, Any] = {precision: options} if options else {}
        result = export_checkpoint(
            checkpoint,
            output,
            family=family,
            num_frames=num_frames,
            precision=precision,
            text_precision=text_precision,
            base=base,
            visual_prompt=visual_prompt,
            templates=chosen,
            golden_videos=golden_videos or (),
            licence=licence,
            overwrite=overwrite,
            on_step=on_step,
            **given,
        )
    if as_json:
        print_json(_to_dict(result))
    else:
        _print_result(result)


@contextmanager
def _steps(precision: str) -> Iterator[Callable[[str], None]]:
    """Show the steps: one line that changes, or lines where progress bars have their place."""
    if precision in QUANTIZED_PRECISIONS:
        yield lambda step: notes.print(step, highlight=False) if notes.is_terminal else None
        return
    with notes.status("Starting") as status:
        yield status.update


def _to_dict(result: ExportResult) -> dict[str, Any]:
    loaded, quantization = result.checkpoint, result.quantization
    fields = {
        "bundle": str(result.bundle.path),
        "family": loaded.family,
        "num_frames": loaded.num_frames,
        "num_frames_from": loaded.num_frames_from,
        "notes": list(loaded.notes),
        "manifest": result.bundle.manifest.model_dump(mode="json"),
        "parity": result.report.to_dict(),
    }
    if quantization is not None:
        fields["quantization"] = quantization.to_dict()
    return fields


def _print_result(result: ExportResult) -> None:
    manifest, loaded = result.bundle.manifest, result.checkpoint
    model = manifest.model
    results.print(
        f"{loaded.family} checkpoint: {model.backbone}, visual prompt {model.visual_prompt}, "
        f"T = {loaded.num_frames} (from the {loaded.num_frames_from})",
        highlight=False,
    )
    for note in loaded.notes:
        results.print(note, highlight=False, markup=False)
    if result.quantization is not None:
        print_quantization(result.quantization)
    results.print(report_table(result.report, title="Agreement with PyTorch"))
    size = sum(file.size_bytes for file in manifest.files.values())
    results.print(
        f"Wrote {result.bundle.path} ({size / 1e6:.1f} MB, {manifest.precision()}).",
        highlight=False,
    )
