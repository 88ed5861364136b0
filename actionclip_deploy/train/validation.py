"""Scores of validation videos while a model is still the one being trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from actionclip_deploy.scoring import score_clips
from actionclip_deploy.train.batches import Batch, load_batches
from actionclip_deploy.train.samples import ClipDataset, SampleKey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from actionclip_deploy.train.models import TrainedModel

_PROMPTS_PER_CALL = 256


@torch.no_grad()
def score_samples(
    model: TrainedModel,
    clips: ClipDataset,
    tokens: Tensor,
    accelerator: Any,
    *,
    num_labels: int,
    batch_size: int,
    workers: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Score every sample against every label, the samples shared out among the processes.

    Args:
        model: The model; it is left in training mode if it was.
        clips: N samples; one that is given in the place of another counts once.
        tokens: Of the K * C prompts, template-major, shape (K * C, L).
        accelerator: accelerate's `Accelerator`.
        num_labels: C.
        batch_size: Clips of one call.
        workers: Processes that load.

    Returns:
        Scores (N, C), as the package scores everywhere or by the classifier, and which labels
        each sample has (N, C); both in the order of the samples, the same in all processes.
    """
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            texts = None if model.classifier else _embed_prompts(model, tokens, num_labels)
            own = range(accelerator.process_index, len(clips), accelerator.num_processes)
            rows = []
            for batch in _load(clips, own, num_labels, batch_size, workers):
                scores = _score(model, batch.frames.to(accelerator.device), texts)
                kept = (batch.asked == batch.given).numpy()
                rows.append(
                    (batch.given.numpy()[kept], scores[kept], batch.video_labels.numpy()[kept])
                )
    finally:
        model.train(was_training)
    everyones = gather_object(rows)
    indices, scores, labels = (np.concatenate(column) for column in zip(*everyones, strict=True))
    order = np.argsort(indices)
    return scores[order], labels[order]


def _load(
    clips: ClipDataset, own: range, num_labels: int, batch_size: int, workers: int
) -> Iterable[Batch]:
    keys = [
        [SampleKey(index, 0) for index in own[start : start + batch_size]]
        for start in range(0, len(own), batch_size)
    ]
    return load_batches(clips, keys, num_templates=1, num_labels=num_labels, workers=workers)


def _embed_prompts(model: TrainedModel, tokens: Tensor, num_labels: int) -> NDArray[np.float32]:
    parts = [model.embed_texts(part) for part in torch.split(tokens, _PROMPTS_PER_CALL)]
    embeddings = torch.cat(parts)
    return embeddings.reshape(-1, num_labels, embeddings.shape[1]).cpu().numpy()


def _score(
    model: TrainedModel, frames: Tensor, texts: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    if texts is None:
        scores: NDArray[np.float32] = model.classify(frames).float().softmax(1).cpu().numpy()
        return scores
    return score_clips(model.embed_clips(frames).cpu().numpy(), texts)
