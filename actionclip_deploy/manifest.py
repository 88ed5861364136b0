"""`manifest.json`: the schema of the file that describes a bundle (docs/bundle-format.md)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

SCHEMA_VERSION = 1

GraphName = Literal["visual", "temporal", "textual", "video"]
Precision = Literal["fp32", "fp16", "int8", "fp8"]
QuantizedPrecision = Literal["int8", "fp8"]
RestPrecision = Literal["fp32", "fp16"]
Int8Recipe = Literal["dynamic", "static"]
WeightRange = Literal["reduced", "full"]
QUANTIZED_PRECISIONS: tuple[str, ...] = get_args(QuantizedPrecision)
ScoreMethod = Literal["template-softmax", "mean-embedding", "independent"]


class _Record(BaseModel):
    # The schema is built when the first manifest is read, not by `import actionclip_deploy`.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class TensorSpec(_Record):
    """One input or output of a graph; a dimension is a number, or a letter where it is free."""

    name: str
    dtype: Literal["uint8", "int32", "float32"]
    shape: tuple[int | str, ...]


class GraphSpec(_Record):
    """One ONNX file of the bundle and what goes in and out of it."""

    # In the bundle's top folder, and under a name that ONNX Runtime takes for ONNX alone.
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.onnx$")
    precision: Precision
    opset: int
    input: TensorSpec
    output: TensorSpec


class ModelSpec(_Record):
    """What the graphs compute: backbone, visual prompt and sizes."""

    backbone: str
    visual_prompt: str
    num_frames: int = Field(ge=1, description="T, frames per clip that the model was trained with")
    max_frames: int | None = Field(description="largest T that the graphs accept; null: any")
    fixed_num_frames: bool = Field(description="true where the graphs accept no T but num_frames")
    input_size: int = Field(ge=1, description="height and width of a frame at the input, pixels")
    embedding_dim: int = Field(ge=1, description="D")
    context_length: int = Field(ge=1, description="longest prompt, tokens with start and end")
    num_parameters: dict[str, int]
    num_macs: int = Field(description="multiply-accumulates of one clip, text excluded")
    num_flops: int = Field(description="2 x those of its matrix products and convolutions")


class PreprocessingSpec(_Record):
    """How a decoded frame becomes an input; mean and std are folded into the graph already."""

    resize_size: int = Field(description="short side after the resize, pixels")
    interpolation: Literal["bicubic", "bilinear"]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


class ScoreSpec(_Record):
    """How embeddings become scores."""

    scale: float = Field(gt=0, description="multiplier of the cosine")
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
    num_calibration_clips: int = Field(ge=0)
    accepted_by: Literal["cosine", "top1"]
    bound: float = Field(description="smallest cosine, or largest drop of top-1 in points")
    unquantized_value: float | None = Field(
        validation_alias=AliasChoices("unquantized_value", "fp32_value"),
        description="top-1 before in percent; null for cosine",
    )
    quantized_value: float = Field(
        validation_alias=AliasChoices("quantized_value", "int8_value"),
        description="the cosine, or top-1 in percent",
    )
    golden_min_cosine: float = Field(description="of features to PyTorch's, golden inputs")
    golden_max_difference: float = Field(
        description="largest difference to them, relative to their largest absolute value"
    )


class FileSpec(_Record):
    """Checksum and size of one file."""

    sha256: str
    size_bytes: int


class Manifest(_Record):
    """`manifest.json`: everything that a program has to know to use the bundle."""

    schema_version: int = SCHEMA_VERSION
    model: ModelSpec
    preprocessing: PreprocessingSpec
    sampling: Literal["segments"] = "segments"
    scores: ScoreSpec
    templates: tuple[str, ...]
    graphs: dict[GraphName, GraphSpec]
    quantization: QuantizationSpec | None = None
    source: SourceSpec
    versions: dict[str, str]
    licence: str | None = None
    files: dict[str, FileSpec]

    @model_validator(mode="after")
    def _check_graphs(self) -> Manifest:
        wanted = ({"visual", "temporal", "textual"}, {"video", "textual"})
        if set(self.graphs) not in wanted:
            raise ValueError(
                f"graphs are {', '.join(sorted(self.graphs)) or 'none'}; they must be visual, "
                "temporal and textual, or video and textual"
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
