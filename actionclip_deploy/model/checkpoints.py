"""Checkpoints in, models out; and models out to the original's own format."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actionclip_deploy.bundle import sha256_of_file
from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.actionclip import ActionCLIP
from actionclip_deploy.model.assembly import (
    assemble_model,
    complete_towers,
    configure,
    drop_visual_prompt,
    find_visual_prompt,
    initialise_tower,
    lacking_parts,
    position_rows,
)
from actionclip_deploy.model.checkpoint_files import read_checkpoint_file
from actionclip_deploy.model.config import ORIGINAL_NORM_EPS
from actionclip_deploy.model.families import FamilyWeights, read_family
from actionclip_deploy.model.pretrained import is_pretrained_tag, read_pretrained
from actionclip_deploy.model.zoo import is_packaged, read_packaged

if TYPE_CHECKING:
    from collections.abc import Collection

_log = logging.getLogger(__name__)

# "8f", "f8" or "8frames" between separators: vit-b-16-8f.pt, k400-vitb-32-f8.pt.
_FRAMES_IN_NAME = re.compile(
    r"(?<![a-z0-9])(?:(\d{1,3})[-_]?f(?:rames?)?|f(\d{1,3}))(?![a-z0-9])", re.IGNORECASE
)
_BLOCK = re.compile(r"^(visual\.transformer\.resblocks\.\d+\.)")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model from a checkpoint, and where everything about it came from.

    Attributes:
        model: In eval mode, float32, on the CPU.
        family: One of `FAMILIES`.
        num_frames: T.
        num_frames_from: "option", "position table", "provenance" or "file name".
        name: What to give to load it again: the file's name, or `motions`.
        path: The file that was read.
        sha256: Of the file.
        base: The file that supplied what the checkpoint lacks, or None.
        base_sha256: Of the base.
        notes: What a user should know, one sentence each.
        templates: The family's templates at evaluation; None for the original's 16.
        licence: Of the weights, where the file states it.
        pixel_mean: The family's mean of red, green and blue in 0 to 1.
        pixel_std: The family's standard deviation of red, green and blue in 0 to 1.
    """

    model: ActionCLIP
    family: str
    num_frames: int
    num_frames_from: str
    name: str
    path: Path
    sha256: str
    base: Path | None
    base_sha256: str | None
    notes: tuple[str, ...]
    templates: tuple[str, ...] | None
    licence: str | None
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


def load_checkpoint(
    path: str | Path,
    *,
    family: str = "auto",
    num_frames: int | None = None,
    base: str | Path | None = None,
    visual_prompt: str | None = None,
    random_towers: Collection[str] = (),
    new_prompt: bool = False,
    prompt_layers: int | None = None,
    seed: int = 0,
) -> LoadedCheckpoint:
    """Load a checkpoint of any supported family.

    No code of the file is run: pickled files are read by torch's weights-only reader and
    TorchScript archives by one that knows nothing but tensors.

    Args:
        path: The file, `open_clip:MODEL/TAG` for weights that open_clip fetches, or `motions` for
            the default model, which comes with the package.
        family: One of `FAMILIES`, or "auto" to find it from the keys.
        num_frames: T. None takes it from the position table if that has T rows, or else from
            the provenance of `motions` or the file's name.
        base: The CLIP checkpoint that supplies a tower or token embedding that the file lacks.
        visual_prompt: For a file of plain CLIP, the visual prompt to give it; None for `meanp`.
        random_towers: Towers, "visual" or "text", to give new random weights.
        new_prompt: Whether the visual prompt gets new random weights in the place of the file's,
            so that any may be chosen.
        prompt_layers: Blocks of a new `transf` or `transf_cls`; None for the original's 6.
        seed: For whatever is initialised at random.

    Raises:
        ValueError: If an argument has a value that is not allowed.
        CheckpointError: If the file cannot be read, is of no supported family, lacks a part, has
            tensors missing, left over or of another shape, or does not tell T.
    """
    weights, file = _read(path, family)
    if new_prompt:
        drop_visual_prompt(weights)
    base_weights, base_file = None, None
    if base is not None and lacking_parts(weights.towers):
        base_weights, base_file = _read(base, "auto", as_base=True)
    elif base is not None:
        weights.notes.append(f"the base {base} was not needed: the file has both towers")
    prompt = find_visual_prompt(weights, visual_prompt, file)
    rows = position_rows(weights, prompt)
    table = rows if prompt != "transf" or weights.table_tells_num_frames else None
    frames, frames_from = _find_num_frames(num_frames, table, weights.num_frames, file)
    towers = complete_towers(weights, base_weights, file)
    config = configure(
        weights, towers, file, visual_prompt=prompt, num_frames=frames, position_rows=rows
    )
    if weights.head is None and prompt_layers is not None:
        config = replace(config, prompt_layers=prompt_layers)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = assemble_model(config, towers, weights.head, file)
    if weights.head is None and visual_prompt not in (None, "meanp", "shift"):
        why = "the file's own were left out" if new_prompt else "the file has none for it"
        weights.notes.append(f"visual prompt {prompt!r} has new weights: {why}")
    for tower in random_towers:
        initialise_tower(model, tower, seed=seed)
        weights.notes.append(f"the {tower} tower has random weights, seed {seed}")
    _check_finite(model, file)
    _log.info("%s: family %s, T = %d from the %s", file, weights.family, frames, frames_from)
    return LoadedCheckpoint(
        model=model,
        family=weights.family,
        num_frames=frames,
        num_frames_from=frames_from,
        name=str(path) if is_packaged(path) else file.name,
        path=file,
        sha256=sha256_of_file(file),
        base=base_file,
        base_sha256=sha256_of_file(base_file) if base_file else None,
        notes=tuple(weights.notes),
        templates=weights.templates,
        licence=weights.licence,
        pixel_mean=weights.pixel_mean,
        pixel_std=weights.pixel_std,
    )


def _check_finite(model: ActionCLIP, path: Path) -> None:
    bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"{path} holds values that are no numbers (NaN or infinity) in {len(bad)} tensors, "
            f"first in {bad[0]}, as where training diverged; take an earlier checkpoint"
        )


def _read(path: str | Path, family: str, *, as_base: bool = False) -> tuple[FamilyWeights, Path]:
    if is_pretrained_tag(path):
        return read_pretrained(str(path), family)
    if is_packaged(path):
        return read_packaged(str(path), family)
    file = Path(path)
    return read_family(read_checkpoint_file(file), file, family, as_base=as_base), file


def _find_num_frames(
    option: int | None, table: int | None, stated: int | None, file: Path
) -> tuple[int, str]:
    if option is not None:
        return option, "option"
    if table is not None:
        return table, "position table"
    if stated is not None:
        return stated, "provenance"
    named = {int(a or b) for a, b in _FRAMES_IN_NAME.findall(file.name)}
    if len(named) == 1:
        return named.pop(), "file name"
    raise CheckpointError(
        f"{file} does not tell how many frames its clips have: its tensors fit any number, and "
        f"its name has {'more than one' if named else 'none'}; give num_frames, such as 8, 16 "
        "or 32, as it was trained"
    )


def save_original_checkpoint(
    model: ActionCLIP, path: str | Path, *, epoch: int = 0, mixed: bool = False
) -> None:
    """Save a model in the original's format, which `load_checkpoint` reads as `original`.

    The file appears under its name only once it is whole.

    Args:
        model: A model with the original's choices: QuickGELU and LayerNorm epsilon 1e-12.
        path: The file; an existing one is replaced.
        epoch: Recorded in the file.
        mixed: Round what the original stores in fp16 (the towers' matrices and their biases)
            to fp16. False stores float32, without loss.

    Raises:
        ValueError: If the model has choices that the format cannot say.
        OSError: If the file cannot be written.

    Source:
        sallymmx/ActionCLIP@31c34df utils/saving.py; clip/model.py, convert_weights.
    """
    config = model.config
    if not config.quick_gelu or config.prompt_norm_eps != ORIGINAL_NORM_EPS:
        raise ValueError(
            f"the model has quick_gelu {config.quick_gelu} and prompt_norm_eps "
            f"{config.prompt_norm_eps}; the original's format means True and {ORIGINAL_NORM_EPS}"
        )
    halved = _stored_in_fp16(model.towers) if mixed else frozenset()
    towers: dict[str, Tensor] = {}
    for key, value in model.towers.state_dict().items():
        name = _BLOCK.sub(r"\1net.", key) if config.visual_prompt == "shift" else key
        towers[name] = value.half() if key in halved else value
    content = {
        "epoch": epoch,
        "model_state_dict": towers,
        "fusion_model_state_dict": {
            f"module.{key}": value for key, value in model.visual_prompt.state_dict().items()
        },
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stored_in_fp16(towers: Any) -> frozenset[str]:
    halved = {"text_projection", "visual.proj"}
    for name, module in towers.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            halved |= {f"{name}.weight", f"{name}.bias"}
        elif isinstance(module, nn.MultiheadAttention):
            halved |= {f"{name}.in_proj_weight", f"{name}.in_proj_bias"}
    return frozenset(halved)
