"""A ViT in int8 or fp8: what may be asked for, how it is calibrated, and how it is rewritten.

The order of the module is that of an export: options, calibration clips, thresholds of activations,
rounding of weights, the products of a graph and their quantised form, and what that does to
features, block by block.

The graph is rewritten here and not with `onnxruntime.quantization`, which was tried on ONNX Runtime
1.32: for the dynamic recipe it gives the same session and the same numbers, in five times the time
and with files of its own next to the graph; its static recipe leaves a bias either where the CPU
computes the product in fp32 again, or as int32, which TensorRT refuses.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, get_args

import ml_dtypes  # comes with onnx
import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ArgumentError, ExportError, VideoError
from actionclip_deploy.export.golden import clips_of_video
from actionclip_deploy.manifest import Int8Recipe, QuantizedPrecision, RestPrecision, WeightRange
from actionclip_deploy.model.checkpoint_files import machine_memory_bytes
from actionclip_deploy.runtimes.machine import describe_machine
from actionclip_deploy.runtimes.onnx_graphs import (
    FP32,
    add_outputs,
    array_of,
    make_node,
    make_tensor,
    read_model,
    rebuild,
    write_model,
)
from actionclip_deploy.runtimes.ort import GraphSession
from actionclip_deploy.sampling import MAX_CLIPS
from actionclip_deploy.video import MAX_PIXELS
from actionclip_deploy.video.reader import VIDEO_SUFFIXES, list_videos

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from actionclip_deploy.manifest import Manifest


NUM_CALIBRATION_CLIPS = 32
MIN_COSINE = 0.999
# fp8 keeps 4 bits of a number and int8 up to 8, so the same bound would send blocks of a good
# graph back. With all blocks in fp8 the default model keeps 0.997 and loses no accuracy, and a
# ViT-B/32 with random weights keeps 0.9989.
FP8_MIN_COSINE = 0.99
MAX_DROP_POINTS = 0.5

# Instructions that add products of int8 in 32 bits.
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_LARGEST_FAILED_SHARE = 0.5  # of calibration videos


@dataclass(frozen=True)
class _Options:
    """What a quantised graph is calibrated on, and what it has to keep.

    Attributes:
        calibration: Video files, and folders of them.
        num_clips: Clips that are taken from them.
        max_pixels: Most pixels of a frame of those.
        min_cosine: What features have to keep, where no accuracy is measured.
        measure_top1: Gives the accuracy of a bundle in percent; None where there are no annotated
            videos.
        max_drop: Points of it that quantising may cost.
        on_progress: Called with a task in words, what is done and what there is to do.
    """

    calibration: tuple[Path, ...] = ()
    num_clips: int = NUM_CALIBRATION_CLIPS
    max_pixels: int = MAX_PIXELS
    min_cosine: float = MIN_COSINE
    measure_top1: Callable[[Bundle], float] | None = None
    max_drop: float = MAX_DROP_POINTS
    on_progress: Callable[[str, int, int], None] = lambda *_: None

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ArgumentError("num_clips", f"is {self.num_clips}; it must be 1 or more.")
        if not 0 <= self.max_drop <= 100:
            raise ArgumentError("max_drop", f"is {self.max_drop}; it must be 0 to 100 points.")
        if not 0 < self.min_cosine < 1:
            raise ArgumentError("min_cosine", f"is {self.min_cosine}; it must be between 0 and 1.")


@dataclass(frozen=True)
class Int8Options(_Options):
    """How an int8 graph is made and what it has to keep.

    Attributes:
        recipe: `dynamic`, for CPUs, or `static`, which TensorRT takes too and which needs
            calibration; None for static where there are calibration videos.
        weight_range: `reduced` is right on every CPU; `full` needs VNNI on x86, and is a little
            closer to fp32.
        rest: What the other products are computed in: `fp32`, which CPUs want, or `fp16`, which
            GPUs want and the static recipe alone can have.
    """

    precision: ClassVar[QuantizedPrecision] = "int8"
    recipe: Int8Recipe | None = None
    weight_range: WeightRange = "reduced"
    rest: RestPrecision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (
            ("recipe", self.recipe, (None, *get_args(Int8Recipe))),
            ("weight_range", self.weight_range, get_args(WeightRange)),
            ("rest", self.rest, get_args(RestPrecision)),
        ):
            if value not in allowed:
                words = ", ".join(str(word) for word in allowed)
                raise ValueError(f"{name} is {value!r}; it must be one of {words}.")
        if self.recipe == "static" and not self.calibration:
            raise ValueError(
                "The recipe static needs calibration videos, from which it takes its scales; give "
                "some, or take the recipe dynamic."
            )
        if self.rest == "fp16" and self.chosen_recipe == "dynamic":
            raise ValueError(
                "The recipe dynamic is for CPUs and has its rest in fp32; give calibration videos "
                "for the recipe static, or leave the rest in fp32."
            )

    @property
    def chosen_recipe(self) -> Int8Recipe:
        """The recipe that is taken."""
        return self.recipe or ("static" if self.calibration else "dynamic")

    def check_machine(self) -> None:
        """Refuse weights that this CPU, on which the graph is judged, cannot compute with."""
        # Between fp16, ONNX Runtime multiplies dequantised numbers, which cannot saturate.
        saturates = self.weight_range == "full" and self.rest == "fp32"
        if saturates and exact_weight_range() != "full":
            raise ValueError(
                "weight_range is full, and this CPU has no VNNI: sums of such products saturate "
                "on it, so the graph cannot be judged here; take reduced weights, or export on a "
                "CPU with VNNI."
            )


@dataclass(frozen=True)
class Fp8Options(_Options):
    """How an fp8 graph, which is for GPUs, is made and what it has to keep.

    Its scales are static and need calibration videos. The other products are as in fp16.
    """

    precision: ClassVar[QuantizedPrecision] = "fp8"
    chosen_recipe: ClassVar[Int8Recipe] = "static"
    weight_range: ClassVar[WeightRange | None] = None  # there is one range
    rest: ClassVar[RestPrecision] = "fp16"
    min_cosine: float = FP8_MIN_COSINE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.calibration:
            raise ValueError(
                "fp8 needs calibration videos, from which it takes its scales; give some, or take "
                "the precision fp16."
            )


QuantizationOptions: TypeAlias = Int8Options | Fp8Options


def exact_weight_range() -> WeightRange:
    """The largest weights with which this CPU's int8 products do not saturate."""
    machine = describe_machine()
    # Arm's kernels add in 32 bits, or pairs that fit into 16.
    is_arm = machine["architecture"].lower() in ("aarch64", "arm64")
    return "full" if is_arm or _VNNI & set(machine["cpu_flags"]) else "reduced"


@dataclass(frozen=True, eq=False)
class CalibrationClips:
    """Clips, and what they were taken from.

    Attributes:
        clips: RGB, shape (C, T, S, S, 3).
        failed: One sentence for each video that gave none.
    """

    clips: NDArray[np.uint8]
    num_videos: int
    failed: tuple[str, ...] = ()


def find_videos(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Videos among files and below folders, each folder's sorted.

    Raises:
        ExportError: If a path does not exist or is neither file nor folder, or a folder holds no
            video.
    """
    videos: list[Path] = []
    for path in paths:
        # These raise nothing, of a name too long or a folder not readable either.
        if os.path.isdir(path):  # noqa: PTH112
            found = list_videos(path, recursive=True)
            if not found:
                raise ExportError(
                    f"The calibration folder {path} holds no video, neither at its top nor below; "
                    f"give one with files that end in {', '.join(sorted(VIDEO_SUFFIXES))}, or name "
                    "the files themselves."
                )
            videos += found
        elif os.path.isfile(path):  # noqa: PTH113
            videos.append(path)
        elif os.path.lexists(path):
            raise ExportError(
                f"{path} is neither a file nor a folder; give video files or a folder of them to "
                "calibrate with."
            )
        else:
            raise ExportError(
                f"There is no {path} to calibrate with; give video files or a folder of them."
            )
    return tuple(dict.fromkeys(videos))


def check_num_clips(options: QuantizationOptions, manifest: Manifest) -> None:
    """Refuse more calibration clips than the videos give or this machine can hold.

    Args:
        options: With the videos in the place of their folders.

    Raises:
        ArgumentError: If there are more; says how many there may be.
    """
    if not options.calibration:
        return
    model, num_videos = manifest.model, len(options.calibration)
    clip_bytes = 3 * model.num_frames * model.input_size**2
    # Twice, since the clips of the videos are put together at the end.
    most_held = machine_memory_bytes() // (2 * clip_bytes)
    most = min(MAX_CLIPS * num_videos, most_held)
    if options.num_clips > most:
        raise ArgumentError(
            "num_clips",
            f"is {options.num_clips}; {num_videos} calibration videos and the memory of this "
            f"machine allow {most:,} at most, and some hundred are enough.",
        )


def read_calibration_clips(
    videos: Sequence[Path],
    manifest: Manifest,
    num_clips: int = NUM_CALIBRATION_CLIPS,
    *,
    max_pixels: int = MAX_PIXELS,
    on_clip: Callable[[int], None] | None = None,
) -> CalibrationClips:
    """Read clips, from as many of the videos as there are clips.

    With more videos than clips, those that are read are spread evenly over the list, since a
    folder often holds one label after the other; with fewer, a video gives several clips. One that
    cannot be read is passed over and the next of the list takes its place.

    Raises:
        ExportError: If more than half of the videos that were tried cannot be read.
    """
    per_video = -(-num_clips // len(videos))
    wanted = -(-num_clips // per_video)
    order = _spread_first(len(videos), wanted)
    parts: list[NDArray[np.uint8]] = []
    failed: list[str] = []
    for place in order:
        try:
            clips = clips_of_video(videos[place], manifest, per_video, max_pixels=max_pixels)
            parts.append(clips)
        except VideoError as exc:
            failed.append(str(exc))
        if on_clip is not None:
            on_clip(min(len(parts) * per_video, num_clips))
        if len(parts) == wanted:
            break
    if len(failed) > _LARGEST_FAILED_SHARE * (len(parts) + len(failed)):
        raise ExportError(
            f"{len(failed)} of {len(parts) + len(failed)} calibration videos cannot be read, and "
            f"at most half may fail; give others. The first: {failed[0]}"
        )
    return CalibrationClips(np.concatenate(parts)[:num_clips], len(parts), tuple(failed))


def _spread_first(num_videos: int, wanted: int) -> list[int]:
    """All places in a list, those first that are spread evenly over it."""
    spread = np.linspace(0, num_videos - 1, min(wanted, num_videos)).astype(int).tolist()
    return [*spread, *(place for place in range(num_videos) if place not in set(spread))]


_NUM_BINS = 2048  # even
_NUM_CANDIDATES = 128
_SMALLEST_SHARE = 0.05  # of the largest magnitude, that a threshold may be


class MagnitudeHistogram:
    """Counts of the magnitudes of all values seen; its range doubles when a larger one comes."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._range = 0.0
        self._counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Count values of any shape and type."""
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if largest == 0.0:
            self._counts[0] += magnitudes.size
            return
        self.largest = max(self.largest, largest)
        self._range = self._range or largest
        while largest > self._range:
            self._range *= 2
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([pairs, np.zeros(_NUM_BINS // 2, np.int64)])
        bins = (magnitudes * np.float32(_NUM_BINS / self._range)).astype(np.int64)
        self._counts += np.bincount(bins.clip(max=_NUM_BINS - 1), minlength=_NUM_BINS)

    def best_threshold(self) -> float:
        """The magnitude to cut off at for int8, by the mean squared error of rounding and cutting.

        It is the largest magnitude where that is best; 1 where every value was 0.
        """
        if self.largest == 0.0:
            return 1.0
        centres = (np.arange(_NUM_BINS) + 0.5) * (self._range / _NUM_BINS)
        best, least = self.largest, np.inf
        for share in np.linspace(1.0, _SMALLEST_SHARE, _NUM_CANDIDATES):
            threshold = self.largest * share
            step = threshold / ACTIVATION_LIMIT
            rounded = np.rint(centres / step).clip(max=ACTIVATION_LIMIT) * step
            error = float(((centres - rounded) ** 2) @ self._counts)
            if error < least:
                best, least = threshold, error
        return float(best)


def measure_thresholds(
    path: Path,
    clips: NDArray[np.uint8],
    *,
    by_frame: bool,
    precision: QuantizedPrecision = "int8",
    on_clip: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Find the threshold of the input of each product that can be quantised.

    The activations of one clip at a time are in memory.

    Args:
        path: The fp32 or fp16 graph; a file next to it is written and removed.
        by_frame: Whether the graph takes frames and not clips.
        precision: What is rounded to. In int8 the steps are as wide for small values as for large
            ones, so outliers are cut off; in fp8 they are not, and the threshold is the largest
            magnitude.
    """
    types = input_types(read_model(path))
    names = list(types)
    with_outputs = path.with_name(f"{path.stem}-activations.onnx")
    histograms = {name: MagnitudeHistogram() for name in names}
    try:
        add_outputs(path, with_outputs, types)
        session = GraphSession(with_outputs, names)
        for done, clip in enumerate(clips, 1):
            arrays = session.run(clip if by_frame else clip[np.newaxis])
            for name, array in zip(names, arrays, strict=True):
                histograms[name].add(array)
            if on_clip is not None:
                on_clip(done)
    finally:
        with_outputs.unlink(missing_ok=True)
    if precision == "fp8":
        return {name: histogram.largest or 1.0 for name, histogram in histograms.items()}
    return {name: histogram.best_threshold() for name, histogram in histograms.items()}


# Largest magnitude of a weight. CPUs without VNNI add pairs of products of uint8 and int8 in 16
# bits, and saturate: 2 x 255 x 127 does not fit, 2 x 255 x 64 does.
WEIGHT_LIMITS: dict[WeightRange, int] = {"reduced": 64, "full": 127}
ACTIVATION_LIMIT = 127
# The largest number of float8e4m3fn. It has 4 bits of mantissa for small numbers as for large
# ones, so that nothing is gained by cutting off outliers.
FP8_LIMIT = 448


@dataclass(frozen=True)
class Numbers:
    """What values are rounded to.

    Attributes:
        name: Goes into the names of rounded values.
        weight_limit: The largest magnitude of a weight.
        activation_limit: The largest magnitude of an activation, after which it saturates.
    """

    name: QuantizedPrecision
    dtype: np.dtype[Any]
    weight_limit: int
    activation_limit: int


def numbers_of(precision: QuantizedPrecision, weight_range: WeightRange | None = None) -> Numbers:
    """What a precision rounds to; the range of weights is for int8, by default `reduced`."""
    if precision == "fp8":
        return Numbers("fp8", np.dtype(ml_dtypes.float8_e4m3fn), FP8_LIMIT, FP8_LIMIT)
    limit = WEIGHT_LIMITS[weight_range or "reduced"]
    return Numbers("int8", np.dtype(np.int8), limit, ACTIVATION_LIMIT)


def quantize_weight(
    weight: NDArray[np.floating[Any]], numbers: Numbers
) -> tuple[NDArray[Any], NDArray[np.floating[Any]]]:
    """Round a weight, with a scale for each output.

    Args:
        weight: fp32 or fp16, shape (inputs, outputs).

    Returns:
        Rounded values of the same shape, and scales (outputs,) in the weight's type; weight is
        about values x scales.
    """
    limit, given = numbers.weight_limit, weight.astype(np.float32)
    scale = round_scales(np.abs(given).max(axis=0) / limit, weight.dtype)
    values = (given / scale.astype(np.float32)).clip(-limit, limit)
    if numbers.dtype == np.int8:
        values = np.rint(values)
    return values.astype(numbers.dtype), scale


def round_scales(
    scales: NDArray[np.floating[Any]], dtype: np.dtype[Any]
) -> NDArray[np.floating[Any]]:
    """Scales in the type that a graph computes in, none of them zero."""
    rounded = np.asarray(scales, np.float32).astype(dtype)
    smallest = np.finfo(dtype).smallest_subnormal
    return np.where(scales > 0, np.maximum(rounded, smallest), np.ones((), dtype))


# Scales in fp16, and fp8 at all, came into QuantizeLinear and DequantizeLinear here; IR version 9.
_TYPED_OPSET = 19

# Products of a block, named after the weights of `VitTower`. The patch embedding and the last
# projection are in no block, and products of two activations have no weight.
_BLOCK = re.compile(r"^tower\.(?:(blocks\.\d+)|(last_block))\.")


@dataclass(frozen=True)
class Product:
    """A product of rows with a weight, in a block of the tower.

    Attributes:
        node: Its place among the nodes of the graph.
        block: Name of the block: `blocks.0` and so on, and `last_block`.
        input: The rows, a value of the graph.
        weight: The initializer, shape (inputs, outputs).
        bias: The initializer, shape (outputs,), or None.
        output: The result, a value of the graph.
    """

    node: int
    block: str
    input: str
    weight: str
    bias: str | None
    output: str


def find_products(model: Any) -> tuple[Product, ...]:
    """Products of a graph that can be computed in int8 or fp8, in their order.

    Raises:
        ExportError: If there are none, as in CLIP's ResNets.
    """
    products = []
    for place, node in enumerate(model.graph.node):
        found = _BLOCK.match(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if found:
            bias = node.input[2] if len(node.input) > 2 else None
            names = (node.input[0], node.input[1], bias, node.output[0])
            products.append(Product(place, found[1] or found[2], *names))
    if not products:
        raise ExportError(
            "The visual tower has no transformer blocks, and int8 and fp8 are for their products "
            "alone; export this checkpoint with --precision fp32 or fp16."
        )
    return tuple(products)


def input_types(model: Any) -> dict[str, int]:
    """The values that products take as rows, with their types as `onnx.TensorProto` has them."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {product.input: types[product.weight] for product in find_products(model)}


def block_names(products: Collection[Product]) -> tuple[str, ...]:
    """The blocks that products are of, in their order."""
    return tuple(dict.fromkeys(product.block for product in products))


def quantize(
    model: Any,
    *,
    blocks: Collection[str],
    recipe: Int8Recipe,
    weight_range: WeightRange | None = None,
    thresholds: Mapping[str, float] | None = None,
    precision: QuantizedPrecision = "int8",
) -> Any:
    """Compute the products of some blocks in int8 or fp8.

    Weights are symmetric, with a scale for each output. `dynamic` scales the rows of a call by
    their smallest and largest value, as uint8. `static` has one scale for each product, around
    zero, as pairs of QuantizeLinear and DequantizeLinear, which TensorRT takes. These dequantise
    to the type that the graph computes the products in, which therefore stays the type of all else.

    Args:
        model: The fp32 or, for `static`, fp16 graph, an `onnx.ModelProto` with its weights; it is
            left as it is.
        recipe: How activations are scaled; fp8 is always static.
        thresholds: For `static`: the largest magnitude that the input of each product keeps.

    Returns:
        A new `onnx.ModelProto`. Its opset is 19 where fp8 or scales in fp16 need it.
    """
    chosen = {p.node: p for p in find_products(model) if p.block in blocks}
    weights = {i.name: i for i in model.graph.initializer}
    numbers = numbers_of(precision, weight_range)
    writer = _Writer(numbers, recipe, thresholds or {})
    for place, node in enumerate(model.graph.node):
        if place in chosen:
            writer.add_product(chosen[place], array_of(weights[chosen[place].weight]))
        else:
            writer.nodes.append(node)
    return rebuild(
        model,
        writer.nodes,
        {**weights, **writer.initializers},
        least_opset=_TYPED_OPSET if writer.needs_typed_opset else 0,
    )


class _Writer:
    """Collects the nodes and weights of the new graph."""

    def __init__(
        self, numbers: Numbers, recipe: Int8Recipe, thresholds: Mapping[str, float]
    ) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.needs_typed_opset = numbers.name == "fp8"
        self._numbers = numbers
        self._recipe = recipe
        self._thresholds = thresholds
        self._quantized: set[str] = set()

    def add_product(self, product: Product, weight: NDArray[np.floating[Any]]) -> None:
        """Add the quantised form of a product, and its bias as it was."""
        values, scale = quantize_weight(weight, self._numbers)
        name, kind = product.weight, self._numbers.name
        self._constant(f"{name}.{kind}", values)
        self._constant(f"{name}.scale", scale)
        self._constant(f"{name}.zero", np.zeros(scale.shape, self._numbers.dtype))
        self.needs_typed_opset |= scale.dtype != np.float32
        if self._recipe == "dynamic":
            self._add_dynamic(product)
        else:
            self._add_static(product, scale)

    def _add_dynamic(self, product: Product) -> None:
        rows, weight, output = product.input, product.weight, product.output
        if rows not in self._quantized:  # once, whatever the number of products that take it
            self._quantized.add(rows)
            names = [f"{rows}.int8", f"{rows}.scale", f"{rows}.zero"]
            self._node("DynamicQuantizeLinear", [rows], names)
        # In this form ONNX Runtime fuses all of it, with the bias, into DynamicQuantizeMatMul.
        operands = [f"{rows}.int8", f"{weight}.int8", f"{rows}.zero", f"{weight}.zero"]
        self._node("MatMulInteger", operands, [f"{output}.sums"])
        self._node("Cast", [f"{output}.sums"], [f"{output}.cast"], to=FP32)
        self._node("Mul", [f"{rows}.scale", f"{weight}.scale"], [f"{output}.scale"])
        result = output if product.bias is None else f"{output}.product"
        self._node("Mul", [f"{output}.cast", f"{output}.scale"], [result])
        if product.bias is not None:
            self._node("Add", [result, product.bias], [output])

    def _add_static(self, product: Product, weight_scale: NDArray[np.floating[Any]]) -> None:
        rows, weight, output = product.input, product.weight, product.output
        kind, dtype = self._numbers.name, weight_scale.dtype
        if rows not in self._quantized:
            self._quantized.add(rows)
            scale = np.asarray(self._thresholds[rows] / self._numbers.activation_limit)
            self._constant(f"{rows}.scale", round_scales(scale, dtype))
            self._constant(f"{rows}.zero", np.zeros((), self._numbers.dtype))
            parameters = [f"{rows}.scale", f"{rows}.zero"]
            self._node("QuantizeLinear", [rows, *parameters], [f"{rows}.{kind}"])
            self._node("DequantizeLinear", [f"{rows}.{kind}", *parameters], [f"{rows}.rounded"])
        parts = [f"{weight}.{kind}", f"{weight}.scale", f"{weight}.zero"]
        self._node("DequantizeLinear", parts, [f"{weight}.rounded"], axis=1)
        result = output if product.bias is None else f"{output}.product"
        self._node("MatMul", [f"{rows}.rounded", f"{weight}.rounded"], [result])
        if product.bias is None:
            return
        if kind == "int8" and dtype == np.float32:
            # ONNX Runtime makes a Gemm of MatMul and Add before it looks for int8, and has no
            # int8 Gemm with an fp32 bias. A reshape to the same shape, which costs nothing, keeps
            # the two apart. It has no CPU kernels at all for fp8, or for int8 between fp16.
            num_outputs = len(weight_scale)
            shape = f"int8.rows_of_{num_outputs}"
            self._constant(shape, np.array([-1, num_outputs], np.int64))
            self._node("Reshape", [result, shape], [f"{output}.rows"])
            result = f"{output}.rows"
        self._node("Add", [result, product.bias], [output])

    def _constant(self, name: str, values: NDArray[Any]) -> None:
        self.initializers[name] = make_tensor(name, values)

    def _node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(make_node(op, inputs, outputs, **attributes))


@dataclass(frozen=True)
class FeatureError:
    """How far features are from a reference: those of the unquantised graph, or PyTorch's.

    Attributes:
        sqnr_db: Signal to quantization noise: 10 log10 of the mean square of the features over
            the mean square of their error, decibels; infinite without any error.
        min_cosine: Over rows.
        max_difference: Over all values, relative to the largest magnitude of a feature.
    """

    sqnr_db: float
    min_cosine: float
    max_difference: float


@dataclass(frozen=True)
class BlockSensitivity:
    """What quantising one block alone does to the features."""

    block: str
    error: FeatureError


def feature_error(features: NDArray[np.float32], reference: NDArray[np.float32]) -> FeatureError:
    """Compare features with a reference, both of shape (rows, D)."""
    given, wanted = features.astype(np.float64), reference.astype(np.float64)
    noise, signal = float(((given - wanted) ** 2).mean()), float((wanted**2).mean())
    norms = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (given * wanted).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return FeatureError(
        sqnr_db=10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf,
        min_cosine=float(cosines.min()),
        max_difference=float(np.abs(given - wanted).max() / max(np.abs(wanted).max(), 1e-30)),
    )


class QuantizedWriter:
    """Writes quantised forms of one graph, and measures what they do to its features.

    Args:
        probe: Clips, shape (C, T, S, S, 3).
        by_frame: Whether the graph takes frames and not clips.
    """

    def __init__(
        self,
        source: Path,
        probe: NDArray[np.uint8],
        *,
        by_frame: bool,
        options: QuantizationOptions,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self._model = read_model(source)
        self._probe = probe
        self._by_frame = by_frame
        self._options = options
        self._thresholds = thresholds
        self.blocks = block_names(find_products(self._model))
        self._reference = self._features(source)

    def write(self, target: Path, blocks: Collection[str]) -> None:
        """Write the graph with these blocks quantised."""
        model = quantize(
            self._model,
            blocks=blocks,
            recipe=self._options.chosen_recipe,
            weight_range=self._options.weight_range,
            thresholds=self._thresholds,
            precision=self._options.precision,
        )
        write_model(model, target)

    def error_of(self, path: Path) -> FeatureError:
        """Compare the features of a written graph with the unquantised one's, on the probe."""
        return feature_error(self._features(path), self._reference)

    def sensitivities(
        self, scratch: Path, on_block: Callable[[int], None] | None = None
    ) -> tuple[BlockSensitivity, ...]:
        """Measure each block alone, the others unquantised."""
        path = scratch / "one-block.onnx"
        measured = []
        for done, block in enumerate(self.blocks, 1):
            self.write(path, [block])
            measured.append(BlockSensitivity(block, self.error_of(path)))
            if on_block is not None:
                on_block(done)
        path.unlink()
        return tuple(measured)

    def _features(self, path: Path) -> NDArray[np.float32]:
        """Features of the probe, a clip a call: the dynamic recipe scales the rows of a call."""
        session = GraphSession(path)
        rows = [session.run(c if self._by_frame else c[np.newaxis])[0] for c in self._probe]
        return np.concatenate(rows)
