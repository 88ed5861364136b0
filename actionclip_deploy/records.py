"""Everything that the program gives as JSON, and what /v1 takes: one schema for all of it.

`VideoRecord` says what was recognised in one video. It is a line of `predict --json`, of its
result file and of `classify --json`, and a result of /v1/classify. Answers are built from these
models, the OpenAPI document is made from them, and the client reads with them.

`schema_version` grows when a key goes or changes its meaning. A new key may come without that, so
a reader ignores what it does not know; the models do. A key is left out where nothing is said
about it (what was not asked for, say), and null where there is nothing to say.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.manifest import ModelSpec, ScoreMethod, ScoreSpec

RECORD_SCHEMA_VERSION = 1

# They join letters, in many scripts and in pictures of people, and move nothing.
_JOINERS = "\u200c\u200d"


def printable(text: str, *, kept: str = "\n\t") -> str:
    r"""A text whose control characters are escaped, as `\x1b`, for terminals, logs and messages.

    A file's name may hold the sequences that move a terminal's cursor or rename its window, those
    that turn the direction of writing, and bytes that are not text.

    Args:
        text: Any text.
        kept: Control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in kept or char in _JOINERS
        else char.encode("unicode_escape").decode()
        for char in text
    )


def file_text(name: str) -> str:
    r"""The name of a file as text, with bytes that are not UTF-8 as `\xe9`."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


class Record(BaseModel):
    """What all records have in common."""

    # Built when the first one is needed, not by `import actionclip_deploy`. NaN and infinity are
    # refused here, since JSON has neither.
    model_config = ConfigDict(
        frozen=True, from_attributes=True, allow_inf_nan=False, defer_build=True
    )

    def to_json(self) -> bytes:
        """The record as JSON in UTF-8, without what nothing is said about."""
        try:
            return self.model_dump_json(exclude_unset=True).encode()
        except PydanticSerializationError:  # the name of a file is not UTF-8
            return json_text(self.to_dict()).encode()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; file names in it may hold bytes that are not UTF-8."""
        return self.model_dump(mode="json", exclude_unset=True)

    def model_post_init(self, context: Any) -> None:  # noqa: ARG002
        """A record that names a file by a path that is not UTF-8 gives its bytes as well."""
        video = self.__dict__.get("video")
        if video is not None and "video_bytes" in type(self).model_fields and not _is_utf8(video):
            self.__dict__["video_bytes"] = quote(os.fsencode(video))
            self.model_fields_set.add("video_bytes")


def counted(number: int, noun: str) -> str:
    """A number of things as one says it: "1 moment", "1,204 moments"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock_text(seconds: float) -> str:
    """A time as people write it: `0:02.5`, `1:02:03.5`."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    hour = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{hour}:{rest // 10:02d}.{rest % 10}"


def json_text(value: Any, *, indent: int | None = None) -> str:
    r"""A value as JSON that can be written in UTF-8, whatever bytes the names of files in it have.

    A byte that is not UTF-8 is written as the escape `\udc80` to `\udcff`, which `json.loads` and
    `os.fsencode` turn back. Not every reader in another language takes such an escape; a record
    has `video_bytes` besides.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return text if _is_utf8(text) else json.dumps(value, indent=indent, allow_nan=False)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Of a path that is not UTF-8, for readers that do not know the escapes in `video`.
VideoBytes: TypeAlias = Annotated[
    str | None,
    Field(description="only of a path that is not UTF-8: all of it, percent-encoded"),
]


class VersionedRecord(Record):
    """A record that stands by itself."""

    # Each declares `schema_version` itself, since fields of a base would come first.
    def model_post_init(self, context: Any) -> None:
        """It is never written without its version."""
        super().model_post_init(context)
        self.model_fields_set.add("schema_version")


def _finite_matrix(given: Any) -> NDArray[np.float32]:
    matrix = np.asarray(given, np.float32)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"embeddings of shape {matrix.shape} are not rows of finite numbers")
    return matrix


# Checked at once: half a million numbers, one by one, would hold up the server.
Matrix: TypeAlias = Annotated[
    NDArray[np.float32],
    PlainValidator(_finite_matrix),
    PlainSerializer(lambda matrix: matrix.tolist(), return_type=list[list[float]]),
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
]


def _tuple_schema(length: int, *types: str) -> WithJsonSchema:
    """For the OpenAPI document: a tuple without `prefixItems`, which few readers know."""
    items = {"type": types[0]} if len(types) == 1 else {"anyOf": [{"type": t} for t in types]}
    return WithJsonSchema({"type": "array", "items": items, "minItems": length, "maxItems": length})


# What was recognised in a video.


@dataclass(frozen=True)
class LabelScore:
    """A label and the score that it got, in [0, 1]."""

    label: str
    score: float


@dataclass(frozen=True)
class TemplateVote:
    """What one template alone would have chosen, and whether that is the best label of all.

    Of a saved query, which has one label: whether it is told of by that template as by all.
    """

    template: str
    label: str
    score: float
    agrees: bool


@dataclass(frozen=True)
class RuntimeInfo:
    """What really runs: for reports, `--json` output and logs.

    Attributes:
        name: Name of the runtime, as `open_runtime` takes it.
        execution_provider: ONNX Runtime's term; for the other runtimes, their device.
        precision: Precision of the graph that does nearly all the work.
        num_threads: Threads of one call on a CPU; None where the runtime decides.
        versions: Versions of the libraries that run.
        engine: Name of the engine, as `actionclip engines list` prints it; None where the graphs
            themselves run.
        spin_us: On a CPU, for how many microseconds threads that have no work look for some
            before they sleep; None where the runtime decides.
    """

    name: str
    execution_provider: str
    precision: str
    num_threads: int | None
    versions: dict[str, str] = field(default_factory=dict)
    engine: str | None = None
    spin_us: int | None = None

    @property
    def title(self) -> str:
        """In words, such as "openvino (CPU, bf16)"."""
        return f"{self.name} ({self.execution_provider}, {self.precision})"


class Decision(Record):
    """The best label of a calibrated bank or a saved query, or that a video shows none of these."""

    label: str | None = Field(description="null for unknown")
    is_unknown: bool
    score: float = Field(description="the best calibrated score, or the saved query's, 0 to 1")
    threshold: float


class FramesRecord(Record):
    """The frames that were used; one list of T for each clip."""

    num_clips: int
    indices: tuple[tuple[int, ...], ...] = Field(description="0-based")
    pts_seconds: tuple[tuple[float, ...], ...] | None = Field(
        description="presentation times; null for frames that came without"
    )

    @classmethod
    def of(
        cls, indices: NDArray[np.int64], pts_seconds: NDArray[np.float64] | None
    ) -> "FramesRecord":
        """A record of two arrays of shape (num_clips, T)."""
        times = None if pts_seconds is None else np.round(pts_seconds, 6).tolist()
        return cls(num_clips=len(indices), indices=indices.tolist(), pts_seconds=times)


class PixelsRecord(Record):
    """Frames as the model saw them, on request."""

    shape: Annotated[tuple[int, int, int, int], _tuple_schema(4, "integer")] = Field(
        description="F, S, S, 3: distinct frames, RGB"
    )
    data: str = Field(description="base64 of the pixels, one byte each")
    views: tuple[tuple[int, ...], ...] = Field(description="frames that each view is made of")


class UsedBank(Record):
    """Which labels a video was scored against; name and version are null for a list of labels."""

    name: str | None
    version: int | None = Field(description="of the bank on a server; null elsewhere")
    sha256: str = Field(description="of labels, templates, embeddings and calibration")
    num_labels: int
    num_templates: int
    textual_sha256: str | None = Field(default=None, description="of the text encoder that made it")
    unknown_words: tuple[str, ...] | None = Field(
        default=None,
        description="Words of its labels that the model does not know, at most 100; only of a "
        "model of a small vocabulary.",
    )


class ErrorRecord(Record):
    """Why a video gave no result; `status` is that of HTTP, null where no server was asked."""

    status: int | None
    code: str
    message: str


class RunRecord(Record):
    """What the results in one file of `predict --output` share, but for versions of libraries."""

    bundle_sha256: str
    bank: str | None  # None of labels that are in no bank
    bank_sha256: str
    views: str
    scores: ScoreMethod
    resize: str
    top_k: int
    decoder: str
    runtime: str
    execution_provider: str
    precision: str


class EmbedRunRecord(Record):
    """As `RunRecord`, of `embed --output`."""

    bundle_sha256: str
    views: str
    resize: str
    decoder: str
    runtime: str
    execution_provider: str
    precision: str


class TimelineRunRecord(Record):
    """As `RunRecord`, of `predict --timeline --output`."""

    bundle_sha256: str
    bank: str | None
    bank_sha256: str
    window_seconds: float
    stride_seconds: float
    threshold: float | None
    still: float
    scores: ScoreMethod
    resize: str
    decoder: str
    runtime: str
    execution_provider: str
    precision: str


class VideoRecord(VersionedRecord):
    """The labels of one video, or why there are none."""

    video: str = Field(description="the path that was given; on a server, the name of the upload")
    schema_version: int = RECORD_SCHEMA_VERSION
    name: str = Field(description="the last part of it")
    video_bytes: VideoBytes = None
    predictions: tuple[LabelScore, ...] | None = Field(default=None, description="best first")
    answer: Decision | None = Field(
        default=None,
        description="The one label, or unknown; null where the bank is neither calibrated nor a "
        "saved query.",
    )
    frames: FramesRecord | None = Field(default=None, description="null for embeddings")
    pixels: PixelsRecord | None = None
    templates: tuple[TemplateVote, ...] | None = None
    template_agreement: float | None = Field(
        default=None, description="Share of the templates that choose the first label."
    )
    method: ScoreMethod | None = Field(default=None, description="how scores were made")
    bank: UsedBank | None = None
    runtime: RuntimeInfo | None = None
    num_frames_encoded: int | None = Field(
        default=None, description="that went through the graphs for this video"
    )
    num_frames_reused: int | None = Field(
        default=None, description="whose features were known from equal frames of the run"
    )
    warnings: tuple[str, ...] = Field(default=(), description="damage that was found in the video")
    batch_size: int | None = Field(default=None, description="Clips in its call of the runtime.")
    timings_ms: dict[str, float] = Field(default={}, description="wall-clock time by stage")
    request_id: str | None = Field(default=None, description="under which a server's log has it")
    error: ErrorRecord | None = None
    run: RunRecord | None = Field(default=None, description="in a result file")

    @model_validator(mode="before")
    @classmethod
    def _from_before_there_were_versions(cls, given: Any) -> Any:
        if isinstance(given, dict) and "video" not in given and "name" in given:
            return {"video": given["name"], **given}
        return given


LABEL_COLUMNS = ("video", "rank", "label", "score", "error")


EVENT_COLUMNS = ("video", "label", "start_seconds", "end_seconds", "mean", "peak", "error")


def label_rows(
    video: str, predictions: Iterable[LabelScore] | None, error: str | None
) -> list[tuple[str, int | None, str | None, float | None, str | None]]:
    """What tables say of a video: a row for each label, best first; of a failed one, the error.

    Args:
        video: What it is called in the table.
        predictions: Its labels, best first.
        error: Why there are none; None if there are.
    """
    if error is not None:
        return [(video, None, None, None, error)]
    ranked = enumerate(predictions or (), start=1)
    return [(video, rank, best.label, best.score, None) for rank, best in ranked]


class EmbeddedVideoRecord(VersionedRecord):
    """The embeddings of one video, or why there are none: a line of `embed --json`."""

    video: str = Field(description="the path that was given")
    schema_version: int = RECORD_SCHEMA_VERSION
    name: str = Field(description="the last part of it")
    video_bytes: VideoBytes = None
    embeddings: Matrix | None = Field(default=None, description="of norm 1, a row for each view")
    frames: FramesRecord | None = None
    num_frames_encoded: int | None = Field(
        default=None, description="that went through the graphs for this video"
    )
    num_frames_reused: int | None = Field(
        default=None, description="whose features were known from equal frames of the run"
    )
    warnings: tuple[str, ...] = Field(default=(), description="damage that was found in the video")
    timings_ms: dict[str, float] = Field(default={}, description="wall-clock time by stage")
    error: ErrorRecord | None = None
    run: EmbedRunRecord | None = Field(default=None, description="in an unfinished file")


# What happened in a stream or a long video.

EventKind: TypeAlias = Literal["new", "update", "end"]
EndReason: TypeAlias = Literal["closed", "gap", "session", "labels"]
UtcTime: TypeAlias = Annotated[
    str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$", description="ISO 8601, UTC")
]


class EventRecord(VersionedRecord):
    """A message about an event: that it began, that it lasts, or that it has ended.

    Messages of an event share its id. A reader that gets one twice, as it may from a webhook,
    knows it by the id and the number.
    """

    schema_version: int = RECORD_SCHEMA_VERSION
    kind: EventKind
    id: str = Field(description="of the event; ids sort by when events were first told of")
    number: int = Field(ge=0, description="of the message in its event, from 0 for `new`")
    source: str = Field(description="name of the source")
    label: str = Field(description="a label of the bank, or a group of them")
    start_seconds: float = Field(description="by the clock of the source")
    end_seconds: float | None = Field(description="null until the event has ended")
    start_time: UtcTime
    end_time: UtcTime | None
    end_reason: EndReason | None = Field(
        description="null until it has ended: its score fell (closed), there were no windows "
        "(gap), the source ended or connected anew (session), or the labels changed"
    )
    score: float = Field(description="at its last step, the mean of some windows")
    mean: float = Field(description="of its scores so far")
    peak: float = Field(description="the highest so far")
    threshold: float = Field(description="at which events of this label open")
    method: ScoreMethod
    bank: UsedBank
    runtime: RuntimeInfo | None = None

    @property
    def message_id(self) -> str:
        """Of this message: the id of the event, a point and the number."""
        return f"{self.id}.{self.number}"


class IntervalRecord(Record):
    """A label that held from one time to another; seconds from the first frame of the video."""

    label: str
    start_seconds: float
    end_seconds: float
    mean: float = Field(description="of its scores over time, calibrated where the bank is")
    peak: float = Field(description="the highest of them")


class TimelineRecord(VersionedRecord):
    """When labels held in a long video, or why that is not known: `predict --timeline --json`."""

    video: str = Field(description="the path that was given")
    schema_version: int = RECORD_SCHEMA_VERSION
    name: str = Field(description="the last part of it")
    video_bytes: VideoBytes = None
    events: tuple[IntervalRecord, ...] | None = Field(default=None, description="by their start")
    duration_seconds: float | None = None
    window_seconds: float | None = None
    stride_seconds: float | None = Field(
        default=None, description="from the start of a window to that of the next"
    )
    num_windows: int | None = None
    num_windows_voided: int | None = Field(
        default=None, description="that had begun when a gap in the video came"
    )
    num_frames: int | None = Field(default=None, description="that windows are made of")
    num_frames_reused: int | None = Field(
        default=None, description="of these, with the feature of the frame before"
    )
    method: ScoreMethod | None = Field(default=None, description="how scores were made")
    bank: UsedBank | None = None
    runtime: RuntimeInfo | None = None
    warnings: tuple[str, ...] = Field(default=(), description="damage that was found in the video")
    timings_ms: dict[str, float] = Field(
        default={}, description="by stage; reading goes on beside the graphs"
    )
    error: ErrorRecord | None = None
    run: TimelineRunRecord | None = Field(default=None, description="in a result file")


def event_rows(
    video: str, record: TimelineRecord
) -> list[
    tuple[str, str | None, float | None, float | None, float | None, float | None, str | None]
]:
    """What tables say of a timeline: a row for each event; of a video that failed, the error."""
    if record.error is not None:
        return [(video, None, None, None, None, None, record.error.message)]
    return [
        (video, e.label, e.start_seconds, e.end_seconds, e.mean, e.peak, None)
        for e in record.events or ()
    ]


class StreamRecord(VersionedRecord):
    """How a live source is: an entry of /v1/streams, and what `watch` says at its end."""

    name: str
    schema_version: int = RECORD_SCHEMA_VERSION
    source: str = Field(description="where frames come from, without secrets")
    state: Literal["opening", "running", "lost", "ended", "failed"]
    since: str = Field(description="of the state, UTC")
    reconnects: int
    last_error: str | None = Field(description="why it was lost or failed last")
    seconds_since_frame: float | None
    frames: int = Field(description="that were decoded")
    grid_frames: int = Field(description="of these, that windows are made of")
    frames_encoded: int = Field(description="that went through the visual graph")
    frames_reused: int = Field(description="for which the feature of the frame before was taken")
    windows: int = Field(description="that were scored")
    windows_dropped: dict[str, int] = Field(description="by reason")
    windows_voided: int = Field(description="that had begun when a gap came")
    age_ms: dict[str, float] | None = Field(
        description="from a frame to the answer of the window that it completes: p50, p95, p99"
    )
    window_seconds: float
    stride_seconds: float
    best: LabelScore | None = Field(description="the best label of the newest window")
    open_labels: tuple[str, ...] = Field(description="of events that have begun and not ended")
    bank: UsedBank


class StreamListAnswer(Record):
    """All streams that a server watches, in the order of its cameras."""

    streams: tuple[StreamRecord, ...]


class HistoryPoint(Record):
    """What a window showed most."""

    time: UtcTime = Field(description="at which the window ended")
    label: str = Field(description="a label of the bank, or a group of them")
    score: float


class HistoryAnswer(Record):
    """The best label of each window of the last minutes, oldest first."""

    name: str = Field(description="of the stream")
    points: tuple[HistoryPoint, ...]


@dataclass(frozen=True)
class RefusedVideo:
    """One of several videos that a server could not do, and why."""

    name: str
    error: RequestRefusedError


# What was measured on annotated videos.


class UnreadVideo(Record):
    """A video that gave no frames, and why."""

    video: str
    error: str
    video_bytes: VideoBytes = None


class EmbeddingsRecord(VersionedRecord):
    """What a file of `embed --output` says of its embeddings."""

    schema_version: int = RECORD_SCHEMA_VERSION
    bundle: str = Field(description="the folder that was given")
    bundle_sha256: str = Field(description="of its manifest")
    visual_sha256: str = Field(description="of what made them; others cannot be compared with them")
    textual_sha256: str = Field(description="of the text encoder that they go with")
    model: ModelSpec
    sampling: str
    views: str = Field(description="clips x crops; the clips of one crop stand together")
    resize: str
    decoder: str
    runtime: RuntimeInfo
    embedding_dim: int = Field(description="D")
    num_views: int = Field(description="V, of each video")
    num_videos: int = Field(default=0, description="B, of those that could be read")
    videos: tuple[str, ...] | None = Field(default=None, description="in their order")
    failed: tuple[UnreadVideo, ...] = ()


class LabelAccuracy(Record):
    """The numbers of one label; null where no video has it."""

    label: str
    num_videos: int
    accuracy: float | None
    average_precision: float | None


class EvaluatedVideo(Record):
    """A video, its labels, and the one that was ranked first."""

    video: str
    labels: tuple[str, ...]
    prediction: str
    score: float
    video_bytes: VideoBytes = None


class EvaluationRecord(VersionedRecord):
    """Accuracy on annotated videos: `evaluate --json`, and with `evaluate --output` all of it."""

    schema_version: int = RECORD_SCHEMA_VERSION
    model: str | None = None
    annotations: str | None = None
    labels: str | None = Field(default=None, description="the file or label bank that was given")
    num_videos: int
    top1: float
    top1_interval: tuple[float, float] = Field(description="with 95 % confidence")
    top5: float
    mean_class_accuracy: float
    mean_average_precision: float
    num_labels: int
    num_failed: int
    failed: tuple[UnreadVideo, ...]
    runtime: RuntimeInfo
    views: str
    scores: ScoreMethod
    num_templates: int
    num_frames_encoded: int | None = None
    num_frames_reused: int | None = Field(
        default=None, description="whose features were known from equal frames of the run"
    )
    seconds: float
    per_class: tuple[LabelAccuracy, ...] | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    videos: tuple[EvaluatedVideo, ...] | None = None


class LabelEvents(Record):
    """The numbers of one label; null where no video shows it."""

    label: str
    num_intervals: int
    thumos_ap: float | None
    activitynet_ap: float | None
    frame_ap: float | None
    num_missed: int
    num_events: int
    num_false: int


@dataclass(frozen=True)
class Interval:
    """A label and the time for which a video shows it, in seconds; the end is exclusive."""

    label: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class LiveEvent(Interval):
    """An event as a stream of the video tells it.

    Attributes:
        new_seconds: When it was told first, by the clock of the video; None where it was only found
            afterwards, so that no delay is known.
    """

    new_seconds: float | None = None


class EvaluatedTimeline(Record):
    """A long video, what it shows, and what was found in it."""

    video: str
    duration_seconds: float
    intervals: tuple[Interval, ...]
    events: tuple[IntervalRecord, ...]
    live_events: tuple[LiveEvent, ...]
    video_bytes: VideoBytes = None


class TimelineEvaluationRecord(VersionedRecord):
    """Events against annotated intervals: `evaluate --timeline --json`, and in its --output all."""

    schema_version: int = RECORD_SCHEMA_VERSION
    model: str | None = None
    annotations: str | None = None
    labels: str | None = Field(default=None, description="the file or label bank that was given")
    num_videos: int
    hours: float = Field(description="length of the videos")
    num_intervals: int
    num_labels: int
    num_shown_labels: int = Field(description="labels that some interval has")
    thumos_map: float = Field(description="mean over tIoU 0.3 to 0.7 by 0.1")
    activitynet_map: float = Field(description="mean over tIoU 0.5 to 0.95 by 0.05")
    map_at: dict[str, float] = Field(description="by tIoU")
    frame_map: float | None = Field(description="over the steps of the grid; null if none fits")
    num_events: int = Field(description="at the thresholds, as a stream tells them")
    num_false: int = Field(description="of these, events that overlap no interval of their label")
    false_alarms_per_hour: float | None
    num_missed: int = Field(description="intervals to which no event belongs")
    miss_rate: float
    events_per_found: float | None = Field(
        description="Events that belong to an interval, over the intervals that were found."
    )
    delay_p50_seconds: float | None = Field(
        description="From the start of an interval to the first `new` of its events, by the clock "
        "of the video: without the time for computing."
    )
    delay_p95_seconds: float | None
    threshold: float | None = Field(description="null if labels differ in it")
    window_seconds: float
    stride_seconds: float = Field(description="from one window to the next")
    num_failed: int
    failed: tuple[UnreadVideo, ...]
    runtime: RuntimeInfo
    scores: ScoreMethod
    num_templates: int
    seconds: float
    per_label: tuple[LabelEvents, ...] | None = None
    videos: tuple[EvaluatedTimeline, ...] | None = None


# Requests to /v1.


class _FirstError(FailFast):
    """Ends the check of a list at its first error.

    A list of millions of wrong values would be answered by the first error alone, but take a
    minute and gigabytes for the others.
    """

    __hash__ = object.__hash__  # what a part of a union needs


_Texts = Annotated[tuple[str, ...], _FirstError()]
_Numbers = Annotated[tuple[float, ...], _FirstError()]
_Views = Annotated[tuple[_Numbers, ...], _FirstError()]

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


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class ClassifyFields(_Request):
    """What a request to /v1/classify says besides its videos."""

    labels: Labels
    top_k: TopK = 5
    views: ViewsText = "1x1"
    templates: _Texts | None = Field(
        default=None,
        description="For a list of labels: sentences with {} for the label; by default the "
        "bundle's. For a bank: those of its templates to use; by default all.",
    )
    multi_label: bool = Field(default=False, description="Score each label by itself.")
    per_template: bool = Field(
        default=False, description="Say what each template alone would choose."
    )
    return_frames: bool = Field(default=False, description="Give the frames as the model saw them.")
    allow_unknown_words: bool = Field(
        default=False, description="Take labels of which the model knows no word, too."
    )
    timeout_ms: TimeoutMs = None


class ClassifyJson(ClassifyFields):
    """A request to /v1/classify in JSON: videos that were embedded before."""

    embeddings: Annotated[tuple[_Views, ...], _FirstError()] = Field(
        min_length=1,
        description="For each video the embeddings of its views, of norm 1, as /v1/embed gives.",
    )


class EmbedFields(_Request):
    """What a request to /v1/embed says besides its videos."""

    views: ViewsText = "1x1"
    timeout_ms: TimeoutMs = None


class EmbedJson(_Request):
    """A request to /v1/embed in JSON: texts."""

    texts: _Texts = Field(min_length=1, description="Prompts, embedded as they are.")
    timeout_ms: TimeoutMs = None


class BankJson(_Request):
    """A label bank to build."""

    labels: _Texts = Field(min_length=1)
    templates: _Texts | None = Field(
        default=None, description="Sentences with {} for the label; by default the bundle's."
    )
    allow_unknown_words: bool = Field(
        default=False, description="Take labels of which the model knows no word, too."
    )


class SearchLike(_Request):
    """A moment of a video of the archive."""

    video: Annotated[int, Field(ge=1, le=2**53)] | str = Field(
        description="Its id, its path, or the end of its path."
    )
    seconds: float = Field(allow_inf_nan=False, description="From the start of the video.")


class SearchJson(_Request):
    """A request to /v1/search: a text, or a moment that others are to be like."""

    text: str | None = Field(
        default=None, description="What is looked for, as one would write a label."
    )
    like: SearchLike | None = Field(default=None, description="In the place of a text.")
    without: _Texts = Field(
        default=(), description="What moments must not show: they are nearer to what is looked for."
    )
    cameras: _Texts = Field(
        default=(), description="Names of folders that are looked in; by default all."
    )
    videos: _Texts = Field(
        default=(), description="Paths of videos, or their ends, that are looked in."
    )
    from_seconds: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="What was recorded from this time on, since 1970.",
    )
    to_seconds: float | None = Field(
        default=None, allow_inf_nan=False, description="What was recorded until this time."
    )
    top: int = Field(default=20, ge=1, description="Moments of an answer.")
    allow_unknown_words: bool = Field(
        default=False, description="Take texts of which the model knows no word, too."
    )
    timeout_ms: TimeoutMs = None


# Answers of /v1, which has its version in its path.


class ErrorDetail(Record):
    """Why a request was not done."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(Record):
    """The body of every refusal."""

    error: ErrorDetail


class ErrorAnswerV2(Record):
    """The body of every refusal of /v2, as its protocol has it."""

    error: str = Field(description="One sentence: what was given, what was expected.")


class ClassifyAnswer(Record):
    """The answer of /v1/classify; each result says by itself all that the answer says."""

    request_id: str
    results: tuple[VideoRecord, ...]
    bank: UsedBank
    method: ScoreMethod
    runtime: RuntimeInfo
    timings_ms: dict[str, float]


class EmbeddedRecord(Record):
    """The embeddings of one video's views, or why there are none."""

    name: str
    embeddings: Matrix | None = Field(default=None, description="of norm 1, a row for each view")
    frames: FramesRecord | None = None
    warnings: tuple[str, ...] = ()
    timings_ms: dict[str, float] = {}
    error: ErrorRecord | None = None


class EmbedAnswer(Record):
    """The answer of /v1/embed: `results` for videos, `embeddings` for texts."""

    request_id: str
    embedding_dim: int
    results: tuple[EmbeddedRecord, ...] | None = None
    embeddings: Matrix | None = None
    unknown_words: tuple[str, ...] | None = Field(
        default=None,
        description="Words of the texts that the model does not know, at most 100; only of a "
        "model of a small vocabulary.",
    )
    runtime: RuntimeInfo
    timings_ms: dict[str, float]


class BankBuild(Record):
    """A build of a label bank."""

    state: Literal["waiting", "building", "ready", "failed", "cancelled"]
    done: int = Field(description="prompts embedded")
    total: int = Field(description="prompts there are; 0 until known")
    error: str | None
    version: int | None = Field(description="what it became")
    unknown_words: tuple[str, ...] | None = Field(
        default=None, description="as of the bank that it becomes"
    )

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ("waiting", "building")


class VersionRecord(Record):
    """One version of a label bank on a server."""

    version: int
    sha256: str
    num_labels: int
    num_templates: int
    activated_seconds: float = Field(description="since 1970")


class BankState(Record):
    """A label bank on a server, and its last build."""

    name: str
    active: VersionRecord | None = Field(description="null while the first one is built")
    labels: tuple[str, ...] | None = Field(description="where one bank was asked for")
    templates: tuple[str, ...] | None
    calibration: dict[str, Any] | None = Field(default=None, description="when a video is unknown")
    unknown_words: tuple[str, ...] | None = Field(
        default=None,
        description="Words of its labels that the model does not know, at most 100; only of a "
        "model of a small vocabulary.",
    )
    versions: tuple[VersionRecord, ...]
    build: BankBuild | None


class BankListAnswer(Record):
    """All label banks, without their labels."""

    banks: tuple[BankState, ...]


class DiffAnswer(Record):
    """What changed from one version of a label bank to another."""

    name: str
    old: int
    new: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    moved: tuple[Annotated[tuple[str, int, int], _tuple_schema(3, "string", "integer")], ...] = (
        Field(description="label, old place, new place")
    )
    templates_added: tuple[str, ...]
    templates_removed: tuple[str, ...]


class ServedGraph(Record):
    """A graph of the bundle that is served."""

    precision: str
    sha256: str


class ServedBundle(Record):
    """The bundle that is served."""

    name: str
    sha256: str = Field(description="of its manifest")
    graphs: dict[str, ServedGraph]


class VerificationRecord(Record):
    """What the server's verification found when it started."""

    passed: bool
    num_comparisons: int
    golden_origin: str
    verified_seconds: float | None = Field(default=None, description="when it ended, since 1970")


class VocabularyRecord(Record):
    """How much of its tokenizer's vocabulary a model was trained on."""

    num_known_tokens: int
    num_tokens: int


class BatchingRecord(Record):
    """How clips of several requests share calls."""

    max_batch: int
    max_delay_ms: float
    queue: int
    best_batch: int
    ms_per_clip: dict[int, float] = Field(description="by clips in a call")


class NamedVersion(VersionRecord):
    """The active version of a label bank."""

    name: str


class InfoAnswer(Record):
    """What runs."""

    version: str
    state: str
    bundle: ServedBundle
    model: ModelSpec
    scores: ScoreSpec
    templates: tuple[str, ...]
    runtime: RuntimeInfo
    verification: VerificationRecord | None
    vocabulary: VocabularyRecord | None = Field(
        default=None, description="of a model that does not know every token; null otherwise"
    )
    batching: BatchingRecord
    workers: int
    banks: tuple[NamedVersion, ...]
    num_streams: int = Field(default=0, description="that are watched, see /v1/streams")
    archive: str | None = Field(
        default=None, description="name of the archive's folder, see /v1/archive; null without one"
    )
    limits: dict[str, int | float]
