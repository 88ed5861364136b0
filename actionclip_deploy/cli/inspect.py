"""`actionclip inspect`: what a checkpoint or a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    BaseOption,
    FamilyOption,
    JsonOption,
    NumFramesOption,
)
from actionclip_deploy.cli.output import (
    print_json,
    print_sections,
    sections_of,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import (
    CheckpointSource,
    InspectedModel,
    InspectionRecord,
)
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.known_words import read_vocabulary
from actionclip_deploy.published import require_checkpoint


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle or a checkpoint.")],
    family: FamilyOption = "auto",
    num_frames: NumFramesOption = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint or a bundle: model, sizes, shapes, precision and origin.

    Example:
        actionclip inspect bundle
    """
    if path.is_dir():
        report = _describe_bundle(Bundle.open(path))
    else:
        report = _describe_checkpoint(path, family=family, num_frames=num_frames, base=base)
    if as_json:
        print_json(report)
        return
    print_sections(sections_of(report))


def _describe_bundle(bundle: Bundle) -> InspectionRecord:
    manifest = bundle.manifest
    quantization = manifest.quantization
    files = {name: spec.size_bytes for name, spec in manifest.files.items()}
    model = manifest.model.model_dump()
    vocabulary, known = read_vocabulary(bundle), {}
    if vocabulary is not None:
        known = {"known_tokens": vocabulary.num_known, "tokens": len(vocabulary.is_known)}
    parameters, macs, flops = (model.pop(f"num_{what}") for what in ("parameters", "macs", "flops"))
    parts: dict[str, Any] = {
        "graphs": {
            name: f"{graph.input.name} {graph.input.dtype} {_shape(graph.input.shape)} -> "
            f"{graph.output.name} {graph.output.dtype} {_shape(graph.output.shape)}, "
            f"{graph.precision}, opset {graph.opset}, {files[graph.file] / 1e6:.1f} MB"
            for name, graph in manifest.graphs.items()
        },
        **({} if quantization is None else {"quantization": quantization}),
        "preprocessing": manifest.preprocessing,
        "scores": {**manifest.scores.model_dump(), "templates": manifest.templates},
        "source": {**manifest.source.model_dump(), "licence": manifest.licence},
        "labels": {"banks": bundle.label_bank_names(), **known},
        "versions": {**manifest.versions, "schema_version": manifest.schema_version},
    }
    return InspectionRecord(
        model=InspectedModel(**model),
        size={
            **{f"parameters_{part}": count for part, count in parameters.items()},
            "macs_per_clip": macs,
            "flops_per_clip": flops,
            "bytes": sum(files.values()),
        },
        **parts,
    )


def _describe_checkpoint(
    path: Path, *, family: str, num_frames: int | None, base: Path | None
) -> InspectionRecord:
    require_checkpoint(path)
    try:
        from actionclip_deploy.model import (
            count_flops,
            count_macs,
            count_parameters,
            load_checkpoint,
        )
    except ImportError as exc:
        raise MissingExtraError("actionclip inspect on a checkpoint", "torch") from exc

    with wrong_arguments_are_usage_errors():
        loaded = load_checkpoint(path, family=family, num_frames=num_frames, base=base)
    config = loaded.model.config
    return InspectionRecord(
        model=InspectedModel(
            backbone=config.backbone,
            visual_prompt=config.visual_prompt,
            num_frames=loaded.num_frames,
            num_frames_from=loaded.num_frames_from,
            input_size=config.input_size,
            embedding_dim=config.embed_dim,
            context_length=config.context_length,
            scale=config.scale,
        ),
        size={
            **{f"parameters_{part}": n for part, n in count_parameters(loaded.model).items()},
            "macs_per_clip": count_macs(config),
            "flops_per_clip": count_flops(config),
            "bytes": loaded.path.stat().st_size,
        },
        source=CheckpointSource(
            family=loaded.family,
            file=loaded.name,
            sha256=loaded.sha256,
            notes=tuple(loaded.notes),
        ),
    )


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(str(size) for size in shape)})"
