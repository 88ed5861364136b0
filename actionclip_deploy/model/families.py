"""The families of checkpoints: how to tell them apart, and how each names its tensors.

    original    {model_state_dict: CLIP's keys, fusion_model_state_dict: module.*}
    mmaction2   {state_dict: clip.*, adapter.*}
    openai      CLIP's keys, flat or as TorchScript archive
    open_clip   CLIP's keys, flat or under state_dict; GELU
    open_clip-quickgelu
                the same with QuickGELU; never found from the keys, as none of them shows it
    text4vis    {model_state_dict: visual.*, fusion_model.*, logit_scale}; no textual tower
    vificlip    {model: module.image_encoder.*, module.text_encoder.*}; no token embedding
    bike        as original, without the prefix module.

X-CLIP, Open-VCLIP and FROSTER are recognised to say why they cannot be exported.

Source:
    sallymmx/ActionCLIP@31c34df, open-mmlab/mmaction2@4d6c934 projects/actionclip,
    openai/CLIP@d05afc4, whwu95/Text4Vis@d61b34d, whwu95/BIKE@e8f6a8b,
    muzairkhattak/ViFi-CLIP@e2d1948.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actionclip_deploy.errors import ArgumentError, CheckpointError
from actionclip_deploy.model.checkpoint_files import machine_memory_bytes
from actionclip_deploy.model.config import ORIGINAL_NORM_EPS
from actionclip_deploy.model.network import PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

FAMILIES = (
    "original",
    "mmaction2",
    "openai",
    "open_clip",
    "open_clip-quickgelu",
    "text4vis",
    "vificlip",
    "bike",
)

MMACTION2_NORM_EPS = 1e-5
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WRAPPERS = ("model_state_dict", "state_dict", "model", "model_state")
_HEAD_ENTRY = "fusion_model_state_dict"
CLASSIFIER_ENTRY = "classifier_state_dict"  # of our own training, model.classifier: true
# Modules that torch puts around others (compile, FSDP, activation checkpointing) wherever they
# were applied; their names come into the keys and mean nothing.
_WRAPPING_MODULES = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}
)
_SHIFTED_BLOCK = re.compile(r"^(visual\.transformer\.resblocks\.\d+\.)net\.")

# What a file may hold besides weights. Whatever else holds tensors has to be used, or the file is
# refused: a part of a trained model that is left out in silence gives other scores.
#
# Sizes that OpenAI's archives carry as buffers, the mask, and counts of training.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids|n_averaged)$"
)
# Entries beside the weights: the state of a training run.
_TRAINING_STATE = re.compile(
    r"(^|_)(optim\w*|opt|sched\w*|scaler|amp|rng\w*|random\w*|seed|epochs?|iters?|steps?|args|"
    r"config|cfg|meta|hyper_parameters|callbacks|loops|message_hub|metrics?|history|loss\w*|"
    r"(best|max)_(acc|prec|top|metric|score|loss|map)\w*)(_|$)",
    re.IGNORECASE,
)
# Entries beside the weights that are the whole model once more; a note tells of them.
_OTHER_COPIES = re.compile(r"(^|_)(ema|swa|averaged|teacher)(_|$)", re.IGNORECASE)
_LISTED_KEYS = 20

# A weight, as training leaves it. Others have to be converted by whoever knows their meaning.
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Four times the largest CLIP that was published, of 2.5 billion parameters.
_MAX_PARAMETERS = 10**10
# Of the logarithm of the scale. CLIP stops at 4.6, a scale of 100, and begins at 2.7.
_LOGIT_SCALE_RANGE = (-10.0, 10.0)
# Embedded prompts of the classes that were trained on; they are made again from the labels.
_TRAINED_PROMPTS = re.compile(
    r"^prompt_learner\.(complete_text_embeddings|token_prefix|token_suffix)$"
)


@dataclass
class FamilyWeights:
    """The tensors of a file under the original's key names, and what its family does otherwise.

    Attributes:
        family: One of `FAMILIES`.
        towers: Tensors of CLIP's towers; a family may lack a part of them.
        head: Tensors of the visual prompt; None where the family has no visual prompt, so that
            any may be chosen.
        shifted: Whether the file comes from a model with temporal shift.
        quick_gelu: The activation of the towers.
        norm_eps: Epsilon of the LayerNorms of `transf`.
        learned_scale: Whether scores use exp(logit_scale) instead of 100.
        table_tells_num_frames: Whether the position table of `transf` has T rows.
        num_frames: T, where the file states it.
        clip_seconds: How long the clips of its training were, where that is known.
        has_classifier: Whether it comes from a run that trained a linear layer over labels, and
            no text.
        licence: Of the weights, where the file states it.
        templates: The family's templates at evaluation; None for the original's 16.
        pixel_mean: Of red, green and blue in 0 to 1.
        pixel_std: Of red, green and blue in 0 to 1.
        notes: What a user should know, one sentence each.
    """

    family: str
    towers: dict[str, Tensor]
    head: dict[str, Tensor] | None
    shifted: bool = False
    quick_gelu: bool = True
    norm_eps: float = ORIGINAL_NORM_EPS
    learned_scale: bool = False
    table_tells_num_frames: bool = False
    num_frames: int | None = None
    clip_seconds: float | None = None
    has_classifier: bool = False
    licence: str | None = None
    templates: tuple[str, ...] | None = None
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN
    pixel_std: tuple[float, float, float] = PIXEL_STD
    notes: list[str] = field(default_factory=list)


def read_family(
    content: Mapping[str, Any], path: Path, family: str = "auto", *, as_base: bool = False
) -> FamilyWeights:
    """Bring the tensors of a checkpoint under the original's key names.

    Args:
        path: Where it was, for messages and as a hint.
        family: One of `FAMILIES`, or "auto" to find it from the keys.
        as_base: Whether the file only supplies a part of another; plain CLIP that does not tell
            its activation is then taken for OpenAI's instead of being refused.

    Raises:
        ValueError: If the family is unknown.
        CheckpointError: If the keys are of no known family, of one that cannot be exported, or
            of more than one, or if the file has not the structure of the family asked for.
    """
    if family not in (*FAMILIES, "auto"):
        raise ArgumentError(
            "family", f"is {family!r}; it has to be 'auto' or one of {list(FAMILIES)}"
        )
    _check_names(content, path)
    tensors, entry = _unwrap(content, path)
    _refuse_unsupported(content, tensors, path)
    if family == "auto":
        family = _find_family(content, tensors, path, as_base=as_base)
    weights = _READERS[family](content, tensors, path)
    if not weights.towers:
        raise CheckpointError(
            f"{path} has not the structure of the family {family!r}; its keys start with "
            f"{_first_keys(tensors)}. Leave the family to be found from the keys, or give another"
        )
    dropped = []
    for part in (weights.towers, weights.head or {}):
        for key in [key for key in part if _NOT_WEIGHTS.search(key)]:
            del part[key]
            dropped.append(key)
    if dropped:
        weights.notes.append(f"dropped {list_keys(dropped)}: no weights")
    if entry is not None:
        used = {entry, CLASSIFIER_ENTRY}
        used |= {_HEAD_ENTRY} if family in _WITH_HEAD_ENTRY else set()
        weights.has_classifier = CLASSIFIER_ENTRY in content
        _account_for_rest({k: v for k, v in content.items() if k not in used}, weights, path)
    _check_weights(weights, path)
    return weights


def _check_names(content: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that are not text, in the file and in the dictionaries of its parts."""
    parts = [content, *(content.get(name) for name in (*_WRAPPERS, _HEAD_ENTRY))]
    strange = [key for part in parts if isinstance(part, dict) for key in part]
    strange = [key for key in strange if not isinstance(key, str)]
    if strange:
        raise CheckpointError(
            f"{path} has keys that are not text ({list_keys([repr(key) for key in strange])}); "
            "save the model's own state_dict(), whose keys are the names of its tensors"
        )


def _account_for_rest(rest: Mapping[str, Any], weights: FamilyWeights, path: Path) -> None:
    """Refuse a file whose entries beside the weights hold tensors that nothing uses."""
    left: list[str] = []
    for name, value in rest.items():
        keys = [] if _TRAINING_STATE.search(name) else _tensor_keys(name, value)
        if keys and _OTHER_COPIES.search(name):
            weights.notes.append(f"{name} was left alone: another copy of the weights")
        else:
            left += keys
    if left:
        raise CheckpointError(
            f"{path} holds tensors that the family {weights.family!r} has no use for, {len(left)} "
            f"left over: {list_keys(left)}. Leave the family to be found from the keys, or save "
            "the file without them"
        )


def _tensor_keys(name: str, value: object) -> list[str]:
    """Names of the tensors in a tree of dictionaries and lists, each part looked at once."""
    found: list[str] = []
    waiting, seen = [(name, value)], set[int]()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(name)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}", part) for key, part in inner]
    return sorted(found)


def _check_weights(weights: FamilyWeights, path: Path) -> None:
    """Refuse what is no weight, and sizes that no CLIP has, before a copy of any is made."""
    entries: dict[str, object] = {**weights.towers, **(weights.head or {})}
    strange = [key for key, value in entries.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} has entries among its weights that are not tensors: "
            f"{list_keys(strange)}; save it with the weights of the family {weights.family!r} alone"
        )
    total = 0
    for key, value in entries.items():
        assert isinstance(value, Tensor)
        if key.endswith("num_batches_tracked"):
            continue
        kind = _why_no_weight(value)
        if kind is not None:
            raise CheckpointError(
                f"{path} has the tensor {key}, which {kind}; weights are dense tensors of "
                "float32, float16, bfloat16 or float64, so save the model before it is quantised "
                "or otherwise converted"
            )
        total += value.numel()
    memory = machine_memory_bytes()
    if total > _MAX_PARAMETERS or total * 4 > memory:
        largest = max(entries, key=lambda key: entries[key].numel())  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{path} has {total} parameters, most of them in {largest}; at most {_MAX_PARAMETERS} "
            f"are read, and as float32 they have to fit the {memory} bytes of memory of this "
            "machine. Check that the file is a CLIP model, or use a larger machine"
        )
    _check_logit_scale(weights.towers.get("logit_scale"), path)


def _why_no_weight(tensor: Tensor) -> str | None:
    """What a tensor is instead of a weight, as the end of a sentence; None if it is one."""
    if tensor.is_nested:
        return "is nested"
    if tensor.layout != torch.strided:
        return f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return f"is quantised ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.dtype not in _WEIGHT_DTYPES:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_meta:
        return "has a shape and no values (device meta)"
    if tensor.numel() == 0:
        return f"has no values, shape {tuple(tensor.shape)}"
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > stored:
        return f"has shape {tuple(tensor.shape)} and only {stored} stored values (a view by expand)"
    return None


def _check_logit_scale(scale: Tensor | None, path: Path) -> None:
    low, high = _LOGIT_SCALE_RANGE
    if scale is None:
        return
    if scale.numel() != 1:
        raise CheckpointError(
            f"{path} has a logit_scale of shape {tuple(scale.shape)}; CLIP has a single one, so "
            "it is no such model or was altered"
        )
    value = float(scale)
    if math.isfinite(value) and not low <= value <= high:
        raise CheckpointError(
            f"{path} has logit_scale {value:g}; the logarithm of the scale has to be from "
            f"{low:g} to {high:g} (CLIP's is 4.6, a scale of 100). Training diverged or the file "
            "was altered: take an earlier checkpoint"
        )


def _unwrap(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], str | None]:
    """The dictionary that holds the tensors, under plain keys.

    Returns:
        It, and the name of its entry in the file; None where the file is that dictionary.
    """
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict):
            return _plain_keys(inner, path), wrapper
    return _plain_keys(content, path), None


def _plain_keys(tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Take off the names of wrapping modules, and `module.` where all keys begin with it."""
    plain: dict[str, Any] = {}
    for key, value in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPING_MODULES)
        if name in plain:
            raise CheckpointError(
                f"{path} has more than one tensor for {name}, with and without the names of "
                "modules that torch wraps around others; save one model's state_dict() alone"
            )
        plain[name] = value
    is_counted = plain.keys() - {"n_averaged"}  # what torch's AveragedModel adds
    while is_counted and all(key.startswith("module.") for key in is_counted):
        plain = {key.removeprefix("module."): value for key, value in plain.items()}
        is_counted = plain.keys() - {"n_averaged"}
    return plain


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose key starts with a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def list_keys(keys: Sequence[str]) -> str:
    """The first 20 keys, and how many more there are."""
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more


def _first_keys(tensors: Mapping[str, Any]) -> str:
    return ", ".join(list(tensors)[:4]) or "nothing"


def _refuse_unsupported(content: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> None:
    def any_start(*starts: str) -> bool:
        return any(key.startswith(starts) for key in tensors)

    if any_start("mit.", "prompts_generator.") or any(".message_fc." in key for key in tensors):
        raise CheckpointError(
            f"{path} is an X-CLIP checkpoint; X-CLIP changes its text features with every video, "
            "so no label bank can be built for it. Use a family with independent towers: "
            f"{', '.join(FAMILIES)}"
        )
    if "model_state" in content or any_start("model.visual."):
        trained_with = any("projector_v." in key or "raw_model." in key for key in tensors)
        name = "a FROSTER" if trained_with else "an Open-VCLIP"
        raise CheckpointError(
            f"{path} is {name} checkpoint; its frames attend to the neighbouring frames in every "
            "block and its weights are meant to be averaged with CLIP's, neither of which is "
            f"supported. Use one of the families {', '.join(FAMILIES)}"
        )
    if any_start("vision_model.", "text_model."):
        raise CheckpointError(
            f"{path} has the key names of Hugging Face's transformers; give the checkpoint under "
            "CLIP's own names, as OpenAI and open_clip publish it"
        )


def _find_family(
    content: Mapping[str, Any], tensors: Mapping[str, Any], path: Path, *, as_base: bool
) -> str:
    def any_start(*starts: str) -> bool:
        return any(key.startswith(starts) for key in tensors)

    head = content.get(_HEAD_ENTRY)
    if isinstance(head, dict):
        # The original wraps its head, and a copy of it that is compiled does so otherwise; BIKE
        # wraps nothing.
        is_wrapped = any(key.split(".")[0] in {"module", *_WRAPPING_MODULES} for key in head)
        return "bike" if head and not is_wrapped else "original"
    if any_start("clip.", "adapter."):
        return "mmaction2"
    if any_start("image_encoder."):
        return "vificlip"
    if any_start("fusion_model.") or ("model_state_dict" in content and not any_start("ln_final.")):
        return "text4vis"
    if tensors.keys() == {"weight", "bias"}:
        raise CheckpointError(
            f"{path} is one linear layer, such as the classifier.safetensors of a training run "
            "with model.classifier: true. It is no model, and there is no text to compare with; "
            "the accuracy of such a run is the validation's in its metrics.json"
        )
    if not any_start("visual.") or "model_state_dict" in content:
        raise CheckpointError(
            f"{path} is of no known family: its keys start with {_first_keys(tensors)}. Known "
            f"are {', '.join(FAMILIES)}; give one if the file is of it after all"
        )
    return _openai_or_open_clip(content, tensors, path, as_base=as_base)


def _openai_or_open_clip(
    content: Mapping[str, Any], tensors: Mapping[str, Any], path: Path, *, as_base: bool
) -> str:
    projection = tensors.get("text_projection")
    halved = isinstance(projection, Tensor) and projection.dtype == torch.float16
    if "input_resolution" in tensors or halved:
        return "openai"
    if "state_dict" in content or path.name.startswith("open_clip"):
        return "open_clip"
    if as_base:
        return "openai"
    raise CheckpointError(
        f"{path} holds CLIP's two towers, but nothing in it says whether they want OpenAI's "
        "QuickGELU or open_clip's GELU; give the family 'openai', 'open_clip' or "
        "'open_clip-quickgelu'"
    )


def _read_original(
    content: Mapping[str, Any], tensors: dict[str, Any], path: Path
) -> FamilyWeights:
    head = content.get(_HEAD_ENTRY)
    if not isinstance(head, dict) or not isinstance(content.get("model_state_dict"), dict):
        return FamilyWeights("original", {}, {})
    blocks = [key for key in tensors if key.startswith("visual.transformer.resblocks.")]
    shifted = [key for key in blocks if _SHIFTED_BLOCK.match(key)]
    if shifted and len(shifted) != len(blocks):
        raise CheckpointError(
            f"{path} shifts frames in some blocks of the visual tower and not in all, as the keys "
            f"{list_keys(shifted)} say; the original shifts in all or none"
        )
    return FamilyWeights(
        "original",
        {_SHIFTED_BLOCK.sub(r"\1", key): value for key, value in tensors.items()},
        _plain_keys(head, path),
        shifted=bool(shifted),
    )


def _read_bike(content: Mapping[str, Any], tensors: dict[str, Any], path: Path) -> FamilyWeights:
    weights = _read_original(content, tensors, path)
    weights.family = "bike"
    weights.templates = ("This is a video about {}",)
    weights.notes.append(
        "taken for BIKE, as the keys of its head have no prefix 'module.', and scored by the mean "
        "of its fused frame features (BIKE's interaction DP); its video concept spotting, which "
        "weights frames by the words of each label, and its attribute branch are left out, so "
        "accuracy is not that of BIKE's tables"
    )
    return weights


def _read_mmaction2(_: Mapping[str, Any], tensors: dict[str, Any], __: Path) -> FamilyWeights:
    towers = _below(tensors, "clip.")
    if towers:
        towers.update({k: v for k, v in tensors.items() if not k.startswith(("clip.", "adapter."))})
    return FamilyWeights(
        "mmaction2",
        towers,
        _below(tensors, "adapter."),
        norm_eps=MMACTION2_NORM_EPS,
        table_tells_num_frames=True,
    )


def _read_text4vis(_: Mapping[str, Any], tensors: dict[str, Any], __: Path) -> FamilyWeights:
    return FamilyWeights(
        "text4vis",
        {key: value for key, value in tensors.items() if not key.startswith("fusion_model.")},
        _below(tensors, "fusion_model."),
        templates=("a video of a person {}.",),
        notes=[
            "Text4Vis samples the start of each segment and not its centre, so other frames are "
            "read than in its own evaluation"
        ],
    )


def _read_vificlip(_: Mapping[str, Any], tensors: dict[str, Any], __: Path) -> FamilyWeights:
    dropped = [key for key in tensors if _TRAINED_PROMPTS.match(key)]
    renamed = {
        re.sub(r"^text_encoder\.", "", re.sub(r"^image_encoder\.", "visual.", key)): value
        for key, value in tensors.items()
        if key not in dropped
    }
    weights = FamilyWeights(
        "vificlip",
        renamed if any(key.startswith("visual.") for key in renamed) else {},
        {},
        learned_scale=True,
        templates=("a photo of a {}.",),
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
    )
    if dropped:
        weights.notes.append(
            f"dropped {', '.join(dropped)}: prompts of the classes it was trained on"
        )
    return weights


def _read_plain(
    family: str,
    quick_gelu: bool,
    learned_scale: bool,
    _: Mapping[str, Any],
    tensors: dict[str, Any],
    path: Path,
) -> FamilyWeights:
    if "text_projection" not in tensors and "text.text_projection" in tensors:
        renamed = {key.removeprefix("text."): value for key, value in tensors.items()}
        if len(renamed) < len(tensors):
            raise CheckpointError(
                f"{path} has tensors of the textual tower with and without the prefix 'text.'; "
                "save one model's state_dict() alone"
            )
        tensors = renamed
    return FamilyWeights(
        family,
        tensors if any(key.startswith("visual.") for key in tensors) else {},
        None,
        quick_gelu=quick_gelu,
        learned_scale=learned_scale,
    )


_WITH_HEAD_ENTRY = ("original", "bike")
_READERS: dict[str, Callable[[Mapping[str, Any], dict[str, Any], Path], FamilyWeights]] = {
    "original": _read_original,
    "mmaction2": _read_mmaction2,
    "openai": partial(_read_plain, "openai", True, False),
    "open_clip": partial(_read_plain, "open_clip", False, True),
    "open_clip-quickgelu": partial(_read_plain, "open_clip-quickgelu", True, True),
    "text4vis": _read_text4vis,
    "vificlip": _read_vificlip,
    "bike": _read_bike,
}
