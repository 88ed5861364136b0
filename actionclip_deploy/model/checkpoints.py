"""Checkpoints in, models out; and models out to the original's own format."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actionclip_deploy.errors import ArgumentError, CheckpointError
from actionclip_deploy.files import sha256_of_file, staged_file
from actionclip_deploy.manifest import MAX_CLIP_SECONDS
from actionclip_deploy.model.checkpoint_files import read_checkpoint_file
from actionclip_deploy.model.config import (
    ORIGINAL_NORM_EPS,
    ORIGINAL_PROMPT_LAYERS,
    SHIFT,
    ModelConfig,
    check_visual_prompt,
    config_from_state_dict,
    head_of,
)
from actionclip_deploy.model.families import (
    CLASSIFIER_ENTRY,
    FamilyWeights,
    list_keys,
    read_family,
)
from actionclip_deploy.model.network import ActionClipNetwork, build_towers, causal_mask
from actionclip_deploy.model.visual_prompts import build_visual_prompt
from actionclip_deploy.model.zoo import (
    is_packaged,
    is_pretrained_tag,
    read_packaged,
    read_pretrained,
)
from actionclip_deploy.published import (
    find_published,
    is_address,
    local_checkpoint,
    missing_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


_log = logging.getLogger(__name__)

TOWERS = ("visual", "text")
RESULT_NAME = "model.pt"  # of a training run
CLASSIFIER_NAME = "classifier.safetensors"  # beside it where one was trained
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
# "8f", "f8" or "8frames" between separators: vit-b-16-8f.pt, k400-vitb-32-f8.pt.
_FRAMES_IN_NAME = re.compile(
    r"(?<![a-z0-9])(?:(\d{1,3})[-_]?f(?:rames?)?|f(\d{1,3}))(?![a-z0-9])", re.IGNORECASE
)
_CLIP_SECONDS = "clip_seconds"  # of a checkpoint's entries
_BLOCK = re.compile(r"^(visual\.transformer\.resblocks\.\d+\.)")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model from a checkpoint, and where everything about it came from.

    Attributes:
        model: In eval mode, float32, on the CPU.
        family: One of `FAMILIES`.
        num_frames: T.
        num_frames_from: "option", "position table", "provenance" or "file name".
        clip_seconds: How long the clips of its training were; None where that is not known.
        name: What to give to load it again: the file's name, or the name that it is known by.
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

    model: ActionClipNetwork
    family: str
    num_frames: int
    num_frames_from: str
    clip_seconds: float | None
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
    with_classifier: bool = False,
    seed: int = 0,
) -> LoadedCheckpoint:
    """Load a checkpoint of any supported family.

    No code of the file is run: pickled files are read by torch's weights-only reader and
    TorchScript archives by one that knows nothing but tensors.

    Args:
        path: The file, `open_clip:MODEL/TAG` for weights that open_clip fetches, `motions` for
            the default model, which comes with the package, or what `local_checkpoint` fetches:
            a name that `actionclip models` lists, hf://USER/REPO/FILE, or an https address.
        family: One of `FAMILIES`, or "auto" to find it from the keys.
        num_frames: T. None takes it from the position table if that has T rows, or else from
            the provenance of `motions` or the file's name.
        base: The CLIP checkpoint that supplies a tower or token embedding that the file lacks.
        visual_prompt: For a file of plain CLIP, the visual prompt to give it; None for `meanp`.
        random_towers: Towers, "visual" or "text", to give new random weights.
        new_prompt: Whether the visual prompt gets new random weights instead of the file's,
            so that any may be chosen.
        prompt_layers: Blocks of a new `transf` or `transf_cls`; None for the original's 6.
        with_classifier: Whether the result of a run with a classifier may be loaded. Its text was
            not trained together with its frames, so that scores by text mean nothing.
        seed: For whatever is initialised at random.

    Raises:
        ValueError: If an argument has a value that is not allowed.
        CheckpointError: If the file cannot be read, is of no supported family, lacks a part, has
            tensors missing, left over or of another shape, or does not say what T is.
    """
    weights, file = _read(path, family)
    if not with_classifier:
        _refuse_classifier(weights, file)
    if new_prompt:
        _drop_visual_prompt(weights, file)
    base_weights, base_file = None, None
    if base is not None and _lacking_parts(weights.towers):
        base_weights, base_file = _read(base, "auto", as_base=True)
    elif base is not None:
        weights.notes.append(f"the base {base} was not needed: the file has both towers")
    prompt = find_visual_prompt(weights, visual_prompt, file)
    rows = _position_rows(weights, prompt)
    table = rows if head_of(prompt) != "transf" or weights.table_tells_num_frames else None
    frames, frames_from = _find_num_frames(num_frames, table, weights.num_frames, file)
    towers = complete_towers(weights, base_weights, file)
    config = _configure(
        weights, towers, file, visual_prompt=prompt, num_frames=frames, position_rows=rows
    )
    if weights.head is None and prompt_layers is not None:
        config = replace(config, prompt_layers=prompt_layers)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _assemble_model(config, towers, weights.head, file)
    if weights.head is None and head_of(prompt) != "meanp":
        why = "" if new_prompt else ": the file has none for it"
        weights.notes.append(f"visual prompt {prompt!r} has new weights{why}")
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
        clip_seconds=weights.clip_seconds,
        name=str(path) if is_packaged(path) or find_published(path) else file.name,
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


def _read(path: str | Path, family: str, *, as_base: bool = False) -> tuple[FamilyWeights, Path]:
    if is_pretrained_tag(path):
        return read_pretrained(str(path), family)
    if is_packaged(path):
        return read_packaged(str(path), family)
    file = local_checkpoint(path)
    if not file.exists():
        raise missing_checkpoint(path)
    content = read_checkpoint_file(file)
    weights = read_family(content, file, family, as_base=as_base)
    published = find_published(path)
    weights.clip_seconds = _stated_seconds(content) if published is None else published.clip_seconds
    if is_address(path) and file.parent.name.startswith("address-") and "#" not in str(path):
        weights.notes.append(
            f"nobody stated a hash of {path}; add #sha256={sha256_of_file(file)} to it, and no "
            "other file is taken"
        )
    return weights, file


def _stated_seconds(content: Mapping[str, Any]) -> float | None:
    """How long the clips of the training were, where the file has a time that clips can have."""
    stated = content.get(_CLIP_SECONDS)
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return None
    return float(stated) if 1e-3 <= stated <= MAX_CLIP_SECONDS else None


def _refuse_classifier(weights: FamilyWeights, path: Path) -> None:
    # The file beside is of runs before the entry was written.
    beside = path.with_name(CLASSIFIER_NAME)
    if weights.has_classifier or (path.name == RESULT_NAME and beside.is_file()):
        raise CheckpointError(
            f"{path} is the result of a training run with model.classifier: true ({beside.name}): "
            "a linear layer over its labels was trained, and no text, so there is nothing to "
            "compare texts with. Its accuracy is the validation's in metrics.json; train without "
            "the classifier for a model that can be exported and evaluated by text"
        )


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
        f"{file} does not say how many frames its clips have: its tensors fit any number, and "
        f"its name has {'more than one' if named else 'none'}; give num_frames, such as 8, 16 "
        "or 32, as it was trained"
    )


def _check_finite(model: ActionClipNetwork, path: Path) -> None:
    bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"{path} holds values that are not numbers (NaN or infinity) in {len(bad)} tensors, "
            f"first in {bad[0]}, as where training diverged; take an earlier checkpoint"
        )


def _lacking_parts(towers: Collection[str]) -> list[str]:
    """The parts of CLIP's towers without any key."""
    return [
        part
        for part, prefixes in _PARTS.items()
        if not any(key.startswith(prefixes) for key in towers)
    ]


def complete_towers(
    weights: FamilyWeights, base: FamilyWeights | None, path: Path
) -> dict[str, Tensor]:
    """Take the parts of the towers that a file lacks from its base checkpoint.

    Raises:
        CheckpointError: If a part is lacking from both, or the base is of another kind.
    """
    lacking = _lacking_parts(weights.towers)
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
    still = _lacking_parts({**weights.towers, **added})
    if still:
        raise CheckpointError(
            f"{path} has no {' and no '.join(still)}, and neither has its base; give a base with "
            "both of CLIP's towers"
        )
    return {**weights.towers, **added}


def find_visual_prompt(weights: FamilyWeights, wanted: str | None, path: Path) -> str:
    """Tell the visual prompt of a file from its keys.

    Args:
        wanted: The visual prompt asked for, or None. A file without one takes it; None then
            means `meanp`.

    Raises:
        ValueError: If the visual prompt asked for is unknown.
        CheckpointError: If it differs from the file's, or the file's is not one of the seven.
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


def _drop_visual_prompt(weights: FamilyWeights, path: Path) -> None:
    """Forget the visual prompt of a file, in place; what is left is plain CLIP."""
    if weights.head is not None:
        own = _visual_prompt_of(weights, weights.head, path)
        weights.notes.append(f"the file's own visual prompt, {own!r}, was left out")
    weights.head, weights.shifted, weights.norm_eps = None, False, ORIGINAL_NORM_EPS
    weights.towers.pop(_TIME_EMBEDDING, None)


def _visual_prompt_of(weights: FamilyWeights, head: Mapping[str, Any], path: Path) -> str:
    if _TIME_EMBEDDING in weights.towers:
        if head or weights.shifted:
            other = f"weights of a temporal head ({list_keys(list(head))})" if head else "'shift'"
            raise CheckpointError(
                f"{path} mixes frames inside the visual tower ('joint') and has {other} as well; "
                "'joint' gives one feature for a clip, which leaves nothing to fuse or shift"
            )
        return "joint"
    for prefix, name in _HEADS.items():
        if any(key.startswith(prefix) for key in head):
            return f"{SHIFT}+{name}" if weights.shifted else name
    if head:
        raise CheckpointError(
            f"{path} has a temporal head of an unknown kind, with the keys "
            f"{list_keys(list(head))}; known are meanP, LSTM, Conv_1D, Transf and Transf_cls"
        )
    return SHIFT if weights.shifted else "meanp"


def _position_rows(weights: FamilyWeights, visual_prompt: str) -> int | None:
    """Rows of the temporal position table in a file; None if it has no table that is used."""
    head, visual_prompt = weights.head or {}, head_of(visual_prompt)
    if visual_prompt == "joint" and _TIME_EMBEDDING in weights.towers:
        return int(weights.towers[_TIME_EMBEDDING].shape[0])
    if visual_prompt == "transf_cls" and "transformer.pos_embed" in head:
        return int(head["transformer.pos_embed"].shape[1]) - 1  # one is the class token's
    if visual_prompt == "transf" and _POSITIONS in head:
        return int(head[_POSITIONS].shape[0])
    return None


def _configure(
    weights: FamilyWeights, towers: Mapping[str, Tensor], path: Path, **choices: Any
) -> ModelConfig:
    """Read the configuration of a model off its tensors.

    Raises:
        ValueError: If the visual prompt cannot run that many frames.
        CheckpointError: If a tensor that gives a size is missing or has an impossible shape.
    """
    try:
        config = config_from_state_dict(towers, quick_gelu=weights.quick_gelu)
        visual_width = _visual_output_width(towers)
    except KeyError as exc:
        raise CheckpointError(
            f"{path} lacks the tensor {exc}, which gives a size of the model; it is incomplete "
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


def _assemble_model(
    config: ModelConfig,
    towers: Mapping[str, Tensor],
    head: Mapping[str, Tensor] | None,
    path: Path,
) -> ActionClipNetwork:
    """Build a model around the tensors of a checkpoint, as float32 and in eval mode.

    Args:
        towers: Both towers under CLIP's key names.
        head: The visual prompt under the original's key names; None for a new one.

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
    try:
        with torch.device("meta"):  # sizes without memory; the file's tensors become parameters
            model = ActionClipNetwork(config)
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as exc:
        raise CheckpointError(
            f"{path} has tensors of shapes that no CLIP has ({exc}); check that the file is whole "
            "and of the family that it was taken for"
        ) from exc
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
    wrong = [
        f"{len(k)} {name}: {list_keys([key.removeprefix('towers.') for key in k])}"
        for name, k in found.items()
        if k
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {config.backbone} with visual prompt "
            f"{config.visual_prompt!r}. Tensors {'; '.join(wrong)}. Check that the file is whole "
            "and of the family that it was taken for"
        )


def initialise_tower(model: ActionClipNetwork, tower: str, *, seed: int) -> None:
    """Give one of CLIP's towers new random weights, as the original initialises them.

    Args:
        tower: "visual", or "text", which takes the logit scale with it as in the original.
        seed: Makes the weights repeatable; torch's global generator stays untouched.

    Raises:
        ValueError: If the tower is neither of the two.

    Source:
        arXiv 2109.08472, table 2; sallymmx/ActionCLIP@31c34df clip/model.py, build_model.
    """
    if tower not in TOWERS:
        raise ArgumentError("tower", f"is {tower!r}; it has to be one of {list(TOWERS)}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        fresh = build_towers(model.config).state_dict()
    own = model.towers.state_dict()
    with torch.no_grad():
        for key, value in fresh.items():
            if key.startswith("visual.") == (tower == "visual"):
                own[key].copy_(value)


def save_original_checkpoint(
    model: ActionClipNetwork,
    path: str | Path,
    *,
    epoch: int = 0,
    mixed: bool = False,
    classifier: Mapping[str, Tensor] | None = None,
    clip_seconds: float | None = None,
) -> None:
    """Save a model in the original's format, which `load_checkpoint` reads as `original`.

    The file appears under its name only once it is whole.

    Args:
        model: A model with the original's choices: QuickGELU and LayerNorm epsilon 1e-12.
        mixed: Round what the original stores in fp16 (the towers' matrices and their biases)
            to fp16. False stores float32, without loss.
        classifier: The linear layer of a run that trained no text, an entry of its own.
        clip_seconds: How long the clips of the training were, an entry of its own.

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
        name = _BLOCK.sub(r"\1net.", key) if config.is_shifted else key
        towers[name] = value.half() if key in halved else value
    content = {
        "epoch": epoch,
        "model_state_dict": towers,
        "fusion_model_state_dict": {
            f"module.{key}": value for key, value in model.visual_prompt.state_dict().items()
        },
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    if classifier is not None:
        content[CLASSIFIER_ENTRY] = dict(classifier)
    if clip_seconds is not None:
        content[_CLIP_SECONDS] = clip_seconds
    with staged_file(path) as staged, staged.open("wb") as file:
        torch.save(content, file)


def _stored_in_fp16(towers: Any) -> frozenset[str]:
    halved = {"text_projection", "visual.proj"}
    for name, module in towers.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            halved |= {f"{name}.weight", f"{name}.bias"}
        elif isinstance(module, nn.MultiheadAttention):
            halved |= {f"{name}.in_proj_weight", f"{name}.in_proj_bias"}
    return frozenset(halved)
