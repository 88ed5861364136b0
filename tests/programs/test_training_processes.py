"""Training in processes of its own: killed at any moment, and shared by two."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from training_fakes import colour_data, gradients, toy_config
from training_program import run

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.train.loop import train
from actionclip_deploy.train.run_checkpoints import list_states

ROOT = Path(__file__).resolve().parents[2]
# Everything that has a state: dropout, the mean of the weights, accumulation over an odd epoch.
CONFIG = (
    "model.visual_prompt=transf_cls",
    "run.ema_decay=0.9",
    "run.accumulation=2",
    "run.checkpoint_every=3",
    "run.keep_last=2",
    "schedule.length=20",
)
RELATIVE = 1e-6


# They come from one process that has imported torch, which takes longer than what they do.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["actionclip_deploy.train.loop"])


def start(*arguments: str, **environment: str) -> tuple[Any, TextIO]:
    """A process that runs `training_program`, and what it prints."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run, args=(writer, environment, *arguments))
    with reader, writer:
        process.start()
        return process, os.fdopen(os.dup(reader.fileno()))


def start_pair(*arguments: str) -> list[tuple[Any, TextIO]]:
    """Start two processes as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [start(*arguments, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]


def digests(output: Path) -> dict[str, str]:
    """Of all weights and all of the optimiser's state in the last checkpoint of a run."""
    last = list_states(output / "checkpoints")[-1]
    assert last.name == "step-00000020"
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in last.glob("*.safetensors")}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads decides how sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole")
    train(toy_config(output, *CONFIG), colour_data())
    return digests(output)


def test_a_run_killed_at_a_random_step_ends_with_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    last = random.randint(1, 18)
    process, lines = start(str(tmp_path), *CONFIG)
    with lines:
        for line in lines:
            if int(line.split()[0]) == last:
                process.kill()
                break
    process.join()
    assert process.exitcode == -signal.SIGKILL, last
    train(toy_config(tmp_path, *CONFIG), colour_data(), resume=True)
    assert digests(tmp_path) == uninterrupted, last


@pytest.mark.parametrize(
    ("place", "newest"),
    [
        ("_write_tensors:4", 3),  # in the middle of the second checkpoint's mean
        ("_write_manifest:2", 6),  # all of the third but its manifest
        ("remove_folder:1", 12),  # the fourth is there, and the second still as well
    ],
)
def test_a_run_killed_while_it_writes_a_checkpoint_ends_with_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, str], place: str, newest: int
) -> None:
    process, lines = start(str(tmp_path), "--die-at", place, *CONFIG)
    with lines:
        process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert list_states(tmp_path / "checkpoints")[-1].name == f"step-{newest:08d}"
    train(toy_config(tmp_path, *CONFIG), colour_data(), resume=True)
    assert digests(tmp_path) == uninterrupted
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000018", "step-00000020"]


# A large eps makes a step nearly linear in the gradient, so that weights differ by as little as
# gradients do; with the usual one, noise in a gradient that should be 0 becomes a whole step.
PAIR = ("run.log_every=1", "optimiser.eps=1", "optimiser.lr=0.1", "run.accumulation=2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What two processes with half of each batch have written, and what the first printed."""
    output = tmp_path_factory.mktemp("pair")
    printed = []
    for process, lines in start_pair(str(output), *PAIR):
        with lines:
            printed.append(lines.read().splitlines())
        process.join(300)
        assert process.exitcode == 0, output.with_name(f"{output.name}.err").read_text()
    assert printed[1] == []  # only the main process speaks
    return output, printed[0]


def test_two_processes_have_the_loss_and_gradients_of_one(pair: tuple[Path, list[str]]) -> None:
    wanted = gradients(process=0, num_processes=1)
    with np.load(pair[0] / "gradients.npz") as found:
        assert set(found) == set(wanted)
        assert {"loss", "scale", "video.weight", "text.bias"} <= set(found)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=RELATIVE, err_msg=name)


def test_two_processes_train_as_one_does(pair: tuple[Path, list[str]], tmp_path: Path) -> None:
    losses: list[float | None] = []
    config = toy_config(tmp_path, *PAIR)
    result = train(config, colour_data(), on_step=lambda report: losses.append(report.loss))
    assert len(losses) == 10
    np.testing.assert_allclose([float(line.split()[1]) for line in pair[1]], losses, rtol=RELATIVE)
    one, two = (
        torch.load(path, weights_only=True) for path in (result.checkpoint, pair[0] / "model.pt")
    )
    for part in ("model_state_dict", "fusion_model_state_dict"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-6)


def test_a_checkpoint_of_two_processes_is_not_resumed_by_one(
    pair: tuple[Path, list[str]],
) -> None:
    with pytest.raises(TrainingError, match=r"24 training videos and 2 processes, and now .* 1; g"):
        train(toy_config(pair[0], *PAIR), colour_data(), resume=True)


def test_the_program_for_accelerate_takes_the_arguments_of_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(ROOT / "train" / "finetune.py")
    config = tmp_path / "config.yaml"
    config.write_text("run: {output: out}\n")
    monkeypatch.setattr(sys, "argv", [program, str(config), "run.speed=3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(program, run_name="__main__")
    assert stopped.value.code == 1
    assert "'model' is missing" in capsys.readouterr().err
