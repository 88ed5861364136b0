"""The sizes of a model: what has to be known to build it, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import open_clip

from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.manifest import (
    MAX_CONTEXT_LENGTH,
    MAX_EMBEDDING_DIM,
    MAX_INPUT_SIZE,
    MAX_NUM_FRAMES,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

VISUAL_PROMPTS = ("joint", "shift", "meanp", "conv1d", "lstm", "transf", "transf_cls")

# Frames see each other inside the visual tower, so it cannot be run frame by frame.
MIXING_PROMPTS = ("joint", "shift")

# The original's `tsm: True` goes with any of its heads, its default `Transf` among them; the paper
# does not say which its row "Shift" had. `shift` alone is with the mean.
SHIFT = "shift"
SHIFTED_HEADS = ("conv1d", "lstm", "transf", "transf_cls")
COMBINED_PROMPTS = tuple(f"{SHIFT}+{head}" for head in SHIFTED_HEADS)

ORIGINAL_NORM_EPS = 1e-12
ORIGINAL_PROMPT_LAYERS = 6
ORIGINAL_SCALE = 100.0
HEAD_WIDTH = 64

# As a manifest may say them; the vocabulary is four times the largest of open_clip's models.
_LARGEST = {
    "num_frames": MAX_NUM_FRAMES,
    "input_size": MAX_INPUT_SIZE,
    "embed_dim": MAX_EMBEDDING_DIM,
    "context_length": MAX_CONTEXT_LENGTH,
    "vocab_size": 10**6,
    "prompt_layers": 1000,
}

_QUICK_GELU_SUFFIX = "-quickgelu"
_OPENAI_BACKBONES = frozenset(
    {"RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"}
    | {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"}
)
_VISION_KEYS = frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"})
_TEXT_KEYS = frozenset({"context_length", "vocab_size", "width", "heads", "layers"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices that define one ActionCLIP model.

    Attributes:
        backbone: open_clip's name of the towers, or a description of a custom one.
        embed_dim: D, the width of features and embeddings.
        input_size: Height and width of a frame at the visual tower, in pixels.
        vision_layers: Blocks of a ViT, or blocks of the four stages of a ResNet.
        vision_width: Channels of a ViT's tokens, or of a ResNet's first stage.
        patch_size: Pixels on a patch's side; None for a ResNet.
        context_length: Largest L, in tokens.
        vocab_size: Rows of the token table.
        text_width: Channels of the textual tower's tokens.
        text_heads: Attention heads of the textual tower.
        text_layers: Blocks of the textual tower.
        vision_head_width: Channels per attention head of the visual tower.
        vision_mlp_ratio: Hidden width of a ViT block's MLP over `vision_width`.
        quick_gelu: Whether the towers use x * sigmoid(1.702 x), as OpenAI's weights want,
            instead of GELU.
        visual_prompt: How time enters, one of `VISUAL_PROMPTS` or `COMBINED_PROMPTS`.
        num_frames: T that the model was made for.
        prompt_layers: Blocks of `transf` and `transf_cls`; the others have none.
        position_rows: Rows of the temporal position table, the largest T that can run; for
            `transf_cls` and `joint` the only one. None where any T can run.
        prompt_norm_eps: Epsilon of the LayerNorms of `transf`: 1e-12 in the original, 1e-5 in
            mmaction2.
        scale: Multiplier of the cosine at evaluation, dimensionless.
    """

    backbone: str
    embed_dim: int
    input_size: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    patch_size: int | None
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_head_width: int = HEAD_WIDTH
    vision_mlp_ratio: float = 4.0
    quick_gelu: bool = True
    visual_prompt: str = "transf"
    num_frames: int = 8
    prompt_layers: int = ORIGINAL_PROMPT_LAYERS
    position_rows: int | None = None
    prompt_norm_eps: float = ORIGINAL_NORM_EPS
    scale: float = ORIGINAL_SCALE

    def __post_init__(self) -> None:
        check_visual_prompt(self.visual_prompt)
        for name, most in _LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it has to be from 1 to {most:,}"
                )
        if not self.frames_are_independent and self.patch_size is None:
            raise ValueError(
                f"visual prompt {self.visual_prompt!r} works on the tokens of a ViT, and "
                f"{self.backbone} is a ResNet; choose one of "
                f"{[name for name in VISUAL_PROMPTS if name not in MIXING_PROMPTS]}"
            )
        rows = self.position_rows
        fixed = self.head in ("transf_cls", "joint")
        if rows is not None and (self.num_frames > rows or (fixed and self.num_frames != rows)):
            allowed = f"T = {rows}" if fixed else f"T from 1 to {rows}"
            raise ArgumentError(
                "num_frames",
                f"is {self.num_frames}, but the temporal position table of this "
                f"{self.visual_prompt!r} model allows {allowed}",
            )

    @property
    def frames_are_independent(self) -> bool:
        """Whether a frame's feature is the same whatever clip the frame is part of."""
        return self.visual_prompt.partition("+")[0] not in MIXING_PROMPTS

    @property
    def is_shifted(self) -> bool:
        """Whether channels move between the frames of a clip before every block."""
        return self.visual_prompt.partition("+")[0] == SHIFT

    @property
    def head(self) -> str:
        """What fuses frame features, one of `VISUAL_PROMPTS` without `shift`."""
        return head_of(self.visual_prompt)

    @property
    def prompt_heads(self) -> int:
        """Attention heads of `transf`: as many as 64 goes into the textual width."""
        return max(self.text_width // HEAD_WIDTH, 1)

    @classmethod
    def from_open_clip(
        cls,
        name: str = "ViT-B-32",
        *,
        visual_prompt: str = "transf",
        num_frames: int = 8,
        quick_gelu: bool | None = None,
    ) -> ModelConfig:
        """Take the sizes of the towers from one of open_clip's model configurations.

        Args:
            quick_gelu: The activation of the towers. None takes QuickGELU for names that end in
                "-quickgelu" and for the backbones that OpenAI published, which ActionCLIP starts
                from; open_clip's own weights of such a backbone want False.
        """
        base = name.removesuffix(_QUICK_GELU_SUFFIX)
        sizes = tower_sizes(name)
        if quick_gelu is None:
            quick_gelu = name != base or base in _OPENAI_BACKBONES
        config = cls(backbone=base, quick_gelu=quick_gelu, **sizes)
        return config.with_visual_prompt(visual_prompt, num_frames=num_frames)

    def with_visual_prompt(
        self, visual_prompt: str, *, num_frames: int, position_rows: int | None = None
    ) -> ModelConfig:
        """The same towers under another visual prompt.

        Args:
            position_rows: Rows of the temporal position table; None for the original's choice
                (the context length for `transf`, T for `transf_cls` and `joint`).
        """
        original = {"transf": self.context_length, "transf_cls": num_frames, "joint": num_frames}
        rows = position_rows or original.get(head_of(visual_prompt))
        return replace(self, visual_prompt=visual_prompt, num_frames=num_frames, position_rows=rows)


def check_visual_prompt(name: str) -> None:
    """Raise a `ValueError` for a name of neither `VISUAL_PROMPTS` nor `COMBINED_PROMPTS`."""
    allowed = (*VISUAL_PROMPTS, *COMBINED_PROMPTS)
    if name not in allowed:
        raise ArgumentError("visual_prompt", f"is {name!r}; it has to be one of {list(allowed)}")


def head_of(visual_prompt: str) -> str:
    """What fuses frame features: the visual prompt itself, but the mean or another for shift."""
    if visual_prompt == SHIFT:
        return "meanp"
    return visual_prompt.removeprefix(f"{SHIFT}+")


def tower_sizes(name: str) -> dict[str, Any]:
    """The tower fields of a `ModelConfig` for one of open_clip's models.

    Raises:
        ValueError: If open_clip has no such model, or one of another architecture.
    """
    found = open_clip.get_model_config(name)
    if found is None:
        raise ValueError(
            f"open_clip has no model {name!r}; use one of its ViT or RN names, such as "
            "'ViT-B-32', 'ViT-B-16', 'ViT-L-14' or 'RN50'"
        )
    vision, text = found["vision_cfg"], found["text_cfg"]
    special = sorted((vision.keys() - _VISION_KEYS) | (text.keys() - _TEXT_KEYS))
    if special:
        raise ValueError(
            f"open_clip's model {name!r} sets {', '.join(special)}; only CLIP's plain ViT or "
            "ResNet with CLIP's text transformer is supported, such as 'ViT-B-16' or 'RN50'"
        )
    layers = vision["layers"]
    return {
        "embed_dim": found["embed_dim"],
        "input_size": vision["image_size"],
        "vision_layers": tuple(layers) if isinstance(layers, list) else layers,
        "vision_width": vision["width"],
        "patch_size": vision.get("patch_size"),
        "vision_head_width": vision.get("head_width", HEAD_WIDTH),
        "vision_mlp_ratio": vision.get("mlp_ratio", 4.0),
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "text_width": text["width"],
        "text_heads": text["heads"],
        "text_layers": text["layers"],
    }


def config_from_state_dict(towers: Mapping[str, Tensor], *, quick_gelu: bool) -> ModelConfig:
    """Read the sizes of both towers off the shapes of their tensors.

    Heads are 64 channels wide, and there is at least one, unless the sizes are those of one of
    open_clip's models that has wider heads.

    Returns:
        The sizes, with `meanp` as visual prompt and T = 1.

    Raises:
        KeyError: If a tensor that gives a size is missing.
    """
    shape = {key: tuple(value.shape) for key, value in towers.items()}
    text_width = shape["ln_final.weight"][0]
    sizes = {
        "embed_dim": shape["text_projection"][1],
        "context_length": shape["positional_embedding"][0],
        "vocab_size": shape["token_embedding.weight"][0],
        "text_width": text_width,
        "text_heads": max(text_width // HEAD_WIDTH, 1),
        "text_layers": _count_blocks(shape, "transformer.resblocks."),
        **(_vit_sizes(shape) if "visual.class_embedding" in shape else _resnet_sizes(shape)),
    }
    backbone, head_sizes = _known_backbone(sizes)
    return ModelConfig(
        backbone=backbone,
        quick_gelu=quick_gelu,
        visual_prompt="meanp",
        num_frames=1,
        **{**sizes, **head_sizes},
    )


def _count_blocks(keys: Mapping[str, Any], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def _vit_sizes(shape: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, _, _, patch = shape["visual.conv1.weight"]
    hidden = shape["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]
    grid = round((shape["visual.positional_embedding"][0] - 1) ** 0.5)
    return {
        "input_size": grid * patch,
        "vision_layers": _count_blocks(shape, "visual.transformer.resblocks."),
        "vision_width": width,
        "patch_size": patch,
        "vision_head_width": min(HEAD_WIDTH, width),
        # The quarter keeps int(width * ratio) from rounding down to hidden - 1.
        "vision_mlp_ratio": 4.0 if hidden == 4 * width else (hidden + 0.25) / width,
    }


def _resnet_sizes(shape: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    grid = round((shape["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
    return {
        "input_size": grid * 32,
        "vision_layers": tuple(_count_blocks(shape, f"visual.layer{i}.") for i in range(1, 5)),
        "vision_width": shape["visual.layer1.0.conv1.weight"][0],
        "patch_size": None,
        "vision_head_width": HEAD_WIDTH,
        "vision_mlp_ratio": 4.0,
    }


def _known_backbone(sizes: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """open_clip's name of these sizes and the head sizes it has, or a description and none."""
    compared = sizes.keys() - {"input_size", "text_heads", "vision_head_width", "vision_mlp_ratio"}
    resized = None
    for name in open_clip.list_models():
        if name.endswith(_QUICK_GELU_SUFFIX):
            continue
        try:
            known = tower_sizes(name)
        except ValueError:
            continue
        if any(known[key] != sizes[key] for key in compared):
            continue
        heads = {key: known[key] for key in ("text_heads", "vision_head_width")}
        if known["input_size"] == sizes["input_size"]:
            return name, heads
        resized = resized or (f"{name} at {sizes['input_size']} pixels", heads)
    if resized:
        return resized
    if sizes["patch_size"] is None:
        return f"custom RN (width {sizes['vision_width']}, layers {sizes['vision_layers']})", {}
    return (
        f"custom ViT (width {sizes['vision_width']}, layers {sizes['vision_layers']}, "
        f"patch {sizes['patch_size']})"
    ), {}
