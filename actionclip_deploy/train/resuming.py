"""Where a run goes on, and whether it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.train.config import parse_config
from actionclip_deploy.train.run_checkpoints import (
    RunState,
    list_states,
    read_newest_state,
    read_state,
    remove_unfinished,
)

if TYPE_CHECKING:
    from actionclip_deploy.train.config import TrainConfig


def checkpoint_folder(output: Path) -> Path:
    """The folder of checkpoints in the folder of a run."""
    return output / "checkpoints"


def find_state(output: Path, resume: bool | Path, accelerator: Any) -> RunState | None:
    """Read the checkpoint to go on from.

    Args:
        output: The folder of the run.
        resume: True for the newest checkpoint there, False to start, or a checkpoint.
        accelerator: accelerate's `Accelerator`.

    Returns:
        What it holds; None to start.

    Raises:
        TrainingError: If the run is to start and there are checkpoints.
        CheckpointError: If the checkpoint is damaged or missing.
    """
    root = checkpoint_folder(output)
    if resume is False and list_states(root):
        raise TrainingError(
            f"{output} holds the checkpoints of a run; go on with it by --resume, or choose "
            "another run.output."
        )
    if accelerator.is_main_process:
        remove_unfinished(root)
    accelerator.wait_for_everyone()
    if resume is True:
        return read_newest_state(root)
    return None if resume is False else read_state(resume)


def check_same_run(
    state: RunState, config: TrainConfig, num_samples: int, num_processes: int
) -> None:
    """Refuse to go on with another run than the one that a checkpoint is of.

    Args:
        state: The checkpoint.
        config: The configuration now.
        num_samples: Training samples now.
        num_processes: Processes now.

    Raises:
        TrainingError: If they differ in what decides about weights.
    """
    differences = parse_config(state.config).differences(config)
    if differences:
        listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in differences.items())
        raise TrainingError(
            f"The run to go on with had another configuration ({listed}); give the same one, or "
            "another run.output to start anew."
        )
    if (num_samples, num_processes) != (state.num_samples, len(state.random)):
        raise TrainingError(
            f"The run to go on with had {state.num_samples} training videos and "
            f"{len(state.random)} processes, and now there are {num_samples} and "
            f"{num_processes}; give the same, or another run.output to start anew."
        )
