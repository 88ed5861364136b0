"""From the tensors of a family to a model: what is missing, what is left over, what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.actionclip import ActionCLIP
from actionclip_deploy.model.config import (
    ORIGINAL_NORM_EPS,
    ORIGINAL_PROMPT_LAYERS,
    ModelConfig,
    check_visual_prompt,
    config_from_state_dict,
)
from actionclip_deploy.model.towers import build_towers, causal_mask
from actionclip_deploy.model.visual_prompts import build_visual_prompt

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from actionclip_deploy.model.families import FamilyWeights

TOWERS = ("visual", "text")

_LISTED_KEYS = 20
_TIME_EMBEDDING = "visual.time_embedding"
_POSITIONS = "frame_position_embeddings.weight"
_PARTS = {
    "visual tower": ("visual.",),
    "textual tower": ("transformer.", "positional_embedding", "ln_final.", "text_projection"),
    "token embedding": ("token_embedding.",),
}
# The first key prefix that a head has tells which it is.
_HEADS = {
    "lstm_visual.": "lstm",
    "shift.": "conv1d",
    "transformer.cls_token": "transf_cls",
    "transformer.resblocks.": "transf",
}
_HEAD_BLOCKS = ("transformer.resblocks.", "transformer.transformer_enc.layers.")


def lacking_parts(towers: Collection[str]) -> list[str]:
    """The parts of CLIP's towers of which there is no key at all."""
    return [
        part
        for part, prefixes in _PARTS.items()
        if not any(key.startswith(prefixes) for key in towers)
    ]


def complete_towers(
    weights: FamilyWeights, base: FamilyWeights | None, path: Path
) -> dict[str, Tensor]:
    """Take the parts of the towers that a file lacks from its base checkpoint.

    Args:
        weights: The file's tensors.
        base: Those of the checkpoint that it was fine-tuned from, if one was given.
        path: The file, for messages.

    Raises:
        CheckpointError: If a part is lacking from both, or the base is of another kind.
    """
    lacking = lacking_parts(weights.towers)
    if not lacking:
        return weights.towers
    if base is None:
        raise CheckpointError(
            f"{path} (family {weights.family!r}) has no {' and no '.join(lacking)}; give the CLIP "
            "checkpoint that it was fine-tuned from as base"
        )
    if base.quick_gelu != weights.quick_gelu:
        raise CheckpointError(
            f"{path} wants QuickGELU and its base GELU, or the other way round; give the CLIP "
            "checkpoint that it was fine-tuned from as base"
        )
    prefixes = tuple(prefix for part in lacking for prefix in _PARTS[part])
    added = {key: value for key, value in base.towers.items() if key.startswith(prefixes)}
    still = lacking_parts({**weights.towers, **added})
    if still:
        raise CheckpointError(
            f"{path} has no {' and no '.join(still)}, and neither has its base; give a base with "
            "both of CLIP's towers"
        )
    return {**weights.towers, **added}


def find_visual_prompt(weights: FamilyWeights, wanted: str | None, path: Path) -> str:
    """Tell the visual prompt of a file from its keys.

    Args:
        weights: The file's tensors.
        wanted: The visual prompt asked for, or None. A file without one takes it; None then
            means `meanp`.
        path: The file, for messages.

    Raises:
        ValueError: If the visual prompt asked for is unknown.
        CheckpointError: If it is another than the file's, or the file's is none of the seven.
    """
    if wanted is not None:
        check_visual_prompt(wanted)
    if weights.head is None:
        return wanted or "meanp"
    found = _visual_prompt_of(weights, weights.head, path)
    if wanted not in (None, found):
        raise CheckpointError(
            f"{path} was trained with visual prompt {found!r}, and {wanted!r} was asked for; "
            "leave the visual prompt to be found from the keys"
        )
    return found


def drop_visual_prompt(weights: FamilyWeights) -> None:
    """Forget the visual prompt of a file, in place; what is left is plain CLIP."""
    weights.head, weights.shifted, weights.norm_eps = None, False, ORIGINAL_NORM_EPS
    weights.towers.pop(_TIME_EMBEDDING, None)


def _visual_prompt_of(weights: FamilyWeights, head: Mapping[str, Any], path: Path) -> str:
    if weights.shifted or _TIME_EMBEDDING in weights.towers:
        found = "shift" if weights.shifted else "joint"
        if head:
            raise CheckpointError(
                f"{path} mixes frames inside the visual tower ({found!r}) and has weights of a "
                f"temporal head as well ({_list_keys(list(head))}); {found!r} is supported with "
                "mean pooling alone, sim_header meanP"
            )
        return found
    for prefix, name in _HEADS.items():
        if any(key.startswith(prefix) for key in head):
            return name
    if head:
        raise CheckpointError(
            f"{path} has a temporal head of an unknown kind, with the keys "
            f"{_list_keys(list(head))}; known are meanP, LSTM, Conv_1D, Transf and Transf_cls"
        )
    return "meanp"


def position_rows(weights: FamilyWeights, visual_prompt: str) -> int | None:
    """Rows of the temporal position table in a file; None if it has no table that is used."""
    head = weights.head or {}
    if visual_prompt == "joint" and _TIME_EMBEDDING in weights.towers:
        return int(weights.towers[_TIME_EMBEDDING].shape[0])
    if visual_prompt == "transf_cls" and "transformer.pos_embed" in head:
        return int(head["transformer.pos_embed"].shape[1]) - 1  # one is the class token's
    if visual_prompt == "transf" and _POSITIONS in head:
        return int(head[_POSITIONS].shape[0])
    return None


def configure(
    weights: FamilyWeights, towers: Mapping[str, Tensor], path: Path, **choices: Any
) -> ModelConfig:
    """Read the configuration of a model off its tensors.

    Args:
        weights: The file's tensors.
        towers: Both towers, complete.
        path: The file, for messages.
        **choices: `visual_prompt`, `num_frames` and `position_rows`.

    Raises:
        ValueError: If the visual prompt cannot run that many frames.
        CheckpointError: If a tensor that tells a size is missing or of a strange shape.
    """
    try:
        config = config_from_state_dict(towers, quick_gelu=weights.quick_gelu)
        visual_width = _visual_output_width(towers)
    except KeyError as exc:
        raise CheckpointError(
            f"{path} lacks the tensor {exc}, which tells a size of the model; it is incomplete "
            f"or not of the family {weights.family!r}"
        ) from exc
    except (IndexError, ValueError) as exc:
        raise CheckpointError(
            f"{path} has tensors of shapes that no CLIP has ({exc}); it is not of the family "
            f"{weights.family!r}"
        ) from exc
    if visual_width != config.embed_dim:
        raise CheckpointError(
            f"{path}: the visual tower gives {visual_width} channels and the textual tower "
            f"{config.embed_dim}; give the base checkpoint of the same CLIP model"
        )
    scale = config.scale
    if weights.learned_scale and "logit_scale" in towers:
        scale = float(towers["logit_scale"].float().exp())
    layers = _count_head_blocks(weights.head or {}) or ORIGINAL_PROMPT_LAYERS
    sized = replace(config, prompt_layers=layers, prompt_norm_eps=weights.norm_eps, scale=scale)
    return sized.with_visual_prompt(**choices)


def _visual_output_width(towers: Mapping[str, Tensor]) -> int:
    if "visual.proj" in towers:
        return int(towers["visual.proj"].shape[1])
    return int(towers["visual.attnpool.c_proj.weight"].shape[0])


def _count_head_blocks(head: Mapping[str, Any]) -> int:
    return len(
        {
            key.removeprefix(prefix).split(".")[0]
            for key in head
            for prefix in _HEAD_BLOCKS
            if key.startswith(prefix)
        }
    )


def assemble_model(
    config: ModelConfig,
    towers: Mapping[str, Tensor],
    head: Mapping[str, Tensor] | None,
    path: Path,
) -> ActionCLIP:
    """Build a model around the tensors of a checkpoint, as float32 and in eval mode.

    Args:
        config: Sizes and choices.
        towers: Both towers under CLIP's key names.
        head: The visual prompt under the original's key names; None for a new one.
        path: The file, for messages.

    Raises:
        CheckpointError: If tensors are missing, left over, or of another shape.
    """
    given = {f"towers.{key}": value for key, value in towers.items()}
    if head is None:
        head = build_visual_prompt(config).state_dict()
        if config.visual_prompt == "joint":
            fresh = torch.randn(config.num_frames, config.vision_width) * config.vision_width**-0.5
            given.setdefault(f"towers.{_TIME_EMBEDDING}", fresh)
    given.update({f"visual_prompt.{key}": value for key, value in head.items()})
    with torch.device("meta"):  # sizes without memory; the file's tensors become the parameters
        model = ActionCLIP(config)
    wanted = model.state_dict()
    for key in wanted.keys() - given.keys():
        if key.endswith("num_batches_tracked"):  # a count that evaluation never reads
            given[key] = torch.zeros((), dtype=torch.int64)
    _check_tensors(given, wanted, config, path)
    model.load_state_dict({key: _owned(value) for key, value in given.items()}, assign=True)
    model.towers.attn_mask = causal_mask(config.context_length)
    return model.eval()


def _owned(tensor: Tensor) -> Tensor:
    # A copy, so that nothing stays mapped to the file.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True).contiguous()


def _check_tensors(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: ModelConfig, path: Path
) -> None:
    missing = sorted(wanted.keys() - given.keys())
    left = sorted(given.keys() - wanted.keys())
    reshaped = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "left over": left, "of another shape": reshaped}
    wrong = [f"{len(k)} {name}: {_list_keys(k)}" for name, k in found.items() if k]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {config.backbone} with visual prompt "
            f"{config.visual_prompt!r}. Tensors {'; '.join(wrong)}. Check that the file is whole "
            "and of the family that it was taken for"
        )


def _list_keys(keys: list[str]) -> str:
    names = [key.removeprefix("towers.") for key in keys[:_LISTED_KEYS]]
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(names) + more


def initialise_tower(model: ActionCLIP, tower: str, *, seed: int) -> None:
    """Give one of CLIP's towers new random weights, as the original initialises them.

    Args:
        model: Changed in place.
        tower: "visual", or "text", which takes the logit scale with it as in the original.
        seed: Makes the weights repeatable; torch's global generator stays untouched.

    Raises:
        ValueError: If the tower is none of the two.

    Source:
        arXiv 2109.08472, table 2; sallymmx/ActionCLIP@31c34df clip/model.py, build_model.
    """
    if tower not in TOWERS:
        raise ValueError(f"tower is {tower!r}; it has to be one of {list(TOWERS)}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        fresh = build_towers(model.config).state_dict()
    own = model.towers.state_dict()
    with torch.no_grad():
        for key, value in fresh.items():
            if key.startswith("visual.") == (tower == "visual"):
                own[key].copy_(value)
