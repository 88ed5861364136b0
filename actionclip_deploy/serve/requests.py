"""What is asked of the service, in plain Python: videos, options, and what comes out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve.banks import BankVersion
from actionclip_deploy.serve.execution import ClipWork
from actionclip_deploy.serve.ranking import Ranking

Result = TypeVar("Result")


@dataclass(frozen=True)
class VideoInput:
    """A video file, or a .npy file of frames, uint8 (N, H, W, 3).

    Attributes:
        path: Where it lies.
        name: What its sender calls it.
        kind: Which of the two it is.
    """

    path: Path
    name: str
    kind: Literal["video", "frames"] = "video"


@dataclass(frozen=True, eq=False)
class EmbeddingInput:
    """A video that was embedded before.

    Attributes:
        embeddings: Of its views, unit norm, float32, shape (V, D).
        name: What its sender calls it.
    """

    embeddings: Float32Array
    name: str


Input = VideoInput | EmbeddingInput


@dataclass(frozen=True)
class ClassifyOptions:
    """How videos are to be classified.

    Attributes:
        labels: Name of a label bank, or labels.
        top_k: Labels of an answer.
        views: Clips and crops per video.
        templates: For labels, the templates to fill, None for the bundle's; for a bank, those of
            its templates to use, None for all.
        multi_label: Whether each label is scored by itself.
        per_template: Whether to say what each template alone would have said.
        return_frames: Whether the answer holds the frames as the model saw them.
    """

    labels: str | tuple[str, ...]
    top_k: int = 5
    views: Views = field(default_factory=Views)
    templates: tuple[str, ...] | None = None
    multi_label: bool = False
    per_template: bool = False
    return_frames: bool = False


@dataclass(frozen=True)
class Budget:
    """The time of one request.

    Attributes:
        seconds: How much it has.
        deadline: When it ends, by the event loop's clock.
        read_seconds: What reading its body took.
        started: When it began, by `time.perf_counter`.
    """

    seconds: float
    deadline: float
    read_seconds: float
    started: float

    @classmethod
    def of(cls, seconds: float, *, read_seconds: float = 0.0) -> Budget:
        """A budget that begins to run now."""
        now = asyncio.get_running_loop().time()
        return cls(seconds, now + seconds, read_seconds, time.perf_counter() - read_seconds)

    @property
    def total_seconds(self) -> float:
        """Since the request began."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, eq=False)
class EmbeddedVideo:
    """A video's embeddings.

    Attributes:
        name: What its sender calls it.
        embeddings: Of its views, unit norm, float32, shape (V, D).
        indices: Frames of each clip, 0-based, shape (num_clips, T); None for embeddings that
            came as such.
        pts_seconds: Their presentation times; None where not known.
        warnings: Damage that was found.
        stages: Seconds by stage.
        batch_size: Clips in its call of the runtime, those of others too; 0 without a call.
        work: The frames as the model saw them; None where nobody asked for them, and for
            embeddings that came as such.
    """

    name: str
    embeddings: Float32Array
    indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    stages: dict[str, float]
    batch_size: int
    work: ClipWork | None


@dataclass(frozen=True, eq=False)
class ClassifiedVideo:
    """A video's labels."""

    embedded: EmbeddedVideo
    ranking: Ranking


@dataclass(frozen=True)
class RefusedVideo:
    """One of several videos that could not be done, and why."""

    name: str
    error: RequestRefusedError


@dataclass(frozen=True, eq=False)
class Classified:
    """The answer to a request.

    Attributes:
        bank: The version that all of its videos were scored with.
        is_adhoc: Whether the bank was made of the request's own labels.
        method: How it was scored.
        videos: In the order of the request.
    """

    bank: BankVersion
    is_adhoc: bool
    method: str
    videos: tuple[ClassifiedVideo | RefusedVideo, ...]


def or_refused(given: Input, result: Result | BaseException) -> Result | RefusedVideo:
    """What came out for one video, or why nothing did; other errors are the request's."""
    if isinstance(result, RequestRefusedError):
        return RefusedVideo(given.name, result)
    if isinstance(result, BaseException):
        raise result
    return result
