"""From a checkpoint to a bundle that has passed the parity gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, get_args

import numpy as np

from actionclip_deploy.bundle import (
    MANIFEST_NAME,
    Bundle,
    check_replaceable,
    hash_files,
    new_folder,
    write_manifest,
)
from actionclip_deploy.errors import ArgumentError, ExportError
from actionclip_deploy.export.golden import GOLDEN_LABELS, golden_clips
from actionclip_deploy.export.graphs import GraphPlan, plan_graphs
from actionclip_deploy.export.layers import PixelStatistics
from actionclip_deploy.export.onnx_files import OPSET, write_graph
from actionclip_deploy.export.quantization import (
    Fp8Options,
    Int8Options,
    QuantizationOptions,
    check_num_clips,
    find_videos,
)
from actionclip_deploy.export.quantized_bundle import Quantization, quantize_bundle
from actionclip_deploy.files import write_json
from actionclip_deploy.labels import LabelBank, tokenise_prompts
from actionclip_deploy.manifest import (
    QUANTIZED_PRECISIONS,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    Precision,
    PreprocessingSpec,
    RestPrecision,
    ScoreSpec,
    SourceSpec,
)
from actionclip_deploy.model import (
    LoadedCheckpoint,
    count_flops,
    count_macs,
    count_parameters,
    load_checkpoint,
)
from actionclip_deploy.prompts import TEMPLATES, check_templates
from actionclip_deploy.published import find_published, published_labels, published_with
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden, ParityReport, verify
from actionclip_deploy.runtimes.pyt import TorchRuntime
from actionclip_deploy.tokenizer import (
    NUM_TOKENS,
    VOCABULARY_NAME,
    Tokenizer,
    Vocabulary,
    find_clip_merges,
)
from actionclip_deploy.video import MAX_PIXELS

TOKENIZER_NAME = "tokenizer.json"
PARITY_REPORT_NAME = "reports/parity.json"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TEXT_PRECISIONS: tuple[RestPrecision, ...] = get_args(RestPrecision)
_P = TypeVar("_P", bound=str)

# Packages whose versions a later reader of the bundle may have to know.
_PACKAGES = ("actionclip-deploy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, eq=False)
class ExportResult:
    """A bundle, the proof that it agrees with PyTorch, and the checkpoint that it came from.

    Attributes:
        checkpoint: How the checkpoint was read. Its model has its sizes and no weights any more;
            `load_checkpoint` loads them again.
        quantization: How its int8 or fp8 graph came about; None in the other precisions.
    """

    bundle: Bundle
    report: ParityReport
    checkpoint: LoadedCheckpoint
    quantization: Quantization | None = None


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    family: str = "auto",
    num_frames: int | None = None,
    precision: str = "fp32",
    text_precision: str = "fp32",
    base: str | Path | None = None,
    visual_prompt: str | None = None,
    templates: Sequence[str] | None = None,
    golden_videos: Iterable[str | Path] = (),
    max_pixels: int = MAX_PIXELS,
    licence: str | None = None,
    overwrite: bool = False,
    on_step: Callable[[str], None] | None = None,
    int8: Int8Options | None = None,
    fp8: Fp8Options | None = None,
) -> ExportResult:
    """Export a checkpoint as a bundle that is proven to compute what PyTorch computes.

    The bundle appears under its name only after each graph, and the whole way from frames to
    scores, agreed with PyTorch on ONNX Runtime; otherwise nothing is left behind. The same
    checkpoint gives the same bytes, under the same versions of the packages.

    Args:
        checkpoint: Whatever `load_checkpoint` takes. The bundle of a published checkpoint comes
            with the label bank of the labels that it was trained on, also where its file was
            given: it is known by its hash.
        precision: "fp32", "fp16", "int8" or "fp8". Heads that would lose by fp16 are fp32 in
            each; int8 and fp8 are for the blocks of the graph that sees frames.
        text_precision: "fp32" or "fp16", of the textual graph.
        templates: K templates; None for the family's own.
        golden_videos: Real videos for the golden inputs; without one, frames are rendered.
        max_pixels: Most pixels of a frame of those.
        licence: Of the weights, for the manifest; None for what the checkpoint states.
        on_step: Called with a short sentence when a step begins.
        int8: How "int8" is made and what it has to keep; None for the defaults.
        fp8: Likewise of "fp8", which cannot be without: it has calibration videos.

    Raises:
        ValueError: If an argument has a value that is not allowed.
        BundleError: If the output exists and may not be replaced, or cannot be written.
        CheckpointError: If the checkpoint cannot be read.
        LabelError: If a template cannot be used.
        VideoError: If a golden video gives no frames.
        ExportError: If the model cannot be exported, or no int8 or fp8 form of it keeps its bound.
        ParityError: If a graph disagrees with PyTorch; says which and by how much.
    """
    output, tell = Path(output), on_step or (lambda _: None)
    checked: Precision = _known(precision, "precision", PRECISIONS)
    text: RestPrecision = _known(text_precision, "text_precision", TEXT_PRECISIONS)
    options = _quantization_options(checked, int8, fp8)
    plain: RestPrecision = "fp16" if checked == "fp16" else "fp32"
    plain = plain if options is None else options.rest
    chosen = check_templates(templates) if templates is not None else None
    if licence is not None and not licence.strip():
        raise ArgumentError(
            "licence", "is empty; name the licence, or leave it out for what the checkpoint states."
        )
    check_replaceable(output, overwrite=overwrite, marker=MANIFEST_NAME)
    tell("Loading the checkpoint")
    loaded = load_checkpoint(
        checkpoint, family=family, num_frames=num_frames, base=base, visual_prompt=visual_prompt
    )
    plans, manifest = describe_checkpoint(
        loaded, precision=plain, text_precision=text, templates=chosen, licence=licence
    )
    if options is not None:
        check_num_clips(options, manifest)
    videos = [Path(path) for path in golden_videos]
    with new_folder(output, overwrite=overwrite, marker=MANIFEST_NAME) as folder:
        tell("Computing golden outputs with PyTorch")
        golden = _write_golden(folder, loaded, manifest, videos, max_pixels)
        for plan in plans:
            tell(f"Writing the {plan.name} graph")
            write_graph(plan, folder / manifest.graphs[plan.name].file)
        # The golden data stands for the model from here on, and the sessions are as large again.
        loaded.model.to("meta")
        quantization = None
        if options is not None:
            tell(f"Making the {checked} graph")
            manifest, quantization = quantize_bundle(folder, manifest, golden, options)
        tell("Comparing the graphs with PyTorch")
        report = _pass_gate(folder, manifest, golden)
        published = find_published(checkpoint) or published_with(loaded.sha256)
        if published is not None:
            tell(f"Embedding the labels of {published.labels}")
            _add_label_bank(folder, published.labels)
    return ExportResult(Bundle.open(output), report, loaded, quantization)


def _known(given: str, name: str, allowed: tuple[_P, ...]) -> _P:
    for known in allowed:
        if given == known:
            return known
    raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(allowed)}.")


def _quantization_options(
    precision: Precision, int8: Int8Options | None, fp8: Fp8Options | None
) -> QuantizationOptions | None:
    """The options of the precision, checked on this machine; None where nothing is quantised."""
    for name, given in (("int8", int8), ("fp8", fp8)):
        if given is not None and precision != name:
            raise ValueError(
                f"{name} options were given and precision is {precision}; leave one out."
            )
    if precision not in QUANTIZED_PRECISIONS:
        return None
    if int8 is not None:
        int8.check_machine()
    options = (fp8 or Fp8Options()) if precision == "fp8" else (int8 or Int8Options())
    # Now, and not after the minutes that the other graphs take.
    return replace(options, calibration=find_videos(options.calibration))


def describe_checkpoint(
    loaded: LoadedCheckpoint,
    *,
    precision: RestPrecision = "fp32",
    text_precision: RestPrecision = "fp32",
    templates: Sequence[str] | None = None,
    licence: str | None = None,
) -> tuple[tuple[GraphPlan, ...], Manifest]:
    """Plan the bundle of a checkpoint; nothing is computed or written.

    Returns:
        Its graphs, and its manifest without the files, which do not exist yet.

    Raises:
        ExportError: If it reads fewer tokens than CLIP's tokenizer gives.
    """
    config = loaded.model.config
    if config.vocab_size < NUM_TOKENS:
        raise ExportError(
            f"The token table of {loaded.path} has {config.vocab_size} rows, and CLIP's tokenizer, "
            f"the only one that a bundle can hold, has {NUM_TOKENS} tokens; export a checkpoint "
            "whose text encoder was trained with it."
        )
    pixels = PixelStatistics(loaded.pixel_mean, loaded.pixel_std)
    plans = plan_graphs(loaded.model, pixels, precision, text_precision)
    graphs = {
        plan.name: GraphSpec(
            file=f"{plan.name}.onnx",
            precision=plan.precision,
            opset=OPSET,
            input=plan.input,
            output=plan.output,
        )
        for plan in plans
    }
    manifest = Manifest(
        model=ModelSpec(
            backbone=config.backbone,
            visual_prompt=config.visual_prompt,
            num_frames=config.num_frames,
            max_frames=config.position_rows,
            fixed_num_frames=all("T" not in plan.input.shape for plan in plans),
            input_size=config.input_size,
            embedding_dim=config.embed_dim,
            context_length=config.context_length,
            clip_seconds=loaded.clip_seconds,
            num_parameters=count_parameters(loaded.model),
            num_macs=count_macs(config),
            num_flops=count_flops(config),
        ),
        preprocessing=PreprocessingSpec(
            resize_size=_resize_size(loaded),
            interpolation="bicubic",
            pixel_mean=loaded.pixel_mean,
            pixel_std=loaded.pixel_std,
        ),
        scores=ScoreSpec(scale=config.scale),
        templates=tuple(templates or loaded.templates or TEMPLATES),
        graphs=graphs,
        source=SourceSpec(
            family=loaded.family,
            file=loaded.name,
            sha256=loaded.sha256,
            num_frames_from=loaded.num_frames_from,
            base_file=loaded.base.name if loaded.base else None,
            base_sha256=loaded.base_sha256,
        ),
        versions={package: version(package) for package in _PACKAGES},
        licence=licence or loaded.licence,
        files={},
    )
    return plans, manifest


def _resize_size(loaded: LoadedCheckpoint) -> int:
    """Short side that a frame has before its crop.

    Source:
        sallymmx/ActionCLIP@31c34df utils/Augmentation.py: 256 for 224 and in this ratio.
        whwu95/Text4Vis@d61b34d: 256 for 224, but no margin around 336.
    """
    size = loaded.model.config.input_size
    if loaded.family == "text4vis" and size == 336:
        return size
    return size * 256 // 224


def _write_golden(
    folder: Path,
    loaded: LoadedCheckpoint,
    manifest: Manifest,
    videos: Sequence[Path],
    max_pixels: int,
) -> Golden:
    tokenizer = _write_tokenizer(folder, loaded)
    tokens = tokenise_prompts(
        tokenizer,
        GOLDEN_LABELS,
        manifest.templates,
        context_length=manifest.model.context_length,
    )
    frames, origin = golden_clips(manifest, videos, max_pixels=max_pixels)
    with TorchRuntime(manifest, loaded.model) as reference:
        golden = Golden.from_reference(reference, frames, tokens, GOLDEN_LABELS, origin=origin)
    golden.save(folder)
    return golden


def _write_tokenizer(folder: Path, loaded: LoadedCheckpoint) -> Tokenizer:
    """Write the tokenizer, and which of its tokens the model knows if those are not all.

    Rows of the token table that nobody trained are zero in the packaged model, and stay so in
    whatever is fine-tuned from it; in CLIP, where rows begin as noise, none is.
    """
    tokenizer = Tokenizer.from_clip_merges(find_clip_merges())
    tokenizer.save(folder / TOKENIZER_NAME)
    table = loaded.model.towers.token_embedding.weight[:NUM_TOKENS]
    is_known = (table != 0).any(dim=1).cpu().numpy().astype(np.bool_)
    if not is_known.all():
        Vocabulary(is_known).save(folder / VOCABULARY_NAME)
    return tokenizer


def _pass_gate(folder: Path, manifest: Manifest, golden: Golden) -> ParityReport:
    """Compare the staged bundle with the reference, write the report, and seal the manifest."""
    manifest = _sealed(folder, manifest, hash_files(folder))
    with OrtRuntime(Bundle.open(folder)) as runtime:
        report = verify(runtime, golden)
    report.check()
    path = folder / PARITY_REPORT_NAME
    path.parent.mkdir(exist_ok=True)
    write_json(path, report.to_dict())
    reports = hash_files(path.parent)
    named = {f"{path.parent.name}/{name}": spec for name, spec in reports.items()}
    _sealed(folder, manifest, {**manifest.files, **named})
    return report


def _add_label_bank(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    with OrtRuntime(bundle) as runtime:
        LabelBank.build(bundle, runtime, published_labels(name), name=name).save(bundle)


def _sealed(folder: Path, manifest: Manifest, files: dict[str, FileSpec]) -> Manifest:
    """Write the manifest with the checksums of its files."""
    sealed = manifest.model_copy(update={"files": dict(sorted(files.items()))})
    write_manifest(folder, sealed)
    return sealed


# A checkpoint that nobody exported, opened as if it were a bundle: PyTorch runs it.


@contextmanager
def open_checkpoint(
    checkpoint: str | Path,
    *,
    family: str = "auto",
    num_frames: int | None = None,
    base: str | Path | None = None,
    visual_prompt: str | None = None,
    device: str = "cpu",
    num_threads: int | None = None,
) -> Iterator[tuple[Bundle, TorchRuntime]]:
    """Open a checkpoint in PyTorch for the time of a block.

    Preprocessing, templates and scale are those that its bundle would have.

    Yields:
        A bundle that holds a tokenizer and no graphs, enough to build label banks for, and the
        runtime.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        ExportError: If no bundle can be made of it.
        RuntimeUnavailableError: If there is no such device.
    """
    loaded = load_checkpoint(
        checkpoint, family=family, num_frames=num_frames, base=base, visual_prompt=visual_prompt
    )
    _, manifest = describe_checkpoint(loaded)
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokenizer(folder, loaded)
        manifest = manifest.model_copy(update={"files": hash_files(folder)})
        runtime = TorchRuntime(manifest, loaded.model, device=device, num_threads=num_threads)
        with runtime:
            yield Bundle(folder, manifest), runtime
