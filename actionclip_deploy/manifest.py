"""`manifest.json`: the schema of the file that describes a bundle (docs/bundle-format.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

GraphName = Literal["visual", "temporal", "textual", "video"]
Precision = Literal["fp32", "fp16"]
ScoreMethod = Literal["template-softmax", "mean-embedding", "independent"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
        return self

    def precision(self) -> str:
        """The precision of the graph that does nearly all the work."""
        return self.graphs["video" if "video" in self.graphs else "visual"].precision
