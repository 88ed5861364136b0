"""From a staged bundle to one whose frames are encoded in int8 or fp8 within a bound.

Each block of the tower is measured quantised by itself. All blocks become int8 or fp8; where the
bound is not kept, the block that hurts most goes back to what it was, then the next, until it is.
The bound is the accuracy on annotated videos where there are any, else the cosine to the features
of the unquantised graph.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.command_records import (
    BlockSensitivityRecord,
    QuantizationRecord,
    TrialRecord,
)
from actionclip_deploy.errors import ExportError
from actionclip_deploy.export.quantization import (
    BlockSensitivity,
    CalibrationClips,
    FeatureError,
    QuantizationOptions,
    QuantizedWriter,
    feature_error,
    measure_thresholds,
    read_calibration_clips,
)
from actionclip_deploy.files import write_json
from actionclip_deploy.manifest import (
    GraphName,
    Manifest,
    QuantizationSpec,
    QuantizedPrecision,
)
from actionclip_deploy.runtimes.onnx_graphs import opset_of, read_model
from actionclip_deploy.runtimes.ort import GraphSession
from actionclip_deploy.runtimes.parity import Golden

QUANTIZATION_REPORT_NAME = "reports/quantization.json"

# Clips that sensitivities and cosines are measured on; 4 of 8 frames show a block's rank.
_NUM_PROBE_CLIPS = 4
# A drop of exactly the bound keeps it, whatever 97.2 - 96.7 is in binary.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class QuantizationTrial:
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
    trials: tuple[QuantizationTrial, ...]
    failed_videos: tuple[str, ...]

    def record(self) -> QuantizationRecord:
        """As it leaves the program."""
        return QuantizationRecord(
            **self.spec.model_dump(),
            sensitivity=tuple(
                BlockSensitivityRecord(block=row.block, **asdict(row.error))
                for row in self.sensitivities
            ),
            trials=tuple(map(TrialRecord.model_validate, self.trials)),
            failed_videos=self.failed_videos,
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.record().model_dump(mode="json")


def quantize_bundle(
    folder: Path, manifest: Manifest, golden: Golden, options: QuantizationOptions
) -> tuple[Manifest, Quantization]:
    """Replace the graph that sees frames by a quantised form that keeps the bound.

    Args:
        folder: A staged bundle with its graphs in the precision of the rest.
        options: How; their calibration videos are files, and no folders.

    Returns:
        The new manifest, without checksums, and how the graph came about.

    Raises:
        ExportError: If the tower has no blocks, the calibration videos cannot be used, or no
            choice of blocks keeps the bound.
    """
    return _Search(folder, manifest, golden, options).run()


class _Search:
    """Tries choices of blocks in a staged bundle until one keeps the bound."""

    def __init__(
        self, folder: Path, manifest: Manifest, golden: Golden, options: QuantizationOptions
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._golden, self._options = golden, options
        self._name: GraphName = "visual" if "visual" in manifest.graphs else "video"
        self._by_frame = self._name == "visual"
        self._path = folder / manifest.graphs[self._name].file
        self._unquantized_value: float | None = None  # top-1 in percent, where it is measured

    def run(self) -> tuple[Manifest, Quantization]:
        """The new manifest, without checksums, and how the graph came about."""
        options, read = self._options, self._read_clips()
        with TemporaryDirectory(dir=self._folder.parent) as scratch_name:
            scratch = Path(scratch_name)
            if options.measure_top1 is not None:
                self._unquantized_value = options.measure_top1(self._sealed())
            for file in self._files():
                shutil.move(file, scratch / file.name)
            writer = self._open_writer(scratch / self._path.name, read.clips)
            told = self._progress("Measuring blocks", len(writer.blocks))
            sensitivities = writer.sensitivities(scratch, told)
            trials = self._find_blocks(writer, sensitivities)
        spec = self._describe(writer.blocks, trials[-1], len(read.clips))
        result = Quantization(options.precision, spec, sensitivities, trials, read.failed)
        report = self._folder / QUANTIZATION_REPORT_NAME
        report.parent.mkdir(exist_ok=True)
        write_json(report, result.to_dict())
        opset = opset_of(read_model(self._path, weights=False))
        update = {"precision": options.precision, "opset": opset}
        graph = self._manifest.graphs[self._name].model_copy(update=update)
        graphs = {**self._manifest.graphs, self._name: graph}
        return self._manifest.model_copy(update={"graphs": graphs, "quantization": spec}), result

    def _files(self) -> list[Path]:
        """The graph, and the weights next to it where there are any."""
        return list(self._folder.glob(f"{self._path.name}*"))

    def _progress(self, task: str, total: int) -> Callable[[int], None]:
        return lambda done: self._options.on_progress(task, done, total)

    def _read_clips(self) -> CalibrationClips:
        options, model = self._options, self._manifest.model
        if not options.calibration:
            shape = (0, model.num_frames, model.input_size, model.input_size, 3)
            return CalibrationClips(np.empty(shape, np.uint8), 0)
        told = self._progress("Reading calibration clips", options.num_clips)
        return read_calibration_clips(
            options.calibration,
            self._manifest,
            options.num_clips,
            max_pixels=options.max_pixels,
            on_clip=told,
        )

    def _open_writer(self, source: Path, clips: NDArray[np.uint8]) -> QuantizedWriter:
        options, thresholds = self._options, None
        if options.chosen_recipe == "static":
            thresholds = measure_thresholds(
                source,
                clips,
                by_frame=self._by_frame,
                precision=options.precision,
                on_clip=self._progress("Calibrating", len(clips)),
            )
        clips = clips if len(clips) else self._golden.frames
        places = np.linspace(0, len(clips) - 1, min(_NUM_PROBE_CLIPS, len(clips))).astype(int)
        return QuantizedWriter(
            source,
            clips[places],
            by_frame=self._by_frame,
            options=options,
            thresholds=thresholds,
        )

    def _sealed(self) -> Bundle:
        """The staged bundle as it is now; its manifest still says nothing of quantising."""
        files = hash_files(self._folder)
        write_manifest(self._folder, self._manifest.model_copy(update={"files": files}))
        return Bundle.open(self._folder)

    def _find_blocks(
        self, writer: QuantizedWriter, sensitivities: tuple[BlockSensitivity, ...]
    ) -> tuple[QuantizationTrial, ...]:
        """All trials; the graph of the last, which is accepted, is in the bundle."""
        by_harm = sorted(sensitivities, key=lambda row: row.error.sqnr_db)
        trials: list[QuantizationTrial] = []
        for num_kept in range(len(by_harm)):
            trials.append(self._try(writer, {row.block for row in by_harm[:num_kept]}))
            if trials[-1].accepted:
                return tuple(trials)
        raise ExportError(self._refusal(trials))

    def _try(self, writer: QuantizedWriter, kept: set[str]) -> QuantizationTrial:
        in_order = tuple(block for block in writer.blocks if block in kept)
        for file in self._files():
            file.unlink()
        writer.write(self._path, [block for block in writer.blocks if block not in kept])
        options = self._options
        if options.measure_top1 is None or self._unquantized_value is None:
            cosine = writer.error_of(self._path).min_cosine
            return QuantizationTrial(in_order, cosine, cosine >= options.min_cosine)
        top1 = options.measure_top1(self._sealed())
        drop = self._unquantized_value - top1
        return QuantizationTrial(in_order, top1, drop <= options.max_drop + _ROUNDING)

    def _refusal(self, trials: list[QuantizationTrial]) -> str:
        best = max(trial.value for trial in trials)
        precision, rest = self._options.precision, self._options.rest
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

    def _describe(
        self, blocks: tuple[str, ...], chosen: QuantizationTrial, num_clips: int
    ) -> QuantizationSpec:
        options, by_cosine = self._options, self._unquantized_value is None
        error = _golden_error(self._path, self._golden, by_frame=self._by_frame)
        return QuantizationSpec(
            recipe=options.chosen_recipe,
            weight_range=options.weight_range,
            rest_precision=options.rest,
            quantized_blocks=tuple(b for b in blocks if b not in chosen.unquantized_blocks),
            unquantized_blocks=chosen.unquantized_blocks,
            num_calibration_clips=num_clips,
            accepted_by="cosine" if by_cosine else "top1",
            bound=options.min_cosine if by_cosine else options.max_drop,
            unquantized_value=self._unquantized_value,
            quantized_value=chosen.value,
            golden_min_cosine=error.min_cosine,
            golden_max_difference=error.max_difference,
        )


def _golden_error(path: Path, golden: Golden, *, by_frame: bool) -> FeatureError:
    """The new graph against PyTorch, all rows in a call and each alone; the worse of the two."""
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
