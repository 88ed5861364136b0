"""The visual prompts: how T frame features of a clip become one feature.

    meanp       mean over T
    lstm        one LSTM layer, added to its input, mean over T
    conv1d      depthwise convolution, added to its input, mean over T
    transf      six pre-norm transformer blocks, added to its input, mean over T
    transf_cls  six post-norm transformer blocks over T frames and a class token
    shift       mean over T; the frames were mixed inside the visual tower. `shift+transf` and so on
                have another head after it
    joint       nothing; the visual tower has given one feature for the clip

Every module maps features (B, T, D) to features (B, D), neither normalised, and has the key
names of the original, so the `fusion_model_state_dict` of a checkpoint loads as it is once its
`module.` prefix is off. Modules compute in the type of their own weights and give the type of
their input.

Source:
    sallymmx/ActionCLIP@31c34df modules/Visual_Prompt.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from open_clip.transformer import LayerNormFp32, QuickGELU, Transformer
from torch import Tensor, nn

if TYPE_CHECKING:
    from actionclip_deploy.model.config import ModelConfig

INIT_STD = 0.02
CLASS_TOKEN_HEADS = 8  # fixed in the original, unlike those of transf
CLASS_TOKEN_HIDDEN = 2048


class MeanPool(nn.Module):
    """`meanp`, and the last step of `shift`: the mean of the features over T."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        return features.mean(dim=1)


class LstmPrompt(nn.Module):
    """`lstm`: one unidirectional LSTM layer over T, a residual, and the mean over T."""

    def __init__(self, embed_dim: int, table_rows: int) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(table_rows, embed_dim)
        self.lstm_visual = nn.LSTM(embed_dim, embed_dim, batch_first=True)
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        x: Tensor = self.lstm_visual(features.to(self.frame_position_embeddings.weight.dtype))[0]
        return (x.to(features.dtype) + features).mean(dim=1)


class Conv1dPrompt(nn.Module):
    """`conv1d`: a depthwise convolution of width 3, a residual, and the mean over T.

    The original reads the memory of (B, T, D) as (B, D, T) where a transpose is meant, so its
    convolution runs over a mixture of time and channels. Published numbers and trained weights
    come from that, so it stays.
    """

    def __init__(self, embed_dim: int, table_rows: int) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(table_rows, embed_dim)
        self.shift = nn.Conv1d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        _initialise(self)
        # It starts as a shift: a quarter of the channels from the place before, a quarter from
        # the one after.
        quarter = embed_dim // 4
        with torch.no_grad():
            self.shift.weight.zero_()
            self.shift.weight[:quarter, 0, 0] = 1.0
            self.shift.weight[quarter : quarter + embed_dim // 2, 0, 1] = 1.0
            self.shift.weight[embed_dim - quarter :, 0, 2] = 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_frames, embed_dim = features.shape[1:]
        x = features.contiguous().view(-1, embed_dim, num_frames)
        mixed: Tensor = self.shift(x.to(self.shift.weight.dtype)).permute(0, 2, 1)  # (B, T, D)
        return (mixed.to(features.dtype) + features).mean(dim=1)


class TransformerPrompt(nn.Module):
    """`transf`: pre-norm transformer blocks over T, a residual around them, and the mean over T.

    The residual adds the features without their position embeddings, and there is no LayerNorm
    at the end.

    Args:
        position_rows: Rows of the position table, the largest T.
    """

    def __init__(
        self, embed_dim: int, layers: int, heads: int, position_rows: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(position_rows, embed_dim)
        self.transformer = Transformer(
            embed_dim,
            layers,
            heads,
            act_layer=QuickGELU,  # whatever the towers use
            norm_layer=partial(LayerNormFp32, eps=norm_eps),
        )
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        positions = self.frame_position_embeddings.weight[: features.shape[1]]  # (T, D)
        x: Tensor = self.transformer(features.to(positions.dtype) + positions)
        return (x.to(features.dtype) + features).mean(dim=1)


class ClassTokenTransformer(nn.Module):
    """A class token and T features through a post-norm encoder; gives the class token."""

    def __init__(self, embed_dim: int, layers: int, num_frames: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            embed_dim, CLASS_TOKEN_HEADS, dim_feedforward=CLASS_TOKEN_HIDDEN, batch_first=True
        )
        self.transformer_enc = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False
        )
        self.cls_token = nn.Parameter(_truncated_normal(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(_truncated_normal(1, num_frames + 1, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(_truncated_normal(*module.weight.shape))
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        class_tokens = self.cls_token.expand(features.shape[0], -1, -1)
        tokens = torch.cat((class_tokens, features), dim=1) + self.pos_embed  # (B, 1 + T, D)
        x: Tensor = self.transformer_enc(tokens)
        return x[:, 0]


class ClassTokenPrompt(nn.Module):
    """`transf_cls`: the class token of a post-norm transformer; neither residual nor mean."""

    def __init__(self, embed_dim: int, layers: int, num_frames: int, table_rows: int) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(table_rows, embed_dim)
        _initialise(self)
        self.transformer = ClassTokenTransformer(embed_dim, layers, num_frames)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        x: Tensor = self.transformer(features.to(self.transformer.cls_token.dtype))
        return x.to(features.dtype)


def build_visual_prompt(config: ModelConfig) -> nn.Module:
    """Build the module that fuses frame features, initialised as the original does it."""
    dim, layers, rows = config.embed_dim, config.prompt_layers, config.context_length
    match config.head:
        case "joint":
            return nn.Identity()
        case "meanp":
            return MeanPool()
        case "lstm":
            return LstmPrompt(dim, rows)
        case "conv1d":
            return Conv1dPrompt(dim, rows)
        case "transf_cls":
            return ClassTokenPrompt(dim, layers, config.num_frames, rows)
        case _:
            rows = config.position_rows or rows
            return TransformerPrompt(dim, layers, config.prompt_heads, rows, config.prompt_norm_eps)


def _truncated_normal(*shape: int) -> Tensor:
    """A normal draw folded back at two deviations, with a deviation of 0.02."""
    return torch.randn(*shape).fmod(2.0) * INIT_STD


def _initialise(prompt: nn.Module) -> None:
    # in_proj_weight of an attention is not a Linear and keeps torch's own initialisation,
    # as do LSTM and convolution.
    for module in prompt.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
