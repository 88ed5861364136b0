"""Checkpoints that are known by name instead of a file's path.

`motions` is the default model, which comes with the package:

    motions/motions.safetensors weights under the names of the original's checkpoints, with the
                                prefixes `model.` and `fusion.`; of the token table only the rows
                                that were trained, under `token_rows` their numbers
    motions/motions.json        provenance: configurations, commit, seed, time, accuracy

The other rows of its token table are zero, so a word that it never met says nothing to it.

`open_clip:MODEL/TAG` are weights that open_clip fetches, or takes from its cache.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import safetensors.torch
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor

from actionclip_deploy.errors import ArgumentError, CheckpointError
from actionclip_deploy.files import staged_file, write_json
from actionclip_deploy.model.checkpoint_files import read_checkpoint_file
from actionclip_deploy.model.config import tower_sizes
from actionclip_deploy.model.families import FamilyWeights, read_family
from actionclip_deploy.tokenizer import NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actionclip_deploy.model.network import ActionClipNetwork


PACKAGED_MODELS = ("motions",)
_OPEN_CLIP = "open_clip:"
_TOKEN_TABLE = "model.token_embedding.weight"
_TOKEN_ROWS = "token_rows"


def is_packaged(path: str | Path) -> bool:
    """Whether a checkpoint is named as one that comes with the package, and no such file exists."""
    return str(path) in PACKAGED_MODELS and not Path(path).is_file()


def packaged_path(name: str) -> Path:
    """The file of a packaged model's weights."""
    return Path(str(files("actionclip_deploy"))) / name / f"{name}.safetensors"


def read_provenance(name: str) -> dict[str, Any]:
    """What the weights of a packaged model come from, and what they reach."""
    text = packaged_path(name).with_suffix(".json").read_text(encoding="utf-8")
    provenance: dict[str, Any] = json.loads(text)
    return provenance


def read_packaged(name: str, family: str = "auto") -> tuple[FamilyWeights, Path]:
    """Read a packaged model: its tensors with T, and the file that they came from.

    Raises:
        ValueError: If another family is expected.
        CheckpointError: If the file of the package is missing or damaged.
    """
    if family not in ("auto", "original"):
        raise ArgumentError(
            "family", f"is {family!r}; the weights of {name} are of the family 'original'"
        )
    path = packaged_path(name)
    try:
        tensors = safetensors.torch.load_file(path)
        provenance = read_provenance(name)
        num_frames, licence = int(provenance["num_frames"]), str(provenance["licence"])
        content, words = _unpack(tensors), len(tensors[_TOKEN_ROWS])
    except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as exc:
        raise CheckpointError(
            f"The weights of {name} cannot be read ({exc}); install actionclip-deploy again"
        ) from exc
    weights = read_family(content, path, "original")
    weights.num_frames, weights.licence = num_frames, licence
    weights.clip_seconds = provenance.get("clip_seconds")
    weights.notes.append(
        f"{name} comes with this package and knows {words} of CLIP's {NUM_TOKENS} tokens, those "
        "of coloured shapes in motion; other words say nothing to it"
    )
    return weights, path


def _unpack(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Bring tensors into the structure of the original's checkpoints."""
    known = tensors[_TOKEN_TABLE]
    table = torch.zeros(NUM_TOKENS, known.shape[1], dtype=known.dtype)
    table[tensors[_TOKEN_ROWS].long()] = known
    whole = {**tensors, _TOKEN_TABLE: table}

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}

    return {
        "model_state_dict": below("model."),
        "fusion_model_state_dict": {f"module.{k}": v for k, v in below("fusion.").items()},
    }


def write_packaged(
    model: ActionClipNetwork, token_rows: Sequence[int], provenance: dict[str, Any], path: Path
) -> None:
    """Write a model and its provenance as `read_packaged` reads them."""
    rows = torch.tensor(sorted(token_rows), dtype=torch.int32)
    tensors = {f"model.{key}": value for key, value in model.towers.state_dict().items()}
    tensors |= {f"fusion.{key}": value for key, value in model.visual_prompt.state_dict().items()}
    tensors[_TOKEN_TABLE] = tensors[_TOKEN_TABLE][rows.long()]
    tensors[_TOKEN_ROWS] = rows
    content = {**provenance, "num_frames": model.config.num_frames}
    with staged_file(path) as staged:
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in tensors.items()}, staged
        )
    write_json(path.with_suffix(".json"), content)


def is_pretrained_tag(path: str | Path) -> bool:
    """Whether a checkpoint is named as one of open_clip's, such as "open_clip:ViT-B-32/openai"."""
    return str(path).startswith(_OPEN_CLIP)


def read_pretrained(tag: str, family: str = "auto") -> tuple[FamilyWeights, Path]:
    """Weights of open_clip, and the file that they came from.

    Raises:
        ValueError: If they are of another family than the one expected.
        CheckpointError: If open_clip has no such weights, if the model is of an unsupported
            architecture, or if the weights cannot be fetched.
    """
    name, _, wanted = tag.removeprefix(_OPEN_CLIP).partition("/")
    found = get_pretrained_cfg(name, wanted)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"its tags are {', '.join(tags)}" if tags else "it has no such model"
        raise CheckpointError(
            f"open_clip has no weights {wanted!r} of model {name!r}: {known}; write "
            "open_clip:MODEL/TAG, such as open_clip:ViT-B-32/laion2b_s34b_b79k"
        )
    # Of a "-quickgelu" model as well as of a tag that open_clip knows to want it.
    quick_gelu = name.endswith("-quickgelu") or bool(found.get("quick_gelu"))
    own = "openai" if wanted == "openai" else "open_clip-quickgelu" if quick_gelu else "open_clip"
    if family not in ("auto", own):
        raise ArgumentError(
            "family", f"is {family!r}; the weights of {tag} are of the family {own!r}"
        )
    try:
        tower_sizes(name)
    except ValueError as exc:
        raise CheckpointError(f"{tag}: {exc}") from exc
    try:
        path = Path(open_clip.download_pretrained(found))
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(
            f"{tag} could not be fetched ({exc}); connect to the network once, or give the path "
            "of a file that was downloaded elsewhere"
        ) from exc
    weights = read_family(read_checkpoint_file(path), path, own)
    weights.pixel_mean = tuple(found["mean"])
    weights.pixel_std = tuple(found["std"])
    return weights, path
