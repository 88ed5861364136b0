"""What verbs about bundles, label banks, engines, archives and the machine give as JSON.

As `records`, of which this is a part: keys go or change their meaning only with `schema_version`.
"""

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field

from actionclip_deploy.manifest import (
    Manifest,
    PreprocessingSpec,
    QuantizationSpec,
    ScoreMethod,
    SourceSpec,
)
from actionclip_deploy.records import (
    RECORD_SCHEMA_VERSION,
    Record,
    RuntimeInfo,
    UnreadVideo,
    VersionedRecord,
    VideoBytes,
    clock_text,
    printable,
)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# JSON has no form for the others.
FiniteOrNull: TypeAlias = Annotated[float | None, BeforeValidator(_finite_or_none)]


# Label banks


class LabelBankInfo(Record):
    """What is known of a bank without reading its embeddings: one of `labels list --json`."""

    name: str
    num_labels: int | None = Field(description="C; null where the bank cannot be read")
    num_templates: int | None = Field(description="K; null where the bank cannot be read")
    problem: str | None = Field(description="why it would be refused; null if nothing is found")
    is_calibrated: bool = Field(
        default=False, description="whether it has a temperature and a threshold"
    )
    is_saved_query: bool = Field(default=False, description="whether `search --save` made it")


class LabelBankDiff(Record):
    """What changed from one bank to another: `labels diff --json`."""

    added: tuple[str, ...] = Field(description="labels of the new bank alone, in its order")
    removed: tuple[str, ...] = Field(description="labels of the old bank alone, in its order")
    moved: tuple[tuple[str, int, int], ...] = Field(
        description="labels whose id changed, with the old and the new id, in the new order"
    )
    templates_added: tuple[str, ...]
    templates_removed: tuple[str, ...]


class BuiltBankRecord(VersionedRecord):
    """A bank that was built: `labels build --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    name: str
    path: str
    num_labels: int
    num_templates: int
    unknown_words: tuple[str, ...] | None = Field(
        default=None, description="of a model of a small vocabulary alone"
    )


class CalibrationRecord(Record):
    """How the scores of a bank are read; see `calibration.Calibration`."""

    temperature: float
    threshold: float
    method: ScoreMethod
    views: str
    visual_sha256: str
    target_kept: float
    kept_known: float
    rejected_unknown: float | None
    num_known: int
    num_unknown: int
    error_before: float
    error_after: float


class CalibratedBankRecord(CalibrationRecord, VersionedRecord):
    """A bank that was calibrated: `labels calibrate --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    bank: str
    bank_sha256: str
    top1: float
    failed: tuple[UnreadVideo, ...]


class SavedQueryRecord(Record):
    """A query that was saved from a search of an archive; see `calibration.SavedQuery`."""

    name: str = Field(description="of the label bank that it is")
    text: str = Field(description="what is looked for")
    without: tuple[str, ...] = Field(description="what must not be shown")
    threshold_z: float = Field(
        description="from how many standard deviations above the mean of the archive's windows on "
        "a window shows it"
    )
    threshold_cosine: float = Field(description="the same as a cosine")
    num_accepted: int = Field(description="moments that it was chosen by; 0 for a guess")
    num_rejected: int = Field(description="moments that were passed over before an accepted one")
    num_windows: int = Field(description="of the archive that it was saved from")
    window_seconds: float
    stride_seconds: float


class LabelBankDescription(VersionedRecord):
    """All that a bank is, but for its embeddings: `labels show --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    name: str
    path: str
    num_labels: int
    num_templates: int
    sha256: str | None = Field(
        description="of labels, templates, embeddings and calibration; null where it is refused"
    )
    textual_sha256: str = Field(description="of the text encoder that made it")
    calibration: CalibrationRecord | None
    query: SavedQueryRecord | None = Field(
        default=None, description="of a bank that `search --save` made"
    )
    labels: tuple[str, ...] = Field(description="the index of a label is its id")
    templates: tuple[str, ...]
    unknown_words: tuple[str, ...] | None = Field(
        default=None, description="of a model of a small vocabulary alone"
    )
    warnings: tuple[str, ...] = Field(description="why it is refused, and what is to be known")


# Agreement with PyTorch


class ComparisonRecord(Record):
    """One run beside what it should have given; see `runtimes.parity.Comparison`."""

    what: str
    batch_size: int
    max_abs_difference: FiniteOrNull
    min_cosine: FiniteOrNull
    tolerance: FiniteOrNull
    cosine_tolerance: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    passed: bool
    error: str | None = None
    margin: FiniteOrNull = None


class ParityRecord(VersionedRecord):
    """All comparisons of a runtime with the reference: `verify --json`, `reports/parity.json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    passed: bool
    runtime: RuntimeInfo
    golden_origin: str
    comparisons: tuple[ComparisonRecord, ...]


class RemoteParityRecord(ParityRecord):
    """All comparisons of a server with the reference: `triton --verify URL --json`."""

    url: str


class RepositoryRecord(VersionedRecord):
    """A model repository of Triton that was written: `triton --output --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    repository: str
    runtime: str
    versions: dict[str, int] = Field(description="of each model, by its name")


class OtherPrecision(Record):
    """A product that is computed in another precision than its graph asks for."""

    node: str
    asked: str
    computed: str | None
    layers: tuple[str, ...]


class AuditRecord(Record):
    """In which precision a graph is computed."""

    num_macs: int
    num_layers: int
    asked: dict[str, float] = Field(description="share of the arithmetic by precision")
    computed: dict[str, float]
    unknown: float
    other_than_asked: tuple[OtherPrecision, ...]


class FaultRecord(Record):
    """The first part of a graph that is wrong in an engine."""

    graph: str
    rows: int
    first_bad: str | None
    needs_company: bool
    parts: tuple[ComparisonRecord, ...]
    heads: tuple[ComparisonRecord, ...]


class AuditedParityRecord(ParityRecord):
    """As `ParityRecord`, of a runtime that tells what it computes in."""

    audit: dict[str, AuditRecord] = Field(description="by graph")


class EngineParityRecord(AuditedParityRecord):
    """As `ParityRecord`, of the engines of a bundle."""

    engine: str
    faults: tuple[FaultRecord, ...]


class BlockSensitivityRecord(Record):
    """What quantising one block alone does to the features."""

    block: str
    sqnr_db: FiniteOrNull = Field(description="null without any error")
    min_cosine: float
    max_difference: float


class TrialRecord(Record):
    """One choice of blocks, and what it kept."""

    unquantized_blocks: tuple[str, ...]
    value: float
    accepted: bool


class QuantizationRecord(QuantizationSpec):
    """How a quantised graph came about; `reports/` of the bundle has it as well."""

    sensitivity: tuple[BlockSensitivityRecord, ...]
    trials: tuple[TrialRecord, ...]
    failed_videos: tuple[str, ...]


class ExportRecord(VersionedRecord):
    """A new bundle: `export --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    bundle: str
    family: str
    num_frames: int
    num_frames_from: str
    notes: tuple[str, ...]
    manifest: Manifest
    parity: ParityRecord
    quantization: QuantizationRecord | None = None


# Engines


class EngineRecord(Record):
    """What an engine in the cache was built from and with, and what was found.

    What older versions have written is passed on as it is.
    """

    model_config = ConfigDict(extra="allow")

    key: dict[str, Any]
    plans: dict[str, Any]
    audit: dict[str, Any]
    verified: dict[str, Any] | None = Field(default=None, description="by card")


class StoredEngineRecord(EngineRecord):
    """An engine in the cache: one of `engines list --json`."""

    name: str
    folder: str
    size_bytes: int


class BuiltEngineRecord(VersionedRecord):
    """Engines that were built, or found: `build --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    engine: str
    folder: str
    is_new: bool
    why_not_found: str | None
    verified: dict[str, Any] | None
    record: EngineRecord


# What there is: models, checkpoints, bundles, this machine


class PublishedModelRecord(Record):
    """A published checkpoint, and its copy in the cache."""

    name: str
    backbone: str
    num_frames: int
    labels: str
    trained_by: str
    top1: float
    top5: float
    protocol: str
    top1_authors: float | None
    top5_authors: float | None
    licence: str
    address: str
    sha256_prefix: str | None
    path: str | None
    bytes: int
    partial_bytes: int


class ModelsRecord(VersionedRecord):
    """Checkpoints that are known by name: `models --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    motions: str
    models: tuple[PublishedModelRecord, ...]


class InspectedModel(Record):
    """A model; a bundle says more of its frames, a checkpoint where their number is from."""

    backbone: str
    visual_prompt: str
    num_frames: int
    num_frames_from: str | None = None
    max_frames: int | None = None
    fixed_num_frames: bool | None = None
    input_size: int
    embedding_dim: int
    context_length: int
    scale: float | None = None


class InspectedSource(SourceSpec):
    """Where weights came from."""

    licence: str | None = None


class CheckpointSource(Record):
    """How a checkpoint was read."""

    family: str
    file: str
    sha256: str
    notes: tuple[str, ...]


class InspectedScores(Record):
    """How scores are made."""

    scale: float
    method: ScoreMethod
    templates: tuple[str, ...]


class InspectedLabels(Record):
    """Which banks there are; of a model of a small vocabulary, how much of it is known."""

    banks: tuple[str, ...]
    known_tokens: int | None = None
    tokens: int | None = None


class InspectionRecord(VersionedRecord):
    """A bundle or a checkpoint: `inspect --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    model: InspectedModel
    size: dict[str, int]
    graphs: dict[str, str] | None = Field(default=None, description="from what to what, in words")
    quantization: QuantizationSpec | None = None
    preprocessing: PreprocessingSpec | None = None
    scores: InspectedScores | None = None
    source: InspectedSource | CheckpointSource
    labels: InspectedLabels | None = None
    versions: dict[str, str | int] | None = None
    audit: dict[str, AuditRecord] | None = Field(
        default=None, description="by graph, of the runtime that was asked for"
    )


class MachineRecord(Record):
    """Facts about a machine; null where one cannot be found out."""

    python: str
    os: str
    architecture: str
    cpu: str | None
    cpu_flags: tuple[str, ...]
    cpu_cores: int | None
    cpu_quota: float | None
    cpu_cores_available: int
    memory_bytes: int | None
    memory_limit_bytes: int | None
    gpus: tuple[str, ...]
    gpus_missing_because: str | None
    nvidia_driver: str | None
    jetson: str | None


class GpuRecord(Record):
    """One GPU."""

    name: str
    compute_capability: str
    memory_bytes: int


class JetsonRecord(Record):
    """A Jetson."""

    model: str | None
    l4t: str | None
    jetpack: str | None
    power_mode: str | None


class TensorRTRecord(Record):
    """An installation of TensorRT."""

    module: str | None
    missing_because: str | None
    libraries: dict[str, str]


class NvidiaRecord(Record):
    """What there is of NVIDIA's."""

    found: tuple[GpuRecord, ...]
    cuda: str | None
    missing_because: str | None
    driver: str | None
    jetson: JetsonRecord | None
    tensorrt: TensorRTRecord
    tensorrt_rtx: TensorRTRecord


class RecipeRecord(Record):
    """What to use on a machine."""

    runtime: str
    execution_provider: str | None
    precision: str
    environment: str
    why: str
    commands: tuple[str, ...]


class DoctorRecord(VersionedRecord):
    """This machine: `doctor --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    machine: MachineRecord
    versions: dict[str, str]
    nvidia: NvidiaRecord
    execution_providers: dict[str, str] = Field(description='"works", or why not')
    openvino: dict[str, str] = Field(description="its devices, or why there are none")
    known_problems: dict[str, str]
    recommended: RecipeRecord


# Training


class AccuracyRecord(Record):
    """What a validation measured."""

    num_videos: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    mean_class_accuracy: float
    mean_average_precision: float


class TrainingRecord(VersionedRecord):
    """A run of training: `train --json`, and `metrics.json` in its folder."""

    schema_version: int = RECORD_SCHEMA_VERSION
    steps: int
    epochs: float
    num_videos: int
    replaced_videos: tuple[int, ...] = Field(description="by number, which could not be read")
    num_processes: int
    device: str
    seconds: float
    loss: FiniteOrNull
    scale: float
    validation: AccuracyRecord | None
    versions: dict[str, str]
    config: dict[str, Any]


# Runs over many videos


class BatchRunRecord(Record):
    """What the rows of a folder of results share: `run.json`.

    The runtime is not among it, since machines of a cluster may differ: each row names its own.
    """

    kind: Literal["predict", "embed"]
    bundle_sha256: str
    bank: str | None = Field(description="null for labels that are in no bank, and for embed")
    bank_sha256: str | None
    views: str
    scores: ScoreMethod | None
    resize: str
    top_k: int | None
    embeddings: bool = Field(description="whether rows have the embeddings of the views")
    max_pixels: int


class BatchSummaryRecord(VersionedRecord):
    """How a run over many videos went: `summary.json`, and `--json` of such a run."""

    schema_version: int = RECORD_SCHEMA_VERSION
    run: BatchRunRecord
    run_sha256: str
    engine: str = Field(description="local or ray")
    is_complete: bool = Field(description="whether each video has its row")
    num_videos: int = Field(description="of the list")
    num_rows: int = Field(description="in the folder, those of earlier lists included")
    num_ok: int
    num_failed: int
    failed: dict[str, int] = Field(description="rows by the class of the error")
    num_before: int = Field(description="of the list, that had a row before")
    num_now: int = Field(description="of the list, whose row came in this run")
    num_retried: int = Field(description="rows that were taken out, to be done again")
    num_repeated: int = Field(description="rows that came twice, and were written once")
    seconds: float
    videos_per_second: float
    stage_seconds: dict[str, float] = Field(description="of all machines together, by stage")
    runtimes: dict[str, int] = Field(description="rows by what computed them")
    num_files: int


# Archives


class MomentRecord(Record):
    """A part of a video that a search found."""

    rank: int = Field(description="from 1")
    video: str = Field(description="path of the video")
    folder: str = Field(description="name of its folder, such as that of a camera")
    start_seconds: float = Field(description="from the start of the video")
    end_seconds: float
    peak_seconds: float = Field(description="the middle of the window nearest to the query")
    z: float = Field(
        description="at its best, standard deviations of the mean of the windows there above the "
        "mean of all windows"
    )
    cosine: float = Field(description="of that window and the query")
    recorded_seconds: float | None = Field(
        description="when it began, since 1970; null where that is not known"
    )
    window: int = Field(description="number of that window in its video")
    video_id: int = Field(
        description="of the video in its archive; one that has changed gets another"
    )
    video_bytes: VideoBytes = None


class SearchRecord(VersionedRecord):
    """What a search of an archive found: `search --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    query: str
    moments: tuple[MomentRecord, ...] = Field(description="the best first")
    num_windows: int = Field(description="of the archive")
    num_searched: int = Field(description="those that --from, --to, --camera and --video leave")
    num_undated: int = Field(description="videos left out by --from or --to for want of a date")
    mean_cosine: float = Field(description="of the query and all windows")
    std_cosine: float
    saved: SavedQueryRecord | None = Field(
        default=None, description="of a query that is saved: what it is told of by"
    )
    is_approximate: bool = Field(
        default=False, description="whether an index said which windows to score; z is exact"
    )

    def __str__(self) -> str:
        """The moments as a list, a line for each."""
        lines = [
            f"{moment.rank:>3}  z {moment.z:5.1f}  {clock_text(moment.start_seconds)} - "
            f"{clock_text(moment.end_seconds)}  {printable(moment.video, kept='')}"
            for moment in self.moments
        ]
        return "\n".join(lines or [f"nothing was found for {self.query!r}"])


class FoundMoment(MomentRecord):
    """A moment that a server found, and where its pictures are."""

    video_url: str = Field(description="of the video's file, which is served in ranges of bytes")
    thumbnail_url: str | None = Field(description="of a JPEG; null where none was kept")


class SearchAnswer(SearchRecord):
    """The answer of /v1/search."""

    moments: tuple[FoundMoment, ...] = Field(description="the best first")
    unknown_words: tuple[str, ...] | None = Field(
        default=None,
        description="Words that the model does not know, at most 100; only of a model of a small "
        "vocabulary.",
    )
    request_id: str
    timings_ms: dict[str, float]


class ArchiveCamera(Record):
    """A folder of videos of an archive, such as that of a camera."""

    name: str
    num_videos: int
    num_windows: int


class ArchiveAnswer(Record):
    """What there is to be searched in an archive: the answer of /v1/archive."""

    name: str = Field(description="of its folder")
    num_videos: int = Field(description="that have windows")
    num_windows: int
    hours: float = Field(description="of video")
    cameras: tuple[ArchiveCamera, ...] = Field(description="by name")
    first_seconds: float | None = Field(
        description="when the first recording began, since 1970; null where none is known"
    )
    last_seconds: float | None = Field(description="when the last one ended")
    window_seconds: float
    stride_seconds: float


class InspectedArchiveModel(Record):
    """What the windows of an archive were made with."""

    bundle: str = Field(description="where it was")
    visual_sha256: str
    textual_sha256: str
    embedding_dim: int
    window_seconds: float
    stride_seconds: float
    static_cosine: float = Field(
        description="windows this near to the last stored one are stored with it; 2 for none"
    )
    region: str = Field(description="--resize")
    runtime: str


class ArchiveInspectionRecord(VersionedRecord):
    """An archive: `inspect --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    archive: ArchiveAnswer
    model: InspectedArchiveModel
    num_undated: int = Field(description="videos with windows of which no name tells the time")
    num_failed: int
    failed: tuple[UnreadVideo, ...] = Field(description="videos without windows, and why")


class IndexRecord(VersionedRecord):
    """What was brought into an archive: `index --json`."""

    schema_version: int = RECORD_SCHEMA_VERSION
    archive: str
    num_added: int = Field(description="videos that are new or had changed")
    num_unchanged: int = Field(description="videos that have windows and did not change")
    num_removed: int = Field(description="videos that are no longer there")
    num_kept: int = Field(description="videos whose folder is gone or empty, and that are kept")
    num_failed: int
    failed: tuple[UnreadVideo, ...]
    num_failed_before: int = Field(
        description="videos that failed in an earlier run and did not change; --retry-failed "
        "tries them again"
    )
    failed_before: tuple[UnreadVideo, ...]
    num_damaged: int = Field(
        description="videos of the archive whose windows were found lost with a file of vectors"
    )
    num_undated: int = Field(description="videos of the archive of which no name tells the time")
    num_windows_encoded: int
    num_windows: int = Field(description="of the archive now")
    seconds: float
