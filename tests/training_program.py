"""A small training for a process of its own: to be killed, or to be one of several.

Its arguments are OUTPUT [--die-at PLACE] [KEY=VALUE ...]. A line is printed after each step.
`--die-at` names a function of the checkpoints' writing and how many calls of it are let through,
such as `_write_manifest:1`; at the next the process kills itself. As one of several processes it
then computes the loss and the gradients of one batch with its part of it, and writes them to
OUTPUT/gradients.npz.
"""

from __future__ import annotations

import os
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from training_fakes import colour_data, gradients, toy_config

from actionclip_deploy.train import run_checkpoints
from actionclip_deploy.train.loop import leave_processes, train


def die_at(place: str) -> None:
    """Make the process kill itself in the middle of writing a checkpoint."""
    name, _, calls = place.partition(":")
    original, left = getattr(run_checkpoints, name), int(calls)

    def deadly(*args: Any) -> Any:
        nonlocal left
        if left == 0:
            if name == "_write_tensors":  # half a file
                Path(args[0]).write_bytes(b"\0" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return original(*args)

    setattr(run_checkpoints, name, deadly)


def main(output: str, *options: str) -> None:
    torch.set_num_threads(1)
    if options[0] == "--die-at":
        die_at(options[1])
    config = toy_config(output, *(option for option in options if "=" in option))
    train(
        config,
        colour_data(),
        on_step=lambda report: print(report.step, report.loss, flush=True),
    )
    if dist.is_initialized():
        found = gradients(process=dist.get_rank(), num_processes=dist.get_world_size())
        if dist.get_rank() == 0:
            np.savez(Path(output) / "gradients.npz", **found)
    leave_processes()


def run(writer: Connection, environment: dict[str, str], output: str, *options: str) -> None:
    """Be a process of that environment, which prints to `writer` and complains to OUTPUT.err."""
    os.environ.update(environment)
    os.dup2(writer.fileno(), 1)
    with Path(f"{output}.err").open("a") as errors:
        os.dup2(errors.fileno(), 2)
    warnings.simplefilter("error")
    main(output, *options)
