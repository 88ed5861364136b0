"""How large a model is: parameters, multiply-accumulates (MACs) and FLOPs, without its weights.

MACs follow the paper: those of T frames through the visual tower and the visual prompt, text
left out, although the paper calls them FLOPs.
"""

from __future__ import annotations

import torch

from actionclip_deploy.model.actionclip import ActionCLIP
from actionclip_deploy.model.config import ModelConfig
from actionclip_deploy.model.visual_prompts import CLASS_TOKEN_HEADS, CLASS_TOKEN_HIDDEN

_PROMPT_HIDDEN_RATIO = 4


def count_parameters(model: ActionCLIP | ModelConfig) -> dict[str, int]:
    """Count parameters of each part and in total.

    Args:
        model: A model, or a configuration, for which no weights are made.

    Returns:
        Counts under "visual", "temporal" (the visual prompt), "textual" (with the token
        embedding and the logit scale) and "total".
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = ActionCLIP(model)
    visual = sum(parameter.numel() for parameter in model.towers.visual.parameters())
    both = sum(parameter.numel() for parameter in model.towers.parameters())
    temporal = sum(parameter.numel() for parameter in model.visual_prompt.parameters())
    return {
        "visual": visual,
        "temporal": temporal,
        "textual": both - visual,
        "total": both + temporal,
    }


def count_macs(config: ModelConfig, *, num_frames: int | None = None) -> int:
    """Count the MACs of one clip in the paper's convention.

    Counted are matrix products and convolutions and, within attention, biases, the scaling of
    the queries and the softmax; biases elsewhere, norms, activations and residuals are not.

    Args:
        config: The model.
        num_frames: T; None for the model's own.

    Source:
        arXiv 2109.08472, table 6, which prints 35.4, 140.8, 281.6 and 563.1 G for ViT-B/32 with
        8 frames and ViT-B/16 with 8, 16 and 32.
    """
    return _count(config, num_frames or config.num_frames, extras=True)


def count_flops(config: ModelConfig, *, num_frames: int | None = None) -> int:
    """Count the floating-point operations of one clip: two for each MAC of a matrix product.

    Args:
        config: The model.
        num_frames: T; None for the model's own.
    """
    return 2 * _count(config, num_frames or config.num_frames, extras=False)


def _count(config: ModelConfig, num_frames: int, *, extras: bool) -> int:
    if isinstance(config.vision_layers, tuple):
        visual = num_frames * _resnet(config, config.vision_layers, extras=extras)
    elif config.visual_prompt == "joint":
        visual = _vit(config, config.vision_layers, num_frames, extras=extras)
    else:
        visual = num_frames * _vit(config, config.vision_layers, 1, extras=extras)
    return visual + _prompt(config, num_frames, extras=extras)


def _vit(config: ModelConfig, layers: int, frames: int, *, extras: bool) -> int:
    """MACs of a ViT over one sequence with the patches of one or more frames."""
    patch, width = config.patch_size or 1, config.vision_width
    patches = frames * (config.input_size // patch) ** 2
    heads = width // config.vision_head_width
    hidden = int(width * config.vision_mlp_ratio)
    embed = 3 * patch * patch * width * patches
    blocks = layers * _block(patches + 1, width, heads, hidden, extras=extras)
    return embed + blocks + width * config.embed_dim


def _block(tokens: int, width: int, heads: int, hidden: int, *, extras: bool) -> int:
    attention = _attention(tokens, tokens, width, heads, width, extras=extras)
    return attention + 2 * tokens * width * hidden


def _attention(
    queries: int, keys: int, width: int, heads: int, width_out: int, *, extras: bool
) -> int:
    projections = (queries + 2 * keys) * width * width + queries * width * width_out
    products = 2 * queries * keys * width
    if not extras:
        return projections + products
    biases = (queries + 2 * keys) * width + queries * width_out
    return projections + products + biases + queries * width + heads * queries * keys


def _resnet(config: ModelConfig, stages: tuple[int, ...], *, extras: bool) -> int:
    """MACs of CLIP's ResNet over one frame."""
    width, side = config.vision_width, config.input_size // 2
    stem = side**2 * 9 * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
    side, channels, total = side // 2, width, stem
    for stage, blocks in enumerate(stages):
        planes = width * 2**stage
        for block in range(blocks):
            before, stride = side, 2 if stage and not block else 1
            side //= stride
            total += before**2 * (channels * planes + 9 * planes**2)
            total += side**2 * 4 * planes**2
            if not block:  # the shortcut, behind its average pool
                total += side**2 * channels * 4 * planes
            channels = 4 * planes
    tokens = side**2 + 1
    heads = width * 32 // config.vision_head_width
    # open_clip queries with every token although one is used.
    pool = _attention(tokens, tokens, channels, heads, config.embed_dim, extras=extras)
    return total + pool


def _prompt(config: ModelConfig, num_frames: int, *, extras: bool) -> int:
    width, layers = config.embed_dim, config.prompt_layers
    match config.visual_prompt:
        case "transf":
            hidden = _PROMPT_HIDDEN_RATIO * width
            return layers * _block(num_frames, width, config.prompt_heads, hidden, extras=extras)
        case "transf_cls":
            tokens, hidden = num_frames + 1, CLASS_TOKEN_HIDDEN
            return layers * _block(tokens, width, CLASS_TOKEN_HEADS, hidden, extras=extras)
        case "lstm":
            return num_frames * 8 * width**2
        case "conv1d":
            return num_frames * 3 * width
        case _:
            return 0
