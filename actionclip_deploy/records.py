"""Requests and answers of /v1, for checking and for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema


class _FirstError(FailFast):
    """Ends the check of a list at its first error.

    A list of millions of wrong values would be answered by the first error alone, but take a
    minute and gigabytes for the others.
    """

    __hash__ = object.__hash__  # what a part of a union needs


def _tuple_schema(length: int, *types: str) -> WithJsonSchema:
    """For the OpenAPI document: a tuple without `prefixItems`, which few readers know."""
    items = {"type": types[0]} if len(types) == 1 else {"anyOf": [{"type": t} for t in types]}
    return WithJsonSchema({"type": "array", "items": items, "minItems": length, "maxItems": length})


_Texts = Annotated[tuple[str, ...], _FirstError()]
_Numbers = Annotated[tuple[float, ...], _FirstError()]
_Views = Annotated[tuple[_Numbers, ...], _FirstError()]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True)


Labels = Annotated[
    str | _Texts,
    Field(description="Name of a label bank, or a list of labels to choose from."),
]
TopK = Annotated[int, Field(ge=1, le=10_000, description="Labels of an answer, best first.")]
ViewsText = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{1,3}x[13]$",
        description="Clips x crops per video, whose scores are averaged.",
        examples=["1x1", "10x3"],
    ),
]
TimeoutMs = Annotated[
    float | None, Field(gt=0, description="Time for the answer; by default the server's limit.")
]


class ClassifyFields(_Given):
    """What a request to /v1/classify says beside its videos."""

    labels: Labels
    top_k: TopK = 5
    views: ViewsText = "1x1"
    templates: _Texts | None = Field(
        None,
        description="For a list of labels: sentences with {} for the label; by default the "
        "bundle's. For a bank: those of its templates to use; by default all.",
    )
    multi_label: bool = Field(False, description="Score each label by itself.")
    per_template: bool = Field(False, description="Say what each template alone would choose.")
    return_frames: bool = Field(False, description="Give the frames as the model saw them.")
    timeout_ms: TimeoutMs = None


class ClassifyJson(ClassifyFields):
    """A request to /v1/classify in JSON: videos that were embedded before."""

    embeddings: Annotated[tuple[_Views, ...], _FirstError()] = Field(
        min_length=1,
        description="For each video the embeddings of its views, of norm 1, as /v1/embed gives.",
    )


class EmbedFields(_Given):
    """What a request to /v1/embed says beside its videos."""

    views: ViewsText = "1x1"
    timeout_ms: TimeoutMs = None


class EmbedJson(_Given):
    """A request to /v1/embed in JSON: texts."""

    texts: _Texts = Field(min_length=1, description="Prompts, embedded as they are.")
    timeout_ms: TimeoutMs = None


class BankJson(_Given):
    """A label bank to build."""

    labels: _Texts = Field(min_length=1)
    templates: _Texts | None = Field(
        None, description="Sentences with {} for the label; by default the bundle's."
    )


class ErrorDetail(_Told):
    """Why a request was not done."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(_Told):
    """The body of every refusal."""

    error: ErrorDetail


class VideoError(_Told):
    """Why one of several videos was not done."""

    status: int
    code: str
    message: str


class RuntimeAnswer(_Told):
    """What computed the answer."""

    name: str
    execution_provider: str
    precision: str
    num_threads: int | None
    versions: dict[str, str]
    engine: str | None


class BankAnswer(_Told):
    """Which labels an answer is about; name and version are null for a list of labels."""

    name: str | None
    version: int | None
    sha256: str
    num_labels: int
    num_templates: int


class ScoreAnswer(_Told):
    """A label and its score."""

    label: str
    score: float


class FramesAnswer(_Told):
    """The frames that were used; one list for each clip."""

    num_clips: int
    indices: list[list[int]]
    pts_seconds: list[list[float]] | None = Field(
        description="null for frames that came without times"
    )


class PixelsAnswer(_Told):
    """Frames as the model saw them, on request."""

    shape: Annotated[tuple[int, int, int, int], _tuple_schema(4, "integer")] = Field(
        description="F, S, S, 3: distinct frames, RGB"
    )
    data: str = Field(description="base64 of the pixels, one byte each")
    views: list[list[int]] = Field(description="frames that each view is made of")


class TemplateAnswer(_Told):
    """What one template alone would have chosen."""

    template: str
    label: str
    score: float
    agrees: bool


class Decision(_Told):
    """The best label of a calibrated bank, or that the video shows none of its labels."""

    label: str | None = Field(description="null for unknown")
    is_unknown: bool
    score: float = Field(description="the best calibrated score, 0 to 1")
    threshold: float


class ClassifyResult(_Told):
    """The labels of one video, or why there are none."""

    name: str
    predictions: list[ScoreAnswer] | None = None
    answer: Decision | None = Field(
        None, description="The one label, or unknown; null where the bank is not calibrated."
    )
    frames: FramesAnswer | None = None
    pixels: PixelsAnswer | None = None
    templates: list[TemplateAnswer] | None = None
    template_agreement: float | None = Field(
        None, description="Share of the templates that choose the first label."
    )
    warnings: list[str] = []
    batch_size: int | None = Field(None, description="Clips in its call of the runtime.")
    timings_ms: dict[str, float] = {}
    error: VideoError | None = None


class ClassifyAnswer(_Told):
    """The answer of /v1/classify."""

    request_id: str
    results: list[ClassifyResult]
    bank: BankAnswer
    method: Literal["template-softmax", "mean-embedding", "independent"]
    runtime: RuntimeAnswer
    timings_ms: dict[str, float]


class EmbedResult(_Told):
    """The embeddings of one video, or why there are none."""

    name: str
    embeddings: list[list[float]] | None = None
    frames: FramesAnswer | None = None
    warnings: list[str] = []
    timings_ms: dict[str, float] = {}
    error: VideoError | None = None


class EmbedAnswer(_Told):
    """The answer of /v1/embed: `results` for videos, `embeddings` for texts."""

    request_id: str
    embedding_dim: int
    results: list[EmbedResult] | None = None
    embeddings: list[list[float]] | None = None
    runtime: RuntimeAnswer
    timings_ms: dict[str, float]


class BuildAnswer(_Told):
    """A build of a label bank."""

    state: Literal["waiting", "building", "ready", "failed", "cancelled"]
    done: int = Field(description="prompts embedded")
    total: int = Field(description="prompts there are; 0 until known")
    error: str | None
    version: int | None = Field(description="what it became")


class VersionAnswer(_Told):
    """One version of a label bank."""

    version: int
    sha256: str
    num_labels: int
    num_templates: int
    activated_seconds: float


class LabelsAnswer(_Told):
    """A label bank, and its build."""

    name: str
    active: VersionAnswer | None
    labels: list[str] | None
    templates: list[str] | None
    calibration: dict[str, Any] | None = None
    versions: list[VersionAnswer]
    build: BuildAnswer | None


class BankListAnswer(_Told):
    """All label banks."""

    banks: list[LabelsAnswer]


class DiffAnswer(_Told):
    """What changed from one version of a label bank to another."""

    name: str
    old: int
    new: int
    added: list[str]
    removed: list[str]
    moved: list[Annotated[tuple[str, int, int], _tuple_schema(3, "string", "integer")]] = Field(
        description="label, old place, new place"
    )
    templates_added: list[str]
    templates_removed: list[str]
