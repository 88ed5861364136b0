"""What a server answers, as frozen dataclasses, and how they are read from its JSON.

Reading raises KeyError, TypeError or ValueError for what is no such answer; `operations.py` turns
these into one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.calibration import Answer
from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.recognizer import LabelScore
from actionclip_deploy.runtimes.base import Float32Array, RuntimeInfo

Json = Mapping[str, Any]
Record = TypeVar("Record")


@dataclass(frozen=True)
class UsedBank:
    """Which labels an answer is about.

    Attributes:
        name: Of the label bank; None for a list of labels.
        version: Of the bank on this server; None for a list of labels.
        sha256: Of labels, templates and embeddings.
        num_labels: C.
        num_templates: K.
    """

    name: str | None
    version: int | None
    sha256: str
    num_labels: int
    num_templates: int


@dataclass(frozen=True)
class TemplateVote:
    """What one template alone would have chosen, and whether that is the best label of all."""

    template: str
    label: str
    score: float
    agrees: bool


@dataclass(frozen=True, eq=False)
class ServerPrediction:
    """What a server recognised in one video.

    Attributes:
        name: What the video was called in the request.
        predictions: The best labels, best first.
        answer: The best label, or "unknown"; None where the bank is not calibrated.
        frame_indices: Frames that were used, shape (num_clips, T), 0-based; None for embeddings.
        pts_seconds: Their presentation times, shape (num_clips, T); None where not known.
        templates: What each template would have chosen, if that was asked for.
        template_agreement: Share of the templates that choose the best label, if asked for.
        warnings: Damage that was found in the video.
        batch_size: Clips in its call of the runtime, those of other requests too.
        timings_ms: Wall-clock milliseconds by stage, of this video.
        bank: The labels that it was scored against.
        method: How scores were made.
        runtime: What computed it.
        request_id: Under which the server's log has the request.
    """

    name: str
    predictions: tuple[LabelScore, ...]
    answer: Answer | None
    frame_indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    templates: tuple[TemplateVote, ...] | None
    template_agreement: float | None
    warnings: tuple[str, ...]
    batch_size: int | None
    timings_ms: dict[str, float]
    bank: UsedBank
    method: str
    runtime: RuntimeInfo
    request_id: str


@dataclass(frozen=True, eq=False)
class ServerEmbeddings:
    """The embeddings of one video's views.

    Attributes:
        name: What the video was called in the request.
        embeddings: Of unit norm, float32, shape (V, D).
        frame_indices: Frames that were used, shape (num_clips, T), 0-based.
        pts_seconds: Their presentation times, shape (num_clips, T); None where not known.
        warnings: Damage that was found in the video.
        timings_ms: Wall-clock milliseconds by stage, of this video.
        runtime: What computed it.
    """

    name: str
    embeddings: Float32Array
    frame_indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    timings_ms: dict[str, float]
    runtime: RuntimeInfo


@dataclass(frozen=True)
class RefusedVideo:
    """One of several videos that the server could not do, and why."""

    name: str
    error: RequestRefusedError


@dataclass(frozen=True)
class BankVersion:
    """One version of a label bank on a server; `activated_seconds` is Unix time."""

    version: int
    sha256: str
    num_labels: int
    num_templates: int
    activated_seconds: float


@dataclass(frozen=True)
class BankBuild:
    """A build of a label bank.

    Attributes:
        state: waiting, building, ready, failed or cancelled.
        done: Prompts that are embedded.
        total: Prompts that there are; 0 until known.
        error: Why it failed.
        version: What it became.
    """

    state: str
    done: int
    total: int
    error: str | None
    version: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ("waiting", "building")


@dataclass(frozen=True)
class BankState:
    """A label bank on a server.

    Attributes:
        name: Of the bank.
        active: The version that answers; None while the first one is built.
        labels: C labels, where one bank was asked for.
        templates: K templates, where one bank was asked for.
        calibration: When a video is "unknown"; None where it never is, or the server does not say.
        versions: The last ones.
        build: The last build; None where there was none.
    """

    name: str
    active: BankVersion | None
    labels: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    calibration: dict[str, Any] | None
    versions: tuple[BankVersion, ...]
    build: BankBuild | None


def read_predictions(data: Json) -> tuple[ServerPrediction | RefusedVideo, ...]:
    """The answer of /v1/classify."""
    bank, runtime = _made(UsedBank, data["bank"]), _made(RuntimeInfo, data["runtime"])
    request_id = str(data["request_id"])

    def read(result: Json) -> ServerPrediction | RefusedVideo:
        if result.get("error") is not None:
            return _refused(result, request_id)
        votes, answer = result.get("templates"), result.get("answer")
        return ServerPrediction(
            name=result["name"],
            predictions=tuple(_made(LabelScore, each) for each in result["predictions"]),
            answer=None
            if answer is None
            else Answer(answer["label"], answer["score"], answer["threshold"]),
            **_frames(result),
            templates=None if votes is None else tuple(_made(TemplateVote, each) for each in votes),
            template_agreement=result.get("template_agreement"),
            warnings=tuple(result.get("warnings", ())),
            batch_size=result.get("batch_size"),
            timings_ms=dict(result["timings_ms"]),
            bank=bank,
            method=data["method"],
            runtime=runtime,
            request_id=request_id,
        )

    return tuple(map(read, data["results"]))


def read_embeddings(data: Json) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
    """The answer of /v1/embed for videos."""
    runtime = _made(RuntimeInfo, data["runtime"])

    def read(result: Json) -> ServerEmbeddings | RefusedVideo:
        if result.get("error") is not None:
            return _refused(result, str(data["request_id"]))
        return ServerEmbeddings(
            name=result["name"],
            embeddings=np.array(result["embeddings"], np.float32),
            **_frames(result),
            warnings=tuple(result.get("warnings", ())),
            timings_ms=dict(result["timings_ms"]),
            runtime=runtime,
        )

    return tuple(map(read, data["results"]))


def read_text_embeddings(data: Json) -> Float32Array:
    """The answer of /v1/embed for texts: shape (M, D)."""
    return np.array(data["embeddings"], np.float32).reshape(-1, data["embedding_dim"])


def read_bank(data: Json) -> BankState:
    """The answer of /v1/labels/NAME."""
    active, build = data["active"], data["build"]
    labels, templates = data["labels"], data["templates"]
    return BankState(
        name=data["name"],
        active=None if active is None else _made(BankVersion, active),
        labels=None if labels is None else tuple(labels),
        templates=None if templates is None else tuple(templates),
        calibration=data.get("calibration"),
        versions=tuple(_made(BankVersion, each) for each in data["versions"]),
        build=None if build is None else _made(BankBuild, build),
    )


def read_diff(data: Json) -> LabelBankDiff:
    """The answer of /v1/labels/NAME/diff."""
    return LabelBankDiff(
        added=tuple(data["added"]),
        removed=tuple(data["removed"]),
        moved=tuple((label, int(old), int(new)) for label, old, new in data["moved"]),
        templates_added=tuple(data["templates_added"]),
        templates_removed=tuple(data["templates_removed"]),
    )


def _made(record: type[Record], data: Json) -> Record:
    """A record of the keys that it has; a newer server may tell more."""
    names = {each.name for each in fields(record)}  # type: ignore[arg-type]
    return record(**{name: value for name, value in data.items() if name in names})


def _refused(result: Json, request_id: str) -> RefusedVideo:
    given = result["error"]
    error = RequestRefusedError(
        given["message"], status=given["status"], code=given["code"], request_id=request_id
    )
    return RefusedVideo(result["name"], error)


def _frames(result: Json) -> dict[str, Any]:
    frames = result.get("frames")
    if frames is None:
        return {"frame_indices": None, "pts_seconds": None}
    times = frames["pts_seconds"]
    return {
        "frame_indices": np.array(frames["indices"], np.int64),
        "pts_seconds": None if times is None else np.array(times, np.float64),
    }
