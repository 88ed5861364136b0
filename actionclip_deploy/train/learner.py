"""What a step of training changes: the model, its optimiser and the mean of its weights.

Source:
    sallymmx/ActionCLIP@31c34df utils/solver.py and utils/lr_scheduler.py: one learning rate for
    each part of the model, and their schedule.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.labels import tokenise_prompts
from actionclip_deploy.tokenizer import NUM_TOKENS, Tokenizer, find_clip_merges
from actionclip_deploy.train.batches import Batch
from actionclip_deploy.train.loss import (
    classifier_loss,
    contrastive_loss,
    find_positives,
    gather_batch,
)
from actionclip_deploy.train.models import bound_scale, build_trained_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from actionclip_deploy.model import ModelConfig
    from actionclip_deploy.train.run_config import OptimiserSection, ScheduleSection, TrainConfig


# The parts, in the order of the optimiser's groups.
PARTS = ("textual", "visual", "prompt")
_BASE_LR = "base_lr"


class Learner:
    """A model with all that it takes to improve it.

    Attributes:
        tokens: Of all K * C prompts, template-major, shape (K * C, L).
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
        self.tokens = prompt_tokens(labels, templates, model.model.config).to(accelerator.device)
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


def prompt_tokens(labels: Sequence[str], templates: Sequence[str], config: ModelConfig) -> Tensor:
    """Tokens of every label in every template, template-major, int32, shape (K * C, L).

    Raises:
        LabelError: If a prompt is longer than the model's context.
        TrainingError: If the model's token table is too small.
    """
    tokenizer = Tokenizer.from_clip_merges(find_clip_merges())
    tokens = tokenise_prompts(tokenizer, labels, templates, context_length=config.context_length)
    if tokens.max() >= config.vocab_size:
        raise TrainingError(
            f"The model has {config.vocab_size} tokens, and CLIP's tokenizer gives numbers up to "
            f"{tokens.max()}; give model.sizes.vocab_size {NUM_TOKENS}."
        )
    return torch.from_numpy(tokens)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to.

    Returns:
        "visual" for the visual tower, "textual" for all else of CLIP, with the scale, and
        "prompt" for the visual prompt or a classifier.
    """
    if name.startswith("model.towers.visual."):
        return "visual"
    return "textual" if name.startswith("model.towers.") else "prompt"


def build_optimiser(model: nn.Module, section: OptimiserSection) -> torch.optim.AdamW:
    """Make the optimiser of all parameters that are trained.

    Every parameter decays, biases and norms as well, as in the original. A part without trained
    parameters has an empty group.
    """
    ratios = {"textual": 1.0, "visual": section.visual_ratio, "prompt": section.prompt_ratio}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [parameter for name, parameter in trained if part_of(name) == part],
            "lr": section.lr * ratios[part],
            _BASE_LR: section.lr * ratios[part],
            "part": part,
        }
        for part in PARTS
    ]
    return torch.optim.AdamW(
        groups,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a factor of its base: up from 0, and a cosine down to 0.

    Attributes:
        total: Length of the run, in whatever unit positions are given in.
    """

    total: float
    warmup: float

    @classmethod
    def in_steps(cls, section: ScheduleSection, steps_per_epoch: float) -> Schedule:
        """The schedule of a configuration, counted in optimiser steps."""
        unit = steps_per_epoch if section.unit == "epochs" else 1.0
        return cls(total=section.length * unit, warmup=section.warmup * unit)

    @property
    def num_steps(self) -> int:
        """Steps until the position has reached the end."""
        return math.ceil(round(self.total, 6))  # 3 epochs of 1/3 step are 1 step, not 2

    def factor(self, position: float) -> float:
        """The factor at a position from 0 to `total`; 0 after it."""
        if position < self.warmup:
            return position / self.warmup
        done = min((position - self.warmup) / (self.total - self.warmup), 1.0)
        return (1.0 + math.cos(math.pi * done)) / 2.0


def set_learning_rates(optimiser: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to its base learning rate times a factor; gives them by part."""
    for group in optimiser.param_groups:
        group["lr"] = group[_BASE_LR] * factor
    return {group["part"]: group["lr"] for group in optimiser.param_groups}


class MeanWeights:
    """A running mean of a model's parameters and buffers; it often scores better than the last.

    It begins with the model's weights, and keeps the share `decay` of itself at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._mean = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards the model's weights by one step."""
        for key, value in self._model.state_dict().items():
            if value.is_floating_point():
                self._mean[key].lerp_(value, 1.0 - self._decay)
            else:
                self._mean[key].copy_(value)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the mean into the model for the time of a block."""
        own = {key: value.clone() for key, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._mean)
        try:
            yield
        finally:
            self._model.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The mean by key, as the model names it."""
        return self._mean

    @torch.no_grad()
    def load_state_dict(self, mean: Mapping[str, Tensor]) -> None:
        """Take up a mean again."""
        for key, value in self._mean.items():
            value.copy_(mean[key])
