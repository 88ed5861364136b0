"""`actionclip export`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actionclip_deploy.cli.export_quantization import (
    CalibrationOption,
    ClipsOption,
    EvaluateFormatOption,
    EvaluateLabelsOption,
    EvaluateOption,
    EvaluateRootOption,
    MaxDropOption,
    RecipeOption,
    RestOption,
    WeightsOption,
    print_quantization,
    quantization_options,
    refuse_options,
)
from actionclip_deploy.cli.output import (
    BaseOption,
    JsonOption,
    OverwriteOption,
    notes,
    print_json,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verify import report_table
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.manifest import QUANTIZED_PRECISIONS, Precision, RestPrecision
from actionclip_deploy.prompts import LABEL_ONLY, read_templates

if TYPE_CHECKING:
    from actionclip_deploy.export import ExportResult
    from actionclip_deploy.export.quantization_options import QuantizationOptions


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
