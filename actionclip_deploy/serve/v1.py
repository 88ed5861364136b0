"""What the service gives -> the JSON of /v1's answers (schemas.py)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from actionclip_deploy import __version__
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankVersion, OldVersion
from actionclip_deploy.serve.execution import ClipWork
from actionclip_deploy.serve.requests import (
    Budget,
    Classified,
    ClassifiedVideo,
    ClassifyOptions,
    EmbeddedVideo,
    RefusedVideo,
)
from actionclip_deploy.serve.service import Service


def classified(
    service: Service,
    request_id: str,
    given: Classified,
    options: ClassifyOptions,
    budget: Budget,
) -> dict[str, Any]:
    """The answer of /v1/classify."""
    results = [
        _refused(video) if isinstance(video, RefusedVideo) else _classified_video(video, options)
        for video in given.videos
    ]
    active = given.bank
    return {
        "request_id": request_id,
        "results": results,
        "bank": {
            "name": None if given.is_adhoc else active.name,
            "version": None if given.is_adhoc else active.version,
            "sha256": active.sha256,
            "num_labels": len(active.bank.labels),
            "num_templates": len(active.bank.templates),
        },
        "method": given.method,
        "runtime": asdict(service.runtime.describe()),
        "timings_ms": _total(budget),
    }


def embedded_videos(
    service: Service,
    request_id: str,
    videos: Sequence[EmbeddedVideo | RefusedVideo],
    budget: Budget,
) -> dict[str, Any]:
    """The answer of /v1/embed for videos."""
    results = [
        _refused(video)
        if isinstance(video, RefusedVideo)
        else {
            "name": video.name,
            "embeddings": video.embeddings.tolist(),
            "frames": _frames(video),
            "warnings": list(video.warnings),
            "timings_ms": _in_ms(video.stages),
        }
        for video in videos
    ]
    return {**_embed_answer(service, request_id, budget), "results": results}


def embedded_texts(
    service: Service, request_id: str, embeddings: Float32Array, budget: Budget
) -> dict[str, Any]:
    """The answer of /v1/embed for texts."""
    return {
        **_embed_answer(service, request_id, budget),
        "embeddings": embeddings.tolist(),
    }


def bank(service: Service, name: str, *, with_labels: bool = True) -> dict[str, Any]:
    """A label bank and its build.

    Raises:
        RequestRefusedError: If there is neither.
    """
    banks = service.banks
    build = banks.build_of(name)
    is_active = name in banks.names()
    if not is_active and build is None:
        raise refusals.unknown_bank(name, banks.names())
    active = banks.get(name) if is_active else None
    shown = active.bank if active is not None and with_labels else None
    return {
        "name": name,
        "active": None if active is None else _version(active),
        "labels": None if shown is None else list(shown.labels),
        "templates": None if shown is None else list(shown.templates),
        "calibration": None
        if active is None or active.bank.calibration is None
        else asdict(active.bank.calibration),
        "versions": [_old_version(each) for each in banks.history(name)] if is_active else [],
        "build": None
        if build is None
        else {
            "state": build.state,
            "done": build.done,
            "total": build.total,
            "error": build.error,
            "version": build.version,
        },
    }


def diff(name: str, old: int, new: int, found: LabelBankDiff) -> dict[str, Any]:
    """What changed from one version of a label bank to another."""
    return {"name": name, "old": old, "new": new, **asdict(found)}


def info(service: Service) -> dict[str, Any]:
    """What runs."""
    manifest, verification = service.manifest, service.verification
    settings, facts = service.settings, service.batch_facts
    manifest_bytes = (service.bundle.path / "manifest.json").read_bytes()
    return {
        "version": __version__,
        "state": service.state,
        "bundle": {
            "name": service.bundle.path.name,
            "sha256": hashlib.sha256(manifest_bytes).hexdigest(),
            "graphs": {
                name: {
                    "precision": graph.precision,
                    "sha256": manifest.files[graph.file].sha256,
                }
                for name, graph in manifest.graphs.items()
            },
        },
        "model": manifest.model.model_dump(mode="json"),
        "scores": manifest.scores.model_dump(mode="json"),
        "templates": list(manifest.templates),
        "runtime": asdict(service.runtime.describe()),
        "verification": None
        if verification is None
        else {
            "passed": verification.passed,
            "num_comparisons": len(verification.comparisons),
            "golden_origin": verification.origin,
        },
        "batching": {
            "max_batch": settings.max_batch,
            "max_delay_ms": settings.max_delay_ms,
            "queue": settings.queue,
            "best_batch": service.batcher.best_batch,
            "ms_per_clip": {} if facts is None else facts.ms_per_clip,
        },
        "workers": settings.workers,
        "banks": [
            {"name": name, **_version(service.banks.get(name))} for name in service.banks.names()
        ],
        "limits": asdict(service.limits),
    }


def _classified_video(video: ClassifiedVideo, options: ClassifyOptions) -> dict[str, Any]:
    embedded, ranking = video.embedded, video.ranking
    votes, answer = ranking.votes, ranking.answer
    result: dict[str, Any] = {
        "name": embedded.name,
        "predictions": [asdict(each) for each in ranking.predictions],
        "answer": None if answer is None else {**asdict(answer), "is_unknown": answer.is_unknown},
        "frames": _frames(embedded),
        "warnings": list(embedded.warnings),
        "batch_size": embedded.batch_size,
        "timings_ms": _in_ms(embedded.stages),
    }
    if votes is not None:
        result["templates"] = [asdict(vote) for vote in votes]
        result["template_agreement"] = sum(vote.agrees for vote in votes) / len(votes)
    if options.return_frames and embedded.work is not None:
        result["pixels"] = _pixels(embedded.work)
    return result


def _refused(video: RefusedVideo) -> dict[str, Any]:
    error = {"status": video.error.status, "code": video.error.code, "message": str(video.error)}
    return {"name": video.name, "error": error}


def _frames(video: EmbeddedVideo) -> dict[str, Any] | None:
    if video.indices is None:
        return None
    return {
        "num_clips": len(video.indices),
        "indices": video.indices.tolist(),
        "pts_seconds": None
        if video.pts_seconds is None
        else np.round(video.pts_seconds, 6).tolist(),
    }


def _pixels(work: ClipWork) -> dict[str, Any]:
    return {
        "shape": work.pixels.shape,
        "data": base64.b64encode(work.pixels.tobytes()).decode(),
        "views": work.views.tolist(),
    }


def _embed_answer(service: Service, request_id: str, budget: Budget) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "embedding_dim": service.manifest.model.embedding_dim,
        "runtime": asdict(service.runtime.describe()),
        "timings_ms": _total(budget),
    }


def _version(active: BankVersion) -> dict[str, Any]:
    return {
        "version": active.version,
        "sha256": active.sha256,
        "num_labels": len(active.bank.labels),
        "num_templates": len(active.bank.templates),
        "activated_seconds": round(active.activated_seconds, 3),
    }


def _old_version(old: OldVersion) -> dict[str, Any]:
    return {
        "version": old.version,
        "sha256": old.sha256,
        "num_labels": len(old.labels),
        "num_templates": len(old.templates),
        "activated_seconds": round(old.activated_seconds, 3),
    }


def _in_ms(stages: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1000, 3) for name, seconds in stages.items()}


def _total(budget: Budget) -> dict[str, float]:
    return _in_ms({"read": budget.read_seconds, "total": budget.total_seconds})
