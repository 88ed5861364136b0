"""`manifest.json`: the schema of the file that describes a bundle (docs/bundle-format.md).

A `TensorSpec` says what goes in or out of a graph; every array that comes from elsewhere is held
against one before it is used.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from actionclip_deploy.errors import ShapeError

SCHEMA_VERSION = 1

GraphName = Literal["visual", "temporal", "textual", "video"]
# `clip` is whole clips to video embeddings, through one graph or two.
GraphOrClip = Literal["visual", "temporal", "textual", "video", "clip"]
Precision = Literal["fp32", "fp16", "int8", "fp8"]
QuantizedPrecision = Literal["int8", "fp8"]
RestPrecision = Literal["fp32", "fp16"]
Int8Recipe = Literal["dynamic", "static"]
WeightRange = Literal["reduced", "full"]
QUANTIZED_PRECISIONS: tuple[str, ...] = get_args(QuantizedPrecision)
ScoreMethod = Literal["template-softmax", "mean-embedding", "independent"]


# What a manifest may say. Wide of every CLIP that was published (336 pixels, 1,280 channels, 248
# tokens), and small enough that arrays of these sizes can be thought of.
MAX_NUM_FRAMES = 4096
MAX_INPUT_SIZE = 4096
MAX_EMBEDDING_DIM = 16_384
MAX_CONTEXT_LENGTH = 8192
MAX_SCALE = 1e5
MAX_CLIP_SECONDS = 3600.0
_MAX_COUNT = 10**18
_MAX_TEMPLATES, _MAX_TEMPLATE_LENGTH = 1000, 1000
_MAX_TEXT_LENGTH = 10_000


@dataclass(frozen=True)
class Within:
    """Annotation of a number of a record: the smallest and the largest that it may be.

    Pydantic's own bounds name one end alone, and let NaN pass.
    """

    low: float
    high: float

    def check(self, value: float) -> float:
        """Refuse a number beyond the bounds, or NaN.

        Raises:
            ValueError: If it is one; names the range.
        """
        if not self.low <= value <= self.high:  # written so that NaN fails
            raise ValueError(f"must be from {self.low:,} to {self.high:,}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check the number after its type."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Tell the bounds in the schema."""
        return {**handler(schema), "minimum": self.low, "maximum": self.high}


def describe_invalid(exc: ValidationError) -> str:
    """Say which field of a record is wrong, what it is, and what it may be."""
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if first["type"] == "value_error" and isinstance(given, int | float):
        return f"{where} is {_short.repr(given)} and {message}"
    if first["type"] != "extra_forbidden" and isinstance(given, str | int | float):
        return f"{where}: {message}, and it is {_short.repr(given)}"
    return f"{where}: {message}" if where else message


_short = reprlib.Repr()
_short.maxlong = _short.maxstring = _short.maxother = 40

_Count = Annotated[int, Within(0, _MAX_COUNT)]
_NumFrames = Annotated[int, Within(1, MAX_NUM_FRAMES)]
_Text = Annotated[str, Field(max_length=_MAX_TEXT_LENGTH)]
_Template = Annotated[str, Field(max_length=_MAX_TEMPLATE_LENGTH)]
_PixelMean = Annotated[float, Within(-10, 10)]
_PixelStd = Annotated[float, Within(1e-3, 10)]


class _Record(BaseModel):
    # The schema is built when the first manifest is read, not by `import actionclip_deploy`.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class TensorSpec(_Record):
    """One input or output of a graph; a dimension is a number, or a letter where it is free."""

    name: str
    dtype: Literal["uint8", "int32", "float32"]
    shape: tuple[Annotated[int, Within(0, 2**31)] | str, ...]

    def check(
        self,
        array: object,
        *,
        values: range | None = None,
        is_finite: bool = False,
        norm_tolerance: float | None = None,
    ) -> None:
        """Refuse what is not such a tensor. Values are looked at only where that is asked for.

        Args:
            array: A numpy array, or what a caller took for one.
            values: What integers may be.
            is_finite: Whether each value has to be a finite number.
            norm_tolerance: How far the norms of the vectors along the last dimension may be
                from 1; NaN is too far.

        Raises:
            ShapeError: If it is not an array of this dtype and shape, or a size is zero, or a
                value is not allowed.
        """
        if not isinstance(array, np.ndarray):
            raise ShapeError(
                f"{self.name} is a {type(array).__name__}; expected a numpy array of "
                f"{self._wanted}."
            )
        # As a string, which tells the other byte order apart.
        self.check_layout(str(array.dtype), array.shape)
        if values is not None and (array.min() < values.start or array.max() >= values.stop):
            raise ShapeError(
                f"{self.name} holds values from {array.min()} to {array.max()}; they must be from "
                f"{values.start} to {values.stop - 1}."
            )
        if is_finite and not np.isfinite(array).all():
            raise ShapeError(f"{self.name} holds values that are not finite; expected numbers.")
        if norm_tolerance is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                errors = np.abs(np.linalg.norm(array.astype(np.float64), axis=-1) - 1)
            if not (errors <= norm_tolerance).all():  # written so that NaN fails
                raise ShapeError(
                    f"{self.name} holds vectors that are not of norm 1; send embeddings as they "
                    "come out of the model."
                )

    def check_layout(self, dtype: str, shape: Sequence[int]) -> None:
        """Refuse another dtype or shape, of an array that need not be there yet.

        Raises:
            ShapeError: If it is another one, or a size is zero.
        """
        fits = dtype == self.dtype and len(shape) == len(self.shape)
        if not fits or any(
            given == 0 or (isinstance(size, int) and given != size)
            for given, size in zip(shape, self.shape, strict=True)
        ):
            raise ShapeError(
                f"{self.name} has shape {tuple(shape)} and dtype {dtype}; expected {self._wanted}, "
                "none of its sizes zero."
            )

    @property
    def _wanted(self) -> str:
        return f"shape ({', '.join(map(str, self.shape))}) and dtype {self.dtype}"


class GraphSpec(_Record):
    """One ONNX file of the bundle and what goes in and out of it."""

    # In the bundle's top folder, and under a name that ONNX Runtime takes for ONNX alone.
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.onnx$")
    precision: Precision
    opset: Annotated[int, Within(1, 1000)]
    input: TensorSpec
    output: TensorSpec


class ModelSpec(_Record):
    """What the graphs compute: backbone, visual prompt and sizes."""

    backbone: _Text
    visual_prompt: _Text
    num_frames: _NumFrames = Field(description="T, frames per clip that the model was trained with")
    max_frames: _NumFrames | None = Field(description="largest T that the graphs accept; null: any")
    fixed_num_frames: bool = Field(description="true where the graphs accept no T but num_frames")
    input_size: Annotated[int, Within(1, MAX_INPUT_SIZE)] = Field(
        description="height and width of a frame at the input, pixels"
    )
    embedding_dim: Annotated[int, Within(1, MAX_EMBEDDING_DIM)] = Field(description="D")
    context_length: Annotated[int, Within(1, MAX_CONTEXT_LENGTH)] = Field(
        description="longest prompt, tokens with start and end"
    )
    clip_seconds: Annotated[float, Within(1e-3, MAX_CLIP_SECONDS)] | None = Field(
        default=None, description="how long the clips were that it was trained on, if known"
    )
    num_parameters: dict[str, _Count]
    num_macs: _Count = Field(description="multiply-accumulates of one clip, text excluded")
    num_flops: _Count = Field(description="2 x those of its matrix products and convolutions")

    @model_serializer(mode="wrap")
    def _without_unknown_clip_seconds(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Leave the field out where it is not known: such manifests are as they were."""
        fields = handler(self)
        if fields.get("clip_seconds") is None:
            fields.pop("clip_seconds", None)
        return fields

    @property
    def frame_bytes(self) -> int:
        """Of one frame as the graphs take it: RGB, uint8."""
        return 3 * self.input_size**2

    def check_num_frames(self, num_frames: int) -> None:
        """Refuse a T that the visual prompt does not take.

        Raises:
            ShapeError: If it takes exactly another one, or fewer.
        """
        if self.fixed_num_frames and num_frames != self.num_frames:
            raise ShapeError(
                f"{num_frames} frames per clip were given and the visual prompt "
                f"{self.visual_prompt!r} takes exactly {self.num_frames}; sample that many."
            )
        if self.max_frames is not None and num_frames > self.max_frames:
            raise ShapeError(
                f"{num_frames} frames per clip were given and the visual prompt "
                f"{self.visual_prompt!r} has positions for {self.max_frames}; sample fewer."
            )


class PreprocessingSpec(_Record):
    """How a decoded frame becomes an input; mean and std are folded into the graph already."""

    resize_size: Annotated[int, Within(1, 2 * MAX_INPUT_SIZE)] = Field(
        description="short side after the resize, pixels"
    )
    interpolation: Literal["bicubic", "bilinear"]
    pixel_mean: tuple[_PixelMean, _PixelMean, _PixelMean]
    pixel_std: tuple[_PixelStd, _PixelStd, _PixelStd]


class ScoreSpec(_Record):
    """How embeddings become scores."""

    scale: Annotated[float, Within(1e-5, MAX_SCALE)] = Field(description="multiplier of the cosine")
    method: ScoreMethod = "template-softmax"


class SourceSpec(_Record):
    """Where the weights came from."""

    family: str
    file: str = Field(description="name of the checkpoint, without its folder")
    sha256: str
    num_frames_from: str
    base_file: str | None = None
    base_sha256: str | None = None


class QuantizationSpec(_Record):
    """How the int8 or fp8 graph of a bundle was made, and what it was measured to give.

    Bundles from before fp8 have the names `int8_blocks`, `fp32_blocks`, `int8_value` and
    `fp32_value`.
    """

    recipe: Int8Recipe = Field(description="whether activations are scaled per call or once")
    weight_range: WeightRange | None = Field(
        description="weights within -64 .. 64 or -127 .. 127; null for fp8"
    )
    rest_precision: RestPrecision = Field("fp32", description="of the graph's other products")
    quantized_blocks: tuple[str, ...] = Field(
        min_length=1, validation_alias=AliasChoices("quantized_blocks", "int8_blocks")
    )
    unquantized_blocks: tuple[str, ...] = Field(
        validation_alias=AliasChoices("unquantized_blocks", "fp32_blocks"),
        description="those that hurt too much",
    )
    num_calibration_clips: _Count
    accepted_by: Literal["cosine", "top1"]
    bound: Annotated[float, Within(-1, 100)] = Field(
        description="smallest cosine, or largest drop of top-1 in points"
    )
    unquantized_value: Annotated[float, Within(0, 100)] | None = Field(
        validation_alias=AliasChoices("unquantized_value", "fp32_value"),
        description="top-1 before in percent; null for cosine",
    )
    quantized_value: Annotated[float, Within(-1, 100)] = Field(
        validation_alias=AliasChoices("quantized_value", "int8_value"),
        description="the cosine, or top-1 in percent",
    )
    golden_min_cosine: Annotated[float, Within(-1.001, 1.001)] = Field(
        description="of features to PyTorch's, golden inputs"
    )
    golden_max_difference: Annotated[float, Within(0, 1e9)] = Field(
        description="largest difference to them, relative to their largest absolute value"
    )


class FileSpec(_Record):
    """Checksum and size of one file."""

    sha256: str
    size_bytes: _Count


class Manifest(_Record):
    """`manifest.json`: everything that a program has to know to use the bundle."""

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    preprocessing: PreprocessingSpec
    sampling: Literal["segments"] = "segments"
    scores: ScoreSpec
    templates: tuple[_Template, ...] = Field(max_length=_MAX_TEMPLATES)
    graphs: dict[GraphName, GraphSpec]
    quantization: QuantizationSpec | None = None
    source: SourceSpec
    versions: dict[str, str]
    licence: _Text | None = None
    files: dict[str, FileSpec]

    @model_validator(mode="after")
    def _check_graphs(self) -> Manifest:
        wanted = ({"visual", "temporal", "textual"}, {"video", "textual"})
        if set(self.graphs) not in wanted:
            raise ValueError(
                f"graphs are {', '.join(sorted(self.graphs)) or 'none'}; they must be visual, "
                "temporal and textual, or video and textual"
            )
        if self.preprocessing.resize_size < self.model.input_size:
            raise ValueError(
                f"preprocessing.resize_size is {self.preprocessing.resize_size}, less than the "
                f"{self.model.input_size} pixels of model.input_size that are cut out of it"
            )
        if (self.quantization is not None) != (self.precision() in QUANTIZED_PRECISIONS):
            raise ValueError(
                "quantization and an int8 or fp8 graph of frames go together, and one is there "
                "alone"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent_quantization(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Leave the field out where nothing was quantized: such manifests are as they were."""
        fields = handler(self)
        if fields.get("quantization") is None:
            fields.pop("quantization", None)
        return fields

    def precision(self) -> str:
        """The precision of the graph that does nearly all the work."""
        return self.graphs["video" if "video" in self.graphs else "visual"].precision

    def input_spec(self, graph: GraphOrClip) -> TensorSpec:
        """What a graph takes, or `clip`. Sizes that are fixed for this model are numbers."""
        model = self.model
        frame = (model.input_size, model.input_size, 3)
        num_frames = model.num_frames if model.fixed_num_frames else "T"
        clip = ("B", num_frames, *frame)
        if graph == "clip":
            return TensorSpec(name="frames", dtype="uint8", shape=clip)
        shape = {
            "visual": ("N", *frame),
            "temporal": ("B", num_frames, model.embedding_dim),
            "textual": ("M", "L"),
            "video": clip,
        }[graph]
        return self.graphs[graph].input.model_copy(update={"shape": shape})

    def output_spec(self, graph: GraphOrClip) -> TensorSpec:
        """What a graph gives, or `clip`."""
        if graph == "clip":
            shape = ("B", self.model.embedding_dim)
            return TensorSpec(name="video_embedding", dtype="float32", shape=shape)
        return self.graphs[graph].output

    def check_input(
        self, graph: GraphOrClip, array: object, *, num_tokens: int | None = None
    ) -> None:
        """Refuse what is not an input of a graph.

        Args:
            graph: The graph, or `clip`.
            array: Its input.
            num_tokens: Size of the vocabulary, to look at every value of an array that comes from
                a stranger: token ids have to be below it, and features finite.

        Raises:
            ShapeError: If it is not one; says what is expected.
        """
        spec, is_textual = self.input_spec(graph), graph == "textual"
        # First, since what they say is of more help than a shape.
        if isinstance(array, np.ndarray) and array.ndim == len(spec.shape):
            size, limit = array.shape[1], self.model.context_length
            if is_textual and size > limit:
                raise ShapeError(
                    f"{spec.name} has {size} columns and the text encoder takes at most {limit}; "
                    "shorten the prompts."
                )
            if graph in ("temporal", "video", "clip") and size:
                self.model.check_num_frames(size)
        spec.check(
            array,
            values=range(num_tokens) if num_tokens is not None and is_textual else None,
            is_finite=num_tokens is not None and graph == "temporal",
        )
