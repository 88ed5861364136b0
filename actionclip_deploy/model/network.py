"""The ActionCLIP model: CLIP's two towers and a visual prompt.

    pixels (B, T, 3, S, S) -> frame features (B * T, D) -> features (B, D) -> embeddings (B, D)
    tokens (M, L) -> features (M, D) -> embeddings (M, D)

Letters as in the whole package: N frames, B clips of T frames, M prompts of L tokens, D channels.

open_clip's own forward passes mix no frames inside a ViT (`shift`, `joint`) and read text at its
full context; the functions here do the one, and read prompts at their own length.

Source:
    arXiv 2109.08472, section 3.3; sallymmx/ActionCLIP@31c34df clip/model.py and
    modules/temporal_shift.py. The public code of `joint` does not run; what is here is the
    mathematics that it was to do.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.model import CLIP
from torch import Tensor, nn

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.model.config import ModelConfig
from actionclip_deploy.model.visual_prompts import (
    CLASS_TOKEN_HEADS,
    CLASS_TOKEN_HIDDEN,
    build_visual_prompt,
)

# Of red, green and blue in 0 to 1, the statistics of CLIP's training images.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

SHIFT_FOLDS = 8  # an eighth of the channels comes from the next frame, an eighth from the last
_PROMPT_HIDDEN_RATIO = 4


class ActionClipNetwork(nn.Module):
    """CLIP's towers with one of the seven visual prompts.

    Attributes:
        config: The sizes and choices given.
        towers: Both towers as `open_clip.model.CLIP`, under CLIP's key names.
        visual_prompt: Maps frame features (B, T, D) to features (B, D), not normalised.
        frames_are_independent: Whether frames can be encoded one by one; False for `joint` and
            `shift`, which mix them inside the visual tower.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.towers = build_towers(config)
        self.visual_prompt = build_visual_prompt(config)
        self.frames_are_independent = config.frames_are_independent

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed clips (B, T, 3, S, S) and prompts (M, L) as (B, D) and (M, D), unit norm."""
        return self.encode_video(pixels), self.encode_text(tokens)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Encode frames one by one.

        Args:
            pixels: Normalised frames, shape (N, 3, S, S).

        Returns:
            Frame features, shape (N, D), not normalised.

        Raises:
            ValueError: If the visual prompt mixes frames inside the tower.
            ShapeError: If the frames are not (N, 3, S, S).
        """
        if not self.frames_are_independent:
            raise ValueError(
                f"visual prompt {self.config.visual_prompt!r} mixes the frames of a clip inside "
                "the visual tower, so single frames have no feature; use encode_video"
            )
        size = self.config.input_size
        _check_shape("frames", pixels, (None, 3, size, size))
        features: Tensor = self.towers.visual(pixels)
        return features

    def fuse_frames(self, features: Tensor) -> Tensor:
        """Fuse frame features (B, T, D) into features of clips (B, D), not normalised.

        Raises:
            ValueError: If the visual prompt is `joint`, which has no features of frames.
            ShapeError: If D is another, or the model cannot run that T.
        """
        config = self.config
        if config.visual_prompt == "joint":
            raise ValueError(
                "visual prompt 'joint' gives one feature for a clip and none for its frames; "
                "use encode_video"
            )
        _check_shape("frame features", features, (None, None, config.embed_dim))
        self._check_num_frames(features)
        fused: Tensor = self.visual_prompt(features)
        return fused

    def encode_clips(self, features: Tensor) -> Tensor:
        """Fuse frame features (B, T, D) into embeddings (B, D), unit norm; see `fuse_frames`."""
        return F.normalize(self.fuse_frames(features), dim=-1)

    def encode_video_features(self, pixels: Tensor) -> Tensor:
        """Encode whole clips under any visual prompt.

        Args:
            pixels: Normalised frames, shape (B, T, 3, S, S).

        Returns:
            Features, shape (B, D), not normalised.

        Raises:
            ShapeError: If the frames are not (B, T, 3, S, S), or the model cannot run that T.
        """
        size = self.config.input_size
        _check_shape("clips", pixels, (None, None, 3, size, size))
        self._check_num_frames(pixels)
        if self.config.visual_prompt == "joint":
            return encode_jointly(self.towers.visual, pixels)
        if self.config.is_shifted:
            return self.fuse_frames(encode_shifted(self.towers.visual, pixels))
        features = self.encode_frames(pixels.flatten(0, 1))
        return self.fuse_frames(features.reshape(-1, pixels.shape[1], features.shape[-1]))

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode clips as `encode_video_features` does, to embeddings (B, D), unit norm."""
        return F.normalize(self.encode_video_features(pixels), dim=-1)

    def encode_text_features(self, tokens: Tensor) -> Tensor:
        """Encode prompts at their own length.

        Args:
            tokens: Token ids, shape (M, L), int32 or int64, L up to the context length.

        Returns:
            Features, shape (M, D), not normalised.

        Raises:
            ShapeError: If the tokens are not (M, L) or longer than the context.
        """
        _check_shape("tokens", tokens, (None, None))
        limit = self.config.context_length
        if not _is_traced() and tokens.shape[1] > limit:
            raise ShapeError(
                f"tokens have shape {tuple(tokens.shape)}, longer than the context of {limit}; "
                "shorten the prompts"
            )
        return encode_tokens(self.towers, tokens)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode prompts as `encode_text_features` does, to embeddings (M, D), unit norm."""
        return F.normalize(self.encode_text_features(tokens), dim=-1)

    def _check_num_frames(self, clips: Tensor) -> None:
        rows = self.config.position_rows
        if rows is None or _is_traced():
            return
        num_frames = clips.shape[1]
        fixed = self.config.head in ("transf_cls", "joint")
        if num_frames > rows or (fixed and num_frames != rows):
            raise ShapeError(
                f"clips of T = {num_frames} frames were given, but visual prompt "
                f"{self.config.visual_prompt!r} has positions for {rows}; give "
                f"{'exactly' if fixed else 'at most'} {rows} frames"
            )


def build_model(config: ModelConfig, *, seed: int | None = None) -> ActionClipNetwork:
    """Build a model in eval mode with random weights, as the original initialises them.

    Args:
        seed: Makes the weights repeatable and leaves torch's global generator untouched; None
            draws from the global generator.
    """
    with nullcontext() if seed is None else torch.random.fork_rng(devices=()):
        if seed is not None:
            torch.manual_seed(seed)
        return ActionClipNetwork(config).eval()


def _is_traced() -> bool:
    # Under an exporter sizes are symbols, and comparing one would fix it in the graph.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _check_shape(what: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if _is_traced():
        return
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        wanted in (None, got) for wanted, got in zip(shape, given, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{what} have shape {given}; give ({wanted})")


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

    The mask lets no token see a later one, so padding after the last end-of-text token changes
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


def count_parameters(model: ActionClipNetwork | ModelConfig) -> dict[str, int]:
    """Count parameters of each part and in total.

    Returns:
        Counts under "visual", "temporal" (the visual prompt), "textual" (with the token
        embedding and the logit scale) and "total". For a configuration, no weights are made.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = ActionClipNetwork(model)
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
    """Count the multiply-accumulates (MACs) of one clip in the paper's convention.

    These are of T frames (by default the model's own) through the visual tower and the visual
    prompt, without the text, although the paper calls them FLOPs.

    Counted are matrix products and convolutions and, within attention, biases, the scaling of
    the queries and the softmax; biases elsewhere, norms, activations and residuals are not.

    Source:
        arXiv 2109.08472, table 6, which prints 35.4, 140.8, 281.6 and 563.1 G for ViT-B/32 with
        8 frames and ViT-B/16 with 8, 16 and 32.
    """
    return _count(config, num_frames or config.num_frames, extras=True)


def count_flops(config: ModelConfig, *, num_frames: int | None = None) -> int:
    """Count the floating-point operations of one clip: two for each MAC of a matrix product."""
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
            if not block:  # the shortcut, after its average pool
                total += side**2 * channels * 4 * planes
            channels = 4 * planes
    tokens = side**2 + 1
    heads = width * 32 // config.vision_head_width
    # open_clip queries with every token although one is used.
    pool = _attention(tokens, tokens, channels, heads, config.embed_dim, extras=extras)
    return total + pool


def _prompt(config: ModelConfig, num_frames: int, *, extras: bool) -> int:
    width, layers = config.embed_dim, config.prompt_layers
    match config.head:
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
