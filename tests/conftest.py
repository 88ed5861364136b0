"""Fixtures shared by all tests, and the one place where skips are decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="full-size; run pytest --slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the checkout: videos, labels and the whole golden set."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    """Inputs and outputs of the original implementation (tests/data/README.md)."""
    with np.load(GOLDEN / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def preprocess_golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "preprocess.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def center_samples() -> dict[str, list[int]]:
    samples: dict[str, list[int]] = json.loads((GOLDEN / "sampler_center.json").read_text())
    return samples


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, np.ndarray]:
    """`model/KEY` and `head_NAME/KEY` arrays of the tiny golden model."""
    with np.load(GOLDEN / "weights.npz") as arrays:
        return dict(arrays)


def _original_checkpoint(weights: dict[str, np.ndarray], head: str) -> dict[str, Any]:
    import torch

    def part(prefix: str) -> dict[str, Any]:
        return {
            key.removeprefix(prefix): torch.from_numpy(value.copy())
            for key, value in weights.items()
            if key.startswith(prefix)
        }

    return {
        "epoch": 3,
        "model_state_dict": part("model/"),
        "fusion_model_state_dict": part(f"head_{head}/"),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }


@pytest.fixture(scope="session")
def tiny_checkpoints(
    golden_weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Paths of checkpoints in the original's format: Transf, LSTM, Conv_1D and meanP heads."""
    import torch

    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for head in ("Transf", "LSTM", "Conv_1D", "meanP"):
        paths[head] = folder / f"tiny_{head}_8f.pt"
        torch.save(_original_checkpoint(golden_weights, head), paths[head])
    return paths
