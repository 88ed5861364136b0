"""Contrastive losses over a batch of videos and their texts, over all processes.

Letters: B clips of the whole batch, D channels, C labels. Row i of the logits compares video i
with all texts; a column compares a text with all videos. The loss is the mean of both ways.

Source:
    arXiv 2109.08472, section 3.2; sallymmx/ActionCLIP@31c34df utils/KLLoss.py, utils/tools.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from actionclip_deploy.train.run_config import LossKind

ORIGINAL_TARGET_SCALE = 10.0


def find_positives(video_labels: Tensor, text_labels: Tensor) -> Tensor:
    """Tell which texts fit which videos: those that name a label that the video has.

    Labels of videos and of texts are bool, (B, C); the result is videos by texts, bool, (B, B),
    symmetric where each video has one label.
    """
    # In a product of integers no positive gets lost to rounding; CUDA multiplies floats only.
    shared = video_labels.to(torch.float32) @ text_labels.to(torch.float32).T
    return shared > 0


def softmax_targets(positives: Tensor, *, target_scale: float = ORIGINAL_TARGET_SCALE) -> Tensor:
    """Targets of the original's code: the softmax over a row of 10 for a positive, else 0.

    Rows of (B, B) sum to 1. No target is 0: with one positive among 128 it has 0.994 and each of
    the others the 127th part of the rest.
    """
    return torch.softmax(positives.to(torch.float32) * target_scale, dim=1)


def normalised_targets(positives: Tensor) -> Tensor:
    """Targets of the paper: each of a row's P positives has 1 / P, any other 0.

    Positives (B, B) are bool with at least one in each row, and the rows of the targets sum to 1.
    """
    ones = positives.to(torch.float32)
    return ones / ones.sum(dim=1, keepdim=True)


def diagonal_targets(positives: Tensor) -> Tensor:
    """Targets that know of no other positive than a sample's own text: the identity, (B, B)."""
    return torch.eye(positives.shape[0], device=positives.device)


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL divergence of the softmax of logits (B, B) from targets (B, B), summed, over B.

    Where a row of targets has a single 1 it is the cross-entropy.
    """
    return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="batchmean")


def contrastive_loss(
    video_embeddings: Tensor,
    text_embeddings: Tensor,
    scale: Tensor,
    positives: Tensor,
    *,
    kind: LossKind = "kl-softmax",
    target_scale: float = ORIGINAL_TARGET_SCALE,
) -> Tensor:
    """Compare every video of a batch with every text, both ways; the mean of the two, a scalar.

    Args:
        video_embeddings: Unit norm, shape (B, D).
        text_embeddings: Unit norm, shape (B, D); text i was made for video i.
        positives: Which texts fit which videos, bool, shape (B, B).
        kind: The targets; "cross-entropy-diagonal" looks at the shape of `positives` alone.
    """
    logits = scale * video_embeddings @ text_embeddings.T
    forth = kl_divergence(logits, _targets(positives, kind, target_scale))
    back = kl_divergence(logits.T, _targets(positives.T, kind, target_scale))
    return (forth + back) / 2


def _targets(positives: Tensor, kind: str, target_scale: float) -> Tensor:
    match kind:
        case "kl-softmax":
            return softmax_targets(positives, target_scale=target_scale)
        case "kl-normalised":
            return normalised_targets(positives)
        case "cross-entropy-diagonal":
            return diagonal_targets(positives)
    raise ValueError(
        f"the kind of loss is {kind!r}; it has to be 'kl-softmax', 'kl-normalised' or "
        "'cross-entropy-diagonal'"
    )


def classifier_loss(logits: Tensor, video_labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C), where each of a video's P labels has 1 / P."""
    return F.cross_entropy(logits, normalised_targets(video_labels))


def gather_batch(tensor: Tensor) -> Tensor:
    """Join the parts of a batch that the processes have, by process, with their gradients.

    Each process then computes the loss of the whole batch. Going back, the gradients of a part
    are summed over the processes: W equal ones, where W processes compute the same loss. The mean
    over processes that DistributedDataParallel takes of parameter gradients removes this factor,
    and does the same for a parameter that enters after the gathering, such as the scale, of
    which each process has the whole gradient. What comes out is the gradient of one process
    with the whole batch, neither less nor W times it.

    Args:
        tensor: This process's part, shape (B / W, ...), of the same shape in all processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        # A sum and a slice, for gloo has no reduce-scatter; the tensors are small.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
