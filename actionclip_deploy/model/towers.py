"""Ways through CLIP's towers that open_clip's own forward passes do not offer.

The visual functions mix the frames of a clip inside a ViT (`shift`, `joint`); the textual one
runs at the length of its input instead of the full context.

Source:
    arXiv 2109.08472, section 3.3; sallymmx/ActionCLIP@31c34df clip/model.py and
    modules/temporal_shift.py. The public code of `joint` does not run; what is here is the
    mathematics that it was to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.model import CLIP
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import Any

    from actionclip_deploy.model.config import ModelConfig

SHIFT_FOLDS = 8  # an eighth of the channels comes from the next frame, an eighth from the last


def build_towers(config: ModelConfig) -> Any:
    """Build both towers, initialised as the original does it, as `open_clip.model.CLIP`.

    `joint` adds the parameter `visual.time_embedding`, shape (T, vision width).
    """
    vision = CLIPVisionCfg(
        layers=config.vision_layers,
        width=config.vision_width,
        head_width=config.vision_head_width,
        mlp_ratio=config.vision_mlp_ratio,
        patch_size=config.patch_size,
        image_size=config.input_size,
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    towers = CLIP(
        config.embed_dim,
        vision,
        text,
        quick_gelu=config.quick_gelu,
        cast_dtype=torch.float16,  # makes every LayerNorm compute in fp32; casts nothing
    )
    if config.visual_prompt == "joint":
        width = config.vision_width
        draw = torch.randn(config.num_frames, width) * width**-0.5
        towers.visual.time_embedding = nn.Parameter(draw)
    return towers


def causal_mask(context_length: int) -> Tensor:
    """The additive mask of the textual tower, (L, L): minus infinity where a key is later."""
    return torch.full((context_length, context_length), float("-inf")).triu(1)


def embed_patches(visual: Any, pixels: Tensor) -> Tensor:
    """Turn frames into tokens with positions, before the first LayerNorm.

    Args:
        visual: open_clip's `VisionTransformer`.
        pixels: Normalised frames, shape (N, 3, S, S).

    Returns:
        Tokens, shape (N, 1 + patches, width); the first is the class token.
    """
    patches: Tensor = visual.conv1(pixels).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    tokens = torch.cat((class_token, patches), dim=1)
    positions: Tensor = visual.positional_embedding.to(tokens.dtype)
    return tokens + positions


def project_class_token(visual: Any, tokens: Tensor) -> Tensor:
    """Turn the output of the last block, (N, 1 + patches, width), into features (N, D)."""
    features: Tensor = visual.ln_post(tokens[:, 0]) @ visual.proj
    return features


def shift_frames(tokens: Tensor, num_frames: int) -> Tensor:
    """Give each frame an eighth of its neighbours' channels on either side.

    The first eighth of the channels takes the next frame's values, the second eighth those of
    the frame before; the class token and all other channels stay. Beyond the ends of a clip
    there are zeros.

    Args:
        tokens: Shape (B * T, 1 + patches, width), a clip's frames one after the other.
        num_frames: T.

    Returns:
        Tokens of the same shape.
    """
    class_token, patches = tokens[:, :1], tokens[:, 1:]
    fold = tokens.shape[-1] // SHIFT_FOLDS
    clips = patches.reshape(-1, num_frames, *patches.shape[1:])  # (B, T, patches, width)
    edge = torch.zeros_like(clips[:, :1, :, :fold])
    shifted = torch.cat(
        (
            torch.cat((clips[:, 1:, :, :fold], edge), dim=1),
            torch.cat((edge, clips[:, :-1, :, fold : 2 * fold]), dim=1),
            clips[..., 2 * fold :],
        ),
        dim=-1,
    )
    return torch.cat((class_token, shifted.flatten(0, 1)), dim=1)


def encode_shifted(visual: Any, pixels: Tensor) -> Tensor:
    """Encode clips with a shift of the tokens before every block, on its residual path as well.

    Args:
        visual: open_clip's `VisionTransformer`.
        pixels: Normalised frames, shape (B, T, 3, S, S).

    Returns:
        Frame features, shape (B, T, D).
    """
    num_frames = pixels.shape[1]
    tokens = visual.ln_pre(embed_patches(visual, pixels.flatten(0, 1)))
    for block in visual.transformer.resblocks:
        tokens = block(shift_frames(tokens, num_frames))
    features = project_class_token(visual, tokens)
    return features.reshape(-1, num_frames, features.shape[-1])


def encode_jointly(visual: Any, pixels: Tensor) -> Tensor:
    """Encode clips with attention among the patches of all their frames.

    A time embedding is added to the patches of each frame; the clip has one class token.

    Args:
        visual: open_clip's `VisionTransformer` with the parameter `time_embedding`.
        pixels: Normalised frames, shape (B, T, 3, S, S).

    Returns:
        Features of the clips, shape (B, D).
    """
    num_frames = pixels.shape[1]
    tokens = embed_patches(visual, pixels.flatten(0, 1))
    tokens = tokens.reshape(-1, num_frames, *tokens.shape[1:])  # (B, T, 1 + patches, width)
    class_token = tokens[:, 0, :1]  # the same in every frame
    patches = tokens[:, :, 1:] + visual.time_embedding[:, None].to(tokens.dtype)
    tokens = torch.cat((class_token, patches.flatten(1, 2)), dim=1)  # (B, 1 + T * patches, width)
    return project_class_token(visual, visual.transformer(visual.ln_pre(tokens)))


def encode_tokens(towers: Any, tokens: Tensor) -> Tensor:
    """Encode prompts at their own length, which gives the same numbers as at full length.

    The mask lets no token see a later one, so padding behind the last end-of-text token changes
    nothing.

    Args:
        towers: `open_clip.model.CLIP`.
        tokens: Token ids, shape (M, L), int32 or int64, L up to the context length.

    Returns:
        Features, shape (M, D), at the first largest token id of each row, the end of text.
    """
    length = tokens.shape[1]
    x = towers.token_embedding(tokens).to(towers.transformer.get_cast_dtype())
    x = x + towers.positional_embedding[:length].to(x.dtype)
    x = towers.transformer(x, attn_mask=towers.attn_mask[:length, :length])
    x = towers.ln_final(x)
    ends = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]  # (M, text width)
    features: Tensor = ends @ towers.text_projection
    return features
