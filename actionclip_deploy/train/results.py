"""What a run leaves behind: the model in the original's format, and what it measured.

model.pt                 as `actionclip export` reads it
classifier.safetensors   of the unimodal baseline: the weight and bias over the labels
metrics.json             loss, accuracy, time, versions, configuration
config.yaml              the configuration with all defaults
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import open_clip
import safetensors.torch
import torch
import yaml

from actionclip_deploy import __version__
from actionclip_deploy.model import save_original_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actionclip_deploy.train.config import TrainConfig
    from actionclip_deploy.train.models import TrainedModel


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Where a run's results are.

    Attributes:
        checkpoint: The model in the original's format.
        metrics_path: The file of the metrics.
        metrics: What is in it.
        is_main: Whether this is the process that speaks for all.
    """

    checkpoint: Path
    metrics_path: Path
    metrics: dict[str, Any]
    is_main: bool


def result_paths(output: Path) -> tuple[Path, Path]:
    """Paths of the model and of the metrics in the folder of a run."""
    return output / "model.pt", output / "metrics.json"


def write_config(config: TrainConfig) -> None:
    """Write the configuration with all defaults into the folder of its run."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    _write_text(config.run.output / "config.yaml", text)


def write_results(
    output: Path, model: TrainedModel, labels: Sequence[str], metrics: dict[str, Any]
) -> None:
    """Write the model, its classifier if it has one, and the metrics.

    Args:
        output: The folder of the run.
        model: With the weights that are to be given out.
        labels: C labels, in the order of the classifier.
        metrics: As JSON.
    """
    checkpoint, metrics_path = result_paths(output)
    save_original_checkpoint(model.model, checkpoint, epoch=int(metrics["epochs"]))
    if model.classifier is not None:
        tensors = {key: value.cpu() for key, value in model.classifier.state_dict().items()}
        safetensors.torch.save_file(
            tensors, output / "classifier.safetensors", {"labels": json.dumps(list(labels))}
        )
    _write_text(metrics_path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of what decides about the numbers of a run."""
    return {
        "actionclip_deploy": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
        "accelerate": accelerate.__version__,
    }


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
