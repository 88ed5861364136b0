"""A small training run: clips of one colour, a model of two blocks, seconds on one core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actionclip_deploy.train.data import ClipSample, SampleKey, TrainingData
from actionclip_deploy.train.loss import contrastive_loss, find_positives, gather_batch
from actionclip_deploy.train.run_config import TrainConfig, parse_config

LABELS = ("red", "green", "blue", "white")
TEMPLATES = ("{}", "a video of {}", "{}, an action")
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 220]], np.float64)
NUM_FRAMES, SIZE = 4, 32
BATCH, WIDTH = 8, 6

SIZES: dict[str, Any] = {
    "embed_dim": 32,
    "input_size": SIZE,
    "patch_size": 16,
    "vision_layers": 1,
    "vision_width": 32,
    "text_layers": 1,
    "text_width": 32,
}


class ColourClips:
    """Clips in the colour of their label, with noise that the key's seed decides.

    Args:
        num_samples: How many; labels take turns.
        unreadable: Indices in whose place the next sample is given.
        second_label: Whether every other sample has the next label as well.
    """

    def __init__(
        self, num_samples: int, *, unreadable: Sequence[int] = (), second_label: bool = False
    ) -> None:
        self._num_samples = num_samples
        self._unreadable = frozenset(unreadable)
        self._second_label = second_label

    def __len__(self) -> int:
        return self._num_samples

    def typical_seconds(self) -> float:
        return 2.5

    def __getitem__(self, key: SampleKey) -> ClipSample:
        index = key.index
        while index in self._unreadable:
            index = (index + 1) % self._num_samples
        label = index % len(LABELS)
        noise = np.random.default_rng(key.seed).normal(0, 20, (NUM_FRAMES, 3, SIZE, SIZE))
        frames = np.clip(COLOURS[label][:, None, None] + noise, 0, 255).astype(np.uint8)
        more = ((label + 1) % len(LABELS),) if self._second_label and index % 2 else ()
        return ClipSample(torch.from_numpy(frames), (label, *more), index)


def colour_data(num_samples: int = 24, **choices: Any) -> TrainingData:
    return TrainingData(
        training=ColourClips(num_samples, **choices),
        validation=ColourClips(8),
        labels=LABELS,
        templates=TEMPLATES,
    )


def toy_config(output: Path | str, *overrides: str) -> TrainConfig:
    """Ten steps of eight clips; `overrides` such as "run.seed=3"."""
    data = {
        "model": {"sizes": SIZES, "num_frames": NUM_FRAMES, "prompt_layers": 1},
        "data": {"annotations": "unused", "labels": "unused", "workers": 0},
        "optimiser": {"lr": 1e-3, "prompt_ratio": 2.0},
        "schedule": {"unit": "steps", "length": 10, "warmup": 2},
        "run": {"output": str(output), "batch_size": 8, "device": "cpu", "log_every": 5},
    }
    return parse_config(data, overrides)


class Towers(nn.Module):
    """Two linear encoders and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.text = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, videos: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embeddings = (self.video(videos), self.text(texts))
        return (*(nn.functional.normalize(e, dim=-1) for e in embeddings), self.scale.exp())


def gradients(*, process: int, num_processes: int) -> dict[str, np.ndarray]:
    """Loss and gradients of one batch of which this process has its part."""
    torch.manual_seed(0)
    towers: nn.Module = Towers()
    inputs = torch.randn(2, BATCH, WIDTH, dtype=torch.float64)
    labels = nn.functional.one_hot(torch.randint(3, (BATCH,)), 3).bool()
    size = BATCH // num_processes
    own = slice(process * size, (process + 1) * size)
    if num_processes > 1:
        towers = nn.parallel.DistributedDataParallel(towers)
    videos, texts, scale = towers(*inputs[:, own])
    videos, texts = gather_batch(torch.cat((videos, texts), dim=1)).chunk(2, dim=1)
    gathered = gather_batch(labels[own].to(torch.uint8))
    loss = contrastive_loss(videos, texts, scale, find_positives(gathered, gathered))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {
        name.removeprefix("module."): parameter.grad.numpy()
        for name, parameter in towers.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach().numpy(), **found}
