"""The states of all generators of random numbers, as plain numbers that JSON can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def capture_random_states() -> dict[str, Any]:
    """Take down the states of this process."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
        "numpy": {
            "keys": np.asarray(keys).tolist(),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in devices],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on from states that `capture_random_states` gave.

    States of more CUDA devices than there are here are left out.
    """
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["numbers"]), python["gauss"]))
    np.random.set_state(
        (
            "MT19937",
            np.array(numpy["keys"], np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(_to_state(states["torch"]))
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_to_state(state), device)


def _to_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _to_state(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
