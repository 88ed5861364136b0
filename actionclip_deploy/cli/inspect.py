"""`actionclip inspect`: what a checkpoint, a bundle or an archive holds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.archive import is_archive
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    RUNNING,
    BaseOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    NumFramesOption,
    PrecisionOption,
    RunOptions,
)
from actionclip_deploy.cli.output import (
    print_json,
    print_sections,
    results,
    sections_of,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verify import in_shares
from actionclip_deploy.command_records import (
    ArchiveInspectionRecord,
    CheckpointSource,
    InspectedArchiveModel,
    InspectedModel,
    InspectionRecord,
)
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.known_words import read_vocabulary
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.published import require_checkpoint
from actionclip_deploy.records import UnreadVideo, file_text
from actionclip_deploy.runtimes.base import Audit


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A bundle, a checkpoint or an archive.")
    ],
    family: FamilyOption = "auto",
    num_frames: NumFramesOption = None,
    base: BaseOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            metavar="openvino",
            help="Compile a bundle, and tell what each of its graphs is computed in. Not auto: "
            "openvino alone tells.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint or a bundle: model, sizes, shapes, precision and origin.

    Of an archive, tell what its windows were made with, its cameras, and which videos failed.

    Example:
        actionclip inspect bundle
        actionclip inspect archive
        actionclip inspect bundle --runtime openvino --precision bf16
    """
    if runtime is None and (device is not None or precision is not None):
        raise usage_error("--device and --precision go with --runtime; give that, too.")
    if is_archive(path):
        if runtime is not None:
            raise usage_error(f"--runtime is {runtime}, and {path} is an archive; leave it out.")
        about = _describe_archive(path)
        if as_json:
            print_json(about)
        else:
            _print_archive(about)
        return
    audits: Mapping[GraphName, Audit] = {}
    if path.is_dir():
        opened = Bundle.open(path)
        report = _describe_bundle(opened)
        if runtime is not None:
            options = RunOptions(runtime=runtime, device=device, precision=precision)
            audits = _audit(opened, options)
            records = {str(graph): audit.record() for graph, audit in audits.items()}
            report = report.model_copy(update={"audit": records})
    elif runtime is not None:
        raise usage_error(f"--runtime is {runtime}, and {path} is no bundle; leave it out.")
    else:
        report = _describe_checkpoint(path, family=family, num_frames=num_frames, base=base)
    if as_json:
        print_json(report)
        return
    sections = sections_of(report)
    sections.pop("audit", None)
    if audits:
        sections["computed in"] = {str(name): in_shares(audit) for name, audit in audits.items()}
    print_sections(sections)


def _describe_archive(folder: Path) -> ArchiveInspectionRecord:
    from actionclip_deploy.search import Archive  # of a bundle nothing is searched

    with Archive.open(folder) as archive:
        failed = tuple(
            UnreadVideo(video=video.path, error=video.error)
            for video in archive.videos().values()
            if video.error is not None
        )
        snapshot = archive.snapshot()
        return ArchiveInspectionRecord(
            archive=archive.describe(snapshot),
            model=InspectedArchiveModel(**vars(archive.model)),
            num_undated=int(np.isnan(snapshot.recorded).sum()),
            num_failed=len(failed),
            failed=failed,
        )


def _print_archive(record: ArchiveInspectionRecord) -> None:
    archive = record.archive
    first, last = (
        None if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
        for seconds in (archive.first_seconds, archive.last_seconds)
    )
    contents = {
        "name": archive.name,
        "videos": archive.num_videos,
        "windows": archive.num_windows,
        "hours": f"{archive.hours:.2f}",
        "recorded from": first,
        "recorded to": last,
        "videos of unknown time": record.num_undated,
        "videos that failed": record.num_failed,
    }
    print_sections({"archive": contents, "model": record.model.to_dict()})
    table = Table(title="cameras", title_justify="left")
    table.add_column("folder", overflow="fold")
    for heading in ("videos", "windows"):
        table.add_column(heading, justify="right")
    for camera in archive.cameras:
        numbers = (f"{camera.num_videos:,}", f"{camera.num_windows:,}")
        table.add_row(escape(file_text(camera.name)), *numbers)
    results.print(table)
    if record.failed:
        table = Table(title="failed", title_justify="left")
        table.add_column("video", overflow="fold")
        table.add_column("why", overflow="fold")
        for video in record.failed:
            table.add_row(escape(file_text(video.video)), escape(video.error))
        results.print(table)


def _audit(bundle: Bundle, options: RunOptions) -> Mapping[GraphName, Audit]:
    if options.runtime != "openvino":
        raise usage_error(
            f"--runtime is {options.runtime!r}; openvino alone tells it here, and "
            "`actionclip verify` has what engines compute in."
        )
    with options.open(bundle) as runtime:
        return runtime.audit()


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
