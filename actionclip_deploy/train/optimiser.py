"""AdamW with one learning rate for each part of the model, and their schedule.

Source:
    sallymmx/ActionCLIP@31c34df utils/solver.py and utils/lr_scheduler.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from actionclip_deploy.train.run_config import OptimiserSection, ScheduleSection

# The parts, in the order of the optimiser's groups.
PARTS = ("textual", "visual", "prompt")

_BASE_LR = "base_lr"


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to.

    Args:
        name: Of a parameter of `TrainedModel`.

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

    Args:
        model: A `TrainedModel`.
        section: Learning rates and decay.
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
        warmup: Length of the linear part.
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
        """The factor at a position from 0 to `total`; 0 behind it."""
        if position < self.warmup:
            return position / self.warmup
        done = min((position - self.warmup) / (self.total - self.warmup), 1.0)
        return (1.0 + math.cos(math.pi * done)) / 2.0


def set_learning_rates(optimiser: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to its base learning rate times a factor; gives them by part."""
    for group in optimiser.param_groups:
        group["lr"] = group[_BASE_LR] * factor
    return {group["part"]: group["lr"] for group in optimiser.param_groups}
