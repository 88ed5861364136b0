from __future__ import annotations

import json
import random

import numpy as np
import torch

from actionclip_deploy.train.run_checkpoints import (
    capture_random_states,
    restore_random_states,
    seed_everything,
)


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        float(np.random.random()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_all_generators_go_on_from_where_they_were() -> None:
    seed_everything(3)
    draw()  # leaves half a pair of normal draws in Python's and NumPy's generators
    states = json.loads(json.dumps(capture_random_states()))
    wanted = [draw() for _ in range(3)]
    seed_everything(99)
    restore_random_states(states)
    assert [draw() for _ in range(3)] == wanted


def test_the_same_seed_gives_the_same_draws() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
