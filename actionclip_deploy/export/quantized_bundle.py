"""From a staged bundle to one whose frames are encoded in int8 or fp8, behind a bound.

Each block of the tower is measured quantised by itself. All blocks become int8 or fp8; where the
bound is not kept, the block that hurts most goes back to what it was, then the next, until it is.
The bound is the accuracy on annotated videos where there are any, else the cosine to the features
of the unquantised graph.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.quantization import (
    BlockSensitivity,
    CalibrationClips,
    FeatureError,
    QuantizationOptions,
    QuantizedWriter,
    feature_error,
    measure_thresholds,
    opset_of,
    read_calibration_clips,
)
from actionclip_deploy.files import write_json
from actionclip_deploy.manifest import (
    GraphName,
    Manifest,
    QuantizationSpec,
    QuantizedPrecision,
)
from actionclip_deploy.runtimes.ort import GraphSession
from actionclip_deploy.runtimes.parity import Golden

QUANTIZATION_REPORT_NAME = "reports/quantization.json"

# Clips that sensitivities and cosines are measured on; 4 of 8 frames show a block's rank.
_NUM_PROBE_CLIPS = 4
# A drop of exactly the bound keeps it, whatever 97.2 - 96.7 is in binary.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Trial:
    """One choice of blocks, and what it kept.

    Attributes:
        unquantized_blocks: Blocks that were left as they were.
        value: The cosine, or the top-1 in percent.
        accepted: Whether that is within the bound.
    """

    unquantized_blocks: tuple[str, ...]
    value: float
    accepted: bool


@dataclass(frozen=True)
class Quantization:
    """How a quantised graph came about.

    Attributes:
        precision: What the products are computed in.
        spec: What the manifest says.
        sensitivities: Of each block alone, in the order of the tower.
        trials: Choices of blocks, the last one accepted.
        failed_videos: One sentence for each calibration video that gave no frames.
    """

    precision: QuantizedPrecision
    spec: QuantizationSpec
    sensitivities: tuple[BlockSensitivity, ...]
    trials: tuple[Trial, ...]
    failed_videos: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a ratio that is infinite is null."""
        return {
            **self.spec.model_dump(mode="json"),
            "sensitivity": [
                {
                    "block": row.block,
                    "sqnr_db": row.error.sqnr_db if math.isfinite(row.error.sqnr_db) else None,
                    "min_cosine": row.error.min_cosine,
                    "max_difference": row.error.max_difference,
                }
                for row in self.sensitivities
            ],
            "trials": [
                {
                    "unquantized_blocks": list(t.unquantized_blocks),
                    "value": t.value,
                    "accepted": t.accepted,
                }
                for t in self.trials
            ],
            "failed_videos": list(self.failed_videos),
        }


def quantize_bundle(
    folder: Path, manifest: Manifest, golden: Golden, options: QuantizationOptions
) -> tuple[Manifest, Quantization]:
    """Replace the graph that sees frames by a quantised form that keeps the bound.

    Args:
        folder: A staged bundle with its graphs in the precision of the rest.
        manifest: Its manifest, which says so.
        golden: Its golden data.
        options: How; their calibration videos are files, and no folders.

    Returns:
        The new manifest, without checksums, and how the graph came about.

    Raises:
        ExportError: If the tower has no blocks, the calibration videos cannot be used, or no
            choice of blocks keeps the bound.
    """
    name: GraphName = "visual" if "visual" in manifest.graphs else "video"
    graph = manifest.graphs[name]
    read = _read_clips(manifest, options)
    with TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        unquantized_value = _measure_unquantized(folder, manifest, options)
        for file in folder.glob(f"{graph.file}*"):  # weights beside the graph, where there are any
            shutil.move(file, scratch / file.name)
        source = scratch / graph.file
        writer = _open_writer(source, golden, read, name, options)
        sensitivities = writer.sensitivities(
            scratch, _progress(options, "Measuring blocks", len(writer.blocks))
        )
        stage = _Stage(folder, manifest, name, writer, options, unquantized_value)
        trials = stage.find_blocks(sensitivities)
        error = _golden_error(folder / graph.file, golden, by_frame=name == "visual")
    spec = _describe(options, writer.blocks, trials[-1], unquantized_value, len(read.clips), error)
    result = Quantization(options.precision, spec, sensitivities, trials, read.failed)
    report = folder / QUANTIZATION_REPORT_NAME
    report.parent.mkdir(exist_ok=True)
    write_json(report, result.to_dict())
    update = {"precision": options.precision, "opset": opset_of(folder / graph.file)}
    graphs = {**manifest.graphs, name: graph.model_copy(update=update)}
    return manifest.model_copy(update={"graphs": graphs, "quantization": spec}), result


class _Stage:
    """Tries choices of blocks in a staged bundle until one keeps the bound."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        name: GraphName,
        writer: QuantizedWriter,
        options: QuantizationOptions,
        unquantized_value: float | None,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._path = folder / manifest.graphs[name].file
        self._writer = writer
        self._options = options
        self._unquantized_value = unquantized_value

    def find_blocks(self, sensitivities: tuple[BlockSensitivity, ...]) -> tuple[Trial, ...]:
        """All trials; the graph of the last, which is accepted, is in the bundle."""
        by_harm = sorted(sensitivities, key=lambda row: row.error.sqnr_db)
        trials: list[Trial] = []
        for num_kept in range(len(by_harm)):
            kept = {row.block for row in by_harm[:num_kept]}
            trials.append(self._try(kept))
            if trials[-1].accepted:
                return tuple(trials)
        raise ExportError(self._refusal(trials))

    def _try(self, kept: set[str]) -> Trial:
        in_order = tuple(block for block in self._writer.blocks if block in kept)
        for file in self._folder.glob(f"{self._path.name}*"):
            file.unlink()
        self._writer.write(self._path, [b for b in self._writer.blocks if b not in kept])
        measure, options = self._options.measure_top1, self._options
        if measure is None or self._unquantized_value is None:
            cosine = self._writer.error_of(self._path).min_cosine
            return Trial(in_order, cosine, cosine >= options.min_cosine)
        top1 = measure(_sealed_bundle(self._folder, self._manifest))
        drop = self._unquantized_value - top1
        return Trial(in_order, top1, drop <= options.max_drop + _ROUNDING)

    def _refusal(self, trials: list[Trial]) -> str:
        best = max(trial.value for trial in trials)
        precision, rest = self._options.precision, self._options.rest_precision
        if self._unquantized_value is None:
            found = f"the features' cosine to {rest} is {best:.5f} at best"
            bound = f"at least {self._options.min_cosine}"
            way_out = "--evaluate to judge by accuracy instead"
        else:
            found = f"top-1 falls from {self._unquantized_value:.2f}% to {best:.2f}% at best"
            bound = f"a drop of at most {self._options.max_drop} points"
            way_out = "more annotated videos or a larger --max-drop"
        return (
            f"No choice of {precision} blocks keeps the bound: {found}, even with one block alone "
            f"in {precision}, and {bound} was asked for; give {way_out}, or export with "
            f"--precision {rest}."
        )


def _read_clips(manifest: Manifest, options: QuantizationOptions) -> CalibrationClips:
    if not options.calibration:
        size = manifest.model.input_size
        empty = np.empty((0, manifest.model.num_frames, size, size, 3), np.uint8)
        return CalibrationClips(empty, 0)
    told = _progress(options, "Reading calibration clips", options.num_clips)
    return read_calibration_clips(options.calibration, manifest, options.num_clips, on_clip=told)


def _open_writer(
    source: Path,
    golden: Golden,
    read: CalibrationClips,
    name: GraphName,
    options: QuantizationOptions,
) -> QuantizedWriter:
    by_frame = name == "visual"
    thresholds = None
    if options.chosen_recipe == "static":
        told = _progress(options, "Calibrating", len(read.clips))
        thresholds = measure_thresholds(
            source, read.clips, by_frame=by_frame, precision=options.precision, on_clip=told
        )
    clips = read.clips if len(read.clips) else golden.frames
    places = np.linspace(0, len(clips) - 1, min(_NUM_PROBE_CLIPS, len(clips))).astype(int)
    probe = clips[places]
    return QuantizedWriter(source, probe, by_frame=by_frame, options=options, thresholds=thresholds)


def _measure_unquantized(
    folder: Path, manifest: Manifest, options: QuantizationOptions
) -> float | None:
    if options.measure_top1 is None:
        return None
    return options.measure_top1(_sealed_bundle(folder, manifest))


def _sealed_bundle(folder: Path, manifest: Manifest) -> Bundle:
    """The staged bundle as it is now, opened; its manifest still says nothing of quantising."""
    write_manifest(folder, manifest.model_copy(update={"files": hash_files(folder)}))
    return Bundle.open(folder)


def _golden_error(path: Path, golden: Golden, *, by_frame: bool) -> FeatureError:
    """The new graph beside PyTorch, all rows in a call and each alone; the worse of the two."""
    session = GraphSession(path)
    if by_frame:
        assert golden.frame_features is not None  # there is a visual graph
        inputs: NDArray[np.uint8] = golden.frames.reshape(-1, *golden.frames.shape[2:])
        reference = golden.frame_features.reshape(len(inputs), -1)
    else:
        inputs, reference = golden.frames, golden.video_embeddings
    together = session.run(inputs)[0]
    alone = np.concatenate([session.run(row[np.newaxis])[0] for row in inputs])
    errors = [feature_error(features, reference) for features in (together, alone)]
    return FeatureError(
        sqnr_db=min(error.sqnr_db for error in errors),
        min_cosine=min(error.min_cosine for error in errors),
        max_difference=max(error.max_difference for error in errors),
    )


def _describe(
    options: QuantizationOptions,
    blocks: tuple[str, ...],
    chosen: Trial,
    unquantized_value: float | None,
    num_clips: int,
    error: FeatureError,
) -> QuantizationSpec:
    by_cosine = unquantized_value is None
    return QuantizationSpec(
        recipe=options.chosen_recipe,
        weight_range=options.chosen_weight_range,
        rest_precision=options.rest_precision,
        quantized_blocks=tuple(b for b in blocks if b not in chosen.unquantized_blocks),
        unquantized_blocks=chosen.unquantized_blocks,
        num_calibration_clips=num_clips,
        accepted_by="cosine" if by_cosine else "top1",
        bound=options.min_cosine if by_cosine else options.max_drop,
        unquantized_value=unquantized_value,
        quantized_value=chosen.value,
        golden_min_cosine=error.min_cosine,
        golden_max_difference=error.max_difference,
    )


def _progress(options: QuantizationOptions, task: str, total: int) -> Callable[[int], None]:
    return lambda done: options.on_progress(task, done, total)
