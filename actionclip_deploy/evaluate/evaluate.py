"""Accuracy of a model as it is deployed, in any runtime, on annotated videos."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import LabelBankError, VideoError, VideoMemoryError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.frames import open_frames
from actionclip_deploy.evaluate.metrics import Metrics, measure
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.records import (
    EvaluatedVideo,
    EvaluationRecord,
    LabelAccuracy,
    RuntimeInfo,
    UnreadVideo,
)
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views
from actionclip_deploy.views import FeatureCache


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of annotated videos, and what was measured on them.

    Attributes:
        samples: N videos that gave scores.
        scores: Shape (N, C).
        targets: Which labels each has, shape (N, C).
        failed: Videos that gave no frames; they count neither as right nor as wrong.
        labels: C labels.
        metrics: The measurements.
        runtime: What ran.
        views: Clips x crops per video.
        method: How scores were made.
        num_templates: K.
        seconds: What it took, without the text.
        num_frames_encoded: Frames that went through the graphs.
        num_frames_reused: Frames whose features were known from equal ones.
    """

    samples: tuple[Sample, ...]
    scores: Float32Array
    targets: NDArray[np.bool_]
    failed: tuple[FailedVideo, ...]
    labels: tuple[str, ...]
    metrics: Metrics
    runtime: RuntimeInfo
    views: Views
    method: ScoreMethod
    num_templates: int
    seconds: float
    num_frames_encoded: int = 0
    num_frames_reused: int = 0

    def summary(self) -> EvaluationRecord:
        """What there is to tell, without single videos and the confusion matrix."""
        return EvaluationRecord(
            **self.metrics.summary(),
            num_labels=len(self.labels),
            num_failed=len(self.failed),
            failed=tuple(
                UnreadVideo(video=str(each.video), error=str(each.error)) for each in self.failed
            ),
            runtime=self.runtime,
            views=str(self.views),
            scores=self.method,
            num_templates=self.num_templates,
            num_frames_encoded=self.num_frames_encoded,
            num_frames_reused=self.num_frames_reused,
            seconds=round(self.seconds, 3),
        )

    def record(self) -> EvaluationRecord:
        """Everything: also each label, the confusion matrix and each video."""
        confusion, best = self.metrics.confusion, self.scores.argmax(axis=1)
        videos = tuple(
            EvaluatedVideo(
                video=str(sample.path),
                labels=tuple(self.labels[label] for label in sample.label_ids),
                prediction=self.labels[first],
                score=float(scores[first]),
            )
            for sample, scores, first in zip(self.samples, self.scores, best, strict=True)
        )
        per_class = map(LabelAccuracy.model_validate, self.metrics.per_class(self.labels))
        more = {
            "per_class": tuple(per_class),
            "confusion": None if confusion is None else tuple(map(tuple, confusion.tolist())),
            "videos": videos,
        }
        return self.summary().model_copy(update=more)


def evaluate(
    recognizer: Recognizer,
    samples: Iterable[Sample],
    *,
    on_video: Callable[[Prediction | FailedVideo], None] | None = None,
) -> Evaluation:
    """Score annotated videos and measure the scores.

    Args:
        recognizer: A runtime with a label bank, whose labels are those of the samples.
        samples: The videos. Those without any label are scored, and left out of the metrics.
        on_video: Called after each video.

    Raises:
        LabelBankError: If the bank is a saved query, which ranks no labels.
        VideoError: If none of the videos gives frames.
        InferenceError: If the runtime fails.
    """
    if recognizer.bank.reads_query(recognizer.method):
        raise LabelBankError(
            f"The label bank {recognizer.bank.name!r} is a saved query, which says whether a video "
            "shows one label and ranks none; give another bank, or another method of scoring."
        )
    num_encoded = num_reused = 0
    features = recognizer.encoder.features()

    def outcomes() -> Iterator[tuple[Sample, Float32Array | FailedVideo]]:
        nonlocal num_encoded, num_reused
        for sample in samples:
            outcome = _predict(recognizer, sample, features)
            if on_video is not None:
                on_video(outcome)
            if isinstance(outcome, FailedVideo):
                yield sample, outcome
                continue
            num_encoded += outcome.num_frames_encoded or 0
            num_reused += outcome.num_frames_reused or 0
            yield sample, outcome.scores

    evaluation = measure_outcomes(
        outcomes(),
        recognizer.bank,
        runtime=recognizer.runtime.describe(),
        views=recognizer.views,
        method=recognizer.method,
    )
    return replace(evaluation, num_frames_encoded=num_encoded, num_frames_reused=num_reused)


def measure_outcomes(
    outcomes: Iterable[tuple[Sample, Float32Array | FailedVideo]],
    bank: LabelBank,
    *,
    runtime: RuntimeInfo,
    views: Views,
    method: ScoreMethod,
) -> Evaluation:
    """Measure what came out for annotated videos, wherever it was computed.

    Args:
        outcomes: Each video with its scores in the order of the bank, shape (C,), float32, or why
            there are none.
        bank: The labels.
        runtime: What computed them.
        views: Clips and crops per video.
        method: How scores were made.

    Raises:
        VideoError: If none of the videos gives frames.
    """
    started = time.perf_counter()
    labels = bank.labels
    scored: list[Sample] = []
    rows: list[Float32Array] = []
    failed: list[FailedVideo] = []
    for sample, outcome in outcomes:
        if isinstance(outcome, FailedVideo):
            failed.append(outcome)
        else:
            scored.append(sample)
            rows.append(outcome)
    if not rows:
        first = f" The first: {failed[0].error}" if failed else ""
        raise VideoError(
            f"None of the {len(failed)} videos gives frames; check the folder that the list "
            f"starts from.{first}"
        )
    targets = np.zeros((len(rows), len(labels)), dtype=np.bool_)
    for row, sample in enumerate(scored):
        targets[row, list(sample.label_ids)] = True
    scores = np.stack(rows)
    return Evaluation(
        samples=tuple(scored),
        scores=scores,
        targets=targets,
        failed=tuple(failed),
        labels=labels,
        metrics=measure(scores, targets),
        runtime=runtime,
        views=views,
        method=method,
        num_templates=len(bank.templates),
        seconds=time.perf_counter() - started,
    )


def _predict(
    recognizer: Recognizer, sample: Sample, features: FeatureCache | None
) -> Prediction | FailedVideo:
    try:
        with open_frames(sample, max_pixels=recognizer.max_pixels) as frames:
            return recognizer.predict_frames(frames, video=sample.path, features=features)
    except MemoryError:
        return FailedVideo(sample.path, VideoMemoryError.of(sample.path))
    except VideoError as exc:
        return FailedVideo(sample.path, exc)
