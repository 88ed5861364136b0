"""Checkpoints of a run, and the states of random numbers in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.train.run_checkpoints import (
    RunState,
    capture_random_states,
    list_states,
    read_newest_state,
    read_state,
    remove_unfinished,
    restore_random_states,
    seed_everything,
    write_state,
)


def state_at(step: int, **changes: Any) -> RunState:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 2, generator=generator)
    adam = {"step": torch.tensor(float(step)), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
    group = {"lr": 0.1 + 1e-17, "betas": (0.9, 0.98), "params": [0], "part": "textual"}
    content: dict[str, Any] = {
        "step": step,
        "num_samples": 10,
        "seconds": 1.5,
        "loss": 0.25,
        "replaced": [4],
        "config": {"run": {"seed": 1}},
        "model": {"weight": weight, "transposed": weight.T},
        "mean": {"weight": weight / 2},
        "optimiser": {"state": {0: adam}, "param_groups": [group]},
        "random": [{"python": [1, 2]}],
    }
    return RunState(**{**content, **changes})


def write_some(root: Path, *steps: int) -> list[Path]:
    return [write_state(root, state_at(step), keep_last=10) for step in steps]


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    state = state_at(100)
    path = write_state(tmp_path, state, keep_last=2)
    found = read_state(path)
    assert path.name == "step-00000100"
    assert (found.step, found.num_samples, found.seconds, found.loss) == (100, 10, 1.5, 0.25)
    assert (found.replaced, found.config, found.random) == ([4], {"run": {"seed": 1}}, state.random)
    assert all(torch.equal(found.model[key], state.model[key]) for key in state.model)
    assert found.mean is not None
    assert state.mean is not None
    assert torch.equal(found.mean["weight"], state.mean["weight"])
    assert found.optimiser["param_groups"] == state.optimiser["param_groups"]
    for name, value in state.optimiser["state"][0].items():
        assert torch.equal(found.optimiser["state"][0][name], value)


def test_without_a_mean_there_is_none(tmp_path: Path) -> None:
    assert read_state(write_state(tmp_path, state_at(1, mean=None), keep_last=1)).mean is None


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    state = state_at(1, model={"one": weight, "other": weight})
    assert len(read_state(write_state(tmp_path, state, keep_last=1)).model) == 2


def test_no_file_holds_pickled_objects(tmp_path: Path) -> None:
    (path,) = write_some(tmp_path, 1)
    names = sorted(file.name for file in path.iterdir())
    assert names == [
        "manifest.json",
        "mean.safetensors",
        "model.safetensors",
        "optimiser.safetensors",
        "state.json",
    ]
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            safetensors.torch.load_file(file)


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_state(tmp_path, state_at(step), keep_last=2)
    assert [p.name for p in list_states(tmp_path)] == ["step-00000003", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_goes_on_from_an_older_one_keeps_what_it_went_on_from(tmp_path: Path) -> None:
    write_some(tmp_path, 100, 200, 300)
    write_state(tmp_path, state_at(150), keep_last=2)
    assert [p.name[-3:] for p in list_states(tmp_path)] == ["100", "150", "200", "300"]
    write_state(tmp_path, state_at(200, seconds=9.0), keep_last=2)
    assert [p.name[-3:] for p in list_states(tmp_path)] == ["150", "200", "300"]
    assert read_state(tmp_path / "step-00000200").seconds == 9.0


def test_the_newest_is_read(tmp_path: Path) -> None:
    assert read_newest_state(tmp_path / "nothing") is None
    assert read_newest_state(tmp_path) is None
    write_some(tmp_path, 9, 10)
    newest = read_newest_state(tmp_path)
    assert newest is not None
    assert newest.step == 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "mean.safetensors", "optimiser.safetensors", "state.json"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"is damaged: {name} has \d+ bytes instead of \d+\."),
        (alter, r"is damaged: {name} does not have the sha256"),
        (Path.unlink, r"is damaged: {name} is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_name_of_the_last_good_one(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    paths = write_some(tmp_path, 1, 2, 3)
    damage(paths[2] / name)
    whole = (
        message.format(name=name) + f".*last good checkpoint is {paths[1]}; continue from it with"
    )
    with pytest.raises(CheckpointError, match=whole):
        read_newest_state(tmp_path)
    assert read_state(paths[1]).step == 2


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    paths = write_some(tmp_path, 1, 2)
    damage(paths[1] / "manifest.json")
    with pytest.raises(
        CheckpointError, match=f"manifest.json.* last good checkpoint is {paths[0]}"
    ):
        read_newest_state(tmp_path)


def test_the_last_good_one_may_be_further_back(tmp_path: Path) -> None:
    paths = write_some(tmp_path, 1, 2, 3)
    cut(paths[1] / "state.json")
    cut(paths[2] / "state.json")
    with pytest.raises(CheckpointError, match=f"last good checkpoint is {paths[0]}"):
        read_newest_state(tmp_path)


def test_where_none_is_good_the_message_says_so(tmp_path: Path) -> None:
    (path,) = write_some(tmp_path, 1)
    cut(path / "state.json")
    with pytest.raises(CheckpointError, match=r"no good one in .*; start a new run"):
        read_newest_state(tmp_path)


def test_a_file_is_no_checkpoint_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match=r"model.pt is no checkpoint of a run, each of which"):
        read_state(tmp_path / "model.pt")


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    (path,) = write_some(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=f"not a whole checkpoint.* good checkpoint is {path}"
    ):
        read_state(tmp_path / "step-00000007")


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    (path,) = write_some(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2}))
    with pytest.raises(CheckpointError, match=r"schema version 2 and this version .* reads 1"):
        read_state(path)


def test_what_a_killed_run_leaves_half_done_is_removed(tmp_path: Path) -> None:
    write_some(tmp_path, 1)
    left = (".step-00000002-x1y2z3", ".new-step-00000000-12-ab", ".step-00000003.partial")
    for name in left:  # the last one by an earlier version
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in list_states(tmp_path)] == ["step-00000001"]
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    remove_unfinished(tmp_path / "nothing")


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
