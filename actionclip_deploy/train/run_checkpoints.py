"""Checkpoints of a run: written whole or not at all, and checked before they are used.

    checkpoints/
      step-00000100/
        model.safetensors       weights
        mean.safetensors        the running mean of the weights, where there is one
        optimiser.safetensors   AdamW's state, under NUMBER_OF_PARAMETER.NAME
        state.json              step, configuration, optimiser's groups, random states
        manifest.json           sha256 and size of every other file; written last

Whatever moment a run is killed at, a folder under its final name is whole. No file holds anything
but tensors and JSON.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from actionclip_deploy.errors import CheckpointError, TrainingError
from actionclip_deploy.files import (
    remove_folder,
    sha256_of_file,
    staged_folder,
    why_altered,
)
from actionclip_deploy.train.run_config import parse_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actionclip_deploy.train.run_config import TrainConfig


SCHEMA_VERSION = 1

_JSON_FIELDS = ("step", "num_samples", "seconds", "loss", "replaced", "config", "random", "scaler")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.(new-)?step-\d{8,}[.-].+")


@dataclass(frozen=True, eq=False)
class RunState:
    """All that a run needs to continue as if it had not been stopped.

    Attributes:
        num_samples: Training samples there were. Which of them come next follows from the step
            and the configuration; the sampler has no other state.
        seconds: That the run has taken so far.
        loss: The last that was logged, or None.
        replaced: Samples that could not be read.
        mean: The running mean of the weights, or None.
        random: Random states by process.
        scaler: State of fp16's gradient scaler, or None.
    """

    step: int
    num_samples: int
    seconds: float
    loss: float | None
    replaced: list[int]
    config: dict[str, Any]
    model: dict[str, Tensor]
    mean: dict[str, Tensor] | None
    optimiser: dict[str, Any]
    random: list[dict[str, Any]]
    scaler: dict[str, Any] | None = None


def checkpoint_folder(output: Path) -> Path:
    """The folder of checkpoints in the folder of a run."""
    return output / "checkpoints"


def find_state(output: Path, resume: bool | Path, accelerator: Any) -> RunState | None:
    """Read the checkpoint to continue from; None to start.

    Raises:
        TrainingError: If the run is to start and there are checkpoints.
        CheckpointError: If the checkpoint is damaged or missing.
    """
    root = checkpoint_folder(output)
    if resume is False and list_states(root):
        raise TrainingError(
            f"{output} holds the checkpoints of a run; continue it with --resume, or choose "
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
    """Refuse to continue a run other than the one that a checkpoint is of."""
    differences = parse_config(state.config).differences(config)
    if differences:
        listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in differences.items())
        raise TrainingError(
            f"The run to continue had another configuration ({listed}); give the same one, or "
            "another run.output to start anew."
        )
    if (num_samples, num_processes) != (state.num_samples, len(state.random)):
        raise TrainingError(
            f"The run to continue had {state.num_samples} training videos and "
            f"{len(state.random)} processes, and now there are {num_samples} and "
            f"{num_processes}; give the same, or another run.output to start anew."
        )


def write_state(root: Path, state: RunState, *, keep_last: int) -> Path:
    """Write a checkpoint, and remove those that are too old to keep."""
    target = root / f"step-{state.step:08d}"
    # It is there already where the run went on from an older one.
    with staged_folder(target, durable=True) as folder:
        _write_files(folder, state)
        _write_manifest(folder)
    older = [path for path in list_states(root) if _step_of(path) <= state.step]
    for path in older[:-keep_last]:
        remove_folder(path)
    return target


def _write_files(folder: Path, state: RunState) -> None:
    groups, tensors = _split_optimiser(state.optimiser)
    _write_tensors(folder / "model.safetensors", state.model)
    if state.mean is not None:
        _write_tensors(folder / "mean.safetensors", state.mean)
    _write_tensors(folder / "optimiser.safetensors", tensors)
    content = {key: getattr(state, key) for key in _JSON_FIELDS}
    _write_json(folder / _STATE, {**content, "optimiser_groups": groups})


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: (sha256_of_file(path), path.stat().st_size) for path in sorted(folder.iterdir())
    }
    _write_json(folder / _MANIFEST, {"schema_version": SCHEMA_VERSION, "files": files})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: safetensors takes no tensor that shares memory with another, or has gaps.
    whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    safetensors.torch.save_file(whole, path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def remove_unfinished(root: Path) -> None:
    """Remove what a run that was killed has left of checkpoints half written or half removed."""
    if root.is_dir():
        for path in root.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)


def list_states(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def read_newest_state(root: Path) -> RunState | None:
    """Read the newest checkpoint of a folder; None if there is none."""
    found = list_states(root)
    return read_state(found[-1]) if found else None


def read_state(path: Path) -> RunState:
    """Read a checkpoint after comparing all of its files with their sha256.

    Raises:
        CheckpointError: If it is missing, damaged or of another version; the message names the
            last good one next to it.
    """
    try:
        check_state(path)
    except CheckpointError as exc:
        raise CheckpointError(f"{exc} {_advise(path)}") from exc
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    mean = path / "mean.safetensors"
    return RunState(
        **{key: state[key] for key in _JSON_FIELDS},
        model=safetensors.torch.load_file(path / "model.safetensors"),
        mean=safetensors.torch.load_file(mean) if mean.exists() else None,
        optimiser=_join_optimiser(
            state["optimiser_groups"], safetensors.torch.load_file(path / "optimiser.safetensors")
        ),
    )


def check_state(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: If one is missing or altered, or the checkpoint is of another version.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint of a run, each of which is a folder.")
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["schema_version"], dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a whole checkpoint: it has no {_MANIFEST}.") from None
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise CheckpointError(f"{path} is damaged: {_MANIFEST} cannot be read ({exc}).") from exc
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version!r} and this version of actionclip-deploy reads "
            f"{SCHEMA_VERSION}; continue with the version that wrote it."
        )
    for name, (sha256, size) in files.items():
        _check_file(path / name, sha256, size)


def _check_file(path: Path, sha256: str, size: int) -> None:
    why = why_altered(path, size_bytes=size, sha256=sha256)
    if why is not None:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} {why}.")


def _advise(path: Path) -> str:
    for other in reversed(list_states(path.parent)):
        if other == path:
            continue
        try:
            check_state(other)
        except CheckpointError:
            continue
        return f"The last good checkpoint is {other}; continue from it with --resume-from {other}"
    return f"There is no good one in {path.parent}; start a new run."


def _split_optimiser(state: Mapping[str, Any]) -> tuple[list[Any], dict[str, Tensor]]:
    tensors = {
        f"{number}.{name}": value
        for number, values in state["state"].items()
        for name, value in values.items()
    }
    return state["param_groups"], tensors


def _join_optimiser(groups: list[Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    for group in groups:
        group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": groups}


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
