"""A running mean of weights, which often scores better than the weights of the last step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


class MeanWeights:
    """An exponential running mean of a model's parameters and buffers.

    Args:
        model: The model; the mean begins with its weights.
        decay: Share of the mean that stays at each step.
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
