"""Weights that open_clip fetches by name, written `open_clip:MODEL/TAG`."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.checkpoint_files import read_checkpoint_file
from actionclip_deploy.model.config import tower_sizes
from actionclip_deploy.model.families import FamilyWeights, read_family

_PREFIX = "open_clip:"


def is_pretrained_tag(path: str | Path) -> bool:
    """Whether a checkpoint is named as one of open_clip's, such as "open_clip:ViT-B-32/openai"."""
    return str(path).startswith(_PREFIX)


def read_pretrained(tag: str, family: str = "auto") -> tuple[FamilyWeights, Path]:
    """Fetch weights with open_clip, or take them from its cache.

    Args:
        tag: `open_clip:MODEL/TAG`, both as `open_clip.list_pretrained()` has them.
        family: "auto", or the family that the weights are expected to be of.

    Returns:
        The tensors, and the file that they came from.

    Raises:
        ValueError: If they are of another family than the one expected.
        CheckpointError: If open_clip has no such weights, if the model is of an unsupported
            architecture, or if the weights cannot be fetched.
    """
    name, _, wanted = tag.removeprefix(_PREFIX).partition("/")
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
        raise ValueError(f"family is {family!r}; the weights of {tag} are of the family {own!r}")
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
