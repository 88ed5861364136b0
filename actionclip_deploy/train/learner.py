"""What a step changes: the model, its optimiser and the mean of its weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from actionclip_deploy.train.batches import Batch
from actionclip_deploy.train.loss import (
    classifier_loss,
    contrastive_loss,
    find_positives,
    gather_batch,
)
from actionclip_deploy.train.mean_weights import MeanWeights
from actionclip_deploy.train.models import bound_scale, build_trained_model
from actionclip_deploy.train.optimiser import build_optimiser, set_learning_rates
from actionclip_deploy.train.texts import tokenise_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from actionclip_deploy.train.config import TrainConfig


class Learner:
    """A model with all that it takes to improve it.

    Args:
        config: The configuration.
        labels: C labels.
        templates: K templates.
        accelerator: accelerate's `Accelerator`.

    Attributes:
        model: The model, on the device of this process.
        tokens: Of all K * C prompts, template-major, shape (K * C, L).

    Raises:
        TrainingError: If the configuration asks for a model that there is not.
        CheckpointError: If the checkpoint to start from cannot be used.
        LabelError: If a prompt is too long.
    """

    def __init__(
        self,
        config: TrainConfig,
        labels: Sequence[str],
        templates: Sequence[str],
        accelerator: Any,
    ) -> None:
        self._config = config
        self._accelerator = accelerator
        model = build_trained_model(
            config.model, config.loss, num_labels=len(labels), seed=config.run.seed
        )
        self.model = model.to(accelerator.device)
        self.tokens = tokenise_prompts(labels, templates, model.model.config).to(accelerator.device)
        decay = config.run.ema_decay
        self._mean = MeanWeights(self.model, decay) if decay is not None else None
        self._wrapped, self._optimiser = accelerator.prepare(
            self.model, build_optimiser(self.model, config.optimiser)
        )

    @property
    def scale(self) -> float:
        """Multiplier of the cosine."""
        return float(self.model.model.towers.logit_scale.detach().exp())

    def do_step(self, batches: Sequence[Batch], factor: float) -> tuple[Tensor, dict[str, float]]:
        """Do one optimiser step.

        Args:
            batches: This process's parts of the batches whose gradients are averaged.
            factor: Of every learning rate.

        Returns:
            The loss before the step, a scalar on the device, and the learning rates by part.
        """
        accelerator = self._accelerator
        rates = set_learning_rates(self._optimiser, factor)
        total = torch.zeros((), device=accelerator.device)
        self._wrapped.train()
        with self._attention():
            self._accumulate(batches, total)
        if self._config.run.clip_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), self._config.run.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad()
        bound_scale(self.model, self._config.loss.max_scale)
        if self._mean is not None:
            self._mean.update()
        return total, rates

    def _attention(self) -> AbstractContextManager[None]:
        if self._config.run.attention == "plain":
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _accumulate(self, batches: Sequence[Batch], total: Tensor) -> None:
        """Add up gradients, and the loss in `total`."""
        accelerator = self._accelerator
        for number, batch in enumerate(batches, start=1):
            # Parameter gradients cross between processes once per step, with the last batch.
            is_last = number == len(batches)
            with nullcontext() if is_last else accelerator.no_sync(self._wrapped):
                loss = self._loss(batch) / len(batches)
                accelerator.backward(loss)
            total += loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        device, section = self._accelerator.device, self._config.loss
        labels = batch.video_labels.to(device, non_blocking=True)
        tokens = self.tokens[batch.prompts.to(device, non_blocking=True)]
        output = self._wrapped(batch.frames.to(device, non_blocking=True), tokens)
        if isinstance(output, torch.Tensor):
            return classifier_loss(output, labels)
        videos, texts, scale = output
        videos, texts = gather_batch(torch.cat((videos, texts), dim=1)).chunk(2, dim=1)
        both = torch.cat((labels, batch.text_labels.to(device)), dim=1).to(torch.uint8)
        video_labels, text_labels = gather_batch(both).chunk(2, dim=1)
        return contrastive_loss(
            videos,
            texts,
            scale,
            find_positives(video_labels, text_labels),
            kind=section.kind,
            target_scale=section.target_scale,
        )

    def result_weights(self) -> AbstractContextManager[None]:
        """For the time of a block, put the weights into the model that are to be given out."""
        return self._mean.in_model() if self._mean is not None else nullcontext()

    def state(self) -> dict[str, Any]:
        """Its part of a `RunState`."""
        scaler = self._accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "mean": self._mean.state_dict() if self._mean is not None else None,
            "optimiser": self._optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(
        self,
        *,
        model: dict[str, Tensor],
        mean: dict[str, Tensor] | None,
        optimiser: dict[str, Any],
        scaler: dict[str, Any] | None,
    ) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(model)
        self._optimiser.load_state_dict(optimiser)
        if self._mean is not None and mean is not None:
            self._mean.load_state_dict(mean)
        if self._accelerator.scaler is not None and scaler is not None:
            self._accelerator.scaler.load_state_dict(scaler)
