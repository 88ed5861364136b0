"""What a run tells while it goes on: reports of its steps, and TensorBoard's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: Steps that are done.
        total_steps: Steps of the whole run.
        epoch: Passes over the training videos, with a fraction.
        loss: Mean over the steps since the last that had one; None where nothing is logged.
        scale: Multiplier of the cosine, where there is a loss.
        clips_per_second: Over the same steps, in all processes together.
        validation: What a validation after this step has measured, as `Metrics.summary` has it,
            or None.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None = None
    scale: float | None = None
    clips_per_second: float | None = None
    validation: Mapping[str, Any] | None = None


OnStep: TypeAlias = Callable[[StepReport], None]


class Journal:
    """Passes reports on and writes their numbers to TensorBoard; a context manager.

    Args:
        folder: For TensorBoard's files; None for a process that writes none.
        steps_done: Steps before this start; what TensorBoard has of later ones is hidden.
        on_step: Called with each report.
    """

    def __init__(self, folder: Path | None, steps_done: int, on_step: OnStep | None) -> None:
        self._writer: Any = None
        if folder is not None:
            self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1)
        self._on_step = on_step

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, report: StepReport, learning_rates: Mapping[str, float]) -> None:
        """Take a report, and the learning rates of the step by part."""
        if self._writer is not None:
            for name, value in _numbers(report, learning_rates).items():
                self._writer.add_scalar(name, value, report.step)
        if self._on_step is not None:
            self._on_step(report)


def _numbers(report: StepReport, learning_rates: Mapping[str, float]) -> dict[str, float]:
    numbers = {
        f"validation/{key}": float(value)
        for key, value in (report.validation or {}).items()
        if isinstance(value, int | float)
    }
    if report.loss is None:
        return numbers
    rates = {f"learning_rate/{part}": rate for part, rate in learning_rates.items()}
    measured = {
        "loss": report.loss,
        "scale": report.scale,
        "clips_per_second": report.clips_per_second,
    }
    return numbers | rates | {key: value for key, value in measured.items() if value is not None}
