"""The device, the processes and the precision of a run, through accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator

from actionclip_deploy.errors import TrainingError

if TYPE_CHECKING:
    from actionclip_deploy.train.run_config import RunSection

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start_accelerator(section: RunSection) -> Any:
    """Join the processes of this run, of which there may be one, and find this one's device.

    Args:
        section: Precision and device.

    Returns:
        accelerate's `Accelerator`.

    Raises:
        TrainingError: If the precision cannot be had here, or the launcher asks for a way of
            sharing the model out that this loop does not support.
    """
    try:
        accelerator = Accelerator(
            cpu=section.device == "cpu", mixed_precision=_MIXED_PRECISION[section.precision]
        )
    except ValueError as exc:
        raise TrainingError(
            f"accelerate cannot run with run.precision {section.precision} and run.device "
            f"{section.device} here ({exc}); choose others, or start a new process."
        ) from exc
    if section.precision != "fp32" and not accelerator.native_amp:  # it would go on in fp32
        raise TrainingError(
            f"run.precision {section.precision} cannot be had on the device "
            f"{accelerator.device.type!r}; give bf16 or fp32."
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise TrainingError(
            f"accelerate was started with {kind}; this loop keeps the whole model in each "
            "process: launch it with --multi_gpu."
        )
    return accelerator


def leave_processes() -> None:
    """Part from the other processes, at the end of a program; no run can follow in it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
