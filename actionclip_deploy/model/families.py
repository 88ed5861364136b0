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

import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.actionclip import PIXEL_MEAN, PIXEL_STD
from actionclip_deploy.model.config import ORIGINAL_NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
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
_SHIFTED_BLOCK = re.compile(r"^(visual\.transformer\.resblocks\.\d+\.)net\.")
# Sizes that OpenAI's archives carry as buffers, and the mask, which is not a weight.
_NOT_WEIGHTS = re.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask)$")
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
        raise ValueError(f"family is {family!r}; it has to be 'auto' or one of {list(FAMILIES)}")
    tensors = _unwrap(content)
    _refuse_unsupported(content, tensors, path)
    if family == "auto":
        family = _find_family(content, tensors, path, as_base=as_base)
    weights = _READERS[family](content, tensors)
    if not weights.towers:
        raise CheckpointError(
            f"{path} has not the structure of the family {family!r}; its keys start with "
            f"{_first_keys(tensors)}. Leave the family to be found from the keys, or give another"
        )
    entries: dict[str, object] = {**weights.towers, **(weights.head or {})}
    strange = [key for key, value in entries.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path} has entries among its weights that are not tensors: "
            f"{', '.join(strange[:20])}; save it with the weights of the family {family!r} alone"
        )
    return weights


def _unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary that holds the tensors, without a prefix `module.` that all its keys have."""
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, dict):
            return _strip_all(inner, "module.")
    return _strip_all(dict(content), "module.")


def _strip_all(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    if tensors and all(key.startswith(prefix) for key in tensors):
        return {key[len(prefix) :]: value for key, value in tensors.items()}
    return tensors


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose key starts with a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


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

    if isinstance(content.get("fusion_model_state_dict"), dict):
        head = content["fusion_model_state_dict"]
        return "bike" if head and not any(key.startswith("module.") for key in head) else "original"
    if any_start("clip.", "adapter."):
        return "mmaction2"
    if any_start("image_encoder."):
        return "vificlip"
    if any_start("fusion_model.") or ("model_state_dict" in content and not any_start("ln_final.")):
        return "text4vis"
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


def _read_original(content: Mapping[str, Any], tensors: dict[str, Any]) -> FamilyWeights:
    towers = {_SHIFTED_BLOCK.sub(r"\1", key): value for key, value in tensors.items()}
    head = content.get("fusion_model_state_dict")
    if not isinstance(head, dict) or not isinstance(content.get("model_state_dict"), dict):
        return FamilyWeights("original", {}, {})
    return FamilyWeights(
        "original",
        towers,
        _strip_all(head, "module."),
        shifted=towers.keys() != tensors.keys(),
    )


def _read_bike(content: Mapping[str, Any], tensors: dict[str, Any]) -> FamilyWeights:
    weights = _read_original(content, tensors)
    weights.family = "bike"
    weights.templates = ("This is a video about {}",)
    weights.notes.append(
        "taken for BIKE, as the keys of its head have no prefix 'module.', and scored by the mean "
        "of its fused frame features (BIKE's interaction DP); its video concept spotting, which "
        "weights frames by the words of each label, and its attribute branch are left out, so "
        "accuracy is not that of BIKE's tables"
    )
    return weights


def _read_mmaction2(_: Mapping[str, Any], tensors: dict[str, Any]) -> FamilyWeights:
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


def _read_text4vis(_: Mapping[str, Any], tensors: dict[str, Any]) -> FamilyWeights:
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


def _read_vificlip(_: Mapping[str, Any], tensors: dict[str, Any]) -> FamilyWeights:
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
) -> FamilyWeights:
    if "text_projection" not in tensors and "text.text_projection" in tensors:
        tensors = {key.removeprefix("text."): value for key, value in tensors.items()}
    dropped = [key for key in tensors if _NOT_WEIGHTS.search(key)]
    towers = {key: value for key, value in tensors.items() if key not in dropped}
    return FamilyWeights(
        family,
        towers if any(key.startswith("visual.") for key in towers) else {},
        None,
        quick_gelu=quick_gelu,
        learned_scale=learned_scale,
        notes=[f"dropped {', '.join(dropped)}: no weights"] if dropped else [],
    )


_READERS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], FamilyWeights]] = {
    "original": _read_original,
    "mmaction2": _read_mmaction2,
    "openai": partial(_read_plain, "openai", True, False),
    "open_clip": partial(_read_plain, "open_clip", False, True),
    "open_clip-quickgelu": partial(_read_plain, "open_clip-quickgelu", True, True),
    "text4vis": _read_text4vis,
    "vificlip": _read_vificlip,
    "bike": _read_bike,
}
