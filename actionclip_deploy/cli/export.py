"""`actionclip export`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from actionclip_deploy.bundle import MANIFEST_NAME, Bundle, check_replaceable
from actionclip_deploy.cli.options import (
    ANNOTATIONS,
    CHECKPOINT,
    AnnotationOptions,
    BaseOption,
    FamilyOption,
    JsonOption,
    LabelOnlyOption,
    LabelOption,
    MaxPixelsOption,
    NumFramesOption,
    OverwriteOption,
    TemplateOption,
    TemplatesOption,
    given_templates,
    given_texts,
)
from actionclip_deploy.cli.output import (
    given_options,
    notes,
    print_json,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verify import print_report
from actionclip_deploy.command_records import ExportRecord
from actionclip_deploy.errors import ArgumentError, MissingExtraError
from actionclip_deploy.evaluate.annotations import Sample, score_method_of
from actionclip_deploy.evaluate.evaluate import Evaluation
from actionclip_deploy.evaluate.evaluate import evaluate as run_evaluation
from actionclip_deploy.labels import LabelBank, labels_among
from actionclip_deploy.manifest import (
    QUANTIZED_PRECISIONS,
    Precision,
    RestPrecision,
)
from actionclip_deploy.published import (
    find_published,
    is_address,
    local_checkpoint,
    require_checkpoint,
)
from actionclip_deploy.published.download import with_sha256
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.video import MAX_PIXELS

if TYPE_CHECKING:
    from actionclip_deploy.export import ExportResult, Quantization
    from actionclip_deploy.export.quantization import QuantizationOptions


_NEEDED = ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "onnxruntime")
_GRAPHS = "The bundle"
_QUANTIZED = "int8 and fp8"


def export(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint file, a name that `actionclip models` lists, an https address, "
            "hf://USER/REPO/FILE, or open_clip:MODEL/TAG.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="BUNDLE",
            help="Folder of the new bundle; by default the name of a checkpoint known by name.",
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            metavar="NAME",
            help="Precision of the graphs that see frames: fp32, fp16, int8 or fp8.",
        ),
    ] = "fp32",
    num_frames: NumFramesOption = None,
    family: FamilyOption = "auto",
    visual_prompt: Annotated[
        str | None,
        typer.Option(
            "--visual-prompt",
            metavar="NAME",
            help="How frames are combined, if the checkpoint does not say; by default meanp.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    base: BaseOption = None,
    sha256: Annotated[
        str | None,
        typer.Option(
            "--sha256",
            metavar="HEX",
            help="Hash that the file of an https address has to have, or its beginning.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    text_precision: Annotated[
        RestPrecision,
        typer.Option(
            "--text-precision",
            metavar="NAME",
            help="Precision of the text encoder, which runs once per label; fp16 for RTX 20 and "
            "small devices.",
            rich_help_panel=_GRAPHS,
        ),
    ] = "fp32",
    golden_videos: Annotated[
        list[Path] | None,
        typer.Option(
            "--golden-video",
            metavar="FILE",
            help="A video for the golden inputs; repeatable. Without one, frames are rendered.",
            rich_help_panel=_GRAPHS,
        ),
    ] = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence",
            metavar="TEXT",
            help="Licence of the weights, for the manifest.",
            rich_help_panel=_GRAPHS,
        ),
    ] = None,
    templates: TemplatesOption = None,
    template: TemplateOption = None,
    label_only: LabelOnlyOption = False,
    int8_recipe: Annotated[
        Literal["auto", "dynamic", "static"],
        typer.Option(
            "--int8-recipe",
            metavar="NAME",
            help="dynamic is for CPUs, static for TensorRT too; auto: static with --calibration.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = "auto",
    int8_weights: Annotated[
        Literal["auto", "reduced", "full"],
        typer.Option(
            "--int8-weights",
            metavar="NAME",
            help="reduced is exact on every CPU, full needs VNNI on x86; auto asks this machine.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = "reduced",
    int8_rest: Annotated[
        RestPrecision,
        typer.Option(
            "--int8-rest",
            metavar="NAME",
            help="Precision of what does not become int8: fp32 for CPUs, fp16 for GPUs.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = "fp32",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="VIDEOS",
            help="A video or a folder of videos to calibrate int8 or fp8 on; repeatable.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = None,
    calibration_clips: Annotated[
        int | None,
        typer.Option(
            "--calibration-clips",
            min=1,
            metavar="N",
            help="Clips to take from those videos; by default 32.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--evaluate",
            metavar="ANNOTATIONS",
            help="Annotated videos to judge int8 or fp8 on, as `actionclip evaluate` takes them.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="File of the labels of --evaluate; a new bundle has no bank yet.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = None,
    label: LabelOption = None,
    annotated: AnnotationOptions = AnnotationOptions(),  # noqa: B008 - only its fields are used
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            help="Largest loss of top-1 on --evaluate; by default 0.5.",
            rich_help_panel=_QUANTIZED,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs that is proven to compute the same.

    The bundle appears under its name only after every graph, and the whole way from frames to
    scores, has agreed with PyTorch; otherwise nothing is left behind. In int8 and fp8, the blocks
    of the visual tower that cost most are left as they were, one after the other, until the bound
    is kept: the drop of top-1 with --evaluate, or else the cosine between features with and without
    quantisation, 0.999 in int8 and 0.99 in fp8.

    Example:
        actionclip export actionclip-k400-vit-b-32-8f
        actionclip export model.pt --output bundle --precision fp16
    """
    # What costs nothing comes first: PyTorch takes seconds to import, and a download minutes.
    if any(find_spec(name) is None for name in _NEEDED):
        raise MissingExtraError("actionclip export", "export")
    output = output or _default_output(checkpoint)
    if sha256 is not None:
        checkpoint = _pinned(checkpoint, sha256)
    chosen = given_templates(templates, template, label_only)
    _check_together(given_options(context), precision)
    is_quantized = precision in QUANTIZED_PRECISIONS
    quiet = as_json or not is_quantized  # the others show their steps in the bar's place
    steps = _Steps(output)
    with (
        tells_when_interrupted(steps.tell),
        wrong_arguments_are_usage_errors(),
        progress_bar(quiet=quiet) as bar,
    ):
        given: dict[str, Any] = {}
        if is_quantized:
            measure = None
            if evaluate is not None:
                texts = given_texts(labels, label)
                names = labels_among((), texts or labels, owner="a bundle that is being made")
                assert isinstance(names, tuple)
                measure = TopOne(annotated.read(evaluate, names), names, bar, max_pixels)
            int8 = (int8_recipe, int8_weights, int8_rest)
            given[precision] = _quantization_options(
                int8 if precision == "int8" else None,
                num_clips=calibration_clips,
                max_drop=max_drop,
                measure_top1=measure,
                on_progress=_Tasks(bar),
                calibration=tuple(calibration or ()),
                max_pixels=max_pixels,
            )
        check_replaceable(output, overwrite=overwrite, marker=MANIFEST_NAME)
        require_checkpoint(checkpoint)
        if find_published(checkpoint) is not None or is_address(checkpoint):
            local_checkpoint(checkpoint)  # whose download shows a bar of its own
        try:
            from actionclip_deploy.export import export_checkpoint
        except ImportError as exc:
            raise MissingExtraError("actionclip export", "export") from exc

        with steps.shown(precision), _clips_are_calibration_clips():
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
                max_pixels=max_pixels,
                licence=licence,
                overwrite=overwrite,
                on_step=steps,
                **given,
            )
    if as_json:
        print_json(_record(result))
    else:
        _print_result(result)


def _default_output(checkpoint: str) -> Path:
    if find_published(checkpoint) is None and checkpoint != "motions":
        raise usage_error(
            f"--output is missing; give the folder of the bundle of {checkpoint}. Only names that "
            "`actionclip models` lists have a folder by default."
        )
    return Path(checkpoint)


def _pinned(checkpoint: str, sha256: str) -> str:
    if not checkpoint.lower().startswith("https://") and not checkpoint.startswith("http://"):
        raise usage_error(f"--sha256 is for an https address, and {checkpoint} is none.")
    return with_sha256(checkpoint, sha256)


# Parameters that belong to --evaluate, to int8 alone, and to int8 and fp8.
_OF_EVALUATE = ("labels", "label", "root", "annotation_format", "subset", "split", "max_drop")
_OF_INT8 = ("int8_recipe", "int8_weights", "int8_rest")
_OF_BOTH = ("calibration", "calibration_clips", *_OF_EVALUATE, "evaluate")


def _check_together(given: dict[str, str], precision: str) -> None:
    """Refuse options that say nothing without others.

    Args:
        given: Those of the command line, as one writes them, by parameter.
        precision: What is asked for.
    """
    foreign = dict.fromkeys(_OF_INT8, "int8") if precision != "int8" else {}
    if precision not in QUANTIZED_PRECISIONS:
        foreign |= dict.fromkeys(_OF_BOTH, "int8 or fp8")
    for name, wanted in foreign.items():
        if name in given:
            raise usage_error(
                f"{given[name]} is for --precision {wanted} and the precision is {precision}; "
                f"leave it out or ask for {wanted}."
            )
    if "calibration_clips" in given and "calibration" not in given:
        raise usage_error("--calibration-clips needs --calibration VIDEOS to take clips from.")
    for name in _OF_EVALUATE:
        if name in given and "evaluate" not in given:
            raise usage_error(
                f"{given[name]} needs --evaluate ANNOTATIONS, the videos that it is judged on; "
                f"give it or leave {given[name]} out."
            )
    if "evaluate" in given and not {"labels", "label"} & given.keys():
        raise usage_error(
            "--evaluate needs --labels FILE or --label TEXT, the labels that its videos are of, as "
            "`actionclip evaluate` does."
        )


def _quantization_options(
    int8: tuple[str, str, RestPrecision] | None, **given: Any
) -> QuantizationOptions:
    """Options of int8 (recipe, weights, and the precision of the rest) or else of fp8."""
    from actionclip_deploy.export.quantization import Fp8Options, Int8Options, exact_weight_range

    given = {name: value for name, value in given.items() if value is not None}
    if int8 is None:
        return Fp8Options(**given)
    recipe, weights, rest = int8
    given["recipe"] = None if recipe == "auto" else recipe
    given["weight_range"] = exact_weight_range() if weights == "auto" else weights
    return Int8Options(rest=rest, **given)


@contextmanager
def _clips_are_calibration_clips() -> Iterator[None]:
    """Name the option by which clips are asked for here."""
    try:
        yield
    except ArgumentError as exc:
        if exc.argument != "num_clips":
            raise
        raise ArgumentError("calibration_clips", exc.problem) from exc


class TopOne:
    """Measures the top-1 of bundles on the same annotated videos."""

    def __init__(
        self, samples: Sequence[Sample], labels: Sequence[str], bar: Progress, max_pixels: int
    ) -> None:
        self._samples = samples
        self._max_pixels = max_pixels
        self._labels = labels
        self._bar = bar
        self._failed: set[Path] = set()
        self._bank: LabelBank | None = None  # text is fp32 in every trial, and so the same

    def __call__(self, bundle: Bundle) -> float:
        """Top-1 in percent."""
        # A graph on trial is run once and thrown away, so it does not belong in the cache.
        with open_runtime(bundle, cache=False) as runtime:
            if self._bank is None or self._bank.textual_sha256 != bundle.textual_sha256:
                self._bank = LabelBank.build(bundle, runtime, self._labels, name="evaluation")
            method = score_method_of(self._samples)
            recognizer = Recognizer(
                runtime, self._bank, top_k=1, method=method, max_pixels=self._max_pixels
            )
            evaluation = self._evaluate(recognizer)
        return 100 * float(evaluation.metrics.top1)

    def _evaluate(self, recognizer: Recognizer) -> Evaluation:
        task = self._bar.add_task("Measuring top-1", total=len(self._samples))

        def on_video(outcome: Prediction | FailedVideo) -> None:
            self._bar.advance(task)
            # Each is reported once, and not again for every choice of blocks.
            if isinstance(outcome, FailedVideo) and outcome.video not in self._failed:
                self._failed.add(outcome.video)
                print_warning(outcome.error)

        try:
            return run_evaluation(recognizer, self._samples, on_video=on_video)
        finally:
            self._bar.remove_task(task)


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


class _Steps:
    """Shows the steps of an export, and tells at a Ctrl-C what was the last.

    Args:
        output: The folder of the bundle.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._before = _identity(output)
        self._last = "Starting"
        self._show: Callable[[str], object] = lambda _: None

    def __call__(self, step: str) -> None:
        """Take a step that begins."""
        self._last = step
        self._show(step)

    @contextmanager
    def shown(self, precision: str) -> Iterator[None]:
        """Show one line that changes, or lines where progress bars have their place."""
        if precision in QUANTIZED_PRECISIONS:
            if notes.is_terminal:
                self._show = lambda step: notes.print(step, highlight=False)
            yield
            return
        with notes.status(self._last) as status:
            self._show = status.update
            yield

    def tell(self) -> str:
        """How far it came, and how to go on."""
        now = _identity(self._output)
        if now != self._before:
            return f"the bundle is whole, in {self._output}; `actionclip inspect` shows it."
        left = "nothing was written" if now is None else f"{self._output} is as it was"
        return f"its last step was: {self._last}; {left}, so repeat the command."


def _identity(folder: Path) -> int | None:
    """What changes where another folder takes the place of one."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _record(result: ExportResult) -> ExportRecord:
    loaded, quantization = result.checkpoint, result.quantization
    how: dict[str, Any] = {} if quantization is None else {"quantization": quantization.record()}
    return ExportRecord(
        bundle=str(result.bundle.path),
        family=loaded.family,
        num_frames=loaded.num_frames,
        num_frames_from=loaded.num_frames_from,
        notes=tuple(loaded.notes),
        manifest=result.bundle.manifest,
        parity=result.report.record(),
        **how,
    )


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
        _print_quantization(result.quantization)
    print_report(result.report, title="Agreement with PyTorch")
    size = sum(file.size_bytes for file in manifest.files.values())
    results.print(
        f"Wrote {result.bundle.path} ({size / 1e6:.1f} MB, {manifest.precision()}).",
        highlight=False,
        markup=False,
    )
    for name in result.bundle.label_bank_names():
        results.print(
            f"Its label bank {name} is ready: actionclip predict {result.bundle.path} VIDEO "
            f"--labels {name}",
            highlight=False,
            markup=False,
        )


def _print_quantization(quantization: Quantization) -> None:
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
